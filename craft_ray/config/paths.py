"""Paths in a config, which their types make absolute: workers have another working directory.

Relative ones start from the folder `base` of pydantic's validation context, or from the working directory without one.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

SQLITE = "sqlite:///"
OBJECTS = "s3://"


def matching(path: str | Path) -> list[Path]:
    """The file or folder of that name; if there is none, what matches the glob pattern, sorted.

    Each part of the path is a name where something has that name, and a pattern only otherwise: `run[1]/*.jsonl` are
    the files in the folder `run[1]`.
    """
    parts = Path(path).parts
    found = [Path(parts[0])] if Path(path).is_absolute() else [Path()]
    for part in parts[1:] if Path(path).is_absolute() else parts:
        below = []
        for folder in found:
            named = folder / part
            below += [named] if os.path.lexists(named) else [folder / name for name in glob.glob(part, root_dir=folder)]
        found = below
    return sorted(file for file in found if file.exists())


def _base(info: ValidationInfo) -> Path:
    return Path(info.context["base"]) if info.context else Path.cwd()


def _location(text: str) -> str:
    """Check that a path or hub name has a known scheme and, in an object store, neither settings nor secrets."""
    if not text.strip():
        raise ValueError("it is empty: specify a path or a name")
    if "://" not in text:
        return text
    if not text.startswith(OBJECTS):
        raise ValueError(f"'{text}' has an unknown scheme: specify a path (disk or mount) or {OBJECTS}BUCKET/KEY")
    if re.search(r"[?@]", text) or not re.match(rf"{OBJECTS}[^/]+", text):
        raise ValueError(
            f"'{text.split('@')[-1]}' has to be {OBJECTS}BUCKET/KEY only: credentials, region and endpoint come from "
            f"the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL)"
        )
    return text.rstrip("/")


def _expanded(text: str) -> Path:
    """A path with the folder of a user in place of `~`."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"'{text}' starts at the folder of a user who is not known here: write the path out") from None


def _folder(text: str, info: ValidationInfo) -> str:
    """The absolute path of a folder, which need not exist yet."""
    return text if text.startswith(OBJECTS) else _absolute(text, info)


def _path_or_hub_name(text: str, info: ValidationInfo) -> str:
    """Absolute if something exists there, or if it is written as a path; otherwise a hub name."""
    if text.startswith(OBJECTS):
        return text
    path = _base(info) / _expanded(text)
    if text.startswith(("~", "./", "../")) or matching(path):
        return _absolute(text, info)
    return text


def _absolute(text: str, info: ValidationInfo) -> str:
    return os.path.normpath((_base(info) / _expanded(text)).absolute())


def _tracking_uri(text: str, info: ValidationInfo) -> str:
    """Make a SQLite URI absolute: four slashes start an absolute path, three a relative one."""
    if not text.startswith(SQLITE) or text.startswith(SQLITE + "/"):
        return text
    return SQLITE + os.path.abspath(_base(info) / text.removeprefix(SQLITE))


PathOrHubName = Annotated[str, AfterValidator(_location), AfterValidator(_path_or_hub_name)]
"""An input: a path on a disk or a shared mount, `s3://bucket/key`, or a hub name."""
FolderPath = Annotated[str, AfterValidator(_location), AfterValidator(_folder)]
"""A folder that may be written: on a disk or a shared mount, or `s3://bucket/key`."""
TrackingUri = Annotated[str, AfterValidator(_tracking_uri)]
"""MLflow's URI as text: a server's address, or `sqlite:///` and a path."""
