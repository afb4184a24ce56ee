"""Corpora as they lie around: files, folders and hub datasets, read as a stream of documents.

One document at a time is in memory (Parquet: one batch), so the size of the corpus does not matter. A document that cannot be used
comes out as the DataError that says why and where; the reader's caller decides whether that ends the build or is counted.
"""

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
from jaxtyping import Float32

from .errors import DataError, NotFoundError, UsageError

_TEXT_SUFFIXES = (".txt", ".md")
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", *_TEXT_SUFFIXES)
_LINE_LIMIT_BYTES = 1 << 28
_PARQUET_BATCH = 256

Form = Literal["auto", "text", "completion", "chat", "vector"]


@dataclass(frozen=True)
class Fields:
    """Which columns of a record hold what; `form` says which of them to use, "auto" takes the first that a record has."""

    form: Form = "auto"
    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    features: str = "features"
    label: str = "label"
    id: str = "id"
    source: str = "source"


@dataclass(frozen=True)
class Document:
    """One document, before any tokenizer: exactly one of text, completion (with its prompt), messages and features (with a label) is set.

    Attributes:
        where: file and line, for messages to people.
        prompt_messages: how many of the messages are a prompt; the loss is on all that follows them, and where this is 0 on the
            assistant's turns.
        template: what the chat template is given besides the messages: `tools`, and its own options.
    """

    id: str
    source: str
    where: str
    text: str | None = None
    prompt: str = ""
    completion: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt_messages: int = 0
    template: Mapping[str, Any] = field(default_factory=dict)
    features: Float32[np.ndarray, " size"] | None = None
    label: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


_PREFERENCES = " (of preference pairs, what was trained as text is the field chosen: name it as the completion)"


def read_corpus(sources: Sequence[str], fields: Fields = Fields()) -> Iterator[Document | DataError]:
    """Stream the documents of all sources, in order.

    A source is a file (.jsonl, .csv, .tsv, .parquet, .txt, .md, all but Parquet also with .gz), a folder of such files or of a
    dataset saved with `datasets`, or a hub dataset as `name[:config]:split`.

    Raises:
        NotFoundError, UsageError: a source does not exist, or is nothing that can be read.
    """
    files = [(name, opener) for source in sources for name, opener in _expand(source)]
    names = _display_names([name for name, _ in files])
    for (_, records), name in zip(files, names, strict=True):
        for where, record in records(name):
            yield record if isinstance(record, DataError) else _document(record, name, where, fields)


def describe_sources(sources: Sequence[str]) -> list[dict[str, Any]]:
    """Name, size (bytes) and modification time (ns) of every file, by which a resumed build knows its corpus again."""
    described: list[dict[str, Any]] = []
    for source in sources:
        path = Path(source)
        files = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
        for file in files:
            stat = file.stat() if file.is_file() else None
            described.append({"path": str(file), "bytes": stat and stat.st_size, "modified": stat and stat.st_mtime_ns})
    return described


def _document(record: Mapping[str, Any], name: str, where: str, fields: Fields) -> Document | DataError:
    number = where.rsplit(" ", 1)[-1]
    used = {fields.id, fields.source}
    base: dict[str, Any] = {"where": where}
    try:
        base["id"] = _as_text(record, fields.id) if record.get(fields.id) is not None else f"{name}:{number}"
        base["source"] = _as_text(record, fields.source) if record.get(fields.source) is not None else name
        form = fields.form if fields.form != "auto" else _detect(record, fields)
        if form == "chat":
            used |= {fields.messages, *_TEMPLATE}
            content: dict[str, Any] = {"messages": _messages(record, fields.messages), "template": _template(record)}
        elif form == "completion":
            used |= {fields.prompt, fields.completion}
            if isinstance(record.get(fields.prompt), list) and isinstance(record.get(fields.completion), list):
                used |= set(_TEMPLATE)
                asked, said = (_messages(record, name) for name in (fields.prompt, fields.completion))
                content = {"messages": [*asked, *said], "prompt_messages": len(asked), "template": _template(record)}
            else:
                content = {"prompt": _as_text(record, fields.prompt), "completion": _as_text(record, fields.completion)}
        elif form == "vector":
            used |= {fields.features, fields.label}
            content = {"features": _vector(record, fields.features), "label": _label(record, fields.label)}
        else:
            used.add(fields.text)
            content = {"text": _as_text(record, fields.text)}
    except KeyError as error:
        return DataError(
            f"{where}: there is no field {error.args[0]}, only {', '.join(map(repr, record)) or 'none'}; "
            "name yours with --text-field, --prompt-field and --completion-field, or --messages-field"
            + (_PREFERENCES if {"chosen", "rejected"} <= record.keys() else "")
        )
    except ValueError as error:
        return DataError(f"{where}: {error}")
    metadata = {k: v for k, v in record.items() if k not in used and not _is_nothing(v)}
    try:
        json.dumps(metadata, ensure_ascii=False, allow_nan=False, default=str).encode()
    except (ValueError, TypeError, RecursionError) as error:
        return DataError(f"{where}: a metadata column holds what is no text, finite number or list of such ({error})")
    return Document(**base, **content, metadata=metadata)


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # NaN is how tables say nothing


def _detect(record: Mapping[str, Any], fields: Fields) -> Form:
    if fields.messages in record:
        return "chat"
    if fields.prompt in record and fields.completion in record:
        return "completion"
    if fields.text in record:
        return "text"
    raise KeyError(f"{fields.text!r}, {fields.messages!r}, or {fields.prompt!r} with {fields.completion!r}")


def _as_text(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise KeyError(repr(key))
    value = record[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"the field {key!r} holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the field {key!r} holds half of a surrogate pair, which is no character") from error
    return value


def _vector(record: Mapping[str, Any], key: str) -> Float32[np.ndarray, " size"]:
    if key not in record:
        raise KeyError(repr(key))
    try:
        vector = np.asarray(record[key], np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"the field {key!r} is not a list of numbers") from error
    if vector.ndim != 1 or len(vector) == 0 or not np.isfinite(vector).all():
        raise ValueError(f"the field {key!r} is not a list of finite numbers")
    return vector


def _label(record: Mapping[str, Any], key: str) -> int:
    if key not in record:
        raise KeyError(repr(key))
    value = record[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise ValueError(f"the field {key!r} is {value!r}, not a class: a whole number from 0")
    return value


_SHARED_ROLES = {"human": "user", "gpt": "assistant"}
_TEMPLATE = ("tools", "chat_template_kwargs")


def _messages(record: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Chat messages, without the nulls by which tables fill keys that a message lacks; ShareGPT's `from` and `value` are read, too."""
    if key not in record:
        raise KeyError(repr(key))
    value = _without_nulls(record[key])
    if isinstance(value, list) and all(isinstance(m, dict) and {"from", "value"} <= m.keys() for m in value):
        value = [{"role": _SHARED_ROLES.get(str(m["from"]), m["from"]), "content": m["value"]} for m in value]
    if not (isinstance(value, list) and value and all(_is_message(m) for m in value)):
        raise ValueError(f'the field {key!r} must be a list of messages like [{{"role": "user", "content": "..."}}, ...]')
    try:
        json.dumps(value, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the field {key!r} holds half of a surrogate pair, which is no character") from error
    return value


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and len(message) > 1


def _template(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record gives its chat template besides messages."""
    given = _without_nulls({name: record[name] for name in _TEMPLATE if record.get(name) is not None})
    for name, value in given.items():
        if isinstance(value, str):
            try:
                given[name] = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"the field {name!r} is text that is not JSON") from error
    tools, options = given.get("tools"), given.get("chat_template_kwargs", {})
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("the field 'tools' must be a list of JSON objects, each of which describes a tool")
    if not isinstance(options, dict) or options.keys() & {"messages", "tools", "add_generation_prompt", "chat_template", "tokenize"}:
        raise ValueError("the field 'chat_template_kwargs' must be an object of the template's own options, such as enable_thinking")
    return {**options, **({"tools": tools} if tools else {})}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _expand(source: str) -> list[tuple[str, Any]]:
    """The readers of one source: (name, function from a display name to (where, record) pairs)."""
    path = Path(source)
    if source == "-":
        import sys

        return [("stdin", lambda name: _jsonl(sys.stdin.buffer, name))]
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return [(source, lambda name: _saved_dataset(path, name))]
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and _suffix(p) in _SUFFIXES]
        if not files:
            raise NotFoundError(f"{source} has no file that can be read as documents ({', '.join(_SUFFIXES)}), nor a saved dataset")
        return [(str(p), _reader(p)) for p in files]
    if path.is_file():
        return [(source, _reader(path))]
    if path.exists():
        raise UsageError(f"{source} is neither a file nor a folder (a pipe?), and a build may read it twice; save it to a file")
    if path.suffix or source.startswith((".", "/", "~")) or ":" not in source:
        raise NotFoundError(f"there is no file or folder {source} (a hub dataset is written name:split or name:config:split)")
    name, *config, split = source.split(":")
    return [(source, lambda shown: _hub_dataset(name, config[0] if config else None, split, shown))]


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _reader(path: Path) -> Any:
    suffix = _suffix(path)
    if suffix not in _SUFFIXES:
        raise UsageError(f"{path} is of no kind that can be read as documents ({', '.join(_SUFFIXES)})")
    if path.stat().st_size == 0:
        return lambda name: iter([(name, DataError(f"{path} is empty; there are no documents in it"))])
    if suffix == ".parquet":
        return lambda name: _parquet(path, name)

    def records(name: str) -> Iterator[tuple[str, Any]]:
        with cast("IO[bytes]", gzip.open(path) if path.suffix == ".gz" else open(path, "rb")) as file:
            if suffix in _TEXT_SUFFIXES:
                yield from _paragraphs(file, name)
            elif suffix in (".csv", ".tsv"):
                yield from _csv(file, name, "\t" if suffix == ".tsv" else ",")
            else:
                yield from _jsonl(file, name)

    return records


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[str, str | DataError]]:
    number = 0
    try:
        while line := file.readline(_LINE_LIMIT_BYTES):
            number += 1
            where = f"{name} line {number}"
            if len(line) == _LINE_LIMIT_BYTES:
                raise DataError(f"{where}: longer than {_LINE_LIMIT_BYTES >> 20} MiB; is this file really lines?")
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                yield where, DataError(f"{where}: not UTF-8; convert the file, for instance with iconv")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name} after line {number}: the gzip data is broken ({error})") from error


def _jsonl(file: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(file, name):
        if isinstance(line, DataError):
            yield where, line
        elif line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, DataError(f"{where}: not valid JSON ({error}); there must be one JSON object on each line")
                continue
            if isinstance(record, dict):
                yield where, record
            else:
                yield where, DataError(f"{where}: a JSON {type(record).__name__}, not an object; there must be one object on each line")


def _csv(file: IO[bytes], name: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_LINE_LIMIT_BYTES)
    reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"{name} line 1: two columns have the same name")
        for number, row in enumerate(reader, 1):
            where = f"{name} record {number}"
            if not row:
                continue
            if len(row) == len(header):
                yield where, dict(zip(header, row, strict=True))
            else:
                yield where, DataError(f"{where} (line {reader.line_num}): {len(row)} columns where the header has {len(header)}")
    except (csv.Error, UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name} near line {reader.line_num + 1}: not readable as CSV ({error})") from error


def _paragraphs(file: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    lines: list[str] = []
    start = ""
    for where, line in _lines(file, name):
        if isinstance(line, DataError):
            yield where, line
        elif line.strip():
            start = start if lines else where
            lines.append(line)
        elif lines:
            yield start, {"text": "".join(lines).strip()}
            lines = []
    if lines:
        yield start, {"text": "".join(lines).strip()}


def _parquet(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if len(set(file.schema_arrow.names)) != len(file.schema_arrow.names):
                raise DataError(f"{name}: two columns have the same name")
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{name} record {number}", record
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: not readable as Parquet ({str(error).splitlines()[0]})") from error


def _saved_dataset(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    splits = loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]
    number = 0
    for split in splits:
        for record in split:
            number += 1
            yield f"{name} record {number}", record


def _hub_dataset(dataset: str, config: str | None, split: str, name: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        stream = datasets.load_dataset(dataset, config, split=split, streaming=True)
    except Exception as error:  # the hub client raises a zoo of its own; whatever it was, the dataset cannot be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotFoundError(f"the dataset {dataset} (split {split}) cannot be loaded: {reason}") from error
    for number, record in enumerate(stream, 1):
        yield f"{name} record {number}", record


def _display_names(names: list[str]) -> list[str]:
    """File names for people and ids: the last part where that tells the files apart, else the whole path."""
    short = [Path(name).name if ":" not in name else name for name in names]
    return short if len(set(short)) == len(short) else names


_QUESTION = ("prompt", "completion", "text", "messages", "tools", "row", "against", "span", "weight")


def read_questions(file: str) -> Iterator[dict[str, Any]]:
    """The questions of a JSON-lines file (`-` is standard input): prompt and completion, text, messages (with tools), or row.

    Optional are an id, another completion `against` which to hold it, a `span` that alone is asked about, and a `weight` for a mean of
    questions.

    Raises:
        NotFoundError: no such file.
        DataError: a line is no question; names it.
    """
    if file != "-" and not Path(file).is_file():
        raise NotFoundError(f"there is no file {file}")
    ((name, records),) = _expand(file)
    for where, record in records(Path(name).name):
        if isinstance(record, DataError):
            raise record
        wrong = _question_problem(record) or _chat_problem(record)
        if wrong:
            raise DataError(f"{where}: {wrong}")
        question = {k: record[k] for k in _QUESTION if record.get(k) is not None}
        yield question | {"id": str(where if record.get("id") is None else record["id"])}


def _question_problem(record: Mapping[str, Any]) -> str | None:
    options = sorted({"k", "mode", "damping", "opponents", "where", "layers", "weights"} & record.keys())
    if options:
        return f"{options[0]} is an option of the command, the same for all questions of a file, not a field of a question"
    given = [k for k in ("completion", "text", "messages", "row") if record.get(k) is not None]
    if len(given) != 1 or (record.get("prompt") and given != ["completion"]):
        return "a question is a prompt with a completion, or a text, or messages, or a row: give exactly one of them"
    for key in ("prompt", "completion", "text", "against", "span"):
        if record.get(key) is not None and not isinstance(record[key], str):
            return f"{key} holds {type(record[key]).__name__}, not text"
    if "row" in given and (not isinstance(record["row"], int) or isinstance(record["row"], bool)):
        return f"row is {record['row']!r}, not a whole number"
    weight = record.get("weight")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float))):
        return f"weight is {weight!r}, not a number"
    return None


def _chat_problem(record: Mapping[str, Any]) -> str | None:
    try:
        if record.get("messages") is not None:
            _messages(record, "messages")
            _template(record)
    except ValueError as error:
        return str(error)
    return None
