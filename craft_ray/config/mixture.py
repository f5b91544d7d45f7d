"""The training data of the new skill: a source, or a mixture of several by weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from craft_ray.config.data import DataConfig, TaggedKinds, format_of, unused_left_out
from craft_ray.config.kinds import Kind
from craft_ray.config.types import Section

MOST = 1e6
"""The most that one weight may be of another: training goes through as many samples before each source had its part."""


class MixedData(Section):
    """A source of a mixture: the keys of a data section, and its weight."""

    weight: float = Field(1.0, gt=0)
    """Its part of the samples that training draws, relative to the other weights, however many rows it has; at most a
    million times another one."""
    data: DataConfig

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """`{path: x, weight: 2}` is written; `{weight: 2, data: {path: x}}` is what is saved."""
        if not isinstance(value, Mapping) or "data" in value:
            return value
        data = {key: inner for key, inner in value.items() if key != "weight"}
        return {"data": data, **({"weight": value["weight"]} if "weight" in value else {})}


class Mixture(Kind):
    """Several sources, of which training draws samples by weight."""

    key: ClassVar[str] = "format"
    tags: ClassVar[tuple[str, ...]] = ("mix",)
    noun: ClassVar[str] = "a mixture"

    mix: tuple[MixedData, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _within_reach(self) -> Mixture:
        by_weight = sorted(self.mix, key=lambda part: part.weight)
        least, most = by_weight[0], by_weight[-1]
        if most.weight > MOST * least.weight:
            raise ValueError(
                f"the weight {most.weight:g} of {most.data.path} is more than {MOST:,.0f} times the weight "
                f"{least.weight:g} of {least.data.path}, which would hardly ever be drawn: raise the smaller weight, "
                f"or leave its source out"
            )
        return self


def _kind(value: Any) -> str:
    if isinstance(value, Mixture) or (isinstance(value, Mapping) and "mix" in value):
        return "mix"
    return format_of(value)


def _only_mix(value: Any) -> Any:
    if not isinstance(value, Mapping) or "mix" not in value:
        return unused_left_out(value)
    others = [str(key) for key in value if key != "mix"]
    if others:
        raise ValueError(
            f"mix is a list of sources, and {', '.join(others)} beside it is of one: move it into the sources of mix"
        )
    return value


TaskConfig = Annotated[Annotated[Mixture, Tag("mix")] | TaggedKinds, Discriminator(_kind), BeforeValidator(_only_mix)]
