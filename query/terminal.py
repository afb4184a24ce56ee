"""Answers on a terminal: the question, a table of proponents and one of opponents, and how they were found."""

import textwrap
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .answers import Answer
from .groups import Group

_SHOWN_CHARACTERS = 240
_NARROW = 60
_SHOWN_GROUPS = 10
_SHOWN_IDS = 5


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
        if "against" in q:
            asked.append(" rather than ", style="dim")
            asked.append(_printable(q["against"]).plain, style="underline")
    else:
        asked.append(_printable(q.get("text") or (f"row {q['row']}" if "row" in q else f"the mean of {q['mean_of']:,} questions")))
    if "span" in q:
        asked.append(f"\n(the tokens of {_printable(q['span']).plain!r})", style="dim")
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
            table.add_row(
                str(a.rank), f"{a.score:.4g}" + (f" ± {a.error:.2g}" if a.error else ""), *(() if narrow else (_printable(a.id),)), shown
            )
        if found:
            yield table
    if answer.groups is not None:
        yield _groups(answer.groups)
    if answer.controls is not None:
        yield _controls(answer)
    s = answer.search
    searched = f"exact search of {s.rows:,} rows"
    if s.recall < 1:
        searched = f"search of {s.rows:,} rows, {s.candidates:,} of them read; with probability {s.recall:g} none of the best is missing;"
    searched += " by one-bit codes, whose scores are estimates," if s.estimates else ""
    given = q.get("damping", 0)
    damping = ", ".join(f"{name} {value:g}" for name, value in given.items()) if isinstance(given, dict) else f"{given:g}"
    how = f"damping {damping}" if q.get("curvature", True) else "without curvature"
    more = "".join(f", {name} {q[name]}" for name in ("layers", "weights", "where") if name in q)
    if s.note:
        yield Text(f"all rows were read: {s.note}", style="dim")
    yield Text(f"{searched} in {s.seconds * 1000:.1f} ms; {q['mode']}, {how}{more}", style="dim")


def _groups(groups: Sequence[Group]) -> Table:
    table = Table(title="groups", title_justify="left", title_style="bold", box=SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("group", ratio=1, min_width=8, overflow="ellipsis", no_wrap=True)
    for name in ("rows", "of all for", "against", "influence", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = [*groups[:_SHOWN_GROUPS], *groups[max(_SHOWN_GROUPS, len(groups) - _SHOWN_GROUPS) :]]
    for g in shown:
        table.add_row(
            _printable("(none)" if g.value is None else str(g.value)),
            f"{g.rows:,}",
            f"{g.positive_share:.1%}",
            f"{g.negative_share:.1%}",
            f"{g.total:.4g}",
            f"{g.low:.4g} to {g.high:.4g}",
        )
    if len(shown) < len(groups):
        table.caption = f"the {_SHOWN_GROUPS} of highest and of lowest influence, of {len(groups):,}"
    return table


def _controls(answer: Answer) -> Table:
    table = Table(title="what else would have said", title_justify="left", title_style="bold", box=SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("control", no_wrap=True)
    for name in ("rank correlation", f"of our {len(answer.proponents)}"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("its best", ratio=1)
    for c in answer.controls or ():
        correlation = "-" if c.correlation is None else f"{c.correlation:.2f}"
        table.add_row(c.name, correlation, str(c.shared), _printable(", ".join(c.ids[:_SHOWN_IDS])))
    return table


def _printable(text: str) -> Text:
    """Stored text without the control characters by which it could command the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))
