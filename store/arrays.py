"""Arrays in one file: an uncompressed zip that holds a Zarr v3 group, written once and read through a memory map.

zarr-python reads such a file with `zarr.storage.ZipStore`. Every array is one chunk of plain little-endian bytes, aligned to 64 bytes, so
that arrays are views of the memory map. Reading needs only numpy and pyarrow, so that a query starts fast.

Checksums are compared when bytes are first read:

- The zip's central directory (names, sizes, positions and CRC-32 of all entries) has a CRC-32C, which the manifest records.
- An array that is always read in full is compared with its entry's CRC-32.
- An array that is read in parts, and has more than one page of 64 KiB, has a second array `<name>_pages`: the CRC-32C of each page.
"""

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from .errors import IntegrityError
from .files import memory_map, read_ahead, regular_size, size_problem, storage_errors
from .objects import StorePath
from .shapes import Int64, UInt32

PAGE_BYTES = 1 << 16
_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_EPOCH = (1980, 1, 1, 0, 0, 0)
_PADDING_TAG = 0x5057  # the id of the extra field that aligns an entry's bytes
_PAGES = "_pages"
_MOST_ENTRIES = 10_000
_DIRECTORY_BYTES = 1 << 13  # more than most files' central directories have
_LARGE_DIRECTORY_BYTES = 1 << 20
_END_BYTES = 22  # of the record at a zip's end
_ZIP64 = 0xFFFFFFFF
_READ_AHEAD_BYTES = 1 << 20  # of longer arrays, the system notices that they are read in order
_RESTORE = "restore the file or build the index again"

crc32c = google_crc32c.value
crc32c_extend = google_crc32c.extend


@dataclass(frozen=True)
class ArrayGroup:
    """The arrays and attributes of one Zarr group.

    Attributes:
        paged: the names of the arrays that are read in parts.
    """

    arrays: Mapping[str, np.ndarray]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    paged: frozenset[str] = frozenset()

    def with_pages(self) -> dict[str, np.ndarray]:
        """Return the arrays, and the page checksums of each paged array of more than one page."""
        names = [name for name in sorted(self.paged) if self.arrays[name].nbytes > PAGE_BYTES]
        return {**self.arrays, **{name + _PAGES: page_checksums(self.arrays[name]) for name in names}}


def page_checksums(array: np.ndarray) -> UInt32[np.ndarray, " pages"]:
    """Return the CRC-32C of each page of an array's bytes."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return np.array([crc32c(content[start : start + PAGE_BYTES]) for start in range(0, len(content), PAGE_BYTES)], np.uint32)


def write_arrays(path: Path, groups: Mapping[str, ArrayGroup]) -> None:
    """Write groups of arrays as one file; the same arrays give the same bytes.

    Args:
        groups: the groups by name; the root group has the name "".
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, content in _entries(groups).items():
                _append(archive, name, content)


def _entries(groups: Mapping[str, ArrayGroup]) -> dict[str, bytes]:
    """Return the names and contents of the zip's entries, which zarr-python creates from the groups."""
    from zarr import config, create_group
    from zarr.codecs import BytesCodec
    from zarr.storage import MemoryStore

    contents: dict[str, Any] = {}
    layout: dict[str, Any] = {"serializer": BytesCodec(), "compressors": None, "filters": None, "config": {"write_empty_chunks": True}}
    with config.set({"json_indent": None}):
        root = create_group(MemoryStore(contents), zarr_format=3, attributes=dict(groups[""].attributes) if "" in groups else {})
        for group_name, group in groups.items():
            zarr_group = root.create_group(group_name, attributes=dict(group.attributes)) if group_name else root
            for name, array in group.with_pages().items():
                chunk: dict[str, Any] = {"shape": array.shape, "chunks": array.shape, "dtype": array.dtype}
                zarr_group.create_array(name, fill_value=0, **chunk, **layout)[...] = array
    return {name: contents[name].to_bytes() for name in sorted(contents)}


def _append(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    assert archive.fp is not None
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.external_attr = 0o644 << 16
    begin = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(name.encode()) + 4
    if len(content) * 1.05 > zipfile.ZIP64_LIMIT:  # the condition of zipfile
        begin += 20  # the extra field of sizes above 2 GiB
    padding = -begin % _ALIGNMENT
    entry.extra = struct.pack("<HH", _PADDING_TAG, padding) + bytes(padding)
    archive.writestr(entry, content)


class ArrayFile:
    """A file of `write_arrays`, mapped into memory.

    Args:
        path: the file.
        size, directory: the recorded size in bytes and CRC-32C of the central directory; None if they are not recorded.
        remedy: the advice about a damaged file, which ends an error's sentence.

    Raises:
        IntegrityError: the file is missing, truncated or not a file of arrays, or not the recorded one.
    """

    def __init__(self, path: Path, size: int | None = None, directory: int | None = None, remedy: str = _RESTORE) -> None:
        self.path = path
        self._remedy = remedy
        self._bytes = _map(path, size, remedy)
        read_ahead(path, [(max(0, len(self._bytes) - _DIRECTORY_BYTES), _DIRECTORY_BYTES)])
        read_ahead(path, [_directory_range(self._bytes)])
        try:
            self._entries, self.directory = _directory(self._bytes)
        except (zipfile.BadZipFile, ValueError, struct.error, OSError, NotImplementedError, OverflowError) as error:
            raise IntegrityError(f"{path} is not a whole file of arrays ({error}); {self._remedy}") from error
        if directory is not None and self.directory != directory:
            raise IntegrityError(f"{path} is not the file that belongs there; {self._remedy}")
        read_ahead(path, [(start, size) for start, size, _ in self._entries.values() if size <= PAGE_BYTES])

    def __contains__(self, name: str) -> bool:
        return f"{name}/zarr.json" in self._entries

    def size(self, group: str) -> int:
        """Return the bytes of a group's arrays."""
        return sum(size for name, (_, size, _) in self._entries.items() if name.startswith(f"{group}/") and "/c/" in name)

    def attributes(self, group: str = "") -> dict[str, Any]:
        """Return the attributes of a group.

        Raises:
            IntegrityError: the group has none.
        """
        attributes = self._json(f"{group}/zarr.json" if group else "zarr.json").get("attributes")
        if not isinstance(attributes, dict):
            raise IntegrityError(f"{self.path}: the group {group!r} has no attributes; {self._remedy}")
        return attributes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array from its metadata."""
        shape = self._json(f"{name}/zarr.json").get("shape")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise IntegrityError(f"{self.path}: {name} has no valid shape; {self._remedy}")
        return tuple(shape)

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype | str) -> np.ndarray:
        """Compare an array's checksum and return the array as a view of the memory map.

        Raises:
            IntegrityError: the array is missing, damaged, or not of that shape and type.
        """
        content, checksum = self._values(name, shape, np.dtype(dtype))
        if len(content) > PAGE_BYTES and (len(content) <= _READ_AHEAD_BYTES or isinstance(self.path, StorePath)):
            self.read_ahead([content], np.zeros(1, np.int64), np.full(1, len(content)))
        if zlib.crc32(content.data) != checksum:
            raise IntegrityError(f"{self.path}: {name} fails its checksum; {self._remedy}")
        return content.view(np.dtype(dtype).newbyteorder("<")).reshape(shape)

    def paged(self, name: str, shape: tuple[int, ...], dtype: np.dtype | str) -> "PagedArray":
        """Return an array whose pages are compared with their checksums when they are first read.

        Raises:
            IntegrityError: the array is missing, or not of that shape and type.
        """
        content, _ = self._values(name, shape, np.dtype(dtype))
        offset = self._entries[_chunk_name(name, shape)][0] if len(content) else 0
        where = f"{self.path}: {name}"
        if len(content) <= PAGE_BYTES:
            return replace(PagedArray.of(self.array(name, shape, dtype)), where=where, offset=offset, remedy=self._remedy)
        checksums = self.array(name + _PAGES, (math.ceil(len(content) / PAGE_BYTES),), "uint32")
        items = content.view(np.dtype(dtype).newbyteorder("<")).reshape(shape)
        return PagedArray(content, checksums, items, where, offset, self._remedy, self.path)

    def unchecked(self, name: str, shape: tuple[int, ...], dtype: np.dtype | str) -> np.ndarray:
        """Return an array as a view of the memory map, without comparing its checksum; the caller has other checksums of its values.

        Raises:
            IntegrityError: the array is missing, or not of that shape and type.
        """
        return self._values(name, shape, np.dtype(dtype))[0].view(np.dtype(dtype).newbyteorder("<")).reshape(shape)

    def read_ahead(self, arrays: Iterable[np.ndarray], first: Int64[np.ndarray, " ranges"], last: Int64[np.ndarray, " ranges"]) -> None:
        """Tell the system to read ranges of rows, `first` to `last` (not included), of some of the file's arrays."""
        ranges: list[tuple[int, int]] = []
        for array in arrays:
            offset = array.__array_interface__["data"][0] - self._bytes.__array_interface__["data"][0]
            width = array.strides[0]
            ranges += zip((offset + first * width).tolist(), ((last - first) * width).tolist(), strict=True)
        read_ahead(self.path, ranges)

    def _values(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, int]:
        """Return an array's bytes and their recorded CRC-32."""
        meta = self._json(f"{name}/zarr.json")
        if meta.get("shape") != list(shape) or meta.get("data_type") != dtype.name:
            raise IntegrityError(
                f"{self.path}: {name} is not {dtype.name} of shape {list(shape)}, which the manifest promises; {self._remedy}"
            )
        codecs = meta.get("codecs")
        grid = meta.get("chunk_grid")
        plain = isinstance(codecs, list) and [c.get("name") for c in codecs if isinstance(c, dict)] == ["bytes"] and len(codecs) == 1
        chunks = grid.get("configuration", {}).get("chunk_shape") if isinstance(grid, dict) and plain else None
        if math.prod(shape) == 0:
            return np.zeros(0, np.uint8), 0
        if chunks != list(shape):
            raise IntegrityError(f"{self.path}: {name} is not one chunk of plain bytes; {self._remedy}")
        content, checksum = self._content(_chunk_name(name, shape))
        if len(content) != math.prod(shape) * dtype.itemsize:
            raise IntegrityError(f"{self.path}: {name} has {len(content):,} bytes, not those of shape {list(shape)}; {self._remedy}")
        return content, checksum

    def _json(self, name: str) -> dict[str, Any]:
        content, checksum = self._content(name)
        raw = content.tobytes()
        try:
            meta = json.loads(raw) if zlib.crc32(raw) == checksum else None
        except (ValueError, RecursionError):
            meta = None
        if not isinstance(meta, dict):
            raise IntegrityError(f"{self.path}: {name} is damaged; {self._remedy}")
        return meta

    def _content(self, name: str) -> tuple[np.ndarray, int]:
        if name not in self._entries:
            raise IntegrityError(f"{self.path} has no {name}; {self._remedy}")
        start, size, checksum = self._entries[name]
        return self._bytes[start : start + size], checksum


@dataclass(frozen=True)
class PagedArray:
    """An array that is read in parts.

    Attributes:
        content: the array's bytes.
        checksums: the CRC-32C of each page of `content`.
        values: the array, a view of the memory map; its rows may be used after `check`.
        where: the file and the array's name, for messages.
        offset: the position of the bytes in the file.
    """

    content: np.ndarray
    checksums: UInt32[np.ndarray, " pages"]
    values: np.ndarray
    where: str
    offset: int
    remedy: str = _RESTORE
    path: Path | None = None
    _checked: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_checked", np.zeros(len(self.checksums), bool))

    @classmethod
    def of(cls, array: np.ndarray) -> "PagedArray":
        """Wrap an array in memory, which has no checksums."""
        return cls(np.zeros(0, np.uint8), np.zeros(0, np.uint32), array, "", 0)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Compare the pages of rows `first` to `last` (not included) of the first axis, and return the rows.

        Raises:
            IntegrityError: a page is damaged.
        """
        self.check(first, last)
        return self.values[first:last]

    def whole(self) -> np.ndarray:
        """Compare all pages and return the array."""
        return self.rows(0, len(self.values))

    def check(self, first: int, last: int) -> None:
        """Compare the pages of rows `first` to `last` (not included) that were not compared before."""
        if last <= first or not len(self.content):
            return
        row_bytes = len(self.content) // len(self.values)
        pages = range(first * row_bytes // PAGE_BYTES, -(-last * row_bytes // PAGE_BYTES))
        size = len(pages) * PAGE_BYTES
        is_short = size <= _READ_AHEAD_BYTES or isinstance(self.path, StorePath)
        if self.path is not None and is_short and not self._checked[pages.start : pages.stop].all():
            read_ahead(self.path, [(self.offset + pages.start * PAGE_BYTES, size)])
        for page in pages:
            if not self._checked[page]:
                if crc32c(self.content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]) != self.checksums[page]:
                    raise IntegrityError(f"{self.where} fails a checksum; {self.remedy}")
                self._checked[page] = True


def _chunk_name(name: str, shape: tuple[int, ...]) -> str:
    return "/".join([name, "c", *("0" for _ in shape)])


def _directory_range(content: np.ndarray) -> tuple[int, int]:
    """Return first byte and size of a zip's central directory by the record at the file's end, as far as that is one."""
    end = content[-_END_BYTES:].tobytes()
    if len(end) < _END_BYTES or not end.startswith(b"PK\x05\x06"):
        return 0, 0
    size, first = struct.unpack_from("<LL", end, 12)
    if first == _ZIP64:  # the true place is in another record before it
        return max(0, len(content) - _LARGE_DIRECTORY_BYTES), _LARGE_DIRECTORY_BYTES
    return first, size


def _directory(content: np.ndarray) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Return the start, size and CRC-32 of each entry of an uncompressed zip, and the CRC-32C of its central directory."""
    import pyarrow as pa

    entries = {}
    with zipfile.ZipFile(pa.BufferReader(pa.py_buffer(content))) as archive:
        members = sorted(archive.filelist, key=lambda entry: entry.header_offset)
        if len(members) > _MOST_ENTRIES:
            raise ValueError("too many entries")
        ends = [entry.header_offset for entry in members[1:]] + [archive.start_dir]
        for entry, end in zip(members, ends, strict=True):
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
                raise ValueError("compressed or encrypted")
            # Without reading local headers, which are all over the file: an entry's bytes end where the next entry begins.
            start = end - entry.file_size
            if start < entry.header_offset + _LOCAL_HEADER_BYTES + len(entry.filename) or start % _ALIGNMENT:
                raise ValueError("an entry lies outside of it, or not at a multiple of 64 bytes")
            entries[entry.filename] = (start, entry.file_size, entry.CRC)
        if len(entries) < len(members):
            raise ValueError("duplicate entries")
        return entries, crc32c(content[archive.start_dir :].tobytes())


def _map(path: Path, size: int | None, remedy: str) -> np.ndarray:
    actual = regular_size(path)
    problem = f"{path} is empty" if actual == 0 else size_problem(path, size if size is not None else (actual or 0))
    if problem:
        raise IntegrityError(f"{problem}; {remedy}")
    return np.frombuffer(memory_map(path), np.uint8)
