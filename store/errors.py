"""Every error that Wherefrom raises on purpose.

    WherefromError                  exit code 1
    ├── DataError                1   a document or a query file that cannot be used (also a ValueError)
    ├── NumericalError           1   a gradient or statistic that is not finite (also an ArithmeticError)
    ├── StorageError             1   the disk refused: full, read-only, no permission (also an OSError)
    ├── BusyError                1   somebody else is writing here, or won the race to publish
    ├── WorkerError              1   a worker process died more often than it is replaced
    ├── UsageError               2   an argument that cannot be meant (also a ValueError)
    ├── NotFoundError            3   no such file, index, model or row (also a FileNotFoundError)
    ├── IncompatibleError        3   it exists, but does not fit: another model, an unknown format version
    └── IntegrityError           4   stored bytes are not what was written

A message is one sentence or two that say what is wrong, where, and what to do. It names options as `batch_tokens`, which `cli.py` shows as
--batch-tokens; only `cli.py` turns an error into an exit code.
"""


class WherefromError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line exits with."""

    exit_code = 1

    def __str__(self) -> str:  # OSError and KeyError subclasses would otherwise print errno tuples or quotes
        return str(self.args[0]) if self.args else type(self).__name__


class DataError(WherefromError, ValueError):
    """A document, or a line of a file, that cannot be used."""


class NumericalError(WherefromError, ArithmeticError):
    """A gradient, eigenvalue or row that is not finite."""


class StorageError(WherefromError, OSError):
    """The file system refused a read or a write."""


class BusyError(WherefromError):
    """Another process holds the index, or published first; trying again later may succeed."""


class WorkerError(WherefromError, RuntimeError):
    """A worker process died and could not be replaced."""


class UsageError(WherefromError, ValueError):
    """An argument outside what it may be."""

    exit_code = 2


class NotFoundError(WherefromError, FileNotFoundError):
    """Something named does not exist."""

    exit_code = 3


class IncompatibleError(WherefromError, ValueError):
    """Something exists but does not fit this index or this version of Wherefrom."""

    exit_code = 3


class IntegrityError(WherefromError):
    """Stored bytes differ from what was written: truncated, flipped, missing."""

    exit_code = 4
