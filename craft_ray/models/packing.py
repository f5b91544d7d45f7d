"""Packed forward passes of a decoder over texts of mixed lengths, without a single padding token.

Several sequences are laid end to end in one row [1, T]; their positions restart at 0 and attention is causal
within each sequence only. Everything but attention works token by token, so a pack costs what its real tokens
cost.

Shapes: N sequences in a pack, T tokens in total, L requested layers, H heads, Hkv key/value heads, D features.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craft_ray.quiet import uncollected

with uncollected():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

PACKED = "craft_packed"
"""Name of the attention implementation, as `set_attn_implementation` knows it."""

DEFAULT_BUDGET = 2048
"""Tokens per pack. Measured on CPU, relative to 4096: fp32 0.78, bf16 1.06 of the time. Not measured on a GPU."""

_CHANGES_THE_MATHEMATICS = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions (Gemma 2, GPT-OSS, T5) that a plain softmax would silently ignore."""

_VARLEN = varlen_attn is not None and {"scale", "window_size", "enable_gqa"} <= set(
    inspect.signature(varlen_attn).parameters
)


@dataclass(frozen=True)
class PackLayout:
    """Where the sequences of a pack start and end."""

    bounds: tuple[int, ...]
    """0, n_1, n_1 + n_2, ..., T on the host, so that no layer has to wait for the device."""
    cu_seqlens: Tensor
    """The same as int32 [N + 1] on the device."""
    max_length: int
    """Tokens of the longest sequence."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackLayout:
        bounds = tuple(accumulate(lengths, initial=0))
        return cls(bounds, torch.tensor(bounds, dtype=torch.int32, device=device), max(lengths))


def plan_packs(lengths: Sequence[int], budget: int = DEFAULT_BUDGET) -> list[list[int]]:
    """Indices of the sequences of each pack; every index exactly once, at most `budget` tokens per pack.

    The longest come first: a pack that does not fit in memory fails at once, not after an hour. A sequence
    longer than the budget is a pack of its own.
    """
    if budget < 1 or any(length < 1 for length in lengths):
        shortest = min(lengths, default=1)
        raise ValueError(
            "a pack needs a budget and sequences of at least one token, "
            f"got a budget of {budget} and a shortest sequence of {shortest}"
        )
    packs: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not packs or lengths[index] > room:
            packs.append([])
            room = budget
        packs[-1].append(index)
        room -= lengths[index]
    return packs


def packed_forward(
    base_model: PreTrainedModel, sequences: Sequence[Tensor], layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Hidden states of every token of a pack, each sequence as if it had been alone.

    `base_model` is the decoder without its vocabulary projection (`model.base_model`), in eval mode.
    `sequences` are N 1-D tensors of token ids. `layers` index transformers' `hidden_states`: 0 is the
    embeddings, -1 is after the final norm.

    Returns hidden_LTD in the dtype of the model and cu_seqlens, int32 [N + 1]: sequence i owns the tokens
    cu_seqlens[i]:cu_seqlens[i + 1]. Both are inference tensors on the model's device.
    """
    _refuse_unpackable(base_model)
    states = base_model.config.num_hidden_layers + 1
    if not layers or not all(-states <= layer < states for layer in layers):
        raise ValueError(
            f"{type(base_model).__name__} has hidden states {-states} to {states - 1}, "
            f"but {list(layers)} were requested"
        )

    with torch.inference_mode(), packed_attention(base_model):
        inputs, layout = pack([sequence.to(base_model.device) for sequence in sequences])
        # Given a list, transformers 5.23 keeps the states of those layers only; older ones keep them all.
        output = base_model(**inputs, craft_pack=layout, use_cache=False, output_hidden_states=list(layers))
        hidden_LTD = torch.stack([output.hidden_states[layer][0] for layer in layers])
    return hidden_LTD, layout.cu_seqlens


def packed_logits(
    model: PreTrainedModel, sequences: Sequence[Tensor], keep_N: Tensor, through_keep: bool = True
) -> Tensor:
    """Logits [N, V] at N tokens of a pack, counted from its start, through the model's own head.

    Args:
        model: the whole model, in eval mode.
        through_keep: whether its forward takes `logits_to_keep`; without it, all logits are computed.
    """
    base_model = cast(PreTrainedModel, model.base_model)
    _refuse_unpackable(base_model)
    with torch.inference_mode(), packed_attention(base_model):
        inputs, layout = pack([sequence.to(base_model.device) for sequence in sequences])
        keep_N = keep_N.to(base_model.device)
        if through_keep:
            logits_NV: Tensor = model(**inputs, craft_pack=layout, use_cache=False, logits_to_keep=keep_N).logits[0]
        else:
            logits_NV = model(**inputs, craft_pack=layout, use_cache=False).logits[0, keep_N]
    return logits_NV


def pack(sequences: Sequence[Tensor]) -> tuple[dict[str, Tensor], PackLayout]:
    """The sequences end to end as a model takes them, and where each is; on the sequences' device."""
    lengths = [sequence.numel() for sequence in sequences]
    if not lengths or not all(lengths) or any(sequence.ndim != 1 for sequence in sequences):
        shapes = [tuple(sequence.shape) for sequence in sequences]
        raise ValueError(f"a pack is made of 1-D sequences with at least one token, got shapes {shapes}")
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    device = sequences[0].device
    inputs = {"input_ids": torch.cat(list(sequences))[None], "position_ids": positions_T[None].to(device)}
    return inputs, PackLayout.of(lengths, device)


def check_packing(base_model: PreTrainedModel, tolerance: float = 1e-2) -> None:
    """Raise ValueError if a pack does not give what its sequences give alone; call it once for every teacher.

    We can confine attention, but not other ways to mix tokens (convolutions, recurrent layers). So the first of two
    sequences is replaced, which must not change the second; and the second must equal the same sequence alone.

    `tolerance` bounds the norm of a difference relative to the norm of the states; bfloat16 arithmetic needs more.
    """
    name = type(base_model).__name__
    vocabulary = base_model.config.vocab_size
    second = torch.arange(7) % vocabulary
    before, after = (
        packed_forward(base_model, [first % vocabulary, second], [-1])[0][0, 5:].float()
        for first in (torch.arange(5), torch.arange(5) + vocabulary // 2)
    )
    # Same shapes, same inputs: exact, except for experts, whose batches depend on the routing of all tokens.
    if not (before - after).norm() <= 1e-2 * before.norm():
        raise ValueError(f"{name} cannot be packed: a sequence changes with its neighbour")
    with torch.inference_mode():
        output = base_model(second[None].to(base_model.device), use_cache=False, output_hidden_states=True)
    if len({state.shape[-1] for state in output.hidden_states}) > 1:
        raise ValueError(f"{name} cannot be packed: its hidden states have different widths")
    alone = output.hidden_states[-1][0].float()
    if not (before - alone).norm() <= tolerance * alone.norm():
        raise ValueError(f"{name} cannot be packed: a sequence differs from the same sequence alone")


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, `model` uses the attention `craft_packed`; afterwards, exactly what it used before.

    The switch is in the model's config, so no other thread may use the model meanwhile.
    """
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        model.set_attn_implementation(PACKED)
        # transformers only logs a warning if a model's attention is hard-wired.
        if model.config._attn_implementation != PACKED:
            raise ValueError(
                f"{type(model).__name__} does not use transformers' AttentionInterface, "
                "so its sequences cannot be packed"
            )
        yield
    finally:
        for config, implementation in before:
            # The public setter would also overwrite sub-configs, which are restored one by one here.
            config._attn_implementation_internal = implementation


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    craft_pack: PackLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T) v within each sequence.

    query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, D]. The signature is that of transformers'
    attention functions. With `sliding_window` w a token sees itself and the w - 1 before it.
    """
    name = type(module).__name__
    if craft_pack is None:
        raise ValueError(
            f"{name} got no layout of the pack: its model does not pass keyword arguments on to attention, "
            "or was called directly instead of through packed_forward"
        )
    tokens = craft_pack.bounds[-1]
    if (query.shape[0], query.shape[2], key.shape[2]) != (1, tokens, tokens):
        raise ValueError(
            f"{name} attends from {tuple(query.shape)} to {tuple(key.shape)}, "
            f"but the pack is one row of {tokens} tokens"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{name} attends in both directions; only causal attention can be packed")
    if attention_mask is not None:
        raise ValueError(f"{name} got an attention mask of its own; a pack has none")
    if dropout:
        raise ValueError(f"{name} applies attention dropout (p = {dropout}), which packed attention does not")
    if refused := [what for what in _CHANGES_THE_MATHEMATICS if others.get(what) is not None]:
        raise ValueError(f"{name} needs {', '.join(refused)}, which packed attention does not compute")

    window = sliding_window if sliding_window is not None and sliding_window < craft_pack.max_length else None
    if _varlen_applies(query, value):
        return _attend_varlen(query, key, value, scaling, window, craft_pack), None
    return _attend_one_by_one(query, key, value, scaling, window, craft_pack), None


# No mask function is registered for this name: transformers then builds no mask at all. With one, it would
# first look for packed sequences in position_ids, which waits for the device in every forward.
ALL_ATTENTION_FUNCTIONS.register(PACKED, attend)


def _attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, pack: PackLayout
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    rows = []
    for start, stop in pairwise(pack.bounds):
        band = None if window is None or stop - start <= window else _band(stop - start, window, query.device)
        row = F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            attn_mask=band,
            is_causal=band is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        rows.append(row.transpose(1, 2))
    return torch.cat(rows, dim=1)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, pack: PackLayout
) -> Tensor:
    query_THD, key_THD, value_THD = (states[0].transpose(0, 1) for states in (query, key, value))
    out_THD = varlen_attn(
        query_THD,
        key_THD,
        value_THD,
        pack.cu_seqlens,
        pack.cu_seqlens,
        pack.max_length,
        pack.max_length,
        scale=scaling,
        # (keys to the left, keys to the right) besides the token itself; -1 means no limit.
        window_size=(-1, 0) if window is None else (window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out_THD, Tensor)  # it is a tuple only if the log-sum-exp is requested, too
    return out_THD.unsqueeze(0)


def _varlen_applies(query: Tensor, value: Tensor) -> bool:
    """Whether the flash kernel behind `varlen_attn` supports the inputs; everything else runs one by one."""
    return (
        _VARLEN
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
    )


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """bool [length, length]: query i sees key j if 0 <= i - j < window."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)


def _refuse_unpackable(base_model: PreTrainedModel) -> None:
    name, config = type(base_model).__name__, base_model.config
    if base_model.training:
        raise ValueError(f"{name} is in train mode; a teacher runs in eval mode")
    if base_model.get_output_embeddings() is not None:
        raise ValueError(f"{name} projects onto the vocabulary, which is not needed; pass its base_model")
    # Both change the masks that transformers would have built, and these are never built here.
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{name} attends in both directions; only causal attention can be packed")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise ValueError(
            f"{name} attends within chunks of {config.attention_chunk_size} tokens; "
            "packed attention supports sequences and sliding windows only"
        )
