"""Which arms `craft-ray compare` runs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from craft_ray.config.adapter import AdapterConfig
from craft_ray.config.modes import unit_of
from craft_ray.config.retention import CraftConfig
from craft_ray.config.types import ARMS, MOST_VARIANTS, Section, VariantName, distinct


class CompareConfig(Section):
    """The three arms, and variants of them, on one cache, over seeds."""

    arms: Annotated[tuple[str, ...] | None, AfterValidator(distinct)] = None
    """Which of `baseline`, `token_ce`, `hidden`, the variants, and the arms of docs/arms.md run. Default: the first
    three and the variants; `[all]`: everything that the data allow."""
    learning_rates: dict[str, Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(distinct)]] = {}
    """Further learning rates by arm, e.g. `{baseline: [1e-4, 3e-4]}`; each is an arm, `baseline_lr1e_4`."""
    validate_arms: bool = False
    """Whether all arms are scored on `validation`, every `validation.every` steps, and keep what was found in
    `validation.jsonl`; otherwise only those whose budget follows it."""
    seeds: Annotated[tuple[int, ...], AfterValidator(distinct)] = (0, 1, 2)
    parallel: int | None = Field(None, ge=1)
    """Concurrent runs, each with its own model in memory. Default: as many as the
    cluster has processors and memory for."""
    token_ce: dict[str, Any] = {}
    """`craft` settings in which the token_ce arm differs, e.g. `{epsilon_start: 0.1}`: nats, not squares."""
    variants: Annotated[dict[VariantName, dict[str, Any]], Field(max_length=MOST_VARIANTS)] = {}
    """Additional constrained arms by name, each with the `craft` settings in which it differs from the config, e.g.
    `{hidden_prefix: {retention_mode: hidden, positions: [vision_mean, text_last]}}`. The key `adapter` changes the
    section of that name: `{full: {adapter: null}, low_rank: {adapter: {r: 4}}}`; so does `train`, e.g. `{train:
    {learning_rate: 1e-3}}`. With `enabled: false` it is a way of plain fine-tuning. `interpolate: ARM` trains nothing:
    it mixes the weights of that arm's finished run with the teacher's (docs/arms.md)."""

    @property
    def own(self) -> tuple[str, ...]:
        """The three arms and the config's variants."""
        return (*ARMS, *self.variants)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The arms and variants that run."""
        return self.own if self.arms is None else self.arms

    def craft_settings(self, arm: str, craft: CraftConfig) -> dict[str, Any]:
        """What makes an arm or variant out of the config's section `craft`.

        An arm whose loss is counted in another unit does not inherit the budget: it has its own, or its unit's default.
        """
        if arm == "baseline":
            return {"enabled": False}
        if arm in self.variants:
            own = {"enabled": True, **self.variants[arm]}
            source = own.pop("interpolate", None)
            if source is not None:
                return self.craft_settings(source, craft)
            own = {key: value for key, value in own.items() if key not in ("adapter", "train")}
        else:
            own = {"enabled": True, "retention_mode": arm, **(self.token_ce if arm == "token_ce" else {})}
        unit = unit_of({**craft.model_dump(), **own})
        if unit is not None and unit.name != craft.epsilon_unit:
            own = {"epsilon_start": unit.default_budget, "epsilon_end": None} | own | {"epsilon_unit": unit.name}
        return own

    def interpolated(self, arm: str) -> str | None:
        """The arm whose finished runs a variant interpolates; None if it trains."""
        source: str | None = self.variants.get(arm, {}).get("interpolate")
        return source

    def train_settings(self, arm: str) -> dict[str, Any]:
        """What makes the section `train` of an arm or variant out of the config's."""
        source = self.interpolated(arm)
        return dict(self.variants.get(arm, {}).get("train", {})) if source is None else self.train_settings(source)

    def adapter_settings(self, arm: str, adapter: AdapterConfig | None) -> dict[str, Any] | None:
        """The section `adapter` of an arm or variant; None if it trains all weights."""
        source = self.interpolated(arm)
        if source is not None:
            return self.adapter_settings(source, adapter)
        settings = None if adapter is None else adapter.model_dump()
        if "adapter" not in self.variants.get(arm, {}):
            return settings
        own = self.variants[arm]["adapter"]
        return None if own is None else {**(settings or {}), **own}
