"""SOURCE's filter of a training of limited length, in place of damping (Bae et al., arXiv 2405.12186, equations 12 to 16).

Gradient descent of rate r over K steps moves along an eigenvector of the loss's curvature l until the loss is stationary, or until training
ends. What an example adds to the result is its gradient times

    (1 - exp(-t l)) / l        t = r K, the learning time of a segment of training

and what earlier segments added decays by exp(-t l) in each later one. Eigenvalues of an index are of losses that are summed over an
example's tokens; training took the mean over tokens, so that t is divided by the mean number of an example's tokens.
"""

import math
from collections.abc import Mapping

import numpy as np

from ..store.errors import UsageError
from ..store.index import Index
from ..store.manifest import Component
from ..store.shapes import Float64

RECORDED = "recorded"
_NEGLIGIBLE = 1e-12


def read_training(training: str) -> float | None:
    """Return the learning time of a training that is given as RATE,STEPS; None if it is the one recorded in the index.

    Raises:
        UsageError: it has another form, or its numbers are not above 0.
    """
    if training == RECORDED:
        return None
    try:
        rate, steps = (float(part) for part in training.split(","))
    except ValueError as error:
        raise UsageError(f"`training` is {training!r:.80}; write RATE,STEPS, such as 0.01,2000, or {RECORDED}") from error
    time = rate * steps
    if not (rate > 0 and steps > 0 and math.isfinite(time)):
        raise UsageError(f"`training` is {training!r:.80}; rate and steps must be above 0")
    return time


def learning_times(index: Index, component: Component, training: str) -> Float64[np.ndarray, " layers"]:
    """Return, by layer, the learning time of the segment of training that ends with a component's model, over the mean number of tokens.

    Several models of an index are taken as checkpoints of one run, in order; segments are of equal length unless they were recorded.

    Raises:
        UsageError: it is not recorded, or the checkpoints are not in order.
    """
    models = index.manifest.models
    total = read_training(training)
    if total is None and "optimizer" in component.features:
        raise UsageError("the recorded length includes the optimizer's preconditioner, as the rows do; give `training` as RATE,STEPS")
    tokens = max(1.0, component.curvature.tokens / max(1, component.curvature.examples))
    if total is not None:
        return np.full(len(component.layer_names), total / len(models) / tokens)
    ends: list[Mapping[str, float]] = [{}]
    for model in models:
        if model.learning_times is None:
            raise UsageError(
                f"the training of {model.id} is not recorded in this index: Wherefrom's callback records it for SGD, Adam and AdamW; give "
                "`training` as RATE,STEPS"
            )
        ends.append(model.learning_times)
    times = [ends[component.model + 1].get(name, 0.0) - ends[component.model].get(name, 0.0) for name in component.layer_names]
    if min(times) < 0:
        raise UsageError("the models of this index are not checkpoints of one run in order; leave `training` out")
    return np.array(times) / tokens


def filter_times(index: Index, component: Component, training: str) -> Float64[np.ndarray, " layers"]:
    """Return the learning times of a component whose rows are scored; see `learning_times`.

    Raises:
        UsageError: training moved none of its layers, so that all of its scores would be 0.
    """
    times = learning_times(index, component, training)
    if not times.any():
        raise UsageError(
            f"by the record, training moved no layer of {component.name}, whose scores would all be 0; give `training` as RATE,STEPS, or "
            f"leave the component out ({component.name}=0 in `weights`)"
        )
    return times


def added(eigenvalues: Float64[np.ndarray, "..."], times: Float64[np.ndarray, "..."] | float) -> Float64[np.ndarray, "..."]:
    """(1 - exp(-t l)) / l, and t where l is 0: the share of a gradient that a segment adds."""
    products = times * eigenvalues
    filtered = np.divide(-np.expm1(-products), eigenvalues, out=np.zeros_like(products), where=products > _NEGLIGIBLE)
    return np.where(products > _NEGLIGIBLE, filtered, times)
