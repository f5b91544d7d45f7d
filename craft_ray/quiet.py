"""Keep libraries from printing bars and notices between our lines, and from taking longer to import than necessary."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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
