"""cluster/local: a cluster as processes. What was started is found again and ended, and nothing else."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.local_cluster import SCRIPT, exported, local, marked


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "state"
    local(tmp_path / "state", "stop")


def driver(environment: dict[str, str], program: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", program], env=clean | environment, capture_output=True, text=True, check=False
    )


def test_nothing_runs_yet(state: Path) -> None:
    for command, code in (("status", 1), ("stop", 0)):
        got, out, err = local(state, command)
        assert (got, out) == (code, "")
        assert err == f"cluster: no cluster was started from {state}\n"
    code, _, err = local(state, "start", "--nodes", "0")
    assert code == 1
    assert err == "cluster: --nodes is 0: a cluster needs at least one\n"


@pytest.mark.parametrize(
    ("allowed", "given"),
    [
        (None, ["0,1", "2,3"]),
        ("4,7,5,6,1", ["4,7", "5,6"]),
        ("GPU-a,GPU-b,GPU-c,GPU-d", ["GPU-a,GPU-b", "GPU-c,GPU-d"]),
        ("3,2,1", "CUDA_VISIBLE_DEVICES=3,2,1 allows 3"),
        ("3,2,-1,0,1", "CUDA_VISIBLE_DEVICES=3,2,-1,0,1 allows 2"),  # CUDA stops there
        ("", "CUDA_VISIBLE_DEVICES= allows 0"),
    ],
)
def test_nodes_share_the_gpus_that_the_shell_allows(
    allowed: str | None, given: list[str] | str, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    if isinstance(given, str):
        code, out, err = local(state, "start", "--nodes", "2", "--gpus", "2")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("cluster: 2 node(s) with --gpus 2 need 4 GPUs")
        assert given in err
        assert not state.exists()
        return
    options = Namespace(nodes=2, gpus=2, cpus=1, head_cpus=None, object_store=None)
    nodes = runpy.run_path(str(SCRIPT))["planned"](options, {"address": "a:1", "dashboard": "b:2", "temp": "t"})
    assert [node.environment["CUDA_VISIBLE_DEVICES"] for node in nodes] == given


def test_another_process_with_an_old_pid_is_not_touched(state: Path, tmp_path: Path) -> None:
    """The record has its pid and even its start, but the process does not have the mark."""
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        start = int(Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(")")[2].split()[19])
        state.mkdir()
        (state / "token").write_text("old")
        kept_by_ray = tmp_path / "ray"
        kept_by_ray.mkdir()
        record = {
            "mark": "0123456789abcdef", "address": "127.0.0.1:1", "dashboard": "http://127.0.0.1:1",
            "temp": str(kept_by_ray), "nodes": [{"name": "head", "pid": stranger.pid, "start": start}],
        }  # fmt: skip
        (state / "cluster.json").write_text(json.dumps(record))
        assert local(state, "stop") == (0, "", "cluster: stopped; 0 processes ended\n")
        assert stranger.poll() is None
        assert not kept_by_ray.exists()
        assert not (state / "token").exists()
    finally:
        stranger.kill()
        stranger.wait()


def test_processes_with_the_mark_and_their_descendants_are_ended(state: Path, tmp_path: Path) -> None:
    """Also one that ignores SIGTERM, and one that has left the session and the environment."""
    program = (
        "import signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600'], env={}, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    node = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "CRAFT_RAY_CLUSTER": "feedfeedfeedfeed"},
    )  # fmt: skip
    assert node.stdout is not None
    child = psutil.Process(int(node.stdout.readline()))
    state.mkdir()
    record = {
        "mark": "feedfeedfeedfeed", "address": "127.0.0.1:1", "dashboard": "http://127.0.0.1:1",
        "temp": str(tmp_path / "none"), "nodes": [{"name": "head", "pid": node.pid, "start": -1}],
    }  # fmt: skip
    (state / "cluster.json").write_text(json.dumps(record))
    code, _, err = local(state, "start")
    assert code == 1
    assert f"a cluster of {state} is running" in err
    assert local(state, "stop") == (0, "", "cluster: stopped; 2 processes ended\n")
    assert node.wait(timeout=10) == -signal.SIGKILL
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.ray
def test_a_node_that_does_not_start_is_one_line_and_leaves_nothing(state: Path) -> None:
    code, out, err = local(state, "start", "--cpus", "-1")
    assert (code, out) == (1, "")
    assert err.startswith("cluster: the node head ended (")
    assert err.endswith(f"see {state / 'head.log'}\n")
    assert err.count("\n") == 1
    assert not (state / "cluster.json").exists()
    assert not (state / "token").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_from_start_to_stop(state: Path) -> None:
    code, out, err = local(state, "start", "--nodes", "2", "--cpus", "1", "--object-store", "100", "--patience", "600")
    assert code == 0, err
    assert err.startswith("cluster: 2 node(s) alive")
    environment = exported(out)
    assert list(environment) == ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"]
    assert environment["RAY_API_SERVER_ADDRESS"].startswith("http://127.0.0.1:")

    token_file = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert token_file.stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700
    token = token_file.read_text()
    assert len(token) == 64
    record = json.loads((state / "cluster.json").read_text())
    processes = marked(record["mark"])
    assert len(processes) >= 4
    assert not any(token in value for process in processes for value in process.environ().values())
    assert not any(token in " ".join(process.cmdline()) for process in processes)
    assert not any(token in file.read_text() for file in state.iterdir() if file != token_file)
    assert token not in out + err

    code, out, err = local(state, "start")
    assert (code, out) == (1, "")
    assert err == (
        f"cluster: a cluster of {state} is running (RAY_ADDRESS={environment['RAY_ADDRESS']}): stop it first, or "
        f"choose another folder with --state\n"
    )
    code, out, _ = local(state, "status")
    assert code == 0
    assert exported(out) == environment

    seen = driver(environment, "import ray; ray.init(logging_level='ERROR'); print(len(ray.nodes()))")
    assert seen.stdout.strip() == "2", seen.stderr
    wrong = token_file.with_name("wrong")
    wrong.write_text("0" * 64)
    for refused in ({**environment, "RAY_AUTH_TOKEN_PATH": str(wrong)}, {"RAY_ADDRESS": environment["RAY_ADDRESS"]}):
        assert driver({**refused, "HOME": str(state)}, "import ray; ray.init()").returncode != 0

    stranger = subprocess.Popen(["sleep", "600"])
    try:
        worker = record["nodes"][1]
        assert worker["name"] == "worker-1"
        os.kill(worker["pid"], signal.SIGKILL)
        end = time.monotonic() + 120
        while (status := local(state, "status"))[0] == 0:
            assert time.monotonic() < end, "the loss of the node was never noticed"
            time.sleep(1)
        assert "worker-1 (pid" in status[2]
        assert "has ended" in status[2]
        code, _, err = local(state, "stop")
        assert code == 0, err
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
    assert marked(record["mark"]) == []
    assert not Path(record["temp"]).exists()
    assert not token_file.exists()
    assert local(state, "status")[0] == 1
