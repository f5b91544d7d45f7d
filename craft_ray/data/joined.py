"""Several sources as one: their samples concatenated."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from blake3 import blake3

from craft_ray.data.ids import Ids
from craft_ray.data.place import Place
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source
from craft_ray.errors import ConfigError


class JoinedSources:
    """Concatenated sources, by name. A sample's id starts with the name of its source.

    Args:
        keys: each source's key in the configuration, for errors.

    Raises:
        ConfigError: they hold different kinds of samples.
    """

    def __init__(self, parts: Mapping[str, Source], keys: Sequence[str]) -> None:
        self.names, self.sources = list(parts), list(parts.values())
        self.starts = [0, *accumulate(len(source) for source in self.sources)]
        self.name = " + ".join(source.name for source in self.sources)
        first = self.sources[0]
        for what in ("features", "has_conversations", "has_responses"):
            for key, source in zip(keys, self.sources, strict=True):
                if getattr(source, what) != getattr(first, what):
                    raise ConfigError(
                        f"{keys[0]} and {key} hold different kinds of samples ({what}: {getattr(first, what)} and "
                        f"{getattr(source, what)}): give sources of one kind"
                    )
        self.features = first.features
        self.has_conversations, self.has_responses = first.has_conversations, first.has_responses
        self.has_choices = all(source.has_choices for source in self.sources)

    @property
    def has_image_lists(self) -> bool:
        return any(source.has_image_lists for source in self.sources)

    @property
    def fingerprint(self) -> str:
        named = [f"{name} {source.fingerprint}" for name, source in zip(self.names, self.sources, strict=True)]
        return blake3("\n".join(named).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: int) -> Sample:
        part = self.part_of(row)
        sample = self.sources[part][row - self.starts[part]]
        return replace(sample, id=f"{self.names[part]}/{sample.id}")

    def place(self, row: int) -> Place:
        part = self.part_of(row)
        return self.sources[part].place(row - self.starts[part])

    def part_of(self, row: int) -> int:
        """The index of the source that a row comes from."""
        return bisect_right(self.starts, row) - 1

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def ids(self) -> Sequence[str]:
        parts = zip(self.names, self.sources, strict=True)
        return Ids(f"{name}/{id_}" for name, source in parts for id_ in source.ids())
