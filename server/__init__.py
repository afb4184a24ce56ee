"""HTTP server of indexes, with the explorer."""

from ..store.extras import require

for _library in ("fastapi", "uvicorn", "prometheus_client"):
    require(_library, "server")
