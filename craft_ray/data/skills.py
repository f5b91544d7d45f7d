"""The anchors of several old skills, one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from blake3 import blake3

from craft_ray.config import AnchorsConfig, SkillConfig
from craft_ray.data.cells import shown
from craft_ray.data.ids import Ids
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source, open_source
from craft_ray.errors import ConfigError, DataError


def open_anchor_source(anchors: AnchorsConfig, skills: Mapping[str, SkillConfig]) -> Source:
    """The anchors of a config: of one old skill, or of all `skills`.

    Raises:
        ConfigError: a source has nothing, or the sources hold different kinds of samples.
        DataError: a source holds no row.
    """
    if anchors.source is not None:
        source = open_source(anchors.source, "anchors.source")
        return NamedSkills(source, tuple(skills)) if skills else source
    parts = {}
    for name, skill in skills.items():
        assert skill.anchors is not None, "check_sources refuses a skill without anchors"
        parts[name] = open_source(skill.anchors, f"skills.{name}.anchors")
    return SkillSources(parts)


class NamedSkills:
    """One source whose rows say which skill they belong to."""

    def __init__(self, source: Source, skills: tuple[str, ...]) -> None:
        self._source = source
        self._skills = skills
        self.name = source.name
        self.has_responses, self.has_choices = source.has_responses, source.has_choices
        self.has_conversations = source.has_conversations

    @property
    def features(self) -> Mapping[str, tuple[int, ...]] | None:
        return self._source.features

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Sample:
        sample = self._source[row]
        if sample.skill not in self._skills:
            raise DataError(
                f"{sample.where}: the anchor belongs to the skill {shown(sample.skill)}, and the config names the "
                f"skills {', '.join(self._skills)}: add it there, or remove the row"
            )
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def ids(self) -> Sequence[str]:
        return self._source.ids()


class SkillSources:
    """A source for each skill, one after the other. The name of its skill leads an anchor's id."""

    def __init__(self, parts: Mapping[str, Source]) -> None:
        self._names, self._sources = list(parts), list(parts.values())
        self._starts = [0, *accumulate(len(source) for source in self._sources)]
        self.name = " + ".join(source.name for source in self._sources)
        for what in ("features", "has_conversations"):
            for name, source in parts.items():
                if getattr(source, what) != getattr(self._sources[0], what):
                    raise ConfigError(
                        f"skills.{self._names[0]}.anchors and skills.{name}.anchors hold different kinds of samples "
                        f"({what}: {getattr(self._sources[0], what)} and {getattr(source, what)}): one cache holds "
                        f"one kind"
                    )
        self.features = self._sources[0].features
        self.has_conversations = self._sources[0].has_conversations
        self.has_responses = all(source.has_responses for source in self._sources)
        self.has_choices = all(source.has_choices for source in self._sources)

    @property
    def fingerprint(self) -> str:
        named = [f"{n} {s.fingerprint}" for n, s in zip(self._names, self._sources, strict=True)]
        return blake3("\n".join(named).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> Sample:
        part = bisect_right(self._starts, row) - 1
        sample = self._sources[part][row - self._starts[part]]
        return replace(sample, id=f"{self._names[part]}/{sample.id}", skill=self._names[part])

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def ids(self) -> Sequence[str]:
        return Ids(f"{n}/{i}" for n, s in zip(self._names, self._sources, strict=True) for i in s.ids())
