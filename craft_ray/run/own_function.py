"""A metric that a user wrote: `MODULE:FUNCTION`, run only because the config names it."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from craft_ray.data.cells import cut, shown
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError, first_line
from craft_ray.storage.files import checksum


class OwnFunction:
    """Scores a reply with the user's function.

    Args:
        name: MODULE:FUNCTION.
        folder: the folder of the module, if it is not installed.
        key: the section's key in the configuration, for errors.

    Raises:
        ConfigError: there is no such function, or it takes other arguments.
    """

    def __init__(self, name: str, folder: str, key: str) -> None:
        self._name = name
        self._key = f"{key}.function is {name}"
        module_name, _, function_name = name.partition(":")
        with _first_on_path(folder):
            module = self._imported(module_name, folder)
        function = getattr(module, function_name, None)
        if not callable(function):
            what = (
                "has no such function" if function is None else f"holds {shown(function)} there, which is no function"
            )
            raise ConfigError(f"{self._key}, but {module.__file__} {what}: correct the name")
        self._function: Callable[..., Any] = function
        self._with_row = self._takes(3)
        if not self._with_row and not self._takes(2):
            raise ConfigError(
                f"{self._key}, but {function_name}{inspect.signature(function)} takes other arguments: it is called "
                f"with (reply, response), or with (reply, response, row)"
            )
        self.identity = checksum(Path(module.__file__)) if module.__file__ else ""

    def check(self, expected: str, sample: Sample) -> None:
        """What it can compare is up to the user."""

    def __call__(self, reply: str, expected: str, sample: Sample) -> float:
        row = {"id": sample.id, "prompt": sample.prompt, "response": sample.answer(), "choices": sample.choices}
        try:
            value = self._function(reply, expected, *([row] if self._with_row else []))
        except Exception as error:
            raise DataError(f"metric {self._name} failed on {sample.where} ({_located(error)}): correct it") from None
        if not isinstance(value, Real) or not 0 <= float(value) <= 1:
            raise DataError(
                f"metric {self._name} returned {shown(value)} for {sample.where}: it must return a number from 0 to 1"
            )
        return float(value)

    def _imported(self, name: str, folder: str) -> ModuleType:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # an import inside the module fails
                raise ConfigError(
                    f"{self._key}, but the module does not import ({_located(error)}): correct it"
                ) from None
            raise ConfigError(
                f"{self._key}, but there is no module {name} in {folder}, and none is installed: correct the name, or "
                f"set the folder"
            ) from None
        except Exception as error:
            raise ConfigError(f"{self._key}, but the module does not import ({_located(error)}): correct it") from None

    def _takes(self, count: int) -> bool:
        try:
            inspect.signature(self._function).bind(*[None] * count)
        except TypeError:
            return False
        return True


@contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    """Import from a folder first, for as long as this lasts: its files must not stand in for the libraries that are
    imported later."""
    importlib.invalidate_caches()  # the file may be newer than what Python knows of the folder
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _located(error: Exception) -> str:
    """An error of the user's code with the line that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = next((f" at {frame.filename}:{frame.lineno}" for frame in reversed(frames) if frame.line), "")
    return f"{type(error).__name__}: {cut(first_line(error))}{where}"
