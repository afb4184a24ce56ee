"""Loading of compiled loops on demand, since it takes about a second of CPU time, more than a whole query of a small index."""

import sys
from collections.abc import Callable
from typing import Any


class Compiled:
    """A loop of `kernels.py` that is loaded once a process has done enough work without it to repay the loading, or has loaded another.

    Args:
        name: the name of the loop.
        least_work: the work that is done without the loop, in units of the caller.

    Attributes:
        loop: the loop; None before it is loaded.
    """

    def __init__(self, name: str, least_work: int) -> None:
        self._name = name
        self._least_work = least_work
        self._work = 0
        self.loop: Callable[..., Any] | None = None

    def if_worth(self, work: int) -> Callable[..., Any] | None:
        """Add to the process's work, and return the loop; None while the work is less than `least_work` and no loop is loaded."""
        self._work += work
        if self._work <= self._least_work and f"{__package__}.kernels" not in sys.modules:
            return None
        from . import kernels

        self.loop = getattr(kernels, self._name)
        return self.loop
