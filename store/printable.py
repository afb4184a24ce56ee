"""Text from elsewhere made fit for a line of output: control characters and those that turn the direction of writing are spelled out.

A corpus, an index or a file name may hold the escape sequences by which a terminal is reprogrammed, or characters that make a line read as
another one than it is.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

# C0 but for tab and newline, DEL and C1, directions and isolates, separators, interlinear and tag characters, halves of surrogate pairs.
_HOSTILE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with hostile characters as Python writes them, such as \\x1b or \\u202e; lines and tabs stay."""
    return _HOSTILE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def printable_line(text: str) -> str:
    """The same on one line: line breaks are spelled out, too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def to_json(value: Any, ascii_only: bool = False) -> str:
    """JSON as Wherefrom prints it everywhere: dates and the like as text, numbers that are not finite as null, hostile characters escaped.

    Args:
        ascii_only: whether all other characters are escaped, too.
    """
    try:
        text = json.dumps(value, ensure_ascii=ascii_only, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=ascii_only, default=str)
    return _HOSTILE.sub(lambda found: json.dumps(found[0])[1:-1], text)  # none stands outside of a string


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value
