"""Answers: frozen records of what was asked, what was found and how far it can be trusted."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..store.errors import UsageError
from ..store.index import Index
from .controls import Control
from .groups import Group
from .scoring import Metric
from .search import Hits

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Question:
    """What to attribute: a completion after a prompt, a whole text, or a row of the index; exactly one of them.

    Attributes:
        against: another completion after the same prompt: what made the model say the one rather than the other.
        span: a part of the completion or the text, as it stands there: its tokens alone are asked about.
        weight: in a mean of questions.
    """

    prompt: str = ""
    completion: str | None = None
    text: str | None = None
    row: int | None = None
    id: str | None = None
    against: str | None = None
    span: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("completion", "text", "row") if getattr(self, name) is not None]
        if len(given) != 1 or (self.prompt and given != ["completion"]):
            raise UsageError("a question is a prompt with a completion, or a text, or a row: give exactly one of them")
        if self.against is not None and self.completion is None:
            raise UsageError("another completion to hold against needs a completion; give both")
        if self.span is not None and (self.row is not None or self.against is not None):
            raise UsageError("a span is a part of one completion or text; give it without a row and without another completion")
        if self.weight is not None and not np.isfinite(self.weight):
            raise UsageError(f"a question's weight is {self.weight}; it must be a number")
        try:
            f"{self.prompt}{self.completion}{self.text}{self.id}{self.against}{self.span}".encode()
        except UnicodeEncodeError as error:
            raise UsageError("the question holds bytes that are not UTF-8 text; mend its encoding") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set."""
        asked = {"prompt": self.prompt, "completion": self.completion} if self.completion is not None else {}
        more = {"text": self.text, "row": self.row, "against": self.against, "span": self.span, "weight": self.weight}
        return {k: v for k, v in {"id": self.id, **asked, **more}.items() if v is not None}


@dataclass(frozen=True)
class Attribution:
    """One training example in an answer.

    Attributes:
        rank: from 1, within proponents or opponents.
        row, id: where it stands in the index, and its stable id.
        score: positive for a proponent (training on it lowered the question's loss), negative for an opponent. Under
            "influence" in nats per unit of example weight, up to the damped curvature's scale; under "cosine" from -1 to 1.
        document: the id of the document that the example was cut from; its own id when it is whole.
        error: the score's standard error, from one-bit codes (see `search.standard_errors`); None where the question is itself such a row.
    """

    rank: int
    row: int
    id: str
    score: float
    text: str
    source: str
    document: str
    metadata: Mapping[str, Any]
    error: float | None


@dataclass(frozen=True)
class SearchReport:
    """How an answer was found.

    Attributes:
        method: "exact" (all rows, or all posting lists of the question's tokens) or "coarse to fine" (see search.py).
        rows: those that were searched, and `candidates`: those of them that were read.
        recall: certified: the probability that none of the best is missing.
        estimates: whether scores come from one-bit codes and are estimates (with the standard errors beside them).
        note: why all rows were scanned although a lower recall was asked for.
        seconds: wall time of the pass.
    """

    method: str
    rows: int
    candidates: int
    recall: float
    estimates: bool
    note: str | None
    seconds: float


@dataclass(frozen=True)
class Answer:
    """Proponents (positive, highest first) and opponents (negative, lowest first) of one question."""

    query: Mapping[str, Any]
    proponents: tuple[Attribution, ...]
    opponents: tuple[Attribution, ...]
    search: SearchReport
    index: Mapping[str, Any]
    groups: tuple[Group, ...] | None = None
    controls: tuple[Control, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON-ready dictionaries and lists, keys as in `whence query --json`."""
        return {
            "query": dict(self.query),
            "proponents": [asdict(a) for a in self.proponents],
            "opponents": [asdict(a) for a in self.opponents],
            **({"groups": [asdict(g) for g in self.groups]} if self.groups is not None else {}),
            **({"controls": [asdict(c) for c in self.controls]} if self.controls is not None else {}),
            "search": asdict(self.search),
            "index": dict(self.index),
        }

    def to_pandas(self) -> "pd.DataFrame":
        """Proponents, then opponents, one a line, with a column `kind`.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise UsageError("pandas is not installed; pip install pandas") from error
        kinds = {"proponent": self.proponents, "opponent": self.opponents}
        columns = ["kind", *Attribution.__dataclass_fields__]
        return pd.DataFrame([{"kind": kind, **asdict(a)} for kind, found in kinds.items() for a in found], columns=columns)


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
    controls: Sequence[tuple[Control, ...]] | None = None,
    errors: Sequence[tuple[np.ndarray, np.ndarray] | None],
) -> list[Answer]:
    """Put ids, texts and metadata to the rows that a search found.

    Args:
        asked: what each question was.
        where, searched: the filter, and how many rows it left.
        groups, controls: of each question.
        errors: of each question the standard errors of its proponents' and its opponents' scores, where they are known.
    """
    about = describe_index(index)
    estimates = any((s.kind == "keyed" or s.dtype == "1bit") and metric.weights.get(s.name, 1.0) for s in index.manifest.segments)
    built = {s.name: s.curvature.damping for s in index.manifest.segments}
    dampings = metric.damping or (built if len(set(built.values())) > 1 else next(iter(built.values())))
    settings: dict[str, Any] = {"mode": metric.mode, **({"damping": dampings} if metric.curvature else {"curvature": False})}
    settings |= {"weights": dict(metric.weights)} if metric.weights else {}
    settings |= {"layers": list(metric.layers)} if metric.layers else {}
    settings |= {"where": where} if where is not None else {}
    answers = []
    for number, (question, hit, known) in enumerate(zip(asked, hits, errors, strict=True)):
        answers.append(
            Answer(
                query={**question, **settings},
                proponents=_attributions(index, hit.proponents, hit.proponent_scores, known and known[0]),
                opponents=_attributions(index, hit.opponents, hit.opponent_scores, known and known[1]) if opponents else (),
                search=SearchReport(
                    method="exact" if hit.recall == 1 else "coarse to fine",
                    rows=len(index) if searched is None else searched,
                    candidates=hit.candidates,
                    recall=hit.recall,
                    estimates=estimates,
                    note=hit.note,
                    seconds=hit.seconds,
                ),
                index=about,
                groups=tuple(groups[number]) if groups is not None else None,
                controls=controls[number] if controls is not None else None,
            )
        )
    return answers


def describe_index(index: Index) -> dict[str, Any]:
    """What an answer says of the index that it came from."""
    m = index.manifest
    return {
        "path": str(index.path),
        "manifest": m.number,
        "models": [model.id for model in m.models],
        "rows": m.rows,
        "segments": [s.name for s in m.segments],
    }


def _attributions(index: Index, rows: np.ndarray, scores: np.ndarray, errors: np.ndarray | None) -> tuple[Attribution, ...]:
    found = []
    known = [None] * len(rows) if errors is None else errors.tolist()
    for rank, (row, score, error) in enumerate(zip(rows.tolist(), scores.tolist(), known, strict=True), 1):
        e = index.example(row)
        found.append(Attribution(rank, row, e.id, score, e.text, e.source, e.document, e.metadata, error))
    return tuple(found)
