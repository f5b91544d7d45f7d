"""How an interrupted command ends: one line that says how to go on, and exit code 130."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn

from craft_ray.errors import Interrupted
from craft_ray.interruption import MESSAGE


def end_interrupted(error: BaseException) -> NoReturn:
    """End the process without Python's own clean-up, which can crash: threads of libraries may be anywhere."""
    found = interruption_in(error)
    message = found.message if isinstance(found, Interrupted) else MESSAGE
    print(f"craft-ray: {message}", file=sys.stderr)
    if "ray" in sys.modules:
        with suppress(Exception):
            sys.modules["ray"].shutdown()  # ends the processes of a cluster on this machine
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(Interrupted.exit_code)


def interruption_in(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interruption that an error follows from; of several the last one, which knows most about how to go on."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error
