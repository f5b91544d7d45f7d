"""How the arms are named and drawn: one colour and one marker each, everywhere in the report.

The colours are from Okabe and Ito's set, which people with any colour vision can distinguish
(https://jfly.uni-koeln.de/color/), except for the brown, which is darker than all of them, and the grey; the markers
distinguish the arms in print.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from craft_ray.config import MOST_VARIANTS
from craft_ray.errors import ConfigError


@dataclass(frozen=True)
class ArmStyle:
    """Name, colour (hex) and marker of an arm; the marker for matplotlib, and as an SVG path within 6 of the origin."""

    label: str
    color: str
    marker: str
    path: str


ARMS = {
    "baseline": ArmStyle("Plain fine-tuning", "#d55e00", "s", "M-4-4h8v8h-8Z"),
    "token_ce": ArmStyle("CRaFT token_ce", "#0f82c4", "^", "M0-5 5 4H-5Z"),
    "hidden": ArmStyle("CRaFT hidden", "#009e73", "o", "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0"),
}
_FIRST = (
    ("#cc79a7", "v", "M0 5 5-4H-5Z"),
    ("#56b4e9", "D", "M0-5 5 0 0 5-5 0Z"),
    ("#e69f00", "P", "M-1.8-5h3.6v3.2H5v3.6H1.8V5h-3.6V1.8H-5v-3.6h3.2Z"),
    ("#a0522d", "p", "M0-5 4.8-1.5 2.9 4h-5.8l-1.9-5.5Z"),
    ("#767676", "X", "M-5-3.4-3.4-5 0-1.6 3.4-5 5-3.4 1.6 0 5 3.4 3.4 5 0 1.6-3.4 5-5 3.4-1.6 0Z"),
)
VARIANTS = tuple(
    (color, marker, path)
    for shift in range(len(_FIRST))
    for (color, _, _), (_, marker, path) in zip(_FIRST, _FIRST[shift:] + _FIRST[:shift], strict=True)
)
"""The first five differ in both, the next in the combination."""
assert len(VARIANTS) == MOST_VARIANTS


def in_order(arms: Iterable[str]) -> list[str]:
    """Each arm once: baseline, token_ce, hidden, then the variants in the given order."""
    found = list(dict.fromkeys(arms))
    return [arm for arm in ARMS if arm in found] + [arm for arm in found if arm not in ARMS]


def styles_of(arms: Iterable[str]) -> dict[str, ArmStyle]:
    """How each of these arms is drawn, in the report's order.

    Raises:
        ConfigError: there are more variants than a report can distinguish.
    """
    order = in_order(arms)
    variants = [arm for arm in order if arm not in ARMS]
    if len(variants) > MOST_VARIANTS:
        raise ConfigError(
            f"the runs are of the variants {', '.join(variants)}, but a report can distinguish {MOST_VARIANTS}: "
            f"report fewer of them together"
        )
    own = {arm: ArmStyle(f"CRaFT {arm}", *drawn) for arm, drawn in zip(variants, VARIANTS, strict=False)}
    return {arm: (ARMS | own)[arm] for arm in order}
