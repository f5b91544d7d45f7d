"""A simulated robot arm: a small pi0_fast policy, made from scratch and without a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from queue import Empty, Queue
from typing import Final

import numpy as np
import torch
from lerobot.configs import NormalizationMode, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.utils.feature_utils import dataset_to_policy_features
from numpy.typing import NDArray

from craft_ray.errors import DataError
from craft_ray.lerobot.demonstrations import write_demonstrations
from craft_ray.lerobot.size import PaliGemmaSize, building
from craft_ray.lerobot.tokenizers import (
    ACTION_TOKENIZER,
    RESERVED,
    TEXT_TOKENIZER,
    complete_processor_config,
    fast_tokenizer,
    text_tokenizer,
    without_remote_code,
    write_action_tokenizer,
    write_text_tokenizer,
)
from craft_ray.pace import Pace, Report, unreported
from craft_ray.quiet import without_prints

# -- what `craft-ray demo --preset robot` makes

OLD, NEW = "drawer-close-v3", "door-close-v3"
EPISODES: Final = 120
ACTION_REPEAT: Final = 6
"""The arm gets 13 actions per second."""
NOISE: Final = 0.15
STATE_RANGE_FACTOR: Final = 4.0
"""The prompt's 256 state numbers span this many times the state's range: as coarse as a small model's few words."""


def write_data(folder: Path, report: Report = unreported) -> None:
    """Demonstrations of both skills by Meta-World's scripted experts, as LeRobotDatasets `old` and `new`.

    Args:
        report: receives how many episodes are recorded.
    """
    context, skills = get_context("spawn"), (("old", OLD), ("new", NEW))
    pace = Pace("recording demonstrations", len(skills) * EPISODES, report)
    # One process each: they spend most of the time rendering pictures.
    with context.Manager() as manager, ProcessPoolExecutor(len(skills), mp_context=context) as pool:
        recorded, count = manager.Queue(), 0
        made = [pool.submit(_demonstrate, folder / name, task, recorded) for name, task in skills]
        while not all(one.done() for one in made):
            with suppress(Empty):
                recorded.get(timeout=1.0)
                count += 1
                pace.reached(count)
        for one in made:
            one.result()
    pace.end()


def _demonstrate(root: Path, task: str, recorded: Queue[None]) -> None:
    kept = partial(recorded.put, None)
    write_demonstrations(root, task, EPISODES, SIZE.image, action_repeat=ACTION_REPEAT, noise=NOISE, recorded=kept)


def build_model(folder: Path, data: Path, final: Path) -> None:
    """An untrained policy for the demonstrations in `data`.

    Args:
        final: the folder's final path.
    """
    datasets = [data / "old", data / "new"]
    ranges = _ranges([_opened(path) for path in datasets])
    low, high = (np.asarray(ranges[STATE][key]) for key in ("min", "max"))
    middle, half = (low + high) / 2, (high - low) / 2 * STATE_RANGE_FACTOR
    states = {"min": (middle - half).tolist(), "max": (middle + half).tolist()}
    build_policy(folder, SIZE, datasets, statistics={**ranges, STATE: states}, final=final)


# -- the policy

# About 1.6 million parameters, and 16 tokens for a picture.
SIZE: Final = PaliGemmaSize(
    width=128,
    depth=4,
    mlp=512,
    heads=4,
    kv_heads=1,
    head_dim=32,
    vision_width=96,
    vision_depth=2,
    vision_mlp=384,
    vision_heads=4,
    patch=16,
    image=64,
    vocabulary=1280,
)

CHUNK: Final = 6
ACTION_TOKENS: Final = 512
SCALE: Final = 2.0
"""Coarse: five tokens per chunk on average."""

Statistics = Mapping[str, Mapping[str, Sequence[float]]]
"""Feature (`observation.state`, `action`) -> `min` and `max`, a number for each dimension."""

STATE: Final = "observation.state"
ACTION: Final = "action"

# The prompt gives each dimension of the state as one of these numbers; -1 is below the range of the statistics.
STATE_BINS: Final = range(-1, 256)

# What later data may need beyond what is measured now.
HEADROOM: Final = 1.25


def build_policy(
    folder: Path,
    size: PaliGemmaSize,
    datasets: Sequence[Path],
    *,
    statistics: Statistics | None = None,
    chunk: int = CHUNK,
    action_tokens: int = ACTION_TOKENS,
    scale: float = SCALE,
    seed: int = 0,
    final: Path | None = None,
) -> None:
    """Save an untrained pi0_fast policy that fits LeRobotDatasets, with tokenizers fitted on them.

    Args:
        datasets: folders with the same features.
        statistics: what the normaliser scales by, permanently; by default the ranges over all data sets.
        chunk: number of actions that are predicted and executed at a time.
        final: as in `write_policy`.

    Raises:
        DataError: the data sets differ in their features.
        ConfigError: as `write_policy`.
    """
    opened = [_opened(path) for path in datasets]
    features = [dataset_to_policy_features(dataset.meta.features) for dataset in opened]
    for path, other in zip(datasets, features, strict=True):
        if other != features[0]:
            raise DataError(
                f"{datasets[0]} and {path} have different features or shapes ({', '.join(sorted(features[0]))}; "
                f"{', '.join(sorted(other))}), but a policy has one kind of input: record them alike"
            )
    write_policy(
        folder,
        size,
        features[0],
        np.concatenate([_chunks(dataset, chunk) for dataset in opened]),
        sorted({str(task) for dataset in opened for task in dataset.meta.tasks.index}),
        statistics or _ranges(opened),
        action_tokens=action_tokens,
        scale=scale,
        seed=seed,
        final=final,
    )


def write_policy(
    folder: Path,
    size: PaliGemmaSize,
    features: Mapping[str, PolicyFeature],
    chunks: NDArray[np.float32],
    tasks: Sequence[str],
    statistics: Statistics,
    *,
    action_tokens: int = ACTION_TOKENS,
    scale: float = SCALE,
    empty_cameras: int = 0,
    seed: int = 0,
    final: Path | None = None,
) -> None:
    """Save an untrained pi0_fast policy, its processors and its tokenizers in LeRobot's layout.

    The weights depend only on `seed` and the sizes, and the global random state does not change.

    Args:
        features: pictures, state and `action`.
        chunks: [N, T, D] actions in the robot's units; T becomes the policy's chunk.
        tasks: the robot's tasks, as its prompts state them.
        action_tokens: size of the action vocabulary.
        scale: FAST's scale; the larger, the finer the actions and the longer the suffix.
        empty_cameras: cameras that the policy has and the data does not.
        final: the folder's final path, if it is first written elsewhere; LeRobot needs the tokenizers' full paths.

    Raises:
        ConfigError: the vocabulary is too small for the words, or the action vocabulary for the chunks.
    """
    text, action = folder / TEXT_TOKENIZER, folder / ACTION_TOKENIZER
    low, high = (np.asarray(statistics[ACTION][key], dtype=np.float32) for key in ("min", "max"))
    assert (low < high).all(), "a dimension without a range cannot be scaled"
    normalised = 2 * (chunks - low) / (high - low) - 1
    write_action_tokenizer(action, normalised, action_tokens, scale)
    states = features[STATE].shape[0]
    write_text_tokenizer(text, _corpus(tasks, states), size.vocabulary, action_tokens)
    suffix = _suffix_length(text, action, normalised)
    config = PI0FastConfig(
        input_features={name: feature for name, feature in features.items() if name != ACTION},
        output_features={ACTION: features[ACTION]},
        normalization_mapping={
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MIN_MAX,
            "ACTION": NormalizationMode.MIN_MAX,
        },
        chunk_size=chunks.shape[1],
        n_action_steps=chunks.shape[1],  # LeRobot reads the actions back as a chunk of this length
        max_state_dim=states,
        max_action_dim=chunks.shape[2],
        max_action_tokens=suffix,
        max_decoding_steps=suffix,
        tokenizer_max_length=_prompt_length(text, tasks, states),
        fast_skip_tokens=RESERVED,
        image_resolution=(size.image, size.image),
        empty_cameras=empty_cameras,
        text_tokenizer_name=str(text),
        action_tokenizer_name=str(action),
        validate_action_token_prefix=False,  # an assertion that would end a rollout on one wrong token
        device="cpu",
        dtype="float32",
        push_to_hub=False,
    )
    scaled = {name: {key: torch.tensor(row) for key, row in rows.items()} for name, rows in statistics.items()}
    with without_prints(), torch.random.fork_rng(), building(size), without_remote_code(fast_tokenizer(str(action))):
        torch.manual_seed(seed)
        policy = PI0FastPolicy(config)
        for part in (policy, *make_pre_post_processors(config, dataset_stats=scaled)):
            part.save_pretrained(folder)
    size.save(folder)
    complete_processor_config(folder, final)


def _opened(path: Path) -> LeRobotDataset:
    # If no decoder is named, the search for one logs a page if torchcodec lacks FFmpeg; no picture is decoded here.
    return LeRobotDataset(path.name, root=path, video_backend="pyav")


def _chunks(dataset: LeRobotDataset, length: int) -> NDArray[np.float32]:
    """[N, T, D]: the actions from each frame on; after an episode's end its last one repeats, as LeRobot pads."""
    columns = dataset.hf_dataset.with_format("numpy")
    actions, episodes = np.stack(columns[ACTION]), np.asarray(columns["episode_index"])
    frames = np.arange(len(actions))
    ends = np.searchsorted(episodes, episodes, side="right") - 1
    return actions[np.minimum(frames[:, None] + np.arange(length), ends[:, None])].astype(np.float32)


def _ranges(datasets: Sequence[LeRobotDataset]) -> Statistics:
    """The union of the data sets' ranges. A dimension that never changes gets a range of 2 around its value."""
    ranges = {}
    for name in (STATE, ACTION):
        low = np.min([dataset.meta.stats[name]["min"] for dataset in datasets], axis=0)
        high = np.max([dataset.meta.stats[name]["max"] for dataset in datasets], axis=0)
        still = low == high
        ranges[name] = {"min": (low - still).tolist(), "max": (high + still).tolist()}
    return ranges


def _prompt(task: str, numbers: Sequence[int]) -> str:
    """The prompt that LeRobot makes from a task and a state."""
    return f"Task: {task.strip().replace('_', ' ')}, State: {' '.join(map(str, numbers))};\n"


def _corpus(tasks: Sequence[str], states: int) -> list[str]:
    """Prompts in which each number and each task occurs often enough to become one or a few tokens."""
    return [_prompt(task, [number] * states) for task in tasks for number in STATE_BINS]


def _prompt_length(folder: Path, tasks: Sequence[str], states: int) -> int:
    tokenizer = text_tokenizer(str(folder))
    prompts = [_prompt(task, [number] * states) for task in tasks for number in STATE_BINS]
    return _with_headroom(max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts))


def _suffix_length(text: Path, action: Path, chunks: NDArray[np.float32]) -> int:
    """Length of BOS, the words around the action tokens, and the action tokens."""
    words = text_tokenizer(str(text), add_eos_token=True, add_bos_token=False)(["Action: ", "|"])["input_ids"]
    return _with_headroom(1 + sum(map(len, words)) + max(map(len, fast_tokenizer(str(action))(chunks))))


def _with_headroom(length: int) -> int:
    """A multiple of 8, which suits the hardware."""
    return 8 * math.ceil(length * HEADROOM / 8)
