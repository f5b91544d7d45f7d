"""Files on a disk or in an object store: complete or absent, and locked by one process at a time."""
