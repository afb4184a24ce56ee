"""Inner loops of the search, compiled with numba. `compiled.py` imports this module only for enough work, since the import is slow.

numba caches compiled code next to this file, or in the user's cache folder if that is read-only, so that later processes need not compile.
"""

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["add_lists", "add_squares", "best_of", "count_differences", "multiply_int8", "scale_by_lengths"]


_RUN = 256  # scores that are compared with the threshold at a time


@intrinsic
def _ones(typingctx, word):  # type: ignore[no-untyped-def]
    """Return the number of bits that are set in a 64-bit word."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def count_differences(codes: np.ndarray, planes: np.ndarray, totals: np.ndarray) -> None:
    """Compute, for each query and row, the sum over four bit planes of 2^plane times the number of bits in which row and plane differ.

    Args:
        codes: uint64 [rows, words]. planes: uint64 [queries, 4, words].
        totals: uint32 [queries, rows], written.
    """
    block = 256  # rows that stay in cache from one query to the next
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
def multiply_int8(codes: np.ndarray, queries: np.ndarray, products: np.ndarray) -> None:
    """Compute the inner products of a few queries with int8 rows.

    Args:
        codes: int8 [rows, dim]. queries: float32 [queries, dim].
        products: float32 [queries, rows], written.
    """
    quadruples_end = len(codes) // 4 * 4
    for i in range(0, quadruples_end, 4):  # four rows share each load of the query
        a, b, c, d = codes[i], codes[i + 1], codes[i + 2], codes[i + 3]
        for q in range(len(queries)):
            query = queries[q]
            e = f = g = h = np.float32(0.0)
            for j in range(codes.shape[1]):
                value = query[j]
                e += np.float32(a[j]) * value
                f += np.float32(b[j]) * value
                g += np.float32(c[j]) * value
                h += np.float32(d[j]) * value
            products[q, i], products[q, i + 1], products[q, i + 2], products[q, i + 3] = e, f, g, h
    for i in range(quadruples_end, len(codes)):
        for q in range(len(queries)):
            e = np.float32(0.0)
            for j in range(codes.shape[1]):
                e += np.float32(codes[i, j]) * queries[q, j]
            products[q, i] = e


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _add_list_64(t: np.ndarray, rows: np.ndarray, codes: np.ndarray, factors: np.ndarray, scores: np.ndarray) -> None:
    """Add the products with a list of codes of 64 bits: uint64 [n], whose lowest byte is the code's first."""
    t0, t1, t2, t3, t4, t5, t6, t7 = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]
    byte = np.uint64(255)
    for j in range(len(codes)):  # over slices from 0 on: numba makes faster loops of these
        a = codes[j]
        low = (t0[a & byte] + t1[(a >> np.uint64(8)) & byte]) + (t2[(a >> np.uint64(16)) & byte] + t3[(a >> np.uint64(24)) & byte])
        b = a >> np.uint64(32)
        high = (t4[b & byte] + t5[(b >> np.uint64(8)) & byte]) + (t6[(b >> np.uint64(16)) & byte] + t7[b >> np.uint64(24)])
        scores[rows[j]] += factors[j] * (low + high)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _add_list_32(t: np.ndarray, rows: np.ndarray, codes: np.ndarray, factors: np.ndarray, scores: np.ndarray) -> None:
    """Add the products with a list of codes of 32 bits: uint32 [n]."""
    t0, t1, t2, t3 = t[0], t[1], t[2], t[3]
    byte = np.uint64(255)
    for j in range(len(codes)):
        a = np.uint64(codes[j])
        low = (t0[a & byte] + t1[(a >> np.uint64(8)) & byte]) + (t2[(a >> np.uint64(16)) & byte] + t3[a >> np.uint64(24)])
        scores[rows[j]] += factors[j] * low


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def add_lists(
    lists: np.ndarray,
    has_list: np.ndarray,
    tables: np.ndarray,
    starts: np.ndarray,
    rows: np.ndarray,
    codes: np.ndarray,
    factors: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Add a query's estimated inner products with the rows of its tokens' posting lists to the scores.

    Args:
        lists, has_list: the number of each token's list (int64 [n]), and True if the token has a list (bool [n]).
        tables: for each token, the summands for all values of a code's bytes (see `postings.byte_tables`): float32 [n, 4 * words, 256].
        starts, rows, codes, factors: the postings (see postings.py).
        scores: float32 [rows], changed in place.
    """
    words = codes.shape[1]
    flat = codes.reshape(-1)
    pairs = flat[: len(flat) // 2 * 2].view(np.uint64)
    for i in range(len(lists)):
        if not has_list[i]:
            continue
        first = starts[lists[i]]
        last = starts[lists[i] + 1]
        t = tables[i]
        own_rows = rows[first:last]
        own_factors = factors[first:last]
        # Each pass reads all postings of the list and handles two words of their codes; few codes have more words.
        if words == 2:
            _add_list_64(t, own_rows, pairs[first:last], own_factors, scores)
        elif words == 1:
            _add_list_32(t, own_rows, flat[first:last], own_factors, scores)
        else:
            for w in range(0, words - 1, 2):
                two = codes[first:last, w : w + 2].copy().reshape(-1).view(np.uint64)
                _add_list_64(t[4 * w : 4 * w + 8], own_rows, two, own_factors, scores)
            if words % 2:
                _add_list_32(t[4 * words - 4 :], own_rows, codes[first:last, words - 1].copy(), own_factors, scores)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def add_squares(weight: float, norms: np.ndarray, squared: np.ndarray) -> None:
    """Add weight * norm^2 to the squared lengths of rows.

    Args:
        norms: float32 [rows].
        squared: float64 [rows], changed in place.
    """
    for i in range(len(norms)):
        squared[i] += weight * (np.float64(norms[i]) * np.float64(norms[i]))


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def scale_by_lengths(
    products: np.ndarray, lengths: np.ndarray, factor: float, are_squared: bool, shortest: float, scores: np.ndarray
) -> None:
    """Divide products by factor * length; by a length of at most `shortest`, the result is 0.

    Args:
        products: float32 [rows].
        lengths: float32 or float64 [rows]; their squares where `are_squared`.
        scores: float32 [rows], written.
    """
    for i in range(len(products)):
        length = factor * (np.sqrt(lengths[i]) if are_squared else np.float64(lengths[i]))
        scores[i] = products[i] * (np.float32(1.0 / length) if length > shortest else np.float32(0.0))


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _count_above(run: np.ndarray, sign: np.float32, threshold: np.float32) -> np.int32:
    """Count the values of sign * score above a threshold, in a loop that is vectorized."""
    count = np.int32(0)
    for i in range(len(run)):
        count += np.int32(sign * run[i] > threshold)
    return count


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def best_of(scores: np.ndarray, sign: np.float32, threshold: np.float32, rows: np.ndarray, values: np.ndarray) -> int:
    """Find the highest values of sign * score that exceed a threshold of at least 0; of equal ones, the first.

    Args:
        scores: float32 [rows].
        rows, values: int64 and float32 [k], written: positions and values, highest first.

    Returns:
        The number of values that were found, at most k.
    """
    k = len(rows)
    count = 0
    for first in range(0, len(scores), _RUN):
        run = scores[first : first + _RUN]
        if _count_above(run, sign, threshold):  # few runs have such a value
            for i in range(len(run)):
                value = sign * run[i]
                if value > threshold:
                    place = count if count < k else k - 1
                    while place > 0 and values[place - 1] < value:
                        values[place] = values[place - 1]
                        rows[place] = rows[place - 1]
                        place -= 1
                    values[place] = value
                    rows[place] = first + i
                    count += count < k
                    if count == k:
                        threshold = values[k - 1]
    return count
