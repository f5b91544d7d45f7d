"""Modules in a job's working directory that shadow installed ones: Ray imports from there first."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path


def shadowed(folder: Path, copied: Iterable[Path]) -> list[str]:
    """Files and packages at the top of a copy that have the name of a module that this Python imports from elsewhere.

    A folder without `__init__.py` is not one of them: Python prefers a package of that name wherever it is.

    Args:
        folder: what is copied.
        copied: the files of the copy, by their paths below `folder`.
    """
    tops = {Path(path.parts[0]) for path in copied if path.name == "__init__.py" and len(path.parts) == 2}
    tops |= {path for path in copied if path.suffix == ".py" and len(path.parts) == 1}
    return sorted(top.name for top in tops if _elsewhere(top.stem, folder))


def _elsewhere(name: str, folder: Path) -> bool:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        return False
    return spec.origin in (None, "built-in", "frozen") or folder.resolve() not in Path(spec.origin).resolve().parents
