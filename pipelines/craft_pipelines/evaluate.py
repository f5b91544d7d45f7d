"""`craft-ray evaluate`: the teacher and its checkpoints on the same held-out data, side by side, in this process."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from craft_pipelines.console import Screen, screen
from craft_pipelines.outputs import check_kept
from craft_ray.config import Experiment, SampleEvalSet
from craft_ray.data.source import Source
from craft_ray.errors import ConfigError
from craft_ray.models import load_model
from craft_ray.models.adapter import CONFIG as ADAPTER
from craft_ray.models.base import Model
from craft_ray.models.features import FeatureCache
from craft_ray.pace import Pace
from craft_ray.report.wording import probability
from craft_ray.run.folder import RunFolder
from craft_ray.run.harness import HarnessTasks
from craft_ray.run.held_out import eval_sets, key_of, rows_of
from craft_ray.run.rows import check_rows
from craft_ray.run.scoring import GRADED, Episodes, EvalData, Score, open_eval_set, outcome
from craft_ray.run.scoring import evaluate as score
from craft_ray.run.sharded_checkpoint import SHARDS
from craft_ray.statistics import mcnemar
from craft_ray.storage.files import write_atomically
from craft_ray.storage.last import last_checkpoint, through_last
from craft_ray.storage.paths import ObjectPath, StoragePath
from craft_ray.workers import OneWorker

TEACHER = "teacher"


@dataclass(frozen=True)
class Scored:
    """A model and its scores by skill."""

    label: str
    path: str
    weights: str
    """Fingerprint of the weights."""
    scores: dict[str, Score]


def evaluate(
    config: Experiment, checkpoints: Sequence[StoragePath], out: StoragePath | None, say: Any = print
) -> list[Scored]:
    """Score `model.path` and each checkpoint on `evaluation.old` and `evaluation.new`, and print a table.

    Args:
        out: a JSON file for the scores; the records of the samples are written to a JSON lines file next to it.

    Raises:
        ConfigError: there is nothing to score on, or a checkpoint does not belong to this model.
        DataError: a row cannot be scored, which is known before the first is.
        ModelError: the weights of a checkpoint do not load completely.
    """
    if out is not None and out.suffix != ".json":
        raise ConfigError(f"--out is {out}: give a .json file; the samples are written to a .jsonl file next to it")
    if out is not None:
        check_kept(out.parent if out.is_file() else out, "--out")  # the same command may be given again
    folders = labelled([model_folder(path) for path in checkpoints])
    sources = {
        skill: open_eval_set(found, key_of(config, "evaluation", skill))
        for skill, found in eval_sets(config, "evaluation")
    }
    if not sources:
        raise ConfigError("the config names nothing to score on: add evaluation.old or evaluation.new")
    device = _device(config)
    torch.set_num_threads(config.workers.threads)
    features = FeatureCache()  # models share the processor, so one reuses what another has preprocessed
    vocabulary: int | None = None
    done = []
    for label, folder in {TEACHER: None, **folders}.items():
        path = config.model.path if folder is None else str(folder)
        say(f"scoring {label}: {path}")
        model = _load(config, folder, device)
        if config.model.kind != "lerobot":  # a policy is built from its config, so other sizes do not load
            vocabulary = vocabulary or vocabulary_size(model)
            _check_vocabulary(vocabulary_size(model), vocabulary, path, config)
        with screen() as shown:
            scores = _scores(config, model, sources, features, shown)
        done.append(Scored(label, path, model.weights_fingerprint(), scores))
        del model
        gc.collect()  # samples and model refer to each other, and the next model needs the memory
    for line in lines(done):
        say(line)
    if out is not None:
        _write(done, sources, out)
        say(f"scores: {out}, samples: {out.with_suffix('.jsonl')}")
    return done


def _load(config: Experiment, folder: StoragePath | None, device: torch.device) -> Model:
    """Load the config's model, or one with other weights. A policy is loaded with the normaliser that it was trained
    with, because it would act differently with another."""
    settings = config.model
    if folder is not None and settings.kind == "lerobot":
        settings, folder = settings.model_copy(update={"path": str(folder), "merge_statistics": ()}), None
    return load_model(settings, config.train.precision, device, None if folder is None else str(folder))


def model_folder(path: StoragePath) -> StoragePath:
    """The model folder for a run (its last checkpoint), a checkpoint, or a model folder.

    Raises:
        ConfigError: the path is none of them, or the run has no checkpoint.
    """
    path = through_last(path) if isinstance(path, ObjectPath) else path
    if not path.exists():
        raise ConfigError(f"--checkpoint {path} does not exist: give a run, one of its checkpoints, or a model folder")
    if _holds_model(path):
        return path.resolve()
    if _holds_model(path / "model"):
        return (path / "model").resolve()
    if (path / SHARDS).exists():
        raise _parts(path)
    if not (path / "config.yaml").exists():
        raise ConfigError(f"--checkpoint {path} is neither a run, nor a checkpoint of one, nor a model folder")
    last = last_checkpoint(RunFolder(path).checkpoints)
    if last is None:
        raise ConfigError(
            f"--checkpoint {path}: the run has no checkpoint (yet): train it with train.keep_checkpoints > 0"
        )
    if (last / SHARDS).exists() and not _holds_model(last / "model"):
        raise _parts(last)
    return last / "model"


def _parts(checkpoint: StoragePath) -> ConfigError:
    return ConfigError(
        f"--checkpoint {checkpoint} holds the parts of a sharded run that has not ended: put them together with "
        f"craft-ray merge {checkpoint} OUT, and score OUT"
    )


def _holds_model(path: StoragePath) -> bool:
    return (path / "config.json").exists() or (path / ADAPTER).exists()


def labelled(folders: Sequence[StoragePath]) -> dict[str, StoragePath]:
    """Models by a short name, RUN/STEP for a checkpoint; by their paths if short names are not unique.

    Raises:
        ConfigError: two are the same model.
    """
    if len(set(folders)) < len(folders):
        double = next(folder for folder in folders if folders.count(folder) > 1)
        raise ConfigError(f"--checkpoint names the model {double} twice: give each once")
    short = [_short(folder) for folder in folders]
    if len({TEACHER, *short}) < len(short) + 1:
        short = [str(folder) for folder in folders]
    return dict(zip(short, folders, strict=True))


def _short(folder: StoragePath) -> str:
    checkpoint = folder.parent
    if folder.name == "model" and checkpoint.parent.name == "checkpoints":
        return f"{checkpoint.parent.parent.name}/{checkpoint.name}"
    return folder.name


def _device(config: Experiment) -> torch.device:
    if config.workers.use_gpu and not torch.cuda.is_available():
        raise ConfigError("workers.use_gpu is set, but this machine has no GPU: set workers.use_gpu=false")
    return torch.device("cuda" if config.workers.use_gpu else "cpu")


def vocabulary_size(model: Model) -> int:
    """The vocabulary size of a Hugging Face model."""
    return int(cast("PreTrainedModel", model.module).config.get_text_config().vocab_size)


def _check_vocabulary(found: int, expected: int, path: str, config: Experiment) -> None:
    if found != expected:
        raise ConfigError(
            f"the model {path} has a vocabulary of {found} tokens, {config.model.path} one of {expected}, and the data "
            f"are read with the latter's tokenizer: score the former as model.path of a separate config"
        )


def _scores(
    config: Experiment,
    model: Model,
    sources: Mapping[str, Source | Episodes | HarnessTasks],
    features: FeatureCache,
    shown: Screen,
) -> dict[str, Score]:
    """The scores by skill, after every row of every set was prepared once.

    Raises:
        DataError: a row cannot be scored.
    """
    found, workers = {}, OneWorker(model.device)
    data = {
        skill: EvalData(model, sources[skill], eval_set, features)
        for skill, eval_set in eval_sets(config, "evaluation")
    }
    for skill, each in data.items():
        if isinstance(each.eval_set, SampleEvalSet):
            rows = rows_of(each, key_of(config, "evaluation", skill))
            check_rows(rows, config.train.check_minutes, workers, shown.line, shown.progress)
    for skill, each in data.items():
        torch.manual_seed(config.seed)  # the same for every model, where a policy draws its actions
        pace = Pace(f"scoring on {key_of(config, 'evaluation', skill)}", len(sources[skill]), shown.progress)
        found[skill] = score(each, workers, pace)
    return found


def lines(done: Sequence[Scored]) -> Iterator[str]:
    """The scores as a table with a row for each skill and a column for each model."""
    rows = [["", *(model.label for model in done)]]
    for skill, first in done[0].scores.items():
        rows.append([f"{skill} {first.metric}, n = {first.samples}", *(_cell(model.scores[skill]) for model in done)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for skill, (lost, won) in changes(done).items():
        changed = (
            f"{lost} from right to wrong, {won} from wrong to right (McNemar's P {probability(mcnemar(lost, won))})"
        )
        if done[0].scores[skill].metric in GRADED:
            changed = f"{lost} samples score lower, {won} higher"
        elif done[0].scores[skill].metric == "token_accuracy":
            chance = probability(mcnemar(lost, won))
            changed = f"{lost} samples with fewer right tokens, {won} with more (sign test's P {chance})"
        yield f"{skill}, {done[0].label} -> {done[1].label}: {changed}"


def _cell(found: Score) -> str:
    details = (f"{name} {value:{'+' if name == 'margin' else ''}.3f}" for name, value in found.details.items())
    return ", ".join([f"{found.value:.3f}", *details])


def changes(done: Sequence[Scored]) -> dict[str, tuple[int, int]]:
    """By skill: how many samples the first of two models got right and the second wrong, or scored higher, and the
    reverse; of token accuracy by each sample's number of right tokens. Empty unless there are two models; without
    skills whose texts have neither (perplexity)."""
    if len(done) != 2:
        return {}
    before, after = done
    found = {}
    for skill, first in before.scores.items():
        if first.metric == "perplexity":
            continue
        records = zip(first.records, after.scores[skill].records, strict=True)
        score = _hits if first.metric == "token_accuracy" else outcome
        gains = [score(two) - score(one) for one, two in records]
        found[skill] = (sum(gain < 0 for gain in gains), sum(gain > 0 for gain in gains))
    return found


def _hits(record: Mapping[str, Any]) -> float:
    return float(record["hits"])


def _write(done: Sequence[Scored], sources: Mapping[str, Source | Episodes | HarnessTasks], out: StoragePath) -> None:
    result: dict[str, Any] = {
        "models": [{"label": model.label, "path": model.path, "weights": model.weights} for model in done]
    }
    for skill, first in done[0].scores.items():
        scores = {model.label: {"score": model.scores[skill].value, **model.scores[skill].details} for model in done}
        result[skill] = {
            "metric": first.metric,
            "samples": first.samples,
            "data": sources[skill].fingerprint,
            "scores": scores,
        }
    for skill, (lost, won) in changes(done).items():
        if result[skill]["metric"] in GRADED:
            result[skill] |= {"lower": lost, "higher": won}
        elif result[skill]["metric"] == "token_accuracy":
            result[skill] |= {"lower": lost, "higher": won, "sign_test_p": mcnemar(lost, won)}
        else:
            result[skill] |= {"right_to_wrong": lost, "wrong_to_right": won, "mcnemar_p": mcnemar(lost, won)}
    records = [
        json.dumps({"model": model.label, "skill": skill, **record}, ensure_ascii=False)
        for model in done
        for skill, found in model.scores.items()
        for record in found.records
    ]
    write_atomically(out.with_suffix(".jsonl"), "".join(line + "\n" for line in records))
    write_atomically(out, json.dumps(result, indent=2, ensure_ascii=False))
