"""Measurement of what is usual for training examples of an index, asked as queries, done at the end of a build (see store/usual.py)."""

from collections.abc import Iterable

import numpy as np

from ..indexer.encoder import AskedExamples
from ..query.metric import Metric
from ..query.reliability import FEW
from ..query.scoring import all_scores
from ..store.errors import UsageError
from ..store.index import Index
from ..store.shapes import Float64, Int64
from ..store.usual import LEAST_BANDWIDTH, HiddenStates, Usual, write_usual
from ..store.vectors import Rows, concatenate

_MOST = 128  # examples
_EIGHTH = 8  # of the rows, so that asking them takes little beside the build


def sample_size(rows: int) -> int:
    """Return how many of an index's rows to ask; 0 where they are too few to say what is rare."""
    return 0 if rows < FEW else max(FEW, min(_MOST, rows // _EIGHTH))


def measure_usual(index: Index, rows: Int64[np.ndarray, " rows"] | None, parts: Iterable[AskedExamples]) -> Usual | None:
    """Write what is usual for some examples; nothing where no loss is finite.

    Args:
        rows: of training examples, each of which is not its own neighbor; None for held-out texts.
        parts: the examples as queries, in order (see `Encoder.ask`).
    """
    asked = list(parts)
    losses = np.concatenate([losses for _, losses, _ in asked])
    finite = np.isfinite(losses)
    if not finite.any():
        return None
    similarities = _similarities(index, rows, concatenate([part for part, _, _ in asked]), len(losses))
    usual = Usual(
        of="held-out texts" if rows is None else "training examples",
        losses=_ascending(losses[finite]),
        similarities=None if similarities is None else _ascending(similarities[finite]),
    )
    if all(hidden is not None for _, _, hidden in asked) and len(index) > 1:
        states = np.concatenate([hidden for _, _, hidden in asked if hidden is not None])[finite]
        distances = HiddenStates(index).squared_distances(states, None if rows is None else rows[finite].tolist())
        bandwidth = HiddenStates.bandwidth(distances)
        if LEAST_BANDWIDTH < bandwidth < np.inf:
            densities = _ascending(HiddenStates.log_densities(distances, bandwidth))
            usual = usual.model_copy(update={"densities": densities, "bandwidth": bandwidth})
    write_usual(index, usual)
    return usual


def _similarities(index: Index, rows: Int64[np.ndarray, " rows"] | None, asked: Rows, count: int) -> Float64[np.ndarray, " rows"] | None:
    """Return each example's highest cosine with another's row; None where rows have no cosines."""
    highest = np.zeros(count)
    try:
        for first, scores in all_scores(index, asked, Metric("cosine")):
            if rows is not None:
                own = np.flatnonzero((rows >= first) & (rows < first + scores.shape[1]))
                scores[own, rows[own] - first] = 0.0
            highest = np.maximum(highest, scores.max(axis=1, initial=0.0))
    except UsageError:
        return None
    return highest


def _ascending(values: np.ndarray) -> tuple[float, ...]:
    return tuple(np.sort(values.astype(np.float64)).tolist())
