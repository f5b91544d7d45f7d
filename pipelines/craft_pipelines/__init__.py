"""Stages of the platform on Ray: anchors, train, compare, demo, and the command line."""
