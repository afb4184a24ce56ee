"""Start and stop of `wherefrom serve`, and registration of the server in a discovery file."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

import uvicorn

from ..client import Client
from ..remote import announce
from ..store.errors import UsageError
from ..store.objects import local_or_store
from .access import Audit, Tokens
from .app import create_app

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
_MOST_CONNECTIONS = 512
_GRACE_SECONDS = 10


def name_indexes(arguments: list[str]) -> dict[str, Path]:
    """Return indexes by name: the NAME of an argument NAME=PATH, else the directory's name without its ending.

    Raises:
        UsageError: two indexes have the same name, or one has none.
    """
    indexes: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        has_name = equals and "/" not in name
        index = local_or_store(path if has_name else argument)
        name = name if has_name else PurePosixPath(str(index.resolve())).stem
        if not name:
            raise UsageError(f"the index {argument!r} has no name; write it as NAME=PATH")
        if name in indexes:
            raise UsageError(f"two indexes have the name {name!r}; give each a name: NAME={index}")
        indexes[name] = index
    return indexes


def serve(
    clients: Mapping[str, Client],
    host: str,
    port: int,
    tokens: Tokens,
    audit: Audit | None,
    batch: int,
    restart: Callable[[], None] | None = None,
    stop: Callable[[], None] | None = None,
) -> None:
    """Serve indexes until a signal stops the server.

    Args:
        tokens: with what each may read; other machines can only reach a server that requires one.
        audit: log of the requests.
        restart: called in a thread of its own at SIGHUP.
        stop: called before the process exits.

    Raises:
        UsageError: the address is not available, or other machines can reach it and there is no token.
    """
    if host not in _LOOPBACK and not tokens:
        raise UsageError(f"other machines can reach `host` {host}; give a `token_file`, or use 127.0.0.1")
    hosts = _LOOPBACK if host in _LOOPBACK else None
    config = uvicorn.Config(
        create_app(clients, tokens=tokens, audit=audit, hosts=hosts, batch=batch),
        host=host,
        port=port,
        log_level="error",
        ws="none",
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        lifespan="on",
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:  # before the discovery file is written, so that its readers can connect
        listening = socket.create_server((host, port), family=family, backlog=_MOST_CONNECTIONS)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {host}:{port}, perhaps another program does; choose another `port`, or 0 for any") from error
    url = f"http://{host if ':' not in host else f'[{host}]'}:{listening.getsockname()[1]}"
    indexes = {name: str(client.index.path.resolve()) for name, client in clients.items()}
    discovery_file: Path | None = None
    try:
        if not tokens or tokens.unrestricted is not None:  # else commands of this user could not ask it
            discovery_file = announce(url, tokens.unrestricted, indexes, os.getpid())
    except OSError as error:
        sys.stderr.write(f"the discovery file could not be written ({error}); set WHEREFROM_URL so that commands use this server\n")
    sys.stderr.write(f"serving {', '.join(clients)} at {url} (stop with Ctrl-C)\n")
    sys.stderr.flush()

    def exit_now(*_: object) -> None:
        """Exit without waiting for threads. Uvicorn repeats the signal after its last answer or the grace period."""
        if discovery_file is not None:
            discovery_file.unlink(missing_ok=True)
        if stop is not None:
            with suppress(Exception):
                stop()
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, exit_now)
    if restart is not None:
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=restart, name="wherefrom-restart", daemon=True).start())
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        if discovery_file is not None:
            discovery_file.unlink(missing_ok=True)
