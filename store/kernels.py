"""Compiled inner loops of the search (numba), imported only when rows are scored, since the import takes a fifth of a second.

Compiled code is kept beside this file, or in the user's cache where that cannot be written, so that a process compiles at most once.
"""

import numpy as np
from numba import njit

__all__ = ["add_lists"]


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def add_lists(
    lists: np.ndarray,
    known: np.ndarray,
    tables: np.ndarray,
    starts: np.ndarray,
    rows: np.ndarray,
    codes: np.ndarray,
    factors: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Add a question's share of some posting lists to the scores of their rows.

    Args:
        lists: which list each of the question's tokens has (int64 [n]); `known`: whether it has one (bool [n]).
        tables: of each token, what every byte of a code adds: float32 [n, 4 * words, 256].
        starts, rows, codes, factors: the postings (see postings.py).
        scores: float32 [rows], added to in place.
    """
    words = codes.shape[1]
    byte = np.uint32(255)
    for i in range(len(lists)):
        if not known[i]:
            continue
        table = tables[i]
        for j in range(starts[lists[i]], starts[lists[i] + 1]):
            value = np.float32(0.0)
            for w in range(words):
                code, b = codes[j, w], 4 * w
                low = table[b, code & byte] + table[b + 1, (code >> np.uint32(8)) & byte]
                value += low + (table[b + 2, (code >> np.uint32(16)) & byte] + table[b + 3, code >> np.uint32(24)])
            scores[rows[j]] += factors[j] * value
