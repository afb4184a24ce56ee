"""Escaping of untrusted text for output: control characters and those that change the writing direction.

A corpus, an index or a file name may contain terminal escape sequences, or characters that make one line look like another.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

# C0 without tab and newline, DEL and C1, directions and isolates, separators, interlinear and tag characters, halves of surrogate pairs.
_HOSTILE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Escape hostile characters as Python does, such as \\x1b or \\u202e; keep newlines and tabs."""
    return _HOSTILE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def printable_line(text: str) -> str:
    """Escape hostile characters, newlines and tabs."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def say(line: str, err: bool = False) -> None:
    """Print a line; hostile characters in it are escaped, so that file names and stored texts cannot control the terminal."""
    import click

    click.echo(printable(line), err=err)


def to_json(value: Any, ascii_only: bool = False) -> str:
    """Format a value as JSON: dates and similar values as text, numbers that are not finite as null, hostile characters escaped.

    Args:
        ascii_only: escape all characters that are not ASCII.
    """
    try:
        text = json.dumps(value, ensure_ascii=ascii_only, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=ascii_only, default=str)
    return _HOSTILE.sub(lambda match: json.dumps(match[0])[1:-1], text)  # they occur only in strings


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value
