"""An adapter that is trained in place of the model's own weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from craft_ray.config.types import Fraction, Section


class AdapterConfig(Section):
    """An adapter (Hu et al., arXiv 2106.09685): the model's own weights stay frozen, and only the adapter is trained.
    The keys are those of PEFT's `LoraConfig`, without `lora_` (docs/lora.md; needs the extra `lora`)."""

    kind: Literal["lora"] = "lora"
    r: int = Field(8, ge=1)
    """Rank of the update of a layer."""
    alpha: int = Field(8, ge=1)
    """The update is scaled by alpha / r, or by alpha / sqrt(r) with `use_rslora`."""
    dropout: Fraction = 0.0
    """Dropout of the adapter's input. It needs `model.disable_dropout: false`."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: a list of names or ends of names (`[q_proj, v_proj]`), a regular expression that
    matches a whole name, or `all-linear`: every linear layer that full training would change, without the output
    layer."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained as a whole, by name or end of name, and saved with the adapter."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    use_dora: bool = False
    """Magnitude and direction are updated separately (DoRA, arXiv 2402.09353)."""
    init: Literal[True, "gaussian"] = True
    """Initial value of the first matrix: PEFT's default (Kaiming), or `gaussian`. The second matrix is zero, so that
    the untouched student is the teacher; initialisations that change the model's own weights are not supported."""
