"""Bodies of requests, generated from the definitions of queries and options in query/options.py."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from ..query.options import OptionField, Options, Query, ScoreOptions, option_fields
from ..remote import MOST_EXPLAINED, MOST_QUERIES

Row = Annotated[int, Field(ge=0, le=2**53, strict=True)]
IndexName = Annotated[str, Field(max_length=4096)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _IndexBody(_Body):
    index: IndexName | None = Field(None, description="By name or absolute path; optional if there is only one.")


def _definition(field: OptionField, default: Any) -> Any:
    """Definition of a body's field."""
    option = field.option
    limits: dict[str, Any] = {"ge": option.low, "le": option.high, "max_length": option.longest, "strict": field.kind is int or None}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    return field.annotation | None, Field(default, description=option.help, **given)


_query_fields = {name: _definition(field, Query.__dataclass_fields__[name].default) for name, field in option_fields(Query).items()}
_score_options = {name: _definition(field, None) for name, field in option_fields(ScoreOptions).items()}
_options = {name: _definition(field, None) for name, field in option_fields(Options).items() if name not in _score_options}
_QueryFields: Any = create_model("_QueryFields", __base__=_Body, **_query_fields)
_ScoreBody: Any = create_model("_ScoreBody", __base__=(_QueryFields, _IndexBody), **_score_options)
_OptionsBody: Any = create_model("_OptionsBody", __base__=_ScoreBody, **_options)


class QueryFields(_QueryFields):  # type: ignore[misc]
    """One query: a completion after a prompt, a text, messages, a vector, or a row."""

    def query(self) -> Query:
        """Convert to the library's query."""
        return Query(**{name: getattr(self, name) for name in _query_fields if getattr(self, name) is not None})


class EncodeBody(_ScoreBody, QueryFields):  # type: ignore[misc]
    """A query to encode."""

    def given(self, owner: type) -> Any:
        """Return the options of `ScoreOptions` or `Options` that are given."""
        return {name: getattr(self, name) for name in option_fields(owner) if getattr(self, name) is not None}


class QueryBody(_OptionsBody, EncodeBody):  # type: ignore[misc]
    """One or several queries, with their options."""

    queries: list[QueryFields] | None = Field(None, max_length=MOST_QUERIES, description="Several queries instead of one.")


class ExplainBody(EncodeBody):
    """A query, and the training examples whose scores to explain, by row."""

    examples: list[Row] = Field(min_length=1, max_length=MOST_EXPLAINED)
    tokens: bool = True


class ScoresBody(EncodeBody):
    """A query to score with every row."""

    where: Annotated[str, Field(max_length=4000)] | None = None
    format: Literal["histogram", "float32"] = "histogram"


class CompleteBody(_IndexBody):
    """A prompt for the model to complete."""

    prompt: Annotated[str, Field(max_length=200_000)]
    tokens: int = Field(16, ge=1, le=128)


class ExportBody(_IndexBody):
    """Examples that were taken away."""

    kind: Annotated[str, Field(max_length=40)]
    ids: list[Annotated[str, Field(max_length=4096)]] = Field(max_length=10_000)


class SavedBody(_IndexBody):
    """A query to save: the fields of a request to /v1/query."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    note: Annotated[str, Field(max_length=4000)] = ""
    query: QueryBody
