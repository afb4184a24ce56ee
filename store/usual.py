"""Usual values of training examples of an index, asked as queries: their losses, how like others they are, and how dense others lie.

    usual.json    in the index's folder; a build measures it on a sample, and the same build writes it again where it is missing

An answer compares its query with these numbers. An example is never its own neighbor, as a query is not in the corpus.
"""

import json
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import IntegrityError
from .files import read_bytes, write_whole
from .index import Index
from .shapes import Float, Float64

_NAME = "usual.json"
_FORMAT = "wherefrom usual 1"
_MOST_ROWS = 100_000  # hidden states among which densities are computed
_NEIGHBORS = 10
LEAST_BANDWIDTH = 1e-12
MOST_VALUES = 4096
Values = Annotated[tuple[float, ...], Field(min_length=1, max_length=MOST_VALUES)]


class Usual(BaseModel):
    """Ascending numbers of some examples.

    Attributes:
        of: "training examples", or "held-out texts" that somebody named.
        losses: nats for each token that the loss is on.
        similarities: the highest cosine with another row; None where rows have no cosines.
        densities: logarithm of the kernel density of hidden states at the example's, without its own; None where the index stores none.
        bandwidth: of the kernel; 0 without densities.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["wherefrom usual 1"] = _FORMAT  # type: ignore[assignment]
    of: Literal["training examples", "held-out texts"] = "training examples"
    losses: Values
    similarities: Values | None = None
    densities: Values | None = None
    bandwidth: Annotated[float, Field(ge=0, le=1e12)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> "Usual":
        for values in (self.losses, self.similarities or (), self.densities or ()):
            if any(later < earlier for earlier, later in pairwise(values)):
                raise ValueError("the numbers are not ascending")
        if self.densities is not None and self.bandwidth < LEAST_BANDWIDTH:
            raise ValueError("densities without the width of their kernel")
        return self


def write_usual(index: Index, usual: Usual) -> None:
    """Write the record beside an index's other files."""
    write_whole(index.path / _NAME, usual.model_dump_json(indent=1).encode())


def read_usual(index: Index) -> Usual | None:
    """Read the record; None if there is none.

    Raises:
        IntegrityError: it is damaged.
    """
    path = index.path / _NAME
    if path.is_symlink():
        raise IntegrityError(f"{path} is a link; remove it, and give the command of the build again to measure it anew")
    if not path.exists():
        return None
    try:
        return Usual.model_validate_json(read_bytes(path))
    except (ValidationError, OSError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path} is damaged; remove it, and give the command of the build again to measure it anew") from error


def usual_problems(index: Index) -> list[tuple[str, str | None]]:
    """Check the record as `Index.verify` checks files: its name, and a problem or None; nothing where there is none."""
    try:
        return [] if read_usual(index) is None else [(_NAME, None)]
    except IntegrityError as error:
        return [(_NAME, str(error))]


def share_below(values: Values, value: float) -> float:
    """Return the share of ascending values that are below another."""
    return float(np.searchsorted(np.array(values), value)) / len(values)


class HiddenStates:
    """Hidden states of at most `_MOST_ROWS` rows of an index, evenly spaced, for kernel densities.

    p(q) = 1/N sum_i exp(-|q - x_i|^2 / (2 h^2)) (Kirchenbauer et al., LMD3, arXiv 2405.06331, section 3), without its constant factor.
    """

    def __init__(self, index: Index) -> None:
        step = -(-len(index) // _MOST_ROWS)
        self._rows = np.arange(0, len(index), step)
        blocks = []
        for shard in index.shards:
            rows = self._rows[(self._rows >= shard.first) & (self._rows < shard.first + shard.rows)] - shard.first
            hidden = index.hidden(shard)
            assert hidden is not None
            blocks.append(np.asarray(hidden[rows], np.float32))
        states = np.concatenate(blocks)
        self._center: Float[np.ndarray, " width"] = states.mean(axis=0, dtype=np.float64).astype(np.float32)
        self._states: Float[np.ndarray, "rows width"] = states - self._center  # so that rounding is that of differences
        self._squares = np.einsum("rd,rd->r", self._states, self._states, dtype=np.float64)

    def squared_distances(self, states: Float[np.ndarray, "queries width"], rows: list[int] | None = None) -> Float64[np.ndarray, "q r"]:
        """Compute squared distances of states to those of the rows; those of `rows`, the queries' own, are infinite."""
        centered = states.astype(np.float32) - self._center
        squares = np.einsum("qd,qd->q", centered, centered, dtype=np.float64)
        distances = np.maximum(0.0, squares[:, None] + self._squares - 2.0 * (centered @ self._states.T))
        if rows is not None:
            distances[np.array(rows)[:, None] == self._rows] = np.inf
        return distances

    @staticmethod
    def bandwidth(distances: Float64[np.ndarray, "q r"]) -> float:
        """The median distance to the tenth neighbor: the scale at which hidden states lie beside one another."""
        place = min(_NEIGHBORS, distances.shape[1] - 1) - 1
        return float(np.sqrt(np.median(np.partition(distances, place, axis=1)[:, place])))

    @staticmethod
    def log_densities(distances: Float64[np.ndarray, "q r"], bandwidth: float) -> Float64[np.ndarray, " q"]:
        """Logarithms of the densities, from squared distances."""
        exponents = -distances / (2 * bandwidth**2)
        highest = exponents.max(axis=1)
        return highest + np.log(np.exp(exponents - highest[:, None]).sum(axis=1)) - np.log(distances.shape[1])
