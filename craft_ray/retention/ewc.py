"""Retention mode `ewc`: 1/2 sum_i F_i (theta_i - theta_0,i)^2 (Kirkpatrick et al., arXiv 1612.00796).

F, the diagonal of the Fisher information (method/fisher.py), is estimated once, before the first step, on the training
anchors of the cache; a resumed run estimates it again from the teacher, with the same draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from craft_ray import interruption
from craft_ray.config.modes import RETENTION_MODES
from craft_ray.method.fisher import diagonal_fisher
from craft_ray.models.base import IGNORE, Model, evaluating
from craft_ray.models.capabilities import logits_model
from craft_ray.pace import Pace, Report, unreported
from craft_ray.retention.inputs import AnchorInputs
from craft_ray.retention.mode import Opening
from craft_ray.retention.weights import WeightDistance, WholeModel

DRAWS_SEED = 0
"""Seed of the answers that the Fisher information is estimated from: the same in every run on a cache."""


class EWC(WeightDistance):
    """Keeps the weights close that the teacher's answers on the anchors depend on."""

    name: ClassVar[str] = "ewc"
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
            fisher = diagonal_fisher([parameters[name] for name in trained], drawn(teacher, inputs, train, run.report))
        return cls(run.model, teacher, fisher, anchors.fingerprint)

    def loss(self, batch: WholeModel) -> Tensor:
        return self.distance(self.fisher)


def drawn(
    teacher: Model, inputs: AnchorInputs, rows: Sequence[int], report: Report = unreported
) -> Iterator[tuple[Tensor, int]]:
    """For each anchor the log-likelihood of tokens that are drawn from the teacher at each place of its cached suffix,
    and their number."""
    generator = torch.Generator().manual_seed(DRAWS_SEED)
    model = logits_model(teacher)
    pace = Pace("measuring the Fisher information on the anchors", len(rows), report)
    for done, row in enumerate(rows, 1):
        interruption.check()
        batch = inputs.batch([row]).to(teacher.device)
        log_probs_TV = model.logits(batch)[batch.targets_BP != IGNORE].float().log_softmax(-1)
        draws_T1 = torch.multinomial(log_probs_TV.detach().exp().cpu(), 1, generator=generator).to(teacher.device)
        yield log_probs_TV.gather(1, draws_T1).sum(), len(draws_T1)
        pace.reached(done)
    pace.end()
