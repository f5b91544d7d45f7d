"""LeRobot policies through the command line: the documented commands, equal runs, and one line for a mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

pytest.importorskip("lerobot")

from craft_pipelines import cli
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from craft_ray.anchors.manifest import read_manifest
from craft_ray.config import Experiment, ModelConfig, load_config
from craft_ray.data.source import open_source
from craft_ray.lerobot.size import sized
from craft_ray.lerobot.tokenizers import TEXT_TOKENIZER, write_text_tokenizer
from craft_ray.models import load_model
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run
from craft_ray.workers import OneWorker
from tests.support.robots import small_policy, write_dataset
from tests.support.robots_others import small_act
from tests.support.runs import measured, weights

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

CONFIG = Path(__file__).parents[2] / "pipelines" / "configs" / "pi0_fast_aloha.yaml"
OLD = "Pick up the cube with the right arm and transfer it to the left arm."
NEW = "Insert the peg into the socket."
ALOHA: dict[str, Any] = {
    "episodes": 2, "frames": 6, "size": (480, 640), "cameras": ("top",), "state": 14, "action": 14,
    "videos": True, "fps": 50,
}  # fmt: skip
SHORT = (
    *("train.steps=6", "train.warmup_steps=1", "train.learning_rate=1e-3", "train.checkpoint_every=2"),
    *("train.log_every=1", "craft.projection_gate=always", "craft.conflict_threshold=0.5"),
)
"""A run of a few steps in which surgery fires."""
IN_PROCESS = ("workers.num_workers=0",)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy`, and demonstrations `old` and `new` in the layout of lerobot/aloha_sim_insertion_human; the statistics
    of `far` leave the policy's range. Read-only."""
    root = tmp_path_factory.mktemp("aloha")
    small_policy(root / "policy", states=14, actions=14, cameras=("top",), tasks=(OLD, NEW))
    write_dataset(root / "old", task=OLD, seed=1, **ALOHA)
    write_dataset(root / "new", task=NEW, seed=2, **ALOHA)
    stats = Path(shutil.copytree(root / "new", root / "far")) / "meta" / "stats.json"
    content = json.loads(stats.read_text())
    content["action"]["max"] = [3.0] * 14
    stats.write_text(json.dumps(content))
    return root


def documented(world: Path, folder: Path) -> list[str]:
    """The shipped config and overrides: small local data, and no GPU."""
    return [
        str(CONFIG),
        *(f"model.path={world / 'policy'}", f"task.path={world / 'new'}", f"anchors.source.path={world / 'old'}"),
        *("anchors.source.stride=1", f"craft.anchor_cache_dir={folder / 'anchors'}", "anchors.gpus_per_actor=0"),
        *("workers.use_gpu=false", f"output_dir={folder / 'runs'}", "evaluation={}", "train.precision=fp32"),
        "anchors.max_new_tokens=30",
    ]


def craft_ray(*arguments: str | Path) -> int:
    """`craft-ray ARGUMENTS...` in this process -> its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["craft-ray", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
    return 0


def process(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    """`craft-ray` as a user runs it."""
    return subprocess.Popen(
        [sys.executable, "-m", "craft_pipelines.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIG.parents[2])},
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the cache of the documented config, built by a teacher on Ray."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRAFT_RAY_CACHE", str(folder / "expanded"))  # for the processes of the cluster that starts here
        assert craft_ray("anchors", "build", *documented(world, folder)) == 0
    yield folder
    ray.shutdown()


def experiment(world: Path, built: Path, *overrides: str) -> Experiment:
    config, *rest = documented(world, built)
    return load_config(config, [*rest, *overrides])


def trained(world: Path, built: Path, folder: Path, *overrides: str) -> RunFolder:
    """A run into `folder` by the command."""
    given = [*documented(world, built), *SHORT, f"output_dir={folder}", *overrides]
    assert craft_ray("train", *given) == 0
    return RunFolder(folder / "pi0-fast-aloha-hidden-seed0")


@pytest.fixture(scope="module")
def uninterrupted(world: Path, built: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run in this process. Read-only."""
    return trained(world, built, tmp_path_factory.mktemp("uninterrupted"), *IN_PROCESS)


def same(a: RunFolder, b: RunFolder) -> bool:
    """Bit for bit."""
    ours, theirs = weights(a), weights(b)
    return measured(a) == measured(b) and all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs)


def one_line(err: str) -> str:
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("craft-ray: ")
    return lines[0]


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# -- the documented commands

STEP = re.compile(
    r"^Step (\d)/3 \| loss=\S+ .* mode=hidden \| L_ret=\S+ \| λ=\d\.\d{3} \| ε=0\.050 \| weight=\S+ "
    r"\| conflict=. \| projected=. \| dot=\S+ \| cos=\S+$",
    re.MULTILINE,
)


def test_the_documented_dry_run_takes_three_steps_and_leaves_nothing(world: Path, built: Path, tmp_path: Path) -> None:
    before = files(world) | files(built)
    here = tmp_path / "here"
    here.mkdir()
    running = process("train", *documented(world, built), "--dry-run", cwd=here)
    out, err = running.communicate()
    assert running.returncode == 0, err
    assert "0.12 M trainable parameters, 12 samples of the new skill" in out
    assert "CRaFT is enabled: hidden (layers [1, 2] at suffix, relative_mse)" in out
    assert STEP.findall(out) == ["1", "2", "3"]
    assert "Nothing of these 3 steps was kept" in out
    assert not err
    assert not files(here)
    assert files(world) | files(built) == before


def test_a_second_build_computes_no_row(world: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert craft_ray("anchors", "build", *documented(world, built)) == 0
    assert "12 anchors, no row computed" in capsys.readouterr().out


def test_the_cache_is_verified_against_the_policy(world: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, *overrides = documented(world, built)
    assert craft_ray("anchors", "verify", built / "anchors", *overrides, "--config", config) == 0
    vectors = re.search(r"reproduces 12 anchors: largest .* (\S+), (\d+) of (\d+) suffix", capsys.readouterr().out)
    assert vectors is not None
    assert float(vectors[1]) < 1e-6
    assert vectors[2] == vectors[3]


# -- what a run equals


def test_a_run_on_ray_gives_the_weights_of_one_in_this_process(
    world: Path, built: Path, uninterrupted: RunFolder, tmp_path: Path
) -> None:
    on_ray = trained(world, built, tmp_path, "workers.num_workers=1")
    assert any(record["craft/conflict"] for record in measured(uninterrupted)), (
        "surgery must fire for this to mean much"
    )
    assert same(on_ray, uninterrupted)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    world: Path, built: Path, uninterrupted: RunFolder, tmp_path: Path
) -> None:
    cut = RunFolder(tmp_path / "pi0-fast-aloha-hidden-seed0")
    cut.begin(experiment(world, built, *SHORT, *IN_PROCESS, f"output_dir={tmp_path}"), ["test"])
    Run(cut.config(), cut, OneWorker(), NullObserver()).loop(until=5)  # past the checkpoint at 4: step 5 is repeated
    assert craft_ray("train", "--resume", cut.path) == 0
    assert same(cut, uninterrupted)


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


@pytest.mark.cluster
def test_a_killed_worker_and_a_killed_driver_end_where_the_uninterrupted_run_ends(
    world: Path, built: Path, tmp_path: Path
) -> None:
    longer = ("train.steps=60", "train.checkpoint_every=10")
    whole = trained(world, built, tmp_path / "whole", *IN_PROCESS, *longer)

    def started(name: str, workers: int) -> tuple[subprocess.Popen[str], RunFolder]:
        changes = (f"output_dir={tmp_path / name}", f"workers.num_workers={workers}", *longer)
        run = RunFolder(tmp_path / name / "pi0-fast-aloha-hidden-seed0")
        running = process("train", *documented(world, built), *SHORT, *changes)
        wait_until(lambda: run.metrics.exists() and len(run.read_metrics()) >= 15)
        return running, run

    running, run = started("lost-worker", 1)
    (worker,) = [
        p
        for p in psutil.Process(running.pid).children(recursive=True)
        if any("RayTrainWorker" in c for c in p.cmdline())
    ]
    worker.send_signal(signal.SIGKILL)
    out, err = running.communicate()
    assert running.returncode == 0, err
    assert "resuming after step" in out
    assert same(run, whole)

    running, run = started("killed-driver", 0)
    running.kill()
    running.communicate()
    assert run.finished() is None
    assert craft_ray("train", "--resume", run.path) == 0
    assert same(run, whole)


@pytest.mark.slow
def test_two_workers_equal_one_on_the_same_global_batches(
    world: Path, built: Path, uninterrupted: RunFolder, tmp_path: Path
) -> None:
    run = trained(world, built, tmp_path, "workers.num_workers=2")
    for ours, theirs in zip(measured(run), measured(uninterrupted), strict=True):
        assert ours["craft/conflict"] == theirs["craft/conflict"]
        for key in ("train/loss", "train/grad_norm", "craft/retention_loss", "craft/lambda"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=1e-6), key
    one = weights(uninterrupted)
    for name, value in weights(run).items():
        torch.testing.assert_close(value, one[name], rtol=1e-3, atol=2e-4)


def test_a_checkpoint_is_a_lerobot_policy_with_the_same_loss(world: Path, uninterrupted: RunFolder) -> None:
    """On samples of LeRobot's own data set, through its own processors."""
    folder = uninterrupted.checkpoints / "last" / "model"
    with sized(folder):
        policy = PI0FastPolicy.from_pretrained(folder)
    before, _ = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    times = [step / ALOHA["fps"] for step in range(policy.config.chunk_size)]
    theirs = LeRobotDataset("new", root=world / "new", delta_timestamps={"action": times}, video_backend="pyav")
    rows = (0, 4, 7)
    with torch.no_grad():
        expected = policy.forward(before(default_collate([theirs[row] for row in rows])))[0]

    model = load_model(ModelConfig(kind="lerobot", path=str(folder)), "fp32")
    source = open_source(uninterrupted.config().task, "task")
    samples = [source[row] for row in rows]
    batch = model.collate([model.preprocess_task(sample) for sample in samples])
    with torch.no_grad():
        assert model.task_loss(batch).item() == pytest.approx(expected.item(), rel=1e-5)


# -- arms on one cache


def test_arms_and_variants_are_compared_on_one_cache_by_perplexity(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = [
        f"evaluation.{skill}={{metric: perplexity, data: {{path: {world / skill}, format: lerobot, episodes: [1]}}}}"
        for skill in ("old", "new")
    ]
    arguments = [
        *documented(world, tmp_path), *SHORT, *IN_PROCESS, *held_out, "task.episodes=[0]", "train.steps=4",
        "anchors.positions=[suffix, vision_mean, text_last]", "craft.positions=[suffix]", "craft.epsilon_start=0.5",
        "compare.token_ce={epsilon_start: 20.0}",
        "compare.variants={prefix: {retention_mode: hidden, positions: [vision_mean, text_last]}}",
        "--seeds", "0", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert craft_ray("compare", *arguments) == 0
    out, err = capsys.readouterr()
    assert "[prefix seed 0] Step 4/4" in out
    assert not err
    runs = {run["arm"]: run for run in json.loads((tmp_path / "out" / "result.json").read_text())["runs"]}
    assert list(runs) == ["baseline", "token_ce", "hidden", "prefix"]
    for skill in ("old", "new"):
        assert len({run[skill]["before"] for run in runs.values()}) == 1, "all start at the same teacher"
        assert len({run[skill]["after"] for run in runs.values()}) == 4
        assert all(run[skill]["metric"] == "perplexity" for run in runs.values())
    assert all(run["new"]["after"] < run["new"]["before"] for run in runs.values())
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(words in page for words in ("CRaFT hidden", "CRaFT prefix", "perplexity"))
    identity = read_manifest(tmp_path / "anchors").identity
    assert (identity.positions, identity.rows) == (("suffix", "vision_mean", "text_last"), 12)

    assert craft_ray("compare", *arguments) == 0
    again = capsys.readouterr().out
    assert "no row computed" in again
    assert "4 of 4 runs are finished already" in again


# -- mistakes


@pytest.fixture
def own(world: Path, tmp_path: Path) -> Path:
    """A copy of the policy that a test may damage."""
    return Path(shutil.copytree(world / "policy", tmp_path / "own"))


@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        (
            "train",
            ["model.merge_statistics=[WORLD/far]"],
            r"another preprocessor \(hash\): cache \w+, this run \w+; build",
        ),
        (
            "anchors build",
            ["model.merge_statistics=[WORLD/far]"],
            r"holds a cache with preprocessor \w+, this config .* \w+:",
        ),
        (
            "anchors build",
            ["anchors.source.episodes=[0]"],
            r"holds a cache with source \w+, this config .* source \w+:",
        ),
        (
            "anchors build",
            ["anchors.source.path=WORLD/new"],
            r"holds a cache with source \w+, this config .* source \w+:",
        ),
        ("train", ["craft.positions=[vision_mean]"], "holds positions suffix, this run asks for vision_mean"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    command: str,
    overrides: list[str],
    words: str,
    world: Path,
    built: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files(built)
    given = [text.replace("WORLD", str(world)) for text in overrides]
    arguments = (*documented(world, built), *SHORT, *IN_PROCESS, *given, f"output_dir={tmp_path / 'runs'}")
    code = craft_ray(*command.split(), *arguments)
    assert re.search(words, one_line(capsys.readouterr().err))
    assert code == 4
    assert files(built) == before
    assert not list((tmp_path / "runs").glob("*"))


def refused(code: int, words: str, err: str, found: int) -> None:
    assert re.search(words, one_line(err)), err
    assert found == code


@pytest.mark.parametrize(
    ("robot", "words"),
    [
        ({"state": 7}, r"observation.state is \[7\] in \S*/other, but the policy \S*/policy takes \[14\]: specify"),
        ({"action": 7}, r"action is \[7\] in \S*/other, but the policy \S*/policy takes \[14\]: specify"),
        (
            {"cameras": ("wrist",)},
            r"other has no observation.images.top, which the policy \S* takes; .*rename",
        ),
    ],
)
def test_data_of_another_robot_are_refused(
    robot: dict[str, Any],
    words: str,
    world: Path,
    built: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_dataset(tmp_path / "other", **{**ALOHA, "size": 32, "videos": False, "episodes": 1, **robot})
    for command, key in (("train", "task.path"), ("anchors build", "anchors.source.path")):
        capfd.readouterr()
        given = [
            *documented(world, built),
            *SHORT,
            *IN_PROCESS,
            f"{key}={tmp_path / 'other'}",
            f"output_dir={tmp_path / 'runs'}",
        ]
        if command == "anchors build":
            given.append(f"craft.anchor_cache_dir={tmp_path / 'anchors'}")
        found = craft_ray(*command.split(), *given)
        refused(2, words, capfd.readouterr().err, found)
    assert not list((tmp_path / "runs").glob("*"))
    assert not (tmp_path / "anchors").exists()


def other_words(own: Path) -> None:
    shutil.rmtree(own / TEXT_TOKENIZER)
    write_text_tokenizer(own / TEXT_TOKENIZER, ["another corpus", "with other words in it"], 1280, 512)


def another_type(own: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"type": "diffusion"}))


def no_weights(own: Path) -> None:
    (own / "model.safetensors").unlink()


def one_weight_less(own: Path) -> None:
    state = load_file(own / "model.safetensors")
    state.pop(next(name for name in state if name.endswith("language_model.norm.weight")))
    save_file(state, own / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (other_words, 4, r"another preprocessor \(hash\): cache \w+, this run \w+; build the cache again"),
        (another_type, 2, r"own holds a policy of type diffusion, .* supports pi0_fast, pi05, smolvla, act: choose"),
        (no_weights, 1, r"own has no model.safetensors: the policy would be random; specify"),
        (one_weight_less, 1, r"own did not load completely: 1 weights are missing \(e.g. .*norm.weight\)"),
    ],
)
def test_a_policy_that_is_not_the_teacher_is_refused(
    damage: Callable[[Path], None],
    code: int,
    words: str,
    own: Path,
    world: Path,
    built: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(own)
    capfd.readouterr()
    arguments = (*documented(world, built), *SHORT, *IN_PROCESS, f"model.path={own}", f"output_dir={tmp_path / 'runs'}")
    found = craft_ray("train", *arguments)
    refused(code, words, capfd.readouterr().err, found)
    assert not list((tmp_path / "runs").glob("*"))


def test_a_language_model_refuses_frames_and_episodes(
    text_model: Path, text_data: Path, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rollout = "{metric: success, rollout: {env: metaworld, task: drawer-close-v3}}"
    plain = ["craft.enabled=false", "model.kind=causal_lm", f"model.path={text_model}", *IN_PROCESS]
    texts = [f"task={{path: {text_data / 'new_train.parquet'}, columns: {{response: response}}}}"]
    for given, words in (
        (
            [*plain, "model.gradient_checkpointing=false"],
            r"new is a LeRobotDataset, but model.kind is causal_lm.*model.kind=lerobot",
        ),
        (
            [*plain, *texts, f"evaluation.old={rollout}"],
            r"evaluation.old.rollout.*policy.*causal_lm",
        ),
    ):
        arguments = [*documented(world, tmp_path), *SHORT, "craft.anchor_cache_dir=null", *given]
        capfd.readouterr()
        found = craft_ray("train", *arguments)
        refused(2, words, capfd.readouterr().err, found)
    assert not list((tmp_path / "runs").glob("*"))


def test_action_tokens_of_a_policy_without_them_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small_act(tmp_path / "policy")
    write_dataset(tmp_path / "old", episodes=1, size=64, cameras=("camera0",))
    write_dataset(tmp_path / "new", episodes=1, size=64, cameras=("camera0",))
    arguments = (*documented(tmp_path, tmp_path), *IN_PROCESS, "model.gradient_checkpointing=false")
    capfd.readouterr()
    found = craft_ray("anchors", "build", *arguments)
    refused(2, r"of type act has no action tokens: .*anchors.modes=\[hidden\]", capfd.readouterr().err, found)
    assert not (tmp_path / "anchors").exists()
