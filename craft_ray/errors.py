"""The errors that a user sees. Each is one line: both sides of what does not match, and the remedy.

A programmer's mistake is an assertion; a mistake that a user can cause and fix is one of these.
"""

LONGEST = 4000
"""Characters of a message. What is longer quotes a value of millions of characters somewhere in its middle."""


class CraftError(Exception):
    """An error that ends a command with a sentence instead of a traceback."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} ... ({len(line)} characters) ... {line[-LONGEST // 2 :]}"
        super().__init__(line)

    @property
    def message(self) -> str:
        return str(self.args[0])

    @classmethod
    def from_message(cls, message: str, exit_code: int) -> "CraftError":
        """An error that another process raised and passed on as a value."""
        error = cls(message)
        error.exit_code = exit_code
        return error


class ConfigError(CraftError):
    """The command line or the configuration is not valid."""

    exit_code = 2


class CacheRefused(CraftError):
    """The anchor cache is not the one that this model and configuration need, or it is damaged."""

    exit_code = 4


class DataError(CraftError):
    """A sample, an image or a loss that cannot be used."""


class ModelError(CraftError):
    """A model folder that does not load completely, or a model that cannot do what is requested."""


class StorageError(CraftError):
    """A file that could not be written; what was complete before is untouched."""


class Interrupted(KeyboardInterrupt):
    """A person or the system stopped the command; what was complete is kept.

    Not an `Exception`: a library's `except Exception` would swallow it, and the command would continue.
    """

    exit_code = 130

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    @property
    def message(self) -> str:
        return str(self.args[0])


def first_line(error: object) -> str:
    """A library's error message, cut to its first line, to quote in ours; the error's type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


NOT_MET = 3
"""Exit code of a command that finished, but whose retention budget was not met."""
