"""Posting lists: sparse rows of a group of shards in the order of their tokens. A query touches the lists of its own tokens alone.

    tokens   [lists]            ascending
    starts   [lists + 1]        list i holds the postings starts[i] to starts[i + 1], ascending by row
    rows     [postings]         of the group, in 16 bits where these suffice
    codes    [postings, words]  as in the rows, four bytes to a little-endian word (zeros behind the last)
    factors  [postings]         float32

An exact score costs one table look-up for each byte of a shared token's code: the query's vector is turned into a table of what each of
the 256 values of a byte adds. A group's scores fit into a core's cache, so that adding to them costs little, and groups are independent.

Early termination (MaxScore, block-max WAND) was measured and left out. A one-bit estimate is bounded by the sum of |coordinates| times the
largest factor of a list, some twenty times what it typically is: on real rows of 800 bytes the lists that cannot be skipped hold six to
nine tenths of the postings that a query touches, and the rest would need random access. Rows keep their longest vectors alone, and the
tokens that every example has are seldom among them: a query touches one in twenty-five of the entries to begin with.

The lists are a cache beside the rows, `search/<group>.zarr/<component>`: rebuilt where missing, damaged, or made of other rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8, UInt32

from .bits import signs_of
from .cache import plain, read_cache, write_cache
from .compiled import Compiled
from .sparse import SparseRows

_add_lists = Compiled("add_lists", after=1 << 19)
_BYTE_SIGNS = signs_of(np.arange(256, dtype=np.uint8)[:, None], 8)


@dataclass(frozen=True)
class Postings:
    """A sparse component of a group of shards, by token; see above."""

    tokens: np.ndarray
    starts: Int64[np.ndarray, " lists_and_one"]
    rows: np.ndarray
    codes: UInt32[np.ndarray, "postings words"]
    factors: Float32[np.ndarray, " postings"]

    @classmethod
    def of(cls, shards: Sequence[SparseRows]) -> "Postings":
        """The lists of shards' rows, one shard after the other."""
        keys, codes, factors = (np.concatenate([getattr(rows, name) for rows in shards]) for name in ("keys", "codes", "factors"))
        order = np.argsort(keys, kind="stable")
        tokens, starts = np.unique(keys[order], return_index=True)
        counts = np.concatenate([np.diff(rows.indptr) for rows in shards])
        owners = np.repeat(np.arange(len(counts), dtype=_row_dtype(len(counts))), counts)
        arrays = (
            tokens.astype(np.uint32),
            np.append(starts, len(order)).astype(np.int64),
            owners[order],
            _words(codes[order]),
            factors[order],
        )
        return cls(*(plain(array) for array in arrays))

    def add_scores(
        self,
        keys: Int64[np.ndarray, " entries"],
        owners: Int64[np.ndarray, " entries"],
        tables: Float32[np.ndarray, "entries bytes 256"],
        scores: Float32[np.ndarray, "queries rows"],
    ) -> None:
        """Add estimated inner products of some queries with all rows to their scores.

        Args:
            keys, owners: the tokens of all queries, and which query each is of, ascending.
            tables: of each token, what `byte_tables` makes of its rotated vector.
        """
        if not len(self.tokens):
            return
        at = np.minimum(np.searchsorted(self.tokens, keys), len(self.tokens) - 1)
        known = self.tokens[at] == keys
        bounds = np.searchsorted(owners, np.arange(len(scores) + 1))
        add_lists = _add_lists.after(int((self.starts[at + 1] - self.starts[at])[known].sum())) or add_lists_plainly
        for query in range(len(scores)):
            part = slice(bounds[query], bounds[query + 1])
            lists, own = at[part], tables[part]
            add_lists(lists, known[part], own, self.starts, self.rows, self.codes, self.factors, scores[query])

    def write(self, directory: Path, source: str, staging: Path) -> None:
        """Keep the lists in a directory, marked with what they were made of."""
        write_cache(directory, {f.name: getattr(self, f.name) for f in fields(self)}, source, staging)

    @classmethod
    def read(cls, directory: Path, source: str, rows: int, width: int) -> "Postings | None":
        """The lists that lie there, of so many rows with codes of so many bytes; None where they are missing, damaged, or of other rows."""
        arrays = read_cache(directory, source)
        if arrays is None or arrays.keys() != {f.name for f in fields(cls)}:
            return None
        lists = cls(**arrays)
        kinds = [(array.dtype.name, array.ndim) for array in (lists.tokens, lists.starts, lists.rows, lists.codes, lists.factors)]
        if kinds != [("uint32", 1), ("int64", 1), (_row_dtype(rows), 1), ("uint32", 2), ("float32", 1)]:
            return None
        counts, postings = np.diff(lists.starts), len(lists.rows)
        # Compiled loops check no bounds: what they would step over is looked at here.
        fits = (
            lists.codes.shape == (postings, -(-width // 4))
            and lists.factors.shape == (postings,)
            and lists.starts.shape == (len(lists.tokens) + 1,)
            and lists.starts[0] == 0
            and lists.starts[-1] == postings
            and (counts >= 0).all()
            and (lists.tokens[1:] > lists.tokens[:-1]).all()
            and np.isfinite(lists.factors).all()
            and int(lists.rows.max(initial=0)) < rows
        )
        return lists if fits else None


def add_lists_plainly(
    lists: np.ndarray,
    known: np.ndarray,
    tables: np.ndarray,
    starts: np.ndarray,
    rows: np.ndarray,
    codes: np.ndarray,
    factors: np.ndarray,
    scores: np.ndarray,
) -> None:
    """What `kernels.add_lists` does, to the bit."""
    for at, table in zip(lists[known], tables[known], strict=True):
        part = slice(int(starts[at]), int(starts[at + 1]))
        values = []
        for word in range(codes.shape[1]):
            code, b = codes[part, word], 4 * word
            low = table[b, code & 255] + table[b + 1, (code >> 8) & 255]
            values.append(low + (table[b + 2, (code >> 16) & 255] + table[b + 3, code >> 24]))
        for word in range(0, len(values), 2):
            scores[rows[part]] += factors[part] * (sum(values[word + 1 : word + 2], values[word]))


def _row_dtype(rows: int) -> str:
    return "uint16" if rows <= 1 << 16 else "uint32"


def _words(codes: UInt8[np.ndarray, "postings bytes"]) -> UInt32[np.ndarray, "postings words"]:
    padded = np.zeros((len(codes), -(-codes.shape[1] // 4) * 4), np.uint8)
    padded[:, : codes.shape[1]] = codes
    return padded.view("<u4")


def byte_tables(rotated: Float32[np.ndarray, "entries bits"]) -> Float32[np.ndarray, "entries bytes 256"]:
    """What each value of each byte of a code, in whole words of four, adds to the inner product of its signs with a rotated vector."""
    entries, bits = rotated.shape
    padded = np.zeros((entries, -(-bits // 32) * 32), np.float32)
    padded[:, :bits] = rotated
    return np.ascontiguousarray(padded.reshape(entries, padded.shape[1] // 8, 8) @ _BYTE_SIGNS.T)
