"""A mixture of sources: how often each is drawn, what a step depends on, how it is written, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from craft_ray.config import Experiment, Mixture, dump_config, load_config, parse_config
from craft_ray.config.mixture import MOST
from craft_ray.data.sampler import MixtureSampler
from craft_ray.data.task import open_task, sampler_of
from craft_ray.errors import ConfigError
from craft_ray.run.folder import RunFolder
from craft_ray.run.identity import check_config
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run, train
from craft_ray.workers import OneWorker
from tests.support.caches import built
from tests.support.experiments import ANSWERED, Digits
from tests.support.runs import trained, weights

ROWS, WEIGHTS = (7, 40, 3), (1.0, 2.0, 0.25)


def drawn(sampler: MixtureSampler, steps: range) -> list[list[int]]:
    return [sampler.global_batch(step) for step in steps]


def source_of(row: int) -> int:
    return 0 if row < 7 else 1 if row < 47 else 2


def test_each_source_is_drawn_by_its_weight() -> None:
    sampler = MixtureSampler(ROWS, WEIGHTS, 13, seed=0, stream=0)
    assert sum(sampler.places) == 1000
    counts = Counter(source_of(row) for batch in drawn(sampler, range(1000)) for row in batch)
    total = sum(counts.values())
    for number, weight in enumerate(WEIGHTS):
        assert counts[number] / total == pytest.approx(weight / sum(WEIGHTS), abs=1e-3)


def test_a_row_comes_again_only_after_all_others_of_its_source() -> None:
    rows = [row for batch in drawn(MixtureSampler(ROWS, WEIGHTS, 13, 0, 0), range(100)) for row in batch]
    for number, count in enumerate(ROWS):
        own = [row for row in rows if source_of(row) == number]
        for start in range(0, len(own) - count, count):
            assert len(set(own[start : start + count])) == count


def test_a_batch_depends_on_the_seed_and_the_step_alone() -> None:
    whole = drawn(MixtureSampler(ROWS, WEIGHTS, 12, 3, 0), range(300))
    jumping = MixtureSampler(ROWS, WEIGHTS, 12, 3, 0)
    assert [jumping.global_batch(step) for step in (299, 5, 120)] == [whole[step] for step in (299, 5, 120)]
    parts = [MixtureSampler(ROWS, WEIGHTS, 12, 3, 0).local_batch(7, rank, 3) for rank in range(3)]
    assert [row for part in parts for row in part] == whole[7]
    assert drawn(MixtureSampler(ROWS, WEIGHTS, 12, 4, 0), range(3)) != whole[:3]


def test_a_rare_source_has_its_place_in_every_cycle() -> None:
    sampler = MixtureSampler((5, 5), (1e-4, 1.0), 8, 0, 0)
    assert sampler.places[0] == 1
    assert sum(sampler.places) == 10001


def test_the_rarest_source_that_a_config_may_have_has_its_place() -> None:
    sampler = MixtureSampler((5, 5), (1.0, MOST), 8, 0, 0)
    assert sampler.places == [1, 1_000_000]
    assert len(sampler.global_batch(10)) == 8


def mixed(digits: Digits, folder: Path, held: bool = False) -> Experiment:
    """A run on two sources, of which the first counts three times; `held` under a budget for the old skill."""
    task = {
        "mix": [
            {"path": str(digits.data / "new_train.parquet"), "columns": ANSWERED, "weight": 3},
            {"path": str(digits.data / "old_train.parquet"), "columns": ANSWERED, "limit": 20},
        ]
    }
    plain = {} if held else {"craft.enabled": False, "craft.anchor_cache_dir": None}
    return digits.experiment(folder, {"task": task, **plain})


def test_a_mixture_is_saved_as_it_was_read(digits: Digits, tmp_path: Path) -> None:
    config = mixed(digits, tmp_path)
    assert isinstance(config.task, Mixture)
    assert [part.weight for part in config.task.mix] == [3.0, 1.0]
    assert parse_config(config.model_dump(), "again") == config
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.yaml") == config
    assert load_config(tmp_path / "run.yaml", ["task={path: x.jsonl}"]).task.path.endswith("x.jsonl")  # type: ignore[union-attr]


def test_the_paths_of_a_mixture_start_at_the_config(tmp_path: Path) -> None:
    tree = {"model": {"path": "org/m"}, "task": {"mix": [{"path": "./a.jsonl"}]}, "train": {"steps": 1}}
    config = parse_config(tree, "test", base=tmp_path)
    assert isinstance(config.task, Mixture)
    assert config.task.mix[0].data.path == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize("held", [False, True])
def test_a_resumed_run_on_a_mixture_equals_the_uninterrupted_one_bit_for_bit(
    held: bool, digits: Digits, tmp_path: Path
) -> None:
    config = mixed(digits, tmp_path, held)
    if held:
        built(config)
    whole = trained(config, tmp_path / "whole")
    cut = RunFolder(tmp_path / "cut")
    cut.begin(config, ["test"])
    Run(config, cut, OneWorker(), NullObserver()).loop(until=5)  # past the checkpoint at 4: step 5 is repeated
    train(config, cut, OneWorker(), NullObserver())
    losses = [[record["train/loss"] for record in run.read_metrics()] for run in (cut, whole)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6, "each step has samples of its own"
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(record["craft/retention_loss"] for record in whole.read_metrics()) == held


def test_a_run_on_a_mixture_knows_its_sources(digits: Digits, tmp_path: Path) -> None:
    config = mixed(digits, tmp_path)
    source = open_task(config.task)
    assert source[0].id == f"0/{pq.read_table(digits.data / 'new_train.parquet')['id'][0]}"
    assert source[len(source) - 1].id.startswith("1/old-")
    assert len(set(source.ids())) == len(source)
    batch = sampler_of(config.task, source, 8, 0, 0).global_batch(0)
    run = trained(config, tmp_path / "run")
    assert len(batch) == len(run.read_metrics()) + 2 == 8
    with pytest.raises(ConfigError, match=r"task\.mix"):
        check_config(run, config.changed({"task": {"mix": [{**part, "weight": 1.0} for part in _parts(config)]}}))


def _parts(config: Experiment) -> list[dict[str, Any]]:
    return [dict(part) for part in config.model_dump()["task"]["mix"]]


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ({"mix": []}, r"task\.mix.*at least 1"),
        ({"mix": [{"path": "x.jsonl", "weight": 0}]}, r"task\.mix\[0\]\.weight"),
        ({"mix": [{"path": "x.jsonl", "weight": -1}]}, "greater than 0"),
        ({"mix": [{"path": "x.jsonl", "weight": "inf"}]}, r"task\.mix\[0\]\.weight"),
        (
            {"mix": [{"path": "x.jsonl"}, {"path": "y.jsonl", "weight": 1e-9}]},
            r"task: the weight 1 of .*x\.jsonl is more than 1,000,000 times the weight 1e-09 of .*y\.jsonl.*: raise",
        ),
        (
            {"mix": [{"path": "x.jsonl", "weight": 1e-320}, {"path": "y.jsonl"}]},
            r"weight 1 of .* weight 9.*e-321 of",
        ),
        ({"mix": [{"weight": 1}]}, "path"),
        (
            {"mix": [{"path": "x.jsonl"}], "columns": {"response": "a"}},
            "mix is a list of sources, and columns beside it",
        ),
    ],
)
def test_what_is_no_mixture_is_refused(tmp_path: Path, task: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        parse_config({"model": {"path": "org/m"}, "task": task, "train": {"steps": 1}}, "test", base=tmp_path)
    assert "\n" not in caught.value.message


def test_sources_of_different_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "talked.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    mix = [
        {"path": str(tmp_path / "asked.jsonl"), "columns": {"response": "response"}},
        {"path": str(tmp_path / "talked.jsonl")},
    ]
    config = parse_config({"model": {"path": "org/m"}, "task": {"mix": mix}, "train": {"steps": 1}}, "test")
    with pytest.raises(
        ConfigError, match=r"task\.mix\[0\] and task\.mix\[1\] hold different kinds .*has_conversations"
    ):
        open_task(config.task)
