"""Real Ray clusters on this machine for tests: with a token, with one node or several; they leave no processes."""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

HOST = "127.0.0.1"
BIN = Path(sys.executable).parent
PATIENCE_S = 240.0
RAY = """
import time
from ray._private import services
from ray.scripts.scripts import main
ask, started = services.get_node, time.monotonic()
def patient(*arguments):
    while True:
        try:
            return ask(*arguments)
        except RuntimeError:
            if time.monotonic() - started > 240:
                raise
services.get_node = patient
main()
"""
"""Ray's command, patched: it gives a node thirty seconds to start, which is too short on a busy machine."""
MARK = "CRAFT_RAY_TEST_NODE"
AGENTS = ("dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent", "metrics-export")
"""A node that chooses its own ports dies unless they are all open within seconds."""


@dataclass
class Cluster:
    """A running cluster; `environment` is that of a user who may use it."""

    address: str
    dashboard: str
    token: Path
    environment: dict[str, str]
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """Its nodes' marks, which are in the environment of their processes."""

    def ask(self, path: str, method: str = "GET") -> dict[str, Any]:
        """The dashboard's answer, which is much faster than Ray's own commands."""
        headers = {"Authorization": f"Bearer {self.token.read_text()}"}
        answer = requests.request(method, f"{self.dashboard}/api/{path}", headers=headers, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def alive(self) -> int:
        """The number of nodes that the dashboard reports; 0 while it does not answer."""
        try:
            rows = self.ask("v0/nodes")["data"]["result"]["result"]
        except (requests.RequestException, TypeError):
            return 0
        return sum(row["state"] == "ALIVE" for row in rows)

    def command(self, *arguments: str | Path, **changes: str | None) -> subprocess.Popen[str]:
        """`craft-ray ARGUMENTS` run by this user, with `changes` to the environment (None: not set)."""
        return self._popen([str(BIN / "craft-ray"), *map(str, arguments)], changes)

    def python(self, program: str, *arguments: str | Path, **changes: str | None) -> subprocess.Popen[str]:
        """A program that joins the cluster."""
        environment = {"RAY_ADDRESS": self.address} | changes
        return self._popen([sys.executable, "-c", program, *map(str, arguments)], environment)

    def _popen(self, command: list[str], changes: Mapping[str, str | None]) -> subprocess.Popen[str]:
        environment = {k: v for k, v in (self.environment | dict(changes)).items() if v is not None}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@contextmanager
def cluster(
    folder: Path,
    cpus: Sequence[int] = (2,),
    environment: Mapping[str, str] | None = None,
    hidden: Mapping[int, Path] | None = None,
) -> Iterator[Cluster]:
    """A cluster with a token, a node for each number of `cpus`; the first is the head.

    Args:
        folder: for the token and the output of the nodes.
        environment: variables of the nodes in addition to this process's environment.
        hidden: the nodes (not the head) that see an empty folder instead of this one; needs permission to mount.
    """
    gcs, dashboard, client, *metrics = free_ports(5)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    user = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    user |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": f"{BIN}:{os.environ['PATH']}"}
    patience = {"RAY_agent_register_timeout_ms": str(int(1000 * PATIENCE_S)), "RAY_prestart_worker_first_driver": "0"}
    ports = dict(zip(("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT"), map(str, metrics), strict=True))
    found = Cluster(f"{HOST}:{gcs}", f"http://{HOST}:{dashboard}", token, user)
    # The path of a socket must be short, so this folder is not below the test's.
    with tempfile.TemporaryDirectory(prefix="crt-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        try:
            for index, count in enumerate(cpus):
                command = [
                    sys.executable, "-c", RAY, "start", "--block", "--log-color=false",
                    f"--num-cpus={count}", "--num-gpus=0", "--object-store-memory=100000000",
                    "--min-worker-port=0", "--max-worker-port=0",
                    *(f"--{agent}-port={port}" for agent, port in zip(AGENTS, free_ports(len(AGENTS)), strict=True)),
                ]  # fmt: skip
                if index == 0:
                    command += [
                        "--head", f"--port={gcs}", f"--temp-dir={scratch}", f"--ray-client-server-port={client}",
                        f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}", "--disable-usage-stats",
                    ]  # fmt: skip
                else:
                    command += [f"--address={found.address}"]
                if index in (hidden or {}):
                    mount = f"mount -t tmpfs none {shlex.quote(str((hidden or {})[index]))}"
                    command = ["unshare", "-m", "sh", "-c", f"{mount} && exec {shlex.join(command)}"]
                _start(found, command, user | ports | patience | dict(environment or {}), folder / f"node-{index}.log")
            yield found
        finally:
            left = _stop(found)
    assert not left, f"processes of the cluster had to be killed: {left}"


def _start(found: Cluster, command: list[str], environment: dict[str, str], log: Path) -> None:
    mark = secrets.token_hex(8)
    with log.open("wb") as file:
        node = subprocess.Popen(
            command, env=environment | {MARK: mark}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    found.nodes[mark] = node
    end = time.monotonic() + PATIENCE_S
    while found.alive() < len(found.nodes):
        ended = node.poll() is not None or time.monotonic() > end
        assert not ended, f"the node did not come up:\n{log.read_text()}"
        time.sleep(0.2)


def _stop(found: Cluster) -> list[str]:
    """Stop every process of the cluster; return those that did not stop by themselves."""
    ours = {p for node in found.nodes.values() for p in _with_children(node.pid)}
    for node in reversed(found.nodes.values()):
        node.terminate()
    for node in found.nodes.values():
        node.wait(60)
    _, left = psutil.wait_procs(ours, timeout=60)
    return _kill({*left, *_marked(set(found.nodes))})


def _marked(marks: set[str]) -> set[psutil.Process]:
    return {process for process in psutil.process_iter() if _environment(process).get(MARK) in marks}


def _kill(processes: set[psutil.Process]) -> list[str]:
    names = []
    for process in processes:
        try:
            names.append(f"{process.pid} {shlex.join(process.cmdline())}")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return names


def _with_children(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:  # it has ended meanwhile, or is another user's
        return {}


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]
