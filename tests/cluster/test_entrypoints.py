"""The commands of cluster/ in real runs: what a RayJob submits, on a cluster with the same layout; what sbatch runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from craft_ray.config import Experiment, dump_config
from tests.support.experiments import ANSWERED, Digits
from tests.support.local_cluster import exported, local

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def environment(tmp: Path) -> dict[str, str]:
    """The environment of a user's shell where `craft-ray` and `ray` are those of this Python."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    return {
        **clean,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "CRAFT_RAY_CACHE": str(tmp / "expanded"),
        "OMP_NUM_THREADS": "1",
    }


def small(digits: Digits, shared: Path, changes: dict[str, Any]) -> Experiment:
    """A run with the name in the manifests, with all paths below `shared`."""
    validation = {
        skill: {"data": {"path": str(digits.data / f"{skill}_val.parquet"), "columns": ANSWERED, "limit": 8}}
        for skill in ("old", "new")
    }
    common = {
        "name": "run", "craft.epsilon_start": 10.0, "train.steps": 4, "workers.num_workers": 2,
        "validation": {"every": 2, **validation}, "objective": {"maximize": "new/score", "subject_to": {}},
    }  # fmt: skip
    return digits.experiment(shared, {**common, **changes})


# ---------------------------------------------------------------------------------------------------------- KubeRay


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """As in the manifests: a head without CPUs, workers with all of them, a token. -> what to export"""
    state = tmp_path_factory.mktemp("cluster") / "state"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(state.parent).items():
            patch.setenv(name, value)
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        code, out, err = local(state, "start", "--nodes", "2", "--head-cpus", "0", "--cpus", "2", "--patience", "600")
        assert code == 0, err
    yield exported(out)
    local(state, "stop")


def test_the_entrypoints_of_the_rayjobs(cluster: dict[str, str], digits: Digits, tmp_path: Path) -> None:
    """Each as KubeRay's submitter sends it; paths of the image and the volume are replaced by local ones."""
    shared = tmp_path / "shared"
    config = tmp_path / "etc" / "run.yaml"
    config.parent.mkdir()
    config.write_text(dump_config(small(digits, shared, {})))
    here = {"/opt/craft-ray": str(ROOT), "/etc/craft-ray": str(config.parent), "/shared": str(shared)}
    smaller = {"--space craft": "--space smoke", "--samples 32": "--samples 2"}

    def submit(stage: str) -> tuple[int, str]:
        job = yaml.safe_load((CLUSTER / "kuberay" / f"{stage}.yaml").read_text())["spec"]
        entrypoint = job["entrypoint"]
        for ours, theirs in {**here, **(smaller if stage == "sweep" else {})}.items():
            entrypoint = entrypoint.replace(ours, theirs)
        done = subprocess.run(
            ["ray", "job", "submit", "--", *entrypoint.split()],
            env={**environment(tmp_path), **cluster}, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    code, log = submit("anchors")
    assert code == 0, log
    assert (shared / "anchors" / "manifest.json").exists()
    code, log = submit("anchors")
    assert code == 0, log
    assert "no row computed" in log

    code, log = submit("train")
    assert code == 0, log
    run = shared / "runs" / "run-hidden-seed0"
    assert json.loads((run / "result.json").read_text())["feasible"]
    assert (run / "checkpoints" / "last" / "model" / "model.safetensors").exists()
    assert "2 worker(s)" in log

    config.write_text(dump_config(small(digits, shared, {"workers.num_workers": 1})))  # fast trials
    code, log = submit("sweep")
    assert code == 0, log
    assert (shared / "sweeps" / "run" / "report.html").exists()


# ------------------------------------------------------------------------------------------------------------ Slurm


def namespace() -> list[str] | None:
    """Hides the processes of this machine, because `ray symmetric-run` ends with `ray stop`, which ends every Ray."""
    for rights in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *rights, "--pid", "--fork", "--mount-proc", "--kill-child"]
        try:
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                return command
        except FileNotFoundError:
            break
    return None


SLURM = {
    "srun": """#!/usr/bin/env bash
# In place of Slurm's srun: removes its options and runs the command, for a single node.
while [ "${1#-}" != "$1" ]; do shift; done
exec "$@"
""",
    "scontrol": """#!/usr/bin/env bash
[ "$1 $2" = "show hostnames" ] && hostname
""",
}


@pytest.fixture
def sbatch(tmp_path: Path) -> Any:
    """`sbatch ray.sbatch COMMAND...` on one node of two CPUs -> exit code and log. Only Slurm itself is replaced."""
    prefix = namespace()
    if prefix is None:
        pytest.skip("unshare cannot make a PID namespace here")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in SLURM.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*command: str | Path, **settings: str) -> tuple[int, str]:
        ours = environment(tmp_path)
        slurm = {
            "SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "here",
            "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "2", "SLURM_GPUS_ON_NODE": "0",
        }  # fmt: skip
        for _ in range(4):
            done = subprocess.run(
                [*prefix, "bash", CLUSTER / "slurm" / "ray.sbatch", *command],
                env={**ours, **slurm, **settings, "PATH": f"{tools}:{ours['PATH']}"},
                cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
            )  # fmt: skip
            shutil.rmtree(f"/tmp/ray-{os.getpid()}", ignore_errors=True)
            log = done.stdout + done.stderr
            if "the command was never run" not in log or "timed out during startup" not in log:  # too busy for Ray
                break
        return done.returncode, log

    return run


def test_what_sbatch_runs(sbatch: Any, digits: Digits, tmp_path: Path) -> None:
    """The cache, then training on a real `ray symmetric-run`: exit codes, the token, and nothing left behind."""
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(small(digits, tmp_path, {"craft.epsilon_start": 1e-9})))
    stranger = subprocess.Popen(["sleep", "900"])
    try:
        code, log = sbatch("craft-ray", "anchors", "build", config)
        assert code == 0, log
        assert (tmp_path / "anchors" / "manifest.json").exists()
        run = tmp_path / "runs" / "run-hidden-seed0"
        code, log = sbatch("bash", CLUSTER / "resume.sh", "train", config)
        assert code == 3, log
        assert "2 worker(s)" in log
        assert not json.loads((run / "result.json").read_text())["feasible"]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
    assert not list(tmp_path.glob(".craft-ray-*"))
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if f"/tmp/ray-{os.getpid()}" in line]


def test_what_the_command_of_sbatch_sees(sbatch: Any, tmp_path: Path) -> None:
    """The cluster that was started for it, with the token in a file; the token itself is in no environment."""
    program = (
        "import json, os, pathlib, ray\n"
        "ray.init(log_to_driver=False, logging_level='ERROR')\n"
        "path = pathlib.Path(os.environ['RAY_AUTH_TOKEN_PATH'])\n"
        "mode = [oct(file.stat().st_mode & 0o777) for file in (path, path.parent)]\n"
        "task = ray.remote(lambda: dict(os.environ))\n"
        "seen = {**ray.get(task.remote()), **os.environ}\n"
        "print('SEEN', json.dumps([ray.cluster_resources()['CPU'], mode, len(path.read_text()),\n"
        "      path.read_text() in ' '.join(seen.values()), seen['RAY_AUTH_MODE']]))\n"
    )
    code, log = sbatch("python", "-c", program)
    assert code == 0, log
    seen = next(line for line in log.splitlines() if line.startswith("SEEN "))
    assert json.loads(seen.removeprefix("SEEN ")) == [2.0, ["0o600", "0o700"], 64, False, "token"]


def test_if_ray_does_not_start_the_job_of_sbatch_fails(sbatch: Any, tmp_path: Path) -> None:
    """symmetric-run alone would end with 0."""
    code, log = sbatch("touch", tmp_path / "ran", SLURM_CPUS_PER_TASK="-1")
    assert code == 1, log
    assert log.count("ray.sbatch: Ray did not start, attempt") == 3
    assert log.endswith("ray.sbatch: the command was never run\n")
    assert not (tmp_path / "ran").exists()
    assert sbatch() == (2, "usage: sbatch [options] ray.sbatch COMMAND...\n")
