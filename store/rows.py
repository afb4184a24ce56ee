"""Row shards: Zarr v3 groups of unit directions and norms, written once and read through memory maps.

A dense component of a shard is a Zarr group with

    codes   [rows, dim]  float32, float16 or int8: the row's unit direction (int8: rounded to 127 / its largest coordinate);
                         1bit, as uint8 [rows, bytes]: signs of the direction, folded and rotated (see bits.py)
    scales  [rows]       float32, only beside int8 and 1bit: what a code is multiplied with
    norms   [rows]       float32: the row's length; the row is norm * scale * code

`codes` is one sharded chunk whose inner chunks of some rows lie in order, each followed by its CRC-32C. Without compressors
these are the array's very bytes, so that a memory map with a stride reads them without a copy (about 30 GB/s where zarr-python
gives 0.4), and a stranger reads them with plain Zarr. An inner chunk's checksum is compared the first time that a process touches
it: a flipped byte is an error, never a score. zarr-python writes; reading needs only numpy, so that a query starts fast.

Compression was left out: whitened gradients are noise to a compressor.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Float, Float32, Int64, UInt32

from .bits import fold, rotate, signs_of, unfold, unrotate
from .errors import IncompatibleError, IntegrityError, NumericalError
from .files import read_bytes, regular_size, storage_errors

DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "int8": np.dtype("i1"), "1bit": np.dtype("u1")}
_FLOATS = ("float32", "float16")
_CRC_BYTES = 4
_INDEX_ENTRY_BYTES = 16
_TARGET_CHUNK_BYTES = 1 << 20
_crc = google_crc32c.value
_WRITE_ALL = {"write_empty_chunks": True}

Checks = Mapping[str, int | None]
"""By array, what the manifest says of the checksums of its chunks (see `array_checksum`); nothing is compared where it says nothing."""
NO_CHECKS: Checks = {}
RowsArray = Float32[np.ndarray, "rows dim"]


def chunk_rows(dim: int, dtype: str) -> int:
    """Rows of an inner chunk: the power of two from 16 to 4,096 that comes nearest below a mebibyte of codes."""
    rows = _TARGET_CHUNK_BYTES // row_bytes(dim, dtype)
    return min(4096, max(16, 1 << max(0, rows.bit_length() - 1)))


def row_bytes(dim: int, dtype: str) -> int:
    """Bytes of a row's codes."""
    return -(-dim // 8) if dtype == "1bit" else dim * DTYPES[dtype].itemsize


def quantize(rows: Float[np.ndarray, "rows dim"], dtype: str) -> dict[str, np.ndarray]:
    """Split rows into the arrays of a dense component.

    Args:
        rows: whitened rows, finite; for 1bit folded and rotated.
        dtype: "float32", "float16", "int8" or "1bit".

    Returns:
        `codes` [rows, dim] (1bit: [rows, ceil(dim / 8)]), `norms` [rows] (float32) and, but for floats, `scales` [rows] (float32). An
        all-zero row keeps zero codes and a zero norm.

    Raises:
        NumericalError: a row is not finite, or its norm overflows float32.
    """
    norms = np.sqrt(np.einsum("rd,rd->r", rows, rows, dtype=np.float64))
    bad = ~(norms <= np.finfo(np.float32).max)  # also True for NaN
    if bad.any():
        worst = int(np.argmax(bad))
        raise NumericalError(f"row {worst} of this shard is not finite; look at its document and at the model's precision")
    directions = (rows / np.where(norms > 0, norms, 1.0)[:, None]).astype(np.float32)
    arrays = {"norms": norms.astype(np.float32)}
    if dtype == "int8":
        scales = np.abs(directions).max(axis=1, initial=0.0) / 127.0
        arrays["codes"] = np.rint(directions / np.where(scales > 0, scales, 1.0)[:, None]).astype(np.int8)
    elif dtype == "1bit":
        sums = np.abs(directions).sum(axis=1, dtype=np.float64)
        scales = np.divide(1.0, sums, out=np.zeros_like(sums), where=sums > 0)
        arrays["codes"] = np.packbits(directions > 0, axis=1)
    else:
        arrays["codes"] = directions.astype(DTYPES[dtype])
    if dtype not in _FLOATS:
        arrays["scales"] = scales.astype(np.float32)
    return arrays


@dataclass(frozen=True)
class Reduction:
    """How a whitened row becomes the coordinates that are stored: some are kept, folded to fewer and, for one bit each, rotated.

    Attributes:
        width: coordinates of a whitened row.
        kept: which of them are stored; None keeps all.
        coordinates: stored; fewer than are kept are folded (see `bits.fold`).
        rotated: whether the last step is a rotation.
        seed: of folding and rotation.
    """

    width: int
    kept: Int64[np.ndarray, " kept"] | None
    coordinates: int
    rotated: bool
    seed: int

    @property
    def mixes(self) -> bool:
        """Whether a stored coordinate is a mixture of the encoder's."""
        return self.rotated or self.coordinates < (self.width if self.kept is None else len(self.kept))

    def apply(self, rows: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows coordinates"]:
        """Inner products of what comes out are unbiased estimates of those of what goes in (its kept coordinates)."""
        kept = rows if self.kept is None else rows[:, self.kept]
        if self.coordinates < kept.shape[1]:
            kept = fold(kept.astype(np.float32), self.coordinates, self.seed)
        return rotate(kept.astype(np.float32), self.coordinates, self.seed) if self.rotated else kept

    def undo(self, stored: Float32[np.ndarray, "rows coordinates"]) -> Float32[np.ndarray, "rows width"]:
        """Rows in the encoder's coordinates; `apply` makes the same of them again (all but what a rotation's padding held)."""
        kept = self.width if self.kept is None else len(self.kept)
        rows = unrotate(stored, min(kept, self.coordinates), self.seed) if self.rotated else stored
        if self.coordinates < kept:
            rows = unfold(rows, kept, self.seed)
        if self.kept is None:
            return rows
        whole = np.zeros((len(stored), self.width), np.float32)
        whole[:, self.kept] = rows
        return whole


def write_shard(
    directory: Path, components: Mapping[str, Callable[[Any], None]], attributes: dict, beside: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write one shard as a Zarr v3 group with a subgroup for each component.

    Args:
        directory: a staging path that does not exist yet, or is left over from a killed build.
        components: name -> what writes the component into its empty group (`write_dense`, `sparse.write_sparse`).
        attributes: JSON that describes the shard to a stranger; kept on the outer group under `wherefrom`.
        beside: arrays that are kept beside the components: `losses` of the examples (nats), perhaps their `hidden` states.
    """
    import zarr

    with storage_errors(directory):
        if directory.exists():
            shutil.rmtree(directory)
        group = zarr.create_group(directory, zarr_format=3, attributes={"wherefrom": attributes})
        for name, write in components.items():
            write(group.create_group(name))
        for name, array in (beside or {}).items():
            write_array(group, name, array)


def write_dense(group: Any, rows: Float[np.ndarray, "rows dim"], dtype: str) -> None:
    """Write whitened rows into an empty Zarr group."""
    arrays = quantize(rows, dtype)
    _write_codes(group, arrays.pop("codes"), rows.shape[1], dtype)
    for name, array in arrays.items():
        write_array(group, name, array)


def copy_dense(group: Any, rows: "DenseRows", kept: Int64[np.ndarray, " kept"]) -> None:
    """Write some rows of a shard into an empty Zarr group, to the bit as they are."""
    codes = np.concatenate([codes for _, codes in rows.blocks()])[kept]
    dtype = "1bit" if rows.one_bit else rows.dtype.name
    _write_codes(group, codes, rows.coordinates, dtype)
    write_array(group, "norms", rows.norms[kept])
    if rows.scales is not None:
        write_array(group, "scales", rows.scales[kept])


def _write_codes(group: Any, codes: np.ndarray, coordinates: int, dtype: str) -> None:
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

    group.attrs.update({"kind": "dense", "dtype": dtype})
    pieces = math.ceil(len(codes) / chunk_rows(coordinates, dtype))  # of one size, so that the last is hardly padded
    inner = (math.ceil(len(codes) / pieces), codes.shape[1])
    chunks = (math.ceil(len(codes) / inner[0]) * inner[0], codes.shape[1])
    serializer = ShardingCodec(chunk_shape=inner, codecs=(BytesCodec(), Crc32cCodec()))
    layout: dict[str, Any] = {"chunks": chunks, "serializer": serializer, "compressors": None, "config": _WRITE_ALL}
    group.create_array("codes", shape=codes.shape, dtype=codes.dtype, fill_value=0, **layout)[...] = codes


def write_array(group: Any, name: str, array: np.ndarray) -> None:
    """Write an array as one chunk of its plain bytes, with their CRC-32C behind them."""
    from zarr.codecs import BytesCodec, Crc32cCodec

    layout: dict[str, Any] = {"chunks": array.shape, "serializer": BytesCodec(), "compressors": (Crc32cCodec(),), "config": _WRITE_ALL}
    group.create_array(name, shape=array.shape, dtype=array.dtype, fill_value=0, **layout)[...] = array


def array_checksum(path: Path) -> int | None:
    """CRC-32C over the checksums of the chunks in an array's file, in their order; None for a file that holds no array's values."""
    place = next((p for p in path.parents if p.name == "c"), None)
    if place is None or path != place / "/".join("0" for _ in path.relative_to(place).parts):
        return None
    meta = json.loads(read_bytes(place.parent / "zarr.json"))
    (codec, *_), shape = meta["codecs"], meta["shape"]
    with open(path, "rb") as file:
        if codec["name"] != "sharding_indexed":
            file.seek(-_CRC_BYTES, os.SEEK_END)
            return int(_crc(file.read(_CRC_BYTES)))
        rows, dim = codec["configuration"]["chunk_shape"]
        stride = rows * dim * np.dtype(meta["data_type"]).itemsize + _CRC_BYTES
        checksums = []
        for chunk in range(math.ceil(shape[0] / rows)):
            file.seek((chunk + 1) * stride - _CRC_BYTES)
            checksums.append(file.read(_CRC_BYTES))
    return int(_crc(b"".join(checksums)))


def map_array(directory: Path, name: str, shape: tuple[int, ...], dtype: str, checks: Checks = NO_CHECKS) -> np.ndarray:
    """An array of `write_array` as a view of its memory map, after its checksum was compared.

    Args:
        checks: see `Checks`.

    Raises:
        IntegrityError: missing, truncated, damaged, or not of that shape and type.
        IncompatibleError: laid out in a way that this version does not read.
    """
    meta = _metadata(directory, name, shape, np.dtype(dtype))
    if not math.prod(shape):
        return np.zeros(shape, dtype)  # of which Zarr writes no chunk
    if [c.get("name") for c in meta["codecs"]] != ["bytes", "crc32c"]:
        raise _unreadable(directory, name)
    path = directory / name / "/".join(["c", *("0" for _ in shape)])
    raw = _map(path, math.prod(shape) * np.dtype(dtype).itemsize + _CRC_BYTES)
    _check_crc(raw, path, "its values")
    _check_place(raw[-_CRC_BYTES:].tobytes(), path, checks.get(name))
    return raw[:-_CRC_BYTES].view(np.dtype(dtype).newbyteorder("<")).reshape(shape)


class DenseRows:
    """A dense component of one shard, read through a memory map.

    Args:
        directory: the component's group, `rows/<uuid>.zarr/<component>`.
        rows, dim, dtype: what the manifest says lies there.
        checks: see `Checks`.

    Raises:
        IntegrityError: a file is missing, truncated, of another shard, or its checksum does not match (the last on first touch).
        IncompatibleError: the arrays are laid out in a way that this version does not read.
    """

    def __init__(self, directory: Path, rows: int, dim: int, dtype: str, checks: Checks = NO_CHECKS) -> None:
        self._checks = checks
        self.directory, self.rows, self.coordinates, self.dtype = directory, rows, dim, DTYPES[dtype]
        self.dim = row_bytes(dim, dtype) // self.dtype.itemsize
        self.one_bit = dtype == "1bit"
        self.chunk_rows, self.chunks = self._map_codes()
        self._verified = np.zeros(self.chunks, dtype=bool)
        self.norms = self._read_vector("norms")
        self.scales = None if dtype in _FLOATS else self._read_vector("scales")

    def __len__(self) -> int:
        return self.rows

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, codes [r, dim] in the stored dtype, without a copy), in order."""
        for chunk in range(self.chunks):
            first = chunk * self.chunk_rows
            yield first, self._chunk(chunk)[: self.rows - first]

    def factors(self) -> Float32[np.ndarray, " rows"]:
        """What a row's codes are multiplied with to give the row's unit direction (1 where codes are floats)."""
        return self.scales if self.scales is not None else np.ones(self.rows, np.float32)

    def code(self, row: int) -> np.ndarray:
        """One row's codes as they are stored."""
        chunk, offset = divmod(row, self.chunk_rows)
        return self._chunk(chunk)[offset]

    def row(self, row: int) -> Float32[np.ndarray, " dim"]:
        """One whole row: norm * scale * code. Of one-bit codes, as long as the row is: along its signs."""
        values = self.values(self.code(row)[None])[0]
        if self.one_bit:
            return values * (self.norms[row] / np.float32(math.sqrt(self.coordinates)))
        return values * (self.norms[row] * (self.scales[row] if self.scales is not None else np.float32(1)))

    def take(self, offsets: Int64[np.ndarray, " chosen"], checks: UInt32[np.ndarray, " chosen"], out: np.ndarray) -> None:
        """Read the codes of some rows one by one from the file, and not from its map, whose pages would pile up in memory.

        Args:
            checks: CRC-32C of each.
            out: uint8 [chosen, bytes of a row].

        Raises:
            IntegrityError: a row is not the one that was written.
        """
        chunks, within = np.divmod(offsets, self.chunk_rows)
        starts = (chunks * self._stride + within * out.shape[1]).tolist()
        file = os.open(self._codes_path, os.O_RDONLY)
        try:
            for row, start, check in zip(out, starts, checks.tolist(), strict=True):
                os.preadv(file, (row,), start)
                if _crc(row) != check:
                    raise IntegrityError(f"{self._codes_path}: a row fails its checksum; restore the file or build the index again")
        finally:
            os.close(file)

    def values(self, codes: np.ndarray) -> Float32[np.ndarray, "rows coordinates"]:
        """Stored codes as numbers to multiply with; float32 ones are not copied."""
        return signs_of(codes, self.coordinates) if self.one_bit else codes.astype(np.float32, copy=False)

    def _chunk(self, chunk: int) -> np.ndarray:
        start = chunk * self._stride
        raw = self._bytes[start : start + self._stride]
        if not self._verified[chunk]:
            _check_crc(raw, self._codes_path, f"rows {chunk * self.chunk_rows} onward")
            self._verified[chunk] = True
        return raw[:-_CRC_BYTES].view(self.dtype).reshape(self.chunk_rows, self.dim)

    def _map_codes(self) -> tuple[int, int]:
        meta = _metadata(self.directory, "codes", (self.rows, self.dim), self.dtype)
        try:
            (codec,) = meta["codecs"]
            inner = codec["configuration"]
            rows, dim = inner["chunk_shape"]
            names = [c["name"] for c in inner["codecs"]]
            plain = codec["name"] == "sharding_indexed" and names == ["bytes", "crc32c"] and inner.get("index_location", "end") == "end"
        except (KeyError, ValueError, TypeError) as error:
            raise _unreadable(self.directory, "codes") from error
        if not plain or dim != self.dim or type(rows) is not int or rows < 1:
            raise _unreadable(self.directory, "codes")
        chunks = math.ceil(self.rows / rows)
        self._stride = rows * dim * self.dtype.itemsize + _CRC_BYTES
        self._codes_path = self.directory / "codes/c/0/0"
        self._bytes = _map(self._codes_path, chunks * (self._stride + _INDEX_ENTRY_BYTES) + _CRC_BYTES)
        checksums = self._bytes[: chunks * self._stride].reshape(chunks, self._stride)[:, -_CRC_BYTES:]
        _check_place(checksums.tobytes(), self._codes_path, self._checks.get("codes"))
        return rows, chunks

    def _read_vector(self, name: str) -> Float32[np.ndarray, " rows"]:
        values = np.array(map_array(self.directory, name, (self.rows,), "float32", self._checks))
        if not np.isfinite(values).all():
            raise IntegrityError(f"{self.directory / name} holds numbers that are not finite; restore the file or build the index again")
        return values


def _metadata(directory: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> dict:
    path = directory / name / "zarr.json"
    try:
        meta = json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing; restore the file or build the index again") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON any more; restore the file or build the index again") from error
    if not isinstance(meta, dict) or meta.get("shape") != list(shape) or meta.get("data_type") != dtype.name:
        raise IntegrityError(f"{path} does not describe {dtype.name} of shape {list(shape)}, which the manifest promises")
    codecs = meta.get("codecs")
    if not isinstance(codecs, list) or not all(isinstance(codec, dict) for codec in codecs):
        raise IntegrityError(f"{path} does not list an array's codecs; restore the file or build the index again")
    return meta


def _unreadable(directory: Path, name: str) -> IncompatibleError:
    return IncompatibleError(f"{directory / name} has Zarr codecs that this version of Wherefrom does not read; use a newer one")


def _map(path: Path, size: int) -> np.ndarray:
    found = regular_size(path)
    if found is None:
        raise IntegrityError(f"{path} is missing; restore the file or build the index again")
    if found == size:
        import pyarrow as pa

        # Arrow's map lives on without its file, where numpy's keeps a descriptor open for each of an index's thousands of files.
        with pa.memory_map(str(path)) as file:
            return np.frombuffer(file.read_buffer(), np.uint8)
    raise IntegrityError(f"{path} has {found} bytes where {size} belong (truncated?); restore the file or build the index again")


def _check_place(checksums: bytes, path: Path, expected: int | None) -> None:
    if expected is not None and _crc(checksums) != expected:
        raise IntegrityError(f"{path} is not the file that belongs there; restore the file or build the index again")


def _check_crc(raw: np.ndarray, path: Path, what: str) -> None:
    expected = int.from_bytes(raw[-_CRC_BYTES:].tobytes(), "little")
    if google_crc32c.value(raw[:-_CRC_BYTES].tobytes()) != expected:
        raise IntegrityError(f"{path}: {what} fail their checksum; restore the file or build the index again")
