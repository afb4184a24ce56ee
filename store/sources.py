"""What a corpus is read from: files, folders and datasets, each as a stream of records.

One record at a time is in memory (of tables one batch, of text files one file), so the size of a corpus does not matter. A record that
cannot be read comes out as the DataError that says why and where; what cannot be read any further is raised.

In a folder all files are read whose kind is known, in sorted order, but for hidden ones (dot files and all below dot folders), which are
passed over, and dataset cards, licenses and descriptions of datasets. Files that are not read are named, each with the reason.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, cast

from .errors import DataError, NotFoundError, UsageError

_TEXT = (".txt", ".md")
_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", *_TEXT)
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_READ = f"{', '.join(_KINDS)}, all but Parquet also with {', '.join(_COMPRESSIONS)}"
_CARDS = ("README", "LICENSE", "LICENCE")
_CARD_KINDS = ("", ".md", ".rst", *_TEXT)
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_NAMED = 5
LONGEST_BYTES = 1 << 28
MOST_COLUMNS = 4096

SplitText = Literal["file", "blank-lines"]
Record = tuple[str, str, Any]  # where it stands, its id if it brings none, and its columns or the DataError


@dataclass(frozen=True)
class Reading:
    """How records are read.

    Attributes:
        text: the column that the text of a text file becomes; `prompt`: the one that may be empty.
        split_text: what a document of a text file is: the whole "file", or the lines between "blank-lines".
        content: columns that hold a document's content, id or source: of CSV they stay text as they stand.
        left_out: column -> what it holds, of those that hold no values that could be kept; filled while records are read.
    """

    text: str
    prompt: str
    split_text: SplitText
    content: frozenset[str]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Source:
    """A file, or a split of a dataset.

    Attributes:
        name: as it was given or found; `short` is its last part.
        files: by which it is known again.
        records: given the name that is shown, and how to read.
    """

    name: str
    short: str
    files: tuple[Path, ...]
    records: Callable[[str, Reading], Iterator[Record]]


@dataclass(frozen=True)
class Unread:
    """A file of a folder that is not read, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        name = self.path.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return f"{name} ({self.reason})"


def expand(given: Sequence[str]) -> tuple[list[Source], list[Unread]]:
    """All that some names stand for, in order, and what lies beside it and is not read.

    Raises:
        NotFoundError, UsageError: a name stands for nothing that can be read.
    """
    parts = [_expand(name) for name in given]
    return [source for sources, _ in parts for source in sources], [file for _, unread in parts for file in unread]


def describe_files(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, size (bytes) and modification time (ns) of every file, those of a folder included; None of a hub's name."""
    files = [file for path in paths for file in (_files(path) if path.is_dir() else [path])]
    stats = [file.stat() if file.is_file() else None for file in files]
    return [
        {"path": str(file), "bytes": stat and stat.st_size, "modified": stat and stat.st_mtime_ns}
        for file, stat in zip(files, stats, strict=True)
    ]


def standard_input() -> Source:
    """JSON lines from standard input."""
    import sys

    return Source("-", "stdin", (), lambda name, how: json_lines(sys.stdin.buffer, name))


def _files(folder: Path) -> list[Path]:
    """What lies in a folder and below, but for what is hidden; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(root, name).is_symlink()]
        found += [Path(root, name) for name in (*names, *links) if not name.startswith(".")]
    return sorted(found)


def _expand(given: str) -> tuple[list[Source], list[Unread]]:
    path = Path(given)
    if path.is_dir():
        return (_saved(given, None), []) if _is_saved(path) else _folder(given)
    if path.is_file():
        reason = _why_unread(path, named=True)
        if reason:
            raise UsageError(f"{path} cannot be read as documents: it is {reason}; what can be read is {_READ}")
        return [_file(path)], []
    if path.exists():
        raise UsageError(f"{given} is neither a file nor a folder (a pipe?), and a build may read it twice; save it to a file")
    base, _, split = given.rpartition(":")
    if base and _is_saved(Path(base)):
        return _saved(base, split), []
    name, *config = base.split(":")
    place = Path(name) if base and Path(name).is_dir() else path  # of files for the hub's own loader
    if not base or (place is path and (path.suffix or given.startswith((".", "/", "~")))):
        raise NotFoundError(f"there is no file or folder {given} (a hub dataset is written name:split or name:config:split)")
    return [Source(given, given, (place,), partial(_hub_dataset, name, config[0] if config else None, split))], []


def _folder(given: str) -> tuple[list[Source], list[Unread]]:
    files = [(path, _why_unread(path)) for path in _files(Path(given))]
    sources = [_file(path) for path, reason in files if reason is None]
    unread = [Unread(path, reason) for path, reason in files if reason is not None]
    if not sources:
        has = f"; it has {', '.join(map(str, unread[:_NAMED]))}{' ...' if len(unread) > _NAMED else ''}" if unread else ""
        raise NotFoundError(f"{given} has no file that can be read as documents ({_READ}), nor a saved dataset{has}")
    return sources, unread


def _kind(path: Path) -> tuple[str, str]:
    """The endings that say what a file holds, and how it is compressed."""
    name = path.name.lower()
    compression = next((ending for ending in _COMPRESSIONS if name.endswith(ending)), "")
    return Path(name.removesuffix(compression)).suffix, compression


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _why_unread(path: Path, named: bool = False) -> str | None:
    """Why a file is not read; a text file that is `named` is, whatever it is called."""
    kind, compression = _kind(path)
    card = path.name.upper().startswith(_CARDS) and kind in _CARD_KINDS and not named
    reasons = {
        "named in bytes that are not UTF-8": not _is_text(path.name),
        "a link to a folder": path.is_dir(),
        "no ordinary file": not path.is_file(),
        "a description of a dataset": path.name in _DESCRIPTIONS,
        "a dataset card or license": card,
        "a part of a saved dataset, which is named by its folder": kind == ".arrow",
        "no kind of document": kind not in _KINDS,
        "compressed Parquet, which must be unpacked": kind == ".parquet" and compression,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _file(path: Path) -> Source:
    return Source(str(path), path.name, (path,), partial(_file_records, path))


def _file_records(path: Path, name: str, how: Reading) -> Iterator[Record]:
    from .tables import csv_records, parquet_records

    kind, compression = _kind(path)
    if path.stat().st_size == 0:
        yield name, name, DataError(f"{path} is empty; there are no documents in it")
        return
    try:
        if kind == ".parquet":
            yield from parquet_records(path, name, how)
        elif kind in (".csv", ".tsv"):
            yield from csv_records(partial(_open, path, compression), name, "\t" if kind == ".tsv" else ",", how)
        else:
            with _open(path, compression) as file:
                read: Callable[[IO[bytes], str], Iterator[Record]] = json_lines
                if kind in _TEXT:
                    read = _whole_text if how.split_text == "file" else _paragraphs
                for where, id, record in read(file, name):
                    yield where, id, {how.text: record} if isinstance(record, str) else record
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if not compression or getattr(error, "errno", None):
            raise
        raise DataError(
            f"{name}: the {_COMPRESSIONS[compression]} data is damaged, or ends too early; fetch or make the file again"
        ) from error


def _open(path: Path, compression: str) -> IO[bytes]:
    if compression == ".zst":
        import pyarrow as pa

        return cast("IO[bytes]", io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")))
    opened: dict[str, Any] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast("IO[bytes]", opened[compression](path, "rb"))


def lines(file: IO[bytes], name: str) -> Iterator[tuple[str, int, str | DataError]]:
    """The lines of a UTF-8 file, which end at a newline and nowhere else, as (where, number, line with its end or the error)."""
    number = 0
    while line := file.readline(LONGEST_BYTES):
        number += 1
        where = f"{name} line {number}"
        if len(line) == LONGEST_BYTES:
            raise DataError(f"{where}: longer than {LONGEST_BYTES >> 20} MiB; is this file really lines?")
        try:
            yield where, number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield where, number, DataError(f"{where}: not UTF-8; convert the file, for instance with iconv")


def parse_json(text: str) -> Any:
    """JSON, of which Python's limits are not secret.

    Raises:
        ValueError: says what is wrong, in words that go behind a colon.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if "BOM" in error.msg:
            raise ValueError("not valid JSON (a byte order mark stands before it; remove it)") from error
        raise ValueError(f"not valid JSON ({error.msg[:1].lower()}{error.msg[1:]}, at character {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError("not valid JSON that can be read: it is nested too deeply") from error
    except _DoubledKeyError:
        raise
    except ValueError as error:
        raise ValueError("not valid JSON that can be read: a number has more than 4,300 digits; write it as text") from error


class _DoubledKeyError(ValueError):
    """A JSON object names a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise _DoubledKeyError(f"not one thing: duplicate key {doubled[:80]!r} in an object")
    return found


def json_lines(file: IO[bytes], name: str) -> Iterator[Record]:
    """An object on each line that is not blank."""
    for where, number, line in lines(file, name):
        id = f"{name}:{number}"
        if isinstance(line, DataError):
            yield where, id, line
        elif line.strip():
            try:
                record = parse_json(line)
            except ValueError as error:
                yield where, id, DataError(f"{where}: {error}; there must be one JSON object on each line")
                continue
            if isinstance(record, dict):
                yield where, id, record
            else:
                kind = type(record).__name__
                yield where, id, DataError(f"{where}: a JSON {kind}, not an object; there must be one object on each line")


def _whole_text(file: IO[bytes], name: str) -> Iterator[Record]:
    content = file.read(LONGEST_BYTES + 1)
    if len(content) > LONGEST_BYTES:
        reason = f"{name}: longer than {LONGEST_BYTES >> 20} MiB, too long for one document; cut it, or use --split-text blank-lines"
        yield name, name, DataError(reason)
        return
    try:
        yield name, name, content.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield name, name, DataError(f"{name}: not UTF-8; convert the file, for instance with iconv")


def _paragraphs(file: IO[bytes], name: str) -> Iterator[Record]:
    """What stands between lines that are blank, exactly, without the last line's end."""
    held: list[str] = []
    at = name, name

    def paragraph() -> str:
        text = "".join(held)
        held.clear()
        return text.removesuffix("\n").removesuffix("\r")

    for where, number, line in lines(file, name):
        if isinstance(line, DataError):
            yield where, f"{name}:{number}", line
        elif line.strip():
            at = at if held else (where, f"{name}:{number}")
            held.append(line)
        elif held:
            yield *at, paragraph()
    if held:
        yield *at, paragraph()


def _is_saved(path: Path) -> bool:
    """Whether a folder holds what `datasets` saves: a dataset, or several as splits."""
    return (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and (path / "dataset_info.json").is_file())


def _saved(given: str, split: str | None) -> list[Source]:
    """A saved dataset: one source, or of splits one each, or the one that is named."""
    path = Path(given)
    if not (path / "dataset_dict.json").is_file():
        if split is not None:
            raise UsageError(f"{given} is one dataset, without splits; name it without :{split}")
        return [Source(given, path.resolve().name, (path,), partial(_saved_records, path))]
    try:
        known = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
        splits = [name for name in known if isinstance(name, str) and name == Path(name).name]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path / 'dataset_dict.json'} does not list a dataset's splits; save the dataset again") from error
    if not splits or split not in (None, *splits):
        raise NotFoundError(f"{given} has no split {split!r}; it has {', '.join(splits) or 'none'}")
    return [
        Source(f"{given}:{name}", f"{path.resolve().name}:{name}", (path / name,), partial(_saved_records, path / name))
        for name in splits
        if split in (None, name)
    ]


def _saved_records(path: Path, name: str, how: Reading) -> Iterator[Record]:
    import datasets

    from .tables import table_records

    try:
        loaded = datasets.load_from_disk(str(path)).with_format("arrow")
        yield from table_records(_validated(loaded), name, how)
    except DataError:
        raise
    except Exception as error:  # whatever the library says of files that are not what it saved
        raise DataError(f"{name}: the saved dataset at {path} cannot be read ({type(error).__name__}); save it again") from error


def _validated(dataset: Any) -> Iterator[Any]:
    """A dataset's batches, each checked whole: its files, which anybody may have written, are read through memory maps."""
    for table in dataset.iter(batch_size=256):
        for batch in table.to_batches():
            batch.validate(full=True)
            yield batch


def _hub_dataset(dataset: str, config: str | None, split: str, name: str, how: Reading) -> Iterator[Record]:
    import datasets

    try:
        stream = datasets.load_dataset(dataset, config, split=split, streaming=True)
    except Exception as error:  # the hub client raises a zoo of its own; whatever it was, the dataset cannot be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotFoundError(f"the dataset {dataset} (split {split}) cannot be loaded: {reason}") from error
    for column, feature in (stream.features or {}).items():
        if getattr(feature, "decode", False) is True:  # images and sounds, as bytes
            stream = stream.cast_column(column, type(feature)(decode=False))
    for number, record in enumerate(stream, 1):
        yield f"{name} record {number}", f"{name}:{number}", record
