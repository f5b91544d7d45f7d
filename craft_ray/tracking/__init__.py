"""Trackers of a run's metrics in addition to its folder, each optional, behind one interface."""

from craft_ray.tracking.content import flatten, without_credentials
from craft_ray.tracking.observer import TrackingObserver
from craft_ray.tracking.opening import open_trackers
from craft_ray.tracking.tracker import STATUS, Status, TrackedRun, Tracker

__all__ = [
    "STATUS",
    "Status",
    "TrackedRun",
    "Tracker",
    "TrackingObserver",
    "flatten",
    "open_trackers",
    "without_credentials",
]
