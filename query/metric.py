"""What is asked of rows: how they are compared (`Metric`), and whitened rows of queries, which can be joined and combined."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float32, Float64

from ..store.errors import UsageError
from ..store.manifest import DenseComponent, SparseComponent, check_damping
from ..store.sparse import SparseVectors, concatenate

Mode = Literal["influence", "cosine", "loss-normalized"]
_LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class Metric:
    """How rows are compared.

    Attributes:
        mode: "influence", "cosine" or "loss-normalized".
        damping: relative to each layer's mean eigenvalue; None keeps the build's.
        curvature: False undoes the whitening: plain products of projected gradients, and their cosine.
        weights: by component ("head-2") or part ("head": that of every model), times the index's own, which make the components' spreads
            comparable; 0 leaves a component out.
        layers: globs over layer names (the head's and the embeddings' too) or their ends; the others count nothing. All by default.
    """

    mode: Mode = "influence"
    damping: float | None = None
    curvature: bool = True
    weights: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UsageError(f"the mode is {self.mode!r}; it can be {', '.join(get_args(Mode))}")
        if self.damping is not None:
            check_damping(self.damping)
            if not self.curvature:
                raise UsageError("a damping means nothing without curvature; give one or the other")
        wrong = [name for name, weight in self.weights.items() if not (weight == 0 or 1 / _LARGEST_WEIGHT <= weight <= _LARGEST_WEIGHT)]
        if wrong:
            raise UsageError(f"the weight of {wrong[0]} is {self.weights[wrong[0]]}; it must be 0, or between 1e-6 and 1e6")


QueryRows = Mapping[str, Float32[np.ndarray, "queries dim"] | SparseVectors]


def combine(queries: QueryRows, matrix: Float64[np.ndarray, "combinations queries"]) -> QueryRows:
    """Linear combinations of queries, which score what the same combinations of their scores would."""
    return {
        name: rows.combined(matrix) if isinstance(rows, SparseVectors) else (matrix @ rows).astype(np.float32)
        for name, rows in queries.items()
    }


def cut(queries: QueryRows, first: int, last: int) -> QueryRows:
    """Queries `first` to `last`, not included; dense rows as a copy, which does not keep all of them in memory."""
    return {name: rows.part(first, last) if isinstance(rows, SparseVectors) else rows[first:last].copy() for name, rows in queries.items()}


def join(queries: Sequence[QueryRows]) -> QueryRows:
    """Several queries as one set, in their order."""
    joined: dict[str, np.ndarray | SparseVectors] = {}
    for name, first in queries[0].items():
        parts: list[Any] = [rows[name] for rows in queries]
        if isinstance(first, SparseVectors):
            ends = np.cumsum([0, *map(len, parts)]).tolist()
            blocks = [(range(a, b), part) for a, b, part in zip(ends[:-1], ends[1:], parts, strict=True)]
            joined[name] = concatenate(blocks, first.vectors.shape[1])
        else:
            joined[name] = np.concatenate(parts)
    return joined


def matched(component: DenseComponent | SparseComponent, patterns: Sequence[str]) -> Bool[np.ndarray, " layers"]:
    """Which of a component's layers match a pattern, as in `--layers` of a build."""
    names = [component.layer] if isinstance(component, SparseComponent) else [layer.name for layer in component.layers]
    return np.array([any(fnmatch.fnmatchcase(n, p) or fnmatch.fnmatchcase(n, f"*.{p}") for p in patterns) for n in names])
