"""How long, how large and how fast: the numbers of a first config."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from craft_ray.init.data import DataFacts
from craft_ray.init.model import ModelFacts

EPOCHS = 3
LARGEST_BATCH = 16
FILLED = 0.8
"""Part of the memory that a plan may use."""
BYTES_FULL = 20
"""Bytes of a trained parameter: weight 4, two moments of AdamW 8, two gradients 8."""
LONGEST_GENERATED = 64
SHORT_ANSWER = 16
"""Tokens up to which an answer is compared as a whole."""
ROUNDED_TO = 8
SMALL = 20_000_000
"""Parameters below which a model takes a large learning rate, and one thread."""


@dataclass(frozen=True)
class Hardware:
    """What this machine computes with."""

    gpu: bool
    memory: int
    """Bytes of the GPU, or half of those of the machine."""
    cpus: int

    @classmethod
    def here(cls) -> Hardware:
        cpus = len(os.sched_getaffinity(0))
        if torch.cuda.is_available():
            return cls(True, torch.cuda.get_device_properties(0).total_memory, cpus)
        return cls(False, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, cpus)

    def in_words(self) -> str:
        return f"{self.memory / 2**30:.0f} GiB ({'the GPU' if self.gpu else 'half of what this machine has'})"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    max_length: int
    new_tokens: int
    """Longest suffix of an anchor, and longest answer that is generated."""
    batch: int
    accumulate: int
    checkpointing: bool
    steps: int
    memory: int
    """Bytes that a process will take, roughly."""


def choose(
    model: ModelFacts, task: DataFacts, others: Sequence[DataFacts], anchors: DataFacts, lora: bool, hardware: Hardware
) -> Sizes:
    """The sizes that fit the model, the data and the machine.

    Args:
        others: the data in addition to the task: anchors and held-out sets.
    """
    sets = [task, *others]
    new_tokens = min(max((each.response_tokens for each in sets), default=1), LONGEST_GENERATED)
    longest = max(each.prompt_tokens + max(each.response_tokens, new_tokens) for each in sets)
    unseen = any(each.counted < each.rows for each in sets)
    longest = ROUNDED_TO * math.ceil(longest * (1.5 if unseen else 1) / ROUNDED_TO)
    if model.longest is not None:
        longest = min(longest, model.longest)

    batch = _power_of_two(min(LARGEST_BATCH, task.rows, max(1, anchors.rows * 4 // 5)))
    weights = model.parameters * (2 if lora and hardware.gpu else 4 if lora else BYTES_FULL)
    sample = longest * model.token_bytes // (2 if hardware.gpu else 1)  # bf16 arithmetic on a GPU
    room = FILLED * hardware.memory - weights
    fitting = int(room // sample) if sample else batch
    checkpointing = fitting < 1
    micro = min(batch, _power_of_two(max(fitting, 1)))
    steps = max(20, min(2000, math.ceil(EPOCHS * task.rows / batch)))
    return Sizes(longest, new_tokens, batch, batch // micro, checkpointing, steps, weights + micro * sample)


def learning_rate(model: ModelFacts, lora: bool) -> float:
    """A careful rate: small models take and need a larger one."""
    if lora:
        return 2e-4
    return 1e-3 if model.parameters < SMALL else 5e-5 if model.parameters < 5e8 else 1e-5


def _power_of_two(number: int) -> int:
    """The largest that is not above the number."""
    return 1 << (max(number, 1).bit_length() - 1)
