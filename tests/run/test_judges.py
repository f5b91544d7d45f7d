"""Answers are judged by what they contain, by number, by pattern, by words, or by the user's own function."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from craft_ray.config import EvalSet, ModelConfig
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, CraftError, DataError
from craft_ray.examples.text import byte_tokenizer
from craft_ray.models import load_model
from craft_ray.models.base import Model
from craft_ray.models.capabilities import TokenModel
from craft_ray.run.judges import judge_of
from craft_ray.run.scoring import EvalData, Score, evaluate, open_eval_set
from craft_ray.workers import OneWorker
from tests.support.configs import data_config
from tests.support.configs import eval_set as make_set
from tests.support.tokenizers import NORMALIZED, chat_model

DATA = {"path": "d.jsonl", "columns": {"response": "response"}}


def verdict(reply: str, response: str, **settings: Any) -> bool | float:
    judge = judge_of(make_set(data=DATA, **settings), "evaluation.old")
    assert judge is not None
    sample = Sample(id="q1", prompt="?", response=response)
    judge.check(response, sample)
    return judge(reply, response, sample)


@pytest.mark.parametrize(
    ("reply", "response", "right"),
    [
        ("It is the red one.", "red one", True),
        ("It is the red one.", " red one\n", True),
        ("It is the Red one.", "red one", False),
        ("", "red", False),
    ],
)
def test_contains(reply: str, response: str, right: bool) -> None:
    assert verdict(reply, response, metric="contains") is right


@pytest.mark.parametrize(
    ("reply", "response", "right"),
    [
        ("So 3 + 4 = 7.", "7", True),
        ("7", "We add: 3 + 4 = 7\n#### 7.0", True),
        ("It costs $1,234.50", "1234.5", True),
        ("12,34", "34", True),  # no thousands: two numbers
        ("-3", "3", False),
        ("x=−3", "-3", True),  # the minus of typography
        ("from 5-3", "3", True),  # a range, or a difference: the minus is between numbers
        ("1e3", "1000", True),
        (".5", "0.50", True),
        ("H2O", "2", False),  # part of a word
        ("none at all", "2", False),
        ("1e99999999999", "2", False),
        ("7e10293847561029384756", "2", False),
        ("9" * 5000, "9" * 5000, True),
        ("0.30000000000000004", "0.3", False),
    ],
)
def test_numeric_compares_the_last_numbers_exactly(reply: str, response: str, right: bool) -> None:
    assert verdict(reply, response, metric="numeric") is right


@pytest.mark.parametrize(("reply", "right"), [("1.1", True), ("0.9", True), ("1.1000001", False), ("1e400", False)])
def test_numeric_within_a_tolerance_that_is_decimal(reply: str, right: bool) -> None:
    assert verdict(reply, "1.0", metric="numeric", tolerance=0.1) is right


@pytest.mark.parametrize(
    ("pattern", "reply", "response", "right"),
    [
        (r"answer is (\w+)", "the answer is B, not: the answer is C", "B", True),
        (r"answer is (\w+)", "the answer is B", "C", False),
        (r"answer is (\w+)", "B", "B", False),
        (r"#### (-?\d+)", "#### 12", "6 + 6 = 12\n#### 12", True),  # the same is looked for in the response
        (r"^(?:yes|(no))", "yes", "yes", False),  # the group took no part
        (r"^\{.*\}$", '{"a": 1}', "whatever", True),
        (r"^\{.*\}$", "no", "no", False),
    ],
)
def test_regex(pattern: str, reply: str, response: str, right: bool) -> None:
    assert verdict(reply, response, metric="regex", pattern=pattern) is right


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    pytest.importorskip("rouge_score")
    found = verdict("the dog sat, on a mat", "The cat sat on the mat", metric="rouge_l")
    assert found == pytest.approx(4 / 6)  # the sat on mat, of six words each
    assert verdict("a b c d", "a d", metric="rouge_l") == pytest.approx(2 * (2 / 4 * 1) / (2 / 4 + 1))
    assert verdict("nothing", "else", metric="rouge_l") == 0


@pytest.mark.parametrize(
    ("settings", "response", "said"),
    [
        ({"metric": "contains"}, " ", "sample q1: its response is empty, and every reply contains that"),
        ({"metric": "numeric"}, "seven", "sample q1: its response 'seven' holds no number, which metric numeric"),
        (
            {"metric": "rouge_l"},
            "猫が座った",
            "its response '猫が座った' holds no word of the letters a to z",
        ),
    ],
)
def test_a_response_that_nothing_can_be_compared_with(settings: dict[str, Any], response: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        verdict("7", response, **settings)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(
        ConfigError, match=r"new.metric is rouge_l, but rouge_score does not import .*craft-ray\[rouge\]"
    ):
        judge_of(make_set(data=DATA, metric="rouge_l"), "evaluation.new")


# --- a function of the user's own ---------------------------------------------------------------------------------


def own(folder: Path, code: str, function: str = "score", module: str | None = None) -> EvalSet:
    name = module or f"own_{folder.name.replace('-', '_')}"
    (folder / f"{name}.py").write_text(code)
    return make_set(data=DATA, metric=f"{name}:{function}", folder=str(folder))


def test_a_function_gets_reply_and_response_and_if_it_takes_it_the_row(tmp_path: Path) -> None:
    sample = Sample(id="q1", prompt="?", response="ab", choices=("ab", "c"))
    judge = judge_of(own(tmp_path, "def score(reply, response):\n    return len(reply) / len(response)\n"), "old")
    assert judge is not None
    assert judge("a", "ab", sample) == 0.5
    row = "dict(id='q1', prompt='?', response='ab', choices=('ab', 'c'))"
    code = f"def full(reply, response, row):\n    return row == {row}\n"
    judge = judge_of(own(tmp_path, code, "full", "other_own_module"), "old")
    assert judge is not None
    assert judge("a", "ab", sample) == 1.0


def test_a_module_imports_what_stands_beside_it_and_the_path_stays_as_it_was(tmp_path: Path) -> None:
    before = list(sys.path)
    (tmp_path / "own_helper_beside.py").write_text("HALF = 0.5\n")
    code = "from own_helper_beside import HALF\n\n\ndef score(reply, response):\n    return HALF\n"
    judge = judge_of(own(tmp_path, code), "old")
    assert judge is not None
    assert judge("a", "b", Sample(id="q", prompt="", response="b")) == 0.5
    assert sys.path == before


@pytest.mark.parametrize(
    ("code", "function", "said"),
    [
        ("", "score", r"evaluation.old.function is own_\w+:score, but .*own_\w+.py has no such function"),
        ("score = 3", "score", r"holds 3 there, which is no function"),
        (
            "def score(reply): return 1",
            "score",
            r"score\(reply\) takes other arguments: it is called with \(reply, resp",
        ),
        (
            "import no_such_package",
            "score",
            r"the module does not import \(ModuleNotFoundError: .*no_such_package.*py:1\)",
        ),
        ("x = 1 / 0", "score", r"the module does not import \(ZeroDivisionError: division by zero at .*py:1\)"),
        ("def score(:", "score", r"the module does not import \(SyntaxError: invalid syntax"),
    ],
)
def test_a_function_that_is_none_is_one_line(code: str, function: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        judge_of(own(tmp_path, code, function), "evaluation.old")
    assert "\n" not in caught.value.message


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    found = make_set(data=DATA, metric="no_such_own_module:score", folder=str(tmp_path))
    with pytest.raises(ConfigError, match=f"there is no module no_such_own_module in {tmp_path}, and none"):
        judge_of(found, "evaluation.old")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("'good'", r"returned 'good' for sample q1: it must return a number from 0 to 1"),
        ("1.5", "returned 1.5 for sample q1"),
        ("float('nan')", "returned nan for sample q1"),
        ("None", "returned None for sample q1"),
        ("row", r"failed on sample q1 \(NameError: name 'row' is not defined at .*py:2\): correct it"),
    ],
)
def test_a_function_that_fails_is_one_line(returned: str, said: str, tmp_path: Path) -> None:
    judge = judge_of(own(tmp_path, f"def score(reply, response):\n    return {returned}\n"), "evaluation.old")
    assert judge is not None
    with pytest.raises(DataError, match=said) as caught:
        judge("a", "b", Sample(id="q1", prompt="?", response="b"))
    assert "\n" not in caught.value.message


def test_a_function_is_identified_by_its_code(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    codes = [
        "def score(reply, response): return 1",
        "def score(reply, response): return 1",
        "def score(a, b): return 0",
    ]
    found = []
    for folder, code in zip(folders, codes, strict=True):
        folder.mkdir()
        judge = judge_of(own(folder, code), "old")
        assert judge is not None
        found.append(judge.identity)
    assert found[0] == found[1] != found[2]


# --- on a model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(text_model: Path) -> Model:
    return load_model(ModelConfig(path=str(text_model), max_length=64), "fp32")


def scored(model: Model, path: Path, responses: list[str], **settings: Any) -> Score:
    path.write_text("".join(json.dumps({"prompt": f"Call {i}", "response": r}) + "\n" for i, r in enumerate(responses)))
    data = data_config(path=str(path), columns={"response": "response"})
    eval_set = make_set(data=data, max_new_tokens=4, batch_size=2, **settings)
    return evaluate(EvalData(model, open_eval_set(eval_set, "evaluation.old"), eval_set), OneWorker())


def test_every_metric_judges_the_same_replies(text: Model, tmp_path: Path) -> None:
    replies = [r["prediction"] for r in scored(text, tmp_path / "a.jsonl", ["7"] * 3, metric="exact_match").records]
    assert all(replies)
    code = "def score(reply, response):\n    return 0.25 if reply == response else 1\n"
    (tmp_path / "own_same_replies.py").write_text(code)
    settings: dict[str, Any] = {
        "contains": {"metric": "contains"},
        "regex": {"metric": "regex", "pattern": "(?s)(.*)"},
        "function": {"metric": "own_same_replies:score", "folder": str(tmp_path)},
    }
    for metric, own_settings in settings.items():
        result = scored(text, tmp_path / "a.jsonl", [replies[0], "not said", replies[2]], **own_settings)
        assert result.metric == metric
        assert [record["prediction"] for record in result.records] == replies
        assert result.value == pytest.approx(0.5 if metric == "function" else 2 / 3)
        kind = "score" if metric == "function" else "correct"
        assert [record[kind] for record in result.records] == (
            [0.25, 1, 0.25] if kind == "score" else [True, False, True]
        )


@pytest.mark.parametrize(("normalizer", "response"), NORMALIZED)
def test_the_responses_own_tokens_are_right_by_every_metric(
    normalizer: Any, response: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer may give back another text than that of the data, and the model can answer by no other."""
    pytest.importorskip("rouge_score")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    model = load_model(ModelConfig(path=str(chat_model(tmp_path / "m", tokenizer))), "fp32")
    assert isinstance(model, TokenModel)
    data = f"dict(id='00000000', prompt='Call 0', response={response!r}, choices=None)"
    code = f"def score(reply, response, row):\n    return reply == response and row == {data}\n"
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(code)
    own, other = (model.response_tokens(Sample("0", "", response=said)) for said in (response, "xyz"))
    for settings in (
        {"metric": "exact_match"},
        {"metric": "contains"},
        {"metric": "regex", "pattern": "(?s)(.+)"},
        {"metric": "rouge_l"},
        {"metric": f"{name}:score", "folder": str(tmp_path)},
    ):
        for answer, value in ((own, 1), (other, 0)):
            monkeypatch.setattr(model, "generate", lambda asked, _, answer=answer: [answer] * len(asked))
            found = scored(model, tmp_path / "a.jsonl", [response], **settings)
            assert found.value == value, settings
            assert found.records[0]["response"] == response.strip()


@pytest.mark.parametrize(
    ("settings", "response"),
    [({"metric": "numeric"}, "seven"), ({"metric": "contains"}, ""), ({"metric": "rouge_l"}, "猫")],
)
def test_the_check_of_all_rows_finds_what_cannot_be_compared(
    settings: dict[str, Any], response: str, text: Model, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": response}) + "\n")
    data = data_config(path=str(path), columns={"response": "response"})
    eval_set = make_set(data=data, **settings)
    with pytest.raises(CraftError, match=r"a.jsonl, row 0: its response"):
        EvalData(text, open_eval_set(eval_set, "evaluation.old"), eval_set).prepare(0)
