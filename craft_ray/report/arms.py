"""How the arms are named and drawn: one colour and one marker each, everywhere in the report.

The colours are of Okabe and Ito's set, which people with any colour vision can tell apart
(https://jfly.uni-koeln.de/color/); the markers tell the arms apart in print.
"""

from __future__ import annotations

from dataclasses import dataclass

from craft_ray.config import Arm


@dataclass(frozen=True)
class ArmStyle:
    """Name, colour (hex) and matplotlib marker of an arm."""

    label: str
    color: str
    marker: str


ARMS: dict[Arm, ArmStyle] = {
    "baseline": ArmStyle("Plain fine-tuning", "#d55e00", "s"),
    "token_ce": ArmStyle("CRaFT token_ce", "#0f82c4", "^"),
    "hidden": ArmStyle("CRaFT hidden", "#009e73", "o"),
}
