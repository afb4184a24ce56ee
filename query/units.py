"""The unit of scores: nats that a query's loss is predicted to rise by if a training example had been left out.

With the mean curvature H of n training examples, leaving out example i moves the weights by H^-1 g_i / n to first order, and the loss of a
query by g_q^T H^-1 g_i / n (Koh and Liang, arXiv 1703.04730, equation 2). Where the change was measured (`wherefrom evaluate slope`), the
measured slope corrects the size. Scores without curvature, of rows that are not linear in the gradient, and cosines have no unit.
"""

from typing import Literal, NamedTuple

from ..store.index import Index
from ..store.manifest import Component, Slope
from .metric import Metric

UnitName = Literal["nats", "nats per nat"]


class Unit(NamedTuple):
    """The unit of the scores of an index under a metric.

    Attributes:
        name: "nats", or "nats per nat" of the example's own loss; None for scores without a unit.
        factor: of sums of products of rows.
        slope: the measured slope that the factor holds; None where it was not measured under this metric.
    """

    name: UnitName | None
    factor: float
    slope: Slope | None

    @classmethod
    def of(cls, index: Index, metric: Metric) -> "Unit":
        """The unit of an index's scores under a metric."""
        manifest = index.manifest
        counted = [c for c in manifest.components if metric.weights.get(c.name, metric.weights.get(c.role, 1.0))]
        if metric.mode == "cosine" or not metric.curvature or not all(map(_has_unit, counted)):
            return cls(None, 1.0, None)
        is_changed = metric.changes_curvature or metric.mix or metric.refine or metric.weights or metric.layers
        slope = None if is_changed else manifest.slope
        factor = (1.0 if slope is None else slope.value) / max(manifest.training_rows, manifest.rows)
        return cls("nats" if metric.mode == "influence" else "nats per nat", factor, slope)


def _has_unit(component: Component) -> bool:
    """Return True if products of a component's rows are those of gradients with the inverse curvature of the loss."""
    optimizer = getattr(component, "optimizer", None)
    return component.linear and optimizer is None and component.curvature.labels != "margin" and component.curvature.kind != "identity"
