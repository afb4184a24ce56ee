"""How queries are asked, of an index at hand (client.py) and of a server (remote.py) alike. Nothing heavy is imported here."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ..store.errors import UsageError
from .answers import Answer, Query

if TYPE_CHECKING:
    from .metric import Mode


_KINDS: dict[str, type] = {"k": Integral, "damping": Real, "recall": Real, "where": str, "group_by": str, "mode": str}


class Options(TypedDict, total=False):
    """How queries are answered; what is not given has its default.

    Attributes:
        k: at most so many proponents, and opponents; by default 10, or all rows where there are fewer.
        opponents: whether to return opponents.
        mode: "influence" (self-influential examples weigh more), "cosine", or "loss-normalized" (over the example's own loss).
        damping: relative to the mean eigenvalue; None keeps the build's.
        curvature: False takes plain products of gradients.
        weights: by component or part, times the index's own; 0 leaves a component out.
        layers: globs over layer names; the others count nothing.
        where: a filter over the examples' columns, such as `source == "web" and year >= 2020`; other rows are not searched.
        group_by: a column; the answer has the influence of each of its values.
        mean: answer the queries' weighted mean as one query.
        recall: 1 (the default) reads all rows; below it, dense rows are searched by quantized scan and rescore, and with this probability
            none of the best is missing (see query/search.py).
        baselines: say beside each answer what BM25, the mean hidden state (where the build kept it) and the norm alone would have found;
            needs scipy and bm25s.
    """

    k: int | None
    opponents: bool
    mode: "Mode"
    damping: float | None
    curvature: bool
    weights: Mapping[str, float] | None
    layers: Sequence[str]
    where: str | None
    group_by: str | None
    mean: bool
    recall: float
    baselines: bool


def check_options(options: Mapping[str, object]) -> None:
    """Refuse what is not an option, or of another type than it can have.

    Raises:
        UsageError: names it.
    """
    unknown = sorted(options.keys() - Options.__annotations__.keys())
    if unknown:
        raise UsageError(f"{unknown[0]} is not an option; there are {', '.join(Options.__annotations__)}")
    for name, kind in _KINDS.items():
        value = options.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UsageError(f"{name} is {value!r:.80}, of another type than it can have")


class BaseClient(ABC):
    """Interface shared by local and remote clients."""

    @abstractmethod
    def query_many(self, queries: Sequence[Query], **options: Unpack[Options]) -> list[Answer]:
        """Many queries in shared passes over the model and the rows; answers in the same order, or a single one for their mean."""

    def query(
        self,
        *,
        prompt: str = "",
        completion: str | None = None,
        text: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        row: int | None = None,
        against: str | None = None,
        span: str | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """The k strongest proponents and opponents of one query.

        Args:
            prompt, completion: the loss is taken on the completion alone.
            text: the loss is taken on all of it; encoded as the documents were, with the end-of-text token unless the build left it out.
            messages: a conversation, each message with role and content, and `tools` for the chat template; the loss is taken on the
                assistant's turns.
            row: a training example, as it lies in the index.
            against: another completion: proponents made the model prefer `completion` to it.
            span: a part of the completion or text; the loss is taken on its tokens alone.
            options: see `Options`.

        Raises:
            UsageError: not exactly one query, k out of range, a text that is empty or longer than the model's context.
        """
        query = Query(prompt, completion, text, row, None, against, span, None, messages, tools)
        return self.query_many([query], **options)[0]
