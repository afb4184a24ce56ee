"""When a compiled loop is worth loading: that takes 0.4 s, more than a command that asks a small index one query takes in all."""

from collections.abc import Callable
from typing import Any


class Compiled:
    """A loop of `kernels.py`, loaded once this process has met enough work for it.

    Args:
        name: the loop's.
        after: so many units of work (whatever is counted) are done without it.
    """

    def __init__(self, name: str, after: int) -> None:
        self._name, self._enough, self._met = name, after, 0

    def after(self, work: int) -> Callable[..., Any] | None:
        """The loop, or None while the work met so far, this included, is not enough."""
        self._met += work
        if self._met <= self._enough:
            return None
        from . import kernels

        return getattr(kernels, self._name)
