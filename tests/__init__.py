"""A package of its own: some libraries of the LeRobot environment install theirs under the same name."""
