"""Access to the rows of a server's indexes by token, and the log of what was asked.

A grant is a token with a filter: its holder sees matching rows alone, in answers, groups, scores, explanations and by row number. A server
with one token, or with none, lets everybody who reaches it read all rows.
"""

import ast
import hmac
import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..client import Client
from ..query.options import Query
from ..store.errors import NotFoundError, StorageError, UsageError
from ..store.filters import parse_filter

_SHORTEST_TOKEN = 16
_LOG_BYTES = 64 << 20
_LOG_FILES = 20
_LONGEST_LOGGED = 4000  # characters of a request's fields
_MOST_LOGGED = 200  # ids


@dataclass(frozen=True)
class Access:
    """Rows that a request may read.

    Attributes:
        name: of the token's holder; "" where no grants are given.
        where: a filter of the rows that it may read; None for all.
    """

    name: str = ""
    where: str | None = None

    def restricted(self, where: str | None) -> str | None:
        """Return the filter of rows that match another filter and may be read.

        Raises:
            UsageError: `where` is not a filter.
        """
        if self.where is None or where is None:
            return self.where or where
        # Each is parsed alone, so that no parenthesis or comment of one reaches into the other.
        try:
            return " and ".join(f"({ast.unparse(parse_filter(text))})" for text in (self.where, where))
        except RecursionError as error:
            raise UsageError("the filter is nested too deeply; write a shorter one") from error

    def check_rows(self, client: Client, rows: Sequence[int]) -> None:
        """Refuse rows that may not be read, in the words for rows that are not there.

        Raises:
            NotFoundError: one of them may not be read.
        """
        if self.where is None:
            return
        for row in rows:
            group = next((g for g in client.index.groups if g.first <= row < g.first + g.rows), None)
            if group is None or not client.index.matching(self.where, [group])[row - group.first]:
                raise NotFoundError(f"there is no row {row} that this token may read")

    def checked(self, client: Client, queries: Sequence[Query], rows: Sequence[int] = ()) -> Client:
        """Return the client, if the rows of queries and others may be read; see `check_rows`."""
        self.check_rows(client, [*(query.row for query in queries if query.row is not None), *rows])
        return client

    def check_ids(self, client: Client, ids: Sequence[str]) -> None:
        """Refuse ids of examples that are not there or may not be read.

        Raises:
            NotFoundError: see above.
        """
        mask, unknown = client.index.rows_of(ids)
        if unknown or (self.where is not None and not client.index.matching(self.where)[mask].all()):
            raise NotFoundError("one of these ids is of no example that this token may read")

    @property
    def author(self) -> str | None:
        """The holder whose saved queries may be read; None for those of all."""
        return None if self.where is None else self.name


ALL_ROWS = Access()


class _Grant(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    token: str
    where: str | None = None


class Tokens:
    """Tokens of a server, and what each may read.

    Args:
        access: by token; without any, every request may read all rows.
    """

    def __init__(self, access: Mapping[str, Access]) -> None:
        self._access = dict(access)

    def __bool__(self) -> bool:
        return bool(self._access)

    @property
    def unrestricted(self) -> str | None:
        """A token that may read all rows, for commands of the server's own user; None if there is none."""
        return next((token for token, access in self._access.items() if access.where is None), None)

    def access(self, token: str | None) -> Access | None:
        """Return what a request may read; None if its token is not known. Takes equally long for all tokens."""
        if not self._access:
            return ALL_ROWS
        found = None
        for known, access in self._access.items():
            if hmac.compare_digest((token or "").encode(), known.encode()):
                found = access
        return found


def read_tokens(token_file: str | None, grants_file: str | None) -> Tokens:
    """Read the token of a file, which may read all rows, and grants.

    Raises:
        NotFoundError: there is no such file.
        UsageError: a token is too short, given twice, or a grant is not what it must be.
    """
    access: dict[str, Access] = {}
    if token_file is not None:
        access[_valid_token(_read(token_file, "token").strip(), token_file)] = ALL_ROWS
    lines = [] if grants_file is None else _read(grants_file, "grants").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{grants_file}, line {number}"
        try:
            grant = _Grant.model_validate_json(line)
        except ValidationError as error:
            raise UsageError(f'{where} is not a grant such as {{"name": "ann", "token": "...", "where": "open == True"}}') from error
        if grant.where is not None:
            try:
                parse_filter(grant.where)
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from error
        token = _valid_token(grant.token, where)
        if token in access:
            raise UsageError(f"{where} has the token of another grant; give each its own")
        access[token] = Access(grant.name, grant.where)
    if grants_file is not None and not any(line.strip() for line in lines):
        raise UsageError(f"{grants_file} has no grants; write one a line")
    return Tokens(access)


def _read(file: str, kind: str) -> str:
    if not Path(file).is_file():
        raise NotFoundError(f"there is no {kind} file {file}; create it with tokens of at least {_SHORTEST_TOKEN} visible ASCII characters")
    return Path(file).read_text(encoding="utf-8-sig", errors="replace")


def _valid_token(token: str, where: str) -> str:
    if len(token) < _SHORTEST_TOKEN or not all(33 <= ord(c) < 127 for c in token):
        raise UsageError(f"{where} must hold a token of at least {_SHORTEST_TOKEN} visible ASCII characters")
    return token


class _PrivateLog(logging.handlers.RotatingFileHandler):
    """A rotated log that its owner alone can read, and whose errors are raised."""

    def _open(self) -> Any:
        os.close(os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        os.chmod(self.baseFilename, 0o600)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if error is not None:
            raise error


class Audit:
    """Log of requests, a JSON object a line: time, holder of the token, path, status, the query and its options, and the ids of the answer.

    Lines are appended; a file that reaches 64 MiB is renamed to `<name>.1`, and the 20 newest are kept. Only the server's user can read
    them.

    Args:
        path: of the file.

    Raises:
        UsageError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._handler = _PrivateLog(path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"the audit log {path} cannot be written ({error.strerror}); choose another file") from error

    def add(self, access: Access | None, method: str, path: str, status: int, details: Mapping[str, Any]) -> None:
        """Append a request."""
        fields = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "name": None if access is None else access.name,
            "request": f"{method} {path}",
            "status": status,
            **details,
        }
        line = json.dumps(fields, ensure_ascii=False)
        try:
            self._handler.emit(logging.LogRecord("wherefrom.audit", logging.INFO, "", 0, line, None, None))
        except OSError as error:
            raise StorageError(f"the audit log cannot be written ({error.strerror}), so nothing is answered; make room for it") from error

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


def asked(body: BaseModel, ids: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the log says of a request's body and answer."""
    fields = body.model_dump(exclude_none=True, exclude_defaults=True)
    text = json.dumps(fields, ensure_ascii=False, default=str)
    is_short = len(text) <= _LONGEST_LOGGED
    shown = {"asked": fields} if is_short else {"asked": text[:_LONGEST_LOGGED], "cut": len(text) - _LONGEST_LOGGED}
    return {**shown, "answered": list(ids[:_MOST_LOGGED]), "answers": len(ids)}
