"""Filters over examples' columns: `source == "gsm8k" and year >= 2020`.

A filter is a Python expression, parsed by Python's own `ast` and turned into an Arrow expression; nothing of it is ever run as Python.
It may hold columns, numbers, strings, True, False and None, lists (after `in`), comparisons, `and`, `or`, `not`. Columns are `id`,
`document`, `chunk`, `text`, `source` and the corpus's metadata; a name with spaces is written `column("the name")`. A row that lacks
the value (None) matches nothing but `== None`.
"""

import ast
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from .errors import UsageError

_COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_TEXT = {"startswith": pc.starts_with, "endswith": pc.ends_with, "contains": pc.match_substring}
_LONGEST = 10_000


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
            f'the filter {text[:80]!r} is no expression ({error}); write one such as source == "web" and year >= 2020'
        ) from error


def names_in(tree: ast.expr) -> set[str]:
    """The columns that a filter asks for."""
    return {name for node in ast.walk(tree) if (name := _column(node)) is not None}


def matching(tree: ast.expr, table: pa.Table, types: Mapping[str, pa.DataType]) -> Bool[np.ndarray, " rows"]:
    """Which rows of a table match.

    Args:
        types: of the index's columns; one that this table lacks is None in all its rows.

    Raises:
        UsageError: an unknown column, or values that cannot be compared.
    """
    try:
        expression = _Builder(types).build(tree)
        lacking = [name for name in names_in(tree) if name not in table.column_names]
        for name in lacking:
            table = table.append_column(name, pa.nulls(len(table), types[name]))
        kept = table.append_column("\0row", pa.array(np.arange(len(table)))).filter(expression)["\0row"].to_numpy()
    except (pa.ArrowException, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"the filter compares what cannot be compared, or is nested too deeply: {reason}") from error
    found = np.zeros(len(table), bool)
    found[kept] = True
    return found


def _column(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name) and node.id != "column":
        return node.id
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "column" and len(node.args) == 1
    if called and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):  # type: ignore[attr-defined]
        return node.args[0].value  # type: ignore[attr-defined]
    return None


class _Builder:
    """Turns the nodes that are allowed into Arrow expressions."""

    def __init__(self, types: Mapping[str, pa.DataType]) -> None:
        self._types = types

    def build(self, node: ast.expr) -> pc.Expression:
        if isinstance(node, ast.BoolOp):
            parts = [self.build(value) for value in node.values]
            whole = parts[0]
            for part in parts[1:]:
                whole = whole & part if isinstance(node.op, ast.And) else whole | part
            return whole
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.build(node.operand)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            whole = self._compare(sides[0], node.ops[0], sides[1])
            for i, op in enumerate(node.ops[1:], 1):
                whole = whole & self._compare(sides[i], op, sides[i + 1])
            return whole
        text = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _TEXT and len(node.args) == 1
        if text and not node.keywords:  # type: ignore[attr-defined]
            given = self._constant(node.args[0])  # type: ignore[attr-defined]
            if isinstance(given, str):
                return _TEXT[node.func.attr](self._field(node.func.value), given)  # type: ignore[attr-defined]
        if _column(node) is not None:
            return self._field(node)
        raise UsageError(
            f"a filter cannot hold {ast.unparse(node)[:80]!r}; it compares columns with values: ==, !=, <, <=, >, >=, in, and, or, not, "
            "and a text column's .startswith, .endswith and .contains"
        )

    def _field(self, node: ast.expr) -> pc.Expression:
        name = _column(node)
        if name is None:
            raise UsageError(f"a filter compares columns with values, and {ast.unparse(node)[:80]!r} is no column's name")
        if name not in self._types:
            raise UsageError(f"there is no column {name!r}; this index has {', '.join(sorted(self._types))}")
        return pc.field(name)

    def _constant(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str, type(None))):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            value = node.operand.value
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return -value
        raise UsageError(f"a filter compares columns with numbers and quoted strings, and {ast.unparse(node)[:80]!r} is neither")

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if _column(left) is None:
            turned = {ast.Lt: ast.Gt(), ast.LtE: ast.GtE(), ast.Gt: ast.Lt(), ast.GtE: ast.LtE()}
            if _column(right) is None or isinstance(op, (ast.In, ast.NotIn)):
                raise UsageError(f"a filter compares a column with a value, and {ast.unparse(left)[:80]!r} is no column's name")
            left, right, op = right, left, turned.get(type(op), op)
        field, kind = self._field(left), self._types[str(_column(left))]
        if isinstance(op, (ast.In, ast.NotIn)):
            if not isinstance(right, (ast.List, ast.Tuple)):
                raise UsageError(f"after `in` a filter needs a list such as ['web', 'books'], not {ast.unparse(right)[:80]!r}")
            items = [self._value(e, kind) for e in right.elts]
            values = pa.array([item.as_py() for item in items], kind)
            changed = [item for item, value in zip(items, values, strict=True) if not item.is_valid or item.as_py() != value.as_py()]
            if changed:
                raise UsageError(f"the column holds {kind} values, and {changed[0].as_py()!r} in the list is none of them")
            found = field.isin(values)
            return ~found & field.is_valid() if isinstance(op, ast.NotIn) else found
        if _column(right) is not None:
            other: Any = self._field(right)
        else:
            other = self._value(right, kind)
            if not other.is_valid:
                if isinstance(op, (ast.Eq, ast.Is)):
                    return field.is_null()
                if isinstance(op, (ast.NotEq, ast.IsNot)):
                    return field.is_valid()
                raise UsageError("None can only be compared with == and !=")
        if type(op) not in _COMPARISONS:
            raise UsageError(f"a filter cannot hold {ast.unparse(ast.Compare(left, [op], [right]))[:80]!r}")
        return _COMPARISONS[type(op)](field, other)

    def _value(self, node: ast.expr, kind: pa.DataType) -> pa.Scalar:
        """A constant as a value of the column's type: dates and times are written as ISO strings."""
        value = self._constant(node)
        if value is None:
            return pa.scalar(None, kind)
        if pa.types.is_temporal(kind) and isinstance(value, str):
            return pa.scalar(value).cast(kind)
        textual, boolean = pa.types.is_string(kind) or pa.types.is_large_string(kind), pa.types.is_boolean(kind)
        numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        fits = (
            isinstance(value, str)
            if textual
            else isinstance(value, bool)
            if boolean
            else numeric and isinstance(value, (int, float)) and not isinstance(value, bool)
        )
        if not fits:
            raise UsageError(f"the column holds {kind} values, which cannot be compared with {value!r}")
        return pa.scalar(value)
