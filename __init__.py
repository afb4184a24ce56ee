"""Wherefrom: a search index for training-data attribution.

    >>> from wherefrom import connect
    >>> connect("my.wherefrom").query(prompt="The capital of France is", completion=" Paris")  # doctest: +SKIP

Everything is imported when it is first used, so that `import wherefrom` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Client as Client
    from .indexer.tasks import Task as Task
    from .indexer.tasks import VectorTask as VectorTask
    from .query.answers import Answer as Answer
    from .query.answers import Attribution as Attribution
    from .query.answers import Query as Query
    from .ray_jobs.build import build as build
    from .ray_jobs.config import BuildConfig as BuildConfig
    from .remote import connect as connect
    from .store.corpus import Fields as Fields
    from .store.errors import WherefromError as WherefromError
    from .store.index import Index as Index

_HOMES = {
    "Answer": "query.answers",
    "Attribution": "query.answers",
    "BuildConfig": "ray_jobs.config",
    "Client": "client",
    "Fields": "store.corpus",
    "Index": "store.index",
    "Query": "query.answers",
    "Task": "indexer.tasks",
    "VectorTask": "indexer.tasks",
    "WherefromError": "store.errors",
    "build": "ray_jobs.build",
    "connect": "remote",
}

__all__ = [
    "Answer",
    "Attribution",
    "BuildConfig",
    "Client",
    "Fields",
    "Index",
    "Query",
    "Task",
    "VectorTask",
    "WherefromError",
    "build",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("wherefrom")
    if name not in _HOMES:
        raise AttributeError(f"module 'wherefrom' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
