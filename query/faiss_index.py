"""A FAISS index of a dense component, stored next to the rows: made, measured and searched.

    faiss/<component>.json     what it is: factory, parameters, rows, and the recall that was measured when it was made
    faiss/<uuid>.faiss         the index, as FAISS writes it

It can be made again from the rows, so no manifest names it. Vectors are the whole rows (length times direction, as they are stored) in
row order, compared by inner product; a query is prepared as for a scan, so that its damping and layers count. Opponents are the best rows
of the negated query. What FAISS finds is scored again from the stored rows.

FAISS states no certificate. Its recall is measured when the index is made: queries are rows on which nothing was trained, and the best 10
and the worst 10 of the others, by an exact scan, are what has to be among the rows that are scored again.
"""

import importlib
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..store.dense import DenseRows
from ..store.errors import IncompatibleError, IntegrityError, NotFoundError, UsageError, first_line
from ..store.files import publish, read_bytes, staging_folder, write_whole
from ..store.index import Index, file_problem
from ..store.manifest import DenseComponent, FileRecord
from ..store.objects import fetched
from ..store.shapes import Bool, Float32, Int64
from .parts import Best
from .results import Reporter

_FOLDER = "faiss"
_FORMAT = "wherefrom faiss 1"
_REMEDY = "run wherefrom reindex --faiss"
_K = 10
_HELD_OUT = 200
_MOST_TRAINED = 1 << 18
_BLOCK_BYTES = 64 << 20
_LEAST_CANDIDATES = 100
_MOST_LOOPS = 1 << 40


class FaissRecord(BaseModel):
    """Record of a FAISS index: factory, source, measured recall.

    Attributes:
        factory: FAISS's description of it, such as "IVF4096_HNSW32,RaBitQ".
        parameters: of its searches, as FAISS's ParameterSpace takes them, such as "nprobe=64".
        rows: number of vectors; `source`: hash of the checksums of the shards that they come from.
        trained_on: number of rows that it was trained on.
        queries, k: held-out rows that were asked, and the number of best and of worst rows that had to be found for each.
        proponents, opponents: shares of these that were found.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["wherefrom faiss 1"] = _FORMAT  # type: ignore[assignment]
    component: str
    factory: str
    parameters: str
    faiss: str
    rows: Annotated[int, Field(ge=1)]
    source: str
    trained_on: int
    queries: int
    k: int
    proponents: Annotated[float, Field(ge=0, le=1)]
    opponents: Annotated[float, Field(ge=0, le=1)]
    file: FileRecord


def _source(index: Index) -> str:
    """Return a hash of the checksums of the index's rows; deletions do not change it."""
    from hashlib import sha256

    return sha256("".join(shard.sha256 for shard in index.shards).encode()).hexdigest()


def row_blocks(index: Index, component: DenseComponent) -> Iterator[tuple[int, Float32[np.ndarray, "rows stored"]]]:
    """Yield the first row and the vectors of blocks of a dense component's rows, deleted ones too, in row order.

    A query's inner product with a vector is its score: the vector is the row as it is stored, length times direction.
    """
    for shard in index.shards:
        rows: DenseRows = index.rows(shard, component)
        lengths = rows.norms * rows.factors()
        for first, codes in rows.blocks():
            yield shard.first + first, rows.values(codes) * lengths[first : first + len(codes), None]


def dense_component(index: Index, name: str | None = None) -> DenseComponent:
    """Return the dense component of an index, or that of a name.

    Raises:
        UsageError: there is none, or there are several and none is named.
    """
    dense: list[Any] = [component for component in index.manifest.components if component.has_wide_rows]
    named = [component for component in dense if name in (None, component.name)]
    if len(named) == 1:
        return named[0]
    if not dense:
        raise UsageError(f"{index.path} has no dense rows, which FAISS could search: head and embeddings are searched by posting lists")
    names = ", ".join(component.name for component in dense)
    raise UsageError(f"there is no dense component {name!r}; choose among {names}" if name else f"name one of the components {names}")


def make_faiss(index: Index, factory: str, parameters: str, component_name: str | None, reporter: Reporter) -> FaissRecord:
    """Train, fill, measure and write a FAISS index, in place of an earlier one of the component.

    Args:
        factory, parameters: see `FaissRecord`.
        component_name: see `dense_component`.

    Raises:
        UsageError: FAISS does not know the factory or the parameters, or cannot make such an index of so few rows.
    """
    import faiss

    component = dense_component(index, component_name)
    generator = np.random.default_rng(0)
    alive = np.flatnonzero(index.alive)
    held_out = np.sort(generator.choice(alive, min(_HELD_OUT, max(1, len(alive) // 10)), replace=False))
    candidates = np.setdiff1d(alive, held_out)
    trained = np.sort(generator.choice(candidates, min(_MOST_TRAINED, len(candidates)), replace=False))
    try:
        engine = faiss.index_factory(component.stored, factory, faiss.METRIC_INNER_PRODUCT)
    except Exception as error:  # FAISS raises RuntimeErrors of its own classes
        raise UsageError(f"FAISS knows no index {factory!r} of {component.stored} coordinates: {first_line(error)}") from error
    on_gpu, engine = _to_gpu(engine)
    queries = _gather(index, component, held_out, reporter, "reading held-out rows")
    if not engine.is_trained:
        sample = _gather(index, component, trained, reporter, "reading rows to train on")
        reporter.stage("training FAISS", None)
        try:
            engine.train(sample)
        except RuntimeError as error:
            raise UsageError(f"FAISS cannot train {factory!r} on {len(sample):,} rows: {first_line(error)}") from error
        del sample
    reporter.stage("adding rows to FAISS", len(index))
    exact = [(Best(_K + 1, 1), Best(_K + 1, -1)) for _ in held_out]
    dead = np.ones(len(index), bool)
    dead[alive] = False
    for first, vectors in row_blocks(index, component):
        engine.add(np.ascontiguousarray(vectors))
        products = queries @ vectors.T
        searched = ~dead[first : first + len(vectors)]
        offsets = np.flatnonzero(searched)
        for sides, scores in zip(exact, products[:, searched], strict=True):
            for side in sides:
                side.add(*side.candidates(first, offsets, scores))
        reporter.update(first + len(vectors), 0)
    if on_gpu:
        engine = faiss.index_gpu_to_cpu(engine)
    set_parameters(engine, parameters)
    reporter.stage("measuring FAISS's recall", len(held_out))
    shares = _estimate_recall(engine, queries, held_out, exact, ~dead)
    folder = index.path / _FOLDER
    path = folder / f"{uuid.uuid4()}.faiss"
    staged = staging_folder(index.path) / path.name
    staged.parent.mkdir(exist_ok=True)
    try:
        faiss.write_index(engine, os.fspath(staged))
        publish(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    record = FaissRecord(
        component=component.name,
        factory=factory,
        parameters=parameters,
        faiss=faiss.__version__,
        rows=len(index),
        source=_source(index),
        trained_on=len(trained),
        queries=len(held_out),
        k=_K,
        proponents=shares[0],
        opponents=shares[1],
        file=FileRecord.of(index.path, path),
    )
    write_whole(folder / f"{component.name}.json", record.model_dump_json(indent=1).encode())
    _remove_others(index)
    return record


def _remove_others(index: Index) -> None:
    """Remove FAISS indexes that no component has."""
    folder = index.path / _FOLDER
    named = set()
    for component in index.manifest.components:
        with suppress(NotFoundError, IncompatibleError, IntegrityError):
            named.add(read_record(index, component.name).file.path)
    for other in folder.glob("*.faiss"):
        if other.is_file() and f"{_FOLDER}/{other.name}" not in named:
            other.unlink()


def _to_gpu(engine: Any) -> tuple[bool, Any]:
    """Move an index to all GPUs for training and adding, if FAISS has GPUs and the index is of a kind that they support."""
    import faiss

    if not hasattr(faiss, "index_cpu_to_all_gpus") or not faiss.get_num_gpus():
        return False, engine
    try:
        return True, faiss.index_cpu_to_all_gpus(engine)
    except RuntimeError:
        return False, engine


def set_parameters(engine: Any, parameters: str) -> None:
    """Set the parameters of an index's searches.

    Raises:
        UsageError: FAISS does not know them for this index.
    """
    import faiss

    if not parameters:
        return
    try:
        faiss.ParameterSpace().set_index_parameters(engine, parameters)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"FAISS does not know the parameters {parameters!r} of this index: {first_line(error)}") from error


def _gather(index: Index, component: DenseComponent, rows: Int64[np.ndarray, " rows"], reporter: Reporter, stage: str) -> np.ndarray:
    """Read some rows, ascending, as vectors."""
    reporter.stage(stage, len(rows))
    vectors = np.empty((len(rows), component.stored), np.float32)
    done = 0
    for _, shard, positions, offsets in index.by_shard(rows):
        stored: DenseRows = index.rows(shard, component)
        lengths = (stored.norms * stored.factors())[offsets]
        codes = np.stack([stored.code(int(offset)) for offset in offsets])
        vectors[positions] = stored.values(codes) * lengths[:, None]
        done += len(positions)
        reporter.update(done, 0)
    return vectors


def _estimate_recall(
    engine: Any, queries: np.ndarray, held_out: np.ndarray, exact: Sequence[tuple[Best, Best]], searched: Bool[np.ndarray, " rows"]
) -> tuple[float, float]:
    """Return the shares of the best and of the worst rows, without the query itself, that are found."""
    shares = []
    for side, sign in enumerate((1, -1)):
        rows = _search(engine, sign * queries, _candidates(_K, len(searched)), searched)
        query_shares = []
        for query, row in enumerate(held_out.tolist()):
            right = [r for r in exact[query][side].ranked()[0].tolist() if r != row][:_K]
            query_shares.append(len(set(right) & set(rows[query].tolist())) / len(right) if right else 1.0)
        shares.append(float(np.mean(query_shares)))
    return shares[0], shares[1]


def _candidates(k: int, rows: int) -> int:
    """Return the number of rows that FAISS is asked for, to find the best k by scores from the stored rows."""
    return min(max(4 * k, _LEAST_CANDIDATES), rows)


def _search(engine: Any, queries: np.ndarray, k: int, searched: Bool[np.ndarray, " rows"]) -> Int64[np.ndarray, "queries k"]:
    """Return the rows that FAISS finds for each query; -1 for none.

    Raises:
        UsageError: an index of this kind takes no selection of rows, and most are left out.
    """
    import faiss

    if searched.all():
        return np.asarray(engine.search(np.ascontiguousarray(queries, np.float32), k)[1])
    bits = np.packbits(searched, bitorder="little")
    selector = faiss.IDSelectorBitmap(len(searched), faiss.swig_ptr(bits))
    vectors = np.ascontiguousarray(queries, np.float32)
    try:
        return np.asarray(engine.search(vectors, k, params=_with_selector(engine, selector))[1])
    except (RuntimeError, TypeError) as error:
        if 2 * searched.sum() < len(searched):
            raise UsageError(
                f"FAISS selects no rows in an index of this kind ({type(engine).__name__}), and most do not match the filter; search by a "
                "scan, or make an index of another kind (IVF, HNSW, Flat)"
            ) from error
    rows = np.asarray(engine.search(vectors, min(4 * k, len(searched)))[1])  # few are left out, and are removed here
    return np.where((rows >= 0) & searched[rows], rows, -1)


def _with_selector(engine: Any, selector: Any) -> Any:
    """Return the parameters of a search with a selector, which take the place of the index's own."""
    faiss: Any = importlib.import_module("faiss")  # whose stubs lack most of these

    if isinstance(engine, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_with_selector(faiss.downcast_index(engine.index), selector))
    if isinstance(engine, faiss.IndexRefine):
        base = _with_selector(faiss.downcast_index(engine.base_index), selector)
        return faiss.IndexRefineSearchParameters(k_factor=engine.k_factor, base_index_params=base)
    if isinstance(engine, faiss.IndexIVFRaBitQ):
        return faiss.IVFRaBitQSearchParameters(sel=selector, nprobe=engine.nprobe, qb=engine.qb)
    if isinstance(engine, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=engine.nprobe)
    if isinstance(engine, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=engine.hnsw.efSearch)
    return faiss.SearchParameters(sel=selector)


def read_record(index: Index, component: str) -> FaissRecord:
    """Read what the FAISS index of a component is.

    Raises:
        NotFoundError: there is none.
        IncompatibleError: it is of other rows, or of another version.
        IntegrityError: it is damaged.
    """
    path = index.path / _FOLDER / f"{component}.json"
    if not path.exists() and not path.is_symlink():
        raise NotFoundError(f'{component} of {index.path} has no FAISS index; make one, such as with wherefrom reindex --faiss "HNSW32"')
    try:
        record = FaissRecord.model_validate_json(read_bytes(path))
    except (ValidationError, OSError) as error:
        if isinstance(error, ValidationError) and error.errors()[0]["loc"] == ("format",):
            raise IncompatibleError(f"{path} is not of this version ({_FORMAT}); {_REMEDY}") from error
        raise IntegrityError(f"{path} is damaged ({first_line(error)}); {_REMEDY}") from error
    if record.component != component or not record.file.path.startswith(f"{_FOLDER}/"):
        raise IntegrityError(f"{path} is damaged (it names another component or folder); {_REMEDY}")
    if record.source != _source(index) or record.rows != len(index):
        raise IncompatibleError(f"{path} is of other rows than the index has now; {_REMEDY}")
    return record


def faiss_problems(index: Index) -> Iterator[tuple[str, str | None]]:
    """Check the files of FAISS indexes: yield (relative path, problem or None) as `Index.verify` does."""
    for component in index.manifest.components:
        if (index.path / _FOLDER / f"{component.name}.json").exists():
            try:
                record = read_record(index, component.name)
                yield record.file.path, file_problem(index.path, record.file)
            except (IncompatibleError, IntegrityError) as error:
                yield f"{_FOLDER}/{component.name}.json", str(error)


@lru_cache(2)
def _engine(directory: Path, record: FaissRecord, stored: int) -> Any:
    """Compare the file of a record with its checksum, and read it."""
    import faiss

    problem = file_problem(directory, record.file)
    if problem:
        raise IntegrityError(f"{problem}; {_REMEDY}")
    path = directory / record.file.path
    faiss.set_deserialization_vector_byte_limit(max(record.file.bytes, 1))
    faiss.set_deserialization_loop_limit(_MOST_LOOPS)
    try:
        engine = faiss.read_index(str(fetched(path)))
    except RuntimeError as error:
        raise IntegrityError(f"{path} is not an index that FAISS reads ({first_line(error)}); {_REMEDY}") from error
    if engine.ntotal != record.rows or engine.d != stored:
        raise IntegrityError(f"{path} has {engine.ntotal:,} vectors of {engine.d} coordinates, not those of the index; {_REMEDY}")
    set_parameters(engine, record.parameters)
    return engine


def find_candidates(
    index: Index, component: DenseComponent, queries: Float32[np.ndarray, "queries stored"], k: int, searched: Bool[np.ndarray, " rows"]
) -> tuple[list[Int64[np.ndarray, " found"]], FaissRecord]:
    """Search the FAISS index of a component for the best and the worst rows.

    Args:
        queries: prepared, so that their inner products with rows are scores.
        k: number of best and of worst rows to score again for; more are returned.

    Returns:
        For each query, the rows that were found, ascending; and what the FAISS index is.

    Raises:
        NotFoundError, IncompatibleError, IntegrityError: see `read_record`, or the file is damaged.
        UsageError: rows are left out, and FAISS cannot do that with this index.
    """
    record = read_record(index, component.name)
    engine = _engine(index.path.resolve(), record, component.stored)
    count = _candidates(k, len(index))
    best, worst = (_search(engine, sign * queries, count, searched) for sign in (1, -1))
    rows = [np.unique(np.concatenate([b, w])) for b, w in zip(best, worst, strict=True)]
    return [candidate_rows[(candidate_rows >= 0) & (candidate_rows < len(index))] for candidate_rows in rows], record
