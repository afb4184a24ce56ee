"""Second moments of the queries mixed into the curvature (TrackStar, arXiv 2410.17413, section 3 and appendix A.1.3).

With R the second moments of the corpus's gradients and R_q those of the queries that are asked together, rows are compared under

    (m R_q + (1 - m) R)^-1

so that directions which all the queries share, such as those of a template, count less. For rows z whitened with R + a this is

    z_q^T (m C + (1 - m) I)^-1 z_i        C = mean of z_q z_q^T over the queries

layer by layer. The share m, unless it is given, makes the k-th largest eigenvalues of m R_q and of (1 - m) R equal, over all layers of a
component, with k = 1,000 for each 65,536 coordinates as in the paper (at least 1, and at most as many as R_q has).
"""

from dataclasses import dataclass

import numpy as np

from ..store.errors import UsageError
from ..store.index import Index
from ..store.manifest import DenseComponent
from ..store.shapes import Float, Float64

AUTO = "auto"
_SHARED = 1000 / 65536
_LARGEST_SHARE = 0.9999
_LARGEST_LAYER = 4096
_ROUND_OFF = 1e-9


def read_mix(mix: str) -> float | None:
    """Return the share of the queries' second moments; None if it is chosen by the rule.

    Raises:
        UsageError: it is neither "auto" nor a number between 0 and 0.9999.
    """
    if mix == AUTO:
        return None
    try:
        share = float(mix)
    except ValueError:
        share = np.nan
    if not 0 <= share <= _LARGEST_SHARE:
        raise UsageError(f"`mix` is {mix!r:.80}; write {AUTO}, or a share between 0 and {_LARGEST_SHARE}")
    return share


@dataclass(frozen=True)
class Mixing:
    """The inverse of mixed second moments, in the coordinates of whitened rows.

    Attributes:
        share: of the queries' second moments.
        parts: the coordinates of each layer.
        inverses: by layer [size, size]; zeros for a layer that is left out.
    """

    share: float
    parts: tuple[slice, ...]
    inverses: tuple[Float64[np.ndarray, "size size"], ...]

    @classmethod
    def of(
        cls,
        index: Index,
        component: DenseComponent,
        queries: Float64[np.ndarray, "queries dim"],
        mix: str,
        layers: Float[np.ndarray, " layers"],
    ) -> "Mixing":
        """Mix the second moments of a component's queries into its curvature.

        Args:
            queries: whitened.
            mix: see `read_mix`.
            layers: 0 for those that are left out, else 1.

        Raises:
            UsageError: the component has no curvature, or rows that do not hold all coordinates.
        """
        if any(layer.curvature == "identity" for layer in component.layers):
            raise UsageError(f"the rows of {component.name} have no curvature that queries could be mixed into; leave `mix` out")
        if component.stored != component.dim or component.one_bit:
            raise UsageError(f"the rows of {component.name} do not hold all coordinates, which `mix` needs; leave it out")
        largest = max(layer.size for layer in component.layers)
        if largest > _LARGEST_LAYER:
            raise UsageError(f"a layer of {component.name} has {largest:,} coordinates, too many for `mix`; build with a smaller rank")
        share = read_mix(mix)
        parts = tuple(slice(layer.offset, layer.offset + layer.size) for layer in component.layers)
        if share is None:
            eigenvalues, means = index.spectrum(component)
            roots = np.sqrt(eigenvalues + component.curvature.damping * means)
            share = mixed_share(eigenvalues, [queries[:, part] * roots[part] for part in parts])
        inverses = []
        for part, factor in zip(parts, layers, strict=True):
            layer_queries = queries[:, part]
            mixed = share / max(1, len(layer_queries)) * (layer_queries.T @ layer_queries) + (1 - share) * np.eye(layer_queries.shape[1])
            inverses.append(np.linalg.inv(mixed) * factor)
        return cls(share, parts, tuple(inverses))

    def apply(self, rows: Float[np.ndarray, "rows dim"]) -> Float64[np.ndarray, "rows dim"]:
        """Multiply rows with the inverse."""
        changed = np.empty(rows.shape)
        for part, inverse in zip(self.parts, self.inverses, strict=True):
            changed[:, part] = rows[:, part] @ inverse
        return changed

    def squared_lengths(self, rows: Float[np.ndarray, "rows dim"]) -> Float64[np.ndarray, " rows"]:
        """Compute the rows' squared lengths under the inverse."""
        return np.einsum("rd,rd->r", self.apply(rows), rows, dtype=np.float64)


def mixed_share(corpus: Float64[np.ndarray, " dim"], queries: list[Float64[np.ndarray, "_queries _size"]]) -> float:
    """Return the share of the queries' second moments, by the paper's rule.

    Args:
        corpus: all eigenvalues of the corpus's second moments.
        queries: by layer, the queries' gradients in any orthogonal basis.
    """
    spectra = [np.linalg.svd(gradients, compute_uv=False) ** 2 / len(gradients) for gradients in queries]
    eigenvalues = np.sort(np.concatenate(spectra))[::-1]
    eigenvalues = eigenvalues[eigenvalues > _ROUND_OFF * eigenvalues[0]]
    if not len(eigenvalues):
        return 0.0
    k = min(max(1, round(_SHARED * len(corpus))), len(eigenvalues))
    other = float(np.sort(corpus)[::-1][k - 1])
    return min(other / (float(eigenvalues[k - 1]) + other), _LARGEST_SHARE)
