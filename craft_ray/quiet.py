"""Keep libraries from drawing bars and notices between our lines."""

from __future__ import annotations

import os
import sys
import warnings


def quiet_libraries() -> None:
    """No progress bars of transformers and datasets unless a person watches; no notices that need no action."""
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
