"""Matrix of the scores of every example for many queries, written to Zarr or Parquet.

Scores are computed and written by groups of shards, for as many queries as fit into memory. The file is renamed when it is complete, so an
incomplete matrix never has the requested name.
"""

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from ..store.errors import UsageError
from ..store.files import storage_errors
from ..store.index import Index
from ..store.shapes import Float32
from .options import Query

_BLOCK_BYTES = 256 << 20
Scores = Callable[[Sequence[Query]], Iterator[tuple[int, Float32[np.ndarray, "queries rows"]]]]
"""Function that yields, for some queries, the first row and the scores of each group of shards."""


@runtime_checkable
class _Reporter(Protocol):
    def stage(self, name: str, examples: int | None) -> None: ...
    def update(self, examples: int, tokens: int) -> None: ...


def write_scores(index: Index, scores: Scores, queries: Sequence[Query], out: Path, reporter: _Reporter) -> tuple[int, int]:
    """Write scores [queries, rows] as float32; those of deleted rows are NaN.

    Args:
        out: path ending in `.zarr` (arrays `scores`, `rows`, `queries`) or `.parquet` (one record for each row, one column for each query).

    Returns:
        The shape of the matrix.

    Raises:
        UsageError: `out` has another ending or exists, there are no queries, or two have the same id.
    """
    if out.suffix not in (".zarr", ".parquet"):
        raise UsageError(f"`out` {out} must end in .zarr or .parquet")
    if out.exists():
        raise UsageError(f"`out` {out} exists; choose another name, or remove it first")
    if not queries:
        raise UsageError("there are no queries; add at least one")
    names = [query.id or str(i) for i, query in enumerate(queries)]
    if out.suffix == ".parquet" and len({*names, "id"}) <= len(names):
        raise UsageError("two queries have the same id, or one has the id 'id'; give each query another id, since ids are names of columns")
    staged = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        with storage_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            (_write_zarr if out.suffix == ".zarr" else _write_parquet)(index, scores, queries, names, staged, reporter)
            staged.rename(out)
    finally:
        if staged.is_dir():
            shutil.rmtree(staged)
        staged.unlink(missing_ok=True)
    return len(queries), len(index)


def _write_zarr(index: Index, scores: Scores, queries: Sequence[Query], names: list[str], path: Path, reporter: _Reporter) -> None:
    import zarr

    step = max(1, _BLOCK_BYTES // (4 * max(group.rows for group in index.groups)))
    group = zarr.create_group(path, zarr_format=3)
    shape = (len(queries), len(index))
    chunks = (min(step, len(queries)), min(1 << 16, len(index)))
    matrix = group.create_array("scores", shape=shape, chunks=chunks, dtype="float32", fill_value=np.nan)
    ids = np.array(index.column("id").to_pylist())
    group.create_array("rows", shape=ids.shape, dtype=ids.dtype)[...] = ids
    group.create_array("queries", shape=(len(names),), dtype=np.array(names).dtype)[...] = np.array(names)
    reporter.stage("writing scores", len(queries) * len(index.groups))
    for first_query in range(0, len(queries), step):
        part = queries[first_query : first_query + step]
        for first_row, block in scores(part):
            columns = slice(first_row, first_row + block.shape[1])
            matrix[first_query : first_query + len(part), columns] = _without_deleted(index, first_row, block)
            reporter.update(len(part), 0)


def _write_parquet(index: Index, scores: Scores, queries: Sequence[Query], names: list[str], path: Path, reporter: _Reporter) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), *((name, pa.float32()) for name in names)])
    reporter.stage("writing scores", len(index))
    with pq.ParquetWriter(path, schema) as writer:
        for group, (first, block) in zip(index.groups, scores(queries), strict=True):
            ids = [id for shard in group.shards for id in index.documents(shard).ids()]
            writer.write_table(pa.table([ids, *_without_deleted(index, first, block)], schema=schema))
            reporter.update(group.rows, 0)


def _without_deleted(index: Index, first: int, block: np.ndarray) -> np.ndarray:
    """Replace the scores of deleted rows by NaN."""
    return np.where(index.alive[first : first + block.shape[1]], block, np.float32(np.nan))
