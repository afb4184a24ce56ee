"""Answers and explanations: frozen records of the rows that were found, the parts of their scores, and how far they can be trusted.

Nothing heavy is imported here, so that a command that asks a server starts at once.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from ..store.extras import require
from ..store.printable import printable

if TYPE_CHECKING:
    import pandas as pd


_SHOWN_TEXT = 400  # characters of a text in a notebook


@dataclass(frozen=True)
class Attribution:
    """One training example in an answer.

    Attributes:
        rank: from 1, within proponents or opponents.
        row, id: where it stands in the index, and its stable id.
        score: positive for a proponent (training on it lowered the query's loss), negative for an opponent. Under
            "influence" in nats per unit of example weight, up to the damped curvature's scale; under "cosine" from -1 to 1.
        document: the id of the document that the example was cut from; its own id when it is whole.
        error: the score's standard error, from one-bit codes (see `Scorer.standard_errors`); None where the query is itself such a row.
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
        method: "exact" (all rows, or all posting lists of the query's tokens) or "by quantized scan and rescore" (see search.py).
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
class Group:
    """One group's part in the answer to one query.

    Attributes:
        value: of the column; None where examples lack it.
        rows: its examples. `positive`, `negative`: how many of them score above and below 0.
        total: sum of its scores; `low` and `high` hold 95 % of its bootstrap draws.
        positive_share, negative_share: its part of all positive, and of all negative influence.
    """

    value: Any
    rows: int
    positive: int
    negative: int
    total: float
    low: float
    high: float
    positive_share: float
    negative_share: float


@dataclass(frozen=True)
class Baseline:
    """What a baseline says of one query.

    Attributes:
        name: "bm25", "hidden" or "norm".
        rows, ids, scores: of its own best k, best first.
        correlation: Spearman's rank correlation with the answer's scores, over all rows that were searched; None where either is constant.
        shared: how many of the answer's proponents are among its best k.
    """

    name: str
    rows: tuple[int, ...]
    ids: tuple[str, ...]
    scores: tuple[float, ...]
    correlation: float | None
    shared: int


def _baseline(record: Mapping[str, Any]) -> Baseline:
    return Baseline(**{**record, **{name: tuple(record[name]) for name in ("rows", "ids", "scores")}})


@dataclass(frozen=True)
class Answer:
    """Proponents (positive, highest first) and opponents (negative, lowest first) of one query."""

    query: Mapping[str, Any]
    proponents: tuple[Attribution, ...]
    opponents: tuple[Attribution, ...]
    search: SearchReport
    index: Mapping[str, Any]
    groups: tuple[Group, ...] | None = None
    baselines: tuple[Baseline, ...] | None = None

    def __repr__(self) -> str:
        best = f", best {self.proponents[0].id!r} ({self.proponents[0].score:.4g})" if self.proponents else ""
        return f"Answer({len(self.proponents)} proponents, {len(self.opponents)} opponents of {self.search.rows:,} rows{best})"

    def _repr_html_(self) -> str:
        """Tables of proponents and opponents, for notebooks."""
        parts = []
        for title, attributions in (("Proponents", self.proponents), ("Opponents", self.opponents)):
            cells = ((str(a.rank), f"{a.score:.4g}", a.id, a.text[:_SHOWN_TEXT]) for a in attributions)
            rows = "".join("<tr>" + "".join(f"<td>{escape(printable(cell))}</td>" for cell in row) + "</tr>" for row in cells)
            parts.append(f"<h4>{title}</h4><table><tr><th></th><th>score</th><th>id</th><th>text</th></tr>{rows}</table>")
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON-ready dictionaries and lists, keys as in `wherefrom query --json`."""
        return {
            "query": dict(self.query),
            "proponents": [asdict(a) for a in self.proponents],
            "opponents": [asdict(a) for a in self.opponents],
            **({"groups": [asdict(g) for g in self.groups]} if self.groups is not None else {}),
            **({"baselines": [asdict(c) for c in self.baselines]} if self.baselines is not None else {}),
            "search": asdict(self.search),
            "index": dict(self.index),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Answer":
        """An answer from what `to_dict` made of it."""
        return cls(
            query=record["query"],
            proponents=tuple(Attribution(**a) for a in record["proponents"]),
            opponents=tuple(Attribution(**a) for a in record["opponents"]),
            search=SearchReport(**record["search"]),
            index=record["index"],
            groups=tuple(Group(**g) for g in record["groups"]) if "groups" in record else None,
            baselines=tuple(map(_baseline, record["baselines"])) if "baselines" in record else None,
        )

    def to_pandas(self) -> "pd.DataFrame":
        """Proponents, then opponents, one a line, with a column `kind`.

        Raises:
            UsageError: pandas is not installed.
        """
        kinds = {"proponent": self.proponents, "opponent": self.opponents}
        columns = ["kind", *Attribution.__dataclass_fields__]
        pd = require("pandas", "pandas")
        return pd.DataFrame([{"kind": kind, **asdict(a)} for kind, found in kinds.items() for a in found], columns=columns)


@dataclass(frozen=True)
class Part:
    """A part of a score.

    Attributes:
        name: of a component, a layer, or (as text, where a tokenizer is at hand) a token.
        score: what it adds; parts of one kind add up to the score of what they split.
        component: which component a layer or token belongs to.
        token: a token's id.
    """

    name: str
    score: float
    component: str | None = None
    token: int | None = None


@dataclass(frozen=True)
class TokenShares:
    """What each token of a text adds to the score. Rows are made anew for it, so that the sum is the score of whole rows, not of codes.

    Attributes:
        tokens: their texts, which joined are the whole text; "" of a token that ends within a character.
    """

    tokens: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Explanation:
    """The score of one training example, taken apart.

    Attributes:
        row, id, text, score: which example, and its score, as a query gives it (estimated cosines may lie beyond 1).
        components, layers, vocabulary: see above; each strongest first; `blocks` are sums over the layers of a transformer block.
        recomputed: the score of the rows made anew, before they were coded; None where no model was asked.
        example, query: shares of the training example's tokens, and of the query's; each adds up to `recomputed`.
    """

    row: int
    id: str
    text: str
    score: float
    components: tuple[Part, ...]
    layers: tuple[Part, ...]
    vocabulary: tuple[Part, ...]
    recomputed: float | None = None
    example: TokenShares | None = None
    query: TokenShares | None = None
    blocks: tuple[Part, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, keys as in `wherefrom explain --json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Explanation":
        """An explanation from what `to_dict` made of it."""
        parts = {name: tuple(Part(**part) for part in record[name]) for name in ("components", "layers", "vocabulary", "blocks")}
        shares = {
            name: None if record[name] is None else TokenShares(tuple(record[name]["tokens"]), tuple(record[name]["scores"]))
            for name in ("example", "query")
        }
        return cls(**{**record, **parts, **shares})
