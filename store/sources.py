"""Sources of a corpus: files, folders and datasets, each as a stream of records.

One record is in memory at a time (one batch of a table, one file of text), so a corpus can be larger than memory. An unreadable record is
yielded as a DataError that names the reason and the place; a source that cannot be read further raises an error.

The files of a folder are read in sorted order if their kind is supported, except hidden files (also below hidden folders), dataset cards,
licenses and dataset descriptions. Files that are not read are reported with the reason, except hidden ones.

Large sources are read in ranges, by several processes: files of JSON lines by bytes, Parquet files by row groups, saved datasets by rows.
"""

import bz2
import gzip
import io
import json
import lzma
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from .errors import DataError, NotFoundError, UsageError, first_line
from .extras import require
from .fields import SplitText
from .files import sha256
from .objects import StorePath, fetched, local_or_store, open_from

_TEXT = (".txt", ".md")
_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", *_TEXT)
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_READ = f"{', '.join(_KINDS)}, all but Parquet also with {', '.join(_COMPRESSIONS)}"
_CARDS = ("README", "LICENSE", "LICENCE")
_CARD_KINDS = ("", ".md", ".rst", *_TEXT)
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_REPORTED = 5  # unread files in an error message
LONGEST_BYTES = 1 << 28
_COUNTED_BYTES = 1 << 20
MOST_COLUMNS = 4096


ByteFile = io.BufferedIOBase | IO[bytes]  # compressed or not; typing knows standard input as the latter
Record = tuple[str, str, Any]  # its place, its default id, and its columns or the DataError


class Range(NamedTuple):
    """A range of a source: of the bytes of a file of lines, of a Parquet file's row groups, or of a dataset's rows.

    A line belongs to the range that holds its first byte.

    Attributes:
        first: number of records (lines) of the source before the range.
    """

    start: int
    stop: int
    first: int = 0


@dataclass(frozen=True)
class Reading:
    """Options for reading records.

    Attributes:
        text: the column for the text of a text file.
        prompt: the column in which an empty CSV cell is an empty text.
        split_text: a document of a text file: the full "file", or the lines between "blank-lines".
        content: the columns of a document's content, id and source, which CSV reads as text.
        left_out: by name, the type of columns whose values cannot be stored; filled while records are read.
    """

    text: str
    prompt: str
    split_text: SplitText
    content: frozenset[str]
    left_out: dict[str, str]


def _one_range(size: int) -> list[Range]:
    """Return no range: the source is read as one."""
    return []


@dataclass(frozen=True)
class Source:
    """A file, or a split of a dataset.

    Attributes:
        name: the path or name; `short` is its last part.
        files: the files of its records, as they were named; a folder stands for all files in it.
        records: a function from a display name, a `Reading`, and a range, if not all are to be read, to the records.
        ranges: a function from a number of bytes to the ranges of about that size which can be read apart; none if all must be read as one.
        has_lines: the ranges are of lines, whose numbers `count_lines` finds.
        place: absolute path of the file or folder; None for a hub dataset and standard input.
    """

    name: str
    short: str
    files: tuple[Path, ...]
    records: Callable[[str, Reading, Range | None], Iterator[Record]]
    ranges: Callable[[int], list[Range]] = _one_range
    has_lines: bool = False
    place: Path | None = None

    @property
    def bytes(self) -> int:
        """Size of the files; 0 if there are none on this machine."""
        return sum(file.stat().st_size for file in files_in(self.place)) if self.place is not None and self.place.exists() else 0

    def checksum(self, selection: Range | None) -> int | None:
        """Return the CRC-32C of the files, or of a range of lines, as this machine has them; None if it has none.

        Objects of a store are the same for all machines: 0.
        """
        if self.place is None or not self.place.exists():
            return None
        if isinstance(self.place, StorePath):
            return 0
        return _checksum(self.place, selection if self.has_lines else None)


@lru_cache(4096)
def _checksum(place: Path, selection: Range | None) -> int:
    import google_crc32c

    value = 0
    for path in files_in(place):
        left = path.stat().st_size if selection is None else selection.stop - selection.start
        with open_from(path, selection.start if selection else 0) as file:
            while left > 0 and (content := file.read(min(left, _COUNTED_BYTES))):
                value = google_crc32c.extend(value, content)
                left -= len(content)
    return value


@dataclass(frozen=True)
class Unread:
    """A file of a folder that is not read, with the reason."""

    path: Path
    reason: str

    def __str__(self) -> str:
        name = self.path.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return f"{name} ({self.reason})"


def expand(names: Sequence[str]) -> tuple[list[Source], list[Unread]]:
    """Resolve names to sources, in order, and to the unread files of their folders.

    Raises:
        NotFoundError, UsageError: a source does not exist or cannot be read.
    """
    pairs = [_expand(name) for name in names]
    return [source for sources, _ in pairs for source in sources], [file for _, unread in pairs for file in unread]


def describe_files(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return path, size (bytes) and SHA-256 of all files, also in folders; size and SHA-256 of a hub dataset are None.

    An object of a store is described by the store's tag of its content instead of a SHA-256, so that it need not be fetched.

    Raises:
        UsageError: a file cannot be read.
    """
    described: list[dict[str, Any]] = []
    for file in (file for path in paths for file in files_in(path)):
        entry = file.entry if isinstance(file, StorePath) else None
        if entry is not None and entry.tag:
            described.append({"path": str(file), "bytes": entry.size, "sha256": None, "tag": entry.tag})
            continue
        try:
            size, checksum = (file.stat().st_size, sha256(file)) if file.is_file() else (None, None)
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}; give a file that you may read") from error
        described.append({"path": str(file), "bytes": size, "sha256": checksum})
    return described


def standard_input() -> Source:
    """Return a source of JSON lines from standard input."""
    import sys

    return Source("-", "stdin", (), lambda name, reading, selection: json_lines(sys.stdin.buffer, name))


def files_in(folder: Path) -> list[Path]:
    """Return the files in a folder and below, except hidden ones; links to folders are not followed. A file is returned itself."""
    if folder.is_file() or not folder.is_dir():
        return [folder]

    def fail(error: OSError) -> None:
        raise error

    if isinstance(folder, StorePath):
        mirror, key = folder.place
        keys = [found for found in mirror.tree(key) if not any(part.startswith(".") for part in found.removeprefix(key).split("/"))]
        return sorted(mirror.path / found for found in keys)
    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(root, name).is_symlink()]
        files += [Path(root, name) for name in (*names, *links) if not name.startswith(".")]
    return sorted(files)


def _expand(name_or_path: str) -> tuple[list[Source], list[Unread]]:
    path = local_or_store(name_or_path)
    if isinstance(path, StorePath):
        if path.is_dir():
            return _folder(name_or_path)
        prefix, _, name = name_or_path.rpartition("/")
        path = local_or_store(prefix) / name
        if not isinstance(path, StorePath) or not path.is_file():
            raise NotFoundError(f"there is no object or prefix {name_or_path}")
    if path.is_dir():
        return (_saved(name_or_path, None), []) if _is_saved(path) else _folder(name_or_path)
    if path.is_file():
        reason = _why_unread(path, named=True)
        if reason:
            raise UsageError(f"{path} cannot be read as documents: it is {reason}; what can be read is {_READ}")
        return [_file(path)], []
    if path.exists():
        raise UsageError(f"{name_or_path} is neither a file nor a folder (a pipe?), and a build may read it twice; save the data to a file")
    base, _, split = name_or_path.rpartition(":")
    if base and _is_saved(Path(base)):
        return _saved(base, split), []
    name, *config = base.split(":")
    local = Path(name) if base and Path(name).is_dir() else path  # a folder for the loader of hub datasets
    if not base or (local is path and (path.suffix or name_or_path.startswith((".", "/", "~")))):
        raise NotFoundError(f"there is no file or folder {name_or_path} (a hub dataset is written name:split or name:config:split)")
    return [Source(name_or_path, name_or_path, (local,), partial(_hub_dataset, name, config[0] if config else None, split))], []


def _folder(folder: str) -> tuple[list[Source], list[Unread]]:
    files = [(path, _why_unread(path)) for path in files_in(local_or_store(folder))]
    sources = [_file(path) for path, reason in files if reason is None]
    unread = [Unread(path, reason) for path, reason in files if reason is not None]
    if not sources:
        details = f"; it has {', '.join(map(str, unread[:_REPORTED]))}{' ...' if len(unread) > _REPORTED else ''}" if unread else ""
        raise NotFoundError(f"{folder} has no file that can be read as documents ({_READ}), nor a saved dataset{details}")
    return sources, unread


def _kind(path: Path) -> tuple[str, str]:
    """Return the endings of a file's name for its kind and its compression."""
    name = path.name.lower()
    compression = next((ending for ending in _COMPRESSIONS if name.endswith(ending)), "")
    return Path(name.removesuffix(compression)).suffix, compression


def _why_unread(path: Path, named: bool = False) -> str | None:
    """Return the reason why a file is not read; None if it is read. A dataset card is read if the user `named` the file."""
    kind, compression = _kind(path)
    is_card = path.name.upper().startswith(_CARDS) and kind in _CARD_KINDS and not named
    reasons = {
        "named in bytes that are not UTF-8": path.name.encode(errors="replace").decode() != path.name,
        "a link to a folder": not isinstance(path, StorePath) and path.is_dir(),
        "no ordinary file": not path.is_file(),
        "a description of a dataset": path.name in _DESCRIPTIONS,
        "a dataset card or license": is_card,
        "a part of a saved dataset, which is named by its folder": kind == ".arrow",
        "no kind of document": kind not in _KINDS,
        "compressed Parquet, which must be unpacked": kind == ".parquet" and compression,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _file(path: Path) -> Source:
    kind, compression = _kind(path)
    place = path.absolute()  # other processes may have another working directory
    ranges: Callable[[int], list[Range]] = _one_range
    has_lines = kind not in (".csv", ".tsv", ".parquet", *_TEXT) and not compression
    if has_lines:
        ranges = partial(_byte_ranges, place)
    elif kind == ".parquet":
        ranges = partial(_row_group_ranges, place)
    return Source(str(path), path.name, (path,), partial(_file_records, place), ranges, has_lines, place)


def _byte_ranges(path: Path, size: int) -> list[Range]:
    total = path.stat().st_size
    return [Range(start, min(start + size, total)) for start in range(0, total, size)]


def _row_group_ranges(path: Path, size: int) -> list[Range]:
    from .tables import row_groups

    total = path.stat().st_size
    if total <= size:
        return []
    rows = row_groups(path)
    together = max(1, int(size * len(rows) / total))  # row groups in a range
    return [Range(start, min(start + together, len(rows)), sum(rows[:start])) for start in range(0, len(rows), together)]


def count_lines(path: Path, selection: Range) -> int:
    """Count the lines of a file that begin in a range of its bytes."""
    count = int(selection.start == 0)
    start = max(selection.start - 1, 0)
    left = selection.stop - 1 - start
    with open_from(path, start) as file:
        while left > 0 and (content := file.read(min(left, _COUNTED_BYTES))):
            count += content.count(b"\n")
            left -= len(content)
    return count


def _file_records(path: Path, name: str, reading: Reading, selection: Range | None = None) -> Iterator[Record]:
    from .tables import csv_records, parquet_records

    kind, compression = _kind(path)
    if selection is not None and kind != ".parquet":
        with open_from(path, max(selection.start - 1, 0)) as file:
            start = selection.start - 1 + _line_rest(file) if selection.start else 0
            yield from json_lines(file, name, selection.first, selection.stop - start)
        return
    if selection is None:
        path = fetched(path)
    if path.stat().st_size == 0:
        yield name, name, DataError(f"{path} is empty; give a file with documents")
        return
    try:
        if kind == ".parquet":
            yield from parquet_records(path, name, reading, selection)
        elif kind in (".csv", ".tsv"):
            yield from csv_records(partial(_open, path, compression), name, "\t" if kind == ".tsv" else ",", reading)
        else:
            with _open(path, compression) as file:
                reader: Callable[[ByteFile, str], Iterator[Record]] = json_lines
                if kind in _TEXT:
                    reader = _full_text if reading.split_text == "file" else _paragraphs
                for where, id, record in reader(file, name):
                    yield where, id, {reading.text: record} if isinstance(record, str) else record
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if not compression or getattr(error, "errno", None):
            raise
        raise DataError(
            f"{name}: the {_COMPRESSIONS[compression]} data is damaged, or ends too early; fetch or make the file again"
        ) from error


def _open(path: Path, compression: str) -> Any:
    if compression == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    openers: dict[str, Any] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[compression](path, "rb")


def _line_rest(file: ByteFile) -> int:
    """Read the rest of a line; return its number of bytes."""
    size = 0
    while content := file.readline(_COUNTED_BYTES):
        size += len(content)
        if content.endswith(b"\n"):
            break
    return size


def lines(file: ByteFile, name: str, first: int = 0, size: int | None = None) -> Iterator[tuple[str, int, str | DataError]]:
    """Yield the lines of a UTF-8 file, which end only at a newline, as (place, number, line with its end or an error).

    Args:
        first: number of the lines before.
        size: bytes in which the lines must begin; None for all.
    """
    number = first
    left = math.inf if size is None else size
    while left > 0 and (line := file.readline(LONGEST_BYTES)):
        left -= len(line)
        number += 1
        where = f"{name} line {number}"
        if len(line) == LONGEST_BYTES:
            raise DataError(f"{where}: longer than {LONGEST_BYTES >> 20} MiB; give a file of lines")
        try:
            yield where, number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield where, number, DataError(f"{where}: not UTF-8; convert the file, for instance with iconv")


def parse_json(text: str) -> Any:
    """Parse JSON, with plain messages for Python's limits.

    Raises:
        ValueError: the text is not valid; the message is a phrase to follow a colon.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if "BOM" in error.msg:
            raise ValueError("not valid JSON (it starts with a byte order mark; remove it)") from error
        raise ValueError(f"not valid JSON ({error.msg[:1].lower()}{error.msg[1:]}, at character {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError("not valid JSON that can be read: it is nested too deeply") from error
    except _DuplicateKeyError:
        raise
    except ValueError as error:
        raise ValueError("not valid JSON that can be read: a number has more than 4,300 digits; write it as text") from error


class _DuplicateKeyError(ValueError):
    """A JSON object has a duplicate key."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise _DuplicateKeyError(f"not unambiguous: duplicate key {duplicate[:80]!r} in an object")
    return record


def json_lines(file: ByteFile, name: str, first: int = 0, size: int | None = None) -> Iterator[Record]:
    """Yield the records of JSON lines, without blank lines; see `lines`."""
    for where, number, line in lines(file, name, first, size):
        id = f"{name}:{number}"
        if isinstance(line, DataError):
            yield where, id, line
        elif line.strip():
            try:
                record = parse_json(line)
            except ValueError as error:
                yield where, id, DataError(f"{where}: {error}; write one JSON object on each line")
                continue
            if isinstance(record, dict):
                yield where, id, record
            else:
                kind = type(record).__name__
                yield where, id, DataError(f"{where}: a JSON {kind}, not an object; write one JSON object on each line")


def _full_text(file: ByteFile, name: str) -> Iterator[Record]:
    content = file.read(LONGEST_BYTES + 1)
    if len(content) > LONGEST_BYTES:
        reason = f"{name}: longer than {LONGEST_BYTES >> 20} MiB, too long for one document; cut it, or set `split_text` to blank-lines"
        yield name, name, DataError(reason)
        return
    try:
        yield name, name, content.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield name, name, DataError(f"{name}: not UTF-8; convert the file, for instance with iconv")


def _paragraphs(file: ByteFile, name: str) -> Iterator[Record]:
    """Yield the texts between blank lines, without the end of their last line."""
    paragraph_lines: list[str] = []
    place = name, name

    def paragraph() -> str:
        text = "".join(paragraph_lines)
        paragraph_lines.clear()
        return text.removesuffix("\n").removesuffix("\r")

    for where, number, line in lines(file, name):
        if isinstance(line, DataError):
            yield where, f"{name}:{number}", line
        elif line.strip():
            place = place if paragraph_lines else (where, f"{name}:{number}")
            paragraph_lines.append(line)
        elif paragraph_lines:
            yield *place, paragraph()
    if paragraph_lines:
        yield *place, paragraph()


def _is_saved(path: Path) -> bool:
    """Return True if a folder was saved by `datasets`: one dataset, or several as splits."""
    return (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and (path / "dataset_info.json").is_file())


def _saved(name_or_path: str, split: str | None) -> list[Source]:
    """Return the sources of a saved dataset: one, one for each split, or the named split."""
    path = Path(name_or_path)
    if not (path / "dataset_dict.json").is_file():
        if split is not None:
            raise UsageError(f"{name_or_path} is one dataset, without splits; name it without :{split}")
        return [_saved_source(name_or_path, path.resolve().name, path)]
    try:
        names = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
        splits = [name for name in names if isinstance(name, str) and name == Path(name).name]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path / 'dataset_dict.json'} does not list a dataset's splits; save the dataset again") from error
    if not splits or split not in (None, *splits):
        raise NotFoundError(f"{name_or_path} has no split {split!r}; it has {', '.join(splits) or 'none'}")
    return [
        _saved_source(f"{name_or_path}:{name}", f"{path.resolve().name}:{name}", path / name) for name in splits if split in (None, name)
    ]


def _saved_source(name: str, short: str, path: Path) -> Source:
    place = path.absolute()
    return Source(name, short, (path,), partial(_saved_records, place), partial(_row_ranges, place), place=place)


def _row_ranges(path: Path, size: int) -> list[Range]:
    total = sum(file.stat().st_size for file in files_in(path))
    if total <= size:
        return []
    try:
        rows = len(require("datasets", "hub").load_from_disk(str(path)))
    except Exception:  # the library raises many kinds of error for damaged files; reading says which
        return []
    together = max(1, int(size * rows / total))
    return [Range(start, min(start + together, rows), start) for start in range(0, rows, together)]


def _saved_records(path: Path, name: str, reading: Reading, selection: Range | None = None) -> Iterator[Record]:
    from .tables import table_records

    datasets = require("datasets", "hub")
    try:
        dataset = datasets.load_from_disk(str(path)).with_format("arrow")
        if selection is not None:
            dataset = dataset.select(range(selection.start, selection.stop))
        yield from table_records(_validated(dataset), name, reading, selection.first if selection else 0)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds of error for damaged files
        raise DataError(f"{name}: the saved dataset at {path} cannot be read ({type(error).__name__}); save it again") from error


def _validated(dataset: Any) -> Iterator[Any]:
    """Yield a dataset's batches after full validation, since its memory-mapped files may be untrusted."""
    for table in dataset.iter(batch_size=256):
        for batch in table.to_batches():
            batch.validate(full=True)
            yield batch


def _hub_dataset(dataset: str, config: str | None, split: str, name: str, reading: Reading, selection: None = None) -> Iterator[Record]:
    datasets = require("datasets", "hub")
    try:
        stream = datasets.load_dataset(dataset, config, split=split, streaming=True)
    except Exception as error:  # the hub client raises many kinds of error
        raise NotFoundError(
            f"the dataset {dataset} (split {split}) cannot be loaded ({first_line(error)}); check name and connection"
        ) from error
    for column, feature in (stream.features or {}).items():
        if getattr(feature, "decode", False) is True:  # images and sounds, as bytes
            stream = stream.cast_column(column, type(feature)(decode=False))
    for number, record in enumerate(stream, 1):
        yield f"{name} record {number}", f"{name}:{number}", record
