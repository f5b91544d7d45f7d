"""What a user can be told. Each error is one line: both sides of what does not match, and the remedy.

A programmer's mistake is an assertion; what a user can cause and mend is one of these.
"""


class CraftError(Exception):
    """Anything that ends a command with a sentence instead of a traceback."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    @property
    def message(self) -> str:
        return str(self.args[0])

    @classmethod
    def told(cls, message: str, exit_code: int) -> "CraftError":
        """An error that another process met and handed over as a value."""
        error = cls(message)
        error.exit_code = exit_code
        return error


class ConfigError(CraftError):
    """The command line or the configuration cannot mean anything."""

    exit_code = 2


class CacheRefused(CraftError):
    """The anchor cache is not the one that this model and configuration need, or it is damaged."""

    exit_code = 4


class DataError(CraftError):
    """A sample, an image or a loss that cannot be used."""


class ModelError(CraftError):
    """A model folder that does not load completely, or a model that cannot do what is asked."""


class StorageError(CraftError):
    """A file that could not be written; what was complete before is untouched."""


class Interrupted(CraftError):
    """A person ended the command; what was complete is kept."""

    exit_code = 130


def first_line(error: object) -> str:
    """What a library says went wrong, in one line; the error's type where it says nothing. For a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


NOT_MET = 3
"""Exit code of a command that finished, but whose retention budget was not met."""
