"""What EleutherAI's lm-evaluation-harness asks a model, answered by the live one: the likelihood of a continuation, and
greedy replies up to a stop string.

Texts become tokens as in the harness's own adapter for transformers (lm_eval/models/huggingface.py): context and
continuation are tokenised together and cut after the context's tokens, and spaces at the end of the context belong to
the continuation. The tokenizer puts its BOS in front, also of what a chat template wrote, unless the text begins with
one. A context that is too long is an error here, where the harness cuts off its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from craft_ray.errors import DataError
from craft_ray.models.base import Model
from craft_ray.models.causal_lm import CausalLM
from craft_ray.run.likelihood import likelihoods, passes
from craft_ray.workers import Workers

NEW_TOKENS = 256
"""The harness's limit of a reply if a task has none."""
GREEDY = ("until", "do_sample", "temperature", "top_p", "top_k")
"""Settings of a task's replies that are honoured, or decide nothing where the most likely token is taken."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The harness's names for the longest reply."""


@dataclass(frozen=True)
class Continuation:
    """A text whose likelihood after a context is asked for."""

    context: str
    text: str
    name: str
    """The document, for errors."""


@dataclass(frozen=True)
class Prompt:
    """A context that is to be continued."""

    context: str
    settings: dict[str, Any]
    name: str

    @property
    def longest(self) -> int:
        return int(next((self.settings[key] for key in LIMITS if self.settings.get(key) is not None), NEW_TOKENS))

    @property
    def stops(self) -> list[str]:
        until = self.settings.get("until") or []
        return [until] if isinstance(until, str) else list(until)

    def check(self) -> None:
        """
        Raises:
            DataError: the task asks for replies other than greedy ones.
        """
        other = [key for key in self.settings if key not in (*GREEDY, *LIMITS)]
        drawn = self.settings.get("do_sample") or (
            "do_sample" not in self.settings and float(self.settings.get("temperature") or 0) > 0
        )
        if drawn or other:
            how = "draws its replies at random" if drawn else f"sets {', '.join(other)}"
            raise DataError(
                f"{self.name}: the task {how} (generation_kwargs), and replies are greedy here: set do_sample: false "
                f"in a task file of your own, and leave the other settings out"
            )


def log_likelihoods(
    model: CausalLM, asked: Sequence[Continuation], size: int, workers: Workers
) -> list[tuple[float, bool]]:
    """The log-likelihood of each continuation, in nats, and whether it is what the model would say.

    Args:
        size: continuations in a forward pass.

    Raises:
        DataError: one is empty or too long.
    """
    features = []
    for one in asked:
        context, continuation = _tokens(model, one)
        if not continuation:
            raise DataError(f"{one.name}: an answer of the task has no token: correct the task file")
        features.append(model.from_tokens(context, continuation, f"sample {one.name}"))
    found = [(0.0, False)] * len(asked)
    filler = model.from_tokens(_prefix(model), _prefix(model), "filler")
    for indices in passes(model, features, size, workers):
        chosen = [features[index] for index in indices] or [filler]
        for index, likelihood in zip(indices, likelihoods(model, chosen), strict=False):
            found[index] = (likelihood.total, likelihood.hits == likelihood.tokens)
    return found


def replies(model: CausalLM, asked: Sequence[Prompt], size: int, workers: Workers) -> list[str]:
    """The greedy reply to each prompt, up to the first of its stop strings.

    Raises:
        DataError: a prompt is too long, or wants more than a greedy reply.
    """
    for one in asked:
        one.check()
    features = [
        model.from_tokens(model.text.plain(one.context) or _prefix(model), (), f"sample {one.name}") for one in asked
    ]
    found = [""] * len(asked)
    filler = model.from_tokens(_prefix(model), (), "filler")
    for indices in passes(model, features, size, workers):
        # Where workers share a model, all generate from equally many prompts: it may continue them one by one.
        most = max(workers.gather(len(indices))) if model.sharded else len(indices)
        chosen = [features[index] for index in indices] + [filler] * (most - len(indices))
        longest = max((asked[index].longest for index in indices), default=1)
        for index, tokens in zip(indices, model.generate(chosen, longest), strict=False):
            text = model.decode(tokens[: asked[index].longest])
            for stop in filter(None, asked[index].stops):
                text = text.split(stop)[0]
            found[index] = text
    return found


def asked_otherwise(model: Model) -> list[str]:
    """For the key of a score: that the prompts of a chat model have a BOS that they did not have before."""
    if not isinstance(model, CausalLM) or model.chat is None:
        return []
    text, example = model.text, model.chat.example
    return ["BOS in front of chat prompts"] if text.plain(example) != text.written(example) else []


def _tokens(model: CausalLM, one: Continuation) -> tuple[list[int], list[int]]:
    if not one.context:
        ids, prefix = list(model.tokenizer(one.text, add_special_tokens=False)["input_ids"]), _prefix(model)
        return (ids[:1], ids[1:]) if ids[:1] == prefix else (prefix, ids)
    context = one.context.rstrip()
    text = one.context[len(context) :] + one.text
    start = model.text.plain(context)
    return start or _prefix(model), model.text.plain(context + text)[len(start) :]


def _prefix(model: CausalLM) -> list[int]:
    """The token that stands before an empty context."""
    bos = model.tokenizer.bos_token_id
    return [model.tokenizer.eos_token_id if bos is None else bos]
