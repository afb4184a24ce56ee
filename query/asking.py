"""The interface that the client of an index directory (client.py) and of a server (remote.py) share. Nothing heavy is imported here."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from os import PathLike
from typing import TYPE_CHECKING, Any, SupportsIndex, Unpack

from ..store.errors import UsageError
from .answers import Answer, Explanation
from .options import Options, Query, ScoreOptions, check_queries

if TYPE_CHECKING:
    import numpy as np

    from ..store.shapes import Float32
    from ..store.vectors import Rows


class BaseClient(ABC):
    """Interface shared by local and remote clients."""

    @abstractmethod
    def query_many(self, queries: Sequence[Query], **options: Unpack[Options]) -> list[Answer]:
        """See `Client.query_many`."""

    @abstractmethod
    def scores(
        self, queries: Sequence[Query], where: str | None = None, **options: Unpack[ScoreOptions]
    ) -> 'Float32[np.ndarray, "queries rows"]':
        """See `Client.scores`."""

    @abstractmethod
    def encode(self, queries: Sequence[Query], **options: Unpack[ScoreOptions]) -> "Rows":
        """See `Client.encode`."""

    @abstractmethod
    def explain(self, examples: Sequence[int], query: Query, *, tokens: bool = True, **options: Unpack[ScoreOptions]) -> list[Explanation]:
        """See `Client.explain`."""

    @abstractmethod
    def complete(self, prompt: str, tokens: int = 16) -> str:
        """See `Client.complete`."""

    def query(
        self,
        query: Query | None = None,
        *,
        prompt: str = "",
        completion: str | None = None,
        text: str | None = None,
        row: SupportsIndex | None = None,
        against: str | None = None,
        span: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        features: Sequence[float] | None = None,
        label: int | None = None,
        chosen: str | None = None,
        rejected: str | None = None,
        texts: Sequence[str] | None = None,
        image: "str | bytes | PathLike[str] | None" = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Find the k strongest proponents and opponents of one query: a `Query`, or its fields (see `Query`).

        Args:
            options: see `Options`.

        Raises:
            UsageError: not exactly one query, an option out of range, a text that is empty or longer than the model's context.
        """
        values = locals()
        if query is not None:
            check_queries([query])
        given = {f.name: values[f.name] for f in fields(Query) if f.name in values and values[f.name] != f.default}
        if query is not None and given:
            raise UsageError(f"a Query has its own fields; give `{min(given)}` in it")
        return self.query_many([query or Query(**given)], **options)[0]
