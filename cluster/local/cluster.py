#!/usr/bin/env python3
"""A Ray cluster of one or more nodes on this machine, for this user: start, stop, status.

    eval "$(python cluster/local/cluster.py start --nodes 2)"
    python cluster/local/cluster.py stop

Every node is one `ray start --block` in a separate session. The cluster requires a token, which is in a file that only
this user can read; it is never printed and never in an environment. The dashboard, which takes jobs, listens on the
loopback interface. Only processes with this cluster's mark are ended: another Ray on the machine, or a process that got
an old pid, is not touched. Standard output has lines for a shell to evaluate, everything else goes to standard error.
Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
MARK = "CRAFT_RAY_CLUSTER"
"""The environment variable that every process of a cluster inherits; its value is new at each start."""

GRACE_S = 10.0
"""How long processes may take to end by themselves before they are killed, and then to disappear."""


class Refused(Exception):
    """A user's mistake or a failure, reported in one line."""


class State:
    """The folder of one cluster: what runs (cluster.json), the token, and what each node printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.record = self.folder / "cluster.json"
        self.token = self.folder / "token"

    @contextmanager
    def locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(f"another start or stop is running in {self.folder}: wait for it") from None
            yield

    def read(self) -> dict[str, Any] | None:
        return json.loads(self.record.read_text()) if self.record.exists() else None

    def write(self, cluster: dict[str, Any]) -> None:
        temporary = self.record.with_suffix(".tmp")
        temporary.write_text(json.dumps(cluster, indent=1))
        os.replace(temporary, self.record)

    def new_token(self) -> None:
        self.token.unlink(missing_ok=True)
        with open(os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))

    def clear(self, cluster: dict[str, Any]) -> None:
        """Remove the token and Ray's files of a cluster of which nothing runs any more."""
        self.token.unlink(missing_ok=True)
        shutil.rmtree(cluster["temp"], ignore_errors=True)
        self.record.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- processes


def started(pid: int) -> tuple[int, int] | None:
    """The start of a process, in clock ticks since boot, and its parent; None if it does not run (or is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else (int(fields[19]), int(fields[1]))


def members(mark: str) -> dict[int, int]:
    """The processes of a cluster, pid -> start: those whose environment has the mark, and all their descendants.

    Ray's workers overwrite their environment with their title, so they are found as descendants of the raylet.
    """
    wanted = f"{MARK}={mark}".encode()
    starts, parents, found = {}, {}, set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or (seen := started(int(entry.name))) is None:
            continue
        pid = int(entry.name)
        starts[pid], parents[pid] = seen
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.add(pid)
        except OSError:  # the process of another user, or it has ended meanwhile
            continue
    while below := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= below
    return {pid: starts[pid] for pid in found}


def alive(pid: int, start: int) -> bool:
    return (seen := started(pid)) is not None and seen[0] == start


def send(pid: int, start: int, number: signal.Signals) -> None:
    """Send a signal to exactly this process, not to another one that has got its pid."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if alive(pid, start):
            signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def end(cluster: dict[str, Any]) -> int:
    """Ask the nodes to end, the head last; kill what is left. Returns how many processes there were."""
    ours = members(cluster["mark"])
    count = len(ours)
    for node in reversed(cluster["nodes"]):
        if ours.get(node["pid"]) == node["start"]:
            send(node["pid"], node["start"], signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while any(alive(*process) for process in ours.items()) and time.monotonic() < deadline:
        time.sleep(0.1)
    deadline = time.monotonic() + GRACE_S
    while ours := {pid: start for pid, start in (ours | members(cluster["mark"])).items() if alive(pid, start)}:
        if time.monotonic() > deadline:
            raise Refused(f"killed processes still exist after {GRACE_S:g} s: {sorted(ours)}; try stop again")
        for process in ours.items():
            send(*process, signal.SIGKILL)
        time.sleep(0.1)
    return count


# --------------------------------------------------------------------------------------------------------- starting


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]


@dataclass(frozen=True)
class Node:
    """How one node is started: arguments of `ray start`, and its environment in addition to the cluster's."""

    name: str
    arguments: list[str]
    environment: dict[str, str]


def devices(options: argparse.Namespace) -> list[str]:
    """The GPUs that the nodes share: of those that this shell may use, the first ones."""
    wanted = options.nodes * (options.gpus or 0)
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return [str(index) for index in range(wanted)]
    named = [name.strip() for name in allowed.split(",")]
    given = list(itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), named))
    if len(given) < wanted:
        raise Refused(
            f"{options.nodes} node(s) with --gpus {options.gpus} need {wanted} GPUs, CUDA_VISIBLE_DEVICES={allowed} "
            f"allows {len(given)}: lower --gpus or --nodes, or allow more"
        )
    return given[:wanted]


def planned(options: argparse.Namespace, cluster: dict[str, Any]) -> list[Node]:
    """The head, then the workers."""
    gcs, dashboard = (cluster[key].rpartition(":")[2] for key in ("address", "dashboard"))
    client, *metrics = free_ports(3)
    cpus = options.cpus if options.cpus is not None else max(1, (os.cpu_count() or 1) // options.nodes)
    common = ["--dashboard-agent-listen-port=0", "--log-color=false"]
    if options.object_store is not None:
        common.append(f"--object-store-memory={options.object_store * 2**20}")
    given = devices(options)
    nodes = []
    for index in range(options.nodes):
        own_cpus = options.head_cpus if options.head_cpus is not None and index == 0 else cpus
        arguments = [*common, f"--num-cpus={own_cpus}"]
        environment = dict(zip(("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT"), map(str, metrics), strict=True))
        if options.gpus is not None:
            arguments.append(f"--num-gpus={options.gpus}")
            own = given[index * options.gpus : (index + 1) * options.gpus]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        elif index:
            arguments.append("--num-gpus=0")  # the first node has the GPUs of this machine
        if index:
            arguments.append(f"--address={cluster['address']}")
        else:
            arguments += [
                "--head", f"--port={gcs}", f"--temp-dir={cluster['temp']}", f"--ray-client-server-port={client}",
                f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}", "--disable-usage-stats",
            ]  # fmt: skip
        nodes.append(Node(f"worker-{index}" if index else "head", arguments, environment))
    return nodes


def launch(state: State, cluster: dict[str, Any], node: Node) -> None:
    """Start a node and record its process, in place of an earlier one of that name."""
    environment = {**os.environ, **exports(state, cluster), MARK: cluster["mark"], **node.environment}
    environment.pop("RAY_AUTH_TOKEN", None)  # Ray would prefer it to the file
    # Jobs find the commands of the Python that starts the cluster, even if its environment is not activated.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    with (state.folder / f"{node.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *node.arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
    seen = started(process.pid)
    others = [other for other in cluster["nodes"] if other["name"] != node.name]
    cluster["nodes"] = [*others, {"name": node.name, "pid": process.pid, "start": seen[0] if seen else -1}]
    state.write(cluster)


def nodes_alive(state: State, cluster: dict[str, Any]) -> int:
    """The number of alive nodes according to the dashboard; 0 while it does not answer."""
    request = urllib.request.Request(
        f"{cluster['dashboard']}/api/v0/nodes?limit=1000",
        headers={"Authorization": f"Bearer {state.token.read_text()}"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=10) as answer:
            rows = json.load(answer)["data"]["result"]["result"]
    except (OSError, ValueError):
        return 0
    return sum(row["state"] == "ALIVE" for row in rows)


def wait_for(state: State, cluster: dict[str, Any], nodes: list[Node], deadline: float) -> None:
    """Wait until these nodes are alive. A node that Ray gave up after 30 s because it was slow is started again."""
    while True:
        up = nodes_alive(state, cluster)
        running = {entry["name"] for entry in cluster["nodes"] if alive(entry["pid"], entry["start"])}
        ended = [node for node in nodes if node.name not in running]
        if up >= len(nodes) and not ended:
            return
        if time.monotonic() > deadline:
            raise Refused(
                f"only {up} of {len(nodes)} node(s) started in time: see the logs in {state.folder}, or wait longer "
                f"with --patience"
            )
        for node in ended:
            log = state.folder / f"{node.name}.log"
            lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
            last = lines[-1] if lines else "it printed nothing"
            if "timed out during startup" not in last:
                raise Refused(f"the node {node.name} ended ({last}): see {log}")
            launch(state, cluster, node)
        time.sleep(0.2)


def start(state: State, options: argparse.Namespace) -> dict[str, Any]:
    deadline = time.monotonic() + options.patience
    old = state.read()
    if old is not None:
        if members(old["mark"]):
            raise Refused(
                f"a cluster of {state.folder} is running (RAY_ADDRESS={old['address']}): stop it first, or choose "
                f"another folder with --state"
            )
        state.clear(old)
    gcs, dashboard = free_ports(2)
    cluster: dict[str, Any] = {
        "mark": secrets.token_hex(8),
        "address": f"{HOST}:{gcs}",
        "dashboard": f"http://{HOST}:{dashboard}",
        "temp": tempfile.mkdtemp(prefix="craft-ray-", dir="/tmp"),  # it contains sockets, so the path must be short
        "nodes": [],
    }
    state.new_token()
    state.write(cluster)
    nodes = planned(options, cluster)
    try:
        launch(state, cluster, nodes[0])
        wait_for(state, cluster, nodes[:1], deadline)
        for node in nodes[1:]:
            launch(state, cluster, node)
        wait_for(state, cluster, nodes, deadline)
    except BaseException:
        end(cluster)
        state.clear(cluster)
        raise
    return cluster


def exports(state: State, cluster: dict[str, Any]) -> dict[str, str]:
    """The variables that drivers (RAY_ADDRESS) and clients of jobs (RAY_API_SERVER_ADDRESS) need."""
    return {
        "RAY_ADDRESS": cluster["address"],
        "RAY_API_SERVER_ADDRESS": cluster["dashboard"],
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(state.token),
    }


# ---------------------------------------------------------------------------------------------------------- command


def say(text: str) -> None:
    print(f"cluster: {text}", file=sys.stderr, flush=True)


def show(state: State, cluster: dict[str, Any]) -> None:
    for name, value in exports(state, cluster).items():
        print(f"export {name}='{value}'")


def arguments() -> argparse.Namespace:
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=home / "craft-ray" / "cluster", help="folder of the cluster")
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("start", help="start a cluster and print what to export")
    starting.add_argument("--nodes", type=int, default=1, help="number of nodes, including the head [1]")
    starting.add_argument("--cpus", type=int, help="CPUs that each node offers [this machine's, divided]")
    starting.add_argument("--head-cpus", type=int, help="CPUs that the head offers; 0: only drivers run there [--cpus]")
    starting.add_argument("--gpus", type=int, help="GPUs that each node offers [this machine's, on the head]")
    starting.add_argument("--object-store", type=int, metavar="MIB", help="object store of each node [Ray's choice]")
    starting.add_argument(
        "--patience", type=float, default=300, metavar="SECONDS", help="time for all nodes to start [300]"
    )
    commands.add_parser("stop", help="end the cluster and everything that runs on it")
    commands.add_parser("status", help="print what to export; exit code 1 unless every node is alive")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    state = State(options.state)
    if not Path("/proc/self/stat").exists():
        raise Refused("this script reads /proc and needs Linux: without RAY_ADDRESS, craft-ray starts Ray by itself")
    if options.command == "start":
        if options.nodes < 1:
            raise Refused(f"--nodes is {options.nodes}: a cluster needs at least one")
        devices(options)  # refused before anything is written
        before = time.monotonic()
        with state.locked():
            cluster = start(state, options)
        say(f"{options.nodes} node(s) alive after {time.monotonic() - before:.0f} s; dashboard {cluster['dashboard']}")
        show(state, cluster)
        return 0
    cluster_or_none = state.read()
    if cluster_or_none is None:
        say(f"no cluster was started from {state.folder}")
        return int(options.command == "status")
    if options.command == "stop":
        with state.locked():
            count = end(cluster_or_none)
            state.clear(cluster_or_none)
        say(f"stopped; {count} processes ended")
        return 0
    up, wanted = nodes_alive(state, cluster_or_none), len(cluster_or_none["nodes"])
    for node in cluster_or_none["nodes"]:
        say(f"{node['name']} (pid {node['pid']}): {'runs' if alive(node['pid'], node['start']) else 'has ended'}")
    say(f"{up} of {wanted} node(s) alive; dashboard {cluster_or_none['dashboard']}")
    show(state, cluster_or_none)
    return int(up != wanted)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refused as refusal:
        say(str(refusal))
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted: `stop` ends what may still be running")
        sys.exit(130)
