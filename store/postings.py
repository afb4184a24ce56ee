"""Posting lists: sparse rows of a group of shards in the order of their tokens. A query touches the lists of its own tokens alone.

    tokens   [lists]            ascending
    starts   [lists + 1]        list i holds the postings starts[i] to starts[i + 1], ascending by row
    rows     [postings]         of the group, in 16 bits where these suffice
    codes    [postings, words]  as in the rows, four bytes to a little-endian word (zeros behind the last)
    factors  [postings]         float32
    checks   [lists]            CRC-32C of a list's rows, codes and factors, one after the other

An exact score costs one table look-up for each byte of a shared token's code: the query's vector is turned into a table of what each of
the 256 values of a byte adds. A group's scores fit into a core's cache, so that adding to them costs little, and groups are independent.

Early termination (MaxScore, block-max WAND) was measured and left out. A one-bit estimate is bounded by the sum of |coordinates| times the
largest factor of a list, some twenty times what it typically is: on real rows of 800 bytes the lists that cannot be skipped hold six to
nine tenths of the postings that a query touches, and the rest would need random access. Rows keep their longest vectors alone, and the
tokens that every example has are seldom among them: a query touches one in twenty-five of the entries to begin with.

The lists are kept in a search cache (see cache.py). A query reads, and compares with their checksums, its own lists alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8, UInt32

from .arrays import ArrayFile, ArrayGroup, crc32c, crc32c_extend
from .bits import signs_of
from .compiled import Compiled
from .errors import IntegrityError
from .manifest import SparseComponent
from .sparse import SparseRows

_add_lists = Compiled("add_lists", after=1 << 19)
_BYTE_SIGNS = signs_of(np.arange(256, dtype=np.uint8)[:, None], 8)


@dataclass(frozen=True)
class Postings:
    """A sparse component of a group of shards, by token; see above."""

    computed_when_missing: ClassVar[bool] = True

    tokens: UInt32[np.ndarray, " lists"]
    starts: Int64[np.ndarray, " lists_and_one"]
    rows: np.ndarray
    codes: UInt32[np.ndarray, "postings words"]
    factors: Float32[np.ndarray, " postings"]
    checks: UInt32[np.ndarray, " lists"]
    where: str = field(default="", compare=False)
    _checked: Bool[np.ndarray, " lists"] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_checked", np.full(len(self.tokens), not self.where))  # those made here need no check

    @classmethod
    def of(cls, shards: Sequence[SparseRows], component: SparseComponent) -> "Postings":
        """The lists of shards' rows, one shard after the other."""
        entries = [rows.entries(0, len(rows)) for rows in shards]
        keys, codes, factors = (np.concatenate([entry[i] for entry in entries]) for i in range(3))
        order = np.argsort(keys, kind="stable")
        tokens, starts = np.unique(keys[order], return_index=True)
        counts = np.concatenate([np.diff(rows.indptr) for rows in shards])
        owners = np.repeat(np.arange(len(counts), dtype=_row_dtype(len(counts))), counts)
        starts = np.append(starts, len(order)).astype(np.int64)
        rows_of_postings, words, factors = owners[order], _words(codes[order]), factors[order]
        checks = [_checksum(rows_of_postings[i:j], words[i:j], factors[i:j]) for i, j in pairwise(starts.tolist())]
        return cls(tokens.astype(np.uint32), starts, rows_of_postings, words, factors, np.array(checks, np.uint32))

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
        self._check(np.unique(at[known]), scores.shape[1])
        add_lists = _add_lists.after(int((self.starts[at + 1] - self.starts[at])[known].sum())) or add_lists_plainly
        for query in range(len(scores)):
            part = slice(bounds[query], bounds[query + 1])
            lists, own = at[part], tables[part]
            add_lists(lists, known[part], own, self.starts, self.rows, self.codes, self.factors, scores[query])

    def _check(self, lists: Int64[np.ndarray, " some"], rows: int) -> None:
        """Compare some lists with their checksums, once, and what the compiled loop would step over with the rows that there are.

        Raises:
            IntegrityError: a list is damaged, or of other rows.
        """
        for i in lists[~self._checked[lists]].tolist():
            postings = slice(int(self.starts[i]), int(self.starts[i + 1]))
            owners, factors = self.rows[postings], self.factors[postings]
            if _checksum(owners, self.codes[postings], factors) != self.checks[i]:
                raise IntegrityError(f"{self.where} fails a checksum; make it anew with wherefrom reindex")
            if len(owners) and (int(owners.max()) >= rows or not np.isfinite(factors).all()):
                raise IntegrityError(f"{self.where} names rows that are not there; make it anew with wherefrom reindex")
            self._checked[i] = True

    def arrays(self) -> ArrayGroup:
        """The arrays that are kept in a search cache."""
        return ArrayGroup({name: getattr(self, name) for name in ("tokens", "starts", "rows", "codes", "factors", "checks")})

    @classmethod
    def read(cls, file: ArrayFile, component: SparseComponent, rows: int) -> "Postings | None":
        """The lists of so many rows in a search cache; None where they are missing, or cannot be lists of these."""
        name = component.name
        try:
            (lists,), (postings,) = file.shape(f"{name}/tokens"), file.shape(f"{name}/rows")
            tokens = file.array(f"{name}/tokens", (lists,), "uint32")
            starts = file.array(f"{name}/starts", (lists + 1,), "int64")
            found = cls(
                tokens,
                starts,
                file.unchecked(f"{name}/rows", (postings,), _row_dtype(rows)),
                file.unchecked(f"{name}/codes", (postings, -(-component.bits // 32)), "uint32"),
                file.unchecked(f"{name}/factors", (postings,), "float32"),
                file.array(f"{name}/checks", (lists,), "uint32"),
                f"{file.path}: {name}",
            )
        except (IntegrityError, ValueError):
            return None
        # Compiled loops check no bounds: what they would step over is compared here, and the rows when their pages are read.
        ordered = starts[0] == 0 and starts[-1] == postings and (np.diff(starts) >= 0).all() and (tokens[1:] > tokens[:-1]).all()
        return found if ordered else None


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


def _checksum(rows: np.ndarray, codes: np.ndarray, factors: np.ndarray) -> int:
    return crc32c_extend(crc32c_extend(crc32c(rows), codes), factors)


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
