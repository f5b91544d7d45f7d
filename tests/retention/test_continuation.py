"""How many held-out anchors a student continues as its teacher did, with known answers on the tiny models."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from craft_pipelines.anchors import build

from craft_ray.config import Experiment
from craft_ray.models import load_model
from craft_ray.models.base import Features, Model
from craft_ray.models.capabilities import token_model
from craft_ray.report.html import write_report
from craft_ray.retention import continuation
from craft_ray.retention.constraints import open_mode
from craft_ray.retention.continuation import anchor_agreement
from craft_ray.retention.mode import SampleMode
from craft_ray.run.folder import RunFolder
from craft_ray.run.kept import anchors_in_words
from craft_ray.run.metrics import result_lines
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run, train
from craft_ray.statistics import rate_upper_bound
from craft_ray.workers import OneWorker
from tests.support.caches import built, prompts, text_experiment
from tests.support.experiments import Digits
from tests.support.reports import Page, data_file, report, write_run
from tests.support.runs import trained
from tests.support.workers import Share

LENGTHS = [3, 9, 1, 14, 2, 7, 5, 11, 4, 6, 8, 13, 10, 12, 3, 5, 2, 9, 7, 1]


@pytest.fixture(scope="module")
def texts(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Anchors of the byte-level Llama with continuations of up to 5 tokens, built in batches of 4."""
    folder = tmp_path_factory.mktemp("texts")
    changes = {"anchors.max_new_tokens": 5, "anchors.batch_size": 4}
    config = text_experiment(text_model, prompts(folder / "a.jsonl", LENGTHS), folder, changes)
    built(config)
    return config


@pytest.fixture(scope="module")
def pictures(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Anchors of the tiny PaliGemma with continuations of up to 2 tokens."""
    config = digits.experiment(tmp_path_factory.mktemp("pictures"))
    build(config, say=lambda _: None)
    return config


def opened(config: Experiment, student: Model | None = None) -> SampleMode[Any]:
    """The retention mode of a student, which is the teacher where none is given."""
    model = student or load_model(config.model, config.train.precision)
    mode = open_mode(config, model, None if student is not None else model.weights_fingerprint())
    assert isinstance(mode, SampleMode)
    return mode


def moved(config: Experiment, by: float) -> Model:
    """A student whose weights have moved at random by a part of their size."""
    model = load_model(config.model, config.train.precision)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.module.parameters():
            weight += by * weight.std(correction=0) * torch.randn_like(weight)
    return model


def all_rows(mode: SampleMode[Any]) -> list[int]:
    return list(range(len(mode.anchors)))


@pytest.mark.parametrize("which", ["texts", "pictures"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_an_untouched_student_agrees_on_every_anchor(
    which: str, batch_size: int, request: pytest.FixtureRequest
) -> None:
    config: Experiment = request.getfixturevalue(which)
    mode = opened(config)
    rows = all_rows(mode)
    assert anchor_agreement(mode, rows, batch_size, OneWorker()) == {
        "agree": len(rows),
        "anchors": len(rows),
        "at_most_lost": pytest.approx(1 - 0.05 ** (1 / len(rows))),  # none of n differs: P(none) is 5 % at this rate
        "confidence": 0.95,
        "tokens": {"texts": 5, "pictures": 2}[which],
    }


def test_a_student_that_has_moved_agrees_where_each_of_its_tokens_is_the_teachers(texts: Experiment) -> None:
    """Its tokens come from complete passes without a cache of keys and values, one anchor at a time."""
    mode = opened(texts, moved(texts, 0.02))
    model, expected = mode.model, 0
    for row in all_rows(mode):
        ids = model.preprocess(mode.anchors.sample(row)).tokens["input_ids"][None]
        found: list[int] = []
        while len(found) < 5 and model.tokenizer.eos_token_id not in found:  # type: ignore[attr-defined]
            with torch.inference_mode():
                ids = torch.cat([ids, model.module(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            found.append(int(ids[0, -1]))
        expected += found == mode.anchors.suffix(row)
    assert 0 < expected < len(LENGTHS), "the student has moved too little or too far to show anything"
    result = anchor_agreement(mode, all_rows(mode), 8, OneWorker())
    assert result is not None
    assert result["agree"] == expected
    assert result["at_most_lost"] == rate_upper_bound(len(LENGTHS) - expected, len(LENGTHS), 0.95)


def test_a_student_that_has_lost_everything_agrees_on_none(texts: Experiment) -> None:
    mode = opened(texts, moved(texts, 10.0))
    result = anchor_agreement(mode, all_rows(mode), 8, OneWorker())
    assert result is not None
    assert (result["agree"], result["at_most_lost"]) == (0, 1.0)


def recorded(mode: SampleMode[Any], sharded: bool) -> list[int]:
    """The sizes of the batches that a student generates from now on. It only claims to be a part of a sharded one."""
    model, sizes = token_model(mode.model), []
    generate = model.generate

    def generated(features: Sequence[Features], most: int) -> list[list[int]]:
        sizes.append(len(features))
        model.sharded = False  # nothing is shared here, so transformers has nobody to wait for
        try:
            return generate(features, most)
        finally:
            model.sharded = sharded

    model.sharded, model.generate = sharded, generated  # type: ignore[method-assign]
    return sizes


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("sharded", [False, True])
def test_several_workers_give_the_bound_of_one(count: int, sharded: bool, texts: Experiment) -> None:
    """Also if their shares differ in size and one has none; workers that share a model then make equally many passes
    of equal sizes."""
    rows, student = list(range(3, 9)), moved(texts, 0.02)
    expected = anchor_agreement(opened(texts, student), rows, 2, OneWorker())
    modes = [opened(texts, moved(texts, 0.02)) for _ in range(count)]
    passes = [recorded(mode, sharded) for mode in modes]
    table, barrier = [None] * count, threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        runs = [
            pool.submit(anchor_agreement, mode, rows, 2, Share(rank, count, table, barrier))
            for rank, mode in enumerate(modes)
        ]
        assert [run.result(timeout=120) for run in runs] == [expected] * count
    if sharded:
        assert len({tuple(sizes) for sizes in passes}) == 1
    assert sum(map(sum, passes)) == (count * -(-6 // count) if sharded else 6)


def test_of_many_anchors_the_same_ones_are_drawn_each_time(texts: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, asked = opened(texts), []
    monkeypatch.setattr(continuation, "MOST_ANCHORS", 5)
    suffix = mode.anchors.suffix
    monkeypatch.setattr(mode.anchors, "suffix", lambda row: (asked.append(row), suffix(row))[1])
    results = [anchor_agreement(mode, all_rows(mode), 2, OneWorker()) for _ in range(2)]
    assert results[0] == results[1]
    assert results[0] is not None
    assert results[0]["anchors"] == results[0]["agree"] == len(set(asked)) == 5
    assert asked[:5] == asked[5:] == sorted(asked[:5]) != all_rows(mode)[:5], "from all over the cache"


def test_there_is_no_bound_where_no_continuation_of_the_teacher_is_stored(
    texts: Experiment, text_model: Path, tmp_path: Path
) -> None:
    mode = opened(texts)
    assert anchor_agreement(mode, [], 2, OneWorker()) is None, "no anchor is held out"
    mode.anchors.identity = mode.anchors.identity.model_copy(update={"inputs": "tensors"})
    assert anchor_agreement(mode, [0], 2, OneWorker()) is None, "an imported cache"

    source = prompts(tmp_path / "a.jsonl", LENGTHS)
    bare = text_experiment(text_model, source, tmp_path, {"anchors.modes": ["hidden"], "anchors.positions": ["all"]})
    built(bare)
    assert anchor_agreement(opened(bare), [0, 1], 2, OneWorker()) is None
    columns = {"id": "id", "prompt": "id", "response": "prompt"}
    given = {"anchors.source.columns": columns, "anchors.suffix_from": "response", "anchors.modes": ["token_ce"]}
    craft = {"craft.retention_mode": "token_ce", "craft.epsilon_start": 1.0}
    own = text_experiment(text_model, source, tmp_path / "own", {**given, **craft})
    built(own)
    assert anchor_agreement(opened(own), [0, 1], 2, OneWorker()) is None
    weights = texts.changed({"craft.retention_mode": "l2_sp", "craft.epsilon_start": 1.0})
    model = load_model(weights.model, "fp32")
    of_weights = open_mode(weights, model, model.weights_fingerprint())
    assert anchor_agreement(of_weights, [0, 1], 2, OneWorker()) is None


# --- in a run -----------------------------------------------------------------------------------------------------


def test_a_run_says_what_its_anchors_bound_and_a_resumed_one_says_the_same(
    pictures: Experiment, tmp_path: Path
) -> None:
    """With anchors alone: there is no evaluation."""
    pictures = pictures.changed({"anchors.modes": ["hidden", "token_ce"]})
    whole = trained(pictures, tmp_path / "whole")
    result = whole.finished()
    assert result is not None
    found = result["anchor_agreement"]
    assert found["anchors"] == result["heldout_anchors"]
    assert 0 <= found["agree"] <= found["anchors"]
    assert found["tokens"] == 2
    assert anchors_in_words(found) in result_lines(result)

    cut = RunFolder(tmp_path / "cut")
    cut.begin(pictures, ["test"])
    with closing(Run(pictures, cut, OneWorker(), NullObserver())) as run:
        run.loop(until=4)
    train(pictures, cut, OneWorker(), NullObserver())
    resumed = cut.finished()
    assert resumed is not None
    assert resumed["anchor_agreement"] == found

    plain = trained(pictures.changed({"craft.enabled": False}), tmp_path / "plain")
    measured = plain.finished()
    assert measured is not None
    assert measured["anchor_agreement"]["anchors"] == found["anchors"], "plain fine-tuning is measured, too"
    write_report([whole, plain], tmp_path / "report", title="t", command="c")
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.index(anchors_in_words(found)) < page.index("<h2>Scores</h2>")
    assert anchors_in_words(measured["anchor_agreement"]) in page


def test_a_run_that_changes_nothing_agrees_on_every_held_out_anchor(pictures: Experiment, tmp_path: Path) -> None:
    still = pictures.changed({"train.learning_rate": 1e-30, "train.weight_decay": 0.0, "train.steps": 2})
    result = trained(still, tmp_path / "run").finished()
    assert result is not None
    assert result["anchor_agreement"]["agree"] == result["anchor_agreement"]["anchors"] == result["heldout_anchors"]


def test_of_several_seeds_the_report_names_the_one_with_the_least_agreement(tmp_path: Path) -> None:
    data_file(tmp_path)
    runs = [write_run(tmp_path, arm, seed) for arm in ("baseline", "hidden") for seed in (0, 1)]
    for run, lost in zip(runs[:3], (0.1, 0.3, 0.2), strict=True):
        result = run.finished()
        assert result is not None
        found = {"agree": 50, "anchors": 60, "at_most_lost": lost, "confidence": 0.95, "tokens": 8}
        run.write_result({**result, "anchor_agreement": found})
    text = Page(report(runs, tmp_path)[1]).text
    assert "Plain fine-tuning, seed 1 (the least of 2 seeds): the student continues 50 of 60 held-out anchors" in text
    assert text.count("the student continues") == 2, "one for each arm, and a run of before has none"


def test_the_words_state_how_long_the_outputs_are() -> None:
    found = {"agree": 209, "anchors": 220, "confidence": 0.95, "tokens": 32}
    assert anchors_in_words({**found, "at_most_lost": rate_upper_bound(11, 220, 0.95)}) == (
        "the student continues 209 of 220 held-out anchors exactly as the teacher did, by up to 32 tokens: on prompts "
        "like these, outputs of at most 32 tokens lose at most 8.1 points of accuracy, at 95% confidence, whatever the "
        "right outputs are"
    )
    assert "up to 1 token:" in anchors_in_words({**found, "at_most_lost": 0.1, "tokens": 1})
