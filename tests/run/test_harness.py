"""Scores from the lm-evaluation-harness equal those of the harness itself, on local task files."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from craft_ray.config import HarnessEvalSet, ModelConfig
from craft_ray.errors import ConfigError, CraftError, DataError
from craft_ray.models import load_model
from craft_ray.models.base import Model
from craft_ray.run.harness import HarnessTasks
from craft_ray.run.harness_requests import asked_otherwise
from craft_ray.run.scoring import EvalData, Score, evaluate, open_eval_set
from craft_ray.workers import OneWorker
from tests.support.configs import eval_set as make_set
from tests.support.experiments import Digits
from tests.support.harness import CHOICE, CUPS, REPLY, SUMS, write_task, write_tasks
from tests.support.weights import spread
from tests.support.workers import Share

pytest.importorskip("lm_eval")

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def text(text_model: Path) -> Model:
    model = load_model(ModelConfig(path=str(text_model), max_length=256), "fp32")
    spread(model.module)
    return model


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "tasks"
    write_tasks(folder)
    return folder


def opened(folder: Path, names: Any, /, **settings: Any) -> tuple[HarnessTasks, HarnessEvalSet]:
    size = settings.pop("batch_size", 3)
    own = {"tasks": names, "include_path": str(folder), "folder": str(folder.parent), **settings}
    found = cast("HarnessEvalSet", make_set(metric="lm_eval", harness=own, batch_size=size))
    return cast("HarnessTasks", open_eval_set(found, "evaluation.old")), found


def score(model: Model, of: tuple[HarnessTasks, HarnessEvalSet]) -> Score:
    return evaluate(EvalData(model, *of), OneWorker())


@pytest.fixture(scope="module")
def theirs(text: Model, tasks: Path) -> dict[str, Any]:
    """What the harness itself finds, with its own adapter for transformers."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=text.module, tokenizer=text.tokenizer, batch_size=1)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tasks.parent)
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        return {
            shots: simple_evaluate(model, tasks=["cups", "sums"], task_manager=manager, num_fewshot=shots)
            for shots in (0, 2)
        }


@pytest.mark.parametrize("shots", [0, 2])
def test_scores_prompts_and_answers_are_those_of_the_harness(
    shots: int, theirs: dict[Any, Any], text: Model, tasks: Path
) -> None:
    expected = theirs[shots]
    result = score(text, opened(tasks, ["cups", "sums"], num_fewshot=shots))
    samples = [*expected["samples"]["cups"], *expected["samples"]["sums"]]
    assert [record["prompt"] for record in result.records] == [each["arguments"][0][0] for each in samples]
    assert [record["prediction"] for record in result.records[5:]] == [
        each["filtered_resps"][0].strip() for each in expected["samples"]["sums"]
    ]
    likeliest = [max(range(len(each["resps"])), key=lambda i: each["resps"][i][0][0]) for each in samples[:5]]  # noqa: B023
    assert [record["prediction"] for record in result.records[:5]] == [
        row["choices"][best] for row, best in zip(CUPS, likeliest, strict=True)
    ]
    means = {task: expected["results"][task][key] for task, key in (("cups", "acc,none"), ("sums", "exact_match,none"))}
    assert result.details == pytest.approx(means)
    assert result.value == pytest.approx((means["cups"] + means["sums"]) / 2)
    for metric in ("acc", "acc_norm"):
        own = score(text, opened(tasks, "cups", num_fewshot=shots, metric=metric))
        assert own.value == pytest.approx(expected["results"]["cups"][f"{metric},none"])
        assert [record["score"] for record in own.records] == [each[metric] for each in expected["samples"]["cups"]]
    assert 0 < means["cups"] < 1


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("start", ["", "{{ bos_token }}"])
def test_prompts_of_a_chat_model_are_those_of_the_harness(
    start: str, shots: int, text: Model, text_model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer puts a BOS in front of a text that does not begin with one, whatever the template writes."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = Path(shutil.copytree(text_model, tmp_path / "chat"))
    (folder / "chat_template.jinja").write_text(start + CHAT)
    model = load_model(ModelConfig(path=str(folder), chat_template=True, max_length=512), "fp32")
    model.module.load_state_dict(text.module.state_dict())
    encoded: list[list[int]] = []
    passed = HFLM._loglikelihood_tokens

    def kept(self: Any, requests: Any, **how: Any) -> Any:
        encoded.extend([*context, *continuation] for _, context, continuation in requests)
        return passed(self, requests, **how)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", kept)
    monkeypatch.chdir(tasks.parent)
    expected = simple_evaluate(
        HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=1),  # type: ignore[attr-defined]
        tasks=["cups", "sums"], task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        num_fewshot=shots, apply_chat_template=True, fewshot_as_multiturn=True,
    )  # fmt: skip
    own: list[list[int]] = []
    prepared = type(model).from_tokens

    def read(self: Any, prompt: Any, suffix: Any, where: str) -> Any:
        own.extend([[*prompt, *suffix]] if "cups" in where else [])
        return prepared(self, prompt, suffix, where)

    monkeypatch.setattr(type(model), "from_tokens", read)
    result = score(model, opened(tasks, ["cups", "sums"], num_fewshot=shots))
    assert sorted(own) == sorted(encoded)
    samples = [*expected["samples"]["cups"], *expected["samples"]["sums"]]
    assert [record["prompt"] for record in result.records] == [each["arguments"][0][0] for each in samples]
    assert [record["prediction"] for record in result.records[5:]] == [
        each["filtered_resps"][0].strip() for each in expected["samples"]["sums"]
    ]
    means = {task: expected["results"][task][key] for task, key in (("cups", "acc,none"), ("sums", "exact_match,none"))}
    assert result.details == pytest.approx(means)
    assert bool(asked_otherwise(model)) == (not start), "scores from before are others"


@pytest.mark.parametrize("size", [1, 4, 64])
def test_likelihoods_are_those_of_the_harness_whatever_shares_a_pass(
    size: int, theirs: dict[Any, Any], text: Model, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from craft_ray.run import harness

    found: list[tuple[float, bool]] = []
    ask = harness.log_likelihoods

    def kept(*asked: Any) -> list[tuple[float, bool]]:
        found.extend(ask(*asked))
        return found[-len(asked[1]) :]

    monkeypatch.setattr(harness, "log_likelihoods", kept)
    score(text, opened(tasks, "cups", batch_size=size))
    expected = [tuple(answer[0]) for each in theirs[0]["samples"]["cups"] for answer in each["resps"]]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_tag_stands_for_its_tasks_and_a_limit_for_each(text: Model, tasks: Path) -> None:
    result = score(text, opened(tasks, "kitchen", limit=2))
    assert [record["id"] for record in result.records] == ["cups/0", "cups/1", "sums/0", "sums/1"]
    assert result.records == [score(text, opened(tasks, ["cups", "sums"])).records[row] for row in (0, 1, 5, 6)]


def test_several_workers_give_the_score_of_one(text_model: Path, tasks: Path) -> None:
    """Solved examples are drawn in the order of the documents, whoever asks about them."""
    models = [load_model(ModelConfig(path=str(text_model), max_length=512), "fp32") for _ in range(3)]
    expected = score(models[0], opened(tasks, "kitchen", num_fewshot=1, batch_size=2))
    table, barrier = [None] * 3, threading.Barrier(3)
    data = [EvalData(model, *opened(tasks, "kitchen", num_fewshot=1, batch_size=2)) for model in models]
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(evaluate, each, Share(rank, 3, table, barrier)) for rank, each in enumerate(data)]
        results = [run.result(timeout=120) for run in runs]
    assert results == [expected] * 3


def test_workers_that_share_a_model_generate_from_equally_many_prompts(
    text_model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of both kinds are in a batch, so workers have different numbers of prompts in it."""
    models = [load_model(ModelConfig(path=str(text_model), max_length=512), "fp32") for _ in range(2)]
    expected = score(models[0], opened(tasks, ["cups", "sums"], batch_size=2))
    asked: dict[Model, list[int]] = {model: [] for model in models}
    for model in models:
        model.sharded = True
        generate = model.generate  # type: ignore[attr-defined]

        def counted(features: Any, longest: int, model: Model = model, generate: Any = generate) -> Any:
            asked[model].append(len(features))
            model.sharded = False  # here each worker has a whole model
            try:
                return generate(features, longest)
            finally:
                model.sharded = True

        monkeypatch.setattr(model, "generate", counted)
    table, barrier = [None] * 2, threading.Barrier(2)
    data = [EvalData(model, *opened(tasks, ["cups", "sums"], batch_size=2)) for model in models]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(evaluate, each, Share(rank, 2, table, barrier)) for rank, each in enumerate(data)]
        results = [run.result(timeout=120) for run in runs]
    assert asked[models[0]] == asked[models[1]] != []
    assert [result.value for result in results] == [expected.value] * 2


def test_the_fingerprint_tells_what_decides_a_score(text: Model, tasks: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path, names: Any = "kitchen", **settings: Any) -> str:
        found = opened(folder, names, **settings)
        return EvalData(text, *found).of.fingerprint

    first = fingerprint(tasks)
    copy = tmp_path / "tasks"
    write_tasks(copy)
    assert fingerprint(copy) == first  # wherever the files are
    write_task(copy, CHOICE, [*CUPS[:-1], {**CUPS[-1], "answer": 1 - CUPS[-1]["answer"]}])
    others = [fingerprint(copy), fingerprint(tasks, "cups"), fingerprint(tasks, num_fewshot=1)]
    others += [fingerprint(tasks, limit=3), fingerprint(tasks, "cups", metric="acc_norm")]
    assert len({first, *others}) == 6


@pytest.mark.parametrize(
    ("change", "names", "said"),
    [
        ({}, "cuts", r"harness\.tasks names 'cuts', which is no task of lm_eval .* has cups, kitchen, sums"),
        (
            {"metric": "f1"},
            "cups",
            r"metric is f1, but the task cups has the metrics acc, acc_norm with the filters none",
        ),
        ({"metric": "acc,strict"}, "cups", r"metric is acc,strict, but the task cups has"),
        ({"include_path": "nowhere"}, "cups", r"include_path is .*nowhere, and there is no such folder"),
        ({"folder": "nowhere"}, "cups", r"harness\.folder is .*nowhere, and there is no such folder"),
    ],
)
def test_what_there_is_not_is_one_line(
    change: dict[str, Any], names: str, said: str, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.tasks._index.TaskIndex._iter_yaml_files", _only_below(tasks))
    with pytest.raises(ConfigError, match=said) as caught:
        opened(tasks, names, **change)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["run[1]", "a*", "b?", "c::d"])
def test_a_folder_whose_name_is_a_pattern(name: str, tasks: Path, tmp_path: Path) -> None:
    """The data in `run[1]` would be those in `run1`."""
    (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / name)
    for folder in (name, "link"):
        with pytest.raises(ConfigError, match=r"harness\.folder is .*, and Hugging Face datasets takes .* rename"):
            opened(tasks, "cups", folder=str(tmp_path / folder))


def _only_below(folder: Path) -> Any:
    """Leave out the harness's own 14,000 files, which take half a minute to read."""
    return staticmethod(lambda root: sorted(folder.glob("*.yaml")) if Path(root) == folder else [])


@pytest.mark.parametrize(
    ("settings", "rows", "said"),
    [
        ({"doc_to_text": "{{qestion}}", "doc_to_target": "{{answer | int / 0}}"}, SUMS, r"'odd' does not load \("),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, SUMS, r"'odd' does not load \(.*gone.jsonl"),
        ({"output_type": "guess"}, SUMS, r"'odd' does not load \(.*guess"),
        (
            {"metric_list": [{"metric": "bleu", "aggregation": "bleu"}]},
            SUMS,
            r"bleu of the task odd is not a mean over",
        ),
        (
            {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]},
            SUMS,
            r"word_perplexity of the task odd is not a mean .* metric: perplexity",
        ),
        ({"unsafe_code": True}, SUMS, r"'odd' runs code that the model writes"),
        (
            {"generation_kwargs": {"do_sample": True, "temperature": 0.8}},
            SUMS,
            r"odd/0: the task draws its replies at random .* set do_sample: false",
        ),
        ({"generation_kwargs": {"num_beams": 4}}, SUMS, r"odd/0: the task sets num_beams"),
        ({}, [{"question": "long " * 60, "answer": "1"}], r"sample odd/0 has 3\d\d tokens, model.max_length is 256"),
    ],
)
def test_a_task_that_cannot_be_scored_is_one_line(
    settings: dict[str, Any], rows: list[dict[str, Any]], said: str, text: Model, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, REPLY | {"task": "odd"} | settings, rows)
    with pytest.raises(CraftError, match=said) as caught:
        score(text, opened(folder, "odd"))
    assert "\n" not in caught.value.message


def test_a_score_beyond_one_is_refused(text: Model, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "own.py").write_text("def score(doc, results):\n    return {'points': 40 + len(results)}\n")
    metric = {"metric": "points", "aggregation": "mean", "higher_is_better": True}
    write_task(folder, REPLY | {"task": "odd", "metric_list": [metric]}, SUMS)
    with (folder / "odd.yaml").open("a") as file:
        file.write("process_results: !function own.score\n")
    with pytest.raises(DataError, match="points gives 41 for odd/0, and only scores from 0 to 1"):
        score(text, opened(folder, "odd"))


def test_a_model_that_reads_pictures_is_refused(digits: Digits, tasks: Path) -> None:
    model = load_model(ModelConfig(kind="vision_language", path=str(digits.model)), "fp32")
    with pytest.raises(ConfigError, match="scores texts, and a model of kind vision_language is none"):
        EvalData(model, *opened(tasks, "cups"))


def test_a_missing_package_is_one_line(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"lm_eval does not import .*pip install 'craft-ray\[lm-eval\]'"):
        opened(tasks, "cups")
