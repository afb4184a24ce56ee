"""Matrix of the scores of every example for many queries, written to Zarr or Parquet.

Scores are computed and written by groups of shards, for as many queries as fit into memory. The file is renamed when it is complete, so an
incomplete matrix never has the requested name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..store.errors import IntegrityError, NotFoundError, UsageError, first_line
from ..store.index import Index
from ..store.shapes import Float32
from .options import Query
from .results import Reporter, complete_or_nothing, refuse_existing

if TYPE_CHECKING:
    import zarr

_BLOCK_BYTES = 32 << 20
Scores = Callable[[Sequence[Query]], Iterator[tuple[int, Float32[np.ndarray, "queries rows"]]]]
"""Function that yields, for some queries, the first row and the scores of each group of shards; NaN for deleted rows."""


def write_scores(index: Index, scores: Scores, queries: Sequence[Query], out: Path, reporter: Reporter) -> tuple[int, int]:
    """Write scores [queries, rows] as float32; those of deleted rows are NaN.

    Args:
        out: path ending in `.zarr` (arrays `scores`, `rows`, `queries`) or `.parquet` (one record for each row, one column for each query).

    Returns:
        The shape of the matrix.

    Raises:
        UsageError: `out` has another ending or exists, there are no queries, or two have the same id.
    """
    check_output(out)
    if not queries:
        raise UsageError("there are no queries; add at least one")
    names = [query.id or str(i) for i, query in enumerate(queries)]
    _check_names(out, names)
    with complete_or_nothing(out) as staged:
        (_write_zarr if out.suffix == ".zarr" else _write_parquet)(index, scores, queries, names, staged, reporter)
    return len(queries), len(index)


def check_output(out: Path) -> None:
    """Check the name of a file of scores.

    Raises:
        UsageError: it has another ending than `.zarr` or `.parquet`, or exists.
    """
    if out.suffix not in (".zarr", ".parquet"):
        raise UsageError(f"`out` {out} must end in .zarr or .parquet")
    refuse_existing(out)


def _check_names(out: Path, names: Sequence[str]) -> None:
    """Refuse queries whose ids cannot be names of columns."""
    if out.suffix == ".parquet" and len({*names, "id"}) <= len(names):
        raise UsageError("two queries have the same id, or one has the id 'id'; give each query another id, since ids are names of columns")


def write_matrix(
    out: Path, scores: Float32[np.ndarray, "queries rows"], rows: Sequence[str], queries: Sequence[str], about: Mapping[str, Any]
) -> None:
    """Write a matrix of scores that is in memory, in the form of `write_scores`.

    Args:
        rows, queries: their ids.
        about: attributes of the Zarr group; Parquet has none.

    Raises:
        UsageError: `out` has another ending or exists, or two queries have the same id.
    """
    check_output(out)
    _check_names(out, queries)
    with complete_or_nothing(out) as staged:
        if out.suffix == ".zarr":
            import zarr

            group = zarr.create_group(staged, zarr_format=3, attributes=dict(about))
            chunks = (min(len(queries), 64), min(1 << 16, len(rows)))
            group.create_array("scores", shape=scores.shape, chunks=chunks, dtype="float32", fill_value=np.nan)[...] = scores
            _write_ids(group, {"rows": rows, "queries": queries})
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table([pa.array(rows), *map(pa.array, scores)], names=["id", *queries]), staged)


def _write_ids(group: "zarr.Group", arrays: Mapping[str, Sequence[str]]) -> None:
    for name, ids in arrays.items():
        values = np.array(ids)
        group.create_array(name, shape=values.shape, dtype=values.dtype)[...] = values


def _write_row_ids(group: "zarr.Group", index: Index) -> None:
    """Write the ids of all rows, one shard after the other."""
    longest = max(max(map(len, index.documents(shard).ids())) for shard in index.shards)
    array = group.create_array("rows", shape=(len(index),), chunks=(min(1 << 16, len(index)),), dtype=f"<U{max(1, longest)}")
    for shard in index.shards:
        array[shard.first : shard.first + shard.rows] = np.array(index.documents(shard).ids())


def read_matrix(path: Path) -> tuple[Float32[np.ndarray, "queries rows"], list[str], list[str]]:
    """Read the scores of a `.zarr` file, and the ids of its rows and queries.

    Raises:
        NotFoundError: there is no such file.
        IntegrityError: it is not a matrix of scores.
    """
    if not path.is_dir():
        raise NotFoundError(f"there is no file {path} of scores")
    import zarr

    try:
        group = zarr.open_group(path, mode="r")
        scores, rows, queries = (np.asarray(group[name]) for name in ("scores", "rows", "queries"))
        if scores.dtype != np.float32 or scores.shape != (len(queries), len(rows)):
            raise ValueError(f"its scores are {scores.dtype} {list(scores.shape)}")
    except Exception as error:  # zarr raises many kinds of error
        raise IntegrityError(f"{path} is not a matrix of scores ({first_line(error)}); write it again") from error
    return scores, rows.astype(str).tolist(), queries.astype(str).tolist()


def _write_zarr(index: Index, scores: Scores, queries: Sequence[Query], names: list[str], path: Path, reporter: Reporter) -> None:
    import zarr

    step = max(1, _BLOCK_BYTES // (4 * max(group.rows for group in index.groups)))
    group = zarr.create_group(path, zarr_format=3)
    shape = (len(queries), len(index))
    chunks = (min(step, len(queries)), min(1 << 16, len(index)))
    matrix = group.create_array("scores", shape=shape, chunks=chunks, dtype="float32", fill_value=np.nan)
    _write_row_ids(group, index)
    _write_ids(group, {"queries": names})
    reporter.stage("writing scores", len(queries) * len(index.groups))
    for first_query in range(0, len(queries), step):
        part = queries[first_query : first_query + step]
        for first_row, block in scores(part):
            columns = slice(first_row, first_row + block.shape[1])
            matrix[first_query : first_query + len(part), columns] = block
            reporter.update(len(part), 0)


def _write_parquet(index: Index, scores: Scores, queries: Sequence[Query], names: list[str], path: Path, reporter: Reporter) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), *((name, pa.float32()) for name in names)])
    reporter.stage("writing scores", len(index))
    with pq.ParquetWriter(path, schema) as writer:
        for group, (_, block) in zip(index.groups, scores(queries), strict=True):
            ids = [id for shard in group.shards for id in index.documents(shard).ids()]
            writer.write_table(pa.table([ids, *block], schema=schema))
            reporter.update(group.rows, 0)
