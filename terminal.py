"""All that the command line prints for people: answers, explanations, descriptions of an index, costs, and evaluations."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .query.answers import Answer, Attribution, Explanation, Group, ScorePart, SearchReport, TokenShares
from .store.printable import printable, printable_line, say

if TYPE_CHECKING:
    from .evaluation.act import ActReport
    from .evaluation.checks import Report
    from .evaluation.judge import Judgement
    from .evaluation.replay import Replayed
    from .evaluation.study import Study
    from .query.outliers import Outliers
    from .query.select import Selection
    from .ray_jobs.plan import Cost
    from .store.index import Index
    from .store.manifest import Addition, Build, Manifest
    from .store.takedown import Takedown

_NAMED = 5

_SHOWN_CHARACTERS = 240
_FIRST_QUERIES = {
    "classification": '--text "..." --label 0',
    "masked-lm": '--text "..."',
    "embedding": "--file queries.jsonl",
    "image-classification": "--image FILE --label 0",
}
"""Options of a first query, by task, where it is not a completion or a row."""
_NARROW = 60
_LITTLE = 0.5
_SHOWN_GROUPS = 10
_SHOWN_CHOSEN = 20
_SHOWN_IDS = 5
_FOR = (5, 80, 160)
_AGAINST = (235, 140, 20)
_FAINT = 0.05
_DARK = 0.5
_BAR = 24


def show_answer(answer: Answer) -> None:
    """Print an answer for people, as wide as the terminal is."""
    console = Console()
    for part in renderables(answer, narrow=console.width < _NARROW):
        console.print(part)


def _how_searched(s: SearchReport) -> str:
    """Describe the search in one line."""
    searched = f"exact search of {s.rows:,} rows"
    if s.faiss is not None:
        made = f"{s.faiss.factory}, {s.faiss.parameters}" if s.faiss.parameters else s.faiss.factory
        measured = f"it found {s.faiss.proponents:.0%} of the best and {s.faiss.opponents:.0%} of the worst {s.faiss.k} rows"
        searched = f"search of {s.rows:,} rows by FAISS ({made}), {s.candidates:,} of them read; when it was made, {measured} for "
        searched += f"{s.faiss.queries:,} held-out rows (measured, not certified);"
    elif s.recall is not None and s.recall < 1:
        searched = f"search of {s.rows:,} rows, {s.candidates:,} of them read; with probability {s.recall:g} none of the best is missing;"
    return searched + (" by one-bit codes, whose scores are estimates," if s.estimates else "")


def _unit(s: SearchReport) -> str:
    """Describe the unit of an answer's scores in one line."""
    if s.unit is None:
        return "scores without a unit; of all: an example's part of the sum of all scores of its sign"
    per = " per nat of the example's own loss" if s.unit == "nats per nat" else ""
    predicted = f"nats{per} that the loss is predicted to rise by without the example; of all: its part of the sum of its sign"
    if s.slope is None:
        return f"{predicted}; the size was not measured (wherefrom evaluate slope), the order counts"
    value, low, high = (s.slope[name] for name in ("value", "low", "high"))
    return f"{predicted}; measured slope {value:.3g} ({low:.3g} to {high:.3g}) by {_printable(s.slope['measured_by'])}"


def _query_text(q: Mapping[str, Any]) -> Text:
    """Return a query as text, with what its loss is on in bold."""
    text = Text()
    if "completion" in q or "chosen" in q:
        text.append(_printable(q["prompt"]))
        text.append(_printable(q.get("completion") or q["chosen"]).plain, style="bold underline")
        other = q.get("against") or q.get("rejected")
        if other:
            text.append(" rather than ", style="dim")
            text.append(_printable(other.lstrip(" ")).plain, style="underline")
    elif "texts" in q:
        text.append(_printable(q["texts"][0]))
        text.append(" is like ", style="dim")
        text.append(_printable(q["texts"][1]).plain, style="bold underline")
    elif "image" in q or "features" in q:
        text.append("an image" if "image" in q else "a vector")
    elif "row" in q or "mean_of" in q:
        text.append(f"row {q['row']}" if "row" in q else f"the mean of {q['mean_of']:,} queries")
    else:
        messages = [f"{m['role']}: {m.get('content')}" for m in q.get("messages", ())]
        text.append(_printable(q.get("text") or "\n".join(messages)))
    if "label" in q:
        text.append(f"\n(label {q['label']})", style="dim")
    if "span" in q:
        text.append(f"\n(the tokens of {_printable(q['span']).plain!r})", style="dim")
    return text


def renderables(answer: Answer, narrow: bool = False) -> Iterator[RenderableType]:
    """The parts of an answer, from top to bottom; on a narrow terminal without the ids."""
    q = answer.query
    yield Text("\n") + _query_text(q)
    for title, attributions, colour in (("proponents", answer.proponents, "blue"), ("opponents", answer.opponents, "dark_orange")):
        if attributions:
            yield _attributions(title, attributions, colour, answer.search, narrow)
    if answer.groups is not None:
        yield _groups(answer.groups)
    if answer.baselines is not None:
        yield _baselines(answer)
    s = answer.search
    searched = _how_searched(s)
    more = "".join(f", {name} {q[name]}" for name in ("layers", "weights", "where") if name in q)
    measured = min(answer.index.get("measured") or [1.0])
    if measured < _LITTLE:
        yield Text(f"the rows measure {measured:.1%} of the trained parameters (wherefrom info names the rest)", style="dim")
    if s.missing:
        yield Text(f"{s.missing:,} rows were not searched: a part of the index does not run at present", style="dark_orange")
    for warning in answer.reliability.warnings:
        yield Text(f"! {warning}", style="dark_orange")
    yield Text(_unit(s), style="dim")
    if s.note:
        yield Text(f"all rows were read: {s.note}", style="dim")
    if s.rerank is not None:
        r = s.rerank
        differ = (
            "" if r.difference is None else f"; near that, stored and recomputed scores differ by {r.difference:.3g} (root mean square)"
        )
        bounds = f"by stored rows, no other scores above {r.highest:.4g}" + ("" if r.lowest is None else f" or below {r.lowest:.4g}")
        recomputed = f"with EK-FAC of {r.unprojected_layers:,} whole layers" if r.unprojected_layers else "without codes"
        recomputed += ", the queries in 8 bits," if r.query_bits == 8 else ""
        yield Text(f"{r.candidates:,} candidates computed again {recomputed} in {r.seconds:.1f} s; {bounds}{differ}", style="dim")
    if s.refine is not None:
        f = s.refine
        left = f"; {f.residual:.2g} of the equation is left" if f.residual else ""
        damping = "the damping of the training's length"
        if f.damping is not None:
            damping = "a damping of " + ", ".join(f"{value:g} ({name})" for name, value in f.damping.items())
        taken = f"{f.products:,} examples a query, in {f.seconds:.1f} s"
        yield Text(f"queries refined by {f.iterations} iterations at {damping}: {taken}{left}", style="dim")
    yield Text(f"{searched} in {s.seconds * 1000:.1f} ms; {q['mode']}, {_curvature(q)}{more}", style="dim")


def _curvature(q: Mapping[str, Any]) -> str:
    """Describe the curvature of an answer's scores."""
    given = q.get("damping", 0)
    damping = ", ".join(f"{name} {value:g}" for name, value in given.items()) if isinstance(given, dict) else f"{given:g}"
    how = f"damping {damping}" if q.get("curvature", True) else "without curvature"
    how = f"SOURCE's filter of the training {q['training']}" if "training" in q else how
    if "mixed" in q:
        shares = q["mixed"].values() if isinstance(q["mixed"], dict) else [q["mixed"]]
        how += f", the queries' second moments mixed in ({', '.join(f'{share:.3g}' for share in shares)})"
    how += f", preset {q['preset']}" if "preset" in q else ""
    return how


def _attributions(title: str, attributions: Sequence[Attribution], colour: str, search: SearchReport, narrow: bool) -> Table:
    reranked = search.rerank is not None
    if attributions:
        title += f" (percentiles {attributions[0].percentile:.4g} to {attributions[-1].percentile:.4g} of the searched rows)"
    table = Table(title=title, title_justify="left", title_style=f"bold {colour}", box=SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("#", justify="right", style="dim")
    table.add_column("row", justify="right", style="dim", no_wrap=True)
    table.add_column(search.unit or "score", justify="right", style=colour, no_wrap=True)
    if reranked:
        table.add_column("stored", justify="right", style="dim", no_wrap=True)
    if not narrow:
        table.add_column("of all", justify="right", style="dim", no_wrap=True)
        table.add_column("id", no_wrap=True, max_width=28)
    table.add_column("text", ratio=1, overflow="fold")
    for a in attributions:
        cells = [str(a.rank), str(a.row), f"{a.score:.4g}" + (f" ± {a.error:.3g}" if a.error else "")]
        if reranked:
            cells.append("" if a.stored_score is None else f"{a.stored_score:.4g} (#{a.stored_rank})")
        share = "" if a.share is None else f"{a.share:.1%}"
        table.add_row(*cells, *(() if narrow else (share, _printable(a.id))), _printable(shortened(a.text)))
    return table


def _groups(groups: Sequence[Group]) -> Table:
    table = Table(title="groups", title_justify="left", title_style="bold", box=SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("group", ratio=1, min_width=8, overflow="ellipsis", no_wrap=True)
    for name in ("rows", "of all for", "against", "influence", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    several = len({type(g.value) for g in groups if g.value is not None}) > 1  # 4 and "4" are two groups
    shown = [*groups[:_SHOWN_GROUPS], *groups[max(_SHOWN_GROUPS, len(groups) - _SHOWN_GROUPS) :]]
    for g in shown:
        table.add_row(
            _printable("(none)" if g.value is None else repr(g.value) if several else str(g.value)),
            f"{g.rows:,}",
            f"{g.positive_share:.1%}",
            f"{g.negative_share:.1%}",
            f"{g.total:.4g}",
            f"{g.low:.4g} to {g.high:.4g}",
        )
    if len(shown) < len(groups):
        table.caption = f"the {_SHOWN_GROUPS} of highest and of lowest influence, of {len(groups):,}"
    return table


def show_explanation(e: Explanation, shown: int = 12) -> None:
    """Print an explanation for people: heat maps of both texts, then the strongest parts."""
    console = Console()
    console.print(Text(f"\nrow {e.row}  {e.score:.4g}", style="bold") + Text(f"  {_printable(e.id).plain}", style="dim"))
    for title, shares in (("training example", e.example), ("query", e.query)):
        if shares is not None:
            console.print(Text(f"\n{title}", style="bold"))
            console.print(heat(shares))
    if e.recomputed is not None:
        sums = f"the tokens add up to {e.recomputed:.4g}, the score of exact rows; {e.score:.4g} is estimated from the stored ones"
        console.print(Text(sums, style="dim"))
        if console.color_system is not None:
            console.print(_LEGEND)
    else:
        console.print(_printable(shortened(e.text)))
    words = [replace(p, name=f"{_printable(p.name).plain!r}" if e.recomputed is not None else f"token {p.name}") for p in e.vocabulary]
    blocks = e.blocks if len(e.blocks) < len(e.layers) else ()
    kinds = (("components", e.components), ("blocks of layers", blocks), ("layers", e.layers), ("shared tokens", words))
    for title, parts in ((title, _told_apart(parts)) for title, parts in kinds):
        if parts:
            console.print(_bars(title, parts[:shown], len(parts)))


_LEGEND = Text.assemble(("blue", "white on rgb(5,80,160)"), (" for, ", "dim"), ("orange", "black on rgb(235,140,20)"), (" against", "dim"))


def heat(shares: TokenShares) -> Text:
    """Tokens on a ground of blue where they speak for, of orange where against, the stronger the more they add."""
    strongest = max((abs(score) for score in shares.scores), default=0.0) or 1.0
    text = Text()
    carried = 0.0
    for token, token_score in zip(shares.tokens, shares.scores, strict=True):
        score = token_score + carried
        carried = score if not token else 0.0  # part of a character that a later token completes
        strength = min(1.0, abs(score) / strongest) ** 0.7
        if strength < _FAINT:
            text.append(_printable(token))
            continue
        full = _FOR if score > 0 else _AGAINST
        ground = ",".join(str(round(255 + (c - 255) * strength)) for c in full)
        text.append(_printable(token).plain, style=f"{'white' if score > 0 and strength > _DARK else 'black'} on rgb({ground})")
    return text


def _told_apart(parts: Sequence[ScorePart]) -> list[tuple[str, float]]:
    """Names and scores; with the component where parts of several have the same kind of name."""
    several = len({p.component for p in parts}) > 1
    return [(f"{p.name} ({p.component})" if several else p.name, p.score) for p in parts]


def _bars(title: str, parts: Sequence[tuple[str, float]], count: int) -> Table:
    more = f" (the strongest {len(parts)} of {count:,})" if len(parts) < count else ""
    table = Table(title=title + more, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("name", overflow="ellipsis", max_width=36, no_wrap=True)
    table.add_column("score", justify="right")
    table.add_column("bar")
    strongest = max(abs(score) for _, score in parts) or 1.0
    for name, score in parts:
        bar = Text("█" * math.ceil(_BAR * abs(score) / strongest), style="blue" if score > 0 else "dark_orange")
        table.add_row(_printable(name), f"{score:.4g}", bar)
    return table


def _baselines(answer: Answer) -> Table:
    table = Table(title="baselines", title_justify="left", title_style="bold", box=SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("baseline", no_wrap=True)
    for name in ("rank correlation", f"of our {len(answer.proponents)}"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("its best", ratio=1)
    for c in answer.baselines or ():
        correlation = "-" if c.correlation is None else f"{c.correlation:.2f}"
        table.add_row(c.name, correlation, str(c.shared), _printable(", ".join(c.ids[:_SHOWN_IDS])))
    return table


def shortened(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 2].rstrip() + " …"


def _printable(text: str) -> Text:
    """Stored text, with the control characters by which it could command the terminal spelled out."""
    return Text(printable(text))


def show_built(index: "Index", existed: bool) -> None:
    """Print the result of a build, and how to ask the index."""
    manifest = index.manifest
    build = manifest.build
    out = index.path
    done = "is already complete" if existed else "is complete"
    names = " and ".join(component.name for component in manifest.components)
    say(f"{out} {done}: {manifest.rows:,} rows of {names}, {index.bytes_per_example:,.0f} bytes each")
    for part in build.tracked:
        say(f"the rows measure {_tracked({**part.model_dump(), 'share': part.share})}")
    if build.skipped:
        say(f"left out {build.skipped:,} documents that could not be used; the first: {build.skipped_first[0]}")
    _show_not_stored(build)
    if build.truncated:
        say(f"stored only the beginning of {build.truncated:,} documents that are longer than an example may be")
    plain = '--prompt "..." --completion "..."' if manifest.tokenizer else "--row 0"
    say(f"ask it:  wherefrom query {out} {_FIRST_QUERIES.get(manifest.task.partition('(')[0], plain)}")


def show_added(index: str, manifest: "Manifest", refit: Sequence[str], existed: bool) -> None:
    """Print the result of an addition.

    Args:
        refit: components whose curvature does not fit the added documents.
        existed: these documents were the last that were added, and nothing was added again.
    """
    addition = manifest.build.added[-1]
    done = "had these documents already:" if existed else "has"
    say(f"{index} {done} {addition.rows:,} rows more, {manifest.rows:,} in all; drift: {_drifts(addition.drift)}")
    _show_not_stored(addition)
    for name in refit:
        say(f"the curvature of {name} does not fit these documents: build the index again over all of them", err=True)


def _show_not_stored(record: "Build | Addition") -> None:
    """Print the files of a corpus that were not read, and the columns that were not stored."""
    unread = _unread(record.unread.files, record.unread.first)
    if unread:
        say(f"not read: {unread}")
    if record.left_out_columns:
        say(f"left out columns: {_columns(record.left_out_columns)}")


def show_selection(selection: "Selection", out: str | None) -> None:
    """Print the first chosen examples, and what the choice left out."""
    table = Table(title=f"chosen by {selection.by} ({selection.method})", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name in ("#", "row", "value", "target", "id", "text"):
        table.add_column(name, justify="left" if name in ("id", "text", "target") else "right", overflow="fold")
    for e in selection.examples[:_SHOWN_CHOSEN]:
        cells = _printable(e.target), _printable(e.id), _printable(shortened(e.text)[:80])
        table.add_row(str(e.rank), str(e.row), f"{e.value:.4g}", *cells)
    console = Console()
    console.print(table)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in selection.left_out.items()) or "none"
    covered = f"{selection.covered:.0%} of the targets have one of their ten best among them"
    say(f"{len(selection.examples):,} of {selection.rows:,} examples; {covered}; better ones left out: {left_out}")
    if out is not None:
        say(f"they are in {out}")


def show_outliers(found: "Outliers") -> None:
    """Print outliers of each kind."""
    console = Console()
    kinds = (("self-influence", found.self_influence), ("label contrast", found.label_contrast or ()))
    for title, outliers in kinds:
        if not outliers:
            continue
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        labels = ("label",) if any(o.label is not None for o in outliers) else ()
        for name in ("row", found.unit or "value" if title == "self-influence" else "against", *labels, "id", "text"):
            table.add_column(name, justify="left" if name in ("id", "text") else "right", overflow="fold")
        for o in outliers:
            cells = (str(o.label),) if labels else ()
            table.add_row(str(o.row), f"{o.value:.4g}", *cells, _printable(o.id), _printable(shortened(o.text)[:80]))
        console.print(table)
    if found.label_contrast is None:
        say("the examples have no labels, so that there is no label contrast")
    say(f"{len(found.duplicates):,} groups of near-duplicates (cosine above {found.similar:g}) among {found.rows:,} rows")
    for group in found.duplicates[:_SHOWN_GROUPS]:
        more = f" and {len(group) - _NAMED:,} more" if len(group) > _NAMED else ""
        say(f"  {', '.join(group[:_NAMED])}{more}")


def show_study(report: "Study", out: str | None) -> None:
    """Print the figures of a study."""
    console = Console()
    for part, groups in report.by_part.items():
        title = "all components" if part == "all" else f"{part} alone"
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        shares = list(groups[0].concentration)
        for name in ("group", "queries", "within", "across", *(f"best {share}" for share in shares), "answer", "steps"):
            table.add_column(name, justify="left" if name == "group" else "right")
        for g in groups:
            figures = (g.within, g.across, *g.concentration.values(), g.answers, g.steps)
            table.add_row(_printable(g.group), str(g.queries), *("-" if f is None else f"{f.value:.2f}" for f in figures))
        console.print(table)
    for warning in report.warnings:
        console.print(Text(f"! {warning}", style="dark_orange"))
    explained = (
        "within, across: correlation of influence between queries; best: part of all influence that the best examples hold; answer, "
    )
    explained += f"steps: how often they occur in the best {report.best:,} examples"
    console.print(explained, style="dim", highlight=False)
    if out is not None:
        say(f"the report is in {out}.html and {out}.json")


def show_act(report: "ActReport", out: str) -> None:
    """Print the report of a removal."""
    page = report.page()
    for line in page["summary"]:
        say(line)
    table = Table(box=SIMPLE_HEAD)
    for name in ("query", "predicted", "measured", "by chance"):
        table.add_column(name, justify="left" if name == "query" else "right")
    for e in report.effects:
        predicted = "" if e.predicted is None else f"{e.predicted:.4g}"
        chance = f"{e.by_chance:.4g} ± {e.chance_deviation:.2g}"
        table.add_row(_printable(shortened(e.text)[:60]), predicted, f"{e.measured:.4g}", chance, style="dim" if e.held_out else "")
    Console().print(table)
    say(f"the report is in {out}.html and {out}.json")


def show_takedown(report: "Takedown") -> None:
    """Print the report of a takedown."""
    say(f"{len(report.ids):,} examples were taken down; {report.rows:,} rows remain, and those behind them have other row numbers now")
    searched = f"{report.contents:,} ids, texts, metadata, token lists and codes of theirs were searched for in {report.files:,} files"
    say(f"{searched} ({report.bytes:,} bytes): {len(report.found) or 'none'} found")
    if report.short:
        say(f"{report.short:,} of theirs are below 16 bytes: ids and texts were searched for as words in files of text, others not at all")
    for found in report.found:
        others = f"which {', '.join(found.others[:_NAMED])} holds, too" if found.others else "which nothing explains"
        say(f"  {found.content} of {found.id} in {found.file}, {others}")


def show_cost(cost: "Cost") -> None:
    """Print the estimated cost of a build."""
    say(f"{cost.documents:,} documents, about {cost.rows:,} rows and {cost.tokens:,} tokens")
    for component in cost.components:
        sizes = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in component.items() if k != "name" and v is not None)
        say(f"  {component['name']}: {sizes}")
    say(f"{cost.bytes_per_example:,} bytes an example: {cost.bytes_of_rows:,} bytes of rows, {cost.encoder_bytes:,} of the encoder")
    say(f"about {cost.memory_per_worker >> 20:,} MiB of memory for each of {cost.workers} workers")
    for note in cost.notes:
        say(f"note: {note}")
    say(f"about {cost.fit_seconds:,} s to fit and {cost.row_seconds:,} s for the rows, on a machine that does nothing else")


def show_summary(summary: Mapping[str, Any]) -> None:
    """Print the description of an index (see `Index.summary`)."""
    table = Table(show_header=False, box=None, pad_edge=False)
    special = {
        "added": lambda parts: ["; ".join(f"{p['rows']:,} rows (drift: {_drifts(p['drift'])})" for p in parts) or "nothing"],
        "tracked": lambda parts: [_tracked(p, None) + (f" (model {n})" if len(parts) > 1 else "") for n, p in enumerate(parts, 1)],
        "notes": list,
        "unread": lambda unread: [_unread(unread["files"], unread["first"]) or "nothing"],
        "left_out_columns": lambda columns: [_columns(columns) or "nothing"],
        "models": lambda models: [f"{m['id']}, {m['architecture']}, {m['parameters']:,} parameters, {m['dtype']}" for m in models],
        "components": lambda components: [],
        "slope": lambda slope: [_slope(slope)],
        "rerank": lambda rerank: [_rerank(rerank)],
    }
    titles = {"tracked": "measured", "notes": "note", "unread": "not read", "models": "model"}
    for name, value in summary.items():
        for line in special.get(name, lambda value: [value])(value):
            _add_row(table, titles.get(name, name), line)
    for component in summary["components"]:
        _add_row(table, "", "")
        _add_row(table, f"component {component['name']}", "")
        for name, value in component.items():
            if name != "name":
                _add_row(table, f"  {name}", value)
    Console().print(table)


def _add_row(table: Table, name: str, value: object) -> None:
    table.add_row(name.replace("_", " "), Text(printable_line(f"{value:,}" if isinstance(value, int) else str(value))))


def _tracked(part: Mapping[str, Any], most: int | None = 4) -> str:
    """Describe the share of a model that an index's rows measure, with the names of at most so many other parameters."""
    left_out = part["left_out"]
    rest = f"; not {', '.join(left_out[:most])}{' ...' if len(left_out[:most]) < len(left_out) else ''}" if left_out else ""
    return f"{part['parameters']:,} of {part['of']:,} parameters ({part['share']:.1%}){rest}"


def _slope(slope: Mapping[str, Any] | None) -> str:
    """Describe what was measured of an index's scores."""
    if slope is None:
        return "not measured; wherefrom evaluate slope measures what a predicted nat is worth"
    lds = "" if slope["lds"] is None else f", LDS {slope['lds']:.3g} ({slope['lds_low']:.3g} to {slope['lds_high']:.3g})"
    return f"{slope['value']:.3g} ({slope['low']:.3g} to {slope['high']:.3g}){lds}, by {slope['measured_by']}"


def _rerank(rerank: Mapping[str, Any] | None) -> str:
    """Describe what `--rerank` computes."""
    if rerank is None:
        return "the rows that the index codes; wherefrom fit makes it EK-FAC of whole layers"
    return f"EK-FAC of {rerank['layers']:,} whole layers, fitted on {rerank['fitted_on']:,} examples, {rerank['bytes']:,} bytes"


def _drifts(drift: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {ratio:g}" for name, ratio in drift.items())


def _unread(files: int, first: Sequence[str]) -> str:
    """Describe files that were not read; empty if there are none."""
    return f"{files:,} file{'s' * (files > 1)}: {', '.join(first[:_NAMED])}{', ...' * (files > _NAMED)}" if files else ""


def _columns(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def show_judgement(judgement: "Judgement") -> None:
    """Print a judgement as a table."""
    table = Table(title=f"LDS on {judgement.pack}", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "LDS", "95 % interval", "lead over it", "bytes/example"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=not name)
    size = f"{judgement.bytes_per_example:,.0f}" if judgement.bytes_per_example is not None else ""
    rows = {"this index" if size else "these scores": (judgement.estimate, size)}
    rows |= {f"baseline: {name}": (e, "") for name, e in judgement.baselines.items()}
    for name, (e, bytes_per_example) in rows.items():
        lead = judgement.leads.get(name.removeprefix("baseline: "))
        lead_interval = f"{lead.low:+.3f} to {lead.high:+.3f}" if lead else ""
        table.add_row(
            name,
            f"{e.value:.3f}",
            f"{e.low:.3f} to {e.high:.3f}",
            lead_interval,
            bytes_per_example,
            style="bold" if not name.startswith("baseline") else "",
        )
    if judgement.ceiling is not None and judgement.split_half is not None:
        table.add_row("ceiling", f"{judgement.ceiling:.3f}", "", "", "")
        table.add_row("half of the seeds for the others", f"{judgement.split_half:.3f}", "", "", "")
    console = Console()
    console.print(table)
    console.print(f"{judgement.protocol}.\n{json.dumps(judgement.method)}", style="dim", highlight=False)


def show_replayed(replayed: "Replayed", k: int) -> None:
    """Print the best and worst examples of each query of a replay, for people."""
    console = Console()
    for number, (id, loss) in enumerate(zip(replayed.queries, replayed.losses.tolist(), strict=True)):
        table = Table(title=Text(f"query {printable_line(id)}: {loss:.4g} nats"), title_justify="left", box=SIMPLE_HEAD)
        for name in ("example", "score", "text"):
            table.add_column(name, justify="left" if name == "text" else "right")
        for opponents in (False, True):
            for entry in replayed.best(number, k, opponents):
                table.add_row(_printable(entry["id"]), f"{entry['score']:.4g}", _printable(entry["text"][:_SHOWN_CHARACTERS]))
        console.print(table)
    console.print(
        f"Exact derivatives through {replayed.steps:,} recorded steps, negated: nats that a query's loss falls by for each unit of an "
        f"example's weight. The repeated run ends {replayed.difference:.2%} of its way from where training ended.",
        style="dim",
        highlight=False,
    )


def show_report(report: "Report") -> None:
    """Print a report for people."""
    table = Table(title=report.check, title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "mean", "95 % interval"):
        table.add_column(name, justify="left" if not name else "right")
    for name, e in report.figures.items():
        table.add_row(name, f"{e.value:.4g}", "needs two values" if e.low is None else f"{e.low:.4g} to {e.high:.4g}")
    console = Console()
    console.print(table)
    counted = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.about.items())
    console.print(f"{report.explained} {counted}.", style="dim", highlight=False)
