"""Answers and explanations: frozen records of the rows that were found, the parts of their scores, and how far they can be trusted.

Nothing heavy is imported here, so that a command that asks a server starts at once.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from ..store.printable import printable
from .tables import data_frame, html_table

if TYPE_CHECKING:
    import pandas as pd


_SHOWN_TEXT = 400  # characters of a text in a notebook
_SHOWN_PARTS = 10  # of a kind, in a notebook
_FOR = "46, 111, 214"  # color of tokens in a notebook
_AGAINST = "217, 119, 6"


@dataclass(frozen=True)
class Attribution:
    """One training example in an answer.

    Attributes:
        rank: from 1, within proponents or opponents.
        row, id: where it stands in the index, and its stable id.
        score: positive for a proponent (training on it lowered the query's loss), negative for an opponent. In the unit of the search's
            report: nats that the query's loss is predicted to rise by without the example; as cosines from -1 to 1.
        document: the id of the document that the example was cut from; its own id when it is whole.
        error: the score's standard error, from one-bit codes (see `Scorer.standard_errors`); None where the query is itself such a row,
            and of a recomputed score.
        percentile: percentage of the searched rows that rank below it; of equal scores, the lower row ranks higher.
        share: its part of the sum of all scores of its sign; None where not all rows were scored.
        uncertain: the score lies within two standard errors of zero.
        stored_rank, stored_score: of a recomputed score, rank and score by stored rows; None where a baseline alone found the example.
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
    percentile: float
    share: float | None
    uncertain: bool
    stored_rank: int | None = None
    stored_score: float | None = None


@dataclass(frozen=True)
class RerankReport:
    """Report of a rerank: candidates of an answer ranked again by recomputed scores (see rerank.py).

    Attributes:
        candidates: examples whose rows were computed again.
        highest, lowest: scores by stored rows that no other searched row is above, or below; `lowest` is None without opponents.
        difference: root mean square of recomputed minus stored scores over the lower-ranked half of the candidates, those nearest to the
            other rows; None without candidates by stored rows.
        seconds: wall time.
        unprojected_layers: number of layers whose gradients were recomputed without projection (`wherefrom fit`); 0 for the rows that the
            index codes.
        query_bits: of a coordinate of the queries' vectors: 32, or 8 where more queries are asked together than fit into memory.
    """

    candidates: int
    highest: float
    lowest: float | None
    difference: float | None
    seconds: float
    unprojected_layers: int = 0
    query_bits: int = 32


@dataclass(frozen=True)
class RefineReport:
    """Report of the refinement of queries that were asked together (see `ScoreOptions`).

    Attributes:
        iterations: of conjugate gradients.
        residual: what was left of the equation, relative to the query's gradient; the mean over the queries.
        damping: by refined component, relative to the mean eigenvalue of each layer's weights; None where it is one over the learning time.
        products: examples that the products of the Gauss-Newton matrix with one query's vectors passed.
        seconds: wall time.
    """

    iterations: int
    residual: float
    damping: Mapping[str, float] | None
    products: int
    seconds: float


@dataclass(frozen=True)
class FaissReport:
    """The FAISS index that found an answer's candidates, and the recall that was measured when it was made; no certificate.

    Attributes:
        factory, parameters: what it is.
        queries, k: held-out rows that were asked, and the number of best and of worst rows that had to be found for each.
        proponents, opponents: shares of these that were found.
    """

    factory: str
    parameters: str
    queries: int
    k: int
    proponents: float
    opponents: float


@dataclass(frozen=True)
class SearchReport:
    """Report of a search.

    Attributes:
        method: "exact" (all rows, or all posting lists of the query's tokens), "by quantized scan and rescore" (see search.py), "by FAISS".
        rows: those that were searched, and `candidates`: those of them that were read.
        recall: certified: the probability that none of the best is missing; None where nothing is certified (by FAISS).
        estimates: whether scores come from one-bit codes and are estimates (with the standard errors beside them).
        rerank: how candidates were ranked again; None where they were not.
        refine: how queries were refined; None where they were not.
        note: why all rows were scanned although a lower recall was asked for.
        seconds: wall time of the pass.
        faiss: the FAISS index that found the candidates; None for a scan.
        unit: of the scores: "nats", "nats per nat" of the example's own loss, or None (see query/units.py).
        slope: the measured change of losses for each nat, which the scores hold, with its interval and what measured it; None where it was
            not measured.
        positive, negative: sums of all scores above 0, and below, by stored rows; None where not all rows were scored.
        missing: rows of parts of the index that were not there and were not waited for (`partial`); whether a filter matches them is
            not known.
    """

    method: str
    rows: int
    candidates: int
    recall: float | None
    estimates: bool
    note: str | None
    seconds: float
    missing: int = 0
    faiss: FaissReport | None = None
    rerank: RerankReport | None = None
    refine: RefineReport | None = None
    unit: str | None = None
    slope: Mapping[str, Any] | None = None
    positive: float | None = None
    negative: float | None = None

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "SearchReport":
        """A report from its dictionary."""
        kinds = {"rerank": RerankReport, "refine": RefineReport, "faiss": FaissReport}
        reports = {name: kind(**record[name]) for name, kind in kinds.items() if record.get(name) is not None}
        return cls(**{**record, **reports})


@dataclass(frozen=True)
class Reliability:
    """Reliability of an answer: what speaks for and against it (see query/reliability.py).

    Attributes:
        warnings: what speaks against it, a sentence each; empty where nothing does.
        loss: of the query, nats for each token that its loss is on; None where that is not known.
        loss_percentile: percentage of sampled training examples whose loss is lower; likewise `similarity_percentile`, and
            `density_percentile` of the density of hidden states at the query's.
        similarity: the highest cosine of the query's row with another's; None where no cosines were computed.
        agreement: by other mode, the share of the proponents by stored rows that are also among its best.
        uncertain_proponents, uncertain_opponents: how many lie within two standard errors of zero.
        unmatched: number of searched rows that score exactly 0, since they share no token with the query; None where not all were scored.
    """

    warnings: tuple[str, ...]
    loss: float | None
    loss_percentile: float | None
    similarity: float | None
    similarity_percentile: float | None
    density_percentile: float | None
    agreement: Mapping[str, float]
    uncertain_proponents: int
    uncertain_opponents: int
    unmatched: int | None


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
    """Result of one baseline for one query.

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
    reliability: Reliability
    index: Mapping[str, Any]
    groups: tuple[Group, ...] | None = None
    baselines: tuple[Baseline, ...] | None = None

    def __repr__(self) -> str:
        best = f", best {self.proponents[0].id!r} ({self.proponents[0].score:.4g})" if self.proponents else ""
        return f"Answer({len(self.proponents)} proponents, {len(self.opponents)} opponents of {self.search.rows:,} rows{best})"

    def _repr_html_(self) -> str:
        """Tables of proponents and opponents, and of groups and baselines where there are some, for notebooks."""
        parts = []
        for title, attributions in (("Proponents", self.proponents), ("Opponents", self.opponents)):
            rows = [(a.rank, a.score, a.percentile, a.id, a.text[:_SHOWN_TEXT]) for a in attributions]
            parts.append(html_table(title, ("", self.search.unit or "score", "percentile", "id", "text"), rows))
        parts += [f"<p>{escape(printable(warning))}</p>" for warning in self.reliability.warnings]
        if self.groups is not None:
            columns = ("value", "rows", "total", "low", "high", "share for", "share against")
            groups = [(g.value, g.rows, g.total, g.low, g.high, g.positive_share, g.negative_share) for g in self.groups]
            parts.append(html_table("Groups", columns, groups))
        if self.baselines is not None:
            baselines = [(b.name, b.correlation, b.shared, ", ".join(b.ids)) for b in self.baselines]
            parts.append(html_table("Baselines", ("name", "correlation", "shared", "best"), baselines))
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
            "reliability": asdict(self.reliability),
            "index": dict(self.index),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Answer":
        """An answer from what `to_dict` made of it."""
        return cls(
            query=record["query"],
            proponents=tuple(Attribution(**a) for a in record["proponents"]),
            opponents=tuple(Attribution(**a) for a in record["opponents"]),
            search=SearchReport.from_dict(record["search"]),
            reliability=Reliability(**{**record["reliability"], "warnings": tuple(record["reliability"]["warnings"])}),
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
        return data_frame([{"kind": kind, **asdict(a)} for kind, attributions in kinds.items() for a in attributions], columns)

    def groups_to_pandas(self) -> "pd.DataFrame":
        """The groups, one a line; none where the query had no `group_by`.

        Raises:
            UsageError: pandas is not installed.
        """
        return data_frame([asdict(group) for group in self.groups or ()], list(Group.__dataclass_fields__))

    def baselines_to_pandas(self) -> "pd.DataFrame":
        """Baselines as a table, one row of the index a line, best first; empty if the query had no `baselines`.

        Raises:
            UsageError: pandas is not installed.
        """
        columns = ["name", "rank", "row", "id", "score", "correlation"]
        lines = [
            (b.name, rank, row, id, score, b.correlation)
            for b in self.baselines or ()
            for rank, (row, id, score) in enumerate(zip(b.rows, b.ids, b.scores, strict=True), 1)
        ]
        return data_frame([dict(zip(columns, line, strict=True)) for line in lines], columns)


@dataclass(frozen=True)
class ScorePart:
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
    """Each token's share of a score, from recomputed rows. The sum is the score of exact rows, not of codes.

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
        recomputed: the score of the recomputed rows, before they were coded; None where no model was asked.
        example, query: shares of the training example's tokens, and of the query's; each adds up to `recomputed`.
    """

    row: int
    id: str
    text: str
    score: float
    components: tuple[ScorePart, ...]
    layers: tuple[ScorePart, ...]
    vocabulary: tuple[ScorePart, ...]
    recomputed: float | None = None
    example: TokenShares | None = None
    query: TokenShares | None = None
    blocks: tuple[ScorePart, ...] = ()

    def __repr__(self) -> str:
        return f"Explanation(row {self.row}, {self.id!r}, score {self.score:.4g})"

    def _repr_html_(self) -> str:
        """The tokens in color (blue: for, orange: against) and tables of the parts, for notebooks."""
        html = [f"<h4>{escape(printable(self.id))}: {self.score:.4g}</h4>"]
        for title, shares in (("example", self.example), ("query", self.query)):
            html += [f"<p>{title}: {_colored(shares)}</p>"] if shares is not None else []
        if self.example is None:
            html.append(f"<p>{escape(printable(self.text[:_SHOWN_TEXT]))}</p>")
        for name, parts in self._parts().items():
            if parts:
                rows = [(part.name, part.score, part.component) for part in parts[:_SHOWN_PARTS]]
                left_out = f" (the strongest {_SHOWN_PARTS} of {len(parts)})" if len(parts) > _SHOWN_PARTS else ""
                html.append(html_table(name + left_out, ("name", "score", "component"), rows))
        return "".join(html)

    def _parts(self) -> dict[str, tuple[ScorePart, ...]]:
        return {"component": self.components, "layer": self.layers, "block": self.blocks, "shared token": self.vocabulary}

    def to_pandas(self) -> "pd.DataFrame":
        """The parts, one a line, with a column `kind`: component, layer, block, shared token, example token or query token.

        The scores of one kind add up to the score, for token shares to `recomputed`; layers and blocks only where these are known.

        Raises:
            UsageError: pandas is not installed.
        """
        lines = [{"kind": kind, **asdict(part)} for kind, parts in self._parts().items() for part in parts]
        for kind, shares in (("example token", self.example), ("query token", self.query)):
            pairs = zip(shares.tokens, shares.scores, strict=True) if shares is not None else ()
            lines += [{"kind": kind, "name": token, "score": score} for token, score in pairs]
        return data_frame(lines, ["kind", *ScorePart.__dataclass_fields__]).astype({"token": "Int64"})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, keys as in `wherefrom explain --json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Explanation":
        """An explanation from what `to_dict` made of it."""
        parts = {name: tuple(ScorePart(**part) for part in record[name]) for name in ("components", "layers", "vocabulary", "blocks")}
        shares = {
            name: None if record[name] is None else TokenShares(tuple(record[name]["tokens"]), tuple(record[name]["scores"]))
            for name in ("example", "query")
        }
        return cls(**{**record, **parts, **shares})


def _colored(shares: TokenShares) -> str:
    """A text as HTML: the stronger a token's color, the more it adds to the score."""
    strongest = max(map(abs, shares.scores), default=0.0) or 1.0
    spans = []
    for token, score in zip(shares.tokens, shares.scores, strict=True):
        color = f"rgba({_FOR if score > 0 else _AGAINST}, {0.6 * abs(score) / strongest:.2f})"
        spans.append(f'<span style="background: {color}" title="{score:.4g}">{escape(printable(token))}</span>')
    return "".join(spans)
