"""LeRobot policies and data sets (the optional extra `lerobot`). They are imported only when one is used."""
