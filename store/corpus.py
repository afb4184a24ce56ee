"""Corpora: a stream of documents from the records of files, folders and hub datasets (see sources.py).

An unusable document is yielded as a DataError that names the reason and the place; the caller raises or counts it.
"""

import contextlib
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import numpy as np

from .errors import DataError, NotFoundError
from .fields import Fields, Form
from .shapes import Float32
from .sources import MOST_COLUMNS, Range, Reading, Source, count_lines, describe_files, expand, lines, parse_json

_METADATA_BYTES = 1 << 24
_LARGEST_IMAGE = 1 << 26  # bytes
_BREAKS_LISTS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
_SURROGATE = "holds half of a surrogate pair, which is not a character"
_Item = TypeVar("_Item")
_STORABLE = (str, int, float, bool, date, time, timedelta, Decimal, UUID)


@dataclass(frozen=True)
class Document:
    """One document before tokenization: a text, a completion with its prompt, messages, a pair, or features or an image with a label.

    Attributes:
        where: file and line, for error messages.
        prompt_messages: the number of messages in the prompt; the loss is on all later messages, or if 0 on the assistant's turns.
        template: the inputs of the chat template besides the messages: `tools` and options.
        rejected: of a pair, whose chosen side the other fields are; its prompt is the same.
        texts: an anchor, a text like it, and texts unlike it.
        label: the class of the text, the vector or the image.
        image: the bytes of an image file.
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
    rejected: "Document | None" = None
    texts: tuple[str, ...] = ()
    features: Float32[np.ndarray, " size"] | None = None
    image: bytes | None = None
    label: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """A source, or a range of one.

    Attributes:
        name: of the source, for messages and default ids.
        checksum: of the files, with which those of another machine are compared; None where there is one machine.
    """

    source: Source
    name: str
    range: Range | None = None
    checksum: int | None = None

    @property
    def is_here(self) -> bool:
        """True if this machine has the files, with the same bytes."""
        if self.checksum is None:
            return self.source.place is not None and self.source.place.exists()
        return self.source.checksum(self.range) == self.checksum

    def with_checksum(self) -> "Slice":
        """Return the slice with its checksum."""
        return replace(self, checksum=self.source.checksum(self.range))

    def count_lines(self) -> int:
        """Count the lines of the range."""
        assert self.source.place is not None
        assert self.range is not None
        return count_lines(self.source.place, self.range)


_TEXTS = "text, or prompt and completion, or messages"
_NAMED = {
    **dict.fromkeys(("auto", "text", "completion", "chat"), _TEXTS),
    "label": f"{_TEXTS}, and label",
    "pair": "chosen and rejected, and prompt",
    "texts": "anchor, positive and negatives",
    "image": "image and label",
    "vector": "features and label",
}
_PREFERENCES = "; for preference pairs, give task dpo, or take the field chosen as the completion"


class Corpus:
    """The documents of several sources, read in order by iteration.

    A source is a file (JSON lines as .jsonl, .ndjson or .json, .csv, .tsv, .txt, .md, each also with .gz, .bz2, .xz or .zst; .parquet), a
    folder of such files, a dataset saved with `datasets` (all splits, or one as `folder:split`), or a hub dataset as `name[:config]:split`.

    Attributes:
        slices: what is read, in order.
        unread: the files of folders that are not read.
        left_out: by name, the type of columns that cannot be stored as metadata; complete after all documents were read.
        columns: names of the columns; complete after all documents were read.

    Raises:
        NotFoundError, UsageError: a source does not exist or cannot be read.
    """

    def __init__(self, sources: Sequence[str], fields: Fields = Fields()) -> None:
        self._fields = fields
        expanded, self.unread = expand(sources)
        self.slices = tuple(map(Slice, expanded, _display_names(expanded)))
        self.left_out: dict[str, str] = {}
        self.columns: set[str] = set()

    @classmethod
    def of(cls, slices: Sequence["Slice"], fields: Fields) -> "Corpus":
        """Return the corpus of some slices."""
        corpus = cls((), fields)
        corpus.slices = tuple(slices)
        return corpus

    def divide(self, size: int) -> list[tuple["Slice", ...]]:
        """Divide the corpus into pieces of about so many bytes, which can be read apart: neighbouring sources, or ranges of a large one.

        Ranges of lines have no numbers yet (`Range.first`); see `count_lines`.
        """
        pieces: list[tuple[Slice, ...]] = []
        pending: list[Slice] = []
        pending_bytes = 0
        for whole in self.slices:
            total = whole.source.bytes
            ranges = whole.source.ranges(size) if total > size else []
            slices = [replace(whole, range=selection) for selection in ranges] if len(ranges) > 1 else [whole]
            for slice in slices:
                if pending and pending_bytes + total / len(slices) > size:
                    pieces.append(tuple(pending))
                    pending = []
                    pending_bytes = 0
                pending.append(slice)
                pending_bytes += total // len(slices)
        return [*pieces, tuple(pending)] if pending else pieces

    @property
    def bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(whole.source.bytes for whole in self.slices)

    def __iter__(self) -> Iterator[Document | DataError]:
        fields = self._fields
        content = {getattr(fields, name) for name in ("text", "prompt", "completion", "messages", "id", "source")}
        content |= {"vector": {fields.features}, "image": {fields.image}, "pair": {fields.chosen, fields.rejected}}.get(fields.form, set())
        reading = Reading(fields.text, fields.prompt, fields.split_text, frozenset(content), self.left_out)
        for slice in self.slices:
            for where, id, record in slice.source.records(slice.name, reading, slice.range):
                if isinstance(record, DataError):
                    yield record
                    continue
                self.columns.update(record)
                check_columns(self.columns, where)
                place = slice.source.place
                folder = None if place is None else place if place.is_dir() else place.parent
                yield _document(record, slice.name, where, id, fields, self.left_out, folder)


def check_columns(columns: Collection[str], where: str) -> None:
    """Refuse a corpus with too many columns.

    Raises:
        DataError: there are more than `MOST_COLUMNS`.
    """
    if len(columns) > MOST_COLUMNS:
        raise DataError(f"{where}: more than {MOST_COLUMNS:,} columns; write them as one column of objects")


def read_corpus(sources: Sequence[str], fields: Fields = Fields()) -> Iterator[Document | DataError]:
    """Iterate over the documents of several sources (see `Corpus`)."""
    return iter(Corpus(sources, fields))


def describe_sources(sources: Sequence[str]) -> list[dict[str, Any]]:
    """Describe all files of the sources (see `describe_files`), by which a resumed build recognizes its corpus."""
    return describe_files([path for source in expand(sources)[0] for path in source.files])


def usable(items: Iterable[_Item | DataError]) -> Iterator[_Item]:
    """Yield what a stream of documents or examples yields; raise its first error."""
    for item in items:
        if isinstance(item, DataError):
            raise item
        yield item


def _document(
    record: Mapping[str, Any], name: str, where: str, id: str, fields: Fields, left_out: dict[str, str], folder: Path | None
) -> Document | DataError:
    used = {fields.id, fields.source}
    base: dict[str, Any] = {"where": where}
    try:
        base["id"] = id if _is_missing(record.get(fields.id)) else _as_text(record, fields.id)
        if _BREAKS_LISTS.search(base["id"]):
            raise ValueError(f"the id {base['id'][:80]!r} holds a control character, which a list of ids cannot contain; fix the id")
        base["source"] = name if _is_missing(record.get(fields.source)) else _as_text(record, fields.source)
        form = fields.form if fields.form != "auto" else _detect(record, fields)
        if form == "vector":
            used |= {fields.features, fields.label}
            content: dict[str, Any] = {"features": _vector(record, fields.features), "label": _optional_label(record, fields.label)}
        elif form == "image":
            used |= {fields.image, fields.label}
            content = {"image": _image(record, fields.image, folder), "label": _optional_label(record, fields.label)}
        elif form == "pair":
            content = _pair(record, fields, base, used)
        elif form == "texts":
            content = {"texts": _texts(record, fields, used)}
        elif form == "label":
            used.add(fields.label)
            content = {**_text(record, _detect(record, fields), fields, used), "label": _label(record, fields.label)}
        else:
            content = _text(record, form, fields, used)
        metadata = _metadata({k: v for k, v in record.items() if k not in used and not _is_missing(v)}, left_out)
    except KeyError as error:
        return DataError(
            f"{where}: there is no field {error.args[0]}, only {', '.join(map(repr, record)) or 'none'}; name yours in "
            f"`fields`: {_NAMED[fields.form]}" + (_PREFERENCES if {"chosen", "rejected"} <= record.keys() and fields.form == "auto" else "")
        )
    except ValueError as error:
        return DataError(f"{where}: {error}")
    return Document(**base, **content, metadata=metadata)


def _text(record: Mapping[str, Any], form: Form, fields: Fields, used: set[str]) -> dict[str, Any]:
    """Return the fields of a document that is a text, and add the columns that they come from to `used`."""
    if form == "chat":
        used |= {fields.messages, *_TEMPLATE}
        return {"messages": chat_messages(record, fields.messages), "template": template_inputs(record)}
    if form == "completion":
        used |= {fields.prompt, fields.completion}
        return _completion(record, fields.prompt, fields.completion, used)
    used.add(fields.text)
    return {"text": _as_text(record, fields.text)}


def _completion(record: Mapping[str, Any], prompt: str, completion: str, used: set[str]) -> dict[str, Any]:
    if isinstance(record.get(prompt), list) and isinstance(record.get(completion), list):
        used |= set(_TEMPLATE)
        before, after = (chat_messages(record, name) for name in (prompt, completion))
        return {"messages": [*before, *after], "prompt_messages": len(before), "template": template_inputs(record)}
    return {"prompt": _as_text(record, prompt), "completion": _as_text(record, completion)}


def _pair(record: Mapping[str, Any], fields: Fields, base: Mapping[str, Any], used: set[str]) -> dict[str, Any]:
    """Return the fields of a preference pair, as TRL's datasets have it: with a prompt, or with one that both sides begin with."""
    used |= {fields.chosen, fields.rejected, fields.prompt}
    sides = fields.chosen, fields.rejected
    if not _is_missing(record.get(fields.prompt)):
        chosen, rejected = (_completion(record, fields.prompt, side, used) for side in sides)
    elif all(isinstance(_value(record, side), list) for side in sides):
        used |= set(_TEMPLATE)
        conversations = [chat_messages(record, side) for side in sides]
        shared = next((i for i, (a, b) in enumerate(zip(*conversations, strict=False)) if a != b), min(map(len, conversations)) - 1)
        chosen, rejected = (
            {"messages": messages, "prompt_messages": shared, "template": template_inputs(record)} for messages in conversations
        )
    else:
        chosen, rejected = ({"prompt": "", "completion": _as_text(record, side)} for side in sides)
    if chosen == rejected:
        raise ValueError("the chosen and the rejected side are the same, so that the pair says nothing; leave it out")
    return {**chosen, "rejected": Document(**base, **rejected)}


def _texts(record: Mapping[str, Any], fields: Fields, used: set[str]) -> tuple[str, ...]:
    """Return an anchor, a text like it and the texts unlike it: of one column, or of `negative`, `negative_1` and so on."""
    texts = [_as_text(record, fields.anchor), _as_text(record, fields.positive)]
    numbered = [name for name in record if re.fullmatch(r"negative(_\d+)?", name) and not _is_missing(record[name])]
    names = [fields.negatives] if not _is_missing(record.get(fields.negatives)) else numbered
    if not names:
        raise ValueError(
            f"there are no negatives (a field {fields.negatives!r}, or 'negative'); those of a training batch are not known, so name texts "
            "that the anchor is unlike"
        )
    used |= {fields.anchor, fields.positive, *names}
    for name in names:
        value = record[name]
        texts += [_as_text({name: item}, name) for item in value] if isinstance(value, (list, tuple)) else [_as_text(record, name)]
    return tuple(texts)


def _image(record: Mapping[str, Any], key: str, folder: Path | None) -> bytes:
    """Return the bytes of an image: those in the record, or of the file that it names, in the folder of the corpus."""
    value = _value(record, key)
    if isinstance(value, Mapping):  # as datasets store images
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, str) or folder is None:
        raise ValueError(f"the field {key!r} is neither the bytes of an image nor the path of one, relative to the corpus's file")
    path = (folder / value).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(f"there is no image {value!r:.200} in the folder of the corpus's file")
    return read_image(path)


def read_image(path: Path) -> bytes:
    """Read an image file.

    Raises:
        ValueError: it is too large.
    """
    if path.stat().st_size > _LARGEST_IMAGE:
        raise ValueError(f"{path} is larger than {_LARGEST_IMAGE >> 20} MiB, which no image of a training set is")
    return path.read_bytes()


def _metadata(columns: Mapping[str, Any], left_out: dict[str, str]) -> dict[str, Any]:
    """Select the columns that can be stored, and convert their values to types of Arrow and JSON; a ValueError names an invalid one."""
    metadata: dict[str, Any] = {}
    for name, value in columns.items():
        unsupported = _unsupported_type(value)
        if unsupported is None:
            metadata[name] = _plain(value)
        else:
            left_out[name] = unsupported
    try:
        size = len(json.dumps(metadata, ensure_ascii=False, allow_nan=False, default=str).encode())
    except (ValueError, RecursionError):
        for name, value in metadata.items():
            _check_column(name, value)
        raise ValueError("its columns are nested too deeply; write them with fewer levels") from None
    if size > _METADATA_BYTES:
        largest = max(metadata, key=lambda name: len(json.dumps(metadata[name], default=str)))
        raise ValueError(f"metadata of {size >> 20} MiB, at most {_METADATA_BYTES >> 20} are stored; leave out the column {largest!r}")
    return metadata


def _check_column(name: str, value: Any) -> None:
    try:
        json.dumps({name: value}, ensure_ascii=False, allow_nan=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the column {name!r} {_SURROGATE}") from error
    except RecursionError as error:
        raise ValueError(f"the column {name!r} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"the column {name!r} holds a number that is not finite (NaN or Infinity); write null instead") from error


def _unsupported_type(value: Any) -> str | None:
    """Return the name of the type of a value that cannot be stored (bytes, or an object of a library); None if it can."""
    if value is None or isinstance(value, _STORABLE):
        return None
    if isinstance(value, (list, tuple, Mapping)):
        items = value.values() if isinstance(value, Mapping) else value
        return next((kind for kind in map(_unsupported_type, items) if kind is not None), None)
    return "binary" if isinstance(value, (bytes, bytearray, memoryview)) else type(value).__name__


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, UUID) else value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # tables store missing values as NaN


def _detect(record: Mapping[str, Any], fields: Fields) -> Form:
    """Return the form of a record by its columns that are not null; joined datasets of several forms have null columns."""
    present = [name for name in (fields.text, fields.messages, fields.prompt, fields.completion) if name in record]
    filled = {name for name in present if not _is_missing(record[name])}
    if fields.messages in filled:
        return "chat"
    if {fields.prompt, fields.completion} <= filled:
        return "completion"
    if fields.text in filled:
        return "text"
    if fields.completion in filled and fields.prompt in present:
        raise ValueError(f"the field {fields.prompt!r} is null although there is a completion; write an empty prompt as an empty text")
    null = ", ".join(repr(name) for name in present if name not in filled)
    if null:
        raise ValueError(f"there is no document in it: {null} {'is' if len(present) - len(filled) == 1 else 'are'} null")
    raise KeyError(f"{fields.text!r}, {fields.messages!r}, or {fields.prompt!r} with {fields.completion!r}")


def _value(record: Mapping[str, Any], key: str) -> Any:
    """Return a field of a record; raise a KeyError with the quoted name if it is missing."""
    if key not in record:
        raise KeyError(repr(key))
    return record[key]


def _as_text(record: Mapping[str, Any], key: str) -> str:
    value = _value(record, key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"the field {key!r} is null" if value is None else f"the field {key!r} holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the field {key!r} {_SURROGATE}") from error
    return value


def _vector(record: Mapping[str, Any], key: str) -> Float32[np.ndarray, " size"]:
    try:
        vector = np.asarray(_value(record, key), np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"the field {key!r} is not a list of numbers") from error
    if vector.ndim != 1 or len(vector) == 0 or not np.isfinite(vector).all():
        raise ValueError(f"the field {key!r} is not a list of finite numbers")
    return vector


def _optional_label(record: Mapping[str, Any], key: str) -> int | None:
    return None if _is_missing(record.get(key)) else _label(record, key)


def _label(record: Mapping[str, Any], key: str) -> int:
    value = _value(record, key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise ValueError(f"the field {key!r} is {value!r}, not a class: a whole number from 0")
    return value


_SHARED_ROLES = {"human": "user", "gpt": "assistant"}
_TEMPLATE = ("tools", "chat_template_kwargs")
_NO_OPTIONS = {
    *("messages", "conversations", "documents", "tools", "chat_template", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
}


def chat_messages(record: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Read a record's chat messages, without the nulls of tables for missing keys; ShareGPT's `from` and `value` are accepted, too."""
    value = _without_nulls(_value(record, key))
    if isinstance(value, list) and all(isinstance(m, dict) and {"from", "value"} <= m.keys() for m in value):
        value = [{"role": _SHARED_ROLES.get(str(m["from"]), m["from"]), "content": m["value"]} for m in value]
    if not (isinstance(value, list) and value and all(_is_message(m) for m in value)):
        raise ValueError(f'the field {key!r} must be a list of messages like [{{"role": "user", "content": "..."}}, ...]')
    try:
        json.dumps(value, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the field {key!r} {_SURROGATE}") from error
    return value


def _is_message(message: Any) -> bool:
    complete = isinstance(message, dict) and isinstance(message.get("role"), str) and len(message) > 1
    return complete and isinstance(message.get("content"), str | list | None)


def template_inputs(record: Mapping[str, Any]) -> dict[str, Any]:
    """Read the inputs of a record's chat template besides the messages."""
    inputs = _without_nulls({name: record[name] for name in _TEMPLATE if record.get(name) is not None})
    for name, value in inputs.items():
        if isinstance(value, str):
            try:
                inputs[name] = parse_json(value)
            except ValueError as error:
                raise ValueError(f"the field {name!r} is text that is {error}") from error
    tools = inputs.get("tools")
    options = inputs.get("chat_template_kwargs", {})
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("the field 'tools' must be a list of JSON objects, each describing a tool")
    if not isinstance(options, dict) or options.keys() & _NO_OPTIONS:
        raise ValueError("the field 'chat_template_kwargs' must be an object of the template's own options, such as enable_thinking")
    return {**options, **({"tools": tools} if tools else {})}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _display_names(sources: Sequence[Source]) -> list[str]:
    """Return the sources' names for messages and ids: the last parts of the paths if these differ, else the full paths."""
    short = [source.short for source in sources]
    return short if len(set(short)) == len(short) else [source.name for source in sources]


def read_ids(file: str) -> list[str]:
    """Read a list of ids (`-` is standard input), one per line, in order.

    Lines end only at a newline, optionally after a carriage return; a byte order mark and empty lines are skipped. A line that starts with
    a quotation mark or a brace is JSON: a text, or an object with an `id`. Any other line is an id.

    Raises:
        NotFoundError: there is no such file.
        DataError: a line is not UTF-8, or starts like JSON and is not valid JSON; names the line.
    """
    import sys

    check_exists(file)
    ids = []
    with contextlib.nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as stream:
        for where, _, line in lines(stream, "stdin" if file == "-" else Path(file).name):
            if isinstance(line, DataError):
                raise line
            id = line.removesuffix("\n").removesuffix("\r")
            if id:
                ids.append(_json_id(id, where) if id[0] in '"{' else id)
    return ids


def check_exists(file: str) -> None:
    """Refuse a file that does not exist; `-` is standard input.

    Raises:
        NotFoundError: there is no such file.
    """
    if file != "-" and not Path(file).is_file():
        raise NotFoundError(f"there is no file {file}; check the path")


def _json_id(line: str, where: str) -> str:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: {error}; write an id that starts with a quotation mark or a brace as JSON text") from error
    if isinstance(value, dict):
        value = value.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: a JSON object without an id; give it an id, or write the id as JSON text")
    return value
