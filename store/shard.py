"""Shards: consecutive rows of an index, written once. Their files, writer and reader, and the table that lists all shards of an index.

rows/<id>.zarr.zip     arrays (see arrays.py): a group for each component (dense.py, sparse.py); `losses` of the examples in nats;
                       optionally their `hidden` states; offsets and checksums of the record batches of the documents
documents/<id>.arrow   the examples (see documents.py)
"""

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .arrays import ArrayFile, ArrayGroup, write_arrays
from .documents import Documents, batch_checksums, write_documents
from .errors import IntegrityError
from .files import publish, sha256, size_problem, staging_folder
from .kinds import Rows, open_rows
from .manifest import FORMAT_VERSION, Component, FileRecord, Manifest, publish_manifest
from .shapes import Float16, Float32, Int64, UInt8

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_WIDEST = 1 << 24
_SHA256_BYTES = 32
_COUNTS = ("rows", "tokens", "bytes", "documents_bytes")
_DIGESTS = ("sha256", "documents_sha256")


class Shard(NamedTuple):
    """A shard's entry in the table: rows `first` to `first + rows` of the index.

    Attributes:
        tokens: the number of input tokens of the examples.
        bytes, sha256: size and SHA-256 of the file of rows.
        directory: CRC-32C of that file's central directory, which verifies the arrays' checksums without reading the arrays.
        documents_bytes, documents_sha256: size and SHA-256 of the documents.
        energy: by component, the sums of the rows' squared lengths as they are stored and before tokens were left out.
        component_bytes: by component, the bytes of its arrays.
    """

    id: str
    first: int
    rows: int
    tokens: int
    bytes: int
    sha256: str
    directory: int
    documents_bytes: int
    documents_sha256: str
    energy: tuple[tuple[float, float], ...]
    component_bytes: tuple[int, ...]

    def files(self) -> tuple[FileRecord, FileRecord]:
        """Return the records of the shard's rows and of its documents."""
        return (
            FileRecord(path=rows_path(Path(), self.id).as_posix(), bytes=self.bytes, sha256=self.sha256),
            FileRecord(path=documents_path(Path(), self.id).as_posix(), bytes=self.documents_bytes, sha256=self.documents_sha256),
        )


def derived_id(identity: str, number: int) -> str:
    """Return the id of the n-th file of a build or change, which is the same for the same identity, so that a resumed one finds it."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"wherefrom:{identity}:{number}"))


def has_id(path: Path) -> bool:
    """Return True if a file's name begins with an id, as those of `derived_id`, before its first dot."""
    return _ID.fullmatch(path.name.partition(".")[0]) is not None


def rows_path(index: Path, shard_id: str) -> Path:
    """Return the path of a shard's rows."""
    return index / "rows" / f"{shard_id}.zarr.zip"


def documents_path(index: Path, shard_id: str) -> Path:
    """Return the path of a shard's documents."""
    return index / "documents" / f"{shard_id}.arrow"


def write_shard(
    index: Path,
    shard_id: str,
    components: Mapping[str, ArrayGroup],
    losses: Float32[np.ndarray, " rows"],
    hidden: Float16[np.ndarray, "rows width"] | None = None,
) -> None:
    """Write the rows of a shard. Its documents must have been written before.

    Args:
        components: by name, the arrays of the component (of `encode_dense`, `encode_sparse` or `select`).
    """
    offsets, checksums = batch_checksums(documents_path(index, shard_id))
    arrays: dict[str, np.ndarray] = {"losses": losses, "documents_offsets": offsets, "documents_checksums": checksums}
    if hidden is not None:
        arrays["hidden"] = hidden
    about = {"format": FORMAT_VERSION, "shard": shard_id, "rows": len(losses), "documents": f"documents/{shard_id}.arrow"}
    root = ArrayGroup(arrays, {"wherefrom": about})
    staged = staging_folder(index) / f"{shard_id}-{uuid.uuid4().hex}.zarr.zip"
    write_arrays(staged, {"": root, **components})
    publish(staged, rows_path(index, shard_id))


class ShardReader:
    """The rows and documents of one shard.

    Raises:
        IntegrityError: see `ArrayFile`.
    """

    def __init__(self, index: Path, shard: Shard, components: Sequence[Component]) -> None:
        self.shard = shard
        self._index = index
        self._components = {component.name: component for component in components}
        self._rows: dict[str, Rows] = {}

    @cached_property
    def file(self) -> ArrayFile:
        """The file of the shard's rows."""
        return ArrayFile(rows_path(self._index, self.shard.id), self.shard.bytes, self.shard.directory)

    def rows(self, name: str) -> Any:
        """Return the rows of a component: `DenseRows` or `SparseRows`."""
        if name not in self._rows:
            self._rows[name] = open_rows(self.file, self._components[name], self.shard.rows)
        return self._rows[name]

    @cached_property
    def losses(self) -> Float32[np.ndarray, " rows"]:
        """The losses of the examples under the (last) model, in nats."""
        return self.file.array("losses", (self.shard.rows,), "float32")

    @cached_property
    def hidden(self) -> Float16[np.ndarray, "rows width"] | None:
        """The examples' mean last hidden states under the (last) model; None if the build did not store them."""
        if "hidden" not in self.file:
            return None
        shape = self.file.shape("hidden")
        if len(shape) != 2 or not 0 < shape[1] < _WIDEST:
            raise IntegrityError(f"{self.file.path} holds no valid hidden states; restore the file or build the index again")
        return self.file.array("hidden", (self.shard.rows, shape[1]), "float16")

    @cached_property
    def documents(self) -> Documents:
        """The examples of the shard."""
        path = documents_path(self._index, self.shard.id)
        problem = size_problem(path, self.shard.documents_bytes)
        if problem:
            raise IntegrityError(f"{problem}; restore the file or build the index again")
        batches = self.file.shape("documents_offsets")
        offsets = self.file.array("documents_offsets", batches, "int64")
        return Documents(path, self.shard.rows, offsets, self.file.array("documents_checksums", batches, "uint32"))

    def check(self) -> None:
        """Compare all arrays and documents with their checksums.

        Raises:
            IntegrityError: an array or a document is damaged.
        """
        for name in self._components:
            self.rows(name).check()
        self.losses  # noqa: B018
        self.hidden  # noqa: B018
        self.documents.check()

    def select(self, rows: Int64[np.ndarray, " selected"], shard_id: str) -> Shard:
        """Write some of the rows and their examples, unchanged, as a new shard.

        Returns:
            The new shard's entry; its first row is 0.
        """
        examples = [self.documents[int(row)] for row in rows]
        staged = staging_folder(self._index) / f"{shard_id}.arrow"
        write_documents(staged, examples)
        publish(staged, documents_path(self._index, shard_id))
        components = {name: self.rows(name).select(rows) for name in self._components}
        write_shard(self._index, shard_id, components, self.losses[rows], None if self.hidden is None else self.hidden[rows])
        return shard_entry(self._index, shard_id, 0, len(rows), sum(e.tokens for e in examples), list(self._components.values()))


def is_whole(index: Path, shard_id: str, rows: int, components: Iterable[Component]) -> bool:
    """Return True if a shard's file of rows is complete and undamaged, with this number of rows and these components."""
    try:
        file = ArrayFile(rows_path(index, shard_id))
        file.array("losses", (rows,), "float32")
        for component in components:
            open_rows(file, component, rows).check()
    except IntegrityError:
        return False
    return True


def shard_entry(index: Path, shard_id: str, first: int, rows: int, tokens: int, components: Sequence[Component]) -> Shard:
    """Return a shard's entry, computed from its files."""
    path = rows_path(index, shard_id)
    documents = documents_path(index, shard_id)
    file = ArrayFile(path)
    return Shard(
        id=shard_id,
        first=first,
        rows=rows,
        tokens=tokens,
        bytes=path.stat().st_size,
        sha256=sha256(path),
        directory=file.directory,
        documents_bytes=documents.stat().st_size,
        documents_sha256=sha256(documents),
        energy=tuple(open_rows(file, component, rows).energy for component in components),
        component_bytes=tuple(file.size(component.name) for component in components),
    )


def table_arrays(shards: Sequence[Shard], deleted: Int64[np.ndarray, " deleted"]) -> ArrayGroup:
    """Return the table of an index's shards, in row order, and deleted rows, ascending, as arrays."""
    counts = {name: np.array([getattr(shard, name) for shard in shards], np.int64) for name in _COUNTS}
    digests = {
        name: np.frombuffer(b"".join(bytes.fromhex(getattr(shard, name)) for shard in shards), np.uint8).reshape(-1, _SHA256_BYTES)
        for name in _DIGESTS
    }
    ids = np.frombuffer(b"".join(uuid.UUID(shard.id).bytes for shard in shards), np.uint8).reshape(-1, 16)
    directory = np.array([shard.directory for shard in shards], np.uint32)
    by_component = {
        "energy": np.array([shard.energy for shard in shards], np.float64),
        "component_bytes": np.array([shard.component_bytes for shard in shards], np.int64),
    }
    return ArrayGroup({"id": ids, **counts, **digests, "directory": directory, **by_component, "deleted": deleted.astype(np.int64)})


def read_table(file: ArrayFile, shards: int, components: int, rows: int) -> tuple[tuple[Shard, ...], Int64[np.ndarray, " deleted"]]:
    """Read the shards and the deleted rows of an index.

    Args:
        shards, components, rows: their numbers in the manifest.

    Raises:
        IntegrityError: the table is damaged or does not fit these numbers.
    """
    ids = [_uuid(digits) for digits in _hexadecimal(file.array("id", (shards, 16), "uint8"))]
    counts = {name: file.array(name, (shards,), "int64") for name in _COUNTS}
    digests = {name: file.array(name, (shards, _SHA256_BYTES), "uint8") for name in _DIGESTS}
    energy = file.array("energy", (shards, components, 2), "float64")
    component_bytes = file.array("component_bytes", (shards, components), "int64").tolist()
    deleted = file.array("deleted", file.shape("deleted"), "int64")
    sizes = counts["rows"]
    firsts = np.concatenate([[0], np.cumsum(sizes)])
    too_small = (counts["bytes"] // sizes.clip(1) < 4).any()  # the norm of a row takes 4 bytes
    if (sizes < 1).any() or (counts["tokens"] < 0).any() or too_small or firsts[-1] != rows or len(set(ids)) < shards:
        raise IntegrityError(f"{file.path} does not list the shards of {rows:,} rows; restore it or build the index again")
    if deleted.ndim != 1 or (np.diff(deleted) <= 0).any() or (len(deleted) and not 0 <= deleted[0] <= deleted[-1] < rows):
        raise IntegrityError(f"{file.path}: its deleted rows are not ascending, or not rows of the index; build the index again")
    columns: dict[str, Sequence[Any]] = {
        "id": ids,
        "first": firsts[:-1].tolist(),
        **{name: array.tolist() for name, array in counts.items()},
        **{name: _hexadecimal(array) for name, array in digests.items()},
        "directory": file.array("directory", (shards,), "uint32").tolist(),
        "energy": [tuple(map(tuple, energies)) for energies in energy.tolist()],
        "component_bytes": list(map(tuple, component_bytes)),
    }
    in_order = [columns[name] for name in Shard._fields]
    return tuple(map(Shard._make, zip(*in_order, strict=True))), deleted


def _hexadecimal(rows: UInt8[np.ndarray, "rows bytes"]) -> list[str]:
    """Return the hexadecimal digits of each row of bytes."""
    digits = rows.tobytes().hex()
    width = 2 * rows.shape[1]
    return [digits[i : i + width] for i in range(0, len(digits), width)]


def _uuid(digits: str) -> str:
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def publish_index(index: Path, shards: Sequence[Shard], deleted: Int64[np.ndarray, " deleted"], fields: Mapping[str, Any]) -> Manifest:
    """Publish a new state of an index: write its table of shards and then its manifest, which makes it the current state.

    Args:
        shards: the shards in row order; their field `first` is ignored.
        deleted: the deleted rows, ascending.
        fields: the fields of the manifest, without those that are computed here.

    Raises:
        BusyError: another process published a manifest of that number first.
    """
    staged = staging_folder(index) / f"{uuid.uuid4().hex}.zarr.zip"
    write_arrays(staged, {"": table_arrays(shards, deleted)})
    table = index / "manifests" / f"{uuid.uuid5(uuid.NAMESPACE_OID, sha256(staged))}.zarr.zip"
    publish(staged, table)
    counts = {"rows": sum(s.rows for s in shards), "tokens": sum(s.tokens for s in shards), "shards": len(shards)}
    counts["training_rows"] = max(fields.get("training_rows", 0), counts["rows"])
    features = sorted({*fields["features"]} - {"deleted"} | ({"deleted"} if len(deleted) else set()))
    manifest = Manifest(**{**fields, **counts, "deleted": len(deleted), "table": FileRecord.of(index, table), "features": tuple(features)})
    publish_manifest(index, manifest)
    return manifest
