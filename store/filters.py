"""Filters over examples' columns: `source == "gsm8k" and year >= 2020`.

A filter is a Python expression, parsed by Python's own `ast` and evaluated node by node over Arrow columns; nothing of it is ever run as
Python. It may hold columns, numbers, strings, True, False and None, lists (after `in`), comparisons, `and`, `or`, `not`. Columns are `id`,
`document`, `chunk`, `text`, `source` and the corpus's own; one of the corpus's that has such a name too is `metadata.text`, and a name
with spaces is written `column("the name")`. A row that lacks the value (None) matches nothing but `== None`.

Comparisons are exact: a number is never rounded to a column's type, nor turned into text. Dates and times are compared with ISO text (a
time without a zone is in the column's), durations with seconds. Where a column holds values of several kinds, `==`, `!=` and `in` look at
those of the constant's kind (all others differ from it), and an order between different kinds is refused.
"""

import ast
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, tzinfo
from decimal import ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Any, TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from .errors import IntegrityError, UsageError

_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.Is: "==",
    ast.NotEq: "!=",
    ast.IsNot: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_PYTHON: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_ARROW = {"==": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}
_TEXT: dict[str, tuple[Callable[..., Any], Callable[[str, str], bool]]] = {
    "startswith": (pc.starts_with, str.startswith),
    "endswith": (pc.ends_with, str.endswith),
    "contains": (pc.match_substring, str.__contains__),
}
_LONGEST, _LONGEST_BITS = 10_000, 2048
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_WRITTEN = {
    "date": "ISO dates, such as '2024-05-06'",
    "time": "ISO times, such as '2024-05-06 07:08'",
    "time of day": "ISO times of day, such as '07:08'",
    "duration": "seconds, such as 1.5",
}

_Truth: TypeAlias = pa.Array  # of booleans, null where a value is lacking
JSON_KIND = "JSON"
SINGLE_KINDS = ("number", "text", "truth", *_WRITTEN, JSON_KIND)


@dataclass(frozen=True)
class Column:
    """Some rows of a column, and whether its values are kept as JSON text."""

    values: pa.ChunkedArray | pa.Array
    encoded: bool = False

    @property
    def kind(self) -> str | None:
        """See `kind_of`."""
        return JSON_KIND if self.encoded else kind_of(self.values.type)

    def decoded(self) -> list[Any]:
        """Its values, as Python has them.

        Raises:
            IntegrityError: some are none that a build writes.
        """
        try:
            values = self.values.to_pylist()
            return [None if v is None else json.loads(v) for v in values] if self.encoded else values
        except (pa.ArrowException, ValueError, OverflowError, RecursionError) as error:
            raise IntegrityError("a column of the corpus holds values that no build writes; build the index again") from error


def kind_of(kind: pa.DataType) -> str | None:
    """What values of a type are compared as, in a word for people; None of a type that has no values."""
    of = pa.types
    if of.is_dictionary(kind):
        return kind_of(kind.value_type)
    kinds = {
        "number": of.is_integer(kind) or of.is_floating(kind) or of.is_decimal(kind),
        "text": of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind),
        "truth": of.is_boolean(kind),
        "date": of.is_date(kind),
        "time": of.is_timestamp(kind),
        "time of day": of.is_time(kind),
        "duration": of.is_duration(kind),
        "list": of.is_nested(kind) and not of.is_struct(kind) and not of.is_map(kind),
        "object": of.is_struct(kind) or of.is_map(kind),
    }
    return None if of.is_null(kind) else next((name for name, fits in kinds.items() if fits), str(kind))


def kind_of_value(value: Any) -> str:
    """The same of a value of JSON."""
    kinds = {bool: "truth", int: "number", float: "number", str: "text", list: "list"}
    return kinds.get(type(value), "object")


def parse_filter(text: str) -> ast.expr:
    """A filter as a syntax tree.

    Raises:
        UsageError: it is no expression.
    """
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"longer than {_LONGEST:,} characters")
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(
            f'the filter {text[:80]!r} is not an expression ({error}); write one such as source == "web" and year >= 2020'
        ) from error


def names_in(tree: ast.expr) -> set[str]:
    """The columns that a filter asks for."""
    return {name for node in ast.walk(tree) if (name := _column(node)) is not None}


def matching(tree: ast.expr, columns: Mapping[str, Column], kinds: Mapping[str, frozenset[str]], rows: int) -> Bool[np.ndarray, " rows"]:
    """Which rows match.

    Args:
        columns: of these rows; one that is lacking is None in all of them.
        kinds: of the whole index's columns: the kinds of values that they hold anywhere.

    Raises:
        UsageError: an unknown column, or values that cannot be compared.
    """
    try:
        found = _Evaluation(columns, kinds, rows).of(tree)
    except RecursionError as error:
        raise UsageError("the filter is nested too deeply; write it with fewer brackets") from error
    return np.asarray(pc.fill_null(found, False))


def _column(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name) and node.id != "column":
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "metadata" and node.attr not in _TEXT:
        return f"metadata.{node.attr}"
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "column" and len(node.args) == 1
    if called and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):  # type: ignore[attr-defined]
        return node.args[0].value  # type: ignore[attr-defined]
    return None


class _Evaluation:
    """A filter over some rows."""

    def __init__(self, columns: Mapping[str, Column], kinds: Mapping[str, frozenset[str]], rows: int) -> None:
        self._columns, self._kinds, self._rows = columns, kinds, rows

    def of(self, node: ast.expr) -> _Truth:
        """The truth of a node, of those that are allowed."""
        if isinstance(node, ast.BoolOp):
            whole = self.of(node.values[0])
            for value in node.values[1:]:
                whole = (pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene)(whole, self.of(value))
            return whole
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return pc.invert(self.of(node.operand))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            whole = self._compare(sides[0], node.ops[0], sides[1])
            for i, op in enumerate(node.ops[1:], 1):
                whole = pc.and_kleene(whole, self._compare(sides[i], op, sides[i + 1]))
            return whole
        text = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _TEXT and len(node.args) == 1
        if text and not node.keywords:  # type: ignore[attr-defined]
            given = _constant(node.args[0])  # type: ignore[attr-defined]
            if isinstance(given, str):
                return self._part_of_text(node.func.value, node.func.attr, given)  # type: ignore[attr-defined]
        if _column(node) is not None:
            name = self._name(node)
            self._check(name, "==", {"truth"}, "True")
            return self._equal(name, "==", True)
        raise UsageError(
            f"a filter cannot hold {ast.unparse(node)[:80]!r}; it compares columns with values: ==, !=, <, <=, >, >=, in, and, or, not, "
            "and a text column's .startswith, .endswith and .contains"
        )

    def _name(self, node: ast.expr) -> str:
        name = _column(node)
        if name is None:
            raise UsageError(f"a filter compares columns with values, and {ast.unparse(node)[:80]!r} is not a column's name")
        if name not in self._kinds:
            raise UsageError(f"there is no column {name!r}; this index has {', '.join(sorted(self._kinds))}")
        return name

    def _of(self, name: str) -> Column:
        return self._columns.get(name) or Column(pa.chunked_array([pa.nulls(self._rows)]))

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Truth:
        if isinstance(op, (ast.In, ast.NotIn)):
            name = self._name(left)
            if not isinstance(right, (ast.List, ast.Tuple)):
                raise UsageError(f"after `in` a filter needs a list such as ['web', 'books'], not {ast.unparse(right)[:80]!r}")
            found = self._among(name, [_constant(item) for item in right.elts])
            return pc.invert(found) if isinstance(op, ast.NotIn) else found
        sign = _OPERATORS[type(op)]
        if _column(left) is None:
            if _column(right) is None:
                raise UsageError(f"a filter compares a column with a value, and {ast.unparse(left)[:80]!r} is not a column's name")
            left, right, sign = right, left, _TURNED.get(sign, sign)
        name = self._name(left)
        if _column(right) is not None:
            return self._compare_columns(name, sign, self._name(right))
        value = _constant(right)
        if value is None:
            if sign not in ("==", "!="):
                raise UsageError("None can only be compared with == and !=")
            values = self._of(name).values
            return _whole(pc.is_null(values) if sign == "==" else pc.is_valid(values))
        self._check(name, sign, _kinds_of_constant(value), repr(value))
        return self._equal(name, sign, value)

    def _check(self, name: str, sign: str, fitting: Iterable[str], shown: str) -> None:
        """Refuse to compare a column with a constant of another kind, or by order where only a part of it is of that kind."""
        kinds = self._kinds[name] - {JSON_KIND}
        if not kinds or kinds <= set(fitting) or (kinds & set(fitting) and sign in ("==", "!=")):
            return
        if JSON_KIND in self._kinds[name] and sign in ("==", "!="):
            return
        words = " and ".join(sorted(kinds))
        written = next((f"; write {_WRITTEN[kind]}" for kind in sorted(kinds) if kind in _WRITTEN), "")
        if kinds & set(fitting):
            raise UsageError(f"the column {name!r} holds values of several kinds ({words}), which have no order; compare it with == or in")
        only = "; a list or an object can only be compared with None" if kinds <= {"list", "object"} else written
        raise UsageError(f"the column {name!r} holds values of the kind {words}, which cannot be compared with {shown}{only}")

    def _equal(self, name: str, sign: str, value: Any) -> _Truth:
        """A column against a constant, by any of the six signs."""
        column = self._of(name)
        if column.encoded:
            return _by_value(column.values, lambda own: _compared(own, sign, value, name))
        values, kind = _plain(column.values), column.kind
        if kind is None:
            return pa.nulls(self._rows, pa.bool_())
        if kind not in _kinds_of_constant(value):
            return _constant_truth(values, sign == "!=")
        if kind in ("text", "truth"):
            return _whole(_ARROW[sign](values, pa.scalar(value, values.type)))
        line = _Line.of(values, name)
        return line.against(sign, line.place(value))

    def _among(self, name: str, items: Sequence[Any]) -> _Truth:
        if None in items:
            raise UsageError("None cannot stand in a list; compare the column with None by ==")
        for item in items:
            self._check(name, "==", _kinds_of_constant(item), f"{item!r} in the list")
        column = self._of(name)
        if column.encoded:
            return _by_value(column.values, lambda own: any(_compared(own, "==", item, name) for item in items))
        values, kind = _plain(column.values), column.kind
        fitting = [item for item in items if kind in _kinds_of_constant(item)]
        if kind is None or not fitting:
            return _constant_truth(values, False)
        if kind in ("text", "truth"):
            known = pa.array(fitting, values.type)
        else:
            line = _Line.of(values, name)
            places = [line.place(item) for item in fitting]
            values, known = line.values, pa.array([at for at, exact in places if exact], line.values.type)
        return _known_only(values, pc.is_in(values, value_set=known))

    def _part_of_text(self, node: ast.expr, method: str, part: str) -> _Truth:
        name = self._name(node)
        kinds, (arrow, python) = self._kinds[name], _TEXT[method]
        if kinds and not kinds & {"text", JSON_KIND}:
            raise UsageError(f"the column {name!r} holds values of the kind {' and '.join(sorted(kinds))}; .{method} is for text")
        column = self._of(name)
        if column.encoded:
            return _by_value(column.values, lambda own: isinstance(own, str) and python(own, part))
        values = _plain(column.values)
        return _whole(arrow(values, part)) if column.kind == "text" else _constant_truth(values, False)

    def _compare_columns(self, left: str, sign: str, right: str) -> _Truth:
        """Row by row: in Arrow where both are of one type whose order is its own, else as Python has the values."""
        a, b = self._of(left), self._of(right)
        if a.values.type == b.values.type and a.kind == b.kind and a.kind in ("text", "number", "date", "time", "truth"):
            return _whole(_ARROW[sign](_plain(a.values), _plain(b.values)))
        pairs = zip(a.decoded(), b.decoded(), strict=True)
        same = a.kind == b.kind or JSON_KIND in (a.kind, b.kind) or None in (a.kind, b.kind)
        if not same and sign not in ("==", "!="):
            raise UsageError(f"the columns {left!r} and {right!r} hold values of the kinds {a.kind} and {b.kind}, which have no order")
        try:
            found = [None if x is None or y is None else _compared_values(x, sign, y) for x, y in pairs]
        except TypeError as error:
            raise UsageError(f"the columns {left!r} and {right!r} hold values of different kinds, which have no order") from error
        return pa.array(found, pa.bool_())


@dataclass(frozen=True)
class _Line:
    """Values that lie on a line, and the exact places of constants between them.

    Attributes:
        values: integers, floats or decimals.
        place: of a constant: the largest value of this type that is not above it (None: there is none), and whether the two are equal.
    """

    values: pa.ChunkedArray
    place: Callable[[Any], tuple[Any, bool]]

    @classmethod
    def of(cls, values: pa.ChunkedArray, name: str) -> "_Line":
        """The line of a column of numbers, dates, times or durations."""
        kind, of = values.type, pa.types
        if of.is_floating(kind):
            return cls(values.cast(pa.float64()), _float_below)
        if of.is_decimal(kind):
            return cls(values, lambda v: _decimal_below(_exact(v), kind))
        if of.is_integer(kind):
            bounds = np.iinfo(kind.to_pandas_dtype())
            return cls(values, lambda v: _integer_below(_exact(v), int(bounds.min), int(bounds.max)))
        wide = 64 if of.is_timestamp(kind) or of.is_duration(kind) or of.is_time64(kind) or of.is_date64(kind) else 32
        units = Fraction(1, 86400) if of.is_date32(kind) else Fraction(1000) if of.is_date64(kind) else Fraction(_UNITS[kind.unit])
        numbers, bound = values.cast(pa.int64() if wide == 64 else pa.int32()), 1 << (wide - 1)
        return cls(numbers, lambda v: _integer_below(_seconds(v, kind, name) * units, -bound, bound - 1))

    def against(self, sign: str, place: tuple[Any, bool]) -> _Truth:
        """Values against a constant at a place."""
        below, exact = place
        if below is None:
            return _constant_truth(self.values, sign in (">", ">=", "!="))
        if not exact:
            if sign in ("==", "!="):
                return _constant_truth(self.values, sign == "!=")
            sign = {"<": "<=", ">=": ">"}.get(sign, sign)
        return _whole(_ARROW[sign](self.values, pa.scalar(below, self.values.type)))


def _exact(value: float) -> Fraction | float:
    """A number as it was written (1.1 is eleven tenths); infinities as they are."""
    return value if isinstance(value, float) and math.isinf(value) else Fraction(repr(value) if isinstance(value, float) else value)


def _integer_below(value: Fraction | float, lowest: int, highest: int) -> tuple[int | None, bool]:
    if value < lowest:
        return None, False
    return (highest, False) if value > highest else (math.floor(value), value == math.floor(value))


def _float_below(value: float) -> tuple[float, bool]:
    try:
        nearest = float(value)
    except OverflowError:
        nearest = math.inf if value > 0 else -math.inf
    below = nearest if nearest <= value else math.nextafter(nearest, -math.inf)
    return below, below == value


def _decimal_below(value: Fraction | float, kind: pa.DataType) -> tuple[Decimal | None, bool]:
    most = 10**kind.precision - 1
    below, exact = _integer_below(value * 10**kind.scale if kind.scale >= 0 else value / Fraction(10**-kind.scale), -most, most)
    return below if below is None else Decimal(below).scaleb(-kind.scale, Context(prec=100, rounding=ROUND_FLOOR)), exact


def _seconds(value: Any, kind: pa.DataType, name: str) -> Fraction | float:
    """A constant that is compared with dates, times or durations: seconds since 1970, since midnight, or of the duration."""
    if not isinstance(value, str):
        return _exact(value)
    try:
        if pa.types.is_time(kind):
            at = time.fromisoformat(value)
            if at.tzinfo is not None:
                raise ValueError
            return Fraction(at.hour * 3600 + at.minute * 60 + at.second) + Fraction(at.microsecond, 10**6)
        moment = datetime.fromisoformat(value)
        if pa.types.is_timestamp(kind) and kind.tz:
            moment = moment if moment.tzinfo else moment.replace(tzinfo=_zone(kind.tz))
        elif moment.tzinfo is not None:
            raise UsageError(f"the column {name!r} holds dates and times without a zone; write {value!r} without one")
        since = moment - datetime(1970, 1, 1, tzinfo=UTC if moment.tzinfo else None)
    except ZoneInfoNotFoundError as error:
        raise UsageError(
            f"the zone {kind.tz!r} of the column {name!r} is not known here; write the time with its own, as +01:00"
        ) from error
    except (ValueError, OverflowError) as error:
        if isinstance(error, UsageError):
            raise
        word = str(kind_of(kind))
        raise UsageError(f"the column {name!r} holds values of the kind {word}, and {value!r} is none; write {_WRITTEN[word]}") from error
    return Fraction(since.days * 86400 + since.seconds) + Fraction(since.microseconds, 10**6)


def _zone(name: str) -> tzinfo | None:
    """A zone by Arrow's name for it: UTC, an offset such as +01:00, or a place."""
    if name == "UTC":
        return UTC
    return datetime.fromisoformat(f"2000-01-01T00:00{name}").tzinfo if name[0] in "+-" else ZoneInfo(name)


def _kinds_of_constant(value: Any) -> set[str]:
    """Of columns, those that a constant can be compared with."""
    if isinstance(value, bool):
        return {"truth"}
    return {"text", "date", "time", "time of day"} if isinstance(value, str) else {"number", "duration"}


def _constant(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str, type(None))):
        if isinstance(node.value, str) and not node.value.isascii() and any("\ud800" <= c <= "\udfff" for c in node.value):
            raise UsageError("the filter holds half of a surrogate pair, which is not a character; fix its encoding")
        if isinstance(node.value, int) and node.value.bit_length() > _LONGEST_BITS:
            raise UsageError("the filter holds a number that is larger than any that can be stored; fix it")
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = node.operand.value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value
    raise UsageError(f"a filter compares columns with numbers and quoted strings, and {ast.unparse(node)[:80]!r} is neither")


def _compared(own: Any, sign: str, value: Any, name: str) -> bool:
    """A value of JSON against a constant."""
    if kind_of_value(own) == kind_of_value(value):
        return bool(_PYTHON[sign](own, value))
    if sign in ("==", "!="):
        return sign == "!="
    raise UsageError(
        f"the column {name!r} holds values of several kinds, among them {json.dumps(own, ensure_ascii=False)[:80]}, which has no order "
        f"with {value!r}; compare it with == or in"
    )


def _compared_values(x: Any, sign: str, y: Any) -> bool:
    if sign in ("==", "!=") and isinstance(x, bool) != isinstance(y, bool):
        return sign == "!="
    return bool(_PYTHON[sign](x, y))


def _by_value(values: pa.ChunkedArray, holds: Callable[[Any], bool]) -> _Truth:
    """What holds of values that are kept as JSON text; each is looked at once."""
    coded = _whole(values).dictionary_encode()
    known = pa.array([holds(value) for value in Column(coded.dictionary, encoded=True).decoded()], pa.bool_())
    return pc.take(known, coded.indices)


def _plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    return values.cast(pa.large_string() if pa.types.is_string_view(kind) else kind)


def _whole(values: pa.ChunkedArray | pa.Array) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _constant_truth(values: pa.ChunkedArray, truth: bool) -> _Truth:
    return _known_only(values, pa.array(np.full(len(values), truth)))


def _known_only(values: pa.ChunkedArray, truth: Any) -> _Truth:
    """Null where a value is lacking."""
    return pc.if_else(_whole(pc.is_valid(values)), _whole(truth), pa.scalar(None, pa.bool_()))
