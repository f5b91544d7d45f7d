"""Retention modes `l2_sp` and `ewc`: the student's distance from the teacher in the space of weights.

    l2_sp   1/2 sum_i (theta_i - theta_0,i)^2           Li, Grandvalet and Davoine, arXiv 1802.01483
    ewc     1/2 sum_i F_i (theta_i - theta_0,i)^2       Kirkpatrick et al., arXiv 1612.00796; F in method/fisher.py

The sums are over the weights that are trained. A distance of weights is exact: it has no batches and nothing is held
out, so what is certified is this distance and not the skill. `l2_sp` needs no anchors at all. `ewc` estimates F once,
before the first step, on the training anchors of the cache; a resumed run estimates it again from the teacher, with the
same draws. Both keep theta_0 in memory beside the student, `ewc` also F.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from craft_ray.config.modes import RETENTION_MODES
from craft_ray.errors import CacheRefused, ConfigError
from craft_ray.method.fisher import diagonal_fisher
from craft_ray.models.base import IGNORE, Model, evaluating
from craft_ray.models.capabilities import logits_model
from craft_ray.retention.inputs import AnchorInputs
from craft_ray.retention.mode import Opening, RetentionMode

DRAWS_SEED = 0
"""Of the answers that the Fisher information is estimated from: the same in every run on a cache."""


@dataclass(frozen=True)
class WholeModel:
    """The only batch of a distance of weights."""

    @property
    def count(self) -> int:
        return 1

    def to(self, device: torch.device) -> WholeModel:
        return self


class WeightDistance(RetentionMode[WholeModel]):
    """Keeps the trained weights close to the teacher's.

    Args:
        teacher: the model before fine-tuning. Its weights are copied.
    """

    needs: ClassVar[Literal["anchors", "responses", "weights"]] = "weights"

    def __init__(self, model: Model, teacher: Model) -> None:
        if model.adapter is not None:
            raise ConfigError(
                f"craft.retention_mode {self.name} measures the distance from the teacher's weights, and an adapter "
                f"leaves those as they are: leave the section adapter out, or choose another mode"
            )
        if model.sharded:
            raise ConfigError(
                f"craft.retention_mode {self.name} sums over all weights, and workers.sharding leaves each worker a "
                f"part of them: set workers.sharding=none, or choose another mode"
            )
        self.model = model
        trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        theirs = dict(teacher.module.named_parameters())
        self.parameters = list(trained.values())
        self.origin = [theirs[name].detach().clone() for name in trained]

    @property
    def megabytes(self) -> float:
        """Memory of the copy of the teacher's weights, in 10^6 bytes."""
        return sum(tensor.nbytes for tensor in self.origin) / 1e6

    def split(self, holdout: float, skill: str | None = None) -> tuple[list[int], list[int]]:
        """One row, the weights; none is held out."""
        return [0], []

    def batch(self, rows: Sequence[int]) -> WholeModel:
        return WholeModel()

    def noise_floor(self, rows: Sequence[int]) -> float:
        """The teacher's weights are kept exactly."""
        return 0.0

    def _distance(self, weights: Sequence[Tensor | float]) -> Tensor:
        """1/2 sum_i w_i (theta_i - theta_0,i)^2 in float32."""
        terms = [
            (weight * (ours.float() - theirs.float()).square()).sum()
            for ours, theirs, weight in zip(self.parameters, self.origin, weights, strict=True)
        ]
        return torch.stack(terms).sum() / 2

    @torch.no_grad()
    def check_untouched(self, rows: Sequence[int], batch_size: int) -> None:
        distance = float(self.loss(WholeModel()))
        if distance != 0:
            raise CacheRefused(f"the untouched student is {distance:.2e} away from the teacher in its weights")


class L2SP(WeightDistance):
    """Keeps all trained weights equally close."""

    name: ClassVar[str] = "l2_sp"
    unit = RETENTION_MODES["l2_sp"].unit("")
    cache = None

    def __init__(self, model: Model, teacher: Model) -> None:
        super().__init__(model, teacher)
        self.fingerprint = teacher.weights_fingerprint()
        self.description = f"{self.unit.words}, {self.megabytes:.1f} MB more memory"

    @classmethod
    def open(cls, run: Opening) -> Self:
        return cls(run.model, run.teacher())

    def loss(self, batch: WholeModel) -> Tensor:
        return self._distance([1.0] * len(self.parameters))


class EWC(WeightDistance):
    """Keeps the weights close that the teacher's answers on the anchors depend on."""

    name: ClassVar[str] = "ewc"
    needs: ClassVar[Literal["anchors", "responses", "weights"]] = "anchors"
    unit = RETENTION_MODES["ewc"].unit("")

    def __init__(self, model: Model, teacher: Model, fisher: Sequence[Tensor], cache: str) -> None:
        super().__init__(model, teacher)
        self.fisher = list(fisher)
        self.cache = self.fingerprint = cache
        megabytes = self.megabytes + sum(tensor.nbytes for tensor in fisher) / 1e6
        self.description = f"{self.unit.words}, {megabytes:.1f} MB more memory"

    @classmethod
    def open(cls, run: Opening) -> Self:
        """
        Raises:
            ConfigError: the model's logits cannot be read, so that no answers can be drawn.
        """
        teacher, anchors = run.teacher(), run.anchors
        logits_model(teacher)
        train, _ = anchors.split(run.craft.anchor_holdout)
        inputs = AnchorInputs(teacher, anchors, with_suffix=True, cache=run.features)
        trained = [name for name, p in run.model.module.named_parameters() if p.requires_grad]
        parameters = dict(teacher.module.named_parameters())
        with evaluating(teacher.module):
            fisher = diagonal_fisher([parameters[name] for name in trained], drawn(teacher, inputs, train))
        return cls(run.model, teacher, fisher, anchors.fingerprint)

    def loss(self, batch: WholeModel) -> Tensor:
        return self._distance(self.fisher)


def drawn(teacher: Model, inputs: AnchorInputs, rows: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
    """For each anchor the log-likelihood of tokens that are drawn from the teacher at each place of its cached suffix,
    and their number."""
    generator = torch.Generator().manual_seed(DRAWS_SEED)
    model = logits_model(teacher)
    for row in rows:
        batch = inputs.batch([row]).to(teacher.device)
        log_probs_TV = model.logits(batch)[batch.targets_BP != IGNORE].float().log_softmax(-1)
        draws_T1 = torch.multinomial(log_probs_TV.detach().exp().cpu(), 1, generator=generator).to(teacher.device)
        yield log_probs_TV.gather(1, draws_T1).sum(), len(draws_T1)
