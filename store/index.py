"""A snapshot of an index: the newest manifest, and its shards, documents and encoder, which are opened on first use."""

import contextlib
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from hashlib import sha256 as digest
from itertools import compress, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arrays import ArrayFile, ArrayGroup
from .cache import read_cache, write_cache
from .dense import Reduction
from .documents import Columns, Documents, Example
from .errors import IntegrityError, UsageError, WherefromError
from .files import clear_leftovers, exclusive, regular_size, sha256, size_problem, staging_folder
from .kinds import KINDS, SearchArrays
from .manifest import Component, DenseComponent, FileRecord, SparseComponent, identity, manifest_numbers, read_manifest
from .objects import StorePath, fetched, local_or_store
from .shapes import Bool, Float16, Float32, Float64, Int64
from .shard import Shard, ShardReader, has_id, read_table, rows_path
from .vectors import Vectors

if TYPE_CHECKING:
    import pyarrow as pa


_OPEN_SHARDS = 1024
_FETCHING_THREADS = 16


@dataclass(frozen=True)
class ShardGroup:
    """Consecutive shards that are searched together: rows `first` to `first + rows` of the index."""

    shards: tuple[Shard, ...]
    first: int
    rows: int

    @cached_property
    def id(self) -> str:
        """The name of the group's search cache. It depends only on the ids of the shards."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "".join(shard.id for shard in self.shards)))

    @cached_property
    def source(self) -> str:
        """A hash of the checksums of the shards' files. A search cache is valid only for the files that it was computed from."""
        return digest("".join(shard.sha256 + shard.documents_sha256 for shard in self.shards).encode()).hexdigest()


class ColumnType(NamedTuple):
    """Arrow type and kinds of values of a column.

    Attributes:
        type: the Arrow type; text if shards differ in the type or store the values as JSON.
        kinds: the kinds of its values (see filters.py).
    """

    type: "pa.DataType"
    kinds: frozenset[str]


def merge_column_types(parts: Iterable[Mapping[str, ColumnType]]) -> dict[str, ColumnType]:
    """Return the columns of several shards together."""
    import pyarrow as pa

    merged: dict[str, ColumnType] = {"text": ColumnType(pa.string(), frozenset(("text",)))}
    for types in parts:
        for name, column in types.items():
            before = merged.get(name, column)
            either = before.type if column.type in (before.type, pa.null()) else pa.string()
            merged[name] = ColumnType(column.type if pa.types.is_null(before.type) else either, before.kinds | column.kinds)
    return merged


class Index:
    """A read-only snapshot of an index. Manifests that are published later do not change it.

    Args:
        path: the index directory.
        number: of the manifest; the newest by default.

    Raises:
        NotFoundError, IncompatibleError, IntegrityError: see `read_manifest`.
    """

    def __init__(self, path: str | Path, number: int | None = None) -> None:
        if not str(path):
            raise UsageError("the path of the index is empty; give the directory of an index")
        self.path = path if isinstance(path, Path) else local_or_store(path)
        self.manifest = read_manifest(self.path, number)
        self.identity = identity(self.path / "manifests" / f"{self.manifest.number:06d}.json")
        self._compare(self.manifest.table)
        table = ArrayFile(self.path / self.manifest.table.path)
        m = self.manifest
        self.shards, self.deleted = read_table(table, m.shards, len(m.components), m.rows)
        if len(self.deleted) != m.deleted:
            raise IntegrityError(f"{table.path} does not list the deleted rows of the manifest; restore it or build the index again")
        self._firsts = np.array([shard.first for shard in self.shards])
        self._lock = threading.Lock()  # of the readers
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()
        self._cache_files: dict[str, ArrayFile | None] = {}
        self._caches: dict[tuple[str, str], SearchArrays | None] = {}
        self._scales: dict[tuple[str, str], Float32[np.ndarray, " rows"] | None] = {}

    @property
    def threads(self) -> int | None:
        """The number of threads of a search: many if they wait for an object store; None for one for each core."""
        return _FETCHING_THREADS if isinstance(self.path, StorePath) else None

    @cached_property
    def checksum(self) -> str:
        """A hash of the manifest, which tells states of indexes apart on any machine."""
        return digest(self.manifest.model_dump_json().encode()).hexdigest()

    def __repr__(self) -> str:
        components = ", ".join(component.name for component in self.manifest.components)
        return f"Index({str(self.path)!r}, {len(self):,} rows of {components})"

    def __len__(self) -> int:
        """Return the number of rows, deleted rows included."""
        return self.manifest.rows

    def component(self, name: str) -> Component:
        """Return the manifest's description of a component."""
        return next(c for c in self.manifest.components if c.name == name)

    def reader(self, shard: Shard) -> ShardReader:
        """Return the reader of a shard. The least recently used readers are closed."""
        with self._lock:
            if shard.id not in self._readers:
                self._readers[shard.id] = ShardReader(self.path, shard, self.manifest.components)
                while len(self._readers) > _OPEN_SHARDS:
                    self._readers.popitem(last=False)
            self._readers.move_to_end(shard.id)
            return self._readers[shard.id]

    def rows(self, shard: Shard, component: Component) -> Any:
        """Return a component's rows in one shard: `DenseRows` or `SparseRows`."""
        return self.reader(shard).rows(component.name)

    def losses(self, shard: Shard) -> Float32[np.ndarray, " rows"]:
        """Return the losses of a shard's examples under the (last) model, in nats."""
        return self.reader(shard).losses

    def group_losses(self, group: ShardGroup) -> Float32[np.ndarray, " rows"]:
        """Return the losses of a group's examples; see `losses`."""
        cached = self._cached_scales(group, "losses")
        return self._computed_scales(group)["losses"] if cached is None else cached

    def group_norms(self, group: ShardGroup, component: Component) -> Float32[np.ndarray, " rows"]:
        """Return the lengths of a group's rows in a component."""
        cached = self._cached_scales(group, component.name)
        return self._computed_scales(group)[component.name] if cached is None else cached

    def _computed_scales(self, group: ShardGroup) -> dict[str, np.ndarray]:
        """Return the losses of a group's examples and the lengths of its rows in each component."""
        losses = np.concatenate([self.losses(shard) for shard in group.shards])
        components = self.manifest.components
        return {"losses": losses} | {c.name: np.concatenate([self.rows(s, c).norms for s in group.shards]) for c in components}

    def _scale_names(self) -> list[str]:
        return ["losses", *(component.name for component in self.manifest.components)]

    def _cached_scales(self, group: ShardGroup, name: str) -> Float32[np.ndarray, " rows"] | None:
        """Return numbers of a group's rows from its search cache; None if they are missing or damaged."""
        key = (group.id, name)
        if key not in self._scales:
            file = self._cache_file(group)
            self._scales[key] = None
            if file is not None:
                with contextlib.suppress(IntegrityError):
                    self._scales[key] = file.paged(f"scales/{name}", (group.rows,), "float32").whole()
        return self._scales[key]

    def hidden(self, shard: Shard) -> Float16[np.ndarray, "rows width"] | None:
        """Return the examples' mean last hidden states under the (last) model; None if the build did not store them."""
        return self.reader(shard).hidden

    def documents(self, shard: Shard) -> Documents:
        """Return the examples of a shard."""
        return self.reader(shard).documents

    @cached_property
    def groups(self) -> tuple[ShardGroup, ...]:
        """All shards, in groups of at most `group_rows` rows if no shard is larger; by default, their scores fit a core's cache."""
        groups: list[list[Shard]] = []
        for shard in self.shards:
            if groups and shard.first + shard.rows - groups[-1][0].first <= self.manifest.group_rows:
                groups[-1].append(shard)
            else:
                groups.append([shard])
        return tuple(ShardGroup(tuple(g), g[0].first, g[-1].first + g[-1].rows - g[0].first) for g in groups)

    def search_arrays(self, group: ShardGroup, component: Component) -> Any:
        """Return the posting lists or scan codes of a component in a group: from the search cache, or else computed from the rows.

        None if the component has none, or if the search cache lacks scan codes, which take longer to compute than an exact scan.
        """
        key = (group.id, component.name)
        if not component.has_search_arrays:
            return None
        if key not in self._caches:
            cached = self._read_cached(group, component)
            if cached is None and KINDS[component.kind].search_arrays.computed_when_missing:
                cached = self._computed(group, component)
            self._caches[key] = cached
        return self._caches[key]

    def reindex(self, compare: bool = False) -> int:
        """Write the search caches that are missing, damaged or of other rows, and remove those of groups that no longer exist.

        The caller holds the index's lock (see `files.exclusive`).

        Args:
            compare: also recompute the readable search caches, and write those that differ.

        Returns:
            The number of files that were written.
        """
        written = sum(self.write_search_cache(number, compare) for number in range(len(self.groups)))
        names = {self._cache_path(group).name for group in self.groups}
        for path in (self.path / "search").glob("*.zarr.zip"):
            if path.name not in names and has_id(path) and regular_size(path) is not None:
                path.unlink()
        self._cache_files.clear()
        self._caches.clear()
        self._scales.clear()
        clear_leftovers(self.path)
        return written

    def write_search_cache(self, number: int, compare: bool = False) -> bool:
        """Write the search cache of a group of shards if it is missing, damaged or of other rows; return True if it was.

        Args:
            compare: see `reindex`.
        """
        group = self.groups[number]
        self._cache_files.pop(group.id, None)
        for name in self._scale_names():
            self._scales.pop((group.id, name), None)
        if self._cache_problem(group, compare) is None:
            return False
        write_cache(self._cache_path(group), group.source, self._cache_groups(group), staging_folder(self.path))
        return True

    def _cache_problem(self, group: ShardGroup, compare: bool) -> str | None:
        """Return the problem of a group's search cache; None if there is no problem."""
        file = self._cache_file(group)
        if file is None:
            return "is missing or cannot be read"
        try:
            for component in self._cached_components():
                cached = self._read_cached(group, component)
                if cached is None or (compare and not _equal(cached, self._computed(group, component))):
                    return "does not match the rows"
            computed = self._computed_scales(group) if compare else {}
            for name in self._scale_names():
                known = self._cached_scales(group, name)
                if known is None or not np.array_equal(known, computed.get(name, known), equal_nan=True):
                    return "does not match the rows"
            for number, shard in enumerate(group.shards):
                if compare and _column_bytes(file, number) != self.documents(shard).columns.to_bytes():
                    return "does not match the documents"
        except IntegrityError:
            return "is damaged"
        return None

    def _cache_groups(self, group: ShardGroup) -> dict[str, ArrayGroup]:
        arrays = {component.name: self._computed(group, component).arrays() for component in self._cached_components()}
        columns = {
            str(number): np.frombuffer(self.documents(shard).columns.to_bytes(), np.uint8) for number, shard in enumerate(group.shards)
        }
        scales = self._computed_scales(group)
        return {**arrays, "columns": ArrayGroup(columns), "scales": ArrayGroup(scales, paged=frozenset(scales))}

    def _cached_components(self) -> list[Component]:
        """Return the components that have arrays in a search cache."""
        return [component for component in self.manifest.components if component.has_search_arrays]

    def _cache_path(self, group: ShardGroup) -> Path:
        return self.path / "search" / f"{group.id}.zarr.zip"

    def _cache_file(self, group: ShardGroup) -> ArrayFile | None:
        if group.id not in self._cache_files:
            self._cache_files[group.id] = read_cache(self._cache_path(group), group.source)
        return self._cache_files[group.id]

    def _read_cached(self, group: ShardGroup, component: Component) -> SearchArrays | None:
        file = self._cache_file(group)
        return None if file is None else KINDS[component.kind].search_arrays.read(file, component, group.rows)

    def _computed(self, group: ShardGroup, component: Component) -> SearchArrays:
        """Compute a component's posting lists or scan codes from the rows."""
        shards = [self.rows(shard, component) for shard in group.shards]
        return KINDS[component.kind].search_arrays.of(shards, component)

    def by_shard(
        self, rows: Int64[np.ndarray, " rows"]
    ) -> Iterator[tuple[ShardGroup, Shard, Int64[np.ndarray, " shard_rows"], Int64[np.ndarray, " shard_rows"]]]:
        """Yield, for each shard that holds some of the rows: group, shard, positions in `rows`, and row numbers within the shard."""
        numbers_of_rows = np.searchsorted(self._firsts, rows, side="right") - 1
        order = np.argsort(numbers_of_rows, kind="stable")
        numbers, starts = np.unique(numbers_of_rows[order], return_index=True)
        for number, positions in zip(numbers.tolist(), np.split(order, starts)[1:], strict=True):
            shard = self.shards[number]
            yield self._groups_of_shards[number], shard, positions, rows[positions] - shard.first

    @cached_property
    def _groups_of_shards(self) -> list[ShardGroup]:
        return [group for group in self.groups for _ in group.shards]

    def norms(self, component: Component) -> Float32[np.ndarray, " rows"]:
        """Return the lengths of a component's rows."""
        return np.concatenate([self.group_norms(group, component) for group in self.groups])

    def vectors(self, row: int, component: Component) -> Vectors:
        """Return one row of a component in the encoder's coordinates, as far as the stored codes give it."""
        shard, offset = self.locate(row)
        return self.rows(shard, component).vectors(offset, self.arrays if component.reduced else {})

    def reduction(self, component: DenseComponent) -> Reduction:
        """Return the map from a dense component's whitened rows to the stored coordinates."""
        return Reduction.of(component, self.arrays if component.reduced else {})

    def example(self, row: int) -> Example:
        """Return the example of a row.

        Raises:
            UsageError: there is no such row, or it was deleted.
        """
        shard, offset = self.locate(row)
        return self.documents(shard)[offset]

    def examples(self, rows: Sequence[int]) -> list[Example]:
        """Return the examples of some rows; see `example`."""
        if self.threads is None or len(rows) < 2:
            return [self.example(row) for row in rows]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self.example, rows))

    def _columns_by_shard(self, names: Iterable[str] = (), groups: Sequence[ShardGroup] | None = None) -> Iterator[tuple[Shard, Columns]]:
        """Yield each shard and its columns, from the search caches, or from the documents if a cache lacks them or texts are needed.

        Args:
            groups: of shards; all by default.
        """
        with_texts = "text" in names
        for group in self.groups if groups is None else groups:
            file = None if with_texts else self._cache_file(group)
            for number, shard in enumerate(group.shards):
                yield shard, self._cached_columns(file, number, shard) or self.documents(shard).columns

    def _cached_columns(self, file: ArrayFile | None, number: int, shard: Shard) -> Columns | None:
        import pyarrow as pa

        try:
            content = None if file is None else _column_bytes(file, number)
            return None if content is None else Columns.from_bytes(pa.py_buffer(content), shard.rows)
        except (IntegrityError, pa.ArrowException, ValueError, KeyError, TypeError, EOFError):
            return None

    @cached_property
    def columns(self) -> "dict[str, pa.DataType]":
        """Columns for filters and groups, with their Arrow types; text if shards differ in the type or store the values as JSON."""
        return {name: type_ for name, (type_, _) in self._column_types.items()}

    @cached_property
    def _column_types(self) -> dict[str, ColumnType]:
        return self.column_types()

    def column_types(self, groups: Sequence[ShardGroup] | None = None) -> dict[str, ColumnType]:
        """Return the columns of some groups of shards; of all by default."""
        return merge_column_types(
            {name: ColumnType(field.type, frozenset(filter(None, [columns.kind(name)]))) for name, field in columns.fields.items()}
            for _, columns in self._columns_by_shard(groups=groups)
        )

    def matching(
        self, expression: str, groups: Sequence[ShardGroup] | None = None, types: Mapping[str, ColumnType] | None = None
    ) -> Bool[np.ndarray, " rows"]:
        """Return a mask of the rows that a filter matches (see filters.py).

        Args:
            groups: the groups of shards whose rows are meant; all by default.
            types: the columns of all shards; by default they are read.

        Raises:
            UsageError: no such column, or values that cannot be compared.
        """
        from .filters import matching, names_in, parse_filter

        tree = parse_filter(expression)
        names = names_in(tree)
        kinds = {name: kinds for name, (_, kinds) in (self._column_types if types is None else types).items()}
        masks = list[np.ndarray]()
        for shard, columns in self._columns_by_shard(names, groups):
            filtered = {name: columns[name] for name in names if name in columns.fields}
            masks.append(matching(tree, filtered, kinds, shard.rows))
        return np.concatenate(masks)

    def column(self, name: str) -> "pa.ChunkedArray":
        """Return one column of all rows.

        Raises:
            UsageError: there is no such column, or its values are of several types.
        """
        import pyarrow as pa

        _check_column(name, self._column_types)
        chunks = list[Any]()
        kind = self.columns[name]
        for shard, columns in self._columns_by_shard([name]):
            column = columns[name] if name in columns.fields else None
            if column is not None and (column.encoded or column.values.type not in (kind, pa.null())):
                raise UsageError(f"the column {name!r} holds values of several types; give them one type and build the index again")
            chunks += [pa.nulls(shard.rows, kind)] if column is None or column.kind is None else column.values.chunks
        return pa.chunked_array(chunks, kind)

    def distinct(
        self, name: str, most: int, groups: Sequence[ShardGroup] | None = None, types: Mapping[str, ColumnType] | None = None
    ) -> tuple[Int64[np.ndarray, " rows"], list[Any]]:
        """Return each row's value of a column as a number, and the list of distinct values that these numbers index.

        The last value is None, for rows without a value. Equal numbers of different types are one value; 1, "1" and True are three.

        Args:
            groups, types: see `matching`.

        Raises:
            UsageError: there is no such column, it holds lists or objects, or more than `most` values.
        """
        from .filters import SINGLE_KINDS, kind_of_value

        types = self._column_types if types is None else types
        _check_column(name, types)
        list_kinds = types[name].kinds - set(SINGLE_KINDS)
        if list_kinds:
            raise UsageError(f"the column {name!r} holds values of the kind {min(list_kinds)}; group by one of single values")
        numbers = dict[Any, int]()
        values = list[Any]()
        parts = []
        for shard, columns in self._columns_by_shard([name], groups):
            if name not in columns.fields:
                parts.append(np.full(shard.rows, -1))
                continue
            column = columns[name]
            coded = column.values.combine_chunks().dictionary_encode()
            lookup = np.full(len(coded.dictionary) + 1, -1)
            for i, value in enumerate(replace(column, values=coded.dictionary).decoded()):
                if column.encoded and kind_of_value(value) not in SINGLE_KINDS:
                    raise UsageError(f"the column {name!r} holds lists or objects in some rows; group by one of single values")
                number = numbers.setdefault((isinstance(value, bool), value), len(values)) if value is not None else -1
                values += [value] if number == len(values) else []
                lookup[i] = number
            if len(values) > most:
                raise too_many_values(name, most)
            parts.append(lookup[np.asarray(coded.indices.fill_null(len(coded.dictionary)))])
        codes = np.concatenate(parts)
        return np.where(codes < 0, len(values), codes), [*values, None]

    def rows_of(self, ids: Iterable[str]) -> tuple[Bool[np.ndarray, " rows"], list[str]]:
        """Return a mask of the rows whose example or document has one of these ids, and the ids that are not in the index."""
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted = pa.array(dict.fromkeys(ids), pa.string())
        is_present = np.zeros(len(wanted), bool)
        masks = list[np.ndarray]()
        for shard, columns in self._columns_by_shard():
            matches = np.zeros(shard.rows, bool)
            ids_of_rows = columns["id"].values
            documents = columns["document"].values
            for values in (ids_of_rows,) if documents.equals(ids_of_rows) else (ids_of_rows, documents):
                positions = pc.index_in(values, wanted)
                matches |= np.asarray(pc.is_valid(positions))
                is_present[np.asarray(positions.drop_null())] = True
            masks.append(matches)
        return np.concatenate(masks), wanted.filter(pa.array(~is_present)).to_pylist()

    def known_rows(self, ids: Iterable[str], consequence: str) -> Bool[np.ndarray, " rows"]:
        """Return the mask of `rows_of`.

        Args:
            consequence: what the error says besides.

        Raises:
            UsageError: an id is not in the index.
        """
        mask, unknown = self.rows_of(ids)
        if unknown:
            raise UsageError(f"{len(unknown)} of the ids are not in {self.path}, such as {min(unknown)[:100]!r}; {consequence}")
        return mask

    def first_known_id(self, ids: Iterable[str]) -> str | None:
        """Return one of these ids that an example of the index has, which is not deleted; None if none has."""
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted = pa.array(dict.fromkeys(ids), pa.string())
        for shard, columns in self._columns_by_shard():
            positions = pc.index_in(columns["id"].values, wanted)
            matches = np.flatnonzero(np.asarray(pc.is_valid(positions)) & self.alive_between(shard.first, shard.first + shard.rows))
            if len(matches):
                return str(wanted[positions[int(matches[0])].as_py()].as_py())
        return None

    @cached_property
    def alive(self) -> Bool[np.ndarray, " rows"]:
        """A mask of the rows that are not deleted; see `alive_rows`."""
        return self.alive_rows(self.groups)

    def alive_rows(self, groups: Sequence[ShardGroup]) -> Bool[np.ndarray, " rows"]:
        """Return a mask of the rows of consecutive groups of shards that are not deleted.

        Raises:
            IntegrityError: a shard's file of rows is missing or has another size than recorded.
        """
        for group in groups:
            for shard in group.shards:  # before memory is allocated for so many rows
                problem = size_problem(rows_path(self.path, shard.id), shard.bytes)
                if problem:
                    raise IntegrityError(f"{problem}; restore the file or build the index again")
        return self.alive_between(groups[0].first, groups[-1].first + groups[-1].rows)

    def alive_between(self, first: int, last: int) -> Bool[np.ndarray, " rows"]:
        """Return a mask of the rows `first` to `last` (not included) that are not deleted."""
        alive = np.ones(last - first, bool)
        alive[self.deleted[slice(*np.searchsorted(self.deleted, [first, last]))] - first] = False
        return alive

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The encoder's arrays, by name (docs/format.md lists them).

        Raises:
            IntegrityError: the file is missing, was changed, or does not have the arrays that the components need.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        self._compare(self.manifest.encoder)
        path = self.path / self.manifest.encoder.path
        try:
            arrays = load_file(fetched(path))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} is not a whole safetensors file ({error}); restore it or build the index again") from error
        for component in self.manifest.components:
            problem = array_problem(component, arrays)
            if problem:
                raise IntegrityError(f"{path} does not fit the index: {problem}; restore it or build the index again")
        return arrays

    def spectrum(self, component: DenseComponent) -> tuple[Float64[np.ndarray, " dim"], Float64[np.ndarray, " dim"]]:
        """Return a component's eigenvalues, and for each the mean eigenvalue of its layer, to which damping is relative.

        Raises:
            UsageError: the component has no curvature to damp.
        """
        values = []
        means = []
        for layer in component.layers:
            if layer.curvature == "identity":
                raise UsageError(
                    "this index was built without curvature (identity) and has no eigenvalues; leave out `damping` and `training`"
                )
            eigenvalues = self.arrays[f"{component.name}/{layer.name}/eigenvalues"].astype(np.float64)
            values.append(eigenvalues)
            means.append(np.full(layer.size, eigenvalues.mean()))
        return np.concatenate(values), np.concatenate(means)

    def sparse_spectrum(self, component: SparseComponent) -> tuple[Float64[np.ndarray, " vocabulary"], Float64[np.ndarray, " width"]]:
        """Return the two factors of a sparse component's eigenvalues: of the vocabulary's tokens, and of the width."""
        return self.arrays[f"{component.name}/vocabulary"], self.arrays[f"{component.name}/eigenvalues"]

    @property
    def bytes_per_example(self) -> float:
        """The mean number of bytes that a row takes on disk, without its document."""
        return sum(shard.bytes for shard in self.shards) / len(self)

    def summary(self) -> dict[str, Any]:
        """Return a description of the index for JSON: models, rows, bytes, and each component's layers, projection and curvature."""
        m = self.manifest
        row_bytes = sum(shard.bytes for shard in self.shards)
        component_bytes = np.sum([shard.component_bytes for shard in self.shards], axis=0).tolist()
        documents_bytes = sum(shard.documents_bytes for shard in self.shards)
        return {
            "path": str(self.path),
            "manifest": m.number,
            "format": m.version,
            "created": m.created,
            "wherefrom": m.wherefrom,
            "models": [{n: getattr(model, n) for n in ("id", "revision", "architecture", "parameters", "dtype")} for model in m.models],
            "rows": m.rows,
            "deleted": m.deleted,
            "tokens": m.tokens,
            **{name: getattr(m.build, name) for name in ("documents", "split", "truncated", "skipped", "not_finite")},
            "shards": m.shards,
            "bytes": row_bytes + documents_bytes + m.encoder.bytes,
            "slope": None if m.slope is None else m.slope.model_dump(),
            "bytes_per_example": round(self.bytes_per_example, 1),
            "encoder_bytes": m.encoder.bytes,
            "components": [
                s.describe()
                | {"bytes_per_example": round(component_bytes[i] / m.rows, 1), "energy_held": round(self.energy_held(s), 4)}
                | m.build.calibration.get(s.name, {})
                for i, s in enumerate(m.components)
            ],
            "tracked": [
                {"parameters": t.parameters, "of": t.of, "share": round(t.share, 4), "left_out": t.left_out} for t in m.build.tracked
            ],
            "notes": list(m.build.notes),
            "unread": m.build.unread.model_dump(mode="json"),
            "left_out_columns": m.build.left_out_columns,
            "added": [{"rows": addition.rows, "drift": addition.drift} for addition in m.build.added],
        }

    def energy_held(self, component: Component) -> float:
        """Return the share of the rows' squared length that remains after tokens or coordinates were left out, before coding.

        For a sparse component it is measured; for a dense one it is computed from the eigenvalues.
        """
        number = self.manifest.components.index(component)
        sums = np.sum([shard.energy[number] for shard in self.shards], axis=0)
        share = float(sums[0] / sums[1]) if sums[1] > 0 else 1.0
        selection = self.arrays.get(f"{component.name}/kept") if component.reduced else None
        if selection is None:
            return share
        eigenvalues, means = self.spectrum(component)  # type: ignore[arg-type]  # only dense components have a selection
        energy = eigenvalues / (eigenvalues + component.curvature.damping * means)
        return share * float(energy[selection].sum() / energy.sum())

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Check all files of the index: compare checksums, recompute the search caches, and yield (relative path, problem or None)."""
        yield self.manifest.encoder.path, file_problem(self.path, self.manifest.encoder)
        yield self.manifest.table.path, file_problem(self.path, self.manifest.table)
        intact = True
        for shard in self.shards:
            problems = [(record.path, file_problem(self.path, record)) for record in shard.files()]
            rows = problems[0][0]
            yield from problems
            if any(problem for _, problem in problems):
                intact = False
                continue
            try:
                reader = ShardReader(self.path, shard, self.manifest.components)
                reader.check()
                energies = [reader.rows(component.name).energy for component in self.manifest.components]
                if not np.allclose(energies, shard.energy, rtol=1e-9, atol=0):
                    raise IntegrityError(f"{self.path / rows} has another energy than the table of shards records; build the index again")
            except IntegrityError as error:
                intact = False
                yield rows, str(error)
        if intact and (duplicate := self._duplicate_id()) is not None:
            yield "documents", f"{self.path / 'documents'} has the duplicate id {duplicate[:80]!r}; build the index again"
        try:
            self.arrays  # noqa: B018
        except IntegrityError as error:
            yield self.manifest.encoder.path, str(error)
        for group in self.groups if intact else ():
            path = self._cache_path(group)
            if path.exists():
                problem = self._cache_problem(group, compare=True)
                yield str(path.relative_to(self.path)), f"{path} {problem}; fix it with wherefrom reindex" if problem else None
        yield from self._missing_manifests()

    def _duplicate_id(self) -> str | None:
        """Return an id that two rows have, deleted rows aside; None if there is none."""
        hashes = np.concatenate([np.fromiter(map(hash, ids), np.int64) for ids in self._living_ids()])
        values, counts = np.unique(hashes, return_counts=True)
        suspects = set(values[counts > 1].tolist())
        seen = set[str]()
        for ids in self._living_ids() if suspects else ():
            for id in ids:
                if hash(id) in suspects:
                    if id in seen:
                        return id
                    seen.add(id)
        return None

    def _living_ids(self) -> Iterator[list[str]]:
        """Yield the ids of each shard's rows that are not deleted."""
        for shard in self.shards:
            ids = ShardReader(self.path, shard, self.manifest.components).documents.ids()
            yield list(compress(ids, self.alive_between(shard.first, shard.first + shard.rows).tolist()))

    def _missing_manifests(self) -> Iterator[tuple[str, str | None]]:
        """Yield missing manifests between existing ones (pruning removes all but the newest), and a missing record of the newest number."""
        latest = self.path / "manifests" / "latest"
        if not latest.is_file():
            yield "manifests/latest", f"{latest} is missing, without which a lost newest manifest goes unnoticed; the next change writes it"
        numbers = manifest_numbers(self.path)
        for before, after in pairwise(numbers):
            if after > before + 1:
                place = f"manifests/{before + 1:06d}.json"
                yield place, f"{self.path / place} is missing between manifests {before} and {after}; the newest is not affected"

    def _compare(self, record: FileRecord) -> None:
        problem = file_problem(self.path, record)
        if problem:
            raise IntegrityError(problem)

    def locate(self, row: int) -> tuple[Shard, int]:
        """Return the shard that holds a row, and the row's position in the shard.

        Raises:
            UsageError: there is no such row, or it was deleted.
        """
        if not 0 <= row < len(self):
            raise UsageError(f"row {row} is not in the index; name one of the rows 0 to {len(self) - 1}")
        place = int(np.searchsorted(self.deleted, row))
        if place < len(self.deleted) and self.deleted[place] == row:
            raise UsageError(f"row {row} was deleted; name another row")
        shard = self.shards[int(np.searchsorted(self._firsts, row, side="right")) - 1]
        return shard, row - shard.first


def _check_column(name: str, types: Mapping[str, ColumnType]) -> None:
    """Refuse a column that does not exist."""
    if name not in types:
        raise UsageError(f"there is no column {name!r}; this index has {', '.join(sorted(types))}")


def too_many_values(name: str, most: int) -> UsageError:
    """Return the error about a column with more than `most` values."""
    return UsageError(f"the column {name!r} has more than {most:,} values; group by one with fewer")


@contextlib.contextmanager
def changing(path: Path) -> Iterator[Index]:
    """Open an index whose lock is held meanwhile, so that no other process changes it.

    Raises:
        BusyError: another process holds the lock.
        NotFoundError, IncompatibleError, IntegrityError: see `Index`.
    """
    Index(path)  # the lock of what is not an index would be a new directory
    with exclusive(path):
        yield Index(path)


def write_search_caches(path: Path) -> str | None:
    """Write the missing search caches of an index; returns a sentence if it fails, since each search can compute them."""
    try:
        Index(path).reindex()
    except OSError as error:
        reason = str(error) if isinstance(error, WherefromError) else error.strerror or str(error)
        return f"the posting lists and codes next to the rows could not be written ({reason}); run wherefrom reindex {path}"
    return None


def _equal(a: SearchArrays, b: SearchArrays) -> bool:
    """Return True if all arrays of two posting lists or scan codes are equal."""
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.compare)


def _column_bytes(file: ArrayFile, number: int) -> bytes:
    name = f"columns/{number}"
    return file.array(name, file.shape(name), "uint8").tobytes()


def array_problem(component: Component, arrays: Mapping[str, np.ndarray]) -> str | None:
    """Return the problem of a component's arrays in the encoder, such as a missing array or a wrong shape; None if there is none."""
    for name, (shape, required) in component.encoder_arrays().items():
        array = arrays.get(f"{component.name}/{name}")
        if array is None and required:
            return f"{component.name}/{name} is missing"
        if array is not None and (array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all()):
            return f"{component.name}/{name} is not of {' x '.join(map(str, shape))} finite numbers"
        if array is not None and name.endswith(("eigenvalues", "vocabulary")) and array.min(initial=0) < 0:
            return f"{component.name}/{name} has numbers below 0"
    selection = arrays.get(f"{component.name}/kept")
    if selection is not None:
        ordered = selection.dtype == np.int64 and selection.ndim == 1 and len(selection) and (np.diff(selection) > 0).all()
        if not (ordered and selection[0] >= 0 and selection[-1] < component.dim):
            return f"{component.name}/kept is not an ascending list of coordinates"
    return None


def file_problem(directory: Path, record: FileRecord) -> str | None:
    """Return the problem of a file of an index by its size and SHA-256; None if there is none."""
    path = directory / record.path
    problem = size_problem(path, record.bytes)
    if problem is None and sha256(path) != record.sha256:
        problem = f"{path} is not the file that was written (its SHA-256 differs)"
    return problem and f"{problem}; restore the file or build the index again"
