"""Study of what groups of queries draw on: knowledge that is looked up, or procedures that are shared.

After Ruis et al. (Procedural knowledge in pretraining drives reasoning in large language models, arXiv 2411.12580): influence per nat of an
example's own loss; its correlation over all examples between queries of one group and of different ones; how concentrated it is; whether
answers occur in the texts of the best examples; and which sources are over-represented there.

Everything is also computed for each component alone, since a head's rows see shared tokens, and blocks' rows what layers do.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..client import Client
from ..query.files import read_queries
from ..query.metric import Metric
from ..query.options import Mode, Query
from ..query.scoring import score_matrix
from ..ray_jobs.progress import Reporter, reporting
from ..store.corpus import check_exists
from ..store.errors import DataError, UsageError
from ..store.extras import require
from ..store.index import Index
from ..store.shapes import Float32, Float64, Int64
from ..store.sources import parse_json
from .checks import Figure, mean_figure
from .lds import interval
from .pages import bars, check_report, write_report

_TOP = 0.01  # share of the examples that answers and sources are looked for in; at least `_LEAST_TOP`
_LEAST_TOP = 20
_SHARES = (0.001, 0.01, 0.1)
_MOST_CELLS = 1 << 28  # queries times rows of scores in memory
_AGREEMENT = 0.3
_MOST_SOURCES = 20
_MOST_BLOCKS = 24


@dataclass(frozen=True)
class StudyQuery:
    """A query of a study.

    Attributes:
        group: that it belongs to.
        answers: texts, any of which answers it; `steps`: of which it takes several.
    """

    query: Query
    group: str
    answers: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class GroupFigures:
    """Figures of a group of queries; of each, the mean over its queries with its 95 % interval.

    Attributes:
        within, across: correlation (Pearson's) of influence over all examples between two queries of the group, and between one of it and
            one of another; None without two.
        concentration: by share of the examples, the part of all positive influence that the best of them hold.
        answers: share of the queries with answers for which one occurs in the best examples' texts; None without answers.
        answer_rank: median rank of the first example with the answer, among the queries for which there is one.
        steps: share of the steps that occur there; None without steps.
        loss: nats a token of the queries' losses.
    """

    group: str
    queries: int
    within: Figure | None
    across: Figure | None
    concentration: Mapping[str, Figure]
    answers: Figure | None
    answer_rank: float | None
    steps: Figure | None
    loss: Figure | None


@dataclass(frozen=True)
class Representation:
    """A source's part of the best examples of a group's queries, over its part of all examples."""

    group: str
    value: str
    rows: int
    ratio: Figure


@dataclass(frozen=True)
class Study:
    """Report of a study.

    Attributes:
        by_part: the groups' figures by part of the scores: "all", each component, and each block of layers.
        agreement: by pair of components, the mean correlation of their scores of a query over all examples.
        best: number of the best examples that answers and sources were looked for in.
        warnings: what limits the conclusions.
    """

    index: str
    rows: int
    mode: str
    best: int
    by_part: Mapping[str, tuple[GroupFigures, ...]]
    agreement: Mapping[str, float]
    sources: tuple[Representation, ...]
    column: str
    correlations: tuple[tuple[float, ...], ...]
    queries: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as `wherefrom study --json` prints it."""
        return {"report": "wherefrom study 1", **asdict(self)}

    def page(self) -> dict[str, Any]:
        """The content of its HTML page (see pages.py)."""
        groups = self.by_part["all"]
        sections: list[dict[str, Any]] = []
        pairs = [
            (f"{g.group}: {name}", figure.value, figure.low, figure.high)
            for g in groups
            for name, figure in (("within", g.within), ("across", g.across))
            if figure is not None
        ]
        text = [
            "Pearson's correlation of influence over all examples, between two queries. High within a group and low across: its queries "
            "draw on the same examples, as those of one procedure do. Low within: each draws on examples of its own, as facts do."
        ]
        sections.append({"title": "Do queries of a group draw on the same examples?", "bars": bars(pairs), "text": text})
        for part, part_groups in self.by_part.items():
            columns = ["group", "queries", "within", "across", *(f"best {s} hold" for s in part_groups[0].concentration)]
            columns += ["answer in the best", "its median rank", "steps in the best"]
            rows = [
                [
                    g.group,
                    g.queries,
                    *map(_shown, (g.within, g.across, *g.concentration.values(), g.answers)),
                    "-" if g.answer_rank is None else f"{g.answer_rank:,.0f}",
                    _shown(g.steps),
                ]
                for g in part_groups
            ]
            title = "All components together" if part == "all" else f"{part} alone"
            sections.append({"title": title, "columns": columns, "rows": rows})
        if self.agreement:
            chart = bars([(name, value, None, None) for name, value in self.agreement.items()])
            text = ["Correlation of two components' scores of one query over all examples, the mean over queries."]
            sections.append({"title": "Do components say the same?", "bars": chart, "text": text})
        for group in dict.fromkeys(r.group for r in self.sources):
            own = [r for r in self.sources if r.group == group]
            chart = bars([(r.value, r.ratio.value, r.ratio.low, r.ratio.high) for r in own])
            text = [f"Part of the best {self.best:,} examples over the part of all examples; 1 is as many as by chance."]
            sections.append({"title": f"{self.column}, over- and under-represented: {group}", "bars": chart, "text": text})
        names = [f"{name} ({group})" for name, group in self.queries]
        if len(names) <= 40:
            rows = [[name, *(f"{value:.2f}" for value in line)] for name, line in zip(names, self.correlations, strict=True)]
            table = {"title": "All pairs of queries", "columns": ["", *map(str, range(1, len(names) + 1))], "rows": rows}
            sections.append(table)
        summary = [f"{len(self.queries):,} queries in {len(groups)} groups, over {self.rows:,} examples; scores: {self.mode}."]
        return {
            "title": "What groups of queries draw on",
            "summary": summary,
            "warnings": list(self.warnings),
            "sections": sections,
            "foot": f"Index: {self.index}",
        }


def _shown(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.value:.2f}" + ("" if figure.low is None else f" ({figure.low:.2f} to {figure.high:.2f})")


def read_study(file: str) -> list[StudyQuery]:
    """Read the queries of a study: a query file whose lines also have `group`, and may have `answers` and `steps`, lists of texts.

    Raises:
        NotFoundError, DataError: see `read_queries`; a line has no group.
    """
    check_exists(file)
    if Path(file).suffix != ".jsonl":
        raise DataError(f"{file} is not a .jsonl file; the queries of a study are JSON lines, which have a group")
    queries = list(read_queries(file))
    lines = [line for line in Path(file).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    result = []
    for number, (line, query) in enumerate(zip(lines, queries, strict=True), 1):
        record = parse_json(line)
        group = record.get("group")
        texts = {name: record.get(name, []) for name in ("answers", "steps")}
        valid = all(isinstance(value, list) and all(isinstance(text, str) and text for text in value) for value in texts.values())
        if not isinstance(group, str) or not group or not valid:
            raise DataError(f'{file}, line {number}: a query of a study has a "group", and may have "answers" and "steps", lists of texts')
        result.append(StudyQuery(query, group, tuple(texts["answers"]), tuple(texts["steps"])))
    return result


def study(
    index: str | Path | Client,
    queries: Sequence[StudyQuery],
    *,
    mode: Mode = "loss-normalized",
    column: str = "source",
    out: str | Path | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> Study:
    """Study what groups of queries draw on.

    Args:
        index: a directory, or a client of one.
        mode: of the scores; per nat of the example's own loss, as in the paper, unless another is named.
        column: of the over-representation.
        out: name of the report: `<out>.json` and `<out>.html`.
        options: of a client: model, device.

    Raises:
        UsageError: there are fewer than two queries, or too many for the index's rows.
    """
    require("scipy", "evaluation")
    if out is not None:
        check_report(Path(out), None)
    client = index if isinstance(index, Client) else Client(index, **options)
    opened = client.index
    if len(queries) < 2:
        raise UsageError("a study compares queries; give at least two")
    if len(queries) * len(opened) > _MOST_CELLS:
        most = _MOST_CELLS // len(opened)
        raise UsageError(f"{len(queries)} queries times {len(opened):,} rows do not fit in memory; give at most {most} queries")
    encoded = client.encode([q.query for q in queries], mode=mode)
    alive = np.flatnonzero(opened.alive)
    names = [component.name for component in opened.manifest.components]
    parts = _parts(opened, mode)
    best = max(_LEAST_TOP, int(_TOP * len(alive)))
    figures: dict[str, tuple[GroupFigures, ...]] = {}
    scores: dict[str, Float32[np.ndarray, "queries rows"]] = {}
    losses = client.losses([q.query for q in queries])
    with reporting(reporter) as current:
        current.stage("studying", len(parts) * len(queries))
        for part, metric in parts.items():
            scores[part] = score_matrix(opened, encoded, metric)[:, alive]
            figures[part] = tuple(_group_figures(client, queries, scores[part], alive, best, losses))
            current.update(len(queries), 0)
    agreement = {
        f"{one} and {other}": float(np.mean([_correlation(a, b) for a, b in zip(scores[one], scores[other], strict=True)]))
        for one, other in combinations(names, 2)
    }
    correlations = _correlations(scores["all"])
    report = Study(
        index=str(opened.path.resolve()),
        rows=len(alive),
        mode=mode,
        best=best,
        by_part=figures,
        agreement=agreement,
        sources=tuple(_representation(client, queries, scores["all"], alive, best, column)),
        column=column,
        correlations=tuple(map(tuple, np.round(correlations, 4).tolist())),
        queries=tuple((q.query.id or str(number), q.group) for number, q in enumerate(queries)),
        warnings=tuple(_warnings(client, agreement, figures["all"])),
    )
    if out is not None:
        write_report(Path(out), report.to_dict(), report.page())
    return report


def _parts(index: Index, mode: Mode) -> dict[str, Metric]:
    """Return the metrics of all components together, of each alone, and of each block of a dense component's layers."""
    components = index.manifest.components
    parts = {"all": Metric(mode)}
    if len(components) > 1:
        for one in components:
            parts[one.name] = Metric(mode, weights={other.name: 0.0 for other in components if other is not one})
    names = [name for component in components if component.has_wide_rows for name in component.layer_names]
    blocks = dict.fromkeys(match[1] for name in names if (match := re.match(r"(.*?\.\d+)\.", name)))
    if 1 < len(blocks) <= _MOST_BLOCKS and mode != "cosine":
        sparse = {component.name: 0.0 for component in components if not component.has_wide_rows}
        parts |= {f"layers {block}": Metric(mode, weights=sparse, layers=(f"{block}.*",)) for block in blocks}
    return parts


def _group_figures(
    client: Client,
    queries: Sequence[StudyQuery],
    scores: Float32[np.ndarray, "queries rows"],
    alive: np.ndarray,
    best: int,
    losses: Sequence[float | None],
) -> Iterator[GroupFigures]:
    correlations = _correlations(scores)
    groups = np.array([q.group for q in queries])
    positive = np.maximum(scores, 0).astype(np.float64)
    totals = positive.sum(axis=1)
    ordered = -np.sort(-positive, axis=1)
    found = [_occurrences(client, q, alive[_best(row, best)]) for q, row in zip(queries, scores, strict=True)]
    for group in dict.fromkeys(groups.tolist()):
        own = np.flatnonzero(groups == group)
        own_numbers: list[int] = own.tolist()
        others = np.flatnonzero(groups != group)
        concentration = {}
        for share in _SHARES:
            count = max(1, round(share * scores.shape[1]))
            held = [float(ordered[q, :count].sum() / totals[q]) for q in own if totals[q] > 0]
            if held:
                concentration[f"{share:.1%}"] = mean_figure(held)
        answered = [found[q][0] for q in own_numbers if queries[q].answers]
        steps = [found[q][1] for q in own_numbers if queries[q].steps]
        known = [loss for q in own_numbers if (loss := losses[q]) is not None]
        yield GroupFigures(
            group=group,
            queries=len(own),
            within=_pairs_figure(correlations, own, own),
            across=_pairs_figure(correlations, own, others),
            concentration=concentration,
            answers=mean_figure([float(rank is not None) for rank in answered]) if answered else None,
            answer_rank=float(np.median(ranks)) if (ranks := [rank for rank in answered if rank is not None]) else None,
            steps=mean_figure([step for step in steps if step is not None]) if steps else None,
            loss=mean_figure(known) if known else None,
        )


def _best(scores: Float32[np.ndarray, " rows"], count: int) -> Int64[np.ndarray, " best"]:
    """Return the positions of the highest scores above 0, the highest first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return order[scores[order] > 0]


def _occurrences(client: Client, query: StudyQuery, rows: np.ndarray) -> tuple[int | None, float | None]:
    """Return the rank of the first example whose text holds an answer, and the share of the steps that occur in any."""
    if not query.answers and not query.steps:
        return None, None
    texts = [client.index.example(int(row)).text for row in rows]
    rank = next((number for number, text in enumerate(texts, 1) if any(answer in text for answer in query.answers)), None)
    joined = "\n".join(texts)
    return rank, float(np.mean([step in joined for step in query.steps])) if query.steps else None


def _correlations(scores: Float32[np.ndarray, "queries rows"]) -> Float64[np.ndarray, "queries queries"]:
    """Pearson's correlations of queries over examples; 0 with one whose scores are all the same."""
    centered = scores.astype(np.float64) - scores.mean(axis=1, keepdims=True, dtype=np.float64)
    lengths = np.linalg.norm(centered, axis=1)
    centered /= np.where(lengths > 0, lengths, 1.0)[:, None]
    return centered @ centered.T


def _correlation(a: Float32[np.ndarray, " rows"], b: Float32[np.ndarray, " rows"]) -> float:
    return float(_correlations(np.stack([a, b]))[0, 1])


def _pairs_figure(correlations: Float64[np.ndarray, "queries queries"], one: np.ndarray, other: np.ndarray) -> Figure | None:
    """The mean correlation of pairs of different queries, with its interval by bootstrap over queries; None without a pair."""
    same = np.array_equal(one, other)
    if not len(other) or (same and len(one) < 2):
        return None

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        part = correlations[np.ix_(one[a], other[b])]
        differ = one[a][:, None] != other[b][None]
        return float(part[differ].mean()) if differ.any() else float("nan")

    everything = np.arange(len(one)), np.arange(len(other))
    value = mean(*everything)
    if same:
        low, high = interval(lambda a, _: mean(a, a), (len(one), 1))
    else:
        low, high = interval(mean, (len(one), len(other)))
    return Figure(value, low, high)


def _representation(
    client: Client, queries: Sequence[StudyQuery], scores: Float32[np.ndarray, "queries rows"], alive: np.ndarray, best: int, column: str
) -> Iterator[Representation]:
    """Yield, by group and value of a column, its part of the best examples over its part of all, with an interval over queries."""
    codes, values = client.index.distinct(column, 10_000)
    codes = codes[alive]
    counts = np.bincount(codes, minlength=len(values))
    largest = [code for code in np.argsort(-counts, kind="stable")[:_MOST_SOURCES].tolist() if counts[code]]
    top = [codes[_best(row, best)] for row in scores]
    parts = np.stack([np.bincount(own, minlength=len(values)) / max(1, len(own)) for own in top])
    parts[[number for number, own in enumerate(top) if not len(own)]] = np.nan  # nothing speaks for this query
    for group in dict.fromkeys(q.group for q in queries):
        own = parts[[number for number, q in enumerate(queries) if q.group == group]]
        for code in largest:
            ratios = own[:, code] / (counts[code] / len(codes))
            if not np.isnan(ratios).all():
                yield Representation(group, str(values[code]), int(counts[code]), mean_figure(ratios.tolist()))


def _warnings(client: Client, agreement: Mapping[str, float], groups: Sequence[GroupFigures]) -> Iterator[str]:
    components = client.index.manifest.components
    sparse = [c for c in components if not c.has_wide_rows]
    if len(sparse) == len(components):
        yield (
            "The rows of this index hold vocabulary layers alone: only examples that share tokens with a query can be seen, so that a "
            "procedure in other words, or a fact in another spelling, is not. An index with blocks sees more (components=head,blocks)."
        )
    for pair, value in agreement.items():
        if value < _AGREEMENT:
            yield f"{pair} agree little (correlation {value:.2f}): which of them speaks decides what this report says; see each alone."
    measured = min(tracked.share for tracked in client.index.manifest.build.tracked)
    if measured < 0.5:
        yield f"The rows measure {measured:.1%} of the trained parameters."
    few = [group.group for group in groups if group.queries < 5]
    if few:
        yield f"Groups of fewer than five queries have intervals that say little: {', '.join(few)}."
