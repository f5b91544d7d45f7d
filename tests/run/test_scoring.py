"""Scores with known answers, which do not depend on the number of workers."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import ByteLevel
from torch import Tensor
from torch.nn.functional import log_softmax

from craft_ray.config import Columns, EvalSet, ModelConfig
from craft_ray.data.source import Source
from craft_ray.errors import ConfigError, DataError
from craft_ray.models import load_model
from craft_ray.models.base import IGNORE, Batch, Model
from craft_ray.run.scoring import EvalData, Score, evaluate, open_eval_set, ratio, source_identity
from craft_ray.workers import OneWorker
from tests.support.configs import data_config
from tests.support.configs import eval_set as make_set
from tests.support.experiments import Digits
from tests.support.workers import Share

TEXTS = ["Call me Ishmael.", "To be", "All happy families", "It was the best of times", "Once"]


@pytest.fixture(scope="module")
def text(text_model: Path) -> Model:
    return load_model(ModelConfig(path=str(text_model), max_length=64), "fp32")


@pytest.fixture(scope="module")
def reader(digits: Digits) -> Model:
    return load_model(ModelConfig(kind="vision_language", path=str(digits.model)), "fp32")


def questions(path: Path, rows: Sequence[dict[str, Any]], metric: str, **settings: Any) -> tuple[Source, EvalSet]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {name: name for name in Columns.model_fields if name in rows[0]}
    data = data_config(path=str(path), columns=Columns(**columns))
    eval_set = make_set(data=data, metric=metric, **settings)
    return open_eval_set(eval_set, "evaluation.old"), eval_set


def score(model: Model, asked: tuple[Source, EvalSet]) -> Score:
    return evaluate(EvalData(model, *asked), OneWorker())


def answers(model: Model, prompts: Sequence[str], most: int) -> list[str]:
    """The model's answers, by transformers' own forward passes."""
    found = []
    for prompt in prompts:
        ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]  # type: ignore[attr-defined]
        start = ids.shape[1]
        for _ in range(most):
            with torch.inference_mode():
                ids = torch.cat([ids, model.module(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        found.append(model.decode(ids[0, start:].tolist()))
    return found


def log_likelihood(model: Model, prompt: str, response: str) -> tuple[float, int]:
    """The log-likelihood of a response and its end token, one sequence at a time."""
    tokenizer = model.tokenizer  # type: ignore[attr-defined]
    prompt_ids = tokenizer(prompt)["input_ids"]
    suffix = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.inference_mode():
        logits = model.module(input_ids=torch.tensor([[*prompt_ids, *suffix]])).logits[0]
    chosen = log_softmax(logits, -1)[range(len(prompt_ids) - 1, len(prompt_ids) + len(suffix) - 1), suffix]
    return chosen.sum().item(), len(suffix)


# --- known answers ------------------------------------------------------------------------------------------------


def test_exact_match_counts_equal_answers(text: Model, tmp_path: Path) -> None:
    """The references are the model's own answers; every second one is made wrong, white space around it is not."""
    said = answers(text, TEXTS, 4)
    rows = [
        {"id": str(i), "prompt": prompt, "response": f" {answer.strip()}\n" if i % 2 else f"{answer} not"}
        for i, (prompt, answer) in enumerate(zip(TEXTS, said, strict=True))
    ]
    result = score(text, questions(tmp_path / "a.jsonl", rows, "exact_match", max_new_tokens=4, batch_size=2))
    assert result.metric == "exact_match"
    assert result.value == 2 / 5
    assert result.samples == 5
    assert [record["correct"] for record in result.records] == [False, True, False, True, False]
    assert [record["prediction"] for record in result.records] == [answer.strip() for answer in said]
    assert [record["id"] for record in result.records] == list("01234")


def test_choice_is_the_likeliest(text: Model, tmp_path: Path) -> None:
    options = [["a", "bc", "Z"], ["yes", "no"], ["x", "y", "z", "w"], ["1", "22"], [" ", "."]]
    rows, correct = [], []
    for i, (prompt, choices) in enumerate(zip(TEXTS, options, strict=True)):
        likelihoods = [log_likelihood(text, prompt, choice)[0] for choice in choices]
        best = max(range(len(choices)), key=likelihoods.__getitem__)
        response = choices[best] if i != 3 else choices[1 - best]
        rows.append({"prompt": prompt, "response": response, "choices": choices})
        correct.append(i != 3)
    result = score(text, questions(tmp_path / "a.jsonl", rows, "choice"))
    assert [record["correct"] for record in result.records] == correct
    assert result.value == 4 / 5
    assert len({record["prediction"] for record in result.records}) > 1


def test_a_model_whose_weights_are_broken_has_no_choice(text_model: Path, tmp_path: Path) -> None:
    """The first choice would be taken, and be right wherever the right one stands first."""
    model = load_model(ModelConfig(path=str(text_model)), "fp32")
    with torch.no_grad():
        model.module.get_output_embeddings().weight.fill_(math.nan)  # type: ignore[operator]
    rows = [{"prompt": "?", "choices": ["a", "b"], "answer_index": 0}]
    with pytest.raises(DataError, match="row 0: the likelihood of a choice is not a number: the model's weights are"):
        score(model, questions(tmp_path / "a.jsonl", rows, "choice"))


@pytest.mark.parametrize(("sample", "same"), [(None, True), (3, False)])
def test_a_row_is_the_same_whatever_the_limit_unless_rows_are_drawn(
    sample: int | None, same: bool, text: Model
) -> None:
    drawn = [data_config(format="lerobot", path="frames", sample=sample, limit=limit, columns=None) for limit in (5, 6)]
    assert (source_identity(drawn[0], text) == source_identity(drawn[1], text)) is same


def leaning(model: Model, token: str, by: float) -> Model:
    """The model changed to give `token` a logit of `by` and all others 0, whatever it reads."""
    head = model.module.get_output_embeddings()  # type: ignore[operator]
    (index,) = model.tokenizer(token, add_special_tokens=False)["input_ids"]  # type: ignore[attr-defined]
    with torch.no_grad():
        head.weight.zero_()
        head.bias = torch.nn.Parameter(by * torch.eye(len(head.weight))[index])
    return model


def test_the_margin_of_a_model_that_leans_to_one_choice(text_model: Path, tmp_path: Path) -> None:
    model = leaning(load_model(ModelConfig(path=str(text_model)), "fp32"), "a", 2.5)
    rows = [
        {"prompt": "?", "choices": ["a", "b"], "answer_index": 0},  # right by what it leans
        {"prompt": "Which?", "choices": ["a", "b", "c"], "answer_index": 1},  # wrong by as much
        {"prompt": "", "choices": ["b", "aa", "a"], "answer_index": 1},  # two tokens lean twice, and cost two
    ]
    result = score(model, questions(tmp_path / "a.jsonl", rows, "choice"))
    vocabulary = model.module.config.vocab_size  # type: ignore[union-attr]
    said = 2.5 - math.log(vocabulary - 1 + math.exp(2.5))  # log-probability of an "a"
    margins = [2.5, -2.5, said]
    assert [record["margin"] for record in result.records] == pytest.approx(margins, abs=1e-4)
    assert [record["prediction"] for record in result.records] == ["a", "a", "a"]
    assert result.value == pytest.approx(1 / 3)
    assert result.details == {"margin": pytest.approx(sum(margins) / 3, abs=1e-4)}


def test_margins_are_those_of_one_sequence_at_a_time(text: Model, tmp_path: Path) -> None:
    """Prompts and choices have many lengths, samples many numbers of choices; a pass has choices of several samples."""
    options = [["a", "bc", "Z"], ["yes", "no"], ["x", "yyyy", "z", "w"], ["1", "22 and more"], [" ", "."]]
    rows = [
        {"prompt": prompt, "choices": choices, "answer_index": i % len(choices)}
        for i, (prompt, choices) in enumerate(zip(TEXTS, options, strict=True))
    ]
    expected = []
    for row in rows:
        totals = {choice: log_likelihood(text, row["prompt"], choice)[0] for choice in row["choices"]}
        right = totals.pop(row["choices"][row["answer_index"]])
        expected.append(right - max(totals.values()))
    for size in (1, 3, 64):
        result = score(text, questions(tmp_path / "a.jsonl", rows, "choice", batch_size=size))
        assert [record["margin"] for record in result.records] == pytest.approx(expected, abs=1e-4)
        assert [record["correct"] for record in result.records] == [margin > 0 for margin in expected]
        assert result.details["margin"] == pytest.approx(sum(expected) / 5, abs=1e-4)


def test_choices_of_several_samples_fill_a_pass_and_no_more(
    reader: Model, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = Columns(id="id", image="image", prompt="prompt", response="response", choices="choices")
    data = data_config(path=str(digits.data / "old_val.parquet"), columns=columns, limit=7)
    passes, log_probs = [], reader.token_log_probs

    def counted(batch: Batch) -> tuple[Tensor, Tensor]:
        passes.append(batch.samples)
        return log_probs(batch)

    monkeypatch.setattr(reader, "token_log_probs", counted)
    results = []
    for size in (1, 4, 64):
        eval_set = make_set(data=data, metric="choice", batch_size=size)
        results.append(score(reader, (open_eval_set(eval_set, "evaluation.old"), eval_set)))
    assert passes == [1] * 70 + [4] * 10 + [4] * 7 + [2] + [64, 6]  # ten choices each, of 4 samples and of 3
    for result in results[1:]:
        assert [record["id"] for record in result.records] == [record["id"] for record in results[0].records]
        assert [record["margin"] for record in result.records] == pytest.approx(
            [record["margin"] for record in results[0].records], abs=1e-4
        )


def test_perplexity_of_one_sample_is_that_of_transformers(text: Model, tmp_path: Path) -> None:
    rows = [{"prompt": "Call me", "response": " Ishmael."}]
    tokenizer = text.tokenizer  # type: ignore[attr-defined]
    prompt = tokenizer("Call me")["input_ids"]
    ids = torch.tensor(
        [[*prompt, *tokenizer(" Ishmael.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    )
    labels = ids.clone()
    labels[:, : len(prompt)] = IGNORE
    with torch.inference_mode():
        loss = text.module(input_ids=ids, labels=labels).loss.item()
    result = score(text, questions(tmp_path / "a.jsonl", rows, "perplexity"))
    assert result.value == pytest.approx(math.exp(loss), rel=1e-5)
    [record] = result.records
    assert (record["id"], record["nll"], record["tokens"]) == ("00000000", pytest.approx(10 * loss, rel=1e-5), 10)


def test_perplexity_is_per_token_not_per_sample(text: Model, tmp_path: Path) -> None:
    rows = [
        {"prompt": prompt, "response": response}
        for prompt, response in zip(TEXTS, ["a", "bcd" * 9, "", "e", "f"], strict=True)
    ]
    parts = [log_likelihood(text, row["prompt"], row["response"]) for row in rows]
    expected = math.exp(-sum(total for total, _ in parts) / sum(count for _, count in parts))
    result = score(text, questions(tmp_path / "a.jsonl", rows, "perplexity", batch_size=3))
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert [record["tokens"] for record in result.records] == [2, 28, 1, 2, 2]


def test_token_accuracy_counts_the_tokens_that_the_model_would_have_chosen(text: Model, tmp_path: Path) -> None:
    """The model's own greedy answer, of which other letters replace the last ones: those before count, and what follows
    them is asked of transformers."""
    own = answers(text, TEXTS, 6)
    responses = [answer[: len(answer) - row] + "zq@#"[:row] for row, answer in enumerate(own)]
    hits = tokens = 0
    for prompt, response in zip(TEXTS, responses, strict=True):
        tokenizer = text.tokenizer  # type: ignore[attr-defined]
        start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + response)["input_ids"]
        ids = torch.tensor([*ids, tokenizer.eos_token_id])
        with torch.inference_mode():
            best = text.module(input_ids=ids[None]).logits[0].argmax(-1)
        hits += int((best[start - 1 : -1] == ids[start:]).sum())
        tokens += len(ids) - start
    rows = [{"prompt": prompt, "response": response} for prompt, response in zip(TEXTS, responses, strict=True)]
    result = score(text, questions(tmp_path / "a.jsonl", rows, "token_accuracy", batch_size=3))
    assert 0 < hits < tokens
    assert result.value == pytest.approx(hits / tokens)


@pytest.mark.parametrize("metric", ["perplexity", "token_accuracy"])
def test_replies_to_the_first_samples_are_recorded_and_change_no_score(
    metric: str, text: Model, tmp_path: Path
) -> None:
    rows = [{"prompt": prompt, "response": "ab"} for prompt in TEXTS]
    path = tmp_path / "a.jsonl"
    without = score(text, questions(path, rows, metric, batch_size=2))
    result = score(text, questions(path, rows, metric, batch_size=2, replies=3, max_new_tokens=4))
    assert result.value == without.value
    replies = [record.pop("prediction", None) for record in result.records]
    assert replies == [*(reply.strip() for reply in answers(text, TEXTS[:3], 4)), None, None]
    assert result.records == without.records


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(text_model: Path, tmp_path: Path) -> None:
    model = load_model(ModelConfig(path=str(text_model)), "fp32")
    with torch.no_grad():
        model.module.get_output_embeddings().weight.zero_()  # type: ignore[operator]
    rows = [{"prompt": "a", "response": "bcd"}, {"prompt": "", "response": "e"}]
    result = score(model, questions(tmp_path / "a.jsonl", rows, "perplexity"))
    assert result.value == pytest.approx(model.module.config.vocab_size, rel=1e-5)


def test_digits_read_from_images(reader: Model, digits: Digits) -> None:
    """The reader is untrained; its records show that answers are scored against the images' own labels."""
    columns = Columns(id="id", image="image", prompt="prompt", response="response", choices="choices")
    data = data_config(path=str(digits.data / "old_val.parquet"), columns=columns, limit=40)
    for metric in ("exact_match", "choice"):
        eval_set = make_set(data=data, metric=metric, max_new_tokens=2, batch_size=16)
        result = score(reader, (open_eval_set(eval_set, "evaluation.old"), eval_set))
        assert result.samples == 40
        assert result.value == sum(r["prediction"] == r["response"] for r in result.records) / 40
        assert len({record["response"] for record in result.records}) == 10
        assert result.records[0]["id"].startswith("old-")
    assert {record["prediction"] for record in result.records} <= set("0123456789")


def test_the_mode_of_the_model_is_restored(text: Model, tmp_path: Path) -> None:
    asked = questions(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}], "perplexity")
    for training in (True, False):
        text.module.train(training)
        score(text, asked)
        assert text.module.training is training
    text.module.train()


# --- workers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["exact_match", "perplexity"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_several_workers_give_the_score_of_one(metric: str, count: int, text_model: Path, tmp_path: Path) -> None:
    """Also if their shares differ in size, and if some have nothing to do."""
    models = [load_model(ModelConfig(path=str(text_model)), "fp32") for _ in range(count)]
    said = answers(models[0], TEXTS, 3)
    rows = [
        {"id": f"q{i}", "prompt": prompt, "response": answer if i in (0, 3) else "-"}
        for i, (prompt, answer) in enumerate(zip(TEXTS, said, strict=True))
    ]
    asked = questions(tmp_path / "a.jsonl", rows, metric, max_new_tokens=3, batch_size=2)
    expected = score(models[0], asked)
    table, barrier = [None] * count, threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        runs = [
            pool.submit(evaluate, EvalData(model, *asked), Share(rank, count, table, barrier))
            for rank, model in enumerate(models)
        ]
        results = [run.result(timeout=120) for run in runs]
    for result in results:
        assert result.value == pytest.approx(expected.value, rel=1e-6)
        assert [record["id"] for record in result.records] == [row["id"] for row in rows]
    assert len({result.value for result in results}) == 1
    if metric == "exact_match":
        assert results[0] == expected


@pytest.mark.parametrize("metric", ["exact_match", "choice", "perplexity", "token_accuracy"])
def test_the_size_of_a_batch_changes_no_score(metric: str, text: Model, tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "response": "ab", "choices": ["ab", "cd"]} for prompt in TEXTS]
    values = [
        score(text, questions(tmp_path / "a.jsonl", rows, metric, batch_size=size, max_new_tokens=3)).value
        for size in (1, 2, 64)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


# --- ratios and refusals --------------------------------------------------------------------------------------


def test_a_ratio_of_one_is_as_good_and_more_is_better() -> None:
    assert ratio("exact_match", 0.4, 0.8) == 0.5
    assert ratio("choice", 0.9, 0.6) == pytest.approx(1.5)
    assert ratio("perplexity", 8.0, 4.0) == 0.5  # twice as perplexed is half as good
    assert ratio("perplexity", 4.0, 8.0) == 2.0
    assert ratio("exact_match", 0.5, 0.0) is None
    assert ratio("choice", 0.0, 0.5) == 0


@pytest.mark.parametrize(
    ("metric", "columns", "said"),
    [
        ("exact_match", {}, "evaluation.new.metric is exact_match, but evaluation.new.data.columns.response"),
        (
            "choice",
            {"response": "response"},
            "evaluation.new.metric is choice, but evaluation.new.data.columns.choices",
        ),
        ("perplexity", {}, "evaluation.new.metric is perplexity, but evaluation.new.data.columns.response"),
    ],
)
def test_a_metric_needs_its_columns(metric: Any, columns: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    data = data_config(path=str(tmp_path / "a.jsonl"), columns=Columns(**columns))
    with pytest.raises(ConfigError, match=said):
        open_eval_set(make_set(data=data, metric=metric), "evaluation.new")


def test_a_response_that_is_not_a_choice(text: Model, tmp_path: Path) -> None:
    rows = [{"id": "q1", "prompt": "a", "response": "c", "choices": ["a", "b"]}]
    with pytest.raises(
        DataError, match=r"a\.jsonl, row 0 \(id q1\): its response 'c' is not one of its choices \['a', 'b'\]"
    ):
        score(text, questions(tmp_path / "a.jsonl", rows, "choice"))


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (["a"], r"row 0 \(id q1\) has only the choice 'a': add a wrong one"),
        (
            ["a", "b", "a"],
            r"row 0 \(id q1\): its response 'a' appears more than once among its choices \['a', 'b', 'a'\]",
        ),
    ],
)
def test_choices_among_which_nothing_is_decided(choices: list[str], said: str, text: Model, tmp_path: Path) -> None:
    rows = [{"id": "q1", "prompt": "?", "response": "a", "choices": choices}]
    with pytest.raises(DataError, match=said):
        score(text, questions(tmp_path / "a.jsonl", rows, "choice"))


def test_perplexity_of_nothing(text_model: Path, tmp_path: Path) -> None:
    """An empty response, or a single token with nothing before it."""
    model = load_model(ModelConfig(path=str(text_model), append_eos=False), "fp32")
    with pytest.raises(DataError, match=r"row 0 \(id q1\) has an empty response"):
        score(model, questions(tmp_path / "a.jsonl", [{"id": "q1", "prompt": "a", "response": ""}], "perplexity"))
    model.tokenizer.backend_tokenizer.post_processor = ByteLevel()  # type: ignore[attr-defined]  # no <bos>
    with pytest.raises(DataError, match="no token to predict"):
        score(model, questions(tmp_path / "a.jsonl", [{"prompt": "", "response": "x"}], "perplexity"))
