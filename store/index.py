"""An index as one snapshot: the newest manifest and, opened when needed, the shards, documents and encoder that it names."""

import re
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from hashlib import sha256 as digest
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from jaxtyping import Bool, Float16, Float32, Float64, Int64

from .arrays import ArrayFile, ArrayGroup
from .cache import read_cache, write_cache
from .dense import DenseRows, Reduction
from .documents import Columns, Documents, Example
from .errors import IntegrityError, UsageError
from .files import clear_leftovers, regular_size, sha256
from .manifest import DenseComponent, FileRecord, Layer, SparseComponent, identity, manifest_numbers, read_manifest
from .postings import Postings
from .scan_codes import ScanCodes
from .shard import Shard, ShardReader, documents_path, read_table, rows_path
from .sparse import SparseRows, SparseVectors

if TYPE_CHECKING:
    import pyarrow as pa


_GROUP_ROWS = 1 << 16
_OPEN_SHARDS = 1024
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Group:
    """Consecutive shards that are searched as one: rows `first` to `first + rows`."""

    shards: tuple[Shard, ...]
    first: int
    rows: int

    @cached_property
    def id(self) -> str:
        """A name that depends on the shards alone."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "".join(shard.id for shard in self.shards)))

    @cached_property
    def source(self) -> str:
        """A name of what the group's search cache is made from: the checksums of its shards' files."""
        return digest("".join(shard.sha256 + shard.documents_sha256 for shard in self.shards).encode()).hexdigest()


class Index:
    """A read-only snapshot; a manifest that is published later does not change it.

    Args:
        path: the index directory.

    Raises:
        NotFoundError, IncompatibleError, IntegrityError: see `read_manifest`.
    """

    def __init__(self, path: str | Path) -> None:
        if not str(path):
            raise UsageError("the index's path is empty; name its directory")
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.identity = identity(self.path / "manifests" / f"{self.manifest.number:06d}.json")
        self._compare([self.manifest.table])
        table = ArrayFile(self.path / self.manifest.table.path)
        m = self.manifest
        self.shards, self.deleted = read_table(table, m.shards, len(m.components), m.rows)
        if len(self.deleted) != m.deleted:
            raise IntegrityError(f"{table.path} does not list the deleted rows; restore it or build the index again")
        self._firsts = np.array([shard.first for shard in self.shards])
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()
        self._cache_files: dict[str, ArrayFile | None] = {}
        self._caches: dict[tuple[str, str], Postings | ScanCodes | None] = {}

    def __repr__(self) -> str:
        components = ", ".join(component.name for component in self.manifest.components)
        return f"Index({str(self.path)!r}, {len(self):,} rows of {components})"

    def __len__(self) -> int:
        """Rows, deleted ones too."""
        return self.manifest.rows

    def _refuse_missing_rows(self) -> None:
        """Refuse shards without their file of rows, before anything is allocated by the table's word alone."""
        for shard in self.shards:
            path = rows_path(self.path, shard.id)
            size = regular_size(path)
            if size != shard.bytes:
                problem = "is missing" if size is None else f"has {size:,} bytes where {shard.bytes:,} belong (truncated?)"
                raise IntegrityError(f"{path} {problem}; restore the file or build the index again")

    def component(self, name: str) -> DenseComponent | SparseComponent:
        """The manifest's entry for a component."""
        return next(c for c in self.manifest.components if c.name == name)

    def reader(self, shard: Shard) -> ShardReader:
        """The reader of a shard; those that were not used for longest are closed."""
        if shard.id not in self._readers:
            self._readers[shard.id] = ShardReader(self.path, shard, self.manifest.components)
            while len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
        self._readers.move_to_end(shard.id)
        return self._readers[shard.id]

    @overload
    def rows(self, shard: Shard, component: DenseComponent) -> DenseRows: ...
    @overload
    def rows(self, shard: Shard, component: SparseComponent) -> SparseRows: ...
    @overload
    def rows(self, shard: Shard, component: DenseComponent | SparseComponent) -> DenseRows | SparseRows: ...
    def rows(self, shard: Shard, component: DenseComponent | SparseComponent) -> DenseRows | SparseRows:
        """A component's rows in one shard."""
        return self.reader(shard).rows(component.name)

    def losses(self, shard: Shard) -> Float32[np.ndarray, " rows"]:
        """The examples' own losses under the (last) model, in nats."""
        return self.reader(shard).losses

    def hidden(self, shard: Shard) -> Float16[np.ndarray, "rows width"] | None:
        """The examples' mean last hidden states under the (last) model; None where the build did not keep them."""
        return self.reader(shard).hidden

    def documents(self, shard: Shard) -> Documents:
        """A shard's examples."""
        return self.reader(shard).documents

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All shards, in groups that are large enough to be searched in one go, small enough for scores to stay in cache."""
        groups: list[list[Shard]] = []
        for shard in self.shards:
            if groups and shard.first + shard.rows - groups[-1][0].first <= _GROUP_ROWS:
                groups[-1].append(shard)
            else:
                groups.append([shard])
        return tuple(Group(tuple(g), g[0].first, g[-1].first + g[-1].rows - g[0].first) for g in groups)

    def postings(self, group: Group, component: SparseComponent) -> Postings:
        """The posting lists of a sparse component's rows in a group: those of the search cache, else made here."""
        key = (group.id, component.name)
        if key not in self._caches:
            self._caches[key] = self._cached(group, component) or self._search_arrays(group, component)
        postings = self._caches[key]
        assert isinstance(postings, Postings)
        return postings

    def scan_codes(self, group: Group, component: DenseComponent) -> ScanCodes | None:
        """The one-bit codes of a dense component's rows in a group; None where the search cache does not hold them.

        Components that hold one-bit codes themselves have none.
        """
        key = (group.id, component.name)
        if key not in self._caches:
            self._caches[key] = self._cached(group, component)
        codes = self._caches[key]
        assert codes is None or isinstance(codes, ScanCodes)
        return codes

    def reindex(self, compare: bool = False) -> int:
        """Write the search caches that are missing, damaged or of other rows, and remove those of groups that are no more. The caller holds
        the index (see `files.exclusive`).

        Args:
            compare: also make anew what seems whole, and write it where it differs.

        Returns:
            How many files were written.
        """
        written = 0
        folder = self.path / "search"
        for group in self.groups:
            self._cache_files.pop(group.id, None)
            if self._cache_problem(group, compare) is not None:
                write_cache(self._cache_path(group), group.source, self._cache_groups(group), self.path / "staging")
                written += 1
        names = {self._cache_path(group).name for group in self.groups}
        for path in folder.glob("*.zarr.zip"):
            if path.name not in names and _UUID.fullmatch(path.name.partition(".")[0]) and regular_size(path) is not None:
                path.unlink()
        self._cache_files.clear()
        self._caches.clear()
        clear_leftovers(self.path)
        return written

    def _cache_problem(self, group: Group, compare: bool) -> str | None:
        """What is wrong with a group's search cache; None where nothing is."""
        file = self._cache_file(group)
        if file is None:
            return "is missing, or cannot be read"
        try:
            for component in self._searched():
                cached = self._cached(group, component)
                if cached is None or (compare and not _equal(cached, self._search_arrays(group, component))):
                    return "is not made of the rows"
            for number, shard in enumerate(group.shards):
                if compare and _column_bytes(file, number) != self.documents(shard).columns.to_bytes():
                    return "is not made of the documents"
        except IntegrityError:
            return "is damaged"
        return None

    def _cache_groups(self, group: Group) -> dict[str, ArrayGroup]:
        arrays = {component.name: self._search_arrays(group, component).arrays() for component in self._searched()}
        columns = {
            str(number): np.frombuffer(self.documents(shard).columns.to_bytes(), np.uint8) for number, shard in enumerate(group.shards)
        }
        return {**arrays, "columns": ArrayGroup(columns)}

    def _searched(self) -> list[DenseComponent | SparseComponent]:
        """The components that have arrays in a search cache."""
        return [c for c in self.manifest.components if isinstance(c, SparseComponent) or c.dtype != "1bit"]

    def _cache_path(self, group: Group) -> Path:
        return self.path / "search" / f"{group.id}.zarr.zip"

    def _cache_file(self, group: Group) -> ArrayFile | None:
        if group.id not in self._cache_files:
            self._cache_files[group.id] = read_cache(self._cache_path(group), group.source)
        return self._cache_files[group.id]

    def _cached(self, group: Group, component: DenseComponent | SparseComponent) -> Postings | ScanCodes | None:
        file = self._cache_file(group)
        if file is None:
            return None
        if isinstance(component, SparseComponent):
            return Postings.read(file, component, group.rows)
        return ScanCodes.read(file, component, group.rows)

    def _search_arrays(self, group: Group, component: DenseComponent | SparseComponent) -> Postings | ScanCodes:
        """The posting lists or scan codes of a component, made from the rows."""
        if isinstance(component, SparseComponent):
            return Postings.of([self.rows(shard, component) for shard in group.shards])
        return ScanCodes.of([self.rows(shard, component) for shard in group.shards], component)

    def by_shard(
        self, rows: Int64[np.ndarray, " chosen"]
    ) -> Iterator[tuple[Group, Shard, Int64[np.ndarray, " own"], Int64[np.ndarray, " own"]]]:
        """The shards that hold some rows: the group and the shard, which of the rows it holds, and where in it each lies."""
        numbers_of_rows = np.searchsorted(self._firsts, rows, side="right") - 1
        order = np.argsort(numbers_of_rows, kind="stable")
        numbers, starts = np.unique(numbers_of_rows[order], return_index=True)
        for number, positions in zip(numbers.tolist(), np.split(order, starts)[1:], strict=True):
            shard = self.shards[number]
            yield self._groups_of_shards[number], shard, positions, rows[positions] - shard.first

    @cached_property
    def _groups_of_shards(self) -> list[Group]:
        return [group for group in self.groups for _ in group.shards]

    def norms(self, component: DenseComponent | SparseComponent) -> Float32[np.ndarray, " rows"]:
        """The lengths of a component's rows."""
        return np.concatenate([self.rows(shard, component).norms for shard in self.shards])

    def row(self, row: int, component: DenseComponent) -> Float32[np.ndarray, " dim"]:
        """One row of a component, whole (with its norm), in the encoder's coordinates: what is left of them in the stored ones."""
        shard, offset = self.locate(row)
        return self.reduction(component).undo(self.rows(shard, component).row(offset)[None])[0]

    def reduction(self, component: DenseComponent) -> Reduction:
        """The step from a component's whitened rows to the stored coordinates."""
        return dense_reduction(component, self.arrays if component.coordinates else {})

    def entries(self, row: int, component: SparseComponent) -> SparseVectors:
        """One row of a sparse component, its vectors estimated from their codes (see `SparseRows.vectors`)."""
        shard, offset = self.locate(row)
        keys, vectors = self.rows(shard, component).vectors(offset)
        return SparseVectors(np.array([0, len(keys)]), keys, vectors)

    def example(self, row: int) -> Example:
        """The example that a row stands for.

        Raises:
            UsageError: the index has no such row.
        """
        shard, offset = self.locate(row)
        return self.documents(shard)[offset]

    def _columns_by_shard(self, names: Iterable[str] = ()) -> Iterator[tuple[Shard, Columns]]:
        """Each shard's columns: those of the search caches, or of the documents where a cache lacks them or a text is asked for."""
        with_texts = "text" in names
        for group in self.groups:
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
        """Columns to filter and group rows by, with their Arrow types: text, where it differs or values are kept as JSON."""
        import pyarrow as pa

        types: dict[str, pa.DataType] = {"text": pa.string()}
        for _, columns in self._columns_by_shard():
            for name, field in columns.fields.items():
                known = types.get(name, field.type)
                types[name] = field.type if pa.types.is_null(known) else known if field.type in (known, pa.null()) else pa.string()
        return types

    @cached_property
    def _kinds(self) -> dict[str, frozenset[str]]:
        """The kinds of values that each column holds anywhere (see filters.py)."""
        kinds: dict[str, set[str]] = {name: set() for name in self.columns}
        kinds["text"] = {"text"}
        for _, columns in self._columns_by_shard():
            for name in columns.fields:
                kinds[name].add(columns.kind(name) or "")
        return {name: frozenset(values - {""}) for name, values in kinds.items()}

    def matching(self, expression: str) -> Bool[np.ndarray, " rows"]:
        """Which rows a filter matches (see filters.py).

        Raises:
            UsageError: no such column, or values that cannot be compared.
        """
        from .filters import matching, names_in, parse_filter

        tree = parse_filter(expression)
        names = names_in(tree)
        parts = list[np.ndarray]()
        for shard, columns in self._columns_by_shard(names):
            named = {name: columns[name] for name in names if name in columns.fields}
            parts.append(matching(tree, named, self._kinds, shard.rows))
        return np.concatenate(parts)

    def column(self, name: str) -> "pa.ChunkedArray":
        """A column of all rows.

        Raises:
            UsageError: there is no such column, or its values are of several types.
        """
        import pyarrow as pa

        self._check_column(name)
        parts, kind = list[Any](), self.columns[name]
        for shard, columns in self._columns_by_shard([name]):
            column = columns[name] if name in columns.fields else None
            if column is not None and (column.encoded or column.values.type not in (kind, pa.null())):
                raise UsageError(f"the column {name!r} holds values of several types; make them alike and build the index again")
            parts += [pa.nulls(shard.rows, kind)] if column is None or column.kind is None else column.values.chunks
        return pa.chunked_array(parts, kind)

    def distinct(self, name: str, most: int) -> tuple[Int64[np.ndarray, " rows"], list[Any]]:
        """The values of a column that differ, and by row which it holds; None, which rows have that lack it, is the last.

        Numbers that are equal are one value, whatever their type; a number, its text and True are three.

        Raises:
            UsageError: there is no such column, it holds lists or objects, or more than `most` values.
        """
        from .filters import SINGLE_KINDS, kind_of_value

        self._check_column(name)
        others = self._kinds[name] - set(SINGLE_KINDS)
        if others:
            raise UsageError(f"the column {name!r} holds values of the kind {min(others)}; group by one of single values")
        places, values, parts = dict[Any, int](), list[Any](), []
        for shard, columns in self._columns_by_shard([name]):
            if name not in columns.fields:
                parts.append(np.full(shard.rows, -1))
                continue
            column = columns[name]
            coded = column.values.combine_chunks().dictionary_encode()
            lookup = np.full(len(coded.dictionary) + 1, -1)
            for at, value in enumerate(replace(column, values=coded.dictionary).decoded()):
                if column.encoded and kind_of_value(value) not in SINGLE_KINDS:
                    raise UsageError(f"the column {name!r} holds lists or objects in some rows; group by one of single values")
                place = places.setdefault((isinstance(value, bool), value), len(values)) if value is not None else -1
                values += [value] if place == len(values) else []
                lookup[at] = place
            if len(values) > most:
                raise UsageError(f"the column {name!r} has more than {most:,} values; group by one with fewer")
            parts.append(lookup[np.asarray(coded.indices.fill_null(len(coded.dictionary)))])
        codes = np.concatenate(parts)
        return np.where(codes < 0, len(values), codes), [*values, None]

    def rows_of(self, ids: Iterable[str]) -> tuple[Bool[np.ndarray, " rows"], list[str]]:
        """Which rows are examples or chunks of documents of these ids, and the ids that are not in the index."""
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted = pa.array(dict.fromkeys(ids), pa.string())
        found, parts = np.zeros(len(wanted), bool), list[np.ndarray]()
        for shard, columns in self._columns_by_shard():
            matches = np.zeros(shard.rows, bool)
            for name in ("id", "document"):
                positions = pc.index_in(columns[name].values, wanted)
                matches |= np.asarray(pc.is_valid(positions))
                found[np.asarray(positions.drop_null())] = True
            parts.append(matches)
        return np.concatenate(parts), [id for id, is_found in zip(wanted.to_pylist(), found.tolist(), strict=True) if not is_found]

    def _check_column(self, name: str) -> None:
        if name not in self.columns:
            raise UsageError(f"there is no column {name!r}; this index has {', '.join(sorted(self.columns))}")

    @cached_property
    def alive(self) -> Bool[np.ndarray, " rows"]:
        """Which rows were not deleted.

        Raises:
            IntegrityError: the files hold fewer rows than the manifest says.
        """
        self._refuse_missing_rows()
        alive = np.ones(self.manifest.rows, bool)
        alive[self.deleted] = False
        return alive

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The encoder's arrays, by name (docs/format.md lists them).

        Raises:
            IntegrityError: the file is missing, not the one that was written, or not what the components need.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        self._compare([self.manifest.encoder])
        path = self.path / self.manifest.encoder.path
        try:
            arrays = load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} is not a whole safetensors file ({error}); restore it or build the index again") from error
        for component in self.manifest.components:
            problem = _misfit(component, arrays)
            if problem:
                raise IntegrityError(f"{path} does not fit the index: {problem}; restore it or build the index again")
        return arrays

    def spectrum(self, component: DenseComponent) -> tuple[Float64[np.ndarray, " dim"], Float64[np.ndarray, " dim"]]:
        """A component's eigenvalues, and beside each the mean eigenvalue of its layer, to which damping is relative.

        Raises:
            UsageError: the component has no curvature to damp.
        """
        values, means = [], []
        for layer in component.layers:
            if layer.curvature == "identity":
                raise UsageError("this index was built with `curvature` identity: there are no eigenvalues to damp")
            eigenvalues = self.arrays[f"{component.name}/{layer.name}/eigenvalues"].astype(np.float64)
            values.append(eigenvalues)
            means.append(np.full(layer.size, eigenvalues.mean()))
        return np.concatenate(values), np.concatenate(means)

    def sparse_spectrum(self, component: SparseComponent) -> tuple[Float64[np.ndarray, " vocabulary"], Float64[np.ndarray, " width"]]:
        """A sparse component's eigenvalues are the products of these two."""
        return self.arrays[f"{component.name}/vocabulary"], self.arrays[f"{component.name}/eigenvalues"]

    def summary(self) -> dict[str, Any]:
        """What the index holds, JSON-ready: model, rows, bytes, and each component's layers, projection and curvature."""
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
            "bytes_per_example": round(row_bytes / m.rows, 1),
            "encoder_bytes": m.encoder.bytes,
            "components": [
                _describe(s)
                | {"bytes_per_example": round(component_bytes[i] / m.rows, 1), "energy_held": round(self.energy_held(s), 4)}
                | m.build.weighed.get(s.name, {})
                for i, s in enumerate(m.components)
            ],
            "tracked": [
                {"parameters": t.parameters, "of": t.of, "share": round(t.share, 4), "left_out": t.left_out} for t in m.build.tracked
            ],
            "notes": list(m.build.notes),
            "unread": m.build.unread.model_dump(mode="json"),
            "left_out_columns": m.build.left_out_columns,
            "added": [{"rows": part.rows, "drift": part.drift} for part in m.build.added],
        }

    def energy_held(self, component: DenseComponent | SparseComponent) -> float:
        """The share of the rows' squared length that is left after tokens or coordinates were left out, before any code.

        Of sparse rows it is counted, of dense ones it is what their eigenvalues say.
        """
        if isinstance(component, SparseComponent):
            number = self.manifest.components.index(component)
            sums = np.sum([shard.energy[number] for shard in self.shards], axis=0)
            return float(sums[0] / sums[1]) if sums[1] > 0 else 1.0
        kept = self.reduction(component).kept
        if kept is None:
            return 1.0
        eigenvalues, means = self.spectrum(component)
        energy = eigenvalues / (eigenvalues + component.curvature.damping * means)
        return float(energy[kept].sum() / energy.sum())

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Read every byte that the manifest names, make the search caches anew, and yield (relative path, the problem or None)."""
        yield self.manifest.encoder.path, _problem(self.path, self.manifest.encoder)
        yield self.manifest.table.path, _problem(self.path, self.manifest.table)
        whole = True
        for shard in self.shards:
            rows = rows_path(self.path, shard.id).relative_to(self.path).as_posix()
            documents = documents_path(self.path, shard.id).relative_to(self.path).as_posix()
            records = (
                FileRecord(path=rows, bytes=shard.bytes, sha256=shard.sha256),
                FileRecord(path=documents, bytes=shard.documents_bytes, sha256=shard.documents_sha256),
            )
            problems = [(record.path, _problem(self.path, record)) for record in records]
            yield from problems
            if any(problem for _, problem in problems):
                whole = False
                continue
            try:
                reader = ShardReader(self.path, shard, self.manifest.components)
                reader.check()
                energies = [reader.rows(component.name).energy for component in self.manifest.components]
                if not np.allclose(energies, shard.energy, rtol=1e-9, atol=0):
                    raise IntegrityError(f"{self.path / rows} does not have the energy that the table says; build the index again")
            except IntegrityError as error:
                whole = False
                yield rows, str(error)
        if whole and (duplicate := self._duplicate_id()) is not None:
            yield "documents", f"{self.path / 'documents'} has the duplicate id {duplicate[:80]!r}; build the index again"
        try:
            self.arrays  # noqa: B018
        except IntegrityError as error:
            yield self.manifest.encoder.path, str(error)
        for group in self.groups if whole else ():
            path = self._cache_path(group)
            if path.exists():
                problem = self._cache_problem(group, compare=True)
                yield str(path.relative_to(self.path)), f"{path} {problem}; fix it with wherefrom reindex" if problem else None
        yield from self._missing_manifests()

    def _duplicate_id(self) -> str | None:
        """An id that two rows have which are not deleted."""
        import pyarrow as pa
        import pyarrow.compute as pc

        chunks = [chunk for shard in self.shards for chunk in self.documents(shard).columns["id"].values.chunks]
        counts = pc.value_counts(pa.chunked_array(chunks, pa.string()).filter(pa.array(self.alive)))
        duplicates = counts.filter(pc.greater(counts.field("counts"), 1))
        return str(duplicates.field("values")[0].as_py()) if len(duplicates) else None

    def _missing_manifests(self) -> Iterator[tuple[str, str | None]]:
        """States between those that are there (pruning leaves the newest alone), and the record of which is the newest."""
        latest = self.path / "manifests" / "latest"
        if not latest.is_file():
            yield "manifests/latest", f"{latest} is missing, by which a lost newest state would be noticed; the next change writes it"
        numbers = manifest_numbers(self.path)
        for before, after in pairwise(numbers):
            if after > before + 1:
                place = f"manifests/{before + 1:06d}.json"
                yield place, f"{self.path / place} is missing between states {before} and {after}; the newest is not affected"

    def _compare(self, records: Iterable[FileRecord]) -> None:
        for record in records:
            problem = _problem(self.path, record)
            if problem:
                raise IntegrityError(problem)

    def locate(self, row: int) -> tuple[Shard, int]:
        """The shard that holds a row, and where in it.

        Raises:
            UsageError: there is no such row, or it was deleted.
        """
        if not 0 <= row < len(self):
            raise UsageError(f"row {row} is not in the index: it has the rows 0 to {len(self) - 1}")
        if not self.alive[row]:
            raise UsageError(f"row {row} was deleted")
        shard = self.shards[int(np.searchsorted(self._firsts, row, side="right")) - 1]
        return shard, row - shard.first


def _equal(a: Postings | ScanCodes, b: Postings | ScanCodes) -> bool:
    """Whether two sets of arrays hold the same values."""
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.compare)


def _column_bytes(file: ArrayFile, number: int) -> bytes:
    name = f"columns/{number}"
    return file.array(name, file.shape(name), "uint8").tobytes()


def _misfit(component: DenseComponent | SparseComponent, arrays: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with a component's arrays of the encoder: one that is missing, or not of the shape that the component promises."""
    shapes = _sparse_shapes(component) if isinstance(component, SparseComponent) else _dense_shapes(component)
    for name, (shape, needed) in shapes.items():
        array = arrays.get(f"{component.name}/{name}")
        if array is None and needed:
            return f"{component.name}/{name} is missing"
        if array is not None and (array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all()):
            return f"{component.name}/{name} is not of {' x '.join(map(str, shape))} finite numbers"
        if array is not None and name.endswith(("eigenvalues", "vocabulary")) and array.min(initial=0) < 0:
            return f"{component.name}/{name} has numbers below 0"
    kept = arrays.get(f"{component.name}/kept")
    if kept is not None and isinstance(component, DenseComponent):
        ordered = kept.dtype == np.int64 and kept.ndim == 1 and len(kept) and (np.diff(kept) > 0).all()
        if not (ordered and kept[0] >= 0 and kept[-1] < component.dim):
            return f"{component.name}/kept does not name coordinates"
    return None


def _sparse_shapes(component: SparseComponent) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {
        "basis": ((component.width, component.width), True),
        "eigenvalues": ((component.width,), True),
        "vocabulary": ((component.vocabulary,), True),
    }


def _dense_shapes(component: DenseComponent) -> dict[str, tuple[tuple[int, ...], bool]]:
    """By array, its shape and whether it must be there."""
    shapes: dict[str, tuple[tuple[int, ...], bool]] = {}
    pca = component.projection.kind == "pca"
    for layer in component.layers:
        kronecker = layer.curvature in ("ekfac", "kfac")
        for side, owner, rank, size in _sides(layer):
            shapes[f"{owner}/{side}_rotation"] = (rank, rank), kronecker
            shapes[f"{owner}/{side}_projection"] = (rank, size), pca and rank < size
        shapes[f"{layer.name}/eigenvalues"] = (layer.size,), layer.curvature != "identity"
        shapes[f"{layer.name}/basis"] = (layer.size, layer.size), layer.curvature == "fisher"
    return shapes


def _sides(layer: Layer) -> tuple[tuple[str, str, int, int], tuple[str, str, int, int]]:
    return ("input", layer.input_group, layer.input_rank, layer.inputs), ("output", layer.name, layer.output_rank, layer.outputs)


def _describe(s: DenseComponent | SparseComponent) -> dict[str, Any]:
    about = {"labels": s.curvature.labels, "fitted_on": s.curvature.examples, "damping": s.curvature.damping}
    if isinstance(s, SparseComponent):
        every = ("all that are predicted" if s.role == "head" else "all that are read") + (f", {s.others} others" if s.others else "")
        kept = every if s.keys is None else f"{s.keys} of largest norm"
        sizes = {"layer": s.layer, "vocabulary": s.vocabulary, "width": s.width, "keys": kept, "bits_a_key": s.bits}
        return {"name": s.name, "kind": s.kind, "weight": s.weight, **sizes, "parameters": s.vocabulary * s.width, **about}
    return {
        "name": s.name,
        "kind": s.kind,
        "weight": s.weight,
        "coordinates": s.stored,
        "of_coordinates": s.dim,
        "stored_as": s.dtype,
        "layers": len(s.layers),
        "parameters": sum(layer.outputs * layer.inputs for layer in s.layers),
        "projection": f"{s.projection.kind}, rank {s.projection.rank}, seed {s.projection.seed}",
        "curvature": ", ".join(sorted({layer.curvature for layer in s.layers})),
        **about,
    }


def dense_reduction(component: DenseComponent, arrays: Mapping[str, np.ndarray]) -> Reduction:
    """A dense component's reduction; `arrays` are the encoder's."""
    kept = arrays.get(f"{component.name}/kept")
    return Reduction(component.dim, kept, component.stored, component.dtype == "1bit", component.projection.seed)


def _problem(directory: Path, record: FileRecord) -> str | None:
    path = directory / record.path
    size = regular_size(path)
    if size is None:
        return f"{path} is missing; restore the file or build the index again"
    if size != record.bytes:
        return f"{path} has {size} bytes where {record.bytes} belong (truncated?); restore the file or build the index again"
    if sha256(path) != record.sha256:
        return f"{path} is not the file that was written (SHA-256 differs); restore the file or build the index again"
    return None
