"""One-bit codes of vectors: the signs of a vector after a seeded rotation, and a factor.

Let R be a rotation, v a vector, s = sign(R v) and f = |v|^2 / sum_j |(R v)_j|. The inner product <v, q> is estimated as f <s, R q>. The
estimate is exact for q = v, and unbiased for other q, since the part of R q that is orthogonal to R v has no preferred sign (RaBitQ, Gao
and Long, arXiv 2405.12497). Its variance is about (pi / 2) |v|^2 |q_|^2 / b for b bits and the part q_ of q that is orthogonal to v
(pi / 2 - 1 if no coordinate is left out). A vector of more coordinates than bits is folded first: its coordinates are permuted, multiplied
with random signs, and cut into pieces that are added. This is a sparse random projection, and <fold v, fold q> is an unbiased estimate.

Random numbers are the raw output of a Philox generator, the same on all machines. Only a few rotated coordinates of a long vector are
kept, which is a product with a small matrix: at a width of 4,096 and 64 bits, some hundred times less work than the rotation. A coordinate
within round-off of 0 may have another sign on another machine.
"""

import hashlib
from functools import lru_cache

import numpy as np

from .shapes import Float32, Int64, UInt8

_ROUNDS = 3
_CACHED_FOLDS = 4
MATRIX_BITS = 256  # most bits for which a matrix is multiplied; for more, it would be large, and the rotation itself is faster
_CACHED_MATRICES = 8


def rotate(vectors: Float32[np.ndarray, "entries width"], bits: int, seed: int) -> Float32[np.ndarray, "entries bits"]:
    """Return the first `bits` coordinates of the vectors after a seeded rotation.

    The rotation is three rounds of random signs and a Hadamard transform; the width is padded with zeros to a power of two.
    """
    if bits <= MATRIX_BITS:
        return vectors.astype(np.float32, copy=False) @ rotation_matrix(vectors.shape[1], bits, seed)
    width = padded_width(vectors.shape[1], bits)
    x = np.zeros((len(vectors), width), np.float32)
    x[:, : vectors.shape[1]] = vectors
    for signs in _signs(width, seed):
        x = _hadamard(x * signs)
    return np.ascontiguousarray(x[:, :bits])


@lru_cache(_CACHED_MATRICES)
def rotation_matrix(width: int, bits: int, seed: int) -> Float32[np.ndarray, "width bits"]:
    """Return the matrix of the first `bits` coordinates of the rotation."""
    return np.ascontiguousarray(_unrotate(np.eye(bits, dtype=np.float32), width, seed).T)


def unrotate(rotated: Float32[np.ndarray, "entries bits"], width: int, seed: int) -> Float32[np.ndarray, "entries width"]:
    """Apply the transpose of `rotate`, which is its inverse if no coordinate was left out."""
    if rotated.shape[1] <= MATRIX_BITS:
        return rotated.astype(np.float32, copy=False) @ rotation_matrix(width, rotated.shape[1], seed).T
    return _unrotate(rotated, width, seed)


def _unrotate(rotated: Float32[np.ndarray, "entries bits"], width: int, seed: int) -> Float32[np.ndarray, "entries width"]:
    padded = padded_width(width, rotated.shape[1])
    x = np.zeros((len(rotated), padded), np.float32)
    x[:, : rotated.shape[1]] = rotated
    for signs in reversed(_signs(padded, seed)):
        x = _hadamard(x) * signs
    return np.ascontiguousarray(x[:, :width])


def padded_width(width: int, bits: int) -> int:
    """Return the width after padding, a power of two, in which vectors of `width` coordinates are rotated to give `bits` bits."""
    return 1 << (max(width, bits) - 1).bit_length()


def _hadamard(x: Float32[np.ndarray, "entries width"]) -> Float32[np.ndarray, "entries width"]:
    width = x.shape[1]
    step = 1
    while step < width:
        pairs = x.reshape(len(x), width // (2 * step), 2, step)
        x = np.concatenate([pairs[:, :, :1] + pairs[:, :, 1:], pairs[:, :, :1] - pairs[:, :, 1:]], axis=2).reshape(len(x), width)
        step *= 2
    return x * np.float32(1 / np.sqrt(width))


def _signs(width: int, seed: int) -> list[Float32[np.ndarray, " width"]]:
    words = philox(f"wherefrom rotation {seed} {width}").random_raw(-(-_ROUNDS * width // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=_ROUNDS * width, bitorder="little").reshape(_ROUNDS, width)
    return list((2.0 * bits - 1.0).astype(np.float32))


def philox(purpose: str) -> np.random.Philox:
    """Return the generator for a purpose; its key is the first 16 bytes of the SHA-256 of the text, little-endian."""
    return np.random.Philox(key=int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:16], "little"))


def fold(vectors: Float32[np.ndarray, "rows width"], bits: int, seed: int) -> Float32[np.ndarray, "rows folded"]:
    """Reduce vectors of more than `bits` coordinates to `bits` coordinates; return shorter ones unchanged.

    Coordinates are put in a random order (by sorting one 64-bit word each), multiplied with signs (the words' lowest bits), and cut into
    pieces of `bits`, the last padded with zeros; the pieces are added, first to last.
    """
    width = vectors.shape[1]
    if width <= bits:
        return vectors
    order, signs = _folding(width, bits, seed)
    folded = np.zeros((len(vectors), bits), np.float32)
    for first in range(0, width, bits):
        piece = order[first : first + bits]
        folded[:, : len(piece)] += vectors[:, piece] * signs[first : first + bits]
    return folded


def unfold(folded: Float32[np.ndarray, "rows folded"], width: int, seed: int) -> Float32[np.ndarray, "rows width"]:
    """Return the shortest vectors that `fold` reduces to `folded`."""
    bits = folded.shape[1]
    if width <= bits:
        return folded
    order, signs = _folding(width, bits, seed)
    full, rest = divmod(width, bits)
    shares = np.where(np.arange(bits) < rest, full + 1, full).astype(np.float32)
    vectors = np.empty((len(folded), width), np.float32)
    vectors[:, order] = np.tile(folded / shares, (1, full + 1))[:, :width] * signs
    return vectors


@lru_cache(_CACHED_FOLDS)
def _folding(width: int, bits: int, seed: int) -> tuple[Int64[np.ndarray, " width"], Float32[np.ndarray, " width"]]:
    words = philox(f"wherefrom fold {seed} {width} {bits}").random_raw(width)
    order = np.argsort(words, kind="stable")
    return order, np.where(words[order] & np.uint64(1), np.float32(1), np.float32(-1))


def signs_of(codes: UInt8[np.ndarray, "rows bytes"], bits: int) -> Float32[np.ndarray, "rows bits"]:
    """Convert stored bits to -1 and 1."""
    return np.unpackbits(codes, axis=1, count=bits).astype(np.float32) * 2 - 1


def to_words(codes: UInt8[np.ndarray, "rows bytes"], dtype: str) -> np.ndarray:
    """View codes as words of an integer type, padded with zeros."""
    padded = np.zeros((len(codes), codes.shape[1] + -codes.shape[1] % np.dtype(dtype).itemsize), np.uint8)
    padded[:, : codes.shape[1]] = codes
    return padded.view(dtype)
