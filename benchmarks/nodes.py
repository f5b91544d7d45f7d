"""A Ray cluster of several nodes on this machine, whose nodes can be lost.

Each node is a separate `ray start`, with its own raylet, store and workers; the head has no CPUs, so the work is on the
others. A lost node is killed like a machine: all its processes at once, without a chance to shut down.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

import psutil

STORE = 80 * 2**20
"""Bytes of a node's object store."""
NOTICED = {
    "RAY_health_check_period_ms": "500",  # a lost node is declared dead after two seconds, not fifteen
    "RAY_health_check_failure_threshold": "3",
    "RAY_prestart_worker_first_driver": "0",  # no process per CPU in advance, which no stage would use
}
ATTEMPTS = 6
"""A raylet gives up if its agents take more than 15 s to start, as they may on a busy machine."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Node:
    """One `ray start --block` and what it has started."""

    def __init__(self, arguments: list[str], env: dict[str, str], home: Path) -> None:
        home.mkdir()
        self._log = home / "node.log"
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--block", f"--temp-dir={home}",
            f"--object-store-memory={STORE}", "--min-worker-port=0", "--max-worker-port=0",
            "--dashboard-agent-listen-port=0", "--include-log-monitor=false", "--disable-usage-stats", *arguments,
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def wait(self, seconds: float = 240) -> None:
        """Wait until the node is part of the cluster."""
        end = time.monotonic() + seconds
        while "Ray runtime started" not in self._log.read_text():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"a node does not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.1)

    def processes(self, title: str = "") -> list[psutil.Process]:
        """The processes of the node that have these words in their titles."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if title in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def kill(self) -> None:
        """Lose the node."""
        every = [psutil.Process(self._process.pid), *self.processes()] if self._process.poll() is None else []
        for halt in (psutil.Process.suspend, psutil.Process.kill):  # so that none of them starts another one meanwhile
            for process in every:
                with contextlib.suppress(psutil.NoSuchProcess):
                    halt(process)
        self._process.wait()
        psutil.wait_procs(every, timeout=30)


class Cluster:
    """A head without CPUs, and nodes of `cpus` CPUs each.

    `env` is the environment that a process needs to join.
    """

    def __init__(self, nodes: int = 2, cpus: int = 1) -> None:
        self.nodes: list[Node] = []
        self._cpus = cpus
        self._started = 0
        self._head: Node | None = None
        self._home = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))  # a short path, for sockets below it
        token = self._home / "token"
        token.write_text(secrets.token_hex(32))
        self.env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(self._home),
        }
        self.env.pop("RAY_ADDRESS", None)
        port, client = free_port(), free_port()
        try:
            self._head = self._start(
                "--head", f"--port={port}", f"--ray-client-server-port={client}", "--num-cpus=0", "--dashboard-port=0"
            )
            self.env["RAY_ADDRESS"] = f"{self._host(0)}:{port}"
            for _ in range(nodes):
                self.add()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _host(self, number: int) -> str:
        """Each node has its own address on the loopback interface. (Ray replaces 127.0.0.1 by the machine's.)"""
        return f"127.0.{number // 200}.{number % 200 + 2}"

    def _start(self, *arguments: str) -> Node:
        for attempt in range(1, ATTEMPTS + 1):
            number, self._started = self._started, self._started + 1
            host = f"--node-ip-address={self._host(0 if '--head' in arguments else number)}"
            node = Node([host, *arguments], self.env | NOTICED, self._home / str(number))
            try:
                node.wait()
                return node
            except BaseException as error:
                node.kill()
                if attempt == ATTEMPTS or not isinstance(error, RuntimeError):
                    raise
        raise AssertionError

    def add(self) -> Node:
        """Add a node."""
        node = self._start(f"--address={self.env['RAY_ADDRESS']}", f"--num-cpus={self._cpus}")
        self.nodes.append(node)
        return node

    def wait_until_idle(self, seconds: float = 240) -> None:
        """Wait until all CPUs of all nodes are free in the cluster's own view. An elastic run takes what it finds."""
        free = "import ray; ray.init(log_to_driver=False); print(ray.available_resources().get('CPU', 0))"
        end = time.monotonic() + seconds
        while True:
            asked = subprocess.run(
                [sys.executable, "-c", free], env=self.env, capture_output=True, text=True, check=True
            )
            if float(asked.stdout.split()[-1]) == self._cpus * len(self.nodes):
                return
            if time.monotonic() > end:
                raise RuntimeError(f"{asked.stdout.split()[-1]} CPUs of {len(self.nodes)} nodes are free")

    def lose(self, node: Node) -> None:
        """Kill a node with all its processes."""
        self.nodes.remove(node)
        node.kill()

    def close(self) -> None:
        """End everything that was started."""
        for node in [*self.nodes, *([self._head] if self._head else [])]:
            node.kill()
        self.nodes.clear()
        shutil.rmtree(self._home, ignore_errors=True)
