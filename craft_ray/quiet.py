"""Keep libraries from drawing bars and notices between our lines, and from taking longer to import than they need."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Around the import of large libraries: a fifth quicker without the garbage collector.

    What is imported stays, and while it grows the collector would look through all of it again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def quiet_libraries() -> None:
    """No progress bars of transformers and datasets unless a person watches; no notices that need no action."""
    with uncollected():
        import datasets
        import huggingface_hub
        import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
