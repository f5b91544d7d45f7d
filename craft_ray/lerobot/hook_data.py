"""What CRaFT changes in the data of LeRobot's loop: the statistics of the normaliser, and the order on resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def with_own_statistics(own: Callable[..., Any], **arguments: Any) -> Any:
    """Around `make_pre_post_processors`: LeRobot's processors keep the teacher's statistics, which LeRobot would
    replace with those of the new data set."""
    for name in ("preprocessor_overrides", "postprocessor_overrides"):
        for step in ("normalizer_processor", "unnormalizer_processor"):
            arguments.get(name, {}).get(step, {}).pop("stats", None)
    return own(**arguments)


class SampleOrder:
    """The order of samples when a run resumes after its first epoch.

    LeRobot passes its sampler the epoch of a checkpoint. Accelerate's data loader counts epochs from zero
    in each process, and sets the sampler back to the first one as soon as it is iterated. So the epoch is also set on
    the loader.
    """

    def __init__(self) -> None:
        self._epoch = 0

    def compute_sampler_state(self, own: Callable[..., dict[str, int]], *arguments: Any) -> dict[str, int]:
        """Around the function of this name, which only a resumed run calls: what LeRobot's sampler loads."""
        state = own(*arguments)
        self._epoch = state["epoch"]
        return state

    def cycle(self, own: Callable[[Any], Iterator[Any]], dataloader: Any) -> Iterator[Any]:
        """Around the function of this name: the endless iterator over accelerate's loader."""
        dataloader.iteration, self._epoch = self._epoch, 0
        return own(dataloader)
