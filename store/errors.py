"""Every error that Whence raises on purpose.

    WhenceError                  exit code 1
    ├── DataError                1   a document or a query file that cannot be used (also a ValueError)
    ├── NumericalError           1   a gradient or statistic that is not finite (also an ArithmeticError)
    ├── StorageError             1   the disk refused: full, read-only, no permission (also an OSError)
    ├── BusyError                1   somebody else is writing here, or won the race to publish
    ├── WorkerError              1   a worker process died more often than it is replaced
    ├── UsageError               2   an argument that cannot be meant (also a ValueError)
    ├── NotFoundError            3   no such file, index, model or row (also a FileNotFoundError)
    ├── IncompatibleError        3   it exists, but does not fit: another model, an unknown format version
    └── IntegrityError           4   stored bytes are not what was written

A message is one sentence or two that say what is wrong, where, and what to do. The library raises; only `cli.py` turns an
error into an exit code.
"""


class WhenceError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line exits with."""

    exit_code = 1

    def __str__(self) -> str:  # OSError and KeyError subclasses would otherwise print errno tuples or quotes
        return str(self.args[0]) if self.args else type(self).__name__


class DataError(WhenceError, ValueError):
    """A document, or a line of a file, that cannot be used."""


class NumericalError(WhenceError, ArithmeticError):
    """A gradient, eigenvalue or row that is not finite."""


class StorageError(WhenceError, OSError):
    """The file system refused a read or a write."""


class BusyError(WhenceError):
    """Another process holds the index, or published first; trying again later may succeed."""


class WorkerError(WhenceError, RuntimeError):
    """A worker process died and could not be replaced."""


class UsageError(WhenceError, ValueError):
    """An argument outside what it may be."""

    exit_code = 2


class NotFoundError(WhenceError, FileNotFoundError):
    """Something named does not exist."""

    exit_code = 3


class IncompatibleError(WhenceError, ValueError):
    """Something exists but does not fit this index or this version of Whence."""

    exit_code = 3


class IntegrityError(WhenceError):
    """Stored bytes differ from what was written: truncated, flipped, missing."""

    exit_code = 4
