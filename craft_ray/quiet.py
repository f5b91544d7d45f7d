"""Keep libraries from printing bars and notices between our lines, and from taking longer to import than necessary."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any


@contextmanager
def uncollected() -> Iterator[None]:
    """Turn the garbage collector off while large libraries are imported, which makes that a fifth faster.

    Imported objects stay, and the collector would scan all of them again and again as they grow.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def quiet_libraries() -> None:
    """Turn off progress bars of transformers and datasets (unless on a terminal) and notices that need no action."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it reports kernels that this machine cannot use
    with uncollected():
        import datasets
        import huggingface_hub
        import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    # It warns about changing a view in place, which never happens to logits.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


@contextmanager
def importing() -> Iterator[None]:
    """Wraps the imports of a stage, which take most of the time of a short one."""
    with uncollected():
        quiet_libraries()
        yield


class _WithoutThread:
    """A text stream that drops what one thread writes."""

    def __init__(self, stream: Any, thread: int) -> None:
        self._stream = stream
        self._thread = thread

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def without_prints() -> Iterator[None]:
    """Drop what a library prints in this thread. Other threads still print: they show runs that are followed."""
    with redirect_stdout(_WithoutThread(sys.stdout, threading.get_ident())):
        yield
