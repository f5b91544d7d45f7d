"""Anchor positions: which token positions of a sequence become the vectors that are compared.

Shapes: B samples, S tokens, L layers, D width, V vectors per sample (padded to the batch's maximum).

    vision_mean   one vector, the mean over image tokens
    text_last     the last text token of the prompt
    masked_mean   one vector, the mean over all tokens of the prompt
    first_token   the first token of the prompt;  last_token  its last, image or text
    all           every token of the prompt;      every_N     every N-th: tokens N-1, 2N-1, ...
    suffix        the positions at which the suffix tokens are predicted: the last prompt token, and every suffix
                  token but the last. They feed the vocabulary projection. For a policy that outputs tokens, these
                  are the action tokens

All but `suffix` are positions of the prompt, so a suffix after it does not change them (the prompt does not attend
to it). Positions are found on the host while batches are made; on the device, pooling is a gather and a weighted sum,
which do not synchronise with the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from craft_ray.errors import DataError


@dataclass(frozen=True)
class Layout:
    """What the tokens of one sequence are."""

    length: int
    prompt_length: int
    image_tokens: tuple[int, ...] = ()
    """Indices of the image tokens within the prompt."""
    absent: tuple[int, ...] = ()
    """Indices of prompt tokens that stand for nothing, such as those of a missing camera. No position selects them."""
    given: int = 0
    """Number of suffix tokens at its start that are given, not predicted."""
    learnt: tuple[int, ...] | None = None
    """Indices of the tokens that are predicted, if they are not all of the suffix: the assistant's turns in a
    conversation."""

    @property
    def prompt(self) -> list[int]:
        """Indices of the prompt's tokens."""
        absent = set(self.absent)
        return [t for t in range(self.prompt_length) if t not in absent]

    @property
    def predicted(self) -> Sequence[int]:
        """Indices of the tokens that are predicted, each from the position before it."""
        if self.learnt is not None:
            return self.learnt
        return range(max(self.prompt_length + self.given, 1), self.length)


@dataclass(frozen=True)
class Vectors:
    """Hidden states at anchor positions."""

    values_BLVD: Tensor
    valid_BV: Tensor
    """False where a sample has fewer vectors than the batch's maximum."""


def token_positions(layout: Layout, position: str) -> list[int]:
    """The tokens that a position selects: one vector each, or a single vector if it is a mean.

    Raises:
        DataError: the sequence has no such token.
    """
    prompt = layout.prompt
    if position == "vision_mean":
        tokens = list(layout.image_tokens)
    elif position == "text_last":
        image = set(layout.image_tokens)
        tokens = [t for t in prompt if t not in image][-1:]
    elif position in ("masked_mean", "all"):
        tokens = prompt
    elif position == "first_token":
        tokens = prompt[:1]
    elif position == "last_token":
        tokens = prompt[-1:]
    elif position == "suffix":
        tokens = [t - 1 for t in layout.predicted] if layout.prompt_length else []
    elif position.startswith("every_"):
        stride = int(position.removeprefix("every_"))
        tokens = prompt[stride - 1 :: stride] or prompt[-1:]
    else:
        raise ValueError(f"unknown anchor position '{position}'")
    if not tokens:
        raise DataError(
            f"anchor position '{position}' selects no token of a sequence with {layout.prompt_length} prompt tokens, "
            f"{len(layout.image_tokens)} image tokens and {layout.length - layout.prompt_length} suffix tokens: "
            f"choose another position, or anchors that have such tokens"
        )
    return tokens


def is_mean(position: str) -> bool:
    return position in ("vision_mean", "masked_mean")


def vector_count(layout: Layout, position: str) -> int:
    """Number of vectors that a position yields for one sequence."""
    return 1 if is_mean(position) else len(token_positions(layout, position))


@dataclass(frozen=True)
class Pooling:
    """A plan, made on the host, that turns hidden states into vectors by gathering tokens and by weighted sums.

    The vectors are in the order of positions, each padded to the batch's maximum.
    """

    index_BV: Tensor
    """Token of each vector; 0 where there is none."""
    valid_BV: Tensor
    mean_BMS: Tensor
    """Weights of the M vectors that are means."""
    mean_columns_M: Tensor
    """Which of the V vectors they are."""

    @classmethod
    def plan(
        cls, layouts: Sequence[Layout], positions: Sequence[str], width: int, gaps: Sequence[int] | None = None
    ) -> Pooling:
        """The plan for a right-padded batch of `width` tokens.

        Args:
            gaps: padding tokens between prompt and suffix, for each row.
        """
        gaps = gaps or [0] * len(layouts)
        index, valid, means, mean_columns = [], [], [], []
        column = 0
        for position in positions:
            tokens = [
                [t + gap * (t >= layout.prompt_length) for t in token_positions(layout, position)]
                for layout, gap in zip(layouts, gaps, strict=True)
            ]
            if is_mean(position):
                means.append(torch.stack([_mean_weights(chosen, width) for chosen in tokens]))
                mean_columns.append(column)
                tokens = [[0] for _ in tokens]  # a column for the mean
            index.append(_padded(tokens))
            valid.append(_padded([[1] * len(chosen) for chosen in tokens]).bool())
            column += index[-1].shape[1]
        return cls(
            index_BV=torch.cat(index, 1),
            valid_BV=torch.cat(valid, 1),
            mean_BMS=torch.stack(means, 1) if means else torch.empty(len(layouts), 0, width),
            mean_columns_M=torch.tensor(mean_columns, dtype=torch.long),
        )

    def __call__(self, hidden_BSD: Sequence[Tensor]) -> Vectors:
        """Pool the hidden states of each layer; layers become the second dimension."""
        layers = []
        for hidden in hidden_BSD:
            values = hidden.gather(1, self.index_BV[:, :, None].expand(-1, -1, hidden.shape[-1]))
            if self.mean_BMS.shape[1]:
                # A weight of zero does not remove a NaN, so the padding is masked first.
                unused_BS1 = ~self.mean_BMS.any(1)[..., None]
                means = torch.bmm(self.mean_BMS, hidden.float().masked_fill(unused_BS1, 0.0))
                values = values.index_copy(1, self.mean_columns_M, means.to(values.dtype))
            layers.append(values)
        return Vectors(torch.stack(layers, 1), self.valid_BV)

    def to(self, device: torch.device) -> Pooling:
        tensors = (self.index_BV, self.valid_BV, self.mean_BMS, self.mean_columns_M)
        return Pooling(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def _mean_weights(tokens: Sequence[int], width: int) -> Tensor:
    weights = torch.zeros(width)
    weights[list(tokens)] = 1.0 / len(tokens)
    return weights


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of different lengths as one matrix, padded with zeros on the right."""
    most = max(map(len, rows))
    return torch.tensor([[*row, *([0] * (most - len(row)))] for row in rows], dtype=torch.long)
