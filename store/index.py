"""An index as one snapshot: the newest manifest and, opened when needed, the shards, documents and encoder that it names."""

import re
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from hashlib import sha256 as digest
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float16, Float32, Float64, Int64

from .documents import Documents, Example
from .errors import IncompatibleError, IntegrityError, UsageError
from .files import clear_leftovers, read_json, regular_size, sha256
from .manifest import DenseComponent, FileRecord, Layer, Shard, SparseComponent, identity, manifest_numbers, read_manifest
from .postings import Postings
from .rows import Checks, DenseRows, Reduction, map_array
from .scan_codes import ScanCodes
from .sparse import SparseRows, SparseVectors

if TYPE_CHECKING:
    import pyarrow as pa


_GROUP_ROWS = 1 << 16
_OPEN_DOCUMENTS = 1024
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a component: row r is `norms[r] * factors[r] * codes[r]`, its unit direction `factors[r] * codes[r]`."""

    first: int
    codes: np.ndarray
    factors: Float32[np.ndarray, " rows"]
    norms: Float32[np.ndarray, " rows"]


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
        self._firsts = np.array([shard.first for shard in self.manifest.shards])
        self._rows: dict[tuple[str, str], DenseRows] = {}
        self._sparse: dict[tuple[str, str], SparseRows] = {}
        self._postings: dict[tuple[str, str], Postings] = {}
        self._scan_codes: dict[tuple[str, str], ScanCodes | None] = {}
        self._documents: OrderedDict[str, Documents] = OrderedDict()
        self._described: set[str] = set()

    def __len__(self) -> int:
        """Rows, deleted ones too."""
        return self.manifest.rows

    def _refuse_missing_rows(self) -> None:
        """Refuse shards without a file of their rows' norms, before anything is allocated by the manifest's word alone."""
        name = self.manifest.components[0].name
        for shard in self.manifest.shards:
            path = self.path / "rows" / f"{shard.id}.zarr" / name / "norms/c/0"
            size = regular_size(path)
            if size != 4 * shard.rows + 4:
                what = (
                    "is missing"
                    if size is None
                    else f"has {size:,} bytes where {shard.rows:,} rows take {4 * shard.rows + 4:,} (truncated?)"
                )
                raise IntegrityError(f"{path} {what}; restore the file or build the index again")

    def component(self, name: str) -> DenseComponent | SparseComponent:
        """The manifest's entry for a component."""
        return next(s for s in self.manifest.components if s.name == name)

    def dense(self, shard: Shard, component: DenseComponent) -> DenseRows:
        """A dense component's rows in one shard."""
        key = (shard.id, component.name)
        if key not in self._rows:
            group = self.path / "rows" / f"{shard.id}.zarr" / component.name
            self._rows[key] = DenseRows(group, shard.rows, component.stored, component.dtype, self._checks(shard, f"{component.name}/"))
        return self._rows[key]

    def _checks(self, shard: Shard, within: str = "") -> Checks:
        """What the manifest says of the arrays in a group of a shard's, after the files that describe the arrays were compared whole."""
        group = f"rows/{shard.id}.zarr/{within}"
        if shard.id not in self._described:
            self._compare(record for record in shard.files if record.path.endswith("zarr.json"))
            self._described.add(shard.id)
        arrays = {}
        for record in shard.files:
            name, _, rest = record.path.removeprefix(group).partition("/")
            if record.path.startswith(group) and rest.startswith("c/"):
                arrays[name] = record.chunks
        return arrays

    def sparse(self, shard: Shard, component: SparseComponent) -> SparseRows:
        """A sparse component's rows in one shard."""
        key = (shard.id, component.name)
        if key not in self._sparse:
            group = self.path / "rows" / f"{shard.id}.zarr" / component.name
            self._sparse[key] = SparseRows(
                group, shard.rows, component.vocabulary, component.bits, self._checks(shard, f"{component.name}/")
            )
        return self._sparse[key]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All shards, in groups that are large enough to be searched in one go, small enough for scores to stay in cache."""
        groups: list[list[Shard]] = []
        for shard in self.manifest.shards:
            if groups and shard.first + shard.rows - groups[-1][0].first <= _GROUP_ROWS:
                groups[-1].append(shard)
            else:
                groups.append([shard])
        return tuple(Group(tuple(g), g[0].first, g[-1].first + g[-1].rows - g[0].first) for g in groups)

    def postings(self, group: Group, component: SparseComponent) -> Postings:
        """The posting lists of a sparse component's rows in a group: those that lie beside them, else made here."""
        key = (group.id, component.name)
        if key not in self._postings:
            lists = self._kept(group, component) or self._made(group, component)
            assert isinstance(lists, Postings)
            self._postings[key] = lists
        return self._postings[key]

    def scan_codes(self, group: Group, component: DenseComponent) -> ScanCodes | None:
        """The one-bit codes of a dense component's rows in a group; None where they do not lie beside the rows.

        Components that hold one-bit codes themselves have none.
        """
        key = (group.id, component.name)
        if key not in self._scan_codes:
            codes = self._kept(group, component)
            assert codes is None or isinstance(codes, ScanCodes)
            self._scan_codes[key] = codes
        return self._scan_codes[key]

    def reindex(self, compare: bool = False) -> int:
        """Write what the search can read beside the rows, posting lists and one-bit codes, where it is missing, damaged or of other rows;
        and remove that of groups that are no more. The caller holds the index (see `files.exclusive`).

        Args:
            compare: also make anew what seems whole, and write it where it differs.

        Returns:
            How many files were written.
        """
        written, beside = 0, self.path / "search"
        if beside.exists() and not beside.is_dir():
            raise UsageError(f"{beside} is not a directory of this index; remove it")
        for group, component in self._searchable():
            kept = self._kept(group, component)
            if kept is not None and not (compare and not _alike(kept, self._made(group, component))):
                continue
            self._made(group, component).write(self._beside(group, component), self._source(group, component), self.path / "staging")
            written += 1
        for place in beside.glob("*.zarr"):
            if place.stem not in {group.id for group in self.groups} and _UUID.fullmatch(place.stem) and not place.is_symlink():
                shutil.rmtree(place)
        clear_leftovers(self.path)
        return written

    def _searchable(self) -> Iterator[tuple[Group, DenseComponent | SparseComponent]]:
        """The groups and components beside whose rows something lies for the search."""
        for group in self.groups:
            for component in self.manifest.components:
                if isinstance(component, SparseComponent) or component.dtype != "1bit":
                    yield group, component

    def _kept(self, group: Group, component: DenseComponent | SparseComponent) -> Postings | ScanCodes | None:
        place, source = self._beside(group, component), self._source(group, component)
        if isinstance(component, SparseComponent):
            return Postings.read(place, source, group.rows, -(-component.bits // 8))
        return ScanCodes.read(place, source, group.rows, component.stored)

    def _made(self, group: Group, component: DenseComponent | SparseComponent) -> Postings | ScanCodes:
        if isinstance(component, SparseComponent):
            return Postings.of([self.sparse(shard, component) for shard in group.shards])
        return ScanCodes.of([self.dense(shard, component) for shard in group.shards], component.projection.seed)

    def by_shard(
        self, rows: Int64[np.ndarray, " chosen"]
    ) -> Iterator[tuple[Group, Shard, Int64[np.ndarray, " own"], Int64[np.ndarray, " own"]]]:
        """The shards that hold some rows: the group and the shard, which of the rows it holds, and where in it each lies."""
        shards = np.searchsorted(self._firsts, rows, side="right") - 1
        order = np.argsort(shards, kind="stable")
        numbers, starts = np.unique(shards[order], return_index=True)
        for number, chosen in zip(numbers.tolist(), np.split(order, starts)[1:], strict=True):
            shard = self.manifest.shards[number]
            yield self._groups_of_shards[number], shard, chosen, rows[chosen] - shard.first

    @cached_property
    def _groups_of_shards(self) -> list[Group]:
        return [group for group in self.groups for _ in group.shards]

    def _beside(self, group: Group, component: DenseComponent | SparseComponent) -> Path:
        return self.path / "search" / f"{group.id}.zarr" / component.name

    def _source(self, group: Group, component: DenseComponent | SparseComponent) -> str:
        """What lies beside the rows is made of: the checksums of their files."""
        parts = [f.sha256 for shard in group.shards for f in shard.files if f.path.startswith(f"rows/{shard.id}.zarr/{component.name}/")]
        return digest("".join(parts).encode()).hexdigest()

    def norms(self, component: DenseComponent | SparseComponent) -> Float32[np.ndarray, " rows"]:
        """The lengths of a component's rows."""
        if isinstance(component, SparseComponent):
            return np.concatenate([self.sparse(shard, component).norms for shard in self.manifest.shards])
        return np.concatenate([self.dense(shard, component).norms for shard in self.manifest.shards])

    def losses(self, shard: Shard) -> Float32[np.ndarray, " rows"]:
        """The examples' own losses under the (last) model, in nats."""
        if not any(f.path == f"rows/{shard.id}.zarr/losses/zarr.json" for f in shard.files):
            raise IncompatibleError(f"{self.path} does not hold its examples' losses; build it again with this version")
        return map_array(self.path / "rows" / f"{shard.id}.zarr", "losses", (shard.rows,), "float32", self._checks(shard))

    def hidden(self, shard: Shard) -> Float16[np.ndarray, "rows width"] | None:
        """The examples' mean last hidden states under the (last) model; None where the build did not keep them."""
        group = self.path / "rows" / f"{shard.id}.zarr"
        if not any(f.path == f"rows/{shard.id}.zarr/hidden/zarr.json" for f in shard.files):
            return None
        checks, shape = self._checks(shard), read_json(group / "hidden/zarr.json").get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not isinstance(shape[1], int) or not 0 < shape[1] < 1 << 24:
            raise IntegrityError(f"{group}/hidden/zarr.json does not describe hidden states; restore the file or build the index again")
        return map_array(group, "hidden", (shard.rows, shape[1]), "float16", checks)

    def documents(self, shard: Shard) -> Documents:
        """A shard's examples."""
        if shard.id not in self._documents:
            self._compare(record for record in shard.files if record.path.endswith(".arrow"))
            self._documents[shard.id] = Documents(self.path / "documents" / f"{shard.id}.arrow", shard.rows)
            while len(self._documents) > _OPEN_DOCUMENTS:
                self._documents.popitem(last=False)
        self._documents.move_to_end(shard.id)
        return self._documents[shard.id]

    def blocks(self, component: DenseComponent) -> Iterator[Block]:
        """All rows of a component in order, in blocks of about a mebibyte that are views of memory maps."""
        for shard in self.manifest.shards:
            rows = self.dense(shard, component)
            factors = rows.factors()
            for first, codes in rows.blocks():
                part = slice(first, first + len(codes))
                yield Block(shard.first + first, codes, factors[part], rows.norms[part])

    def row(self, row: int, component: DenseComponent) -> Float32[np.ndarray, " dim"]:
        """One row of a component, whole (with its norm), in the encoder's coordinates: what is left of them in the stored ones."""
        shard, offset = self.locate(row)
        return self.reduction(component).undo(self.dense(shard, component).row(offset)[None])[0]

    def reduction(self, component: DenseComponent) -> Reduction:
        """What brings a component's whitened rows to the stored coordinates."""
        return dense_reduction(component, self.arrays if component.coordinates else {})

    def entries(self, row: int, component: SparseComponent) -> SparseVectors:
        """One row of a sparse component, its vectors estimated from their codes (see `SparseRows.vectors`)."""
        shard, offset = self.locate(row)
        keys, vectors = self.sparse(shard, component).vectors(offset, component.width, component.seed)
        return SparseVectors(np.array([0, len(keys)]), keys, vectors)

    def example(self, row: int) -> Example:
        """The example that a row stands for.

        Raises:
            UsageError: the index has no such row.
        """
        shard, offset = self.locate(row)
        return self.documents(shard)[offset]

    @cached_property
    def columns(self) -> "dict[str, pa.DataType]":
        """What rows can be filtered and grouped by, with its Arrow type: text, where it differs or values are kept as JSON."""
        import pyarrow as pa

        found: dict[str, pa.DataType] = {}
        for shard in self.manifest.shards:
            for name, field in self.documents(shard).columns.items():
                known = found.get(name, field.type)
                found[name] = field.type if pa.types.is_null(known) else known if field.type in (known, pa.null()) else pa.string()
        return found

    @cached_property
    def _kinds(self) -> dict[str, frozenset[str]]:
        """The kinds of values that each column holds anywhere (see filters.py)."""
        kinds: dict[str, set[str]] = {name: set() for name in self.columns}
        for shard in self.manifest.shards:
            documents = self.documents(shard)
            for name in documents.columns:
                kinds[name].add(documents.kind(name) or "")
        return {name: frozenset(own - {""}) for name, own in kinds.items()}

    def matching(self, expression: str) -> Bool[np.ndarray, " rows"]:
        """Which rows a filter matches (see filters.py).

        Raises:
            UsageError: no such column, or values that cannot be compared.
        """
        from .filters import matching, names_in, parse_filter

        tree, parts = parse_filter(expression), list[np.ndarray]()
        for shard in self.manifest.shards:
            documents = self.documents(shard)
            own = {name: documents.column(name) for name in names_in(tree) if name in documents.columns}
            parts.append(matching(tree, own, self._kinds, shard.rows))
        return np.concatenate(parts)

    def column(self, name: str) -> "pa.ChunkedArray":
        """A column of all rows.

        Raises:
            UsageError: there is no such column, or its values are of several types.
        """
        import pyarrow as pa

        self._check_column(name)
        parts, kind = list[Any](), self.columns[name]
        for shard in self.manifest.shards:
            known = self.documents(shard)
            own = known.column(name) if name in known.columns else None
            if own is not None and (own.encoded or own.values.type not in (kind, pa.null())):
                raise UsageError(f"the column {name!r} holds values of several types; make them alike and build the index again")
            parts += [pa.nulls(shard.rows, kind)] if own is None or own.kind is None else own.values.chunks
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
        for shard in self.manifest.shards:
            documents = self.documents(shard)
            if name not in documents.columns:
                parts.append(np.full(shard.rows, -1))
                continue
            column = documents.column(name)
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
        for shard in self.manifest.shards:
            own = np.zeros(shard.rows, bool)
            for name in ("id", "document"):
                places = pc.index_in(self.documents(shard).column(name).values, wanted)
                own |= np.asarray(pc.is_valid(places))
                found[np.asarray(places.drop_null())] = True
            parts.append(own)
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
        alive[list(self.manifest.tombstones)] = False
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
                raise UsageError("this index was built with --curvature identity: there are no eigenvalues to damp")
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
        files = [m.encoder, *(f for s in m.shards for f in s.files)]
        row_bytes = sum(f.bytes for f in files if f.path.startswith("rows/"))
        return {
            "path": str(self.path),
            "manifest": m.number,
            "format": m.version,
            "created": m.created,
            "wherefrom": m.wherefrom,
            "models": [{n: getattr(model, n) for n in ("id", "revision", "architecture", "parameters", "dtype")} for model in m.models],
            "rows": m.rows,
            "deleted": len(m.tombstones),
            "tokens": m.tokens,
            **{name: getattr(m.build, name) for name in ("documents", "split", "truncated", "skipped", "not_finite")},
            "shards": len(m.shards),
            "bytes": sum(f.bytes for f in files),
            "bytes_per_example": round(row_bytes / m.rows, 1),
            "encoder_bytes": m.encoder.bytes,
            "components": [
                _describe(s)
                | {"bytes_per_example": self._bytes(s), "energy_held": round(self.energy_held(s), 4)}
                | m.build.weighed.get(s.name, {})
                for s in m.components
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
            sums = np.sum([self.sparse(shard, component).energy for shard in self.manifest.shards], axis=0)
            return float(sums[0] / sums[1]) if sums[1] > 0 else 1.0
        kept = self.reduction(component).kept
        if kept is None:
            return 1.0
        eigenvalues, means = self.spectrum(component)
        energy = eigenvalues / (eigenvalues + component.curvature.damping * means)
        return float(energy[kept].sum() / energy.sum())

    def _bytes(self, component: DenseComponent | SparseComponent) -> float:
        files = (f for s in self.manifest.shards for f in s.files if f.path.startswith(f"rows/{s.id}.zarr/{component.name}/"))
        return round(sum(f.bytes for f in files) / self.manifest.rows, 1)

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Read every byte that the manifest names, make anew what lies beside the rows for the search, and yield (relative path, what is
        wrong with it or None).
        """
        yield self.manifest.encoder.path, _problem(self.path, self.manifest.encoder)
        whole = True
        for shard in self.manifest.shards:
            problems = [(record.path, _problem(self.path, record)) for record in shard.files]
            yield from problems
            if any(problem for _, problem in problems):
                whole = False
                continue
            try:
                for component in self.manifest.components:
                    if isinstance(component, SparseComponent):
                        self.sparse(shard, component)
                    else:
                        for _ in self.dense(shard, component).blocks():
                            pass
                self.losses(shard)
                self.hidden(shard)
                self.documents(shard)
            except IntegrityError as error:
                whole = False
                yield f"rows/{shard.id}.zarr", str(error)
        if whole and (doubled := self._doubled_id()) is not None:
            yield (
                "documents",
                f"{self.path / 'documents'} has the duplicate id {doubled[:80]!r}; build the index again",
            )
        try:
            self.arrays  # noqa: B018
        except IntegrityError as error:
            yield self.manifest.encoder.path, str(error)
        for group, component in self._searchable() if whole else ():
            kept, place = self._kept(group, component), self._beside(group, component)
            if kept is not None:
                forged = not _alike(kept, self._made(group, component))
                yield (
                    str(place.relative_to(self.path)),
                    f"{place} is not made of the rows; fix it with wherefrom reindex" if forged else None,
                )
        yield from self._missing_manifests()

    def _doubled_id(self) -> str | None:
        """An id that two rows have which are not deleted."""
        import pyarrow as pa
        import pyarrow.compute as pc

        chunks = [chunk for shard in self.manifest.shards for chunk in self.documents(shard).column("id").values.chunks]
        counts = pc.value_counts(pa.chunked_array(chunks, pa.string()).filter(pa.array(self.alive)))
        doubled = counts.filter(pc.greater(counts.field("counts"), 1))
        return str(doubled.field("values")[0].as_py()) if len(doubled) else None

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
        shard = self.manifest.shards[int(np.searchsorted(self._firsts, row, side="right")) - 1]
        return shard, row - shard.first


def _alike(a: Postings | ScanCodes, b: Postings | ScanCodes) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


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
