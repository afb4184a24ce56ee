"""Progress on standard error: a bar with rates and time left on a terminal, one line for each finished stage elsewhere."""

import sys
import time
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from ..store.printable import printable

if TYPE_CHECKING:
    from rich.progress import Progress


class Reporter(Protocol):
    """Hears of a build's stages; `total` is in examples, None where it is not known beforehand."""

    def stage(self, name: str, total: int | None) -> None:
        """A stage begins (and the one before it has ended)."""

    def update(self, examples: int, tokens: int) -> None:
        """The stage has so far worked through so many examples and tokens."""

    def note(self, sentence: str) -> None:
        """Something that whoever reads the answers should know, which is not an error."""


class Silent:
    """A Reporter for callers that want none."""

    def stage(self, name: str, total: int | None) -> None:
        """Ignore it."""

    def update(self, examples: int, tokens: int) -> None:
        """Ignore it."""

    def note(self, sentence: str) -> None:
        """Say it as a warning."""
        warnings.warn(sentence, stacklevel=3)


class Console:
    """Bars on a terminal, lines elsewhere; a context manager, so that the last stage is closed."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bars: Progress | None = None
        self._name = ""
        self._started = self._updated = time.monotonic()
        self._done = (0, 0)

    def __enter__(self) -> "Console":
        if self._stream.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description:>22}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rates]}"),
                TimeRemainingColumn(),
                console=RichConsole(file=self._stream),
            )
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close(finished=kind is None)
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str, total: int | None) -> None:
        """Close the running stage and open another."""
        self._close(finished=True)
        self._name, self._started, self._done = name, time.monotonic(), (0, 0)
        self._updated = self._started
        if self._bars is None:
            print(f"{name} ...", file=self._stream, flush=True)
        else:
            self._task = self._bars.add_task(name, total=total, rates="")

    def update(self, examples: int, tokens: int) -> None:
        """Show how far the stage is."""
        self._done, self._updated = (examples, tokens), time.monotonic()
        if self._bars is not None:
            self._bars.update(self._task, completed=examples, rates=self._rates())

    def note(self, sentence: str) -> None:
        """Print it, above the bars."""
        text = f"Note: {printable(sentence)}"
        if self._bars is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bars.console.print(text, markup=False, highlight=False)

    def _rates(self) -> str:
        seconds = max(1e-9, self._updated - self._started)
        examples, tokens = self._done
        return (
            f"{examples / seconds:,.0f} examples/s, {tokens / seconds:,.0f} tokens/s" if tokens else f"{examples / seconds:,.0f} examples/s"
        )

    def _close(self, finished: bool) -> None:
        if self._name and finished and self._bars is None:
            examples, tokens = self._done
            counted = f"{examples:,} examples" + (f", {tokens:,} tokens" if tokens else "")
            print(f"{self._name}: {counted} ({self._rates()})", file=self._stream, flush=True)
        elif self._name and finished and self._bars is not None:
            self._bars.update(self._task, total=self._done[0], completed=self._done[0], rates=self._rates())
        self._name = ""
