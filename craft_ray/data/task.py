"""The samples of the new skill: one source, or a mixture."""

from __future__ import annotations

from craft_ray.config import HuggingFaceData, Mixture, TaskConfig
from craft_ray.data.joined import JoinedSources
from craft_ray.data.sampler import InOrder, MixtureSampler, Sampler, StepSampler
from craft_ray.data.source import Source, open_source, open_streamed
from craft_ray.data.streaming import StreamedSource


def open_task(config: TaskConfig) -> Source:
    """The samples of `task`; those of a mixture are concatenated.

    Raises:
        ConfigError: a source has nothing, or the sources of a mixture hold different kinds of samples.
        DataError: a source holds no row.
    """
    if isinstance(config, HuggingFaceData) and config.streaming:
        return open_streamed(config, "task")
    if not isinstance(config, Mixture):
        return open_source(config, "task")
    keys = [f"task.mix[{number}]" for number in range(len(config.mix))]
    parts = {str(number): open_source(part.data, keys[number]) for number, part in enumerate(config.mix)}
    return JoinedSources(parts, keys)


def sampler_of(config: TaskConfig, source: Source, batch_size: int, seed: int, stream: int) -> Sampler:
    """Which samples a step uses."""
    if isinstance(source, StreamedSource):  # its places are in an order already
        return InOrder(batch_size)
    if not isinstance(config, Mixture):
        return StepSampler(len(source), batch_size, seed, stream)
    assert isinstance(source, JoinedSources)
    rows = [len(part) for part in source.sources]
    return MixtureSampler(rows, [part.weight for part in config.mix], batch_size, seed, stream)


def rows_of(source: Source) -> int:
    """How many samples can be asked for in any order: all of them, or the first ones of a stream, which are kept."""
    return source.checkable() if isinstance(source, StreamedSource) else len(source)
