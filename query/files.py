"""Query files: JSON lines of queries, and chat messages in a JSON file."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..store.corpus import chat_messages, check_exists, template_inputs
from ..store.errors import DataError, NotFoundError
from ..store.files import regular_size
from ..store.sources import Reading, expand, parse_json, standard_input
from .options import Options, Query, option_fields

_CHAT_BYTES = 1 << 24


def read_queries(file: str) -> Iterator[Query]:
    """Read the queries of a JSON-lines file (`-` is standard input): the fields of `Query`; other fields are ignored.

    Raises:
        NotFoundError: there is no such file.
        DataError: a line is not a query; names the line.
    """
    check_exists(file)
    (source,) = [standard_input()] if file == "-" else expand([file])[0]
    names = option_fields(Query)
    texts = frozenset(name for name, field in names.items() if field.kind not in (int, float))
    for where, _, record in source.records(source.short, Reading("text", "prompt", "file", texts, {}), None):
        if isinstance(record, DataError):
            raise record
        problem = _field_problem(record)
        if problem:
            raise DataError(f"{where}: {problem}")
        fields = {name: record[name] for name in names if record.get(name) is not None}
        try:
            yield Query(**fields | _chat(record) | {"id": str(where if record.get("id") is None else record["id"])})
        except ValueError as error:  # a UsageError, or of the messages
            raise DataError(f"{where}: {error}") from error


def _field_problem(record: Mapping[str, Any]) -> str | None:
    """Return a problem if a field is an option of answers, or has nearly the name of a query's field."""
    options = sorted(option_fields(Options).keys() & record.keys())
    if options:
        return f"{options[0]} is an option of the call, the same for all queries of a file, not a field of a query; remove the field"
    names = list(option_fields(Query))
    for key in record.keys() - set(names):
        if similar := get_close_matches(str(key).lower(), names, 1, 0.8):
            return f"unknown field {str(key)[:80]!r} of a query; rename it to {similar[0]!r}, or to another name"
    return None


def read_chat(file: str) -> dict[str, Any]:
    """Read the messages of a JSON file: a list, or an object with `messages` and optionally `tools`.

    Raises:
        NotFoundError: there is no such file.
        DataError: it is not a regular file, or has other content.
    """
    path = Path(file)
    if not path.exists():
        raise NotFoundError(f"there is no file {file}; check the path")
    size = regular_size(path)
    if not size:
        raise DataError(f"{file} is empty or not a regular file; give a JSON file with a list of messages")
    if size > _CHAT_BYTES:
        raise DataError(f"{file} is longer than {_CHAT_BYTES >> 20} MiB; give a file with the messages of one query")
    try:
        content = parse_json(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8; convert the file, for instance with iconv") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}; give a list of messages, or an object with messages and tools") from error
    record = content if isinstance(content, dict) else {"messages": content}
    if not record.get("messages") or not record.keys() <= {"messages", "tools"}:
        raise DataError(f"{file} has neither a list of messages nor an object with only messages and tools; give one of them")
    try:
        return _chat(record)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error


def _chat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's messages and tools; raise a ValueError if they are not such."""
    if record.get("messages") is None:
        return {}
    return {"messages": chat_messages(record, "messages"), "tools": template_inputs(record).get("tools")}
