"""What can be seen of a submitted command before anything is uploaded: its `craft-ray` commands with their configs, and
the paths at which a job would write into its own copy of the working directory."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from craft_ray.config import load_config
from craft_ray.errors import ConfigError
from craft_ray.storage.paths import is_object

SEPARATORS = frozenset({"&&", "||", ";", "|", "&"})
"""Words between the commands of a line for the shell."""
CONFIGS = (".yaml", ".yml")
WRITING = ("train", "compare", "sweep", "build")
"""Stages that write where their config says."""
RELATIVE = Path("/relative-to-the-job")
"""Represents the working directory in resolved paths; nothing else is below it."""


@dataclass(frozen=True)
class Submitted:
    """A `craft-ray` command of a job."""

    words: list[str]
    """The words after `craft-ray`."""
    config: str | None
    """Its config, if that is named relative to the working directory."""
    overrides: list[str]

    @property
    def stage(self) -> str | None:
        """The stage, if it writes where its config says."""
        return next((word for word in self.words[:2] if word in WRITING), None)

    def option(self, name: str) -> str | None:
        for word, following in zip(self.words, [*self.words[1:], ""], strict=True):
            if word == name:
                return following
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
        return None


def submitted(command: Sequence[str]) -> Iterator[Submitted]:
    """The `craft-ray` commands of a job, up to its first other one: after that (`cd`, a script) the working directory
    or its files may be different, and only the cluster knows.

    Args:
        command: its words; a single one is a line for the shell.
    """
    words = _shell_words(command[0]) if len(command) == 1 else list(command)
    start = 0
    for end in [i for i, word in enumerate(words) if word in SEPARATORS] + [len(words)]:
        part, start = words[start:end], end + 1
        if not part or Path(part[0]).name != "craft-ray":
            return
        name = next((word for word in part if word.endswith(CONFIGS) and "=" not in word), None)
        if name is None or Path(name).is_absolute() or part[part.index(name) - 1].startswith("--"):
            yield Submitted(part[1:], None, [])
            continue
        following = part[part.index(name) + 1 :]
        yield Submitted(part[1:], name, [word for word in following if "=" in word and not word.startswith("-")])


def _shell_words(line: str) -> list[str]:
    """The words and operators of a line; none of one that needs a shell to be understood."""
    if any(character in line for character in "$`(){}<>\n"):
        return []
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # an open quote, which the shell will report
        return []


def check_outputs(command: Sequence[str], folder: Path) -> None:
    """Refuse a `craft-ray` command whose results would be deleted with the job. A config that is not in the folder is
    left to `check_inputs`.

    Args:
        folder: the working directory that is uploaded.

    Raises:
        ConfigError: such a path is relative, or the config has a mistake.
    """
    for each in submitted(command):
        out = each.option("--out")
        if out is not None and not Path(out).is_absolute() and not is_object(out):
            raise _lost("--out", out)
        if each.config is None or each.stage is None or not (folder / each.config).is_file():
            continue
        experiment = load_config(folder / each.config, each.overrides, base=RELATIVE)
        written = {"craft.anchor_cache_dir": experiment.craft.anchor_cache_dir}
        if each.stage != "build" and out is None:
            written["output_dir"] = experiment.output_dir
        for key, path in written.items():
            if path is not None and not is_object(path) and Path(path).is_relative_to(RELATIVE):
                raise _lost(key, str(Path(path).relative_to(RELATIVE)))


def _lost(key: str, path: str) -> ConfigError:
    return ConfigError(
        f"{key} is {path}, which is in the working directory that is uploaded with the job and deleted after it: use "
        f"an absolute path on storage that all nodes share, or s3://BUCKET/FOLDER"
    )
