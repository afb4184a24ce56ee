"""Records of tables: CSV with inferred column types, and Parquet and Arrow in bounded batches.

A small Parquet file may expand beyond memory, since repeated values are stored once and nesting levels as run lengths. Therefore batches
are small enough for the largest value that a column chunk can hold, and the size of a batch as Python values is computed before conversion.
"""

import contextlib
import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import DataError
from .objects import StorePath, open_from
from .sources import LONGEST_BYTES, MOST_COLUMNS, Range, Reading, Record

_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 27
_READABLE = ("arrow.uuid", "arrow.json")  # types of bytes that become text in Python
_WRITE_SMALLER = "write the file with smaller row groups (row_group_size)"

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[+-][0-9]{2}:?[0-9]{2})?")
_TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def _integer(text: str) -> int:
    value = int(text) if _INTEGER.fullmatch(text) else 1 << 63
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError
    return value


def _number(text: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    if math.isinf(value) or (text.lstrip("-").isdigit() and abs(int(text)) > 1 << 53):  # the float would differ from the text
        raise ValueError
    return value


def _date(text: str) -> date:
    if not _DATE.fullmatch(text):
        raise ValueError
    return date.fromisoformat(text)


def _time(text: str, has_zone: bool) -> datetime:
    match = _TIME.fullmatch(text)
    if match is None or bool(match[3]) != has_zone:
        raise ValueError
    moment = datetime.fromisoformat(text)
    return moment.astimezone(UTC) if has_zone else moment


_Parser = Callable[[str], Any]
_TIMES = (partial(_time, has_zone=False), partial(_time, has_zone=True))
_PARSERS: tuple[_Parser, ...] = (_TRUTH.__getitem__, _integer, _number, _date, *_TIMES)  # the first that fits all values is used


def _fits(parse: _Parser, text: str) -> bool:
    try:
        parse(text)
    except (ValueError, KeyError, OverflowError):
        return False
    return True


def csv_records(open_file: Callable[[], io.BufferedIOBase], name: str, delimiter: str, reading: Reading) -> Iterator[Record]:
    """Yield the records of a CSV file with a header.

    A first pass over the file infers the type of each column that is not content: booleans, 64-bit integers, floats, ISO dates, ISO times
    with or without a zone; any other column is text (also numbers with leading zeros). An empty cell is None, except in a prompt.
    """
    candidates: dict[str, tuple[_Parser, ...]] = {}
    with open_file() as file:
        for header, _, row in _rows(file, name, delimiter):
            for column, text in zip(header, row, strict=False) if len(row) == len(header) else ():
                if text and column not in reading.content:
                    parsers = candidates.get(column, _PARSERS)
                    candidates[column] = parsers and tuple(parse for parse in parsers if _fits(parse, text))
    types = {column: parsers[0] if parsers else str for column, parsers in candidates.items()}
    with open_file() as file:
        for number, (header, line, row) in enumerate(_rows(file, name, delimiter), 1):
            where = f"{name} record {number}"
            id = f"{name}:{number}"
            if len(row) != len(header):
                yield where, id, DataError(f"{where} (line {line}): {len(row)} columns where the header has {len(header)}; fix the record")
            else:
                cells = zip(header, row, strict=True)
                yield where, id, {c: types.get(c, str)(text) if text else "" if c == reading.prompt else None for c, text in cells}


def _rows(file: io.BufferedIOBase, name: str, delimiter: str) -> Iterator[tuple[list[str], int, list[str]]]:
    """Yield (header, line, cells) of each record that is not blank."""
    csv.field_size_limit(LONGEST_BYTES)
    reader = csv.reader(_text_lines(io.TextIOWrapper(file, "utf-8-sig", newline=""), name), delimiter=delimiter, strict=True)  # type: ignore[arg-type]
    try:
        header = next(reader, [])
        _check_columns(header, name)
        for row in reader:
            if row:
                yield header, reader.line_num, row
    except UnicodeDecodeError as error:
        raise DataError(f"{name} near line {reader.line_num + 1}: not UTF-8; convert the file, for instance with iconv") from error
    except csv.Error as error:
        raise DataError(f"{name} near line {reader.line_num + 1}: not readable as CSV ({error}); fix the record") from error


def _text_lines(file: io.TextIOWrapper, name: str) -> Iterator[str]:
    while line := file.readline(LONGEST_BYTES):
        if len(line) == LONGEST_BYTES:
            raise DataError(f"{name}: a line is longer than {LONGEST_BYTES >> 20} MiB; give a CSV file")
        yield line


def _check_columns(names: Sequence[str], name: str) -> None:
    if len(set(names)) != len(names):
        raise DataError(f"{name}: two columns have the same name; rename one")
    if len(names) > MOST_COLUMNS:
        raise DataError(f"{name}: {len(names):,} columns, and at most {MOST_COLUMNS:,} are read; remove some")


def row_groups(path: Path) -> list[int]:
    """Return the number of rows of each row group of a Parquet file; none if it is damaged, as reading it will say."""
    try:
        with pq.ParquetFile(_seekable(path)) as file:
            return [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError, OverflowError):
        return []


def _seekable(path: Path) -> Any:
    """Return what pyarrow opens: the path, or an object's bytes, which are fetched as they are read."""
    return open_from(path, 0) if isinstance(path, StorePath) else path


def parquet_records(path: Path, name: str, reading: Reading, selection: Range | None = None) -> Iterator[Record]:
    """Yield the records of a Parquet file, or of a range of its row groups."""
    try:
        with pq.ParquetFile(_seekable(path)) as file:
            schema = file.schema_arrow
            metadata = file.metadata
            leaves = [metadata.schema.column(i) for i in range(min(metadata.num_columns, MOST_COLUMNS + 1))]
            _check_columns([leaf.path for leaf in leaves], name)
            _check_columns(schema.names, name)
            columns = [f.name for f in schema if not _leave_out(f, reading)]
            indices = [i for i, leaf in enumerate(leaves) if leaf.path.split(".")[0] in {c.split(".")[0] for c in columns}]
            nested = {leaves[i].path for i in indices if leaves[i].max_repetition_level}
            row_group_bounds = []
            numbers = range(metadata.num_row_groups) if selection is None else range(selection.start, selection.stop)
            for number in numbers:
                # Reading no rows raises errors in the columns' metadata; accessing these first would abort the process.
                next(file.reader.iter_batches(0, row_groups=[number], column_indices=indices, use_threads=False), None)
                chunks = [metadata.row_group(number).column(i) for i in indices]
                row_group_bounds.append(_bounds(chunks, nested, f"{name}: row group {number + 1} of {metadata.num_row_groups}"))
        first = 0 if selection is None else selection.first
        for number, (rows, shared) in zip(numbers, row_group_bounds, strict=True):
            with pq.ParquetFile(_seekable(path), read_dictionary=shared, pre_buffer=False, buffer_size=1 << 20) as file:
                yield from table_records(file.iter_batches(rows, [number], columns), name, reading, first)
            first += metadata.row_group(number).num_rows
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError) or getattr(error, "errno", None):
            raise
        if isinstance(error, pa.ArrowNotImplementedError):
            raise DataError(f"{name}: this Parquet file uses unsupported features; write it again with common encodings") from error
        raise DataError(f"{name}: damaged, or not a Parquet file; fetch or write it again") from error


def _bounds(chunks: Sequence[Any], nested: set[str], where: str) -> tuple[int, list[str]]:
    """Return the number of rows of a row group to read at a time, and the columns to read as dictionaries."""
    largest = max(
        (c.total_uncompressed_size for c in chunks if c.physical_type == "BYTE_ARRAY" and c.path_in_schema not in nested), default=1
    )
    shared = []
    for chunk in (c for c in chunks if c.path_in_schema in nested):
        if 8 * chunk.num_values > max(_BATCH_BYTES, 4096 * chunk.total_uncompressed_size):
            raise DataError(
                f"{where} has {chunk.num_values:,} values in {chunk.path_in_schema}, more than can be read at once; {_WRITE_SMALLER}"
            )
        if chunk.physical_type == "BYTE_ARRAY" and chunk.num_values * chunk.total_uncompressed_size > _BATCH_BYTES:
            shared.append(chunk.path_in_schema)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, largest))), shared


def table_records(batches: Iterable[pa.RecordBatch], name: str, reading: Reading, first: int = 0) -> Iterator[Record]:
    """Yield the records of Arrow batches, numbered from `first` + 1."""
    for batch in batches:
        selected = batch.select([f.name for f in batch.schema if not _leave_out(f, reading)])
        records = None
        if _expanded_bytes(selected.columns) <= _BATCH_BYTES:
            with contextlib.suppress(pa.ArrowException, ValueError, OverflowError):  # then rows are converted one by one
                records = selected.to_pylist() or [{}] * batch.num_rows
        for i in range(batch.num_rows):
            where = f"{name} record {first + i + 1}"
            yield where, f"{name}:{first + i + 1}", _record(selected.slice(i, 1), where) if records is None else records[i]
        first += batch.num_rows


def _record(row: pa.RecordBatch, where: str) -> dict[str, Any] | DataError:
    size = _expanded_bytes(row.columns)
    if size > LONGEST_BYTES:
        return DataError(f"{where}: {size >> 20:,} MiB, and at most {LONGEST_BYTES >> 20} are read of one record; remove a column")
    record = {}
    for column, values in zip(row.schema, row.columns, strict=True):
        try:
            record[column.name] = values[0].as_py()
        except UnicodeDecodeError:
            return DataError(f"{where}: the column {column.name!r} holds text that is not UTF-8; convert it")
        except (pa.ArrowException, ValueError, OverflowError):
            return DataError(
                f"{where}: the column {column.name!r} holds a {column.type} beyond what Python can hold, such as the year 10000; change it"
            )
    return record


def _leave_out(field: pa.Field, reading: Reading) -> bool:
    """Return True if a column has bytes and is not content, and record it in `left_out`. Bytes as content raise an error later."""
    if field.name in reading.content or not _has_bytes(field.type):
        return False
    reading.left_out[field.name] = "binary"
    return True


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _has_bytes(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return kind.extension_name not in _READABLE and _has_bytes(kind.storage_type)
    types = pa.types
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return True
    return any(_has_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _expanded_bytes(arrays: Iterable[pa.Array]) -> int:
    """Return the size of arrays in bytes if repeated values were not shared."""
    total = 0
    for array in arrays:
        kind = array.type
        if pa.types.is_dictionary(kind):
            values = array.dictionary
            lengths = pc.binary_length(values) if _is_bytes_like(values.type) else None
            total += 8 * len(array) if lengths is None else pc.sum(pc.take(lengths, array.indices)).as_py() or 0
        elif isinstance(kind, pa.BaseExtensionType):
            total += _expanded_bytes([array.storage])
        elif pa.types.is_struct(kind):
            total += _expanded_bytes(array.flatten())
        elif pa.types.is_map(kind):
            total += _expanded_bytes([array.keys, array.items])
        elif pa.types.is_nested(kind) and not pa.types.is_union(kind):
            total += _expanded_bytes([array.flatten()])
        else:
            total += array.nbytes
    return total


def _is_bytes_like(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
