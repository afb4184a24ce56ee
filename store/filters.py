"""Filters over examples' columns, such as `source == "gsm8k" and year >= 2020`.

A filter is a Python expression that is parsed by `ast` and evaluated node by node over Arrow columns; it is never run as Python. It may
contain columns, numbers, strings, True, False and None, lists (after `in`), comparisons, `and`, `or`, `not`. Columns are `id`, `document`,
`chunk`, `text`, `source` and the corpus's columns. A corpus column with one of these names is `metadata.text`, and a name with spaces is
written `column("the name")`. A row without a value (None) only matches `== None`.

Comparisons are exact: a number is never rounded to a column's type, nor converted to text. Dates and times are compared with ISO text (a
time without a zone is in the column's zone), durations with seconds. In a column with values of several kinds, `==`, `!=` and `in` compare
those of the constant's kind (all others differ from it); an order between different kinds is an error.
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

from .errors import IntegrityError, UsageError
from .shapes import Bool

_OPERATORS = {ast.Eq: "==", ast.Is: "==", ast.NotEq: "!=", ast.IsNot: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_REVERSED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_PYTHON = {"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_ARROW = {"==": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}
_TEXT: dict[str, tuple[Callable[..., Any], Callable[[str, str], bool]]] = {
    "startswith": (pc.starts_with, str.startswith),
    "endswith": (pc.ends_with, str.endswith),
    "contains": (pc.match_substring, str.__contains__),
}
_LONGEST = 10_000
_LONGEST_BITS = 2048
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_WRITTEN = {
    "date": "ISO dates, such as '2024-05-06'",
    "time": "ISO times, such as '2024-05-06 07:08'",
    "time of day": "ISO times of day, such as '07:08'",
    "duration": "seconds, such as 1.5",
}

_Truth: TypeAlias = pa.Array  # of booleans, null where a value is missing
JSON_KIND = "JSON"
SINGLE_KINDS = ("number", "text", "truth", *_WRITTEN, JSON_KIND)


@dataclass(frozen=True)
class Column:
    """Some rows of a column; `encoded` is True if the values are JSON text."""

    values: pa.ChunkedArray | pa.Array
    encoded: bool = False

    @property
    def kind(self) -> str | None:
        """The kind of the values; see `kind_of`."""
        return JSON_KIND if self.encoded else kind_of(self.values.type)

    def decoded(self) -> list[Any]:
        """Return the values as Python objects.

        Raises:
            IntegrityError: a value is invalid.
        """
        try:
            values = self.values.to_pylist()
            return [None if v is None else json.loads(v) for v in values] if self.encoded else values
        except (pa.ArrowException, ValueError, OverflowError, RecursionError) as error:
            raise IntegrityError("a column of the corpus has invalid values; build the index again") from error


def kind_of(kind: pa.DataType) -> str | None:
    """Return the name of the kind as which values of a type are compared; None for the null type."""
    types = pa.types
    if types.is_dictionary(kind):
        return kind_of(kind.value_type)
    kinds = {
        "number": types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind),
        "text": types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind),
        "truth": types.is_boolean(kind),
        "date": types.is_date(kind),
        "time": types.is_timestamp(kind),
        "time of day": types.is_time(kind),
        "duration": types.is_duration(kind),
        "list": types.is_nested(kind) and not types.is_struct(kind) and not types.is_map(kind),
        "object": types.is_struct(kind) or types.is_map(kind),
    }
    return None if types.is_null(kind) else next((name for name, fits in kinds.items() if fits), str(kind))


def kind_of_value(value: Any) -> str:
    """Return the name of the kind of a JSON value."""
    kinds = {bool: "truth", int: "number", float: "number", str: "text", list: "list"}
    return kinds.get(type(value), "object")


def parse_filter(text: str) -> ast.expr:
    """Parse a filter to a syntax tree.

    Raises:
        UsageError: it is not an expression.
    """
    if len(text) > _LONGEST:
        raise UsageError(f"the filter {text[:80]!r} is longer than {_LONGEST:,} characters; shorten it")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f'the filter {text[:80]!r} is not an expression; write one such as source == "web" and year >= 2020') from error


def names_in(tree: ast.expr) -> set[str]:
    """Return the names of a filter's columns."""
    return {name for node in ast.walk(tree) if (name := _column(node)) is not None}


def matching(tree: ast.expr, columns: Mapping[str, Column], kinds: Mapping[str, frozenset[str]], rows: int) -> Bool[np.ndarray, " rows"]:
    """Return a mask of the matching rows.

    Args:
        columns: the columns of these rows; a missing column has no values.
        kinds: by column, the kinds of values in the full index.
        rows: the number of rows.

    Raises:
        UsageError: an unknown column, or values that cannot be compared.
    """
    try:
        mask = _Evaluation(columns, kinds, rows).of(tree)
    except RecursionError as error:
        raise UsageError("the filter is nested too deeply; write it with fewer brackets") from error
    return np.asarray(pc.fill_null(mask, False))


def _column(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name) and node.id != "column":
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "metadata" and node.attr not in _TEXT:
        return f"metadata.{node.attr}"
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "column" and len(node.args) == 1
    if is_call and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):  # type: ignore[attr-defined]
        return node.args[0].value  # type: ignore[attr-defined]
    return None


class _Evaluation:
    """Evaluation of a filter over some rows."""

    def __init__(self, columns: Mapping[str, Column], kinds: Mapping[str, frozenset[str]], rows: int) -> None:
        self._columns = columns
        self._kinds = kinds
        self._rows = rows

    def of(self, node: ast.expr) -> _Truth:
        """Evaluate a node of a supported type."""
        if isinstance(node, ast.BoolOp):
            truth = self.of(node.values[0])
            for value in node.values[1:]:
                truth = (pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene)(truth, self.of(value))
            return truth
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return pc.invert(self.of(node.operand))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            truth = self._compare(sides[0], node.ops[0], sides[1])
            for i, op in enumerate(node.ops[1:], 1):
                truth = pc.and_kleene(truth, self._compare(sides[i], op, sides[i + 1]))
            return truth
        text = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _TEXT and len(node.args) == 1
        if text and not node.keywords:  # type: ignore[attr-defined]
            argument = _constant(node.args[0])  # type: ignore[attr-defined]
            if isinstance(argument, str):
                return self._match_text(node.func.value, node.func.attr, argument)  # type: ignore[attr-defined]
        if _column(node) is not None:
            name = self._name(node)
            self._check(name, "==", {"truth"}, "True")
            return self._equal(name, "==", True)
        raise UsageError(
            f"a filter cannot contain {ast.unparse(node)[:80]!r}; it compares columns with values: ==, !=, <, <=, >, >=, in, and, or, not, "
            "and a text column's .startswith, .endswith and .contains"
        )

    def _name(self, node: ast.expr) -> str:
        name = _column(node)
        if name is None:
            raise UsageError(f"a filter compares columns with values, and {ast.unparse(node)[:80]!r} is not a column's name")
        if name not in self._kinds:
            raise UsageError(f"there is no column {name!r}; this index has {', '.join(sorted(self._kinds))}")
        return name

    def _get_column(self, name: str) -> Column:
        return self._columns.get(name) or Column(pa.chunked_array([pa.nulls(self._rows)]))

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Truth:
        if isinstance(op, (ast.In, ast.NotIn)):
            name = self._name(left)
            if not isinstance(right, (ast.List, ast.Tuple)):
                raise UsageError(f"after `in` a filter needs a list such as ['web', 'books'], not {ast.unparse(right)[:80]!r}")
            truth = self._is_in(name, [_constant(item) for item in right.elts])
            return pc.invert(truth) if isinstance(op, ast.NotIn) else truth
        sign = _OPERATORS[type(op)]
        if _column(left) is None:
            if _column(right) is None:
                raise UsageError(f"a filter compares a column with a value, and {ast.unparse(left)[:80]!r} is not a column's name")
            left, right = right, left
            sign = _REVERSED.get(sign, sign)
        name = self._name(left)
        if _column(right) is not None:
            return self._compare_columns(name, sign, self._name(right))
        value = _constant(right)
        if value is None:
            if sign not in ("==", "!="):
                raise UsageError("None has no order; compare the column with None by == or !=")
            values = self._get_column(name).values
            return _combined(pc.is_null(values) if sign == "==" else pc.is_valid(values))
        self._check(name, sign, _kinds_of_constant(value), repr(value))
        return self._equal(name, sign, value)

    def _check(self, name: str, sign: str, constant_kinds: Iterable[str], constant: str) -> None:
        """Check that a column can be compared with a constant; an order needs all values to be of the constant's kind."""
        kinds = self._kinds[name] - {JSON_KIND}
        if not kinds or kinds <= set(constant_kinds) or (kinds & set(constant_kinds) and sign in ("==", "!=")):
            return
        if JSON_KIND in self._kinds[name] and sign in ("==", "!="):
            return
        words = " and ".join(sorted(kinds))
        hint = next((f"; write {_WRITTEN[kind]}" for kind in sorted(kinds) if kind in _WRITTEN), "")
        if kinds & set(constant_kinds):
            raise UsageError(f"the column {name!r} holds values of several kinds ({words}), which have no order; compare it with == or in")
        advice = "; a list or an object can only be compared with None" if kinds <= {"list", "object"} else hint
        raise UsageError(f"the column {name!r} holds values of the kind {words}, which cannot be compared with {constant}{advice}")

    def _equal(self, name: str, sign: str, value: Any) -> _Truth:
        """Compare a column with a constant, by any of the six signs."""
        column = self._get_column(name)
        if column.encoded:
            return _by_value(column.values, lambda item: _compared(item, sign, value, name))
        values = _plain(column.values)
        kind = column.kind
        if kind is None:
            return pa.nulls(self._rows, pa.bool_())
        if kind not in _kinds_of_constant(value):
            return _constant_truth(values, sign == "!=")
        if kind in ("text", "truth"):
            return _combined(_ARROW[sign](values, pa.scalar(value, values.type)))
        scale = _Scale.of(values, name)
        return scale.compare(sign, scale.place(value))

    def _is_in(self, name: str, items: Sequence[Any]) -> _Truth:
        if None in items:
            raise UsageError("None cannot be in a list; compare the column with None by ==")
        for item in items:
            self._check(name, "==", _kinds_of_constant(item), f"{item!r} in the list")
        column = self._get_column(name)
        if column.encoded:
            return _by_value(column.values, lambda element: any(_compared(element, "==", item, name) for item in items))
        values = _plain(column.values)
        kind = column.kind
        constants = [item for item in items if kind in _kinds_of_constant(item)]
        if kind is None or not constants:
            return _constant_truth(values, False)
        if kind in ("text", "truth"):
            value_set = pa.array(constants, values.type)
        else:
            scale = _Scale.of(values, name)
            places = [scale.place(item) for item in constants]
            values = scale.values
            value_set = pa.array([place for place, exact in places if exact], values.type)
        return _null_where_missing(values, pc.is_in(values, value_set=value_set))

    def _match_text(self, node: ast.expr, method: str, argument: str) -> _Truth:
        name = self._name(node)
        kinds = self._kinds[name]
        arrow, python = _TEXT[method]
        if kinds and not kinds & {"text", JSON_KIND}:
            raise UsageError(f"the column {name!r} holds values of the kind {' and '.join(sorted(kinds))}; .{method} is for text")
        column = self._get_column(name)
        if column.encoded:
            return _by_value(column.values, lambda item: isinstance(item, str) and python(item, argument))
        values = _plain(column.values)
        return _combined(arrow(values, argument)) if column.kind == "text" else _constant_truth(values, False)

    def _compare_columns(self, left: str, sign: str, right: str) -> _Truth:
        """Compare two columns row by row: in Arrow if both have one type with an order, else as Python objects."""
        a = self._get_column(left)
        b = self._get_column(right)
        if a.values.type == b.values.type and a.kind == b.kind and a.kind in ("text", "number", "date", "time", "truth"):
            return _combined(_ARROW[sign](_plain(a.values), _plain(b.values)))
        pairs = zip(a.decoded(), b.decoded(), strict=True)
        same = a.kind == b.kind or JSON_KIND in (a.kind, b.kind) or None in (a.kind, b.kind)
        if not same and sign not in ("==", "!="):
            raise UsageError(f"the columns {left!r} and {right!r} hold values of the kinds {a.kind} and {b.kind}; use == or !=")
        try:
            truth = [None if x is None or y is None else _compared_values(x, sign, y) for x, y in pairs]
        except TypeError as error:
            raise UsageError(f"the columns {left!r} and {right!r} hold values of different kinds; use == or !=") from error
        return pa.array(truth, pa.bool_())


@dataclass(frozen=True)
class _Scale:
    """The values of an ordered column, and exact positions of constants among them.

    Attributes:
        values: integers, floats or decimals.
        place: a function of a constant that returns the largest value of this type up to it (None if there is none), and True if equal.
    """

    values: pa.ChunkedArray
    place: Callable[[Any], tuple[Any, bool]]

    @classmethod
    def of(cls, values: pa.ChunkedArray, name: str) -> "_Scale":
        """Create the scale of a column of numbers, dates, times or durations."""
        kind = values.type
        types = pa.types
        if types.is_floating(kind):
            return cls(values.cast(pa.float64()), _float_below)
        if types.is_decimal(kind):
            return cls(values, lambda v: _decimal_below(_exact(v), kind))
        if types.is_integer(kind):
            bounds = np.iinfo(kind.to_pandas_dtype())
            return cls(values, lambda v: _integer_below(_exact(v), int(bounds.min), int(bounds.max)))
        bits = 64 if types.is_timestamp(kind) or types.is_duration(kind) or types.is_time64(kind) or types.is_date64(kind) else 32
        units = Fraction(1, 86400) if types.is_date32(kind) else Fraction(1000) if types.is_date64(kind) else Fraction(_UNITS[kind.unit])
        numbers = values.cast(pa.int64() if bits == 64 else pa.int32())
        bound = 1 << (bits - 1)
        return cls(numbers, lambda v: _integer_below(_seconds(v, kind, name) * units, -bound, bound - 1))

    def compare(self, sign: str, place: tuple[Any, bool]) -> _Truth:
        """Compare the values with a constant, given the result of `place`."""
        below, exact = place
        if below is None:
            return _constant_truth(self.values, sign in (">", ">=", "!="))
        if not exact:
            if sign in ("==", "!="):
                return _constant_truth(self.values, sign == "!=")
            sign = {"<": "<=", ">=": ">"}.get(sign, sign)
        return _combined(_ARROW[sign](self.values, pa.scalar(below, self.values.type)))


def _exact(value: float) -> Fraction | float:
    """Return the exact value of a number as written (1.1 is eleven tenths); infinities are unchanged."""
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
    """Convert a constant for dates, times or durations to seconds: since 1970, since midnight, or of the duration."""
    if not isinstance(value, str):
        return _exact(value)
    try:
        if pa.types.is_time(kind):
            clock = time.fromisoformat(value)
            if clock.tzinfo is not None:
                raise ValueError
            return Fraction(clock.hour * 3600 + clock.minute * 60 + clock.second) + Fraction(clock.microsecond, 10**6)
        moment = datetime.fromisoformat(value)
        if pa.types.is_timestamp(kind) and kind.tz:
            moment = moment if moment.tzinfo else moment.replace(tzinfo=_zone(kind.tz))
        elif moment.tzinfo is not None:
            raise UsageError(f"the column {name!r} holds dates and times without a zone; write {value!r} without one")
        since = moment - datetime(1970, 1, 1, tzinfo=UTC if moment.tzinfo else None)
    except ZoneInfoNotFoundError as error:
        raise UsageError(f"the zone {kind.tz!r} of the column {name!r} is unknown; write the time with its zone, as +01:00") from error
    except (ValueError, OverflowError) as error:
        if isinstance(error, UsageError):
            raise
        word = str(kind_of(kind))
        raise UsageError(
            f"the column {name!r} holds values of the kind {word}, but {value!r} is not one; write {_WRITTEN[word]}"
        ) from error
    return Fraction(since.days * 86400 + since.seconds) + Fraction(since.microseconds, 10**6)


def _zone(name: str) -> tzinfo | None:
    """Return the time zone of Arrow's name: UTC, an offset such as +01:00, or a place."""
    if name == "UTC":
        return UTC
    return datetime.fromisoformat(f"2000-01-01T00:00{name}").tzinfo if name[0] in "+-" else ZoneInfo(name)


def _kinds_of_constant(value: Any) -> set[str]:
    """Return the kinds of columns that a constant can be compared with."""
    if isinstance(value, bool):
        return {"truth"}
    return {"text", "date", "time", "time of day"} if isinstance(value, str) else {"number", "duration"}


def _constant(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str, type(None))):
        if isinstance(node.value, str) and not node.value.isascii() and any("\ud800" <= c <= "\udfff" for c in node.value):
            raise UsageError("the filter holds half of a surrogate pair, which is not a character; fix its encoding")
        if isinstance(node.value, int) and node.value.bit_length() > _LONGEST_BITS:
            raise UsageError("the filter holds a number that is larger than any that can be stored; write a smaller one")
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = node.operand.value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value
    raise UsageError(f"a filter compares columns with numbers and quoted strings, and {ast.unparse(node)[:80]!r} is neither")


def _compared(item: Any, sign: str, value: Any, name: str) -> bool:
    """Compare a JSON value with a constant."""
    if kind_of_value(item) == kind_of_value(value):
        return bool(_PYTHON[sign](item, value))
    if sign in ("==", "!="):
        return sign == "!="
    raise UsageError(
        f"the column {name!r} holds values of several kinds, among them {json.dumps(item, ensure_ascii=False)[:80]}, which has no order "
        f"with {value!r}; compare it with == or in"
    )


def _compared_values(x: Any, sign: str, y: Any) -> bool:
    if sign in ("==", "!=") and isinstance(x, bool) != isinstance(y, bool):
        return sign == "!="
    return bool(_PYTHON[sign](x, y))


def _by_value(values: pa.ChunkedArray, holds: Callable[[Any], bool]) -> _Truth:
    """Evaluate a predicate on values stored as JSON text, once for each distinct value."""
    coded = _combined(values).dictionary_encode()
    truth = pa.array([holds(value) for value in Column(coded.dictionary, encoded=True).decoded()], pa.bool_())
    return pc.take(truth, coded.indices)


def _plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    return values.cast(pa.large_string() if pa.types.is_string_view(kind) else kind)


def _combined(values: pa.ChunkedArray | pa.Array) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _constant_truth(values: pa.ChunkedArray, truth: bool) -> _Truth:
    return _null_where_missing(values, pa.array(np.full(len(values), truth)))


def _null_where_missing(values: pa.ChunkedArray, truth: Any) -> _Truth:
    """Return the truth values, with null for missing values."""
    return pc.if_else(_combined(pc.is_valid(values)), _combined(truth), pa.scalar(None, pa.bool_()))
