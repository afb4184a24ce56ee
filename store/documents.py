"""Examples on disk: one Arrow IPC file for each shard, memory-mapped when read.

The file has record batches of 256 examples. The shard's arrays hold the offset and the CRC-32C of each batch (see `batch_checksums`), so
that reading one text reads and checks one batch. Filters and groups read `Columns`, which the search caches hold for several shards.

In an object store, the batches are compressed with Zstandard, by Arrow's own means: texts and token ids become about a third. A reader
checks the size that a batch says it will have before it is decompressed. On a disk a text is read where it lies, not compressed.

Columns: `id`, `document` (the id of the document that a chunk was cut from; equal to `id` if it was not cut), `chunk` (its number), `text`,
`source`, `token_ids`, `loss_mask`, and `metadata`, a struct of all other columns of the corpus. Where the examples have them, also `label`
(a class), `lengths` (the numbers of tokens of several sequences that follow each other in `token_ids`), `image` (the bytes of an image
file) and `features` (a vector).

A metadata column whose values have no common Arrow type (such as numbers and words) is stored as JSON text, which its field's
metadata records, so that no value is changed.

Filters and groups use the corpus's names of columns; `metadata.` is put before a name that is also a column of the examples.
"""

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .arrays import crc32c
from .errors import DataError, IntegrityError, first_line
from .files import memory_map, read_ahead, regular_size, storage_errors
from .objects import StorePath
from .shapes import Bool, Float32, Int32, Int64, UInt32

if TYPE_CHECKING:
    from .filters import Column

BATCH_ROWS = 256
_LARGEST_BATCH = 1 << 29  # bytes of a compressed record batch in memory
_CACHED_BATCHES = 8  # of a file; decompressed ones take memory
_NESTING = 16  # levels of a type that Arrow files support
_SHORTEST = 2  # tokens of a text: one to predict and one before it
_MAGIC = b"ARROW1\0\0"
_JSON = {b"wherefrom:encoding": b"json"}
_LARGE = ("text", "token_ids", "loss_mask", "lengths", "image", "features")
_COLUMNS = ("id", "document", "chunk", "text", "source", "label")
_FIXED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("document", pa.string(), nullable=False),
        pa.field("chunk", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
    ]
)

_OPTIONAL = {
    "features": pa.field("features", pa.list_(pa.float32()), nullable=False),
    "label": pa.field("label", pa.int64(), nullable=False),
    "lengths": pa.field("lengths", pa.list_(pa.int32()), nullable=False),
    "image": pa.field("image", pa.binary(), nullable=False),
}
"""Columns that the examples of some tasks have."""


@dataclass(frozen=True)
class Example:
    """A training example or a query, whose whitened gradient is one row.

    Attributes:
        token_ids: the tokens of the model's input.
        loss_mask: True for tokens whose prediction is in the loss; False for the first token, which is not predicted.
        document, chunk: the id of the document that a chunk was cut from, and the chunk's number in it.
        truncated: True if the rest of the document was cut off; not stored.
        features: a vector, for an example without token ids.
        image: the bytes of an image file, for an example without token ids.
        label: the class of the vector, the image or the text.
        lengths: the numbers of tokens of several sequences that follow each other in `token_ids`, such as the two sides of a pair; empty
            for a single one.
    """

    id: str
    text: str
    source: str
    token_ids: Int32[np.ndarray, " tokens"]
    loss_mask: Bool[np.ndarray, " tokens"]
    document: str = ""
    chunk: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    truncated: bool = False
    features: Float32[np.ndarray, " size"] | None = None
    label: int | None = None
    lengths: tuple[int, ...] = ()
    image: bytes | None = None

    @property
    def tokens(self) -> int:
        """The number of positions of the model's input: all tokens, but for a language model the last, which is only predicted.

        1 for a vector or an image.
        """
        if self.features is not None or self.image is not None:
            return 1
        return len(self.token_ids) - (self.label is None and not self.lengths)

    @property
    def loss_tokens(self) -> int:
        """The number of tokens that the loss is on; 1 where it is on none, as that of a label."""
        return max(1, int(self.loss_mask.sum()))

    def sequences(self) -> list[tuple[Int32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]]:
        """The token ids and the loss mask of each sequence."""
        ends = np.cumsum(self.lengths or (len(self.token_ids),))[:-1]
        return list(zip(np.split(self.token_ids, ends), np.split(self.loss_mask, ends), strict=True))


def stored_bytes(example: Example) -> int:
    """Estimate the number of bytes of an example in the file."""
    metadata = json.dumps(example.metadata, ensure_ascii=False, default=str) if example.metadata else ""
    return len(example.text.encode()) + len(metadata.encode()) + 5 * len(example.token_ids) + len(example.image or b"")


def _has(example: Example, name: str) -> bool:
    value = getattr(example, name)
    return value is not None and len(value) > 0 if name == "lengths" else value is not None


def write_documents(path: Path, examples: Sequence[Example]) -> None:
    """Write examples, in order, as one Arrow IPC file; one for an object store is compressed."""
    examples = [e if e.document else replace(e, document=e.id) for e in examples]
    optional = [field for name, field in _OPTIONAL.items() if any(_has(e, name) for e in examples)]
    schema = pa.schema([*_FIXED, *optional])
    for name in ("label", "features", "image"):
        lacking = next((e.id for e in examples if name in schema.names and getattr(e, name) is None), None)
        if lacking is not None:
            raise DataError(f"example {lacking!r} has no {name}, which others have; give it one, or leave all others' out")
    columns = [pa.array([getattr(e, f.name) for e in examples], f.type) for f in schema]
    names = sorted({name for e in examples for name in e.metadata})
    if names:
        fields, arrays = zip(*(_metadata_column(name, [e.metadata.get(name) for e in examples]) for name in names), strict=True)
        schema = schema.append(pa.field("metadata", pa.struct(fields), nullable=False))
        columns.append(pa.StructArray.from_arrays(arrays, fields=fields))
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        options = pa.ipc.IpcWriteOptions(compression="zstd" if isinstance(path, StorePath) else None)
        with pa.OSFile(os.fspath(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
            writer.write_table(pa.table(columns, schema=schema), max_chunksize=BATCH_ROWS)


def _metadata_column(name: str, values: list[Any]) -> tuple[pa.Field, pa.Array]:
    for kind in (None, pa.uint64()):
        try:
            array = pa.array(values, kind)
            # Values are compared by repr, since True, 1 and 1.0 are equal; times by str, since their zones have several classes.
            to_text = str if pa.types.is_timestamp(array.type) else repr
            if list(map(to_text, array.to_pylist())) == list(map(to_text, values)) and str(array.type).count("<") < _NESTING:
                return pa.field(name, array.type), array
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, RecursionError):
            continue
    text = [None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in values]
    return pa.field(name, pa.string(), metadata=_JSON), pa.array(text, pa.string())


def batch_checksums(path: Path) -> tuple[Int64[np.ndarray, " batches_and_one"], UInt32[np.ndarray, " batches_and_one"]]:
    """Compute the offsets and checksums of the record batches in a file of examples.

    Returns:
        Byte offsets of the batches and of the end of the last; CRC-32C of the bytes before the first batch, and of each batch.
    """
    content = _map(path)
    offsets = _batch_offsets(content)
    bounds = [0, *offsets]
    checksums = [crc32c(content.slice(begin, end - begin).to_pybytes()) for begin, end in pairwise(bounds)]
    return np.array(offsets, np.int64), np.array(checksums, np.uint32)


def decompressed_batches(path: Path) -> Iterator[bytes]:
    """Yield the record batches of a file of examples as Arrow messages that are not compressed.

    Raises:
        IntegrityError: the file is damaged.
    """
    try:
        content = _map(path)
        schema = _read_schema(content)
        for begin, end in pairwise(_batch_offsets(content)):
            yield _read_batch(content.slice(begin, end - begin), schema).serialize().to_pybytes()
    except (ValueError, OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{path} is not a whole file of examples ({error}); restore the index") from error


def _map(path: Path) -> pa.Buffer:
    """Map a file of examples into memory, without keeping it open."""
    if not regular_size(path):
        raise ValueError("missing, empty or not a regular file")
    read_ahead(path, [(0, len(_MAGIC))])
    content = memory_map(path)
    if content.slice(0, len(_MAGIC)).to_pybytes() != _MAGIC:
        raise ValueError("not an Arrow file")
    return content


def _batch_offsets(content: pa.Buffer) -> list[int]:
    """Return the offsets of the record batches and of the end of the last, by reading the messages one after the other as a stream."""
    stream = pa.BufferReader(content)
    stream.seek(len(_MAGIC))
    offsets = list[int]()
    pa.ipc.read_message(stream)  # the schema
    while True:
        offsets.append(stream.tell())
        try:
            pa.ipc.read_message(stream)
        except EOFError:
            return offsets


def _read_schema(content: pa.Buffer) -> pa.Schema:
    """Read the schema of a file of examples; raise a ValueError if it is another."""
    schema = pa.ipc.read_schema(pa.ipc.read_message(pa.BufferReader(content.slice(len(_MAGIC)))))
    for field_ in schema:
        expected = next((f for f in (*_FIXED, *_OPTIONAL.values()) if f.name == field_.name), None)
        if expected.type != field_.type if expected else field_.name != "metadata" or not pa.types.is_struct(field_.type):
            raise ValueError(f"the column {field_.name[:80]!r} is not a column of examples")
    metadata = [f.name for f in schema.field("metadata").type] if "metadata" in schema.names else []
    if len(set(metadata)) < len(metadata):
        raise ValueError("metadata columns are duplicates")
    if missing := [name for name in _FIXED.names if name not in schema.names] or len(set(schema.names)) < len(schema.names):
        raise ValueError(f"columns are missing or duplicates: {missing}")
    return schema


def _read_batch(content: pa.Buffer, schema: pa.Schema) -> pa.RecordBatch:
    """Read a record batch from the bytes of its message, and check all offsets, lengths and texts, since the file may be untrusted."""
    message = pa.ipc.read_message(pa.BufferReader(content))
    if message.type != "record batch":
        raise ValueError(f"it has a {message.type} that is not expected")
    _check_expanded(message.metadata.to_pybytes(), message.body)
    batch = pa.ipc.read_record_batch(message, schema)
    batch.validate(full=True)
    lists = [batch.column(name) for name in ("token_ids", "loss_mask") if name in schema.names]
    nulls = sum(batch.column(f.name).null_count for f in schema if f.name != "metadata") + sum(c.values.null_count for c in lists)
    if nulls or (lists and batch.num_rows and not np.array_equal(np.diff(_starts(lists[0])), np.diff(_starts(lists[1])))):
        raise ValueError("examples lack a value, or their token ids and loss masks differ in length")
    if (np.frombuffer(batch.column("chunk").buffers()[1], np.int32)[: batch.num_rows] < 0).any():
        raise ValueError("a chunk has a number below 0")
    if lists and not {"features", "image"} & {*schema.names} and batch.num_rows:
        _check_tokens(lists[0], lists[1], 1 if {"label", "lengths"} & {*schema.names} else _SHORTEST)
        if "lengths" in schema.names:
            _check_lengths(batch.column("lengths"), lists[0])
    return batch


def _check_lengths(lengths: pa.ListArray, ids: pa.ListArray) -> None:
    """Refuse examples whose sequences are empty, or do not have all of their tokens."""
    starts = _starts(lengths)
    values = np.frombuffer(lengths.values.buffers()[1], np.int32)[: starts[-1]].astype(np.int64)
    sums = np.add.reduceat(values, starts[:-1]) if len(values) and (np.diff(starts) > 0).all() else np.zeros(0)
    if (values < 1).any() or not np.array_equal(sums, np.diff(_starts(ids))):
        raise ValueError("the lengths of sequences are not those of their tokens")


def _check_tokens(ids: pa.ListArray, masks: pa.ListArray, shortest: int) -> None:
    """Refuse texts without a token to predict, with ids below 0, or whose first token is in the loss."""
    starts = _starts(ids)
    values = np.frombuffer(ids.values.buffers()[1], np.int32)[: starts[-1]]
    bits = np.unpackbits(np.frombuffer(masks.values.buffers()[1], np.uint8), bitorder="little")
    if (np.diff(starts) < shortest).any() or (values < 0).any() or bits[starts[:-1]].any():
        raise ValueError("token ids or loss masks are not valid")


def _starts(lists: pa.ListArray) -> Int32[np.ndarray, " lists_and_one"]:
    """Return the starts of lists, and the end of the last one, without pyarrow.compute, which takes long to import.

    Arrays of a file have no offset into their buffers.
    """
    return np.frombuffer(lists.offsets.buffers()[1], np.int32)[: len(lists) + 1]


def _check_expanded(message: bytes, body: pa.Buffer) -> None:
    """Refuse a record batch that would take much memory when its buffers are decompressed.

    Args:
        message: the metadata of the batch's message, a flatbuffer that Arrow has checked: a table `Message` whose field 2 is a table
            `RecordBatch` with the places of the buffers (field 2) and the kind of compression (field 3).
        body: the buffers. A compressed one begins with the number of its bytes before compression, -1 if it is not compressed after all.
    """

    def field_offset(table: int, number: int) -> int:
        """Return the offset of a table's field; 0 if the field is missing."""
        fields = table - struct.unpack_from("<i", message, table)[0]
        entry = 4 + 2 * number
        relative = struct.unpack_from("<H", message, fields + entry)[0] if entry < struct.unpack_from("<H", message, fields)[0] else 0
        return table + relative if relative else 0

    def target(place: int) -> int:
        return place + struct.unpack_from("<I", message, place)[0]

    header = field_offset(target(0), 2)
    if not header or not field_offset(target(header), 3):
        return
    buffers = target(field_offset(target(header), 2))
    total = 0
    for number in range(struct.unpack_from("<I", message, buffers)[0]):
        start, size = struct.unpack_from("<qq", message, buffers + 4 + 16 * number)
        if size:
            expanded = struct.unpack_from("<q", body.slice(start, 8).to_pybytes())[0] if 0 <= start <= body.size - 8 else -2
            if expanded < -1:
                raise ValueError("a compressed buffer has no size")
            total += max(expanded, 0)
    if total > _LARGEST_BATCH:
        raise ValueError(f"a compressed batch says that it takes {total:,} bytes, and at most {_LARGEST_BATCH:,} are read")


def _is_encoded(field: pa.Field) -> bool:
    """Return True if a column is stored as JSON text."""
    return bool(field.metadata) and field.metadata.get(b"wherefrom:encoding") == b"json"


class Columns:
    """The columns of a shard's examples for filters and groups: those of all examples and those of the corpus.

    Args:
        schema: the schema of the batches.
        batches: record batches of all examples, with or without their texts.
    """

    def __init__(self, schema: pa.Schema, batches: Sequence[pa.RecordBatch]) -> None:
        self._schema = schema
        self._batches = batches

    @cached_property
    def _positions(self) -> dict[str, tuple[pa.Field, int | None]]:
        """By column the field and, for a column of the corpus, its position in the metadata."""
        schema = self._schema
        columns: dict[str, tuple[pa.Field, int | None]] = {name: (schema.field(name), None) for name in _COLUMNS if name in schema.names}
        metadata = schema.field("metadata").type if "metadata" in schema.names else ()
        return {f"metadata.{f.name}" if f.name in columns else f.name: (f, i) for i, f in enumerate(metadata)} | columns

    @property
    def fields(self) -> dict[str, pa.Field]:
        """The columns, by name."""
        return {name: field for name, (field, _) in self._positions.items()}

    def kind(self, name: str) -> str | None:
        """Return the kind as which a column's values are compared (see filters.py)."""
        from .filters import JSON_KIND, kind_of

        field, _ = self._positions[name]
        return JSON_KIND if _is_encoded(field) else kind_of(field.type)

    def __getitem__(self, name: str) -> "Column":
        """Return one column of all rows."""
        from .filters import Column

        field, position = self._positions[name]
        if position is None:
            return Column(pa.chunked_array([batch.column(name) for batch in self._batches], field.type))
        chunks = [batch.column("metadata").flatten()[position] for batch in self._batches]
        return Column(pa.chunked_array(chunks, field.type), _is_encoded(field))

    def to_bytes(self) -> bytes:
        """Return the columns, without texts, as an Arrow IPC stream of one record batch."""
        names = [name for name in self._schema.names if name not in _LARGE]
        table = pa.Table.from_batches(self._batches, self._schema).select(names).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, content: pa.Buffer, rows: int) -> "Columns":
        """Read and check the columns that `to_bytes` wrote.

        Raises:
            pa.ArrowException, ValueError, ...: they are damaged, or not of `rows` rows.
        """
        stream = pa.BufferReader(content)
        schema = pa.ipc.read_schema(pa.ipc.read_message(stream))
        batch = _read_batch(content.slice(stream.tell()), schema)
        if batch.num_rows != rows:
            raise ValueError(f"{batch.num_rows} rows instead of {rows}")
        return cls(schema, [batch])


class Documents:
    """The examples of one shard, read through a memory map, batch by batch.

    Args:
        path: the Arrow file.
        rows: the recorded number of examples.
        offsets, checksums: the result of `batch_checksums`; without them the file is scanned for batches, and no checksum is compared.

    Raises:
        IntegrityError: the file is missing, truncated or not Arrow, or a batch is damaged (when it is read).
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        offsets: Int64[np.ndarray, " batches_and_one"] | None = None,
        checksums: UInt32[np.ndarray, " batches_and_one"] | None = None,
    ) -> None:
        self.path = path
        self.rows = rows
        self._checksums = None if checksums is None else checksums.tolist()
        self._batches: dict[int, pa.RecordBatch] = {}
        with self._damage():
            self._content = _map(path)
            self._offsets = _batch_offsets(self._content) if offsets is None else offsets.tolist()
            bounds = [0, *self._offsets, self._content.size]
            if len(self._offsets) != -(-rows // BATCH_ROWS) + 1 or any(end < begin for begin, end in pairwise(bounds)):
                raise ValueError(f"its batches do not hold {rows:,} examples")
            self._schema = _read_schema(self._checked(0))

    def __len__(self) -> int:
        return self.rows

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise IntegrityError(
                f"{self.path} is not a whole Arrow file of examples ({first_line(error)[:200]}); restore it or build again"
            ) from error

    def _checked(self, section: int) -> pa.Buffer:
        """Compare the checksum of the bytes before the first batch (section 0) or of batch `section` - 1, and return the bytes."""
        begin, end = (0, *self._offsets)[section : section + 2]
        read_ahead(self.path, [(begin, end - begin)])
        content = self._content.slice(begin, end - begin)
        if self._checksums is not None and crc32c(content.to_pybytes()) != self._checksums[section]:
            raise ValueError("it fails a checksum")
        return content

    def _batch(self, number: int) -> pa.RecordBatch:
        if number not in self._batches:
            with self._damage():
                batch = _read_batch(self._checked(number + 1), self._schema)
                if batch.num_rows != min(BATCH_ROWS, self.rows - number * BATCH_ROWS):
                    raise ValueError(f"a batch holds {batch.num_rows} examples")
            self._batches[number] = batch
            if len(self._batches) > _CACHED_BATCHES:
                self._batches.pop(next(iter(self._batches)))
        return self._batches[number]

    def __getitem__(self, row: int) -> Example:
        """Return the example of a row of this shard, with its metadata decoded.

        Raises:
            IntegrityError: the batch is damaged, or a value of the metadata has no Python value or is not the JSON that it should be.
        """
        number, offset = divmod(row, BATCH_ROWS)
        batch = self._batch(number)
        arrays = ("token_ids", "loss_mask", "features", "lengths")
        try:
            record = {name: batch.column(name)[offset].as_py() for name in batch.schema.names if name not in arrays}
            record["metadata"] = self._decode(record.get("metadata") or {})
        except (pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise IntegrityError(
                f"{self.path}: the metadata of row {row} cannot be read; restore the file or build the index again"
            ) from error
        return Example(
            **record,
            token_ids=np.array(batch.column("token_ids")[offset].as_py(), np.int32),
            loss_mask=np.array(batch.column("loss_mask")[offset].as_py(), bool),  # not to_numpy, which imports pandas
            features=np.array(batch.column("features")[offset].as_py(), np.float32) if "features" in batch.schema.names else None,
            lengths=tuple(batch.column("lengths")[offset].as_py()) if "lengths" in batch.schema.names else (),
        )

    @cached_property
    def columns(self) -> Columns:
        """The columns of all batches."""
        return Columns(self._schema, [self._batch(number) for number in range(len(self._offsets) - 1)])

    def ids(self) -> list[str]:
        """Return all ids, in row order."""
        return self.columns["id"].values.to_pylist()

    def check(self) -> None:
        """Compare all batches with their checksums, and check their values.

        Raises:
            IntegrityError: a batch is damaged.
        """
        for number in range(len(self._offsets) - 1):
            self._batch(number)

    def _decode(self, metadata: dict[str, Any]) -> dict[str, Any]:
        kind = self._schema.field("metadata").type if metadata else ()
        encoded = {f.name for f in kind if _is_encoded(f)}
        return {
            name: json.loads(value) if name in encoded and value is not None else value
            for name, value in metadata.items()
            if value is not None
        }
