"""Results as tables: HTML for notebooks, and data frames."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..store.extras import require
from ..store.printable import printable

if TYPE_CHECKING:
    import pandas as pd


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return an HTML table; numbers have four digits."""

    def row(tag: str, cells: Sequence[Any]) -> str:
        texts = (f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{escape(printable(text))}</{tag}>" for text in texts) + "</tr>"

    return f"<h4>{escape(title)}</h4><table>{row('th', columns)}{''.join(row('td', cells) for cells in rows)}</table>"


def data_frame(records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> "pd.DataFrame":
    """Return a data frame of records.

    Raises:
        UsageError: pandas is not installed.
    """
    return require("pandas", "pandas").DataFrame(list(records), columns=list(columns))
