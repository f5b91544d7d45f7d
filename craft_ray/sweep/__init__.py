"""Searching the method's knobs under a retention target: everything about a sweep except its processes."""
