"""Every key can be set in a file and on the command line; a setting that is not valid is reported in one line."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from craft_ray.config import (
    AutoData,
    CsvData,
    Experiment,
    HuggingFaceData,
    JsonLinesData,
    LeRobotData,
    ParquetData,
    Section,
    TextData,
    dump_config,
    load_config,
    parse_config,
)
from craft_ray.errors import ConfigError
from tests.support.configs import eval_set

REPOSITORY = Path(__file__).parents[2]
MINIMAL = "model: {path: org/model}\ntask: {path: org/data}\ntrain: {steps: 4}\n"


@pytest.fixture
def minimal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    return caught.value.message


def get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


# --- every key ----------------------------------------------------------------------------------------------------

DATA = {"path": "org/other", "limit": 7}
TABLE = {
    **DATA, "columns.id": "key", "columns.image": "picture", "columns.prompt": "question",
    "columns.response": "answer", "columns.choices": "options", "split": "test",
}  # fmt: skip
CSV, PARQUET = {**TABLE, "format": "csv", "delimiter": ";"}, {**TABLE, "format": "parquet"}
DATASET = {**TABLE, "format": "dataset", "revision": "v2", "streaming": True, "shuffle_buffer": 9}
TEXT = {**TABLE, "format": "text", "chunk_chars": 99}
LEROBOT = {
    **DATA, "format": "lerobot", "revision": "v2", "episodes": [1, 2], "stride": 2, "sample": 5, "sample_seed": 7,
    "prompts": "/tmp/prompts.json",
    "rename": {"observation.a": "observation.b"},
}  # fmt: skip
INSTEAD = (
    "columns.answer_index", "columns.messages", "columns.tools", "columns.skill", "skills", "craft.epsilon_decay",
    "compare.learning_rates",
    "train.optimizer",
    "workers.sharding", "workers.shards", "train.pack", "train.checkpoint_async",
)  # fmt: skip
"""Keys that another key of this list replaces or excludes."""
REQUIRED = ("path", "format", "metric", "rollout.env", "rollout.task", "adapter.kind")
"""Keys without which a section is not valid, or is of another kind."""


def scored(data: dict[str, Any]) -> dict[str, Any]:
    return {
        **{f"data.{k}": v for k, v in data.items()},
        "metric": "token_accuracy",
        "batch_size": 3,
        "max_new_tokens": 5,
        "replies": 2,
    }


ROLLOUT = {
    "rollout.env": "aloha", "rollout.task": "AlohaInsertion-v0", "rollout.prompt": "Insert it.", "rollout.episodes": 3,
    "rollout.seed": 5, "rollout.max_steps": 9, "rollout.execute": 4, "rollout.action_repeat": 2,
    "rollout.rename": {"a": "b"}, "rollout.films": 1, "metric": "success", "batch_size": 3,
}  # fmt: skip
SECTIONS: dict[str, dict[str, Any]] = {
    "": {"name": "other", "variant": "other", "seed": 5, "output_dir": "/tmp/elsewhere"},
    "model": {
        "kind": "vision_language", "path": "org/other", "revision": "abc", "trust_remote_code": True,
        "dtype": "bfloat16", "max_length": 77, "chat_template": True, "append_eos": False, "disable_dropout": False,
        "gradient_checkpointing": True, "merge_statistics": ["org/data"], "attention": "eager", "compile": True,
        "image_processor": {"do_pan_and_scan": True},
    },
    "adapter": {
        "kind": "lora", "r": 4, "alpha": 32, "dropout": 0.125, "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"], "use_rslora": True, "use_dora": True, "init": "gaussian",
    },
    "task": DATASET,
    "anchors": {
        **{f"source.{k}": v for k, v in LEROBOT.items()}, "modes": ["token_ce"], "positions": ["every_3", "suffix"],
        "layers": [0, -1], "dtype": "float32", "max_new_tokens": 3, "suffix_from": "response", "batch_size": 5,
        "pack_tokens": 999, "rows_per_shard": 11, "actors": 2, "cpus_per_actor": 0.5, "gpus_per_actor": 0.25,
        "threads_per_actor": 2, "readers": 3, "logits.k": 5, "logits.temperature": 2.0, "logits.positions": ["suffix"],
    },
    "craft": {
        "enabled": False, "anchor_cache_dir": "/tmp/cache", "anchor_batch_size": 8, "anchor_holdout": 0.3,
        "retention_freq": 2, "retention_mode": "token_ce", "loss_type": "cosine", "positions": ["all"],
        "layers": [-1], "initial_lambda": 0.5, "lambda_lr": 0.25, "lambda_max": 9.0, "lambda_kp": 0.125,
        "lambda_floor": 0.2, "keep": 0.9, "keep_confidence": 0.7,
        "violation": "absolute", "violation_clip": None, "retention_ema": 0.5, "epsilon_schedule": "linear",
        "epsilon_start": 0.5, "epsilon_unit": "nats", "epsilon_end": 0.25, "epsilon_decay_steps": 3,
        "use_grad_projection": False, "log_angle": False, "retention_grad_dtype": "bfloat16",
        "conflict_measure": "dot", "conflict_threshold": 0.5,
        "projection_gate": "always", "projection_mode": "task_priority",
    },
    "train": {
        "steps": 9, "batch_size": 8, "accumulate": 2, "mask_loss_above": 2.5, "learning_rate": 0.5,
        "schedule": "linear", "warmup_steps": 2,
        "weight_decay": 0.0, "betas": [0.5, 0.75], "max_grad_norm": None, "precision": "bf16", "log_every": 3,
        "checkpoint_every": 4, "checkpoint_minutes": 2.5, "keep_checkpoints": 1, "prefetch": 5, "loader_workers": 2,
        "check_minutes": 1.5,
        "keep_best": {"maximize": "new/ratio", "minimize": None, "subject_to": {}, "confidence": 0.9}, "patience": 3,
    },
    "evaluation.old": scored(TEXT),
    "evaluation.new": ROLLOUT,
    "workers": {
        "num_workers": 2, "use_gpu": True, "cpus_per_worker": 0.5, "resources_per_worker": {"GPU": 0.5},
        "threads": 2, "max_failures": 0,
    },
    "validation": {"every": 4},
    "validation.old": scored(CSV),
    "validation.new": scored(PARQUET),
    "objective": {
        "maximize": None, "minimize": "train/loss", "subject_to": {"old/ratio": ">= 0.9"}, "confidence": 0.9,
    },
    "sweep": {
        "samples": 3, "sampler": "tpe", "seed": 4, "scheduler": "median", "grace": 2, "reduction_factor": 4,
        "repeat": 2, "parallel": 3, "max_failures": 0,
    },
    "tracking": {"mlflow": "http://tracking", "wandb": "offline", "trackio": "local", "project": "mine"},
    "about": {"old": "digits", "new": "digits upside down"},
    "compare": {
        "arms": ["hidden"], "seeds": [7], "parallel": 2, "validate_arms": True,
        "token_ce": {"epsilon_start": 0.5}, "variants": {"near": {"epsilon_start": 0.25}},
    },
}  # fmt: skip
EVERY = {f"{section}.{key}".lstrip("."): value for section, keys in SECTIONS.items() for key, value in keys.items()}


def test_every_key_can_be_overridden(minimal: Path) -> None:
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in EVERY.items()]
    config = load_config(minimal, overrides)
    for key, value in EVERY.items():
        found = get(config, key)
        found = found.model_dump() if isinstance(found, Section) else found
        assert (list(found) if isinstance(found, tuple) else found) == value, key


def test_the_list_of_keys_is_complete_and_changes_each(minimal: Path) -> None:
    """Guards the test above: each new key must be added to it, with a value that is not the default."""
    required = [f"{k}={v}" for k, v in EVERY.items() if k.endswith(REQUIRED)]
    config = load_config(minimal, [*required, "objective.maximize=new/score"])

    def leaves(section: Section, prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in type(section).model_fields:
            value = getattr(section, name)
            found |= leaves(value, f"{prefix}{name}.") if isinstance(value, Section) else {prefix + name: value}
        return found

    defaults = leaves(config)
    defaults = {key: value for key, value in defaults.items() if not key.endswith(INSTEAD)}
    assert defaults.keys() == EVERY.keys()
    same = [key for key, value in defaults.items() if value == EVERY[key] and not key.endswith(REQUIRED)]
    assert same == []


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.learning_rate=3.0E-5", "train.learning_rate", 3e-5),
        ("craft.enabled=off", "craft.enabled", False),
        ("craft.epsilon_end=null", "craft.epsilon_end", None),
        ("craft.layers=[-1]", "craft.layers", (-1,)),
        ("task.episodes=0-2", "task.episodes", (0, 1, 2)),
        ("task.episodes=[7, 1-2]", "task.episodes", (7, 1, 2)),
        ("workers.resources_per_worker.TPU=0.5", "workers.resources_per_worker", {"TPU": 0.5}),
        ("anchors={source: {path: a/b}, dtype: float32}", "anchors.dtype", "float32"),
        ("evaluation.old.data.path=a/b", "evaluation.old.data.path", "a/b"),
        ("evaluation.old={metric: success, rollout: {env: e, task: t}}", "evaluation.old.rollout.episodes", 20),
        ("task.path=a=b", "task.path", "a=b"),
        ("name=", "name", None),
    ],
)
def test_the_syntax_of_overrides(override: str, key: str, value: Any, minimal: Path) -> None:
    if value is None and key == "name":
        assert "name: " in refusal(minimal, override)
    else:
        assert get(load_config(minimal, [override]), key) == value


def test_the_last_override_wins(minimal: Path) -> None:
    assert load_config(minimal, ["seed=1", "seed=2"]).seed == 2
    assert load_config(minimal).seed == 0


# --- mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("craft.epsilon_start=0", "craft.epsilon_start"),
        ("craft.epsilon_start=.nan", "craft.epsilon_start"),
        ("craft.epsilon_start=.inf", "craft.epsilon_start"),
        ("craft.epsilon_decay_steps=-1", "craft.epsilon_decay_steps"),
        ("craft.epsilon_decay=1.5", "craft.epsilon_decay"),
        ("craft.retention_freq=0", "craft.retention_freq"),
        ("craft.initial_lambda=-1", "craft.initial_lambda"),
        ("craft.lambda_lr=-0.1", "craft.lambda_lr"),
        ("craft.lambda_max=0", "craft.lambda_max"),
        ("craft.lambda_kp=-1", "craft.lambda_kp"),
        ("craft.violation_clip=0", "craft.violation_clip"),
        ("craft.retention_ema=1", "craft.retention_ema"),
        ("craft.anchor_holdout=1", "craft.anchor_holdout"),
        ("craft.anchor_batch_size=0", "craft.anchor_batch_size"),
        ("craft.conflict_threshold=2", "craft.conflict_threshold"),
        ("craft.conflict_threshold=-1.1", "craft.conflict_threshold"),
        ("craft.retention_mode=Hidden", "craft.retention_mode"),
        ("craft.projection_mode=weigted", "craft.projection_mode"),
        ("craft.loss_type=huber", "craft.loss_type"),
        ("craft.epsilon_schedule=step", "craft.epsilon_schedule"),
        ("craft.conflict_threshold=.nan", "craft.conflict_threshold"),
        ("model.path=''", "model.path"),
        ("output_dir=' '", "output_dir"),
        ("craft.layers=[]", "craft.layers"),
        ("craft.layers=[-1, -1]", "craft.layers"),
        ("craft.positions=[every_0]", "craft.positions.0"),
        ("craft.positions=[every_N]", "craft.positions.0"),
        ("craft.positions=[middle]", "craft.positions.0"),
        ("anchors={source: {path: a}, rows_per_shard: 0}", "anchors.rows_per_shard"),
        ("anchors={source: {path: a}, dtype: bfloat16}", "anchors.dtype"),
        ("anchors={source: {path: a}, modes: []}", "anchors.modes"),
        ("anchors.dtype=float32", "anchors.source"),
        ("train.steps=0", "train.steps"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=", "train.steps"),
        ("train.batch_size=0", "train.batch_size"),
        ("train.learning_rate=0", "train.learning_rate"),
        ("train.learning_rate=fast", "train.learning_rate"),
        ("train.betas=[0.9, 1.0]", "train.betas.1"),
        ("train.betas=[0.9]", "train.betas.1"),
        ("train.weight_decay=-1", "train.weight_decay"),
        ("train.max_grad_norm=0", "train.max_grad_norm"),
        ("train.precision=fp16", "train.precision"),
        ("model.max_length=1", "model.max_length"),
        ("model.kind=vla", "model.kind"),
        ("model=5", "model"),
        ("task.limit=0", "task.limit"),
        ("task.format=xml", "task.format"),
        ("evaluation.old.metric=choice", "evaluation.old.data"),
        ("evaluation.old={data: {path: a}, metric: f1}", "evaluation.old.metric"),
        ("workers.num_workers=-1", "workers.num_workers"),
        ("workers.num_workers=two", "workers.num_workers"),
        ("workers.num_workers=1.5", "workers.num_workers"),
        ("workers.num_workers=[0, 2]", "workers.num_workers"),
        ("workers.num_workers=[2, 1]", "workers.num_workers"),
        ("workers.num_workers=[1, 2, 3]", "workers.num_workers"),
        ("workers.num_workers=[]", "workers.num_workers"),
        ("compare.seeds=[1, 1]", "compare.seeds"),
        ("compare.arms=[none]", "compare.arms"),
        ("compare.arms=[hidden, hidden]", "compare.arms"),
        ("compare.variants={Near: {}}", "compare.variants.Near"),
        ("compare.variants={hidden: {}}", "compare.variants.hidden"),
        ("compare.variants={near: 3}", "compare.variants.near"),
        (f"compare.variants={{{', '.join(f'v{number}: {{}}' for number in range(26))}}}", "compare.variants"),
        ("compare.variants={near: {epsilon_start: 0}}", "compare.variants.near"),
        ("variant=baseline", "variant"),
        ("seed=-1", "seed"),
        (f"seed={2**70}", "seed"),
        (f"sweep.seed={2**40}", "sweep.seed"),
        ("train.checkpoint_minutes=-1", "train.checkpoint_minutes"),
        ("name=12", "name"),
    ],
)
def test_a_value_that_is_not_valid(override: str, key: str, minimal: Path) -> None:
    message = refusal(minimal, override)
    assert message.startswith(f"{minimal}: {key}")
    assert message.removeprefix(f"{minimal}: {key}")[0] in ": "


@pytest.mark.parametrize(
    ("override", "place", "key"),
    [
        ("seed=true", "", "seed"),
        ("train.steps=true", "train: ", "steps"),
        ("train.learning_rate=false", "train: ", "learning_rate"),
        ("train.betas=[true, 0.9]", "train: ", "betas"),
        ("workers.num_workers=true", "workers: ", "num_workers"),
        ("craft.layers=[true]", "craft: ", "layers"),
        ("craft.keep=true", "craft: ", "keep"),
    ],
)
def test_a_truth_value_is_no_number(override: str, place: str, key: str, minimal: Path) -> None:
    value = "false" if "false" in override else "true"
    assert refusal(minimal, override) == f"{minimal}: {place}{key} is {value}, which is not a number: specify one"


def test_a_threshold_of_the_dot_product_has_any_size(minimal: Path) -> None:
    config = load_config(minimal, ["craft.conflict_measure=dot", "craft.conflict_threshold=-250"])
    assert config.craft.conflict_threshold == -250


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["craft.epsilon_start=0.25", "craft.epsilon_end=0.5"], "craft: epsilon_end 0.5 is above epsilon_start 0.25"),
        (["craft.epsilon_start=0.5", "craft.epsilon_end=0.25"], "craft: epsilon_schedule constant has one epsilon"),
        (["craft.initial_lambda=3", "craft.lambda_max=2"], "craft: initial_lambda 3.0 is above lambda_max 2.0"),
        (["train.batch_size=9", "workers.num_workers=2"], "train.batch_size 9 does not divide over 2 workers"),
        (
            ["train.batch_size=8", "train.accumulate=3"],
            "train.batch_size 8 does not divide over 1 workers times 3 micro-batches",
        ),
        (["craft.anchor_batch_size=9", "workers.num_workers=2"], "craft.anchor_batch_size 9 does not divide"),
        (
            ["train.batch_size=8", "workers.num_workers=[2, 4]"],
            "train.batch_size 8 does not divide over 3 workers (of 2 to 4) times 1 micro-batches",
        ),
        (["craft.anchor_batch_size=9", "workers.num_workers=[1, 2]"], "craft.anchor_batch_size 9 does not divide over"),
        (
            ["compare.variants={near: {epsilon_strat: 1}}"],
            "compare.variants.near: unknown key craft.epsilon_strat; did you mean craft.epsilon_start?",
        ),
        (["compare.token_ce={epsilon_strat: 1}"], "compare.token_ce: unknown key craft.epsilon_strat"),
        (["compare.token_ce={enabled: false}"], "compare.token_ce.enabled is what makes the arm"),
        (["compare.variants={near: {anchor_cache_dir: a}}"], "compare.variants.near.anchor_cache_dir cannot be"),
        (["compare.token_ce={retention_mode: hidden}"], "compare.token_ce.retention_mode is what makes the arm"),
        (
            ["compare.variants={near: {}}", "compare.arms=[far]"],
            "compare.arms: 'far' is no arm and no variant; there are baseline, token_ce, hidden, near",
        ),
        (
            ["craft.epsilon_decay=0.5", "craft.epsilon_decay_steps=3"],
            "craft: epsilon_decay 0.5 and epsilon_decay_steps 3 both say when epsilon_end is reached: leave one",
        ),
        (
            ["train.optimizer=policy"],
            "train.optimizer policy is for a LeRobot policy, which brings one, and model.kind is causal_lm",
        ),
        (
            ["train.optimizer=policy", "train.learning_rate=1e-3"],
            "train: learning_rate is 0.001, but optimizer policy takes it from the policy's own config: leave it out",
        ),
        (["train.warmup_steps=5"], "train.warmup_steps 5 is more than train.steps 4"),
        (["workers.resources_per_worker.GPU=0.5"], "workers: resources_per_worker takes 0.5 GPU, which use_gpu=false"),
        (
            ["workers.use_gpu=true", "workers.resources_per_worker.GPU=0"],
            "workers: resources_per_worker takes 0 GPU: specify a fraction of one, or a whole number",
        ),
        (
            ["workers.use_gpu=true", "workers.resources_per_worker.GPU=1.5"],
            "workers: resources_per_worker takes 1.5 GPU: specify a fraction of one, or a whole number",
        ),
        (
            ["workers.sharding=full"],
            "workers: sharding full shares a model between workers, and num_workers is 1: set it to 2",
        ),
        (
            ["workers.sharding=full", "workers.num_workers=0"],
            "workers: sharding full shares a model between workers, and num_workers is 0: set it to 2",
        ),
        (
            ["workers.sharding=hybrid", "workers.num_workers=[2, 4]", "workers.shards=2"],
            "workers: sharding hybrid makes groups of shards=2 workers out of num_workers=2 to 4",
        ),
        (["workers.shards=2"], "workers: shards 2 is for sharding hybrid, it is none"),
        (["train.checkpoint_async=true"], "train.checkpoint_async is true, but workers.sharding is none"),
        (
            ["workers.sharding=full", "workers.num_workers=2", "adapter={use_dora: true}"],
            "workers.sharding is full, but adapter.use_dora reads whole weights",
        ),
        (
            ["workers.sharding=full", "workers.num_workers=2", "train.optimizer=adamw_8bit"],
            "workers.sharding is full, but train.optimizer is adamw_8bit",
        ),
        (
            ["workers.sharding=full", "workers.num_workers=2", "model.compile=true"],
            "workers.sharding is full, but model.compile",
        ),
        (["model.kind=lerobot", "model.attention=eager"], "model.attention is eager, but model.kind is lerobot"),
        (
            ["model.kind=lerobot", "train.mask_loss_above=2.5"],
            "train.mask_loss_above is 2.5, but model.kind is lerobot",
        ),
        (
            ["model.attention=flash_attention_2"],
            "model.attention is flash_attention_2, which computes in bfloat16, but",
        ),
        (
            ["anchors.gpus_per_actor=1.5"],
            "anchors: gpus_per_actor is 1.5: specify a fraction of one GPU, or a whole number",
        ),
        (
            ["workers.sharding=full", "workers.num_workers=2", "model.kind=lerobot", "model.dtype=bfloat16"],
            "workers.sharding is full, but model.dtype is bfloat16, beside which a LeRobot policy",
        ),
    ],
)
def test_values_that_contradict_each_other(overrides: list[str], said: str, minimal: Path) -> None:
    assert refusal(minimal, *overrides).startswith(f"{minimal}: {said}")


def test_a_number_of_workers_is_a_range(minimal: Path) -> None:
    for override, least, most, count in (("0", 0, 0, "0"), ("3", 3, 3, "3"), ("[1, 2]", 1, 2, "1 to 2")):
        config = load_config(
            minimal, ["train.batch_size=12", "craft.anchor_batch_size=12", f"workers.num_workers={override}"]
        )
        workers = config.workers
        assert (workers.least, workers.most, workers.count, workers.elastic) == (least, most, count, least < most)
        assert parse_config(yaml.safe_load(dump_config(config)), "again") == config


def test_sharding_is_set_with_the_workers(minimal: Path) -> None:
    config = load_config(minimal, ["workers.num_workers=4", "workers.sharding=hybrid", "workers.shards=2"])
    assert (config.workers.sharding, config.workers.shards) == ("hybrid", 2)


def test_a_baseline_ignores_the_anchors(minimal: Path) -> None:
    overrides = ["craft.anchor_batch_size=9", "workers.num_workers=2", "craft.enabled=false"]
    assert load_config(minimal, overrides).arm == "baseline"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trian.steps=3", "unknown key trian; did you mean train?"),
        ("train.stepz=3", "unknown key train.stepz; did you mean train.steps?"),
        ("craft.lamda_lr=3", "unknown key craft.lamda_lr; did you mean craft.lambda_lr?"),
        ("task.columns.zzz=x", "unknown key task.columns.zzz"),
        ("task.columns.respons=x", "unknown key task.columns.respons; did you mean task.columns.response?"),
        (
            "anchors={source: {path: a, colums: {id: x}}}",
            "unknown key anchors.source.colums; did you mean anchors.source.columns?",
        ),
        (
            "evaluation.old={data: {path: a}, metrik: choice}",
            "unknown key evaluation.old.metrik; did you mean evaluation.old.metric?",
        ),
        ("task.episods=[1]", "unknown key task.episods; did you mean task.episodes?"),
        (
            "evaluation.old={metric: success, rollout: {env: e, task: t, episods: 3}}",
            "unknown key evaluation.old.rollout.episods; did you mean evaluation.old.rollout.episodes?",
        ),
        ("craft.zzzzzzz=1", "unknown key craft.zzzzzzz"),
        ("a..b=1", "unknown key a"),
    ],
)
def test_an_unknown_key_comes_with_a_guess(override: str, said: str, minimal: Path) -> None:
    assert refusal(minimal, override) == f"{minimal}: {said}"


# --- sections of several kinds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ("{path: org/data}", AutoData),
        ("{path: data/parts, columns: {prompt: question}, limit: 3}", AutoData),
        ("{path: 'data/*'}", AutoData),
        ("{path: rows.jsonl}", JsonLinesData),
        ("{path: 's3://bucket/rows.json'}", JsonLinesData),
        ("{path: 'data/*.parquet'}", ParquetData),
        ("{path: notes.md}", TextData),
        ("{path: org/data, format: parquet}", ParquetData),
        ("{path: rows.log, format: jsonl}", JsonLinesData),
        ("{path: rows.jsonl, format: text}", TextData),
        ("{path: org/data, split: test}", AutoData),
        ("{path: rows.csv, split: 'train[:9]'}", CsvData),
        ("{path: ROWS.TSV.gz}", CsvData),
        ("{path: rows.ndjson}", JsonLinesData),
        ("{path: rows, delimiter: ;}", CsvData),
        ("{path: org/data, revision: v2}", HuggingFaceData),
        ("{path: texts, chunk_chars: 64}", TextData),
        ("{path: org/robot, episodes: 0-3}", LeRobotData),
        ("{path: org/robot, stride: 2, revision: v3.0}", LeRobotData),
        ("{path: org/data, split: train, stride: 1, episodes: null}", AutoData),
    ],
)
def test_the_kind_of_a_source_follows_from_format_extension_or_keys(
    data: str, kind: type[Section], minimal: Path
) -> None:
    config = load_config(minimal, [f"task={data}"])
    assert type(config.task) is kind
    again = parse_config(yaml.safe_load(dump_config(config)), "again")
    assert again == config
    assert type(again.task) is kind


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "task={path: rows.jsonl, episodes: [1]}",
            "task.episodes belongs to a LeRobotDataset (format: lerobot), but task is read as JSON lines (format: "
            "jsonl): leave it out, or set task.format",
        ),
        ("task={path: a.parquet, revision: v2}", "task.revision belongs to a Hugging Face dataset (format: dataset)"),
        (
            "task={path: a.txt, rename: {a: b}}",
            "task.rename belongs to a LeRobotDataset (format: lerobot), but task is",
        ),
        ("task={path: org/robot, format: dataset, stride: 2}", "task.stride belongs to a LeRobotDataset"),
        (
            "task={path: org/robot, format: lerobot, columns: {prompt: question}}",
            "task.columns belongs to JSON lines (format: jsonl) or CSV files (format: csv) or",
        ),
        ("anchors.source={path: a.jsonl, chunk_chars: 3}", "anchors.source.chunk_chars belongs to plain text"),
        (
            "evaluation.old={data: {path: a.md, revision: v2}}",
            "evaluation.old.data.revision belongs to a Hugging Face dataset (format: dataset) or a LeRobotDataset",
        ),
        (
            "validation.new={metric: choice, data: {path: a}, rollout: {env: e, task: t}}",
            "validation.new.rollout belongs to episodes in a simulator (metric: success), but validation.new is read "
            "as held-out samples (metric: exact_match, choice, contains, rouge_l): leave it out, or set "
            "validation.new.metric",
        ),
        (
            "evaluation.new={metric: success, rollout: {env: e, task: t}, data: {path: a}}",
            "evaluation.new.data belongs to held-out samples (metric: exact_match, choice, contains, rouge_l) or "
            "held-out samples, scored by likelihood (metric: perplexity, token_accuracy) or",
        ),
        (
            "evaluation.new={metric: exact_match, data: {path: a}, replies: 3}",
            "evaluation.new.replies belongs to held-out samples, scored by likelihood (metric: perplexity, "
            "token_accuracy), but evaluation.new is read as held-out samples (metric: exact_match",
        ),
        (
            "evaluation.new={metric: success, rollout: {env: e, task: t}, max_new_tokens: 3}",
            "evaluation.new.max_new_tokens belongs to held-out samples",
        ),
        ("evaluation.new={metric: success}", "evaluation.new.rollout is missing"),
        ("task={path: a, format: lerobot, columns: {zzz: 1}}", "task.columns belongs to"),
    ],
)
def test_a_key_of_another_kind_is_refused(override: str, said: str, minimal: Path) -> None:
    assert refusal(minimal, override).startswith(f"{minimal}: {said}")


def test_a_kind_has_no_other_kinds_attributes(minimal: Path) -> None:
    rollout = "evaluation.new={metric: success, rollout: {env: e, task: t}}"
    config = load_config(minimal, ["task.path=rows.jsonl", "evaluation.old={data: {path: a}}", rollout])
    assert not hasattr(config.task, "episodes")
    assert not hasattr(config.evaluation.old, "rollout")
    assert not hasattr(config.evaluation.new, "data")


def test_another_path_makes_another_kind(minimal: Path) -> None:
    config = load_config(minimal, ["task.path=rows.jsonl"])
    assert type(config.changed({"task.path": "rows.parquet"}).task) is ParquetData
    assert type(config.changed({"task.path": "org/robot", "task.episodes": "0-3"}).task) is LeRobotData


def test_a_config_that_was_written_with_the_keys_of_all_kinds_still_loads(minimal: Path) -> None:
    """Run folders and plans from the time when a source was one section with all keys have such configs."""
    columns = {"id": None, "image": None, "prompt": "prompt", "response": None, "choices": None}
    every = {
        "format": "auto", "split": "train", "revision": None, "columns": columns, "limit": None, "episodes": None,
        "stride": 1, "rename": {}, "chunk_chars": 512,
    }  # fmt: skip
    rollout = {"env": "e", "task": "t"}
    samples = {"rollout": None, "metric": "choice", "batch_size": 64, "max_new_tokens": 16}
    tree = yaml.safe_load(MINIMAL) | {
        "task": {**every, "path": "rows.jsonl"},
        "anchors": {"source": {**every, "path": "org/robot", "format": "lerobot", "episodes": [0, 1], "stride": 10}},
        "validation": {
            "old": {**samples, "data": {**every, "path": "a.txt", "chunk_chars": 9}},
            "new": {**samples, "data": {**every, "path": "a.parquet", "columns": {**columns, "answer_index": None}}},
        },
        "evaluation": {
            "old": {**samples, "data": {**every, "path": "org/data", "split": "test"}},
            "new": {**samples, "data": None, "rollout": rollout, "metric": "success"},
        },
    }
    new = yaml.safe_load(MINIMAL) | {
        "task": {"path": "rows.jsonl"},
        "anchors": {"source": {"path": "org/robot", "format": "lerobot", "episodes": "0-1", "stride": 10}},
        "validation": {
            "old": {"metric": "choice", "data": {"path": "a.txt", "chunk_chars": 9}},
            "new": {"metric": "choice", "data": {"path": "a.parquet"}},
        },
        "evaluation": {
            "old": {"metric": "choice", "data": {"path": "org/data", "split": "test"}},
            "new": {"metric": "success", "rollout": rollout},
        },
    }
    config = parse_config(tree, "old")
    assert config == parse_config(new, "new")
    assert "episodes" not in config.task.model_dump()


def test_the_settings_that_identify_a_teachers_score_have_not_changed() -> None:
    """Scores in existing run folders are found by them."""
    data, rollout = {"path": "a.jsonl"}, {"env": "e", "task": "t"}
    assert eval_set(data=data, max_new_tokens=3).decisive == {"metric": "exact_match", "max_new_tokens": 3}
    assert eval_set(metric="success", rollout=rollout).decisive == {"metric": "success", "max_new_tokens": 16}


def test_two_mistakes_are_reported_at_once(minimal: Path) -> None:
    message = refusal(minimal, "train.steps=0", "craft.lamda_lr=3")
    assert "train.steps" in message
    assert "did you mean craft.lambda_lr?" in message


@pytest.mark.parametrize(
    ("written", "number"),
    [
        *[("0100", 100), ("007", 7), ("1_000", 1000)],
        *[(text, None) for text in ("2:30", "off", "no", "Yes", "2026-11-29", "0b11")],
    ],
)
def test_a_value_means_what_is_written(written: str, number: int | None, minimal: Path) -> None:
    """YAML 1.1 reads each of these as something else."""
    minimal.write_text(MINIMAL + f"evaluation: {{old: {{data: {{path: org/data, columns: {{id: {written}}}}}}}}}\n")
    config = load_config(minimal, [f"model.revision={written}"])
    assert config.model.revision == written
    assert config.evaluation.old.data.columns.id == written
    if number is None:
        assert f"'{written}'" in refusal(minimal, f"train.steps={written}")
    else:
        assert load_config(minimal, [f"train.steps={written}"]).train.steps == number
    saved = minimal.with_name("saved.yaml")
    saved.write_text(dump_config(config))
    assert load_config(saved) == config


@pytest.mark.parametrize(("written", "value"), [("off", False), ("no", False), ("on", True), ("true", True)])
def test_a_truth_value_is_read_from_its_words(written: str, value: bool, minimal: Path) -> None:
    assert load_config(minimal, [f"craft.enabled={written}"]).craft.enabled is value


@pytest.mark.parametrize("override", ["seed", "=3", "", "train.steps=[1"])
def test_text_that_is_not_an_override(override: str, minimal: Path) -> None:
    assert f"'{override}'" in refusal(minimal, override)


def test_a_value_has_no_keys(minimal: Path) -> None:
    assert refusal(minimal, "model.path.deeper=1") == "model.path.deeper: path is not a section"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds NoneType"),
        (b"- 1\n- 2\n", "holds list"),
        (b"just words", "holds str"),
        (b"model: {path: [\n", "is not valid YAML"),
        (b"a: b: c\n", "is not valid YAML"),
        (b"\xff\xfe\x00\x01", "is not valid YAML"),
        (b"seed: 1\n", "model is missing; task is missing; train is missing"),
        (b"model: {}\ntask: {path: a}\ntrain: {steps: 1}\n", "model.path is missing"),
    ],
)
def test_a_file_that_is_not_a_config(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message
    assert said in message


def test_a_file_that_does_not_open(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.yaml") == f"no config at {tmp_path / 'no.yaml'}: specify a YAML file"
    assert f"the config {tmp_path} does not open" in refusal(tmp_path)


def test_a_config_does_not_change(minimal: Path) -> None:
    config = load_config(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_changes_make_another_config(minimal: Path) -> None:
    config = load_config(minimal)
    changed = config.changed({"train.steps": 9, "anchors.source.path": "a/b"})
    assert (config.train.steps, changed.train.steps) == (4, 9)
    assert config.anchors is None
    assert changed.anchors is not None
    assert changed.anchors.source == AutoData(path="a/b")
    assert config.changed({}) == config
    with pytest.raises(ConfigError, match=r"did you mean train\.steps"):
        config.changed({"train.step": 9})


def test_what_follows_from_the_settings(minimal: Path) -> None:
    assert load_config(minimal).arm == "hidden"
    assert load_config(minimal, ["craft.retention_mode=token_ce", "craft.epsilon_start=0.1"]).arm == "token_ce"
    assert load_config(minimal, ["variant=near"]).arm == "near"
    assert load_config(minimal, ["variant=near", "craft.enabled=false"]).arm == "near"
    assert load_config(minimal).compare.chosen == ("baseline", "token_ce", "hidden")
    assert load_config(minimal, ["compare.variants={near: {}}"]).compare.chosen[-2:] == ("hidden", "near")
    assert load_config(minimal, ["craft.epsilon_start=0.5"]).craft.epsilon_final == 0.5
    tightening = ["craft.epsilon_schedule=cosine", "craft.epsilon_start=0.5", "craft.epsilon_end=0.25"]
    assert load_config(minimal, tightening).craft.epsilon_final == 0.25


# --- a budget and its unit --------------------------------------------------------------------------------------


def test_a_budget_is_in_the_unit_of_its_loss(minimal: Path) -> None:
    craft = load_config(minimal).craft
    assert (craft.epsilon_start, craft.epsilon_unit) == (0.05, "relative_mse")
    for override, unit in (("craft.retention_mode=token_ce", "nats"), ("craft.loss_type=cosine", "cosine")):
        message = refusal(minimal, override)
        assert message == (
            f"{minimal}: craft: epsilon_start is missing: this retention loss is counted in {unit} "
            f"({'nats a token' if unit == 'nats' else '1 - cosine'}), which has no default budget; specify one"
        )
        craft = load_config(minimal, [override, "craft.epsilon_start=0.3"]).craft
        assert (craft.epsilon_start, craft.epsilon_unit) == (0.3, unit)


def test_a_budget_does_not_outlive_its_unit(minimal: Path, tmp_path: Path) -> None:
    """Neither on the command line, nor from a saved config, nor in a trial."""
    with minimal.open("a") as file:
        file.write("craft: {epsilon_start: 0.02}\n")
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_config(load_config(minimal)))
    for path in (minimal, saved):
        message = refusal(path, "craft.retention_mode=token_ce")
        assert (
            "epsilon_start 0.02 is counted in relative_mse, but this retention loss in nats (nats a token)" in message
        )
        assert (
            load_config(path, ["craft.retention_mode=token_ce", "craft.epsilon_start=0.8"]).craft.epsilon_unit == "nats"
        )
    config = load_config(minimal)
    with pytest.raises(ConfigError, match="counted in relative_mse"):
        config.changed({"craft.loss_type": "mse"})
    assert config.changed({"craft.loss_type": "mse", "craft.epsilon_start": 2.0}).craft.epsilon_unit == "mse"
    assert config.changed({"craft.lambda_lr": 0.5}).craft.epsilon_start == 0.02


@pytest.mark.parametrize("key", ["craft.epsilon_end", "skills.far.epsilon_start"])
def test_no_other_budget_outlives_the_unit(key: str, minimal: Path) -> None:
    data = {"path": "org/data"}
    skills = {n: {"anchors": data, "evaluation": {"metric": "perplexity", "data": data}} for n in ("far", "near")}
    tightening = key == "craft.epsilon_end"
    own = {"craft.epsilon_schedule": "linear"} if tightening else {"skills": skills}
    config = load_config(minimal).changed({**own, key: 0.02})
    changes = {"craft.retention_mode": "token_ce", "craft.epsilon_start": 0.5}
    with pytest.raises(
        ConfigError, match=rf"{key} 0\.02 is counted in relative_mse, craft\.epsilon_start 0\.5 in nats"
    ):
        config.changed(changes)
    for budget in (0.4, None) if not tightening else (0.4,):
        assert config.changed({**changes, key: budget}).craft.epsilon_unit == "nats"
    assert config.changed({"craft.epsilon_start": 0.04}).craft.epsilon_unit == "relative_mse"


@pytest.mark.parametrize("key", ["craft.epsilon_end", "skills.far.epsilon_start"])
def test_no_other_budget_outlives_the_unit_where_there_is_no_main_one(key: str, minimal: Path) -> None:
    """The new unit has a default for `craft.epsilon_start`, not for what is written here."""
    craft, skills = "", ""
    if key == "craft.epsilon_end":
        craft = "craft: {epsilon_schedule: linear, epsilon_end: 0.02}\n"
    else:
        task = "{metric: perplexity, data: {path: org/data}}"
        skill = "{anchors: {path: org/data}, evaluation: " + task
        skills = f"skills: {{far: {skill}, epsilon_start: 0.02}}, near: {skill}}}}}\n"
    with minimal.open("a") as file:
        file.write(craft + skills)
    line = rf"{key} 0\.02 is counted in relative_mse, the retention loss in kl_nats: change it, too, or set {key}=null"
    with pytest.raises(ConfigError, match=line):
        load_config(minimal, ["craft.retention_mode=logits"])
    changed = load_config(minimal, ["craft.retention_mode=logits", f"{key}=0.01"])
    assert changed.craft.epsilon_unit == "kl_nats"
    with pytest.raises(ConfigError, match=rf"{key} 0\.02 is counted in relative_mse"):
        load_config(minimal).changed(
            {"craft.retention_mode": "logits", "craft.epsilon_unit": "kl_nats", "craft.epsilon_start": 0.1}
        )


def test_a_config_from_before_budgets_had_a_unit_loads(minimal: Path) -> None:
    config = load_config(minimal, ["craft.retention_mode=token_ce", "craft.epsilon_start=0.8"])
    tree = yaml.safe_load(dump_config(config))
    del tree["craft"]["epsilon_unit"]
    assert parse_config(tree, "old") == config


def test_earlier_names_of_positions_are_accepted_and_reported(minimal: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = [
        "anchors.source.path=org/data",
        "anchors.positions=[vision_token_mean, text_token_last, mean_masked, suffix]",
        "compare.variants={near: {positions: [vision_token_mean]}}",
    ]
    config = load_config(minimal, overrides)
    assert config.anchors is not None
    assert config.anchors.positions == ("vision_mean", "text_last", "masked_mean", "suffix")
    assert config.changed({"craft.positions": ["text_token_last"]}).craft.positions == ("text_last",)
    messages = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[0] for line in messages] == ["anchors.positions"] * 3 + ["compare.variants.near.positions"]
    assert "vision_token_mean is the earlier name of vision_mean" in messages[0]
    assert "each entry only once" in refusal(
        minimal, overrides[0], "anchors.positions=[vision_token_mean, vision_mean]"
    )


# --- files ----------------------------------------------------------------------------------------------------


def test_written_and_read_is_the_same(minimal: Path, tmp_path: Path) -> None:
    everything = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in EVERY.items()]
    odd = ["train.learning_rate=0.1", "craft.epsilon_start=1e-7", "name='1e3'", "task.revision='0012 ✓: #'"]
    for overrides in ([], everything, odd):
        config = load_config(minimal, overrides)
        (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
        again = load_config(tmp_path / "again.yaml")
        assert again == config
        assert dump_config(again) == dump_config(config)


def test_relative_paths_become_absolute(minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.txt").touch()
    overrides = [
        "model.path=here", "task.path=here/*.txt", "craft.anchor_cache_dir=later", "output_dir=../runs",
        "anchors.source.path=./not/yet.jsonl", "evaluation.old.data.path=~/x.jsonl",
        "evaluation.new.data.path=here/a.txt",
    ]  # fmt: skip
    config = load_config(minimal, overrides)
    assert config.model.path == str(tmp_path / "here")
    assert config.task.path == str(tmp_path / "here" / "*.txt")
    assert config.craft.anchor_cache_dir == str(tmp_path / "later")
    assert config.output_dir == str(tmp_path.parent / "runs")
    assert config.anchors is not None
    assert config.anchors.source.path == str(tmp_path / "not" / "yet.jsonl")
    assert config.evaluation.old is not None
    assert config.evaluation.old.data.path == os.path.expanduser("~/x.jsonl")
    assert config.evaluation.new is not None
    assert config.evaluation.new.data.path == str(tmp_path / "here" / "a.txt")

    with pytest.raises(ConfigError, match=r"task\.path: '~nobody-here/a\.jsonl' starts at the folder of a user"):
        load_config(minimal, ["task.path=~nobody-here/a.jsonl"])

    hub = load_config(minimal)
    assert (hub.model.path, hub.task.path) == ("org/model", "org/data")

    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert load_config(minimal, overrides, base=tmp_path) == config
    assert load_config(minimal, overrides) != config
    assert parse_config(config.model_dump(), "again") == config


def path_fields(section: Any, key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every text field of an experiment: its key (with all kinds of a section), its name and its type."""
    for name in section.model_fields:
        hint = typing.get_type_hints(section, include_extras=True)[name]
        for part in parts(hint):
            if isinstance(part, type) and issubclass(part, Section):
                yield from path_fields(part, f"{key}{name}.")
            elif part is str:
                yield f"{key}{name}", name, hint


def parts(hint: Any) -> Iterator[Any]:
    """The parts of a type. The annotations of an annotated type are skipped."""
    inner = typing.get_args(hint)
    if not inner:
        yield hint
    for part in inner[:1] if typing.get_origin(hint) is typing.Annotated else inner:
        yield from parts(part)


NO_PATHS = {
    "name", "variant", "revision", "id", "image", "messages", "tools", "prompt", "response", "choices", "answer_index",
    "split", "skill", "skills", "learning_rates", "rename", "delimiter", "positions", "resources_per_worker", "env",
    "task", "arms", "token_ce", "variants",
    "maximize", "minimize", "subject_to", "project", "modes", "retention_mode", "epsilon_unit", "target_modules",
    "modules_to_save", "pattern", "function", "tasks", "metric", "old", "new", "image_processor",
}  # fmt: skip
"""Text fields that are not paths. A new field is added here, or its type makes it absolute."""


def test_every_path_becomes_absolute_by_its_type(tmp_path: Path) -> None:
    found = {(key, name): hint for key, name, hint in path_fields(Experiment) if name not in NO_PATHS}
    assert len(found) > 8
    for (key, name), hint in found.items():
        given = "sqlite:///x" if name == "mlflow" else "./x"
        value: Any = (given,) if typing.get_origin(hint) is tuple else given
        checked = TypeAdapter(hint).validate_python(value, context={"base": tmp_path})
        assert str(tmp_path / "x") in str(checked), f"{key} stays relative: give it a type of craft_ray.config.paths"


def test_every_shipped_config_is_valid() -> None:
    shipped = sorted((REPOSITORY / "pipelines" / "configs").glob("**/*.yaml"))
    for path in shipped:
        config = load_config(path)
        assert isinstance(config, Experiment)
        assert parse_config(yaml.safe_load(dump_config(config)), "again") == config
