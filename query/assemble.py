"""From rows to answers: ids, texts and metadata are put to what a search found."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..store.index import Index
from .answers import Answer, Attribution, Baseline, Group, SearchReport
from .metric import Metric
from .search import Hits


def make_answers(
    index: Index,
    asked: Sequence[Mapping[str, Any]],
    hits: Sequence[Hits],
    metric: Metric,
    *,
    opponents: bool = True,
    where: str | None = None,
    searched: int | None = None,
    groups: Sequence[Sequence[Group]] | None = None,
    baselines: Sequence[tuple[Baseline, ...]] | None = None,
    errors: Sequence[tuple[np.ndarray, np.ndarray] | None],
) -> list[Answer]:
    """Put ids, texts and metadata to the rows that a search found.

    Args:
        asked: what each query was.
        where, searched: the filter, and how many rows it left.
        groups, baselines: of each query.
        errors: of each query the standard errors of its proponents' and its opponents' scores, where they are known.
    """
    about = describe_index(index)
    estimates = any((s.kind == "sparse" or s.dtype == "1bit") and metric.weights.get(s.name, 1.0) for s in index.manifest.components)
    built = {s.name: s.curvature.damping for s in index.manifest.components}
    dampings = metric.damping or (built if len(set(built.values())) > 1 else next(iter(built.values())))
    settings: dict[str, Any] = {"mode": metric.mode, **({"damping": dampings} if metric.curvature else {"curvature": False})}
    settings |= {"weights": dict(metric.weights)} if metric.weights else {}
    settings |= {"layers": list(metric.layers)} if metric.layers else {}
    settings |= {"where": where} if where is not None else {}
    answers = []
    for number, (query, hit, known) in enumerate(zip(asked, hits, errors, strict=True)):
        answers.append(
            Answer(
                query={**query, **settings},
                proponents=_attributions(index, hit.proponents, hit.proponent_scores, known and known[0]),
                opponents=_attributions(index, hit.opponents, hit.opponent_scores, known and known[1]) if opponents else (),
                search=SearchReport(
                    method="exact" if hit.recall == 1 else "by quantized scan and rescore",
                    rows=len(index) if searched is None else searched,
                    candidates=hit.candidates,
                    recall=hit.recall,
                    estimates=estimates,
                    note=hit.note,
                    seconds=hit.seconds,
                ),
                index=about,
                groups=tuple(groups[number]) if groups is not None else None,
                baselines=baselines[number] if baselines is not None else None,
            )
        )
    return answers


def describe_index(index: Index) -> dict[str, Any]:
    """What an answer says of the index that it came from."""
    m = index.manifest
    return {
        "path": str(index.path.resolve()),
        "manifest": m.number,
        "models": [model.id for model in m.models],
        "rows": m.rows,
        "components": [s.name for s in m.components],
        "measured": [round(part.share, 4) for part in m.build.tracked],
    }


def _attributions(index: Index, rows: np.ndarray, scores: np.ndarray, errors: np.ndarray | None) -> tuple[Attribution, ...]:
    found = []
    known = [None] * len(rows) if errors is None else errors.tolist()
    for rank, (row, score, error) in enumerate(zip(rows.tolist(), scores.tolist(), known, strict=True), 1):
        e = index.example(row)
        found.append(Attribution(rank, row, e.id, score, e.text, e.source, e.document, e.metadata, error))
    return tuple(found)
