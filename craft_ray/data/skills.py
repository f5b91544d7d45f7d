"""The anchors of a config: of one old skill, or of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from craft_ray.config import AnchorsConfig, SkillConfig
from craft_ray.data.cells import shown
from craft_ray.data.joined import JoinedSources
from craft_ray.data.place import Place
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source, open_source
from craft_ray.errors import DataError


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
    return SkillSources(parts, [f"skills.{name}.anchors" for name in parts])


class SkillSources(JoinedSources):
    """A source for each skill, whose name its anchors get."""

    def __getitem__(self, row: int) -> Sample:
        return replace(super().__getitem__(row), skill=self.names[self.part_of(row)])


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
    def has_image_lists(self) -> bool:
        return self._source.has_image_lists

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

    def place(self, row: int) -> Place:
        return self._source.place(row)

    def ids(self) -> Sequence[str]:
        return self._source.ids()
