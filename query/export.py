"""Rows and queries as files, for search engines of one's own.

The score of a row for a query is the inner product of their vectors, for a dense component. For a sparse one it is the sum, over the tokens
that both have, of the row's factor times the inner product of the signs of its code with the query's vector. Scores of an index with
several components are the sums over these. Deleted rows are left out.

    about.json      what it is
    rows.npy        int64 [rows]: the rows' numbers in the index
    ids.txt         the examples' ids, one in a line
    numpy, dense:   vectors.npy   float32 [rows, coordinates]
    numpy, sparse:  indptr.npy    int64 [rows + 1]: where a row's entries begin
                    tokens.npy    uint32 [entries]
                    codes.npy     uint8 [entries, bytes]: signs, most significant bit first; 1 is positive
                    factors.npy   float32 [entries]
    parquet:        vectors.parquet   row, id, and `vector`, or `tokens`, `codes` and `factors`
    faiss, dense:   index.faiss   by inner product; its ids are positions in rows.npy
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..store.errors import UsageError, first_line
from ..store.index import Index
from ..store.manifest import Component
from ..store.shapes import Int64
from .results import Reporter, complete_or_nothing, refuse_existing
from .scoring import Scorer

Format = Literal["numpy", "parquet", "faiss"]


def export_rows(index: Index, out: Path, kind: Format, component_name: str | None, factory: str, reporter: Reporter) -> dict[str, Any]:
    """Write the rows of a component to a new directory.

    Args:
        component_name: may be None if the index has one component.
        factory: of a FAISS index, such as "Flat" or "HNSW32".

    Returns:
        What `about.json` holds.

    Raises:
        UsageError: `out` exists, the component is not named or does not exist, or FAISS cannot hold it.
    """
    component = _component(index, component_name)
    if kind == "faiss" and not component.has_wide_rows:
        raise UsageError(f"the rows of {component.name} are sparse, which FAISS does not take; export them as numpy or parquet")
    alive = np.flatnonzero(index.alive)
    about = {
        "index": str(index.path.resolve()),
        "manifest": index.manifest.number,
        "component": component.name,
        "kind": component.kind,
        "weight": component.weight,
        "format": kind,
        "rows": len(alive),
    }
    refuse_existing(out)
    with complete_or_nothing(out) as staged:
        staged.mkdir()
        reporter.stage("exporting rows", len(alive))
        np.save(staged / "rows.npy", alive)
        with open(staged / "ids.txt", "w", encoding="utf-8") as file:
            for _, ids in _ids(index):
                file.writelines(f"{id}\n" for id in ids)
        if component.has_wide_rows:
            writers = {"numpy": _dense_numpy, "parquet": _dense_parquet, "faiss": _dense_faiss}
            about |= writers[kind](index, component, staged, len(alive), factory, reporter)
        else:
            about |= (_sparse_numpy if kind == "numpy" else _sparse_parquet)(index, component, staged, reporter)
        (staged / "about.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return about


def _component(index: Index, name: str | None) -> Component:
    names = [component.name for component in index.manifest.components]
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        listed = ", ".join(names)
        raise UsageError(f"there is no component {name!r}; choose among {listed}" if name else f"name one of the components {listed}")
    return index.component(name)


def _ids(index: Index) -> Iterator[tuple[Int64[np.ndarray, " rows"], list[str]]]:
    """Yield the numbers and ids of the rows that are not deleted, shard by shard."""
    for shard in index.shards:
        offsets = np.flatnonzero(index.alive_between(shard.first, shard.first + shard.rows))
        ids = index.documents(shard).ids()
        yield shard.first + offsets, [ids[offset] for offset in offsets.tolist()]


def _dense(index: Index, component: Component, reporter: Reporter) -> Iterator[tuple[Int64[np.ndarray, " rows"], np.ndarray]]:
    """Yield the numbers and vectors of the rows that are not deleted."""
    from .faiss_index import row_blocks

    done = 0
    for first, vectors in row_blocks(index, component):  # type: ignore[arg-type]
        alive = index.alive_between(first, first + len(vectors))
        yield first + np.flatnonzero(alive), np.ascontiguousarray(vectors[alive])
        done += int(alive.sum())
        reporter.update(done, 0)


def _dense_numpy(index: Index, component: Component, place: Path, rows: int, factory: str, reporter: Reporter) -> dict[str, Any]:
    width = component.stored  # type: ignore[union-attr]
    vectors = np.lib.format.open_memmap(place / "vectors.npy", "w+", np.float32, (rows, width))
    first = 0
    for _, block in _dense(index, component, reporter):
        vectors[first : first + len(block)] = block
        first += len(block)
    vectors.flush()
    return {"coordinates": width}


def _dense_parquet(index: Index, component: Component, place: Path, rows: int, factory: str, reporter: Reporter) -> dict[str, Any]:
    import pyarrow as pa

    width = component.stored  # type: ignore[union-attr]
    kind = pa.list_(pa.float32(), width)
    with _parquet(place, {"vector": kind}) as write:
        ids = _Ids(index)
        for numbers, block in _dense(index, component, reporter):
            write(numbers, ids.take(len(numbers)), [pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), width)])
    return {"coordinates": width}


def _dense_faiss(index: Index, component: Component, place: Path, rows: int, factory: str, reporter: Reporter) -> dict[str, Any]:
    import faiss

    width = component.stored  # type: ignore[union-attr]
    try:
        engine: Any = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        if not engine.is_trained:
            sample = [block for _, block in _dense(index, component, reporter)]
            engine.train(np.concatenate(sample))
            del sample
    except RuntimeError as error:
        raise UsageError(f"FAISS makes no index {factory!r} of these rows: {first_line(error)}") from error
    for _, block in _dense(index, component, reporter):
        engine.add(block)
    faiss.write_index(engine, str(place / "index.faiss"))
    return {"coordinates": width, "factory": factory}


def _sparse(index: Index, component: Component, reporter: Reporter) -> Iterator[tuple[Int64[np.ndarray, " rows"], Any, np.ndarray]]:
    """Yield, shard by shard, the numbers of the rows that are not deleted, their entries, and the number of entries of each."""
    done = 0
    for shard in index.shards:
        stored = index.rows(shard, component)
        alive = index.alive_between(shard.first, shard.first + shard.rows)
        counts = np.diff(stored.indptr.astype(np.int64))
        alive_entries = np.repeat(alive, counts)
        yield shard.first + np.flatnonzero(alive), tuple(array[alive_entries] for array in stored.entries(0, shard.rows)), counts[alive]
        done += int(alive.sum())
        reporter.update(done, 0)


def _sparse_numpy(index: Index, component: Component, place: Path, reporter: Reporter) -> dict[str, Any]:
    counts = np.concatenate([row_counts for _, _, row_counts in _sparse(index, component, reporter)])
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    np.save(place / "indptr.npy", indptr)
    code_bytes = -(-component.bits // 8)  # type: ignore[union-attr]
    tails: dict[str, tuple[int, ...]] = {"tokens": (), "codes": (code_bytes,), "factors": ()}
    dtypes = {"tokens": np.uint32, "codes": np.uint8, "factors": np.float32}
    total = int(indptr[-1])
    files = {n: np.lib.format.open_memmap(place / f"{n}.npy", "w+", dtypes[n], (total, *tail)) for n, tail in tails.items()}
    first = 0
    for _, entries, row_counts in _sparse(index, component, reporter):
        for file, array in zip(files.values(), entries, strict=True):
            file[first : first + int(row_counts.sum())] = array
        first += int(row_counts.sum())
    for file in files.values():
        file.flush()
    return {"bits": component.bits, "entries": first}  # type: ignore[union-attr]


def _sparse_parquet(index: Index, component: Component, place: Path, reporter: Reporter) -> dict[str, Any]:
    import pyarrow as pa

    code_bytes = -(-component.bits // 8)  # type: ignore[union-attr]
    kinds = {"tokens": pa.list_(pa.uint32()), "codes": pa.list_(pa.binary(code_bytes)), "factors": pa.list_(pa.float32())}
    with _parquet(place, kinds) as write:
        ids = _Ids(index)
        for numbers, (tokens, codes, factors), counts in _sparse(index, component, reporter):
            offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
            buffers = [None, pa.py_buffer(np.ascontiguousarray(codes))]
            packed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(code_bytes), len(codes), buffers)
            values = (pa.array(tokens.astype(np.uint32)), packed, pa.array(factors.astype(np.float32)))
            write(numbers, ids.take(len(numbers)), [pa.ListArray.from_arrays(offsets, value) for value in values])
    return {"bits": component.bits}  # type: ignore[union-attr]


class _Ids:
    """The ids of the rows that are not deleted, in row order, taken piece by piece."""

    def __init__(self, index: Index) -> None:
        self._shards = (ids for _, ids in _ids(index))
        self._ids: list[str] = []

    def take(self, count: int) -> list[str]:
        """Return the next ids."""
        while len(self._ids) < count:
            self._ids += next(self._shards)
        taken = self._ids[:count]
        self._ids = self._ids[count:]
        return taken


@contextmanager
def _parquet(place: Path, kinds: Mapping[str, Any]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("row", pa.int64()), ("id", pa.string()), *kinds.items()])
    with ExitStack() as stack:
        writer = stack.enter_context(pq.ParquetWriter(place / "vectors.parquet", schema))

        def write(numbers: Int64[np.ndarray, " rows"], ids: Sequence[str], columns: Sequence[Any]) -> None:
            if len(numbers):
                writer.write_table(pa.table([pa.array(numbers), pa.array(ids, pa.string()), *columns], schema=schema))

        yield write


def export_queries(scorer: Scorer, out: Path, names: Sequence[str]) -> dict[str, Any]:
    """Write prepared queries to an `.npz` file: for each component with a weight other than 0, what its rows are multiplied with.

    Arrays are `<component>/vectors` float32 [queries, coordinates] of a dense component; of a sparse one `<component>/queries`, `tokens`
    (int64 [entries]) and `vectors` (float32 [entries, bits]); and `ids`. The weights of the components and the options are in them.

    Raises:
        UsageError: `out` exists or has another ending, or scores are no inner products.
    """
    if out.suffix != ".npz":
        raise UsageError(f"`out` {out} must end in .npz")
    refuse_existing(out)
    if scorer.mode != "influence":
        raise UsageError(
            f"scores by {scorer.mode} are no inner products of vectors; leave `mode` out, and divide by lengths or losses yourself"
        )
    arrays: dict[str, np.ndarray] = {"ids": np.array(list(names))}
    for operand in scorer.operands:
        arrays |= {f"{operand.component.name}/{name}": array for name, array in operand.exported().items()}
    with complete_or_nothing(out) as staged, open(staged, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return {"queries": len(names), "arrays": {name: list(array.shape) for name, array in arrays.items()}}
