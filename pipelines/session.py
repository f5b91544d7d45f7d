"""Joining Ray: the cluster of $RAY_ADDRESS where there is one, otherwise this machine alone; quietly."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from craft_ray.errors import ConfigError

KNOBS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a lost worker is noticed in tenths of a second, not in two
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # saves a process a run
}


def join() -> None:
    """Connect this process to Ray, once."""
    if ray.is_initialized():
        return
    for name, value in KNOBS.items():
        os.environ.setdefault(name, value)
    quiet_ray()
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"RAY_ADDRESS is {address}, but no cluster answers there ({reason}): start it, unset RAY_ADDRESS to "
                f"use this machine, or set RAY_AUTH_MODE=token where the cluster asks for a token"
            ) from None
    else:
        ray.init(address="local", include_dashboard=False, **options)


def quiet_ray() -> None:
    """Ray tells of itself only what needs an action."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def check_resources(count: int, each: dict[str, float], what: str) -> str | None:
    """None if the cluster can hold `count` processes that each take `each`, otherwise what it lacks."""
    total = ray.cluster_resources()
    for name, amount in each.items():
        if amount and count * amount > total.get(name, 0.0):
            return (
                f"{what} take {count} x {amount:g} {name}, the cluster has {total.get(name, 0.0):g}: ask for fewer, or "
                f"join a larger cluster with RAY_ADDRESS"
            )
    return None
