"""Dropout, off in training mode: what draws random numbers in a forward pass is found by watching the generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

SETTLED_AFTER = 4
"""Passes until no new part draws; a part that was skipped at random (layer dropout) is found in a later one."""

Output = TypeVar("Output")


def disable_dropout(module: nn.Module) -> None:
    """Set the probabilities of dropout that a module itself declares to zero: its dropout layers, and its attributes
    for functional dropout, by whatever name. What reads them from elsewhere is found by `silence`."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for name, value in part.__dict__.items():
            if "drop" in name.lower() and isinstance(value, float):
                setattr(part, name, 0.0)


def silence(
    module: nn.Module, forward: Callable[[], Output], device: torch.device, on_purpose: Set[nn.Module] = frozenset()
) -> Output:
    """Run `forward` until no part of `module` draws random numbers any more, and return its last output.

    A part that draws runs its own code as in evaluation mode from now on, whatever its mode is; the mode of the parts
    in it, and what its caller reads from it (gradient checkpointing does), do not change.

    Args:
        on_purpose: parts that may go on drawing.
    """
    silent: set[nn.Module] = set()
    for _ in range(SETTLED_AFTER):
        with drawing(module, device) as found:
            output = forward()
        found -= on_purpose
        if found <= silent:
            break
        for part in found - silent:
            part.register_forward_pre_hook(_enter_evaluation)
            part.register_forward_hook(_leave_evaluation, always_call=True)
        silent |= found
    return output


def _enter_evaluation(part: nn.Module, _inputs: Any) -> None:
    part.mode_outside, part.training = part.training, False  # type: ignore[assignment]


def _leave_evaluation(part: nn.Module, _inputs: Any, _output: Any) -> None:
    part.training = bool(part.mode_outside)


@contextmanager
def drawing(module: nn.Module, device: torch.device) -> Iterator[set[nn.Module]]:
    """The parts of `module` that draw random numbers from torch's generators while the block runs, each in its own
    forward and not in that of a part of it."""
    found: set[nn.Module] = set()
    running: list[nn.Module] = []
    state = _generators(device)

    def moved() -> None:
        nonlocal state
        before, state = state, _generators(device)
        if running and not all(map(torch.equal, before, state)):
            found.add(running[-1])

    def enter(part: nn.Module, _inputs: Any) -> None:
        moved()
        running.append(part)

    def leave(_part: nn.Module, _inputs: Any, _output: Any) -> None:
        moved()
        running.pop()

    hooks = [part.register_forward_pre_hook(enter) for part in module.modules()]
    hooks += [part.register_forward_hook(leave, always_call=True) for part in module.modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _generators(device: torch.device) -> list[Tensor]:
    """The states of the generators that a forward pass on `device` may use."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
