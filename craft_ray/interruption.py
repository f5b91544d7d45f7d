"""Ctrl-C and SIGTERM: the first one raises `Interrupted` where the main thread is, the second one ends the process.

A library may swallow even that: in a callback of C code, or with `except BaseException`. So it is remembered that there
was a signal, and what takes long asks at each of its steps (`check`).
"""

from __future__ import annotations

import signal

from craft_ray.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MESSAGE = "interrupted: complete results are kept, the same command (train: with --resume RUN) resumes"

_listening = False
_signalled = False


def listen() -> None:
    """Let the first signal interrupt this process. Only the main thread may call this."""
    global _listening
    _listening = True
    if _signalled:
        return
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def listen_again() -> None:
    """Restore what a library has replaced: `ray.init` lets SIGTERM end the process with the exit code 15."""
    if _listening:
        listen()


def signalled() -> bool:
    """Whether a signal has come, even if a library swallowed what it raised."""
    return _signalled


def check() -> None:
    """
    Raises:
        Interrupted: a signal has come, and a library swallowed what it raised.
    """
    if _signalled:
        raise Interrupted(MESSAGE)


def _interrupt(*_: object) -> None:
    global _signalled
    _signalled = True
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    raise Interrupted(MESSAGE)
