"""The interface that the client of an index directory (client.py) and of a server (remote.py) share. Nothing heavy is imported here."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
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
        """Answer several queries in shared passes over the model and the rows: in the same order, or one answer to their mean.

        Raises:
            UsageError: an option is unknown or out of range; a text is empty or longer than the model's context.
        """

    @abstractmethod
    def scores(
        self, queries: Sequence[Query], where: str | None = None, **options: Unpack[ScoreOptions]
    ) -> 'Float32[np.ndarray, "queries rows"]':
        """Score every row for every query; NaN for deleted rows and those that do not match the filter `where`."""

    @abstractmethod
    def encode(self, queries: Sequence[Query]) -> "Rows":
        """Compute the whitened rows of queries, by component; of a query with `against`, the difference of the two completions' rows."""

    @abstractmethod
    def explain(self, examples: Sequence[int], query: Query, *, tokens: bool = True, **options: Unpack[ScoreOptions]) -> list[Explanation]:
        """Split the scores of training examples with one query by component, layer, shared token, and token of either text.

        Args:
            examples: their rows.
            tokens: compute the shares of tokens, which needs the model.

        Raises:
            UsageError: a row is not in the index.
        """

    @abstractmethod
    def complete(self, prompt: str, tokens: int = 16) -> str:
        """Complete a prompt greedily with the (last) model.

        Raises:
            UsageError: the model does not generate text, or the prompt is empty or too long.
        """

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
