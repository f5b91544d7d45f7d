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
    """Which of `baseline`, `token_ce`, `hidden` and the variants run. Default: all."""
    seeds: Annotated[tuple[int, ...], AfterValidator(distinct)] = (0, 1, 2)
    parallel: int | None = Field(None, ge=1)
    """Concurrent runs, each with its own model in memory. Default: as many as the cluster has room for."""
    token_ce: dict[str, Any] = {}
    """`craft` settings in which the token_ce arm differs, e.g. `{epsilon_start: 0.1}`: nats, not squares."""
    variants: Annotated[dict[VariantName, dict[str, Any]], Field(max_length=MOST_VARIANTS)] = {}
    """Additional constrained arms by name, each with the `craft` settings in which it differs from the config, e.g.
    `{hidden_prefix: {retention_mode: hidden, positions: [vision_mean, text_last]}}`. The key `adapter` changes the
    section of that name: `{full: {adapter: null}, low_rank: {adapter: {r: 4}}}`."""

    @property
    def chosen(self) -> tuple[str, ...]:
        """The arms and variants that run."""
        return (*ARMS, *self.variants) if self.arms is None else self.arms

    def craft_settings(self, arm: str, craft: CraftConfig) -> dict[str, Any]:
        """What makes an arm or variant out of the config's section `craft`.

        An arm whose loss is counted in another unit does not inherit the budget: it has its own, or its unit's default.
        """
        if arm == "baseline":
            return {"enabled": False}
        if arm in self.variants:
            own = {"enabled": True, **self.variants[arm]}
            own.pop("adapter", None)
        else:
            own = {"enabled": True, "retention_mode": arm, **(self.token_ce if arm == "token_ce" else {})}
        unit = unit_of({**craft.model_dump(), **own})
        if unit is not None and unit.name != craft.epsilon_unit:
            own = {"epsilon_start": unit.default_budget, "epsilon_end": None} | own | {"epsilon_unit": unit.name}
        return own

    def adapter_settings(self, arm: str, adapter: AdapterConfig | None) -> dict[str, Any] | None:
        """The section `adapter` of an arm or variant; None if it trains all weights."""
        settings = None if adapter is None else adapter.model_dump()
        if "adapter" not in self.variants.get(arm, {}):
            return settings
        own = self.variants[arm]["adapter"]
        return None if own is None else {**(settings or {}), **own}
