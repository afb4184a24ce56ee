"""HTTP interface for `wherefrom query`, the Python client and the explorer.

Every answer is the JSON that the command line prints; every error is problem+json (RFC 9457) with one sentence. `/openapi.json` describes
the interface, `/docs` shows the description.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Request, Response
from fastapi import Query as QueryParameter
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp

from ..client import Client
from ..query.answers import Answer
from ..query.options import Options, ScoreOptions
from ..remote import MOST_ANSWERS, MOST_COSTLY
from ..store.errors import BusyError, IncompatibleError, NotFoundError, UsageError, WherefromError
from ..store.printable import to_json
from ..store.vectors import to_bytes
from .access import Access, Audit, Tokens, asked
from .bodies import CompleteBody, EncodeBody, ExplainBody, ExportBody, IndexName, QueryBody, QueryFields, SavedBody, ScoresBody
from .browse import browse
from .engine import Engine, Metrics
from .guard import Guard, problem
from .saved import SavedQueries

_BINS = 60
_LARGEST_K = 10_000
_MOST_PASSES = 10_000  # examples that a product of the Gauss-Newton matrix passes, for the queries of one request
_STATUS: tuple[tuple[type[WherefromError], int], ...] = (
    (BusyError, 503),
    (NotFoundError, 404),
    (IncompatibleError, 409),
    (UsageError, 422),
)


def create_app(
    clients: Mapping[str, Client],
    *,
    tokens: Tokens = Tokens({}),
    audit: Audit | None = None,
    hosts: frozenset[str] | None = None,
    batch: int = 16,
    queue: int = 256,
    body_timeout: float = 15.0,
) -> ASGIApp:
    """Create the application over some open indexes, by name.

    Args:
        tokens: bearer tokens, with what each may read.
        audit: log of the requests.
        hosts: accepted host names of the server; None accepts any.
        batch: most queries in one pass over the model and the rows.
        queue: most requests that wait for an index.
        body_timeout: time limit (seconds) for receiving a body.
    """
    metrics = Metrics()
    engines = {name: Engine(name, client, metrics, batch, queue) for name, client in clients.items()}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        for engine in engines.values():
            engine.start()
        yield
        for engine in engines.values():
            await engine.stop()

    app = FastAPI(title="Wherefrom", version="1", lifespan=lifespan, docs_url=None, redoc_url=None, description=__doc__ or "")
    _handle_errors(app)
    _state_routes(app, engines, metrics)
    _index_routes(app, engines)
    _saved_routes(app, engines)
    _query_routes(app, engines)
    _model_routes(app, engines)
    _pages(app)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=sorted(hosts))
    return Guard(app, tokens, audit, body_timeout)


def _engine_of(engines: Mapping[str, Engine], name: str | None) -> Engine:
    if name is None and len(engines) == 1:
        return next(iter(engines.values()))
    engine_by_path = next((engine for engine in engines.values() if str(engine.client.index.path.resolve()) == name), None)
    if engine_by_path is not None:
        return engine_by_path
    if name is None or name not in engines:
        names = ", ".join(engines)
        raise NotFoundError(f"there is no index {name!r} here; there is {names}" if name else f"name an index (index=...): {names}")
    return engines[name]


def _state_routes(app: FastAPI, engines: Mapping[str, Engine], metrics: Metrics) -> None:
    @app.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        route = request.scope.get("route")
        metrics.responses.labels(getattr(route, "path", "none"), str(response.status_code)).inc()
        return response

    @app.get("/healthz", tags=["state"])
    async def healthz() -> dict[str, str]:
        """Liveness of the process."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["state"])
    async def readyz() -> dict[str, Any]:
        """Readiness to answer queries; for each index, how many processes can search each of its parts."""
        stopped = [name for name, engine in engines.items() if not engine.alive]
        if stopped:
            raise BusyError(f"{len(stopped)} indexes are not answered; start the server again")
        parts = {name: engine.client.parts.up() for name, engine in engines.items()}
        for name, up in parts.items():
            if not all(up):
                raise BusyError(f"{up.count(0)} of {len(up)} parts of {name} do not run at present; queries wait for them")
        return {"status": "ok", "parts": parts}

    @app.get("/metrics", tags=["state"])
    async def prometheus() -> Response:
        """Metrics in Prometheus format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _index_routes(app: FastAPI, engines: Mapping[str, Engine]) -> None:
    @app.get("/v1/indexes", tags=["indexes"])
    async def indexes() -> Response:
        """List the served indexes."""
        return _json([_summary(engine) for engine in engines.values()])

    @app.get("/v1/indexes/{name}", tags=["indexes"])
    async def index(name: str) -> Response:
        """Describe an index: its columns, what its rows measure, how it was built, and what was measured of it."""
        engine = _engine_of(engines, name)
        return _json(_summary(engine) | await engine.call(_described))

    @app.get("/v1/rows", tags=["indexes"])
    async def rows(
        request: Request,
        index: IndexName | None = None,
        first: Annotated[int, QueryParameter(ge=0, le=2**53)] = 0,
        count: Annotated[int, QueryParameter(ge=1, le=100)] = 20,
        where: Annotated[str | None, QueryParameter(max_length=4000)] = None,
        sort: Literal["row", "self-influence", "loss"] = "row",
    ) -> Response:
        """List training examples, a page at a time, with their losses, self-influence and the density of hidden states around them."""
        engine = _engine_of(engines, index)
        restricted = _access(request).restricted(where)
        page = await engine.call(lambda client: browse(client, restricted, first, count, sort))
        request.scope["wherefrom.asked"] = {"where": where, "answered": [row["id"] for row in page["rows"]], "answers": len(page["rows"])}
        return _json(page)

    @app.get("/v1/rows/{row}", tags=["indexes"])
    async def row(request: Request, row: Annotated[int, Path(ge=0, le=2**53)], index: IndexName | None = None) -> Response:
        """Read a training example by its row."""

        def read(client: Client) -> dict[str, Any]:
            _access(request).check_rows(client, [row])
            e = client.index.example(row)
            shard, offset = client.index.locate(row)
            request.scope["wherefrom.asked"] = {"answered": [e.id], "answers": 1}
            fields = {"row": row, "id": e.id, "text": e.text, "source": e.source, "document": e.document, "metadata": e.metadata}
            return {**fields, "tokens": int(e.loss_mask.sum()), "loss": float(client.index.losses(shard)[offset])}

        return _json(await _engine_of(engines, index).call(read))


def _saved_routes(app: FastAPI, engines: Mapping[str, Engine]) -> None:
    saved = {name: SavedQueries(engine.client.index.path) for name, engine in engines.items()}

    @app.get("/v1/saved", tags=["saved queries"])
    async def list_saved(request: Request, index: IndexName | None = None) -> Response:
        """List the saved queries of an index, the newest first; a token that may read some rows sees its own."""
        return _json({"saved": saved[_engine_of(engines, index).name].read(_access(request).author)})

    @app.post("/v1/saved", tags=["saved queries"])
    async def save(body: SavedBody, request: Request) -> Response:
        """Save a query with a name and a note, in a file beside the index."""
        query = body.query.model_dump(exclude_none=True, exclude_defaults=True)
        request.scope["wherefrom.asked"] = asked(body)
        return _json(saved[_engine_of(engines, body.index).name].add(body.name, body.note, query, _access(request).name))

    @app.delete("/v1/saved/{id}", tags=["saved queries"], status_code=204)
    async def remove(request: Request, id: Annotated[str, Path(max_length=64)], index: IndexName | None = None) -> Response:
        """Remove a saved query."""
        saved[_engine_of(engines, index).name].remove(id, _access(request).author)
        return Response(status_code=204)


def _query_routes(app: FastAPI, engines: Mapping[str, Engine]) -> None:
    @app.post("/v1/query", tags=["queries"])
    async def query(body: QueryBody, request: Request) -> Response:
        """Find the training examples that influenced the model: one answer, or for `queries` a list under `answers`."""
        engine = _engine_of(engines, body.index)
        access = _access(request)
        request.scope["wherefrom.asked"] = asked(body)
        options = body.given(Options)
        where = access.restricted(body.where)
        if where is not None:
            options["where"] = where
        _check_refine(engine, options, 1 if body.queries is None else len(body.queries))
        if body.k is not None:
            k = options["k"] = min(body.k, len(engine.client.index))
            if k > _LARGEST_K:
                raise UsageError(f"k is {body.k}; a server returns at most {_LARGEST_K:,} (wherefrom query --local returns more)")
        if body.queries is None:
            if body.mean:
                raise UsageError("mean is over several queries; give them as queries")
            single = body.query()
            if access.where is None:
                answer = await engine.ask(single, options)
            else:  # the check and the answer are of the same state of the index
                answer = await engine.call(lambda client: access.checked(client, [single]).query_many([single], **options)[0])
            request.scope["wherefrom.asked"] = asked(body, _ids([answer]))
            return _json(answer.to_dict())
        queries = [fields.query() for fields in body.queries]
        if any(getattr(body, name) not in (None, "") for name in QueryFields.model_fields):
            raise UsageError("give one query, or queries, not both")
        if len(queries) * (options.get("k") or 10) > MOST_ANSWERS:
            raise UsageError(f"{len(queries)} queries times k are more than {MOST_ANSWERS:,} answers; split the request")
        if (body.group_by or body.baselines or body.rerank != 0) and len(queries) > MOST_COSTLY and not body.mean:
            raise UsageError(f"groups, baselines and a rerank are limited to {MOST_COSTLY} queries at a time; split it, or give `rerank` 0")
        answers = await engine.call(lambda client: access.checked(client, queries).query_many(queries, **options))
        request.scope["wherefrom.asked"] = asked(body, _ids(answers))
        return await asyncio.to_thread(lambda: _json({"answers": [answer.to_dict() for answer in answers]}))

    @app.get("/v1/query", tags=["queries"])
    async def linked(request: Request, q: Annotated[str, QueryParameter(max_length=20_000)]) -> Response:
        """Answer a query given as a link: `q` is the JSON body of the POST. The explorer's address with it shows the answer."""
        try:
            body = QueryBody.model_validate_json(q)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        return await query(body, request)

    @app.post("/v1/explain", tags=["queries"])
    async def explain(body: ExplainBody, request: Request) -> Response:
        """Explain the scores of some training examples by component, layer, shared token, and token of either text."""
        query = body.query()
        engine = _engine_of(engines, body.index)
        access = _access(request)
        request.scope["wherefrom.asked"] = asked(body)
        _check_refine(engine, body.given(ScoreOptions), 1)
        explanations = await engine.call(
            lambda client: access.checked(client, [query], body.examples).explain(
                body.examples, query, tokens=body.tokens, **body.given(ScoreOptions)
            )
        )
        request.scope["wherefrom.asked"] = asked(body, [explanation.id for explanation in explanations])
        return _json({"explanations": [explanation.to_dict() for explanation in explanations]})


def _model_routes(app: FastAPI, engines: Mapping[str, Engine]) -> None:
    @app.post("/v1/scores", tags=["queries"])
    async def scores(body: ScoresBody, request: Request) -> Response:
        """Score all rows: a histogram, or little-endian float32 numbers in the rows' order (NaN for deleted rows)."""
        query = body.query()
        options = body.given(ScoreOptions)
        engine = _engine_of(engines, body.index)
        access = _access(request)
        request.scope["wherefrom.asked"] = asked(body)
        _check_refine(engine, options, 1)
        where = access.restricted(body.where)
        if body.format != "float32":
            return _json(await engine.call(lambda client: access.checked(client, [query]).histogram(query, _BINS, where, **options)))
        matrix = await engine.call(lambda client: access.checked(client, [query]).scores([query], where, **options))
        return Response(matrix[0].astype("<f4").tobytes(), media_type="application/octet-stream")

    @app.post("/v1/encode", tags=["queries"])
    async def encode(body: EncodeBody, request: Request) -> Response:
        """Encode a query: its whitened rows, as a safetensors file with the arrays of each component."""
        query = body.query()
        options = body.given(ScoreOptions)
        engine = _engine_of(engines, body.index)
        access = _access(request)
        request.scope["wherefrom.asked"] = asked(body)
        _check_refine(engine, options, 1)
        rows = await engine.call(lambda client: access.checked(client, [query]).encode([query], **options))
        return Response(to_bytes(rows), media_type="application/octet-stream")

    @app.post("/v1/complete", tags=["queries"])
    async def complete(body: CompleteBody, request: Request) -> Response:
        """Complete a prompt with the model."""
        request.scope["wherefrom.asked"] = asked(body)
        return _json({"completion": await _engine_of(engines, body.index).call(lambda client: client.complete(body.prompt, body.tokens))})

    @app.post("/v1/exports", tags=["queries"], status_code=204)
    async def exports(body: ExportBody, request: Request) -> Response:
        """Record in the server's audit log that examples were taken away, as a file or a list; the explorer calls this."""
        access = _access(request)
        request.scope["wherefrom.asked"] = asked(body)
        await _engine_of(engines, body.index).call(lambda client: access.check_ids(client, body.ids))
        request.scope["wherefrom.asked"] = asked(body, body.ids)
        return Response(status_code=204)


def _access(request: Request) -> Access:
    """Return what a request may read."""
    access: Access = request.scope["wherefrom.access"]
    return access


def _ids(answers: Sequence[Answer]) -> list[str]:
    """Return the ids of the examples of some answers."""
    return [a.id for answer in answers for a in (*answer.proponents, *answer.opponents)]


def _check_refine(engine: Engine, options: Mapping[str, Any], queries: int) -> None:
    """Refuse to refine queries for longer than a server should work for one request."""
    refine = options.get("refine") or 0
    passes = (1 + refine) * queries * len(engine.client.index) if refine else 0
    if passes > _MOST_PASSES:
        raise UsageError(
            f"`refine` takes passes over {passes:,} examples here, and a server takes at most {_MOST_PASSES:,} for a request; ask the "
            "index directly (wherefrom query --local)"
        )


def _pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def explorer() -> Response:
        return _static("index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _static("docs.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return _static(name)


_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}


def _static(name: str) -> Response:
    folder = resources.files(__package__) / "static"
    items = {item.name: item for item in folder.iterdir()}
    if name not in items:
        raise NotFoundError(f"there is no page {name[:100]!r}")
    return Response(items[name].read_bytes(), media_type=_TYPES.get(name.rpartition(".")[2], "application/octet-stream"))


def _summary(engine: Engine) -> dict[str, Any]:
    index = engine.client.index
    fields = {
        "name": engine.name,
        "manifest": index.manifest.number,
        "rows": len(index),
        "deleted": index.manifest.deleted,
        "mode": index.manifest.mode,
    }
    components = [
        {"name": c.name, "kind": c.kind, "damping": c.curvature.damping, "layers": len(c.layer_names)} for c in index.manifest.components
    ]
    models = [model.id for model in index.manifest.models]
    texts = index.manifest.tokenizer is not None
    return {**fields, "path": str(index.path.resolve()), "models": models, "texts": texts, "components": components}


def _described(client: Client) -> dict[str, Any]:
    """Describe an index for the page about it."""
    index = client.index
    summary = index.summary()
    shown = ("created", "wherefrom", "documents", "split", "truncated", "skipped", "not_finite", "tokens", "bytes_per_example", "bytes")
    slope = index.manifest.slope
    return {
        "columns": {name: str(kind) for name, kind in index.columns.items()},
        "about": {name: summary[name] for name in shown},
        "described": summary["components"],
        "model_details": summary["models"],
        "tracked": [{**part.model_dump(), "share": part.share} for part in index.manifest.build.tracked],
        "trained": [None if model.trained is None else len(model.trained) for model in index.manifest.models],
        "notes": list(index.manifest.build.notes),
        "slope": None if slope is None else slope.model_dump(),
        "task": index.manifest.task,
    }


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value).encode(), status_code=status, media_type="application/json")


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(WherefromError)
    async def known_error(request: Request, error: WherefromError) -> Response:
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 503)
        return problem(status, str(error), type(error).__name__)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return problem(422, f"{where or 'the body'}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:100]
        sentences = {
            404: f"there is no {path}; /docs lists what there is",
            405: f"{path} does not take {request.method}; /docs lists what it takes",
        }
        return problem(error.status_code, sentences.get(error.status_code, error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return problem(500, f"{type(error).__name__}; the server's log has more", "WherefromError")
