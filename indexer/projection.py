"""Projections of a layer's inputs and output gradients to a few coordinates.

Random: Rademacher signs over sqrt(rank), so that E[P^T P] = I. The signs are the raw bits of a Philox generator keyed by seed, side and
layer name: the same on every device, in every worker and with every version of numpy, so they are not stored. PCA: the
leading eigenvectors of the inputs' or output gradients' second moments (LoGra's PCA initialization, arXiv 2405.13954 section 3.2), stored.
A rank of a layer's size or more is the exact identity.
"""

import math

import numpy as np

from ..store.bits import philox
from ..store.shapes import Float, Float32, Float64


def random_projection(name: str, side: str, rank: int, size: int, seed: int) -> Float32[np.ndarray, "rank size"] | None:
    """Random projection, or None (the identity) if `rank` is not below `size`.

    Args:
        name: the layer's name; for inputs, the name of the group of layers that share the input.
        side: "input" or "output".
        rank: number of projected coordinates.
        size: number of original coordinates.
        seed: the index's projection seed.
    """
    if rank >= size:
        return None
    words = philox(f"wherefrom projection {seed} {side} {name}").random_raw(-(-rank * size // 64)).astype("<u8")
    signs = np.unpackbits(words.view(np.uint8), count=rank * size, bitorder="little").reshape(rank, size)
    return ((2.0 * signs - 1.0) / math.sqrt(rank)).astype(np.float32)


def principal_projection(covariance: Float64[np.ndarray, "size size"], rank: int) -> Float64[np.ndarray, "rank size"] | None:
    """Eigenvectors of the `rank` largest eigenvalues as rows, or None (the identity) if `rank` is not below the size."""
    if rank >= len(covariance):
        return None
    _, vectors = symmetric_eigen(covariance)
    return vectors[:, ::-1][:, :rank].T.copy()


def symmetric_eigen(matrix: Float[np.ndarray, "n n"]) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, "n n"]]:
    """Eigenvalues (ascending, negative round-off set to 0) and eigenvectors (columns) of a second-moment matrix, in float64.

    Each vector's largest coordinate is positive.
    """
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.where(vectors[largest, np.arange(len(values))] < 0, -1.0, 1.0)
    return np.maximum(values, 0.0), vectors * signs
