"""Weights that make the scores of components comparable, from exact scores between some rows and the scores that their codes give.

A component's weight is its share (docs/components.md has the measurements) over the mean stored score of an example with itself, times
the squared correlation of exact and stored scores: that part of a noisy estimate is signal (Wiener's shrinkage). The head's weight is 1,
else the first component's. Scores with itself are sums of squares, so some rows determine their mean well; scores between examples have
such heavy tails that their spread in a sample says little.

Where training moved a layer until the loss was stationary, its examples' gradients cancel; where it was frozen, they have a mean. If the
head's mean share (mean score between examples over mean score with themselves) is above the blocks' (without blocks, clearly above the
embeddings'), training went into the blocks, and other shares apply. Of several models the last decides this, since earlier ones have not
arrived. Where it is known which layers were trained, nothing is compared. Where only an adapter was, the shares are those of
docs/components.md for adapters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..store.manifest import Component
from ..store.shapes import Float
from .budget import Training

_SHARES: dict[Training, dict[str, float]] = {
    "trained head": {"head": 1.0, "embeddings": 0.25, "blocks": 0.1},
    "frozen head": {"head": 1.0, "embeddings": 0.7, "blocks": 0.27},
    "adapter": {"head": 1.0, "embeddings": 1.5, "blocks": 0.55},
}
_WHOLE = 8.0
_CLEARLY = 3.0  # times the embeddings' mean share, which is small in any case


@dataclass(frozen=True)
class Agreement:
    """Agreement of a component's exact scores with the stored ones.

    Attributes:
        self_score: an example's mean score with itself, by its stored code.
        fidelity: correlation of exact and stored scores.
        mean_share: mean score between different examples, divided by an example's mean score with itself.
    """

    self_score: float
    fidelity: float
    mean_share: float

    @classmethod
    def of(cls, exact: Float[np.ndarray, "rows rows"], stored: Float[np.ndarray, "rows rows"]) -> "Agreement":
        """Compare scores between the same rows: exact ones, and those of exact queries with stored rows."""
        between = ~np.eye(len(exact), dtype=bool)
        exact_self_score = float(np.diag(exact).mean())
        mean_share = float(exact[between].mean()) / exact_self_score if exact_self_score > 0 else 0.0
        varied = exact[between].std() > 0 and stored[between].std() > 0
        fidelity = float(np.corrcoef(exact[between], stored[between])[0, 1]) if varied else 0.0
        return cls(float(np.diag(stored).mean()), fidelity, mean_share)


def calibrate(
    components: Sequence[Component],
    agreements: Mapping[str, Agreement],
    head_mean_share: float | None,
    training: Training = "unknown",
    whole_layers: bool = False,
) -> tuple[tuple[Component, ...], dict[str, dict[str, float]]]:
    """Set the components' weights.

    Args:
        agreements: by component.
        head_mean_share: of the full gradients of the last model's head; None where there is no head.
        training: what it changed.
        whole_layers: the blocks are all layers without projection, and count `_WHOLE` times as much.

    Returns:
        The components, and by component the figures that its weight rests on, for the index's record.
    """
    mean_shares = {name: agreement.mean_share for name, agreement in agreements.items()}
    last = {component.role: component.name for component in components if component.model == components[-1].model}
    if head_mean_share is not None:
        mean_shares[last["head"]] = head_mean_share
    head = mean_shares.get(last.get("head", ""), 0.0)
    other = _CLEARLY * mean_shares.get(last.get("embeddings", ""), np.inf)
    if "blocks" in last:
        other = mean_shares[last["blocks"]]
    if training == "unknown":
        training = "frozen head" if head > max(0.0, other) else "trained head"
    shares = dict(_SHARES[training])
    if whole_layers:
        shares["blocks"] *= _WHOLE
    weights = {}
    for component in components:
        agreement = agreements[component.name]
        is_measured = agreement.self_score > 0 and agreement.fidelity > 0
        weights[component.name] = shares[component.role] * agreement.fidelity**2 / agreement.self_score if is_measured else 0.0
    unit = weights.get("head") or next((weight for weight in weights.values() if weight > 0), 1.0)
    if not any(weights.values()):
        weights = dict.fromkeys(weights, unit)
    calibrated = tuple(component.model_copy(update={"weight": weights[component.name] / unit}) for component in components)
    record = {
        name: {"fidelity": round(agreement.fidelity, 4), "mean_share": round(mean_shares[name], 6)}
        for name, agreement in agreements.items()
    }
    return calibrated, record
