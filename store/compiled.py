"""Loading of compiled loops on demand, since it takes 0.4 s, more than a whole query of a small index."""

from collections.abc import Callable
from typing import Any


class Compiled:
    """A loop of `kernels.py` that is loaded after enough work in this process.

    Args:
        name: the name of the loop.
        after: the units of work that are done before without the loop.
    """

    def __init__(self, name: str, after: int) -> None:
        self._name = name
        self._enough = after
        self._met = 0

    def after(self, work: int) -> Callable[..., Any] | None:
        """Count units of work, and return the loop; None if the work so far, including this, is not enough."""
        self._met += work
        if self._met <= self._enough:
            return None
        from . import kernels

        return getattr(kernels, self._name)
