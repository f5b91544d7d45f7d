"""How a command ends that was interrupted, or that was given a path that the system does not open: in one line."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import NoReturn

from craft_ray.errors import ConfigError, Interrupted
from craft_ray.interruption import MESSAGE

REFUSED = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP)
"""What the system says of a path itself: too long a name, no permission, links in a circle."""


def path_refused(error: BaseException) -> ConfigError | None:
    """The line for a path that the system does not open, whichever command and option named it; None for any other
    error."""
    if not isinstance(error, OSError) or error.errno not in REFUSED or error.filename is None:
        return None
    return ConfigError(f"{os.fsdecode(error.filename)} does not open ({error.strerror}): specify a path that does")


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
    """The interruption that an error follows from; of several the last one, which knows most about how to continue."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error
