"""Curvature: what whitens a layer's block of a row, estimated as a mergeable sum over examples.

A strategy declares, pass by pass, the statistics that it needs, and turns their sums into arrays. With g = vec(G) a layer's
(projected) gradient of one example, x_t and d_t its inputs and output gradients at token t:

    fisher    E[g g^T] = U diag(l) U^T, dense n x n                             (empirical or true Fisher, LoGra eq. 4)
    kfac      A = E_tokens[x x^T], S = E_examples[sum_t d d^T]; l = l_S (x) l_A    (Martens & Grosse, arXiv 1503.05671)
    ekfac     the eigenbases of A and S; l = E[(U_S^T G U_A)^2]                 (George et al., arXiv 1806.03884)
    diagonal  U = I; l = E[g^2]
    identity  no curvature: rows are plain (projected) gradients

The Kronecker bases are folded into the projections, so that `kfac` and `ekfac` whiten with one elementwise product. Sums of
batches are added in float64, so a fit merged over any split of the examples is the fit of the whole up to the round-off of the batches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from ..store.manifest import CurvatureKind, LayerCurvature
from .projection import symmetric_eigen

Arrays = dict[str, np.ndarray]

# A statistic of one batch, from a layer's inputs x, output gradients d, gradients g and the mask of real tokens; summed over the batch.
TOKEN_STATISTICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "input_covariance": lambda x, d, valid: _second_moment((x * valid[..., None]).flatten(0, 1)),
    "input_tokens": lambda x, d, valid: valid.expand(x.shape[:2]).sum(),  # a layer that runs twice sees each token twice
    "output_covariance": lambda x, d, valid: _second_moment(d.flatten(0, 1)),
}
GRADIENT_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient_covariance": lambda g: _second_moment(g),
    "gradient_square": lambda g: (g * g).sum(0),
}


def _second_moment(v: Float[Tensor, "rows n"]) -> Float[Tensor, "n n"]:
    return v.T @ v


@dataclass(frozen=True)
class Sums:
    """What one layer's strategy gets after a pass: sums over the fitted examples, and how many there were."""

    statistics: Mapping[str, Float64[np.ndarray, "..."]]
    examples: int


@dataclass(frozen=True)
class Strategy:
    """Statistics by pass, and what is made of them.

    Attributes:
        passes: the names of the statistics that each pass over the fitting sample must sum; those of `input_` are the input group's.
        finish: one function for each pass, from its sums to arrays (`input_rotation`, `output_rotation`, `basis`, `eigenvalues`).
    """

    passes: tuple[tuple[str, ...], ...]
    finish: tuple[Callable[[Sums], Arrays], ...]


def _fisher(sums: Sums) -> Arrays:
    values, vectors = symmetric_eigen(sums.statistics["gradient_covariance"] / sums.examples)
    return {"eigenvalues": values, "basis": vectors}


def _diagonal(sums: Sums) -> Arrays:
    return {"eigenvalues": sums.statistics["gradient_square"] / sums.examples}


def _kronecker(sums: Sums) -> tuple[Arrays, Float64[np.ndarray, " n"]]:
    inputs, input_basis = symmetric_eigen(sums.statistics["input_covariance"] / sums.statistics["input_tokens"])
    outputs, output_basis = symmetric_eigen(sums.statistics["output_covariance"] / sums.examples)
    return {"input_rotation": input_basis, "output_rotation": output_basis}, np.outer(outputs, inputs).ravel()


def _kfac(sums: Sums) -> Arrays:
    bases, eigenvalues = _kronecker(sums)
    return {**bases, "eigenvalues": eigenvalues}


_FACTORS = ("input_covariance", "input_tokens", "output_covariance")
STRATEGIES = {
    "fisher": Strategy((("gradient_covariance",),), (_fisher,)),
    "kfac": Strategy((_FACTORS,), (_kfac,)),
    "ekfac": Strategy((_FACTORS, ("gradient_square",)), (lambda sums: _kronecker(sums)[0], _diagonal)),
    "diagonal": Strategy((("gradient_square",),), (_diagonal,)),
    "identity": Strategy((), ()),
}

_DENSE_LIMIT = 512
_DENSE_EXAMPLES = 4


def choose_curvature(kind: CurvatureKind, size: int, examples: int) -> LayerCurvature:
    """The strategy of a layer with `size` coordinates fitted on so many examples.

    "auto" is the dense Fisher where it is small (512 coordinates) and known well (4 examples a coordinate), else EK-FAC. A dense matrix
    of fewer examples whitens just those: they come out nearly orthogonal to one another, and unlike any query.
    """
    if kind != "auto":
        return kind
    return "fisher" if size <= _DENSE_LIMIT and examples >= _DENSE_EXAMPLES * size else "ekfac"


def whitening_scale(eigenvalues: Float64[np.ndarray, " n"], damping: float) -> Float64[np.ndarray, " n"]:
    """(l + a)^(-1/2) with a = damping * mean(l); 0 where the layer never had a gradient."""
    damped = eigenvalues + damping * eigenvalues.mean()
    return np.where(damped > 0, 1.0 / np.sqrt(np.where(damped > 0, damped, 1.0)), 0.0)


def add_sums(total: Arrays, part: Arrays) -> Arrays:
    """Merge two fits' sums; associative and commutative up to float64 round-off."""
    return {name: total[name] + value if name in total else value for name, value in part.items()}
