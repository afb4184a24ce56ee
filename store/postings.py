"""Posting lists: sparse rows of a group of shards, sorted by token, so that a query reads only the lists of its own tokens.

    tokens   [lists]            ascending
    starts   [lists + 1]        list i has the postings starts[i] to starts[i + 1], ascending by row
    rows     [postings]         row numbers in the group, in 16 bits if these suffice
    codes    [postings, words]  the codes of the rows, four bytes to a little-endian word (padded with zeros)
    factors  [postings]         float32
    checks   [lists]            CRC-32C of a list's rows, codes and factors, one after the other

A score from the stored codes takes one table look-up for each byte of a shared token's code: the query's vector is turned into a table of
the summands for each of the 256 values of a byte. A group's scores fit into a core's cache, and groups are searched independently.

Early termination (MaxScore, block-max WAND) was measured and rejected. The bound of a one-bit estimate, the sum of |coordinates| times the
largest factor of a list, is about twenty times a typical estimate. On real rows of 800 bytes, the lists that cannot be skipped have six to
nine tenths of the postings that a query reads, and the others would need random access. Also, rows store only their longest vectors, which
are seldom of tokens that all examples have: a query reads about 4% of the entries without any termination.

The lists are stored in a search cache (see cache.py). A query compares the checksums of the lists that it reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np

from .arrays import ArrayFile, ArrayGroup, crc32c, crc32c_extend
from .bits import signs_of, to_words
from .compiled import Compiled
from .errors import IntegrityError
from .manifest import SparseComponent
from .shapes import Bool, Float32, Int64, UInt32
from .sparse import SparseRows, unsigned_dtype

_add_lists = Compiled("add_lists", least_work=1 << 22)
_BYTE_SIGNS = signs_of(np.arange(256, dtype=np.uint8)[:, None], 8)


@dataclass(frozen=True)
class Postings:
    """The posting lists of a sparse component in a group of shards. The module's docstring describes the arrays."""

    computed_when_missing: ClassVar[bool] = True

    tokens: UInt32[np.ndarray, " lists"]
    starts: Int64[np.ndarray, " lists_and_one"]
    rows: np.ndarray
    codes: UInt32[np.ndarray, "postings words"]
    factors: Float32[np.ndarray, " postings"]
    checks: UInt32[np.ndarray, " lists"]
    where: str = field(default="", compare=False)
    file: ArrayFile | None = field(default=None, compare=False)
    _checked: Bool[np.ndarray, " lists"] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_checked", np.full(len(self.tokens), not self.where))  # lists in memory need no checks

    @classmethod
    def of(cls, shards: Sequence[SparseRows], component: SparseComponent) -> "Postings":
        """The lists of shards' rows, one shard after the other."""
        entries = [rows.entries(0, len(rows)) for rows in shards]
        keys, codes, factors = (np.concatenate([entry[i] for entry in entries]) for i in range(3))
        order = np.argsort(keys, kind="stable")
        tokens, starts = np.unique(keys[order], return_index=True)
        counts = np.concatenate([np.diff(rows.indptr) for rows in shards])
        owners = np.repeat(np.arange(len(counts), dtype=unsigned_dtype(len(counts))), counts)
        starts = np.append(starts, len(order)).astype(np.int64)
        rows_of_postings = owners[order]
        words = to_words(codes[order], "<u4")
        factors = factors[order]
        checks = [_checksum(rows_of_postings[i:j], words[i:j], factors[i:j]) for i, j in pairwise(starts.tolist())]
        return cls(tokens.astype(np.uint32), starts, rows_of_postings, words, factors, np.array(checks, np.uint32))

    def add_scores(
        self,
        keys: Int64[np.ndarray, " entries"],
        owners: Int64[np.ndarray, " entries"],
        tables: Float32[np.ndarray, "entries bytes 256"],
        scores: Float32[np.ndarray, "queries rows"],
    ) -> None:
        """Add the estimated inner products of all queries with all rows to the scores.

        Args:
            keys, owners: the tokens of all queries, and for each the number of its query, ascending.
            tables: for each token, the tables of its rotated vector (see `byte_tables`).
            scores: the scores, changed in place.
        """
        if not len(self.tokens):
            return
        lists = np.searchsorted(self.tokens, keys).clip(max=len(self.tokens) - 1)
        has_list = self.tokens[lists] == keys
        if not self._checked[lists].all():
            self._check(np.unique(lists[has_list]), scores.shape[1])
        add_lists = _add_lists.loop or _add_lists.if_worth(self._postings(lists[has_list])) or add_lists_plainly
        bounds = np.searchsorted(owners, np.arange(len(scores) + 1)).tolist()
        for query, (first, last) in enumerate(pairwise(bounds)):
            entries = slice(first, last)
            postings = self.starts, self.rows, self.codes, self.factors
            add_lists(lists[entries], has_list[entries], tables[entries], *postings, scores[query])

    def _postings(self, lists: Int64[np.ndarray, " lists"]) -> int:
        """Return the number of postings in some lists."""
        return int((self.starts[lists + 1] - self.starts[lists]).sum())

    def _check(self, lists: Int64[np.ndarray, " lists"], rows: int) -> None:
        """Compare the checksums of lists that were not compared before, and check row numbers, since the compiled loop does not."""
        unread = lists[~self._checked[lists]]
        if self.file is not None and len(unread):
            self.file.read_ahead((self.rows, self.codes, self.factors), self.starts[unread], self.starts[unread + 1])
        if not len(unread):
            return
        places = [slice(first, last) for first, last in zip(self.starts[unread].tolist(), self.starts[unread + 1].tolist(), strict=True)]
        for place, check in zip(places, self.checks[unread].tolist(), strict=True):
            if _checksum(self.rows[place], self.codes[place], self.factors[place]) != check:
                raise IntegrityError(f"{self.where} fails a checksum; run wherefrom reindex")
        owners = np.concatenate([self.rows[place] for place in places])
        factors = np.concatenate([self.factors[place] for place in places])
        if owners.max(initial=0) >= rows or not np.isfinite(factors).all():
            raise IntegrityError(f"{self.where} has invalid rows or factors; run wherefrom reindex")
        self._checked[unread] = True

    def arrays(self) -> ArrayGroup:
        """Return the arrays for a search cache."""
        return ArrayGroup({name: getattr(self, name) for name in ("tokens", "starts", "rows", "codes", "factors", "checks")})

    @classmethod
    def read(cls, file: ArrayFile, component: SparseComponent, rows: int) -> "Postings | None":
        """Read the lists from a search cache; None if they are missing or damaged."""
        name = component.name
        try:
            (lists,) = file.shape(f"{name}/tokens")
            (postings,) = file.shape(f"{name}/rows")
            tokens = file.array(f"{name}/tokens", (lists,), "uint32")
            starts = file.array(f"{name}/starts", (lists + 1,), "int64")
            result = cls(
                tokens,
                starts,
                file.unchecked(f"{name}/rows", (postings,), unsigned_dtype(rows)),
                file.unchecked(f"{name}/codes", (postings, -(-component.bits // 32)), "uint32"),
                file.unchecked(f"{name}/factors", (postings,), "float32"),
                file.array(f"{name}/checks", (lists,), "uint32"),
                f"{file.path}: {name}",
                file,
            )
        except (IntegrityError, ValueError):
            return None
        # Compiled loops check no bounds, so the bounds of lists are checked here, and the rows in `_check`.
        ordered = starts[0] == 0 and starts[-1] == postings and (np.diff(starts) >= 0).all() and (tokens[1:] > tokens[:-1]).all()
        return result if ordered else None


def add_lists_plainly(
    lists: np.ndarray,
    has_list: np.ndarray,
    tables: np.ndarray,
    starts: np.ndarray,
    rows: np.ndarray,
    codes: np.ndarray,
    factors: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Add a query's share of posting lists to the scores, with the exact results of `kernels.add_lists`, but without compilation."""
    for number, table in zip(lists[has_list], tables[has_list], strict=True):
        postings = slice(int(starts[number]), int(starts[number + 1]))
        values = []
        for word in range(codes.shape[1]):
            code = codes[postings, word]
            byte = 4 * word
            low = table[byte, code & 255] + table[byte + 1, (code >> 8) & 255]
            values.append(low + (table[byte + 2, (code >> 16) & 255] + table[byte + 3, code >> 24]))
        for word in range(0, len(values), 2):
            scores[rows[postings]] += factors[postings] * (sum(values[word + 1 : word + 2], values[word]))


def _checksum(rows: np.ndarray, codes: np.ndarray, factors: np.ndarray) -> int:
    return crc32c_extend(crc32c_extend(crc32c(rows), codes), factors)


def byte_tables(rotated: Float32[np.ndarray, "entries bits"]) -> Float32[np.ndarray, "entries bytes 256"]:
    """Return, for each byte of a code (padded to four) and each of its 256 values, its part of the inner product with a rotated vector."""
    entries, bits = rotated.shape
    padded = np.zeros((entries, -(-bits // 32) * 32), np.float32)
    padded[:, :bits] = rotated
    return np.ascontiguousarray(padded.reshape(entries, padded.shape[1] // 8, 8) @ _BYTE_SIGNS.T)
