"""Where files lie, on a disk or in an object store: complete or absent, held by one process at a time."""
