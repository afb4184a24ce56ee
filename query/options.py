"""Queries and the options of their answers: the one definition that Python, command line, server and explorer follow.

Each field and option is annotated with its help, its limits and how it is shown on the command line (`Option`). Nothing heavy is imported
here, so that a command that asks a server starts at once.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from ..store.errors import UsageError
from ..store.presets import PresetName

Mode = Literal["influence", "cosine", "loss-normalized"]
_WEIGHTS = 1e-6, 1e6
_LARGEST_ROW = 2**53


@dataclass(frozen=True)
class Option:
    """Help and limits of an option, or of a query's field.

    Attributes:
        help: one sentence for the command line and the HTTP interface.
        low, high: smallest and largest number, in requests and in Python.
        longest: of a text in characters, of a list or mapping in items; in requests to a server.
        flags: on the command line, where it is not "--" and the name.
        default: shown on the command line; the value that an option has when it is not given.
        file: what kind of file the command line names with it; "" if it names none.
        on_command_line: False for a field that only files, Python and requests have.
    """

    help: str
    low: float | None = None
    high: float | None = None
    longest: int | None = None
    flags: tuple[str, ...] = ()
    default: Any = None
    file: str = ""
    on_command_line: bool = True


LONGEST_TEXT = 200_000
LONGEST_IMAGE = 1 << 25  # characters
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Query:
    """A query: a completion after a prompt, a text, chat messages, a preference pair, texts, an image, a vector, or a row of the index.

    Exactly one of them. An image may be given as the path of a file, or as its bytes; it is held as base64.

    Raises:
        UsageError: not exactly one of them is given, or a field has a value that it cannot have.
    """

    prompt: Annotated[str, Option("What comes before the completion.", longest=LONGEST_TEXT)] = ""
    completion: Annotated[str | None, Option("What the model said; the loss is on it alone.", longest=LONGEST_TEXT)] = None
    text: Annotated[
        str | None,
        Option("A full text; the loss is on all of it, with the end-of-text token where the build appended it.", longest=LONGEST_TEXT),
    ] = None
    row: Annotated[int | None, Option("A training example by its row; needs no model.", low=0, high=_LARGEST_ROW)] = None
    id: Annotated[str | None, Option("Name of the query in its answer.", longest=4096, on_command_line=False)] = None
    against: Annotated[
        str | None, Option("A contrasting completion: proponents made the model prefer the completion to it.", longest=LONGEST_TEXT)
    ] = None
    span: Annotated[
        str | None,
        Option("A part of the completion or text, exactly as it occurs there; the loss is on its tokens alone.", longest=LONGEST_TEXT),
    ] = None
    weight: Annotated[float | None, Option("In a mean of queries.", on_command_line=False)] = None
    messages: Annotated[
        Messages | None,
        Option("Chat messages, rendered by the chat template; the loss is on the assistant's turns.", longest=200, file="JSON file"),
    ] = field(default=None, hash=False)
    tools: Annotated[Messages | None, Option("Tools for the chat template.", longest=1000, on_command_line=False)] = field(
        default=None, hash=False
    )
    features: Annotated[
        Sequence[float] | None,
        Option("A vector, for an index of vectors; the loss is on its label.", longest=100_000, on_command_line=False),
    ] = field(default=None, hash=False)
    label: Annotated[int | None, Option("Class of the text, image or vector: the loss is on it.", low=0, high=2**31)] = None
    chosen: Annotated[str | None, Option("Of a preference pair, the preferred completion of the prompt.", longest=LONGEST_TEXT)] = None
    rejected: Annotated[str | None, Option("Of a preference pair, the other completion.", longest=LONGEST_TEXT)] = None
    texts: Annotated[
        Sequence[str] | None,
        Option("For sentence embeddings: an anchor, a text like it, and texts unlike it.", longest=1000, on_command_line=False),
    ] = field(default=None, hash=False)
    image: Annotated[
        str | None, Option("An image; in requests and files, its file's bytes as base64.", longest=LONGEST_IMAGE, file="Image file")
    ] = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.image, bytes | PathLike):
            object.__setattr__(self, "image", encode_image(self.image))
        for name, option in option_fields(Query).items():
            option.check(f"a query's {name}", getattr(self, name))
        if self.row is not None:
            object.__setattr__(self, "row", int(self.row))  # of a numpy integer, too
        if self.features is not None:
            try:
                object.__setattr__(self, "features", tuple(map(float, self.features)))
            except (TypeError, ValueError) as error:
                raise UsageError("a query's features are not a flat list of numbers") from error
        if self.texts is not None:
            object.__setattr__(self, "texts", tuple(self.texts))
        problem = self._problem()
        if problem is not None:
            raise UsageError(problem)

    def _problem(self) -> str | None:  # noqa: PLR0911
        forms = [name for name in _FORMS if getattr(self, name) is not None]
        if len(forms) != 1 or (self.prompt and forms not in (["completion"], ["chosen"])):
            return (
                "a query is a prompt with a completion, a text, messages, chosen and rejected, texts, an image, features, or a row: give "
                "exactly one of them"
            )
        if (self.chosen is None) != (self.rejected is None):
            return "a preference pair has a chosen and a rejected completion; give both"
        if self.tools is not None and self.messages is None:
            return "tools are given to the chat template with messages; give both"
        if self.messages is not None and not _are_messages(self.messages):
            return 'messages must be a list like [{"role": "user", "content": "..."}, ...]'
        if self.label is not None and forms[0] not in ("text", "messages", "features", "image"):
            return "a label is the class of a text, messages, an image or a vector; give it with one"
        if self.against is not None and self.completion is None:
            return "another completion to hold against needs a completion; give both"
        if self.span is not None and (forms[0] not in ("completion", "text", "messages") or self.against is not None):
            return "a span is a part of one completion or text; give it without a row and without another completion"
        if self.weight is not None and not (self.weight == 0 or _WEIGHTS[0] <= abs(self.weight) <= _WEIGHTS[1]):
            return f"a query's weight is {self.weight}; it must be 0, or between 1e-6 and 1e6 in size"
        try:
            json.dumps(self.to_dict(), ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            return "the query holds bytes that are not UTF-8 text; fix its encoding"
        except (TypeError, ValueError, RecursionError):
            return "the messages or tools hold what JSON cannot, or are nested too deeply"
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, in the order of an answer."""
        values = {name: getattr(self, name) for name in _ORDER}
        values["prompt"] = None if self.completion is None and self.chosen is None else self.prompt
        values["features"] = None if self.features is None else list(self.features)
        values["texts"] = None if self.texts is None else list(self.texts)
        return {name: value for name, value in values.items() if value is not None}


_FORMS = ("completion", "text", "messages", "row", "chosen", "texts", "image", "features")
_ORDER = (
    *("id", "prompt", "completion", "text", "messages", "tools", "row", "against", "span"),
    *("chosen", "rejected", "texts", "image", "features", "label", "weight"),
)


def encode_image(image: "bytes | str | PathLike[str]") -> str:
    """Return an image file's bytes as base64.

    Args:
        image: its bytes, or its path.

    Raises:
        UsageError: there is no such file, or it is too large.
    """
    try:
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
    except OSError as error:
        assert not isinstance(image, bytes)
        raise UsageError(f"the image {image} cannot be read: {error.strerror}") from error
    if len(content) > LONGEST_IMAGE // 4 * 3:
        raise UsageError(f"the image has {len(content):,} bytes, more than {LONGEST_IMAGE // 4 * 3:,}; make it smaller")
    return base64.b64encode(content).decode()


def _are_messages(messages: Any) -> bool:
    return (
        isinstance(messages, list | tuple)
        and bool(messages)
        and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str | list | tuple | None)
            for m in messages
        )
    )


class ScoreOptions(TypedDict, total=False):
    """Options of scores; an absent one has its default."""

    mode: Annotated[
        Mode,
        Option(
            "influence (examples with large gradients weigh more), cosine, or loss-normalized (over the example's own loss).  [default: "
            "influence; for answers of classifiers, loss-normalized]",
        ),
    ]
    damping: Annotated[
        float | None, Option("Another damping than the build's, relative to the mean eigenvalue; exact.", low=1e-6, high=1e9)
    ]
    curvature: Annotated[bool, Option("Without curvature, scores are plain products of gradients.", default=True)]
    training: Annotated[
        str | None,
        Option(
            "The training's RATE,STEPS, such as 0.01,2000 (rate over 1 - momentum), or recorded: SOURCE's filter in place of damping.",
            longest=100,
        ),
    ]
    mix: Annotated[
        str | None,
        Option(
            "Share of the second moments of the queries asked together in the curvature, or auto (TrackStar's rule): what they all share "
            "counts less.",
            longest=100,
        ),
    ]
    preset: Annotated[
        PresetName | None, Option("The preset that the index was built with: its options of queries, where they are not given.")
    ]
    refine: Annotated[
        int,
        Option(
            "Iterations of conjugate gradients with the exact Gauss-Newton matrix of all components' weights, each a pass over the corpus "
            "for each query.",
            low=0,
            high=100,
            default=0,
        ),
    ]
    weights: Annotated[
        Mapping[str, float] | None,
        Option("Weights of components, times the index's own, such as head=1,blocks=0.5; 0 leaves one out.", longest=64),
    ]
    layers: Annotated[Sequence[str], Option("Glob over layer names, such as 'h.[0-3].*'; other layers count nothing.", longest=64)]


class Options(ScoreOptions, total=False):
    """Options of an answer; an absent one has its default."""

    k: Annotated[int | None, Option("At most so many proponents, and opponents.  [default: 10]", low=1, high=_LARGEST_ROW, flags=("-k",))]
    opponents: Annotated[bool, Option("Return opponents, too.", default=True)]
    where: Annotated[
        str | None, Option("Search only rows that match a filter, such as 'source == \"web\" and year >= 2020'.", longest=4000)
    ]
    group_by: Annotated[str | None, Option("A column, such as source: the influence of each of its values, with intervals.", longest=200)]
    mean: Annotated[bool, Option("Answer the queries' weighted mean as one query.")]
    recall: Annotated[
        float,
        Option(
            "Below 1, dense rows are searched by quantized scan and rescore: none of the best is missing with this probability.",
            low=0.5,
            high=1.0,
            default=1.0,
        ),
    ]
    engine: Annotated[
        Literal["scan", "faiss"],
        Option("scan, or faiss: candidates come from the FAISS index of dense rows (wherefrom reindex --faiss).", default="scan"),
    ]
    rerank: Annotated[
        int | None,
        Option(
            "Compute the rows of so many of the best and of the worst again, without codes, and rank them by the result; 0 computes none.  "
            "[default: as many as take about two seconds, at most 100; 0 for queries by row]",
            low=0,
            high=1000,
        ),
    ]
    baselines: Annotated[bool, Option("Beside the answer: what BM25, mean hidden states and the norm alone find.")]
    partial: Annotated[
        bool, Option("Where a server's index is in parts: leave out parts that are not there at present, and say so, instead of waiting.")
    ]


@dataclass(frozen=True)
class OptionField:
    """An option or a query's field: its annotation taken apart.

    Attributes:
        kind: its type without None: str, int, float, bool, or a generic type of a list or mapping.
        choices: the texts that it can be; empty where it is free.
    """

    name: str
    option: Option
    annotation: Any
    kind: Any
    choices: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """Its flags on the command line."""
        dashed = self.name.replace("_", "-")
        if self.option.flags:
            return self.option.flags
        return (f"--{dashed}/--no-{dashed}",) if self.kind is bool and self.option.default else (f"--{dashed}",)

    def check(self, name: str, value: object) -> None:
        """Refuse a value of another type, or out of range.

        Raises:
            UsageError: it is one.
        """
        types: dict[Any, Any] = {str: str, int: Integral, float: Real, bool: (bool, int)}
        if value is None or self.kind not in types:
            return
        if not isinstance(value, types[self.kind]) or (isinstance(value, bool) and self.kind is not bool):
            raise UsageError(f"{name} is {value!r:.80}, of another type than it can have")
        low = self.option.low
        high = self.option.high
        if low is not None and high is not None and not low <= float(value) <= high:
            limits = f"at least {low:g}" if high >= _LARGEST_ROW else f"between {low:g} and {high:g}"
            raise UsageError(f"{name} is {value}; it must be {limits}")
        if self.choices and value not in self.choices:
            raise UsageError(f"{name} is {value!r:.80}; it can be {', '.join(self.choices)}")


@cache
def option_fields(owner: type) -> dict[str, OptionField]:
    """The fields of `Query`, `ScoreOptions` or `Options`, by name."""
    fields = {}
    for name, annotation in get_type_hints(owner, include_extras=True).items():
        if get_origin(annotation) is not Annotated:
            continue
        plain, option = get_args(annotation)
        members = [member for member in get_args(plain) if member is not type(None)] if get_origin(plain) in (UnionType, Union) else [plain]
        choices = get_args(members[0]) if get_origin(members[0]) is Literal else ()
        fields[name] = OptionField(name, option, plain, str if choices else members[0], choices)
    return fields


def check_queries(queries: object) -> None:
    """Refuse anything but a sequence of queries.

    Raises:
        UsageError: it is one.
    """
    if not isinstance(queries, list | tuple) or not all(isinstance(query, Query) for query in queries):
        raise UsageError("queries are a list of Query objects, such as [Query(text='...')]")


def check_options(options: Mapping[str, object]) -> None:
    """Refuse an unknown option, or a value of another type or out of range.

    Raises:
        UsageError: names it.
    """
    fields = option_fields(Options)
    unknown = sorted(options.keys() - fields.keys())
    if unknown:
        raise UsageError(f"{unknown[0]} is not an option; there are {', '.join(fields)}")
    for name, value in options.items():
        fields[name].check(f"`{name}`", value)
