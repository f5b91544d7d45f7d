"""The metrics of a step: gathered on the device, read every few steps, written and shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from craft_ray.config import scores_of
from craft_ray.config.modes import RETENTION_MODES
from craft_ray.errors import DataError
from craft_ray.method.step import StepMetrics
from craft_ray.run.kept import agreement_in_words, anchors_in_words, in_words

Record = dict[str, Any]
"""One line of metrics.jsonl."""

FIELDS = (
    "train/loss",
    "train/grad_norm",
    "craft/retention_loss",
    "craft/lambda",
    "craft/weight",
    "craft/grad_dot",
    "craft/grad_cos",
    "craft/conflict",
    "craft/projected",
)


@dataclass(frozen=True)
class HostSide:
    """What the host knows about a step without waiting for the device."""

    step: int
    lr: float
    epsilons: Sequence[float]
    """The budget of each constraint; none in plain fine-tuning."""
    step_s: float
    data_s: float
    with_retention: bool


class MetricsBuffer:
    """Metrics of the last steps; the host waits for the device only in `flush`.

    Args:
        skills: names of the constraints that training is held to; a single one without a name is None.
    """

    def __init__(self, skills: Sequence[str | None] = ()) -> None:
        self._skills = [skill for skill in skills if skill is not None]
        self._device: list[Tensor] = []
        self._host: list[HostSide] = []

    def add(self, metrics: StepMetrics, host: HostSide) -> None:
        numbers = (
            metrics.task_loss, metrics.grad_norm, metrics.retention_loss, metrics.multiplier, metrics.weight,
            metrics.dot, metrics.cos, metrics.conflict, metrics.projected,
        )  # fmt: skip
        row = torch.stack([number.detach().double() for number in numbers])
        if self._skills:
            own = metrics.skills_2S
            own = row.new_full((2 * len(self._skills),), torch.nan) if own is None else own.double().flatten()
            row = torch.cat([row, own])
        self._device.append(row)
        self._host.append(host)

    def flush(self) -> list[Record]:
        """One record for each step since the last flush.

        Raises:
            DataError: a loss or gradient of one of these steps is not finite.
        """
        if not self._device:
            return []
        rows = torch.stack(self._device).tolist()
        host, self._device, self._host = self._host, [], []
        return [self._record(row, side) for row, side in zip(rows, host, strict=True)]

    def _record(self, row: list[float], host: HostSide) -> Record:
        numbers = dict(zip(FIELDS, row[: len(FIELDS)], strict=True))
        retained, measured = bool(host.epsilons), host.with_retention
        watched = [("train/loss", "task loss", "samples"), ("train/grad_norm", "gradient's norm", "samples")]
        if measured:
            watched.insert(1, ("craft/retention_loss", "retention loss", "anchors"))
        for key, name, inputs in watched:
            if not math.isfinite(numbers[key]):
                raise DataError(
                    f"the {name} is {numbers[key]} at step {host.step}: look for NaN in that step's {inputs}, or lower "
                    f"train.learning_rate; the last checkpoint is from before it"
                )
        return {
            "step": host.step,
            "train/loss": numbers["train/loss"],
            "train/grad_norm": numbers["train/grad_norm"],
            "train/lr": host.lr,
            "craft/retention_loss": numbers["craft/retention_loss"] if measured else None,
            "craft/lambda": numbers["craft/lambda"] if retained else None,
            "craft/weight": numbers["craft/weight"] if measured else None,
            "craft/epsilon": host.epsilons[0] if len(host.epsilons) == 1 else None,
            "craft/grad_dot": _or_none(numbers["craft/grad_dot"]),
            "craft/grad_cos": _or_none(numbers["craft/grad_cos"]),
            "craft/conflict": _flag(numbers["craft/conflict"]),
            "craft/projected": _flag(numbers["craft/projected"]),
            "perf/step_s": host.step_s,
            "perf/data_s": host.data_s,
        } | self._by_skill(row[len(FIELDS) :], host)

    def _by_skill(self, row: list[float], host: HostSide) -> Record:
        """`skills/NAME/retention_loss`, `/lambda` and `/epsilon`; None between two retention steps."""
        record: Record = {}
        count = len(self._skills)
        for index, skill in enumerate(self._skills):
            prefix = scores_of(skill)
            record[f"{prefix}/retention_loss"] = _or_none(row[index])
            record[f"{prefix}/lambda"] = _or_none(row[count + index])
            record[f"{prefix}/epsilon"] = host.epsilons[index]
        return record


def _or_none(number: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if math.isnan(number) else number


def _flag(number: float) -> bool | None:
    """None for NaN: the two gradients were not compared."""
    return None if math.isnan(number) else bool(number)


def retention_step(records: Sequence[Record], earlier: Record | None = None) -> Record | None:
    """The last of these steps that is a retention step; where none is, an earlier one."""
    return next((r for r in reversed(records) if r["craft/retention_loss"] is not None), earlier)


def console_line(records: Sequence[Record], steps: int, mode: str, earlier: Record | None = None) -> str:
    """The last of these steps as one line. Where it is between two retention steps, the line shows the numbers of the
    last retention step, and which step that was.

    Args:
        earlier: the last retention step before these steps; None if there is none, or it was in another process.
    """
    record = records[-1]
    retention = retention_step(records, earlier)

    def number(key: str, form: str = ".3f", of: Record = record) -> str:
        value = of[key]
        return "nan" if value is None else format(value, form)

    def small(value: float) -> str:
        return ".3f" if value >= 0.01 else ".2e"

    parts = [
        f"Step {record['step']}/{steps}",
        f"loss={number('train/loss')}",
        f"grdn={number('train/grad_norm')}",
        f"lr={number('train/lr', '.1e')}",
        f"updt_s={number('perf/step_s')}",
        f"data_s={number('perf/data_s')}",
        f"mode={mode}",
    ]
    if retention is not None:
        parts.append(f"L_ret={number('craft/retention_loss', small(retention['craft/retention_loss']), retention)}")
    if record["craft/lambda"] is not None:
        parts.append(f"λ={number('craft/lambda')}")
    if record["craft/epsilon"] is not None:
        parts.append(f"ε={number('craft/epsilon', small(record['craft/epsilon']))}")
    if retention is not None:
        parts.append(f"weight={number('craft/weight', of=retention)}")
        if retention["craft/conflict"] is not None:
            parts += [
                f"conflict={'✓' if retention['craft/conflict'] else '✗'}",
                f"projected={'✓' if retention['craft/projected'] else '✗'}",
                f"dot={number('craft/grad_dot', of=retention)}",
                f"cos={number('craft/grad_cos', of=retention)}",
            ]
        for skill in skills_in(retention):
            own = {name: retention[f"{scores_of(skill)}/{name}"] for name in ("retention_loss", "lambda", "epsilon")}
            parts.append(f"{skill}: L_ret={own['retention_loss']:.3g} λ={own['lambda']:.3g} ε={own['epsilon']:.3g}")
        if retention is not record:
            parts.append(f"retention at step {retention['step']}")
    return " | ".join(parts)


def skills_in(record: Record) -> list[str]:
    """The names of several old skills, of which a record has numbers."""
    return list(dict.fromkeys(key.split("/")[1] for key in record if key.startswith("skills/")))


def validation_line(record: Record, steps: int) -> str:
    """A validation as one line."""
    parts = [f"Step {record['step']}/{steps}", "validation"]
    skills = skills_in(record)
    for skill, prefix in [*((s, scores_of(s)) for s in skills), *(("old", "old"),) * (not skills), ("new", "new")]:
        if f"{prefix}/score" in record:
            kept = record[f"{prefix}/ratio"]
            of_teacher = "" if kept is None else f" ({kept:.1%} of the teacher's)"
            parts.append(f"{skill} {record[f'{prefix}/score']:.3f}{of_teacher}")
    if "heldout/retention_loss" in record:
        parts.append(f"held-out L_ret={record['heldout/retention_loss']:.4g}")
    if "craft/next_epsilon" in record:
        parts.append(f"at least {record['old/bound']:.1%} kept, next ε={record['craft/next_epsilon']:.4g}")
    for skill in skills:
        if f"{scores_of(skill)}/next_epsilon" in record:
            bound, epsilon = (record[f"{scores_of(skill)}/{name}"] for name in ("bound", "next_epsilon"))
            parts.append(f"{skill}: at least {bound:.1%} kept, next ε={epsilon:.4g}")
    return " | ".join(parts)


def skill_line(skill: str, found: Record) -> str:
    """The result of one of several old skills, in words."""
    if found.get("retention_loss") is None:
        return f"{skill}: {in_words(found['certificate'], 'it')}"
    line = f"{skill}: retention loss {found['retention_loss']:.4g} on {judged_in_words(found)}"
    if "certificate" in found:
        return f"{line}; {in_words(found['certificate'], 'it')}; λ {found['lambda']:.3g}"
    if found["lambda"] is None:
        return line
    verdict = "met" if found["feasible"] else "NOT met"
    return f"{line}, budget {found['epsilon']:g}: {verdict}{unreached(found)}; λ {found['lambda']:.3g}"


def judged_in_words(found: Record) -> str:
    """What a retention loss at the end was measured on."""
    if "retention_mode" in found and RETENTION_MODES[found["retention_mode"]].distance_of_weights:
        return "the weights"
    held = found["heldout_anchors"]
    return f"{held} held-out anchors" if held else "the training anchors (none were held out)"


def unreached(found: dict[str, Any]) -> str:
    """A clause for a budget that the model was not yet held to, because it is of a step before the end of the
    schedule; empty for others, and for what an earlier version wrote."""
    budget: float = found["epsilon"]
    epsilon: float = found.get("epsilon_at_step", budget)
    if math.isclose(epsilon, budget):
        return ""
    return f" (ε was {epsilon:.4g} at the model's last step)"


def kept_line(kept: dict[str, Any]) -> str:
    """Which step's checkpoint is a run's model, and why."""
    bounds = ", ".join(f"{name} {kept['reached'][name]:.4g} ({bound})" for name, bound in kept["bounds"].items())
    among = "the best validation" if kept["feasible"] else "no validation was within the bounds, this one missed least"
    ended = f"; training ended early, at step {kept['trained_steps']}" if kept["ended_early"] else ""
    return f"kept step {kept['step']}: {among}, {kept['metric']} {kept['value']:.4g}{bounds and ', '}{bounds}{ended}"


def result_lines(result: dict[str, Any]) -> list[str]:
    """The result of a run, in words."""
    lines = [kept_line(result["kept"])] if "kept" in result else []
    skills: dict[str, Any] = result.get("skills", {})
    scored = {**(skills or {"old": result["old"]}), "new": result["new"]}
    scores = [
        f"{skill} {score['metric']} {score['before']:.3f} -> {score['after']:.3f}"
        for skill, score in scored.items()
        if score.get("after") is not None
    ]
    if scores:
        lines.append("; ".join(scores))
    for skill, score in scored.items():
        if "agreement" in score:
            lines.append(f"{skill}: {agreement_in_words(score['agreement'])}")
    for skill, found in (skills or {"": result}).items():
        if "anchor_agreement" in found:
            lines.append(f"{skill}{': ' * bool(skill)}{anchors_in_words(found['anchor_agreement'])}")
    for skill, found in skills.items():
        if "certificate" in found or found.get("retention_loss") is not None:
            lines.append(skill_line(skill, found))
    if "certificate" in result and not skills:
        lines.append(in_words(result["certificate"]))
    if result["retention_loss"] is not None and not skills:
        loss = f"retention loss {result['retention_loss']:.4g} on {judged_in_words(result)}"
        allow = "allow a larger ε"
        if "certificate" in result:  # this ε bounds what training saw, wherever that left the skill
            loss += f"; on training anchors ε ended at {result['epsilon']:.4g}"
            allow = "keep less"
        elif result["lambda"] is not None:
            loss += f", budget {result['epsilon']:g}: {'met' if result['feasible'] else 'NOT met'}"
            loss += unreached(result)
        lines.append(loss)
        if not result["feasible"] and result["lambda"] is not None and result["lambda"] >= result["lambda_max"]:
            lines.append(f"λ is at its cap, {result['lambda_max']:g}: raise craft.lambda_max, train longer, or {allow}")
    return lines
