"""Answers: frozen records of what was asked, what was found and how far it can be trusted."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..store.errors import UsageError
from ..store.index import Index
from .search import Hits, Metric

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Question:
    """What to attribute: a completion after a prompt, a whole text, or a row of the index; exactly one of them."""

    prompt: str = ""
    completion: str | None = None
    text: str | None = None
    row: int | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("completion", "text", "row") if getattr(self, name) is not None]
        if len(given) != 1 or (self.prompt and given != ["completion"]):
            raise UsageError("a question is a prompt with a completion, or a text, or a row: give exactly one of them")
        try:
            f"{self.prompt}{self.completion}{self.text}{self.id}".encode()
        except UnicodeEncodeError as error:
            raise UsageError("the question holds bytes that are not UTF-8 text; mend its encoding") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set."""
        asked = {"prompt": self.prompt, "completion": self.completion} if self.completion is not None else {}
        return {k: v for k, v in {"id": self.id, **asked, "text": self.text, "row": self.row}.items() if v is not None}


@dataclass(frozen=True)
class Attribution:
    """One training example in an answer.

    Attributes:
        rank: from 1, within proponents or opponents.
        row, id: where it stands in the index, and its stable id.
        score: positive for a proponent (training on it lowered the question's loss), negative for an opponent. Under
            "influence" in nats per unit of example weight, up to the damped curvature's scale; under "cosine" from -1 to 1.
        document: the id of the document that the example was cut from; its own id when it is whole.
    """

    rank: int
    row: int
    id: str
    score: float
    text: str
    source: str
    document: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class SearchReport:
    """How the answer was found: the method, the rows searched, the certified recall (None where scores are estimates, from 1-bit codes) and
    the wall time (seconds) of the pass.
    """

    method: str
    rows: int
    recall: float | None
    seconds: float


@dataclass(frozen=True)
class Answer:
    """Proponents (positive, highest first) and opponents (negative, lowest first) of one question."""

    query: Mapping[str, Any]
    proponents: tuple[Attribution, ...]
    opponents: tuple[Attribution, ...]
    search: SearchReport
    index: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON-ready dictionaries and lists, keys as in `whence query --json`."""
        return {
            "query": dict(self.query),
            "proponents": [asdict(a) for a in self.proponents],
            "opponents": [asdict(a) for a in self.opponents],
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


def make_answers(index: Index, questions: Sequence[Question], hits: Sequence[Hits], metric: Metric, opponents: bool) -> list[Answer]:
    """Put ids, texts and metadata to the rows that a search found."""
    about = describe_index(index)
    estimated = any(s.kind == "keyed" and metric.weights.get(s.name, 1.0) for s in index.manifest.segments)
    method, recall = ("scan of 1-bit codes", None) if estimated else ("exact", 1.0)
    answers = []
    for question, hit in zip(questions, hits, strict=True):
        built = {s.name: s.curvature.damping for s in index.manifest.segments}
        settings: dict[str, Any] = {
            "mode": metric.mode,
            "damping": metric.damping or (built if len(built) > 1 else next(iter(built.values()))),
        }
        if metric.weights:
            settings["weights"] = dict(metric.weights)
        answers.append(
            Answer(
                query={**question.to_dict(), **settings},
                proponents=_attributions(index, hit.proponents, hit.proponent_scores),
                opponents=_attributions(index, hit.opponents, hit.opponent_scores) if opponents else (),
                search=SearchReport(method, len(index), recall, hit.seconds),
                index=about,
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


def _attributions(index: Index, rows: np.ndarray, scores: np.ndarray) -> tuple[Attribution, ...]:
    found = []
    for rank, (row, score) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True), 1):
        e = index.example(row)
        found.append(Attribution(rank, row, e.id, score, e.text, e.source, e.document, e.metadata))
    return tuple(found)
