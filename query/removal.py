"""Removal lists: examples to take out of training or of an index, each with the reason why, as JSON lines.

A line is an object with `id`, `row`, `document`, `source`, `reason`, and, where an answer gave it, `query`, `score`, `unit` and `rank`.
`wherefrom delete`, `takedown` and `act` read the ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..store.errors import UsageError
from ..store.index import Index
from .answers import Answer
from .results import write_lines


@dataclass(frozen=True)
class Removal:
    """A line of a removal list."""

    id: str
    reason: str
    details: Mapping[str, Any]


def of_answers(answers: Sequence[Answer], most: int, opponents: bool = False) -> list[Removal]:
    """Take the best proponents of answers, or the worst opponents: each example once, for the query in which it ranks highest.

    Args:
        most: examples in all.
    """
    hits = []
    for number, answer in enumerate(answers):
        for hit in answer.opponents if opponents else answer.proponents:
            query = answer.query.get("id") or str(number)
            hits.append((hit.rank, number, query, hit, answer))
    side = "opponent" if opponents else "proponent"
    removals: dict[str, Removal] = {}
    for rank, _, query, hit, answer in sorted(hits, key=lambda entry: entry[:2]):
        details = {"query": query, "rank": rank, "score": hit.score, "unit": answer.search.unit, "percentile": hit.percentile}
        removals.setdefault(hit.id, Removal(hit.id, f"{side} of rank {rank} of query {query}", details))
    return list(removals.values())[:most]


def of_ids(ids: Iterable[str], reason: str) -> list[Removal]:
    """Take ids that were chosen otherwise, with one reason."""
    return [Removal(id, reason, {}) for id in dict.fromkeys(ids)]


def write_removal(index: Index | str | Path, removals: Sequence[Removal], out: str | Path) -> int:
    """Write a removal list; returns the number of rows that it names.

    Args:
        index: an open index, or its path.
        removals: of `of_answers`, `of_ids` or your own.

    Raises:
        UsageError: `out` exists, the list is empty, or an id is not in the index.
    """
    index = index if isinstance(index, Index) else Index(index)
    if not removals:
        raise UsageError("there is nothing to remove; ask for more, or name ids")
    by_id = {removal.id: removal for removal in removals}
    mask = index.known_rows(by_id, "fix the ids") & index.alive
    if not mask.any():
        raise UsageError(f"all of these ids were deleted from {index.path}")
    about = {"index": str(index.path.resolve()), "manifest": index.manifest.number}
    rows = mask.nonzero()[0].tolist()

    def line(row: int) -> dict[str, Any]:
        e = index.example(row)
        removal = by_id.get(e.id) or by_id[e.document]
        fields = {"id": e.id, "row": row, "document": e.document, "source": e.source, "reason": removal.reason}
        return {**fields, **removal.details, **about}

    write_lines(Path(out), map(line, rows))
    return len(rows)
