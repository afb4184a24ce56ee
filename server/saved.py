"""Saved queries of an index, with a name and a note: JSON lines in a file beside it, `<index>.queries.jsonl`."""

import json
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..store.errors import NotFoundError, StorageError, UsageError
from ..store.files import read_bytes, regular_size, write_whole
from ..store.objects import StorePath

_MOST = 1000
_MOST_BYTES = 4 << 20


class SavedQueries:
    """The saved queries of one index.

    Args:
        index: its path; queries of an index in an object store are not saved.
    """

    def __init__(self, index: Path) -> None:
        self._path = None if isinstance(index, StorePath) else index.with_name(f"{index.name}.queries.jsonl")
        self._lock = threading.Lock()

    def read(self, author: str | None = None) -> list[dict[str, Any]]:
        """Return the saved queries, the newest first; lines that are not such are left out.

        Args:
            author: who saved them; None for anybody.
        """
        return [entry for entry in self._entries() if author is None or entry["by"] == author]

    def _entries(self) -> list[dict[str, Any]]:
        if self._path is None or self._path.is_symlink() or regular_size(self._path) is None:
            return []
        entries = []
        for line in read_bytes(self._path, _MOST_BYTES).decode("utf-8", "replace").split("\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            texts = {name: entry.get(name, "") for name in ("id", "time", "by", "name", "note")} if isinstance(entry, dict) else {}
            is_text = texts.get("id") and all(isinstance(text, str) and _is_unicode(text) for text in texts.values())
            if is_text and isinstance(entry.get("query"), dict):
                entries.append({**texts, "query": entry["query"]})
        return entries[::-1]

    def add(self, name: str, note: str, query: dict[str, Any], by: str) -> dict[str, Any]:
        """Save a query; returns its entry.

        Raises:
            UsageError: there are too many, or the index is in an object store.
            StorageError: the file cannot be written.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"id": uuid.uuid4().hex, "time": now, "by": by, "name": name, "note": note, "query": query}
        with self._lock:
            entries = self._entries()
            if len(entries) >= _MOST:
                raise UsageError(f"{_MOST:,} queries are saved already; remove some")
            self._write([entry, *entries])
        return entry

    def remove(self, id: str, author: str | None = None) -> None:
        """Remove a saved query.

        Args:
            author: who saved it; None for anybody.

        Raises:
            NotFoundError: there is none of that id.
        """
        with self._lock:
            entries = self._entries()
            remaining = [entry for entry in entries if entry["id"] != id or author not in (None, entry["by"])]
            if len(remaining) == len(entries):
                raise NotFoundError("there is no saved query of that id")
            self._write(remaining)

    def _write(self, entries: list[dict[str, Any]]) -> None:
        if self._path is None:
            raise UsageError("queries of an index in an object store cannot be saved beside it; copy the link instead")
        if self._path.is_symlink() or (self._path.exists() and regular_size(self._path) is None):
            raise StorageError(f"{self._path} is a link or not a regular file, so the query was not saved; remove it")
        content = "".join(json.dumps(entry) + "\n" for entry in entries[::-1]).encode()
        if len(content) > _MOST_BYTES:
            raise UsageError("the saved queries take too much room; remove some")
        try:
            write_whole(self._path, content)
        except OSError as error:
            raise StorageError(f"{self._path} cannot be written ({error.strerror}); the query was not saved") from error


def _is_unicode(text: str) -> bool:
    """Return False for a text with half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
