"""Every row is checked before the first step: what is found, what it costs, and what is not done twice."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from craft_pipelines.anchors import build, preview
from craft_pipelines.dry_run import dry_run
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from craft_ray.config import Experiment, parse_config
from craft_ray.data.place import Place
from craft_ray.errors import DataError
from craft_ray.models import load_model
from craft_ray.models.base import Model
from craft_ray.models.features import FeatureCache
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.rows import Rows, check_rows
from craft_ray.run.training import train, training
from craft_ray.workers import OneWorker

MINUTES = 5.0


def rows(count: int, prepare: Callable[[int], object], content: str = "data", threaded: bool = False) -> Rows:
    return Rows("task", count, content, prepare, lambda row: Place("data", f"row {row}"), ["how"], threaded)


def failing_at(*bad: int) -> Callable[[int], None]:
    def prepare(row: int) -> None:
        if row in bad:
            raise DataError(f"row {row} is bad")

    return prepare


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 89, 144, 400, 1000, 4181])
def test_each_row_is_prepared_once_and_never_again(count: int, threaded: bool) -> None:
    seen: list[int] = []  # to which threads append safely
    for _ in range(2):
        check_rows(rows(count, seen.append, threaded=threaded), MINUTES, OneWorker(), print)
    assert Counter(seen) == Counter(range(count))
    check_rows(rows(count, seen.append, "other data", threaded), MINUTES, OneWorker(), print)
    assert set(Counter(seen).values()) == {2}


def test_threads_prepare_rows_at_the_same_time_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("craft_ray.run.rows._processors", lambda: 3)
    together = threading.Barrier(3)
    seen: list[int] = []

    def prepare(row: int) -> None:
        if seen:
            together.wait(20)  # fails unless three rows are under way
        seen.append(row)

    check_rows(rows(7, prepare, threaded=True), MINUTES, OneWorker(), print)
    assert sorted(seen) == list(range(7))


def test_progress_is_reported_with_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("craft_ray.pace.SAY_S", 0.0)
    reports: list[tuple[str, float, int, float]] = []
    check_rows(rows(9, lambda _: None), MINUTES, OneWorker(), print, lambda *report: reports.append(report))
    assert [done for _, done, _, _ in reports] == [*range(1, 10)]
    assert {(what, of) for what, _, of, _ in reports} == {("checking the rows of task", 9)}
    assert all(left_s > 0 for *_, left_s in reports[:-1])
    assert reports[-1][-1] == 0


@pytest.mark.parametrize("threaded", [False, True])
def test_the_first_bad_row_is_named_and_the_others_are_counted(threaded: bool) -> None:
    with pytest.raises(DataError) as caught:
        check_rows(rows(400, failing_at(300, 3, 41, 5, 77), threaded=threaded), MINUTES, OneWorker(), print)
    assert caught.value.message == (
        "task: row 3 is bad; 4 more of 400 rows cannot be used either (row 5; row 41; row 77; ...)"
    )
    with pytest.raises(DataError, match=r"^task: row 3 is bad$"):  # a mistake is not remembered as checked
        check_rows(rows(400, failing_at(3)), MINUTES, OneWorker(), print)


def test_where_the_time_does_not_suffice_the_next_start_goes_on() -> None:
    said: list[str] = []
    seen: Counter[int] = Counter()

    def slow(row: int) -> None:
        seen[row] += 1
        threading.Event().wait(0.002)

    for _ in range(100):
        check_rows(rows(60, slow), 0.01 / 60, OneWorker(), said.append)
        if len(seen) == 60:
            break
    assert seen == Counter(range(60))
    assert len(said) > 1
    assert all("of 60 rows of task are checked" in line and "train.check_minutes" in line for line in said)


def test_no_time_checks_nothing() -> None:
    check_rows(rows(3, failing_at(0, 1, 2)), 0.0, OneWorker(), print)


@dataclass
class Pair:
    """Two workers, a thread each."""

    rank: int
    barrier: threading.Barrier
    shared: dict[int, Any]
    world_size: int = 2
    device: torch.device = field(default=torch.device("cpu"))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        raise AssertionError

    start_all_reduce = all_reduce

    def gather(self, value: Any) -> list[Any]:
        self.shared[self.rank] = value
        self.barrier.wait()
        values = [self.shared[0], self.shared[1]]
        self.barrier.wait()
        return values


def test_workers_share_the_rows_and_all_of_them_refuse() -> None:
    barrier, shared, seen = threading.Barrier(2), {}, [Counter[int](), Counter[int]()]

    def refused(rank: int, bad: tuple[int, ...]) -> str | None:
        def prepare(row: int) -> None:
            seen[rank][row] += 1
            failing_at(*bad)(row)

        try:
            check_rows(rows(101, prepare, str(bad)), MINUTES, Pair(rank, barrier, shared), print)
        except DataError as error:
            return error.message
        return None

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(refused, (0, 1), ((), ()))) == [None, None]
        assert seen[0] + seen[1] == Counter(range(101))
        assert abs(seen[0].total() - seen[1].total()) <= 1
        first, second = pool.map(refused, (0, 1), ((17, 60), (17, 60)))
    assert first == second == "task: row 17 is bad; 1 more of 101 rows cannot be used either (row 60)"


# -- in the stages


def written(path: Path, bad: dict[int, dict[str, str]]) -> Path:
    good = [{"prompt": f"Q{row}", "response": str(row)} for row in range(40)]
    path.write_text("".join(json.dumps(bad.get(row, cells)) + "\n" for row, cells in enumerate(good)))
    return path


@pytest.fixture
def config(text_model: Path, tmp_path: Path) -> Experiment:
    """A run on 40 good rows; none of the bad ones below is in its first batches."""
    columns = {"prompt": "prompt", "response": "response"}
    tree = {
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(text_model), "max_length": 64, "append_eos": False},
        "task": {"path": str(written(tmp_path / "task.jsonl", {})), "columns": columns},
        "craft": {"enabled": False, "anchor_cache_dir": str(tmp_path / "cache")},
        "anchors": {"source": {"path": str(tmp_path / "task.jsonl"), "columns": columns}},
        "evaluation": {"new": {"metric": "perplexity", "data": {"path": str(tmp_path / "task.jsonl")}}},
        "train": {"steps": 1, "batch_size": 2},
        "workers": {"num_workers": 0},
    }
    tree["evaluation"]["new"]["data"]["columns"] = columns  # type: ignore[index]
    return parse_config(tree, "test")


LONG, EMPTY = {"prompt": "long " * 60, "response": "x"}, {"prompt": "Q", "response": ""}


@pytest.mark.parametrize(
    ("key", "bad", "said"),
    [
        ("task", {3: LONG}, r"^task: .*bad\.jsonl, row 3 has \d+ tokens, model\.max_length is 64: [^;]*$"),
        ("task", {38: EMPTY, 39: LONG}, r"^task: .*, row 38 has an empty response.*; 1 more of 40 .*\(row 39\)"),
        ("evaluation.new.data", {3: LONG}, r"^evaluation\.new\.data: .*bad\.jsonl, row 3 has \d+ tokens"),
    ],
)
def test_a_bad_row_ends_a_run_before_its_first_step(
    key: str, bad: dict[int, dict[str, str]], said: str, config: Experiment, tmp_path: Path
) -> None:
    config = config.changed({f"{key}.path": str(written(tmp_path / "bad.jsonl", bad)), "craft.anchor_cache_dir": None})
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(DataError, match=said):
        train(config, folder, OneWorker(), NullObserver())
    assert not folder.started
    with pytest.raises(DataError, match=said):
        dry_run(config)


def test_a_row_of_a_part_has_the_number_that_it_has_in_its_file(config: Experiment, tmp_path: Path) -> None:
    bad = {33: LONG, 36: EMPTY, 39: LONG}
    path = str(written(tmp_path / "bad.jsonl", bad))
    config = config.changed({"task.path": path, "task.split": "train[75%:]", "craft.anchor_cache_dir": None})
    with pytest.raises(DataError) as caught:
        train(config, RunFolder(tmp_path / "part"), OneWorker(), NullObserver())
    assert caught.value.message.startswith(f"task: {path}, row 33 has ")
    assert caught.value.message.endswith("; 2 more of 10 rows cannot be used either (row 36; row 39)")
    one = config.changed({"task.split": "train[36:37]"})
    with pytest.raises(DataError, match=rf"^task: {path}, row 36 has an empty response"):
        train(one, RunFolder(tmp_path / "one"), OneWorker(), NullObserver())


def test_a_row_of_a_mixture_is_named_by_its_source_and_its_file(config: Experiment, tmp_path: Path) -> None:
    first = written(tmp_path / "first.jsonl", {3: LONG, 5: LONG})
    (tmp_path / "more").mkdir()
    for name, bad in (("a", {}), ("b", {7: EMPTY})):
        written(tmp_path / "more" / f"{name}.jsonl", bad)
    columns = config.model_dump()["task"]["columns"]
    mix = [{"path": str(path), "columns": columns} for path in (first, tmp_path / "more")]
    config = config.changed({"task": {"mix": mix}, "craft.anchor_cache_dir": None})
    with pytest.raises(DataError) as caught:
        train(config, RunFolder(tmp_path / "run"), OneWorker(), NullObserver())
    assert caught.value.message.startswith(f"task: {first}, row 3 has ")
    assert caught.value.message.endswith(
        f"; 2 more of 120 rows cannot be used either (row 5; {tmp_path / 'more'}: b.jsonl, row 7)"
    )


def test_a_bad_anchor_ends_a_build_before_its_first_shard(config: Experiment, tmp_path: Path) -> None:
    config = config.changed({"anchors.source.path": str(written(tmp_path / "bad.jsonl", {30: LONG, 31: LONG}))})
    with pytest.raises(DataError, match=r"^anchors\.source: .*bad\.jsonl, row 30 has .*; 1 more of 40 rows"):
        build(config, say=lambda _: None)
    with pytest.raises(DataError, match=r"^anchors\.source: .*bad\.jsonl, row 30 has .*; 1 more of 40 rows"):
        preview(config, say=lambda _: None)
    assert not list((tmp_path / "cache").rglob("*.parquet"))
    assert build(config.changed({"anchors.source.limit": 30}), say=lambda _: None).rows_computed == 30


def test_an_anchor_without_a_token_at_a_stored_position_ends_a_build_before_its_first_shard(
    config: Experiment, tmp_path: Path
) -> None:
    """Also where the rows were checked before, for another position."""
    assert build(config.changed({"anchors.positions": ["last_token"]}), say=lambda _: None).rows_computed == 40
    other = config.changed({"anchors.positions": ["last_token", "vision_mean"], "craft.anchor_cache_dir": "other"})
    lacking = r"anchor position 'vision_mean' selects no token of a sequence with \d prompt tokens, 0 image tokens"
    with pytest.raises(DataError, match=rf"^anchors\.source: \S+task\.jsonl, row 0: {lacking}.*; 39 more of 40 rows"):
        preview(other, say=lambda _: None)


@pytest.mark.parametrize("bad", [LONG, EMPTY])
def test_an_id_of_any_length_makes_no_long_message(bad: dict[str, str], config: Experiment, tmp_path: Path) -> None:
    path = written(tmp_path / "bad.jsonl", {3: bad | {"id": "i" * 2_000_000}})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"id": str(number)} | row) + "\n" for number, row in enumerate(rows)))
    config = config.changed({"task.path": str(path), "task.columns.id": "id", "craft.anchor_cache_dir": None})
    with pytest.raises(DataError) as caught:
        train(config, RunFolder(tmp_path / "run"), OneWorker(), NullObserver())
    assert "(id iii" in caught.value.message
    assert len(caught.value.message) < 1000


# -- models with a number of positions


@pytest.fixture(scope="module")
def gpt2(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """Folder of a tiny GPT-2 with so many positions and embeddings beyond its tokens; all have the same tokenizer."""

    def built(positions: int, spare: int = 0) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(text_model)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        vocabulary = len(tokenizer) + spare
        folder = tmp_path_factory.mktemp("gpt2")
        settings = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=positions, vocab_size=vocabulary, **ids)
        GPT2LMHeadModel(settings).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return built


MIDDLING = {"prompt": "x" * 40, "response": "x"}


@pytest.mark.parametrize("shared", [False, True])
def test_rows_that_were_checked_for_one_model_are_checked_again_for_one_with_other_limits(
    shared: bool, config: Experiment, gpt2: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where both runs share preprocessed samples in one process."""
    changes = {"task.path": str(written(tmp_path / "middling.jsonl", {39: MIDDLING})), "craft.anchor_cache_dir": None}
    config = config.changed(changes | {"model.path": str(gpt2(64))})
    features = FeatureCache() if shared else None
    list(training(config, RunFolder(tmp_path / "first"), OneWorker(), NullObserver(), features))
    second = RunFolder(tmp_path / "second")
    config = config.changed({"model.path": str(gpt2(32))})
    with pytest.raises(DataError, match=r"^task: \S+, row 39 has 42 tokens, the model has 32 positions"):
        list(training(config, second, OneWorker(), NullObserver(), features))
    assert not second.started


def test_the_limits_of_a_model_and_not_its_weights_decide_whether_a_sample_can_be_used(
    config: Experiment, gpt2: Callable[..., Path]
) -> None:
    def loaded(*limits: int) -> Model:
        return load_model(config.changed({"model.path": str(gpt2(*limits))}).model, "fp32")

    first, same, shorter, wider = (loaded(*limits) for limits in ((64,), (64,), (32,), (64, 8)))
    assert len({model.preprocessor_fingerprint() for model in (first, same, shorter, wider)}) == 1
    assert first.weights_fingerprint() != same.weights_fingerprint()
    assert first.sample_fingerprint() == same.sample_fingerprint()
    assert len({model.sample_fingerprint() for model in (first, shorter, wider)}) == 3


TOO_LONG = r"the prompt of \S+, row 39 has 41 tokens, which with 8 new ones are more than the model's 48 positions"


TOO_LONG_CONTINUED = r"\S+, row 39, continued by 8 tokens, has 49 tokens, model\.max_length is 48: raise it, or "


@pytest.mark.parametrize(("positions", "max_length", "said"), [(48, 512, TOO_LONG), (64, 48, TOO_LONG_CONTINUED)])
def test_anchors_whose_suffix_does_not_fit_end_a_build_before_its_first_shard(
    positions: int, max_length: int, said: str, config: Experiment, gpt2: Callable[..., Path], tmp_path: Path
) -> None:
    config = config.changed(
        {
            "model.path": str(gpt2(positions)),
            "model.max_length": max_length,
            "anchors.source.path": str(written(tmp_path / "middling.jsonl", {39: MIDDLING})),
            "anchors.positions": ["suffix"],
            "anchors.max_new_tokens": 8,
        }
    )
    with pytest.raises(DataError, match=rf"^anchors\.source: {said}[^;]*$"):
        build(config, say=lambda _: None)
    assert not list((tmp_path / "cache").rglob("*.parquet"))
    assert build(config.changed({"anchors.max_new_tokens": 7}), say=lambda _: None).rows_computed == 40


@pytest.mark.parametrize(
    ("scored", "row", "said"),
    [
        ({"metric": "exact_match", "max_new_tokens": 8}, MIDDLING, TOO_LONG),
        ({"metric": "contains", "max_new_tokens": 8}, MIDDLING, TOO_LONG),
        ({"metric": "perplexity", "replies": 40, "max_new_tokens": 8}, MIDDLING, TOO_LONG),
        ({"metric": "exact_match"}, EMPTY, r"\S+, row 39 has an empty response"),
    ],
)
def test_a_row_that_cannot_be_answered_ends_a_run_before_its_first_step(
    scored: dict[str, Any],
    row: dict[str, str],
    said: str,
    config: Experiment,
    gpt2: Callable[..., Path],
    tmp_path: Path,
) -> None:
    held_out = config.evaluation.new
    assert held_out is not None
    data = held_out.data.model_dump() | {"path": str(written(tmp_path / "held_out.jsonl", {39: row}))}
    changes = {"model.path": str(gpt2(48)), "craft.anchor_cache_dir": None}
    refused = config.changed(changes | {"evaluation.new": {"data": data, **scored}})
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(DataError, match=rf"^evaluation\.new\.data: {said}[^;]*$"):
        train(refused, folder, OneWorker(), NullObserver())
    assert not folder.started
    with pytest.raises(DataError, match=rf"^evaluation\.new\.data: {said}[^;]*$"):
        dry_run(refused)
    # What was checked for a shorter answer does not count for a longer one.
    data["limit"] = 39 if row is EMPTY else None
    shorter = {**scored, "max_new_tokens": 7}
    train(config.changed(changes | {"evaluation.new": {"data": data, **shorter}}), folder, OneWorker(), NullObserver())
    with pytest.raises(DataError, match=said):
        train(refused, RunFolder(tmp_path / "longer"), OneWorker(), NullObserver())
