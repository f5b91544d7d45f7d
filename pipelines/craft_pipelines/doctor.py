"""`craft-ray doctor`: checks this cluster, or this machine, for what would make a run fail."""

from __future__ import annotations

import importlib.metadata
import ipaddress
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray
from packaging.requirements import Requirement
from ray.util.state import list_placement_groups
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from craft_pipelines.authentication import accepts_anyone
from craft_pipelines.node_facts import PACKAGES, Facts, clock, facts
from craft_pipelines.nodes import Answer, Node, alive_nodes, ask
from craft_pipelines.session import join
from craft_pipelines.storage_check import not_sharing
from craft_ray.errors import ConfigError, CraftError, first_line
from craft_ray.storage.files import readable_bytes
from craft_ray.storage.paths import storage_path

State = Literal["ok", "warn", "FAIL"]
STYLES: dict[State, str] = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}

SKEW_S = 1.0
"""Clocks that differ by more put log lines in the wrong order."""
SKEW_LIMIT_S = 300.0
"""Beyond this, signatures of S3 requests and TLS certificates start to be refused."""

LOG_WIDTH = 150
"""Columns of a table where no terminal limits them."""

MAX_LISTED = 3


@dataclass(frozen=True)
class Finding:
    check: str
    state: State
    found: str
    remedy: str = ""


def doctor(address: str | None, storage: Sequence[str]) -> bool:
    """Check the cluster, and print what was found.

    Args:
        address: that of a dashboard (http://...), where the checks then run as a job; or as in RAY_ADDRESS. Without it
            RAY_ADDRESS names the cluster, and without that this machine is checked.
        storage: folders or URIs that all nodes must share.

    Returns:
        Whether no check fails.

    Raises:
        ConfigError: no cluster answers, or it refuses us.
    """
    if address is not None and address.startswith(("http://", "https://")):
        return _as_job(address, storage)
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    storage = [path if "://" in path else os.path.abspath(path) for path in storage]
    join(dashboard=True)
    nodes = alive_nodes()
    answers = ask(facts, nodes)
    skews = {node: skew for node in answers if (skew := clock_skew(node)) is not None}
    known: dict[Node, Facts] = {node: answer.value for node, answer in answers.items() if answer.error is None}
    findings = [
        *reachable(answers),
        *versions(facts(), known),
        resources(known),
        shared_memory(known),
        *(check_storage(path, nodes) for path in storage),
        *([] if storage else [unchecked_storage(nodes)]),
        clocks(skews),
        authentication(nodes, accepts_anyone(ray.get_runtime_context().gcs_address)),
        state_api(),
    ]
    _print(known, skews, findings)
    return all(finding.state != "FAIL" for finding in findings)


def _as_job(address: str, storage: Sequence[str]) -> bool:
    """Run the checks on the cluster, because its processes may not be reachable from here."""
    from craft_pipelines.submit import submit

    relative = [path for path in storage if "://" not in path and not path.startswith("/")]
    if relative:
        raise ConfigError(f"--storage is {relative[0]}: on another machine it must be an absolute path, or s3://...")
    with tempfile.TemporaryDirectory() as empty:
        command = ["craft-ray", "doctor", *(word for path in storage for word in ("--storage", path))]
        return submit(command, address, Path(empty), wait=True) == 0


# ------------------------------------------------------------------------------------------------------ the checks


def reachable(answers: Mapping[Node, Answer]) -> list[Finding]:
    silent = {node: answer.error for node, answer in answers.items() if answer.error is not None}
    count = f"{len(answers) - len(silent)} of {len(answers)} node(s) answer"
    if not silent:
        return [Finding("nodes", "ok", count)]
    why = _some({node: str(error) for node, error in silent.items()})
    return [Finding("nodes", "FAIL", f"{count}; {why}", "install craft-ray on every node, from one image or lock file")]


def versions(here: Facts, known: Mapping[Node, Facts]) -> list[Finding]:
    """Compare what is installed on the nodes with what is installed here and with what craft-ray requires."""
    wrong: dict[Node, str] = {}
    other: dict[Node, str] = {}
    needed = requirements()
    for node, there in known.items():
        if there.python.split(".")[:2] != here.python.split(".")[:2]:
            wrong[node] = f"Python {there.python}, here {here.python}"
        for name, version in there.packages.items():
            asked = needed.get(name)
            if version is None:
                wrong[node] = f"no {name}"
            elif name == "ray" and version != here.packages[name]:
                wrong[node] = f"ray {version}, here {here.packages[name]}"
            elif asked is not None and not asked.specifier.contains(version, prereleases=True):
                wrong[node] = f"{name} {version}, craft-ray needs {asked.specifier}"
            elif version != here.packages[name]:
                other.setdefault(node, f"{name} {version}, here {here.packages[name]}")
        if there.python != here.python:
            other.setdefault(node, f"Python {there.python}, here {here.python}")
    remedy = "install the same versions everywhere: one image, or pip install -c constraints.txt"
    if wrong:
        return [Finding("versions", "FAIL", _some(wrong), remedy)]
    if other:
        return [Finding("versions", "warn", _some(other), remedy)]
    main = ", ".join(f"{name} {here.packages[name]}" for name in ("craft-ray", "ray", "torch", "transformers"))
    return [Finding("versions", "ok", f"Python {here.python}, {main}" + (" everywhere" if len(known) > 1 else ""))]


def requirements() -> dict[str, Requirement]:
    """What craft-ray requires of the compared packages, without those of extras."""
    found = {}
    for text in importlib.metadata.requires("craft-ray") or ():
        requirement = Requirement(text)
        if requirement.name in PACKAGES and requirement.marker is None:
            found[requirement.name] = requirement
    return found


def resources(known: Mapping[Node, Facts]) -> Finding:
    total = {name: sum(node.resources.get(name, 0.0) for node in known) for name in ("CPU", "GPU")}
    offered = f"{total['CPU']:g} CPUs, {total['GPU']:g} GPUs"
    if not total["CPU"]:
        return Finding("resources", "FAIL", offered, "start nodes with CPUs: a head alone may offer none (--num-cpus)")
    hidden = {
        node: f"{there.gpus} GPUs, {node.resources.get('GPU', 0.0):g} of them offered by Ray"
        for node, there in known.items()
        if there.gpus > node.resources.get("GPU", 0.0)
    }
    if hidden:
        return Finding("resources", "warn", _some(hidden), "start Ray there with --num-gpus, and CUDA_VISIBLE_DEVICES")
    return Finding("resources", "ok", offered)


def shared_memory(known: Mapping[Node, Facts]) -> Finding:
    small = {
        node: f"/dev/shm {readable_bytes(there.shared_memory)} for an object store of {readable_bytes(_store(node))}"
        for node, there in known.items()
        if sys.platform == "linux" and there.shared_memory < _store(node)
    }
    if small:
        remedy = "mount a larger /dev/shm (an emptyDir of medium Memory; docker run --shm-size), or Ray uses the disk"
        return Finding("object store", "warn", _some(small), remedy)
    return Finding("object store", "ok", f"{readable_bytes(sum(map(_store, known)))}, within /dev/shm")


def check_storage(path: str, nodes: Sequence[Node]) -> Finding:
    name = f"storage {path}"
    try:
        found = not_sharing(storage_path(path), nodes)
    except CraftError as error:
        return Finding(name, "FAIL", error.message)
    if found:
        problem = f"{len(found)} of {len(nodes)} node(s) do not share it; {_some(found)}"
        return Finding(
            name, "FAIL", problem, "mount the same storage at this path everywhere, or use s3://BUCKET/FOLDER"
        )
    return Finding(name, "ok", f"written here and on {len(nodes)} node(s), read on the other side")


def unchecked_storage(nodes: Sequence[Node]) -> Finding:
    if len(nodes) < 2:
        return Finding("storage", "ok", "one node shares with itself")
    return Finding("storage", "warn", "not checked", "give the paths of caches and runs: --storage PATH")


def clock_skew(node: Node, tries: int = 3) -> float | None:
    """Seconds by which a node's clock is ahead of ours, as precisely as the fastest answer shows; None without one."""
    found = []
    for _ in range(tries):
        asked = time.time()
        answer = ask(clock, [node]).get(node)
        answered = time.time()
        if answer is None or answer.error is not None:
            return None
        # The clock was read at some moment in between: anything outside that interval is skew.
        ahead = max(0.0, answer.value - answered) or min(0.0, answer.value - asked)
        found.append((answered - asked, ahead))
    return min(found)[1]


def clocks(skews: Mapping[Node, float]) -> Finding:
    apart = {node: f"{skew:+.1f} s" for node, skew in skews.items() if abs(skew) > SKEW_S}
    if not apart:
        return Finding("clocks", "ok", f"within {SKEW_S:g} s of this one")
    state: State = "FAIL" if any(abs(skew) > SKEW_LIMIT_S for skew in skews.values()) else "warn"
    return Finding("clocks", state, _some(apart), "set them by NTP (chrony, systemd-timesyncd)")


def authentication(nodes: Sequence[Node], open_to_anyone: bool) -> Finding:
    if not open_to_anyone:
        return Finding("authentication", "ok", "the cluster requires a token")
    problem = "the cluster requires no token"
    if all(_is_loopback(node.address) for node in nodes):
        return Finding("authentication", "ok", f"{problem}, but only this machine can reach it")
    remedy = "anyone who reaches it can run code there: start every node with RAY_AUTH_MODE=token and one token"
    return Finding("authentication", "warn", problem, remedy)


def state_api(listing: Callable[..., object] = list_placement_groups) -> Finding:
    """Check the State API. Ray Train needs it to free the workers of a killed trial; without it they stay occupied."""
    try:
        listing(limit=1)
    except Exception as error:  # from Ray's State API, requests or gRPC: they have no common class
        remedy = "install ray[default] on the head, and start it with its dashboard"
        return Finding("dashboard", "FAIL", f"the State API does not answer ({first_line(error)})", remedy)
    return Finding("dashboard", "ok", "the State API answers")


def _store(node: Node) -> float:
    return node.resources.get("object_store_memory", 0.0)


def _is_loopback(address: str) -> bool:
    return bool(re.fullmatch(r"[\d.]+|[\da-fA-F:]+", address)) and ipaddress.ip_address(address).is_loopback


def _some(found: Mapping[Node, str]) -> str:
    """What was found, on the first few of the nodes."""
    lines = [f"{node.name}: {what}" for node, what in list(found.items())[:MAX_LISTED]]
    return "; ".join([*lines, *([f"and {len(found) - MAX_LISTED} more"] if len(found) > MAX_LISTED else [])])


# ------------------------------------------------------------------------------------------------------- the tables


def _print(known: Mapping[Node, Facts], skews: Mapping[Node, float], findings: Sequence[Finding]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
    nodes = Table("node", "CPUs", "GPUs", "object store", "/dev/shm", "Python", "clock")
    for node, there in known.items():
        nodes.add_row(
            node.name,
            f"{node.resources.get('CPU', 0.0):g}",
            f"{node.resources.get('GPU', 0.0):g}",
            readable_bytes(_store(node)),
            readable_bytes(there.shared_memory),
            there.python,
            f"{skews[node]:+.1f} s" if node in skews else "?",
        )
    console.print(nodes)
    checks = Table("check", "", "found", "remedy")
    for finding in findings:
        state = f"[{STYLES[finding.state]}]{finding.state}[/]"
        checks.add_row(escape(finding.check), state, escape(finding.found), escape(finding.remedy))
    console.print(checks)
