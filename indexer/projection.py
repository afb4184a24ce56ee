"""Projections of a layer's inputs and output gradients to a few coordinates.

Random: Rademacher signs over sqrt(rank), so that E[P^T P] = I. The signs are the raw bits of a Philox generator keyed by seed, side and
layer name: the same on every device, in every worker and with every version of numpy, so they are not stored. PCA: the
leading eigenvectors of the inputs' or output gradients' second moments (LoGra's PCA initialization, arXiv 2405.13954 section 3.2), stored.
A rank of a layer's size or more is the exact identity.

The second moments C of a wide side are not summed whole, since that takes size^2 numbers. Their sketch Y = C T^T is, with a random test
matrix T of twice as many rows as there are principal components. Nystroem's approximation Y (T Y)^+ Y^T then stands for C (Tropp et al.,
arXiv 1706.05736): it is exact if C has no higher rank than T, and close if its spectrum decays.
"""

import math

import numpy as np
import torch

from ..store.bits import philox
from ..store.shapes import Float, Float32, Float64

_SUMMED_WHOLE = 1024  # the largest size of a side whose second moments are summed whole
_SKETCHED_PER_COMPONENT = 2
_ROUND_OFF = 1e-6  # of the largest eigenvalue: sketches are summed in float32


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


def sketch_matrix(name: str, side: str, rank: int, size: int, seed: int) -> Float32[np.ndarray, "sketched size"] | None:
    """Test matrix of the sketch from which `rank` principal components come; None where second moments are summed whole.

    For the arguments, see `random_projection`.
    """
    sketched = _SKETCHED_PER_COMPONENT * rank
    return random_projection(name, f"{side} sketch", sketched, size, seed) if size > max(_SUMMED_WHOLE, 2 * sketched) else None


def principal_components(
    sketch: Float64[np.ndarray, "size sketched"], matrix: Float32[np.ndarray, "sketched size"], rank: int
) -> tuple[Float64[np.ndarray, " rank"], Float64[np.ndarray, "rank size"]]:
    """The `rank` largest eigenvalues, in descending order, and their eigenvectors as rows, of Nystroem's approximation.

    Args:
        sketch: Y = C T^T, summed in float32 or better.
        matrix: T.

    Returns:
        Zeros for components beyond the rank of C.
    """
    eigenvalues, eigenvectors = symmetric_eigen(matrix.astype(np.float64) @ sketch)
    is_positive = eigenvalues > _ROUND_OFF * eigenvalues.max()
    root = sketch @ (eigenvectors[:, is_positive] / np.sqrt(eigenvalues[is_positive]))
    vectors, singular, _ = np.linalg.svd(root, full_matrices=False)
    count = min(rank, len(singular))
    values = np.zeros(rank)
    values[:count] = singular[:count] ** 2
    components = np.zeros((rank, len(sketch)))
    components[:count] = vectors[:, :count].T
    largest = np.abs(components).argmax(axis=1)
    return values, components * np.where(components[np.arange(rank), largest] < 0, -1.0, 1.0)[:, None]


def symmetric_eigen(matrix: Float[np.ndarray, "n n"]) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, "n n"]]:
    """Eigenvalues (ascending, negative round-off set to 0) and eigenvectors (columns) of a second-moment matrix, in float64.

    Each vector's largest coordinate is positive. The matrix is decomposed on a GPU if there is one, else by numpy. (After PyTorch's own
    decomposition on a CPU, its later products in the same process are other bits.)
    """
    symmetric = np.asarray((matrix + matrix.T) / 2, np.float64)
    if torch.cuda.is_available():
        values, vectors = (part.cpu().numpy() for part in torch.linalg.eigh(torch.from_numpy(symmetric).cuda()))
    else:
        values, vectors = np.linalg.eigh(symmetric)
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.where(vectors[largest, np.arange(len(values))] < 0, -1.0, 1.0)
    return np.maximum(values, 0.0), vectors * signs
