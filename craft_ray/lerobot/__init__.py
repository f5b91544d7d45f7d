"""Policies and data sets of LeRobot, the optional extra `lerobot`: imported only where one is asked for."""
