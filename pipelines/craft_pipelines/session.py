"""Joining Ray: the cluster of $RAY_ADDRESS if it is set, otherwise only this machine; without Ray's log output."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

from craft_pipelines.authentication import check_access, refused
from craft_pipelines.console import line
from craft_pipelines.runtime_env import of_driver
from craft_ray import interruption
from craft_ray.errors import ConfigError, first_line

RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a lost worker is noticed in tenths of a second, not in two seconds
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # saves one process per run
    "RAY_DATA_USAGE_DISABLED": "1",  # saves one process per build of a cache
    # Otherwise Ray starts one process per CPU of this machine in advance. The workers of a run have an environment of
    # their own and use none of them.
    "RAY_prestart_worker_first_driver": "0",
}
ON_CLUSTER = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the cluster's dashboard lists training runs by name
}


class InstalledCode(JobConfig):
    """A job whose processes import what is installed, as the driver does, and nothing from its working directory.

    Ray puts the driver's working directory before the installed packages of every process, so that a user's file with
    the name of a library (`statistics.py`, `datasets/__init__.py`) would be imported in its place. No setting turns
    that off. Ray itself does not do it for a job with a working directory in its runtime environment, which is what
    this class claims to have (Ray is pinned).
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return True


_dashboard: bool | None = None
"""Whether the cluster that this process has joined has a dashboard. None in a process that Ray started."""


def join(dashboard: bool = False) -> None:
    """Connect this process to Ray, once.

    Args:
        dashboard: whether a cluster that is started here has Ray's dashboard, on the loopback interface. Through it Ray
            Train frees the workers of a trial whose process was killed; without it, Ray Train hangs.
    """
    global _dashboard
    if ray.is_initialized():
        if not dashboard or _dashboard:
            return
        ray.shutdown()  # it is ours and idle: a stage is done before the next one joins
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    quiet_ray()
    address = os.environ.get("RAY_ADDRESS")
    _dashboard = dashboard or bool(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "job_config": InstalledCode()}
    if address:
        for name, value in ON_CLUSTER.items():
            os.environ.setdefault(name, value)
        line(f"joining the Ray cluster at {address}")
        try:
            check_access(address)
            ray.init(address=address, runtime_env=of_driver(address, os.environ), **options)
        except AuthenticationError:
            raise refused(address) from None
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"RAY_ADDRESS is {address}, but no cluster answers there ({first_line(error)}): start it, or "
                f"unset RAY_ADDRESS to use this machine"
            ) from None
    else:
        line("starting Ray on this machine")
        with _address_in_environment():
            try:
                ray.init(address="local", include_dashboard=dashboard, **options)
            except Exception as error:  # Ray has no class for the error that its processes do not start in time
                raise ConfigError(
                    f"Ray does not start on this machine ({first_line(error)}): try again when it is less busy, set "
                    f"RAY_ADDRESS to a cluster, or use no Ray processes (workers.num_workers=0)"
                ) from None
    if threading.current_thread() is threading.main_thread():
        interruption.listen_again()
    interruption.check()


def may_have_dashboard() -> bool:
    """False if this process has started the cluster without a dashboard."""
    return _dashboard is not False


@contextmanager
def _address_in_environment() -> Iterator[None]:
    """Give the processes of the cluster that the body starts its address.

    The process that watches over the workers of Ray Train looks up its run by the address in the environment. Without
    one it takes the newest cluster of the machine: it finds no such run there and ends the workers, or finds several
    clusters and no longer frees what a killed trial held.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def quiet_ray() -> None:
    """Let Ray log only what needs an action."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def check_resources(count: int, each: dict[str, float], what: str) -> str | None:
    """None if the cluster can hold `count` processes that each need `each`, otherwise a message of what it lacks."""
    lacking = check_total(count, each, what)
    if lacking or not any(each.values()) or (possible := capacity(each)) >= count:
        return lacking
    # Ray would wait for ever for a node that can hold a process: one is never divided between nodes.
    held = Counter(_in_words({name: node.get(name, 0.0) for name in each}) for node in _nodes())
    nodes = ", ".join(f"{number} x ({amounts})" for amounts, number in held.most_common())
    return (
        f"{what} need {count} x ({_in_words(each)}), each on one node, and the nodes hold {possible} of them "
        f"(they have {nodes}): request less for each, or join a cluster with larger nodes (RAY_ADDRESS)"
    )


def check_total(count: int, each: dict[str, float], what: str) -> str | None:
    """None if all nodes together have `count` times `each`, otherwise a message of what they lack."""
    total = ray.cluster_resources()
    for name, amount in each.items():
        if amount and count * amount > total.get(name, 0.0):
            return (
                f"{what} need {count} x {amount:g} {name}, the cluster has {total.get(name, 0.0):g}: request fewer, or "
                f"join a larger cluster with RAY_ADDRESS"
            )
    return None


def capacity(each: dict[str, float]) -> int:
    """How many processes that each need `each` fit on the nodes of the cluster."""
    wanted = {name: amount for name, amount in each.items() if amount}
    return sum(min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items()) for node in _nodes())


def _nodes() -> list[dict[str, float]]:
    """What each node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _in_words(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount) or "nothing"
