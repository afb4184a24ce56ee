"""Progress on standard error: a bar with rates and time left on a terminal, one line for each finished stage elsewhere."""

import io
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..store.printable import printable

_NOTEBOOK_SECONDS = 0.2

if TYPE_CHECKING:
    from rich.progress import Progress


@runtime_checkable
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

    def __init__(self, stream: io.TextIOBase | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bars: Progress | None = None
        self._name = ""
        self._started = self._updated = time.monotonic()
        self._done = (0, 0)

    def __enter__(self) -> "Console":
        if self._stream.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            self._bars = Progress(
                TextColumn("{task.description:>22}"),
                BarColumn(),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),  # where there is little room, the bar gets shorter
                TextColumn("{task.fields[rates]}"),
                TimeRemainingColumn(),
                console=RichConsole(file=self._stream),  # type: ignore[arg-type]
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
        self._name = name
        self._started = time.monotonic()
        self._done = (0, 0)
        self._updated = self._started
        if self._bars is None:
            print(f"{name} ...", file=self._stream, flush=True)
        else:
            self._task = self._bars.add_task(name, total=total, rates="")

    def update(self, examples: int, tokens: int) -> None:
        """Show how far the stage is."""
        self._done = (examples, tokens)
        self._updated = time.monotonic()
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


class Notebook:
    """One line of progress in a notebook cell, rewritten in place; a context manager."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._stage = ""
        self._total: int | None = None
        self._shown = 0.0
        self._handle: Any = None

    def __enter__(self) -> "Notebook":
        from IPython.display import Pretty, display

        self._handle = display(Pretty(""), display_id=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._show("done" if kind is None else "stopped")

    def stage(self, name: str, total: int | None) -> None:
        """Begin a stage."""
        self._stage = name
        self._total = total
        self._show(name)

    def update(self, examples: int, tokens: int) -> None:
        """Show how far the stage is, at most five times a second."""
        if time.monotonic() - self._shown > _NOTEBOOK_SECONDS:
            self._show(f"{self._stage}: {examples:,}" + (f" of {self._total:,}" if self._total else "") + " examples")

    def note(self, sentence: str) -> None:
        """Keep a note above the line."""
        self._lines.append(f"Note: {printable(sentence)}")

    def _show(self, line: str) -> None:
        from IPython.display import Pretty

        self._shown = time.monotonic()
        self._handle.update(Pretty("\n".join([*self._lines, line])))


def default_reporter() -> "Console | Notebook":
    """A reporter for where the process runs: in a notebook its cell, else standard error."""
    shell = sys.modules.get("IPython")
    if shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell":
        return Notebook()
    return Console()


def reporting(reporter: Reporter | None) -> AbstractContextManager[Reporter]:
    """Return a context with a reporter, by default one for where the process runs."""
    return default_reporter() if reporter is None else nullcontext(reporter)
