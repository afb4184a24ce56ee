"""The errors that Wherefrom raises.

A message is a sentence with the problem, its place and a remedy. It names options as `batch_tokens`, which `cli.py` replaces by the flag.
Only `cli.py` turns an error into an exit code.
"""


class WherefromError(Exception):
    """The base class of all errors; `exit_code` is the exit code of the command line."""

    exit_code = 1

    def __str__(self) -> str:  # OSError and KeyError subclasses would otherwise print errno tuples or quotes
        return str(self.args[0]) if self.args else type(self).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of any error's message; the name of its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class DataError(WherefromError, ValueError):
    """A document, or a line of a file, that cannot be used."""


class NumericalError(WherefromError, ArithmeticError):
    """A gradient, eigenvalue or row that is not finite."""


class StorageError(WherefromError, OSError):
    """A read or a write that failed: a full or read-only disk, or no permission."""


class BusyError(WherefromError):
    """Another process is writing to the index, or published first; a later attempt may succeed."""


class WorkerError(WherefromError, RuntimeError):
    """A worker process that died too often to be replaced."""


class UsageError(WherefromError, ValueError):
    """An invalid argument."""

    exit_code = 2


class NotFoundError(WherefromError, FileNotFoundError):
    """A file, index, model or dataset that does not exist."""

    exit_code = 3


class IncompatibleError(WherefromError, ValueError):
    """A model, tokenizer or index that does not fit the index or this version of Wherefrom."""

    exit_code = 3


class IntegrityError(WherefromError):
    """Stored bytes that are damaged or missing."""

    exit_code = 4
