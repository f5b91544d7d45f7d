"""Paths in a config, absolute by their type: workers have another working directory.

Relative ones start from the folder `base` of pydantic's validation context, the working directory where there is none.
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


def _base(info: ValidationInfo) -> Path:
    return Path(info.context["base"]) if info.context else Path.cwd()


def _place(text: str) -> str:
    """A path or a hub name as it is; of an object store one that holds neither settings nor secrets."""
    if "://" not in text:
        return text
    if not text.startswith(OBJECTS):
        raise ValueError(f"'{text}' is no place that is known: name a path (of a mount, too) or {OBJECTS}BUCKET/KEY")
    if re.search(r"[?@]", text) or not re.match(rf"{OBJECTS}[^/]+", text):
        raise ValueError(
            f"'{text.split('@')[-1]}' has to be {OBJECTS}BUCKET/KEY alone: credentials, region and endpoint come from "
            f"the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL)"
        )
    return text.rstrip("/")


def _folder(text: str, info: ValidationInfo) -> str:
    """A folder, which may be one that a command makes."""
    return text if text.startswith(OBJECTS) else _absolute(text, info)


def _path_or_hub_name(text: str, info: ValidationInfo) -> str:
    """Absolute where something lies there, or where it is written as a path; otherwise the name of something on a
    hub."""
    if text.startswith(OBJECTS):
        return text
    path = _base(info) / Path(text).expanduser()
    if text.startswith(("~", "./", "../")) or path.exists() or glob.glob(str(path)):
        return _absolute(text, info)
    return text


def _absolute(text: str, info: ValidationInfo) -> str:
    return os.path.normpath((_base(info) / Path(text).expanduser()).absolute())


def _tracking_uri(text: str, info: ValidationInfo) -> str:
    """Of SQLite's URIs, four slashes begin an absolute path and three a relative one."""
    if not text.startswith(SQLITE) or text.startswith(SQLITE + "/"):
        return text
    return SQLITE + os.path.abspath(_base(info) / text.removeprefix(SQLITE))


PathOrHubName = Annotated[str, AfterValidator(_place), AfterValidator(_path_or_hub_name)]
"""What is read: a path on a disk or a shared mount, `s3://bucket/key`, or a hub name."""
FolderPath = Annotated[str, AfterValidator(_place), AfterValidator(_folder)]
"""What may be written: a folder on a disk or a shared mount, or `s3://bucket/key`."""
TrackingUri = Annotated[str, AfterValidator(_tracking_uri)]
"""MLflow's, as text: a server's address, or `sqlite:///` and a path."""
