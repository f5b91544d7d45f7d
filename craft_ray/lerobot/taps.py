"""The residual stream of a transformer, captured at modules that every policy calls.

Policies with an action expert run the layers of both transformers side by side and never call a layer's own forward,
so a hook on a layer never fires there. They do call each block's first normalisation, and its input is the output of
the previous block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Taps:
    """Where the hidden states of a transformer are captured.

    They are indexed as in transformers: 0 is the embeddings, k the output of block k, the last one follows the final
    norm.
    """

    entries: Sequence[nn.Module]
    """For each block, the first module that receives the block's input."""
    norm: nn.Module
    """The final norm."""

    @property
    def count(self) -> int:
        return len(self.entries) + 1

    @contextmanager
    def capture(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """What passes the taps of `layers` while this is open, by layer."""
        seen: dict[int, Tensor] = {}
        hooks = [self._hook(layer, seen) for layer in layers]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, layer: int, seen: dict[int, Tensor]) -> Any:
        def enters(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[layer] = inputs[0]

        def leaves(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            # An adaptive norm also returns its gate.
            seen[layer] = output[0] if isinstance(output, tuple) else output

        if layer < len(self.entries):
            return self.entries[layer].register_forward_pre_hook(enters)
        return self.norm.register_forward_hook(leaves)
