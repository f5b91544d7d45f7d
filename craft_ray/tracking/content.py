"""The content that is sent to a tracker: parameters by flat keys, metrics, and never a password."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from craft_ray.run.metrics import Record

CREDENTIALS = re.compile(r"(?<=://)[^/\s]+@")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested sections by dotted keys, with passwords removed from addresses."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = _clean(value)
    return leaves


def _clean(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


def without_credentials(text: str) -> str:
    """The text with `user:password@` in addresses replaced by `***@`."""
    return CREDENTIALS.sub("***@", text)


def numbers(record: Record) -> dict[str, float]:
    """The metrics of a record: everything except its step and keys without a value."""
    return {key: float(value) for key, value in record.items() if key != "step" and value is not None}


def reason(error: BaseException, uri: str = "") -> str:
    """The start of an error's text; libraries append requests and tracebacks."""
    text = " ".join(str(error).partition("[SQL")[0].split()) or type(error).__name__
    text = without_credentials(text)
    password = urlsplit(uri).password
    if password:
        text = text.replace(password, "***").replace(unquote(password), "***")
    return text if len(text) <= 200 else text[:197] + "..."
