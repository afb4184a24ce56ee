"""The whole matrix of scores of many queries, streamed to Zarr or Parquet: what the score of every example is for every query.

Scores come shard by shard for as many queries as fit into memory at a time, and are written as they come; the finished matrix is
renamed to its name, so that a half-written one is never taken for whole.
"""

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from ..store.errors import UsageError
from ..store.files import storage_errors
from ..store.index import Index
from .options import Query

_BLOCK_BYTES = 256 << 20
Scores = Callable[[Sequence[Query]], Iterator[tuple[int, Float32[np.ndarray, "queries rows"]]]]
"""Every row's score for some queries, shard by shard: the first row, and the scores."""


@runtime_checkable
class _Reporter(Protocol):
    def stage(self, name: str, examples: int | None) -> None: ...
    def update(self, examples: int, tokens: int) -> None: ...


def write_scores(index: Index, scores: Scores, queries: Sequence[Query], out: Path, reporter: _Reporter) -> tuple[int, int]:
    """Write scores [queries, rows] as float32; a deleted row's are NaN.

    Args:
        out: ends in `.zarr` (arrays `scores`, `rows`, `queries`) or `.parquet` (a line for each row, a column for each query).

    Returns:
        The matrix's shape.

    Raises:
        UsageError: another ending, `out` exists, or there are no queries.
    """
    if out.suffix not in (".zarr", ".parquet"):
        raise UsageError(f"`out` {out} must end in .zarr or .parquet")
    if out.exists():
        raise UsageError(f"`out` {out} exists; choose another name, or remove it first")
    if not queries:
        raise UsageError("there is no query in the file")
    names = [query.id or str(i) for i, query in enumerate(queries)]
    if out.suffix == ".parquet" and len({*names, "id"}) <= len(names):
        raise UsageError("two queries have the same id (or one is called id), and a column needs a name of its own; fix them")
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
    shape, chunks = (len(queries), len(index)), (min(step, len(queries)), min(1 << 16, len(index)))
    matrix = group.create_array("scores", shape=shape, chunks=chunks, dtype="float32", fill_value=np.nan)
    ids = np.array(index.column("id").to_pylist())
    group.create_array("rows", shape=ids.shape, dtype=ids.dtype)[...] = ids
    group.create_array("queries", shape=(len(names),), dtype=np.array(names).dtype)[...] = np.array(names)
    reporter.stage("writing scores", len(queries) * len(index.groups))
    for at in range(0, len(queries), step):
        part = queries[at : at + step]
        for first, block in scores(part):
            matrix[at : at + len(part), first : first + block.shape[1]] = _without_deleted(index, first, block)
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
    return np.where(index.alive[first : first + block.shape[1]], block, np.float32(np.nan))
