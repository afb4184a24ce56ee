"""Wherefrom: a search index for training-data attribution.

    >>> import wherefrom
    >>> index = wherefrom.build("gpt2", "corpus.jsonl", "my.wherefrom")  # doctest: +SKIP
    >>> wherefrom.connect(index).query(prompt="The capital of France is", completion=" Paris")  # doctest: +SKIP

Everything is imported when it is first used, so that `import wherefrom` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import evaluate as evaluate
    from .building import build as build
    from .client import Client as Client
    from .evaluation.replay import Replayed as Replayed
    from .evaluation.replay import replay as replay
    from .indexer.moments import save_moments as save_moments
    from .indexer.tasks import ArrayTask as ArrayTask
    from .indexer.tasks import Task as Task
    from .indexer.tasks import VectorTask as VectorTask
    from .query.answers import Answer as Answer
    from .query.answers import Attribution as Attribution
    from .query.answers import Explanation as Explanation
    from .query.options import Query as Query
    from .ray_jobs.config import BuildConfig as BuildConfig
    from .recording import TrainingRecorder as TrainingRecorder
    from .remote import RemoteClient as RemoteClient
    from .remote import connect as connect
    from .store.errors import WherefromError as WherefromError
    from .store.fields import Fields as Fields
    from .store.index import Index as Index

_HOMES = {
    "Answer": "query.answers",
    "ArrayTask": "indexer.tasks",
    "Attribution": "query.answers",
    "BuildConfig": "ray_jobs.config",
    "Client": "client",
    "Explanation": "query.answers",
    "Fields": "store.fields",
    "Index": "store.index",
    "Query": "query.options",
    "RemoteClient": "remote",
    "Replayed": "evaluation.replay",
    "Task": "indexer.tasks",
    "TrainingRecorder": "recording",
    "VectorTask": "indexer.tasks",
    "WherefromError": "store.errors",
    "build": "building",
    "connect": "remote",
    "replay": "evaluation.replay",
    "save_moments": "indexer.moments",
}

__all__ = [
    "Answer",
    "ArrayTask",
    "Attribution",
    "BuildConfig",
    "Client",
    "Explanation",
    "Fields",
    "Index",
    "Query",
    "RemoteClient",
    "Replayed",
    "Task",
    "TrainingRecorder",
    "VectorTask",
    "WherefromError",
    "build",
    "connect",
    "evaluate",
    "replay",
    "save_moments",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("wherefrom")
    if name == "evaluate":
        return importlib.import_module(".evaluate", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'wherefrom' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
