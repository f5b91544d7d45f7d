"""What a model must be, checked on the model itself when it is loaded.

A loss over a response means what it says only if no token sees those after it, if no sample sees its neighbours in
the batch, and if the same batch gives the same loss twice. Three passes over a handful of tokens show it for any
architecture, in the weights' own type.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from craft_ray.config import ModelConfig
from craft_ray.errors import CraftError, ModelError, first_line
from craft_ray.models.base import Batch, Features, evaluating
from craft_ray.models.dropout import silence
from craft_ray.models.limits import Limits

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest norm of a difference of logits relative to the logits, by the type of the weights: rounding differs with the
shape of a batch and, if it is distributed among experts, with its tokens."""


class Decoder(Protocol):
    """What the checks read of a model of transformers."""

    kind: ClassVar[str]
    probed: str
    config: ModelConfig
    module: Any
    device: torch.device
    tokenizer: Any
    limits: Limits
    pad: int
    hidden_size: int
    num_hidden_states: int

    def probe_prompt(self, tokens: Sequence[int]) -> Features: ...

    def extended(self, prompt: Features, suffix: Sequence[int]) -> Features: ...

    def collate(self, features: Sequence[Features]) -> Batch: ...

    def continued(self, features: Sequence[Features], settings: GenerationConfig) -> Any: ...


def check_decoder(model: Decoder) -> None:
    """Check that a response is predicted from what comes before it, and from nothing else; turn off any dropout.

    Raises:
        ModelError: a token sees later ones, a sample sees its neighbours in the batch, or two passes over one batch
            differ although dropout is to be off.
    """
    name, stay = f"model {model.config.path} ({type(model.module).__name__})", "specify a decoder (causal attention)"
    off = model.config.disable_dropout
    with _forward_of(model), nullcontext() if off else evaluating(model.module):
        tokens = probe_tokens(model, 8)
        prompt = model.probe_prompt(tokens)
        long, changed, short = (
            model.extended(prompt, suffix) for suffix in (tokens[:6], tokens[:4] + tokens[6:], tokens[:2])
        )

        def logits(*features: Features) -> Tensor:
            batch = model.collate(features).to(model.device)
            output: Tensor = model.module(**batch.inputs, use_cache=False).logits
            return output.float()

        together = silence(model.module, lambda: logits(long, short), model.device) if off else logits(long, short)
        other = logits(changed, short)
        alone = logits(short)

        start = prompt.layout.length - 1
        before, behind = slice(start, start + 5), slice(start, start + 3)
        limit = TOLERANCE[model.module.dtype]
        causal = apart(together[0, before], other[0, before]) <= limit
        separate = apart(together[1, behind], other[1, behind]) <= limit
        unpadded = apart(together[1, behind], alone[0, behind]) <= limit
        if causal and separate and unpadded:
            return
        if apart(together, logits(long, short)) > limit:
            raise ModelError(
                f"{name}: two passes over one batch differ in training mode, and no dropout of torch explains it "
                f"(model.disable_dropout is true): set the randomness in its config.json to zero, or "
                f"model.disable_dropout=false without anchors"
            )
    if not causal:
        raise ModelError(
            f"{name}: a token's prediction changes with the tokens behind it, so that the loss of a response would see "
            f"the answer: {stay}"
        )
    if not separate:
        raise ModelError(f"{name}: a sample's predictions change with the other samples of its batch: {stay}")
    raise ModelError(
        f"{name}: a sample's predictions are not the same alone as beside a longer one, with padding: {stay}"
    )


def generates_in_padded_batches(model: Decoder) -> bool:
    """Whether a prompt next to a longer one, padded on the left, is continued as if it were alone; warns if not."""
    tokens = probe_tokens(model, 8)
    with _forward_of(model), evaluating(model.module):
        prompt = model.probe_prompt(tokens)
        long, short = (model.extended(prompt, t) for t in (tokens, tokens[:2]))
        settings = GenerationConfig(
            max_new_tokens=2, do_sample=False, pad_token_id=model.pad, output_logits=True, return_dict_in_generate=True
        )
        first, second = (model.continued(features, settings) for features in ([short, long], [short]))
        limit = TOLERANCE[model.module.dtype]
        same = apart(first.logits[0][:1], second.logits[0]) <= limit
        if same and first.sequences[0, -2] == second.sequences[0, -2]:
            same = apart(first.logits[1][:1], second.logits[1]) <= limit
    if not same:
        log.warning(
            "model %s (%s): what it generates from a prompt changes with the padding beside a longer one, so prompts "
            "of different lengths are continued one by one, which takes longer",
            *(model.config.path, type(model.module).__name__),
        )
    return same


def probe_tokens(model: Decoder, count: int) -> list[int]:
    """Different tokens from all over the vocabulary, none of them special."""
    special = {*model.tokenizer.all_special_ids, *getattr(model.tokenizer, "added_tokens_decoder", ())}
    stride = max(1, model.limits.embeddings // count)
    ids = (index for start in range(stride) for index in range(start, model.limits.embeddings, stride))
    return list(islice((index for index in ids if index not in special), count))


def apart(one: Tensor, other: Tensor) -> float:
    """Norm of a difference of logits relative to the logits, each less its mean over the vocabulary. Tokens that a
    model rules out by a logit of the lowest number do not count, nor do those of a model that diverged."""
    counted = (one.abs() < 1e30) & (other.abs() < 1e30)
    one, other = one.where(counted, 0), other.where(counted, 0)
    centred = other - other.mean(-1, keepdim=True)
    return float((one - other).norm() / centred.norm().clamp_min(1e-30))


def check_states(states: Sequence[Tensor] | None, layers: Sequence[int], model: Decoder) -> None:
    """Check that a base model returned what anchors of `layers` need.

    Raises:
        ModelError: it returned another number of hidden states, or one of `layers` has another width.
    """
    name, count = f"model {model.config.path} ({type(model.module).__name__})", len(states or ())
    if count != model.num_hidden_states:
        raise ModelError(
            f"{name} returns {count} hidden states, not one for the embeddings and one for each of its "
            f"{model.num_hidden_states - 1} layers: choose another model, or anchors.modes=[token_ce]"
        )
    assert states is not None
    for k in layers:
        if states[k].shape[-1] != model.hidden_size:
            fitting = [i - count for i in range(count) if states[i].shape[-1] == model.hidden_size][-2:]
            raise ModelError(
                f"{name}: hidden state {k} has width {states[k].shape[-1]}, those of its layers have "
                f"{model.hidden_size}: choose others, for example anchors.layers={fitting}"
            )


@contextmanager
def _forward_of(model: Decoder) -> Iterator[None]:
    """Passes that leave no trace: no gradients, and random numbers as before; a failure of theirs in one line."""
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    except (CraftError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the code of an architecture can raise anything
        raise ModelError(
            f"model {model.config.path} ({type(model.module).__name__}) does not run on {model.probed} "
            f"({type(error).__name__}: {first_line(error)[:200]}): choose another model, the right model.kind (it is "
            f"{model.kind}), or a folder whose processor fits its weights"
        ) from error
