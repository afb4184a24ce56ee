"""The errors that Wherefrom raises.

    WherefromError                  exit code 1
    ├── DataError                1   a document or a query file that cannot be used (also a ValueError)
    ├── NumericalError           1   a gradient or statistic that is not finite (also an ArithmeticError)
    ├── StorageError             1   a disk that is full or read-only, or no permission (also an OSError)
    ├── BusyError                1   another process is writing to the index, or published first
    ├── WorkerError              1   a worker process died too often
    ├── UsageError               2   an invalid argument (also a ValueError)
    ├── NotFoundError            3   a missing file, index, model or dataset (also a FileNotFoundError)
    ├── IncompatibleError        3   something that does not fit: another model, an unknown format version (also a ValueError)
    └── IntegrityError           4   stored bytes that are damaged or missing

A message is a sentence with the problem, its place and a remedy. It names options as `batch_tokens`, which `cli.py` replaces by the flag.
Only `cli.py` turns an error into an exit code.
"""


class WherefromError(Exception):
    """The base class of all errors; `exit_code` is the exit code of the command line."""

    exit_code = 1

    def __str__(self) -> str:  # OSError and KeyError subclasses would otherwise print errno tuples or quotes
        return str(self.args[0]) if self.args else type(self).__name__


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
