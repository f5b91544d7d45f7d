"""What a model must offer to be trained under a retention budget.

A sample goes through `preprocess` (host, one sample, deterministic) and `collate` (host, a batch); the batch goes to
the device and yields a loss or hidden states. Teacher, student, task and anchors all use this one path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from craft_ray.data.sample import Sample
from craft_ray.method.pooling import Layout, Pooling

if TYPE_CHECKING:  # loading a model needs no pydantic
    from craft_ray.data.source import Source
    from craft_ray.models.adapter import Adapter
    from craft_ray.models.packing import PackLayout

IGNORE = -100
"""Target of a token that is not predicted."""


@dataclass(frozen=True)
class Features:
    """One preprocessed sample, on the host."""

    tokens: dict[str, Tensor]
    """Per token, each [S]: input_ids, attention_mask, and whatever else the model takes."""
    images: dict[str, Tensor]
    """Tensors of its images, which a batch concatenates along dimension 0."""
    layout: Layout

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for part in (self.tokens, self.images) for t in part.values())


@dataclass(frozen=True)
class Batch:
    """Right-padded samples as the model takes them. B samples, S tokens, P positions whose logits are needed."""

    inputs: dict[str, Tensor]
    keep_P: Tensor
    """Positions (of any row) whose next token is a target."""
    targets_BP: Tensor
    """The token after each such position; IGNORE where a row has no target there."""
    tokens: int
    """Total number of target tokens, known on the host."""
    samples: int
    pooling: Pooling | None = None
    pack: PackLayout | None = None
    """Where the samples are, if they are laid end to end in one row and are not rows of their own."""

    @property
    def count(self) -> int:
        """Number of terms that the mean task loss averages: tokens, or samples if the model predicts no tokens."""
        return self.tokens or self.samples

    def to(self, device: torch.device) -> Batch:
        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            inputs={name: move(t) for name, t in self.inputs.items()},
            keep_P=move(self.keep_P),
            targets_BP=move(self.targets_BP),
            pooling=None if self.pooling is None else self.pooling.to(device),
            pack=None if self.pack is None else replace(self.pack, cu_seqlens=move(self.pack.cu_seqlens)),
        )


class Model(ABC):
    """What every model offers: a policy, a vision-language model or a language model.

    What only some models can do is in `craft_ray/models/capabilities.py`, one type per capability.
    """

    module: nn.Module
    device: torch.device
    kind: ClassVar[str]
    hidden_size: int
    num_hidden_states: int
    """Number of hidden states: the embeddings and the output of every block."""
    sharded: bool = False
    """Whether each worker holds a part of the weights (craft_ray/models/sharding.py), so that all of them must make
    the same passes. `save` then gathers them, and rank 0 writes; but each worker has all of an adapter."""
    adapter: Adapter | None = None
    """What is trained in place of the model's own weights (craft_ray/models/adapting.py)."""
    merged_adapter: Path | None = None
    """The folder of an adapter that is part of the weights, because the config's path names it."""
    threaded: ClassVar[bool] = False
    """Whether samples are preprocessed faster by several threads, and may be: pictures decode and scale without the
    interpreter's lock."""
    default_positions: tuple[str, ...]
    """The anchor positions with the best measurements for this kind of model (docs/anchors.md)."""

    @property
    def trains_shards(self) -> bool:
        """Whether what is trained is sharded: a sharded model, unless it is the frozen base of an adapter."""
        return self.sharded and self.adapter is None

    @property
    @abstractmethod
    def description(self) -> str:
        """The model in messages: 'a model of kind causal_lm', 'a policy of type act'."""

    @abstractmethod
    def check_source(self, source: Source) -> None:
        """Refuse data that this model cannot read at all.

        Raises:
            ConfigError: a feature is missing or has another shape, or the data are for another kind of model.
        """

    @abstractmethod
    def preprocess(self, sample: Sample) -> Features:
        """The prompt of one sample as tensors.

        Raises:
            DataError: its image does not decode, or it is longer than `max_length`.
        """

    @abstractmethod
    def preprocess_task(self, sample: Sample) -> Features:
        """One sample as `task_loss` needs it: its prompt with its response or its actions.

        Raises:
            DataError: as in `preprocess`, or the sample has no response.
        """

    @abstractmethod
    def collate(self, features: Sequence[Features], positions: Sequence[str] | None = None) -> Batch:
        """A right-padded batch on the host; with `positions`, it has the plan that pools its hidden states."""

    @abstractmethod
    def task_loss(self, batch: Batch) -> Tensor:
        """What fine-tuning minimises: a float32 scalar, the mean over the batch's `count` terms."""

    @abstractmethod
    def hidden_states(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        """Hidden states [B, S, D] at each of `layers` (resolved, not negative), without the vocabulary projection."""

    @abstractmethod
    def check_anchors(self, modes: Sequence[str], positions: Sequence[str]) -> None:
        """Refuse anchors that this model does not provide, or that cannot constrain it.

        Args:
            modes: retention modes (config/modes.py).

        Raises:
            ConfigError: they need tokens and the model outputs none, or no trained parameter affects its hidden states.
        """

    @abstractmethod
    def weights_fingerprint(self) -> str:
        """Hash of the names, types, shapes and values of all weights, those of an adapter included."""

    @abstractmethod
    def preprocessor_fingerprint(self) -> str:
        """Hash of everything that decides how a sample becomes tensors."""

    def sample_fingerprint(self) -> str:
        """Hash of everything that decides whether a sample can be used: how it becomes tensors, and the limits that it
        is checked against, which need not be those of another model with the same tokenizer."""
        return self.preprocessor_fingerprint()

    @abstractmethod
    def save(self, folder: Path, final: Path | None = None) -> None:
        """Write a folder that `from_pretrained` loads; with an adapter, only PEFT's folder of the adapter.

        Args:
            final: the folder's final path, if it is first written elsewhere.
        """


def resolve_layers(layers: Sequence[int], num_hidden_states: int) -> tuple[int, ...]:
    """Layer indices with negative ones resolved; -1 is the last hidden state.

    Raises:
        ValueError: an index is out of range, or two refer to the same layer.
    """
    resolved = tuple(k + num_hidden_states if k < 0 else k for k in layers)
    for asked, index in zip(layers, resolved, strict=True):
        if not 0 <= index < num_hidden_states:
            raise ValueError(
                f"layer {asked} is out of range: the model has hidden states 0 (embeddings) to "
                f"{num_hidden_states - 1} (after the final norm)"
            )
    if len(set(resolved)) != len(resolved):
        raise ValueError(f"layers {list(layers)} name a hidden state twice")
    return resolved


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module in eval mode and run its layers uncompiled; afterwards every part is back in its previous mode,
    also after an exception."""
    training = {part: part.training for part in module.modules()}
    compiled = {part: call for part in training if (call := part._compiled_call_impl) is not None}
    for part in compiled:
        part._compiled_call_impl = None
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode
        for part, call in compiled.items():
            part._compiled_call_impl = call
