"""Answers on a terminal: the question, a table of proponents and one of opponents, and how they were found."""

import textwrap
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .answers import Answer

_SHOWN_CHARACTERS = 240
_NARROW = 60


def show(answer: Answer) -> None:
    """Print an answer for people, as wide as the terminal is."""
    console = Console()
    for part in renderables(answer, narrow=console.width < _NARROW):
        console.print(part)


def renderables(answer: Answer, narrow: bool = False) -> Iterator[RenderableType]:
    """The parts of an answer, from top to bottom; on a narrow terminal without the ids."""
    q = answer.query
    asked = Text()
    if "completion" in q:
        asked.append(_printable(q["prompt"]))
        asked.append(_printable(q["completion"]).plain, style="bold underline")
    else:
        asked.append(_printable(q.get("text") or f"row {q['row']}"))
    yield Text("\n") + asked
    for title, found, colour in (("proponents", answer.proponents, "blue"), ("opponents", answer.opponents, "dark_orange")):
        table = Table(title=title, title_justify="left", title_style=f"bold {colour}", box=SIMPLE_HEAD, expand=True, pad_edge=False)
        table.add_column("#", justify="right", style="dim")
        table.add_column("score", justify="right", style=colour, no_wrap=True)
        if not narrow:
            table.add_column("id", no_wrap=True, max_width=28)
        table.add_column("text", ratio=1)
        for a in found:
            shown = _printable(textwrap.shorten(a.text, _SHOWN_CHARACTERS, placeholder=" …"))
            table.add_row(str(a.rank), f"{a.score:.4g}", *(() if narrow else (_printable(a.id),)), shown)
        if found:
            yield table
    s = answer.search
    searched = f"exact search of {s.rows:,} rows" if s.recall == 1.0 else f"{s.method} of {s.rows:,} rows, scores are estimates,"
    given = q["damping"]
    damping = ", ".join(f"{name} {value:g}" for name, value in given.items()) if isinstance(given, dict) else f"{given:g}"
    yield Text(
        f"{searched} in {s.seconds * 1000:.1f} ms; {q['mode']}, damping {damping}",
        style="dim",
    )


def _printable(text: str) -> Text:
    """Stored text without the control characters by which it could command the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))
