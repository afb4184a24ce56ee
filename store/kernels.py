"""Compiled inner loops of the search (numba), imported only when rows are scored, since the import takes a fifth of a second.

Compiled code is kept beside this file, or in the user's cache where that cannot be written, so that a process compiles at most once.
"""

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["add_lists", "count_differences", "multiply_int8"]


@intrinsic
def _ones(typingctx, word):  # type: ignore[no-untyped-def]
    """The number of bits that are set in a 64-bit word."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def count_differences(codes: np.ndarray, planes: np.ndarray, totals: np.ndarray) -> None:
    """For each question and row, the sum over four bit planes of 2^plane times the bits in which row and plane differ.

    Args:
        codes: uint64 [rows, words]. planes: uint64 [questions, 4, words].
        totals: uint32 [questions, rows], written.
    """
    block = 256  # rows that stay in cache from one question to the next
    for first in range(0, len(codes), block):
        last = min(first + block, len(codes))
        for q in range(len(planes)):
            p0, p1, p2, p3 = planes[q, 0], planes[q, 1], planes[q, 2], planes[q, 3]
            for i in range(first, last):
                row = codes[i]
                total = np.uint64(0)
                for w in range(codes.shape[1]):
                    word = row[w]
                    low = _ones(word ^ p0[w]) + (_ones(word ^ p1[w]) << np.uint64(1))
                    total += low + (_ones(word ^ p2[w]) << np.uint64(2)) + (_ones(word ^ p3[w]) << np.uint64(3))
                totals[q, i] = total


@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz", "contract"})  # type: ignore[untyped-decorator]
def multiply_int8(codes: np.ndarray, questions: np.ndarray, products: np.ndarray) -> None:
    """Inner products of a few questions with int8 rows, as the rows lie in memory.

    Args:
        codes: int8 [rows, dim]. questions: float32 [questions, dim].
        products: float32 [questions, rows], written.
    """
    for i in range(len(codes)):
        row = codes[i]
        for q in range(len(questions)):
            question = questions[q]
            total = np.float32(0.0)
            for j in range(codes.shape[1]):
                total += np.float32(row[j]) * question[j]
            products[q, i] = total


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
