"""Searching the method's knobs under a retention target: everything of a sweep but its processes."""
