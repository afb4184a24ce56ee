"""Curvature: the whitening of a layer's block of a row, estimated as a mergeable sum over examples.

A strategy declares the statistics of each pass, and turns their sums into arrays. With g = vec(G) a layer's
(projected) gradient of one example, x_t and d_t its inputs and output gradients at token t:

    fisher    E[g g^T] = U diag(l) U^T, dense n x n                             (empirical or true Fisher, LoGra eq. 4)
    kfac      A = E_tokens[x x^T], S = E_examples[sum_t d d^T]; l = l_S (x) l_A    (Martens & Grosse, arXiv 1503.05671)
    ekfac     the eigenbases of A and S; l = E[(U_S^T G U_A)^2]                 (George et al., arXiv 1806.03884)
    diagonal  U = I; l = E[g^2]
    identity  no curvature: rows are plain (projected) gradients

The Kronecker bases are folded into the projections, so `kfac` and `ekfac` whiten with one elementwise product. Sums over parts of
the sample are added in float64, so a fit merged over any split of the examples is the same up to the round-off within the parts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..store.manifest import CurvatureKind, LayerCurvature
from ..store.shapes import Float, Float64
from .projection import symmetric_eigen

Arrays = dict[str, np.ndarray]
Sums = Mapping[str, Float64[np.ndarray, "..."]]  # of statistics

# Sums over a batch, from a layer's inputs x, output gradients d, gradients g and the mask of valid tokens. Second moments are of vectors.
MOMENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "input_covariance": lambda x, d, valid: (x * valid[..., None]).flatten(0, 1),
    "output_covariance": lambda x, d, valid: d.flatten(0, 1),
}
COUNTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "input_tokens": lambda x, valid: valid.expand(x.shape[:2]).sum(),  # a layer that runs twice sees each token twice
}
GRADIENT_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient_covariance": lambda g: second_moment(g),
    "gradient_square": lambda g: (g * g).sum(0),
}


def second_moment(v: Float[Tensor, "rows n"], sketch_matrix: Float[Tensor, "sketched n"] | None = None) -> Float[Tensor, "n _"]:
    """Second moment of some vectors, or its sketch with a test matrix (see indexer/projection.py)."""
    return v.T @ (v if sketch_matrix is None else v @ sketch_matrix.T)


@dataclass(frozen=True)
class Strategy:
    """Statistics of each pass, and the functions that turn their sums into arrays.

    Attributes:
        passes: names of the statistics of each pass over the sample; those that start with `input_` belong to the input group.
        finish: a function for each pass, from the sums of one layer's statistics and the number of examples to arrays (`input_rotation`,
            `output_rotation`, `basis`, `eigenvalues`).
    """

    passes: tuple[tuple[str, ...], ...]
    finish: tuple[Callable[[Sums, int], Arrays], ...]


def _fisher(sums: Sums, examples: int) -> Arrays:
    values, vectors = symmetric_eigen(sums["gradient_covariance"] / examples)
    return {"eigenvalues": values, "basis": vectors}


def _diagonal(sums: Sums, examples: int) -> Arrays:
    return {"eigenvalues": sums["gradient_square"] / examples}


def _kronecker(sums: Sums, examples: int) -> Arrays:
    tokens = np.maximum(sums["input_tokens"], 1)  # none is routed to some experts
    inputs, input_basis = symmetric_eigen(sums["input_covariance"] / tokens)
    outputs, output_basis = symmetric_eigen(sums["output_covariance"] / examples)
    return {"input_rotation": input_basis, "output_rotation": output_basis, "eigenvalues": np.outer(outputs, inputs).ravel()}


_FACTORS = ("input_covariance", "input_tokens", "output_covariance")
STRATEGIES = {
    "fisher": Strategy((("gradient_covariance",),), (_fisher,)),
    "kfac": Strategy((_FACTORS,), (_kronecker,)),
    "ekfac": Strategy((_FACTORS, ("gradient_square",)), (_kronecker, _diagonal)),  # whose eigenvalues replace those of the factors
    "diagonal": Strategy((("gradient_square",),), (_diagonal,)),
    "identity": Strategy((), ()),
}

_DENSE_LIMIT = 512
_DENSE_EXAMPLES = 4


def choose_curvature(kind: CurvatureKind, size: int, examples: int) -> LayerCurvature:
    """Select the strategy of a layer with `size` coordinates, fitted on a number of examples.

    "auto" is the dense Fisher for at most 512 coordinates and at least 4 examples per coordinate, else EK-FAC. A dense matrix of fewer
    examples overfits: it makes their rows nearly orthogonal to each other and to any query.
    """
    if kind != "auto":
        return kind
    return "fisher" if size <= _DENSE_LIMIT and examples >= _DENSE_EXAMPLES * size else "ekfac"


def whitening_scale(eigenvalues: Float[np.ndarray, " n"], damping: float) -> Float[np.ndarray, " n"]:
    """(l + a)^(-1/2) with a = damping * mean(l); 0 where the layer never had a gradient."""
    damped = eigenvalues + damping * eigenvalues.mean()
    return np.where(damped > 0, 1.0 / np.sqrt(np.where(damped > 0, damped, 1.0)), 0.0)


def lost_share(eigenvalues: Float64[np.ndarray, "..."], time: float) -> Float64[np.ndarray, "..."]:
    """1 - exp(-t l): the share of what was learnt before that a segment of training takes away (query/source.py)."""
    return -np.expm1(-time * eigenvalues)


def add_sums(total: Arrays, part: Arrays) -> None:
    """Add the sums of a part to a total of the same dtype, in place; associative and commutative up to round-off."""
    for name, value in part.items():
        if name in total:
            np.add(total[name], value, out=total[name])
        else:
            total[name] = np.array(value)
