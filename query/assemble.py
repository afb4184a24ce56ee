"""Assembly of answers from encoded queries: hits, standard errors, groups and baselines from one pass over the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..store.errors import BusyError, UsageError
from ..store.index import ColumnType, Index
from ..store.usual import Usual
from ..store.vectors import Rows, slice_rows
from .answers import Answer, Attribution, RefineReport, SearchReport
from .baselines import BaselineScores, compare
from .metric import Metric
from .options import Options
from .parts import Parts, Search
from .reliability import QueryEvidence, assess, compared_modes, is_uncertain
from .rerank import Place, Recomputation, Reranked, Sizes, baseline_candidates, rerank
from .scoring import Scorer, mixed_components
from .search import Found, Hits, find, find_by_faiss, pass_size

DEFAULT_K = 10
_MATRIX_BYTES = 256 << 20
_PASS_SCORES = 1 << 22  # of a thread in one pass: queries times rows of a group
_NO_PLACE = Place(None, None)


@dataclass(frozen=True)
class QueryRecord:
    """A query as its answer shows it.

    Attributes:
        fields: of the query.
        evidence: of it. Scores of a query by row, or of a mean with one, have no standard errors, since that row is coded too.
    """

    fields: Mapping[str, Any]
    evidence: QueryEvidence


def answer_queries(
    parts: Parts,
    types: Mapping[str, ColumnType] | None,
    queries: Sequence[QueryRecord],
    rows: Rows,
    options: Options,
    baselines: BaselineScores | None = None,
    recomputation: Recomputation | None = None,
    refinement: RefineReport | None = None,
    usual: Usual | None = None,
) -> list[Answer]:
    """Answer encoded queries.

    Args:
        types: see `Search`.
        rows: of the queries.
        baselines: scores of baselines, by name; None for answers without baselines.
        recomputation: for the option `rerank`.
        refinement: of the queries' rows.
        usual: of training examples, for the answers' reliability; None where that is not known.

    Raises:
        UsageError: an option is out of range or not possible with the index, or there are no rows to search.
    """
    index = parts.index
    metric = Metric.of_answer(options, index.manifest.mode)
    where = options.get("where")
    k = options.get("k")
    k = DEFAULT_K if k is None else min(int(k), len(index))
    recall = options.get("recall", 1.0)
    count = min(max(k, 0 if recomputation is None else recomputation.candidates), len(index))  # of each side
    with_opponents = options.get("opponents", True)
    column = options.get("group_by")
    if options.get("engine") == "faiss" and (column is not None or baselines is not None or recall < 1):
        raise UsageError("groups, baselines and a certified recall need a scan; leave them out, or `engine` faiss")
    size = pass_size(recall, column is not None)
    size = max(1, min(size, _PASS_SCORES // max(group.rows for group in index.groups)))
    size = size if baselines is None else max(1, min(size, _MATRIX_BYTES // (4 * len(index))))
    mixings = mixed_components(index, rows, metric)
    settings = _settings(index, metric, where, {name: mixing.share for name, mixing in mixings.items()})
    answers = []
    for first in range(0, len(queries), size):
        batch_rows = slice_rows(rows, first, first + size)
        search = Search(batch_rows, metric, mixings, where, types)
        scorer = parts.scorer(search)
        partial = bool(options.get("partial"))
        if options.get("engine") == "faiss":
            result = find_by_faiss(parts, search, count, partial)
        else:
            others = compared_modes(metric)
            result = find(parts, search, len(scorer), count, recall, column, baselines is not None, partial, others)
        _refuse_nothing(result, where)
        all_hits = result.hits
        stored_hits = all_hits
        groups = None if result.sums is None else result.sums.total()
        if not with_opponents:
            all_hits = [hits.without_opponents() for hits in all_hits]
        reranked: list[Reranked] | list[None] = [None] * len(all_hits)
        refined = refinement
        if recomputation is not None:
            numbers = range(first, first + len(all_hits))
            baseline_rows = [baseline_candidates(baselines or {}, result.mask, number, count) for number in numbers]
            reranked = rerank(numbers, all_hits, baseline_rows, Sizes(k, count, with_opponents), recomputation)
            refined = recomputation.refinement()
            all_hits = [rerank_result.hits for rerank_result in reranked]
        for number, (query, hits, rerank_result) in enumerate(zip(queries[first : first + size], all_hits, reranked, strict=True)):
            report = _report(index, metric, scorer, hits, result, rerank_result)
            with_errors = not query.evidence.by_row and rerank_result is None
            places = {} if rerank_result is None else rerank_result.stored
            proponents, opponents = (_attributions(scorer, number, hits, sign, report, with_errors, places) for sign in (1, -1))
            compared = None
            if baselines is not None and result.scores is not None and result.mask is not None:
                scores = {name: columns[:, first + number] for name, columns in baselines.items()}
                compared = compare(index, scores, result.scores[number], result.mask, hits.proponents.tolist(), k)
            answers.append(
                Answer(
                    query={**query.fields, **settings},
                    proponents=proponents,
                    opponents=opponents,
                    search=replace(report, refine=refined),
                    reliability=assess(query.evidence, usual, metric, stored_hits[number], proponents, opponents, result.searched),
                    index=describe_index(index),
                    groups=None if groups is None else groups.groups(number),
                    baselines=compared,
                )
            )
    return answers


def _refuse_nothing(result: Found, where: str | None) -> None:
    """Refuse a search of no rows."""
    if result.searched:
        return
    if result.missing:
        raise BusyError("no part of the index that has rows to search is there at present; send the query again later")
    if where:
        raise UsageError(f"no row matches the filter {where!r}; change `where`")
    raise UsageError("every row of this index was deleted; add documents, or use another index")


def _settings(index: Index, metric: Metric, where: str | None, shares: Mapping[str, float]) -> dict[str, Any]:
    """Return the settings that an answer shows with its query.

    Args:
        shares: of the queries' second moments in the curvature, by component.
    """
    settings = metric.settings()
    if shares:
        settings["mixed"] = dict(shares) if len(shares) > 1 else next(iter(shares.values()))
    if metric.curvature and metric.training is None:
        built = {component.name: component.curvature.damping for component in index.manifest.components}
        several = len(set(built.values())) > 1
        settings["damping"] = metric.damping or (built if several else next(iter(built.values())))
    if where is not None:
        settings["where"] = where
    return settings


def _report(index: Index, metric: Metric, scorer: Scorer, hits: Hits, result: Found, reranked: Reranked | None) -> SearchReport:
    components = index.manifest.components
    is_other_scale = reranked is not None and reranked.report.unprojected_layers > 0  # components with other weights
    slope = None if is_other_scale else scorer.unit.slope
    return SearchReport(
        method="by FAISS" if result.faiss else "exact" if hits.recall == 1 else "by quantized scan and rescore",
        rows=result.searched,
        candidates=hits.candidates,
        recall=hits.recall,
        estimates=reranked is None and any(c.one_bit and metric.weights.get(c.name, 1.0) for c in components),
        note=hits.note,
        seconds=hits.seconds,
        missing=result.missing,
        faiss=result.faiss,
        rerank=None if reranked is None else reranked.report,
        unit=scorer.unit.name,
        slope=None if slope is None else slope.model_dump(),
        positive=None if is_other_scale else hits.positive,
        negative=None if is_other_scale else hits.negative,
    )


def describe_index(index: Index) -> dict[str, Any]:
    """Return a JSON-ready description of the index of an answer."""
    manifest = index.manifest
    return {
        "path": str(index.path.resolve()),
        "manifest": manifest.number,
        "models": [model.id for model in manifest.models],
        "rows": manifest.rows,
        "components": [component.name for component in manifest.components],
        "linear": all(component.linear for component in manifest.components),
        "measured": [round(tracked.share, 4) for tracked in manifest.build.tracked],
    }


def _attributions(
    scorer: Scorer, query: int, hits: Hits, sign: int, report: SearchReport, with_errors: bool, places: Mapping[int, Place]
) -> tuple[Attribution, ...]:
    """Describe proponents (sign 1) or opponents (sign -1) of a query.

    Args:
        with_errors: the scores have standard errors.
        places: of reranked examples by stored rows.
    """
    index = scorer.index
    rows, scores = (hits.proponents, hits.proponent_scores) if sign > 0 else (hits.opponents, hits.opponent_scores)
    total = report.positive if sign > 0 else report.negative
    errors = scorer.standard_errors(query, rows).tolist() if with_errors else [None] * len(rows)
    attributions = []
    for number, (row, score, error, example) in enumerate(
        zip(rows.tolist(), scores.tolist(), errors, index.examples(rows.tolist()), strict=True)
    ):
        place = places.get(row, _NO_PLACE)
        below = report.rows - number - 1 if sign > 0 else number
        attributions.append(
            Attribution(
                rank=number + 1,
                row=row,
                id=example.id,
                score=score,
                text=example.text,
                source=example.source,
                document=example.document,
                metadata=example.metadata,
                error=error,
                percentile=100 * below / report.rows,
                share=max(0.0, (score if place.score is None else place.score) / total) if total else None,
                uncertain=is_uncertain(score, error),
                stored_rank=place.rank,
                stored_score=place.score,
            )
        )
    return tuple(attributions)
