"""Reliability of an answer: what of the query and of its scores is unlike training examples, in plain sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..store.usual import Usual, share_below
from .answers import Attribution, Reliability
from .metric import Metric
from .options import Mode
from .search import Hits

_RARE = 0.02  # share of training examples that are as far from the others
_CERTAIN = 0.01  # nats a token: a probability of 0.99
_LITTLE = 0.2  # share of the proponents that another mode finds
_LEAST_COMPARED = 5  # proponents
_MOSTLY = 0.9  # of the rows
_ERRORS = 2.0  # standard errors
FEW = 50  # examples of a sample, below which nothing is said about the rarest of them


@dataclass(frozen=True)
class QueryEvidence:
    """Facts about a query besides its rows.

    Attributes:
        loss: nats for each token that its loss is on; None where that is not known, as of a contrast.
        density: logarithm of the kernel density of hidden states at its own; None where the index stores none.
        by_row: it is a training example.
    """

    loss: float | None = None
    density: float | None = None
    by_row: bool = False


def compared_modes(metric: Metric) -> tuple[Mode, ...]:
    """The modes whose best rows an answer is compared with: those that the stored rows give without further work."""
    if metric.changes_curvature or metric.mix is not None or metric.layers or metric.preset is not None or metric.refine:
        return ()
    modes: tuple[Mode, ...] = ("influence", "cosine", "loss-normalized")
    return tuple(mode for mode in modes if mode != metric.mode)


def assess(
    evidence: QueryEvidence,
    usual: Usual | None,
    metric: Metric,
    stored: Hits,
    proponents: Sequence[Attribution],
    opponents: Sequence[Attribution],
    searched: int,
) -> Reliability:
    """Assess an answer.

    Args:
        stored: hits by stored rows, before a rerank.
        searched: number of rows.
    """
    agreement = _agreement(stored, len(proponents))
    similarity = None
    if not evidence.by_row:
        cosines = stored.proponent_scores if metric.mode == "cosine" else stored.best_otherwise.get("cosine", (None, np.zeros(0)))[1]
        similarity = min(1.0, float(cosines[0])) if len(cosines) else 0.0 if stored.best_otherwise or metric.mode == "cosine" else None
    uncertain = tuple(sum(a.uncertain for a in side) for side in (proponents, opponents))
    unmatched = None if stored.nonzero is None else searched - stored.nonzero
    warnings = [
        *_of_query(evidence, usual, similarity),
        *_of_scores(proponents, opponents, unmatched, searched),
        *_of_modes(metric, agreement, len(proponents)),
    ]
    return Reliability(
        warnings=tuple(warnings),
        loss=evidence.loss,
        loss_percentile=None if usual is None or evidence.loss is None else 100 * share_below(usual.losses, evidence.loss),
        similarity=similarity,
        similarity_percentile=_percentile(None if usual is None else usual.similarities, similarity),
        density_percentile=_percentile(None if usual is None else usual.densities, evidence.density),
        agreement=agreement,
        uncertain_proponents=uncertain[0],
        uncertain_opponents=uncertain[1],
        unmatched=unmatched,
    )


def _percentile(values: Sequence[float] | None, value: float | None) -> float | None:
    return None if values is None or value is None else 100 * share_below(tuple(values), value)


def _agreement(stored: Hits, k: int) -> dict[str, float]:
    """Return, by other mode, the share of the best rows that are also among its best."""
    best = stored.proponents[:k].tolist()
    return {mode: len(set(best) & set(rows[:k].tolist())) / len(best) for mode, (rows, _) in stored.best_otherwise.items() if best}


def _of_query(evidence: QueryEvidence, usual: Usual | None, similarity: float | None) -> list[str]:
    warnings = []
    loss = evidence.loss
    if loss is not None and loss < _CERTAIN:
        warnings.append(f"the model is nearly certain of this ({loss:.2g} nats a token), so its gradient is small and scores say little")
    if usual is None or len(usual.losses) < FEW:
        if not evidence.by_row:
            warnings.append(
                f"what is usual for training examples is not known (it takes {FEW} of them), so loss and likeness are not judged"
            )
        return warnings
    if loss is not None and share_below(usual.losses, loss) > 1 - _RARE:
        share = share_below(usual.losses, loss)
        others = "all" if share == 1 else f"{share:.0%} of"
        warnings.append(f"the model does not expect this: {loss:.2g} nats a token, more than {others} sampled {usual.of}")
    if usual.similarities is not None and similarity is not None and share_below(usual.similarities, similarity) < _RARE:
        warnings.append(f"no searched example is as like this as {usual.of} are like some other; the corpus may hold nothing of it")
    if usual.densities is not None and evidence.density is not None and share_below(usual.densities, evidence.density) < _RARE:
        warnings.append("this is unlike what the model was trained on: hardly any training example has a hidden state near its own")
    return warnings


def _of_scores(proponents: Sequence[Attribution], opponents: Sequence[Attribution], unmatched: int | None, searched: int) -> list[str]:
    warnings = []
    for name, side in (("proponents", proponents), ("opponents", opponents)):
        count = sum(a.uncertain for a in side)
        if count:
            lie = "lies" if count == 1 else "lie"
            warnings.append(f"{count} of the {len(side)} {name} {lie} within two standard errors of zero: of either sign")
    if unmatched is not None and unmatched > _MOSTLY * searched:
        warnings.append(f"{unmatched:,} of {searched:,} examples share no token with this and cannot be found by the rows of this index")
    if not proponents:
        warnings.append("nothing in the searched examples speaks for this")
    return warnings


def _of_modes(metric: Metric, agreement: Mapping[str, float], shown: int) -> list[str]:
    named = {"influence": "cosine", "loss-normalized": "influence", "cosine": "influence"}[metric.mode]
    share = agreement.get(named, 1.0)
    if shown < _LEAST_COMPARED or share > _LITTLE:
        return []
    return [f"the choice of the score decides: by {named}, {round(share * shown)} of the {shown} proponents are among the best"]


def is_uncertain(score: float, error: float | None) -> bool:
    """Return True if a score lies within two standard errors of zero."""
    return error is not None and abs(score) < _ERRORS * error
