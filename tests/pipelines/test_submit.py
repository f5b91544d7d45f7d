"""Jobs on a real cluster that requires a token: what is sent, what is returned, and which clients are accepted."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
import yaml
from craft_pipelines import working_dir
from craft_pipelines.outputs import check_kept
from craft_pipelines.runtime_env import FORWARDED, of_driver, of_job
from craft_pipelines.submit import DASHBOARD, Log, dashboard
from craft_pipelines.submitted import check_outputs
from ray.job_submission import JobSubmissionClient

from craft_ray.anchors import manifest
from craft_ray.errors import ConfigError
from tests.support.clusters import BIN, HOST, Cluster, free_ports
from tests.support.commands import one_line

SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_URI",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "http_proxy",
    "OPENAI_API_KEY",
)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


# --------------------------------------------------------------------------------------- what is sent to the cluster


def test_no_secret_is_forwarded(tmp_path: Path) -> None:
    """Whatever the environment contains: only the names of the list, and Ray's signal for stopping."""
    value = secrets.token_hex(16)
    shouted = [f"{a}_{b}" for a in ("MY", "AWS", "HF", "RAY", "OMP") for b in ("SECRET", "TOKEN", "KEY", "PASSWORD")]
    environ = dict.fromkeys((*SECRETS, *shouted, *os.environ), value) | dict.fromkeys(FORWARDED, "public")
    env = of_job(tmp_path, [], environ)
    assert value not in json.dumps(env)
    assert {k for k, v in env["env_vars"].items() if v == "public"} == set(FORWARDED)
    assert set(env["env_vars"]) - set(FORWARDED) == {"RAY_JOB_STOP_SIGNAL", "RAY_JOB_STOP_WAIT_TIME_S"}
    assert value not in json.dumps(of_driver(f"{HOST}:1", environ))
    suspicious = re.compile("SECRET|TOKEN(?!IZERS)|PASSWORD|KEY|CREDENTIAL|AUTH")
    assert not [name for name in FORWARDED if suspicious.search(name)]


def test_a_password_in_a_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL is a URL with a user name or password") as error:
        of_job(tmp_path, [], {"AWS_ENDPOINT_URL": "http://me:hunter2@storage:9000"})
    assert "hunter2" not in str(error.value)


def test_what_is_not_set_is_not_forwarded(tmp_path: Path) -> None:
    assert of_job(tmp_path, [], {"HF_HUB_OFFLINE": ""})["env_vars"].keys().isdisjoint(FORWARDED)


def test_processes_of_a_driver_get_the_address_of_their_cluster(tmp_path: Path) -> None:
    address = of_driver("127.0.0.1:6379", {})["env_vars"]["RAY_ADDRESS"]
    assert address.endswith(":6379")
    assert not address.startswith("127."), "another node would search for the cluster on itself"
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "OMP_NUM_THREADS": "1"}
    assert of_driver("10.0.0.1:6379", job) == {"env_vars": {"RAY_ADDRESS": "10.0.0.1:6379"}}, "the job has the rest"
    assert of_driver("local", {}) == {}


def test_a_working_directory_without_large_and_useless_files(tmp_path: Path) -> None:
    needed = ["run.yaml", "data/new.jsonl", "anchors/old.jsonl", "code/runs/keep.py"]
    not_needed = [
        ".git/objects/a", ".venv/bin/python", ".venv-lerobot/x", "venv/x", "code/__pycache__/a.pyc", ".mypy_cache/x",
        "code/.pytest_cache/x", "runs/a/model", "craft-demo-digits/a", "cache/manifest.json", "cache/shards/0.parquet",
        "deep/begun/plan.json", "deep/begun/shards/0.parquet", "ignored.bin", "rayignored.bin",
    ]  # fmt: skip
    for name in needed + not_needed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * (1 if name in needed else 1000))
    (tmp_path / ".gitignore").write_text("/ignored.bin\n")
    (tmp_path / ".rayignore").write_text("/rayignored.bin\n")
    rules = sum((tmp_path / name).stat().st_size for name in (".gitignore", ".rayignore"))
    assert working_dir.check_size(tmp_path, working_dir.excludes(tmp_path)) == len(needed) + rules
    assert (working_dir.MANIFEST, working_dir.PLAN, working_dir.SHARDS) == (
        manifest.MANIFEST,
        manifest.PLAN,
        manifest.SHARDS,
    )


def test_a_working_directory_that_is_too_large_is_one_line(tmp_path: Path) -> None:
    for name, size in (("small.txt", 10), ("data/large.bin", 90 * 2**20), ("data/other.bin", 20 * 2**20)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    patterns = working_dir.excludes(tmp_path)
    with pytest.raises(ConfigError, match=r"110\.0 MiB .* less than 100\.0 MiB \(largest: data/large\.bin 90\.0 MiB"):
        working_dir.check_size(tmp_path, patterns)
    (tmp_path / ".rayignore").write_text("/data/large.bin\n")
    assert working_dir.check_size(tmp_path, patterns) < 21 * 2**20
    with pytest.raises(ConfigError, match="there is no such directory"):
        working_dir.check_size(tmp_path / "nowhere", patterns)


def test_the_address_of_the_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert dashboard(None) == DASHBOARD
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert dashboard(None) == "http://head:8265"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ConfigError, match="RAY_ADDRESS is head:6379, the address for processes"):
        dashboard(None)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265")
    assert dashboard(None) == "http://other:8265"
    assert dashboard("mine:8265") == "http://mine:8265"


def test_what_a_job_writes_into_its_working_directory_would_be_lost() -> None:
    lost = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0/runs/a"
    with pytest.raises(ConfigError, match=f"output_dir is {lost}, in the working directory that was uploaded"):
        check_kept(Path(lost), "output_dir")
    check_kept(Path("/data/runs/a"), "output_dir")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["craft-ray", "train", "run.yaml"], "craft.anchor_cache_dir is anchors"),
        (["craft-ray", "anchors", "build", "run.yaml"], "craft.anchor_cache_dir is anchors"),
        (["craft-ray", "train", "run.yaml", "craft.anchor_cache_dir=/shared/anchors"], "output_dir is runs"),
        (["craft-ray compare run.yaml craft.anchor_cache_dir=s3://b/anchors"], "output_dir is runs"),
        (["craft-ray doctor && craft-ray compare run.yaml --out report"], "--out is report"),
        (["craft-ray", "report", "/shared/run", "--out=report"], "--out is report"),
        (["craft-ray", "sweep", "run.yaml", "--out", "sweep"], "--out is sweep"),
        (["craft-ray", "train", "run.yaml", "train.steps=none"], "train.steps"),
    ],
)
def test_outputs_that_a_job_would_lose_are_refused_before_the_upload(
    words: list[str], key: str, tmp_path: Path
) -> None:
    tree = {"model": {"path": "m"}, "task": {"path": "d.jsonl"}, "train": {"steps": 2}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tree, "craft": {"anchor_cache_dir": "anchors"}}))
    with pytest.raises(ConfigError) as refused:
        check_outputs(words, tmp_path)
    assert key in refused.value.message


@pytest.mark.parametrize(
    "words",
    [
        ["craft-ray", "train", "run.yaml", "output_dir=/shared/runs"],
        ["craft-ray compare run.yaml --out s3://bucket/report"],
        ["craft-ray", "evaluate", "run.yaml"],
        ["craft-ray", "train", "/shared/elsewhere.yaml"],
        ["python", "train.py", "run.yaml"],
        ["craft-ray train run.yaml output_dir=/shared/runs && tool --out here"],
    ],
)
def test_other_commands_are_uploaded(words: list[str], tmp_path: Path) -> None:
    tree = {"model": {"path": "m"}, "task": {"path": "d.jsonl"}, "train": {"steps": 2}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    check_outputs(words, tmp_path)


# --------------------------------------------------------------------------------------------- what is returned


@pytest.mark.ray
def test_the_log_and_the_exit_code_of_the_command_arrive(token_cluster: Cluster, tmp_path: Path) -> None:
    """Three jobs at once: words with spaces, a line for the shell, and craft-ray with outputs that would be lost."""
    (tmp_path / "inside.txt").write_text("content of the file\n")
    config = {
        "model": {"kind": "causal_lm", "path": "nowhere"}, "task": {"path": "inside.txt", "format": "text"},
        "craft": {"enabled": False}, "train": {"steps": 1, "batch_size": 1, "learning_rate": 0.1}, "output_dir": "runs",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    options = ("submit", "--address", token_cluster.dashboard, "--working-dir", tmp_path)
    program = "import os, sys; print(open('inside.txt').read(), os.environ['RAY_ADDRESS'], sys.argv[1]); sys.exit(3)"
    jobs = [
        token_cluster.command(*options, "--", sys.executable, "-c", program, "a  b"),
        token_cluster.command(*options, "echo one; echo $HF_HUB_OFFLINE >&2 && exit 0"),
        token_cluster.command(*options, "cp run.yaml here.yaml && craft-ray train here.yaml"),  # seen by the job alone
    ]
    (three, out, err), (zero, shell, _), (two, refused, _) = map(finish, jobs)
    assert three == 3, err
    assert "content of the file" in out
    assert re.search(r"\d+:\d+ a  b$", out, re.MULTILINE)
    assert zero == 0
    assert re.search(r"^one\n1$", shell, re.MULTILINE)
    assert two == 2, refused
    assert len(re.findall(r"^craft-ray: output_dir is /\S+/runs/\S+, in the working directory", refused, re.M)) == 1


@pytest.mark.ray
def test_following_can_be_interrupted_and_stopping_a_job_interrupts_it(token_cluster: Cluster, tmp_path: Path) -> None:
    """Ctrl-C here leaves the job alone; `ray job stop` reaches the command as Ctrl-C would."""
    program = (
        "import time\nprint('ready', flush=True)\ntry: time.sleep(100)\nexcept KeyboardInterrupt: print('interrupted')"
    )
    options = ("submit", "--address", token_cluster.dashboard, "--working-dir", tmp_path)
    following = token_cluster.command(*options, "--", sys.executable, "-c", program)
    assert following.stdout is not None
    seen = []
    for line in following.stdout:
        seen.append(line)
        if line == "ready\n":
            break
    following.send_signal(signal.SIGINT)
    code, _, err = finish(following)
    assert code == 130
    job = re.match(r"job (\S+) on", seen[0])
    assert job is not None
    hints = one_line(err)
    assert f"the job {job[1]} keeps running" in hints
    assert f"stop it: ray job stop --address {token_cluster.dashboard} {job[1]}" in hints
    assert token_cluster.ask(f"jobs/{job[1]}")["status"] == "RUNNING"
    token_cluster.ask(f"jobs/{job[1]}/stop", "POST")
    end = time.monotonic() + 100
    while (found := token_cluster.ask(f"jobs/{job[1]}"))["status"] == "RUNNING" and time.monotonic() < end:
        time.sleep(0.2)
    assert found["status"] == "STOPPED"
    assert "interrupted" in token_cluster.ask(f"jobs/{job[1]}/logs")["logs"]


class OneText:
    """A client whose connection takes a while to close."""

    def __init__(self) -> None:
        self.closed = False

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        try:
            yield "a text\n"
        finally:
            await asyncio.sleep(0.05)
            self.closed = True


def test_an_interrupt_between_two_texts_closes_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the loop ends first, and says on standard error that a task of its was destroyed."""

    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    client = OneText()
    monkeypatch.setattr(sys, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        Log(cast(JobSubmissionClient, client), "a job").follow()
    assert client.closed


# ------------------------------------------------------------------------------------------- which clients are accepted


@pytest.mark.ray
def test_without_the_right_token_every_client_is_refused(token_cluster: Cluster, tmp_path: Path) -> None:
    over_http = ("submit", "--address", token_cluster.dashboard, "--working-dir", tmp_path, "--", "true")
    wrong = {"RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
    cases = (
        ({"RAY_AUTH_MODE": None}, "RAY_AUTH_MODE is not set, so no token is sent"),
        (wrong, "the token in RAY_AUTH_TOKEN is not the cluster's"),
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, "and there is no such file"),
    )
    commands = [token_cluster.command(*over_http, **changes) for changes, _ in cases]
    for command, (_, words) in zip(commands, cases, strict=True):
        code, out, err = finish(command)
        assert (code, out) == (2, "")
        line = one_line(err)
        assert words in line
        assert "set RAY_AUTH_MODE=token, and set RAY_AUTH_TOKEN_PATH to a file with the cluster's token" in line
        assert wrong["RAY_AUTH_TOKEN"] not in line


@pytest.mark.ray
@pytest.mark.parametrize("changes", [{"RAY_AUTH_MODE": None}, {"RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}])
def test_a_driver_without_the_right_token_is_refused_at_once(
    token_cluster: Cluster, changes: dict[str, str | None]
) -> None:
    """Ray itself tries for twenty seconds and logs a line every second."""
    program = (
        "import time; from craft_pipelines.session import join; from craft_ray.errors import ConfigError\n"
        "before = time.monotonic()\n"
        "try: join()\n"
        "except ConfigError as error: print(error.message, time.monotonic() - before, sep='\\n')"
    )
    code, out, err = finish(token_cluster.python(program, **changes))
    assert (code, err) == (0, "")
    *announced, message, seconds = out.splitlines()
    assert announced == [f"joining the Ray cluster at {token_cluster.address}"]
    assert f"the cluster at {token_cluster.address} requires a token and refuses us" in message
    assert float(seconds) < 10


def test_no_cluster_is_one_line(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    before = time.monotonic()
    process = subprocess.run(
        [BIN / "craft-ray", "submit", "--address", f"{HOST}:{port}", "--working-dir", tmp_path, "--", "true"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 2
    assert f"no dashboard of a Ray cluster answers at http://{HOST}:{port}" in one_line(process.stderr)
    assert time.monotonic() - before < 60
