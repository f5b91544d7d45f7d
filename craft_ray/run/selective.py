"""Selective token masking: response tokens that the teacher finds unlikely are not learnt (arXiv 2501.14315).

Their gradients are the largest and move the weights the furthest. Which tokens are masked depends only on the teacher,
the data and the threshold, so a resumed run finds the same ones again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch

from craft_ray import interruption
from craft_ray.models.base import IGNORE, Features, Model, evaluating
from craft_ray.models.capabilities import token_model
from craft_ray.pace import Pace, Report, unreported
from craft_ray.workers import Workers


class TokenMask:
    """The learnt tokens of each sample of a task.

    Args:
        features: a sample with its response, by row.
        rows: their number.
        threshold: loss in nats above which the teacher's likelihood masks a token.
        report: receives how far the teacher's pass over them is.
    """

    def __init__(
        self,
        teacher: Model,
        features: Callable[[int], Features],
        rows: int,
        threshold: float,
        batch_size: int,
        workers: Workers,
        report: Report = unreported,
    ) -> None:
        self.threshold = threshold
        found: list[tuple[tuple[int, ...], int]] = []
        mine = range(workers.rank, rows, workers.world_size)
        pace = Pace("masking tokens by the teacher's loss", rows, report if workers.rank == 0 else unreported)
        with torch.inference_mode(), evaluating(teacher.module):
            for start in range(0, len(mine), batch_size):
                interruption.check()
                found += _learnt(teacher, [features(row) for row in mine[start : start + batch_size]], threshold)
                pace.reached(len(found) * workers.world_size)
        pace.end()
        shares = workers.gather(found)
        size = workers.world_size
        both = [shares[row % size][row // size] for row in range(rows)]
        self._learnt = [learnt for learnt, _ in both]
        self.tokens = sum(tokens for _, tokens in both)
        self.masked = self.tokens - len(list(chain.from_iterable(self._learnt)))

    def __call__(self, row: int, features: Features) -> Features:
        """A sample of which only the learnt tokens are predicted."""
        return replace(features, layout=replace(features.layout, learnt=self._learnt[row]))

    def described(self) -> str:
        """What is masked, in words."""
        return (
            f"{self.masked} of {self.tokens} response tokens are masked: the teacher's loss on them is above "
            f"train.mask_loss_above {self.threshold:g}"
        )


def _learnt(teacher: Model, features: list[Features], threshold: float) -> list[tuple[tuple[int, ...], int]]:
    """For each sample the indices of its learnt tokens, and how many it has without the mask."""
    batch = teacher.collate(features).to(teacher.device)
    losses_BP = -token_model(teacher).token_log_probs(batch)[0].cpu()
    predicted_BP, places = (batch.targets_BP != IGNORE).cpu(), (batch.keep_P + 1).tolist()
    result = []
    for losses_P, predicted_P in zip(losses_BP.tolist(), predicted_BP.tolist(), strict=True):
        own = [(loss, place) for loss, place, real in zip(losses_P, places, predicted_P, strict=True) if real]
        learnt = [place for loss, place in own if loss <= threshold] or [min(own)[1]] * bool(own)
        result.append((tuple(learnt), len(own)))
    return result
