"""Reports as files: JSON, and one HTML page without anything from outside; both can be signed.

A signature is Ed25519 over the JSON of the report, keys sorted and without spaces, without the field `signature` itself. The page holds the
same JSON, whose field `page` is the SHA-256 of all else in the page. So either can be checked with `verify_report`.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..query.results import refuse_existing
from ..store.errors import IntegrityError, NotFoundError, UsageError
from ..store.extras import require
from ..store.files import write_whole

_BEGIN = '<script type="application/json" id="report">'
_END = "</script>"
_MOST_BYTES = 1 << 28


def bars(values: Sequence[tuple[str, float, float | None, float | None]]) -> list[dict[str, Any]]:
    """Bars of a chart: label, value, and the ends of an interval or None."""
    numbers = [0.0, *(number for _, *its in values for number in its if number is not None)]
    low = min(numbers)
    scale = 330 / ((max(numbers) - low) or 1.0)

    def x(value: float) -> float:
        return round(240 + (value - low) * scale, 1)

    return [
        {
            "label": label if len(label) <= 34 else f"{label[:33]}…",
            "x": min(x(0), x(value)),
            "width": max(1.0, round(abs(x(value) - x(0)), 1)),
            "color": "#2e6fd6" if value >= 0 else "#d97706",
            "value": f"{value:.3g}",
            "low": None if start is None else x(start),
            "high": None if end is None else x(end),
        }
        for label, value, start, end in values
    ]


def points(values: Sequence[tuple[float, float, str]], x_label: str, y_label: str) -> dict[str, Any]:
    """A scatter plot of x, y and a label for each point."""
    if not values:
        return {}
    x0, x1 = min(0.0, *(x for x, _, _ in values)), max(0.0, *(x for x, _, _ in values))
    y0, y1 = min(0.0, *(y for _, y, _ in values)), max(0.0, *(y for _, y, _ in values))

    def x(value: float) -> float:
        return round(50 + 580 * (value - x0) / ((x1 - x0) or 1.0), 1)

    def y(value: float) -> float:
        return round(290 - 280 * (value - y0) / ((y1 - y0) or 1.0), 1)

    ends = {"x_low": f"{x0:.3g}", "x_high": f"{x1:.3g}", "y_low": f"{y0:.3g}", "y_high": f"{y1:.3g}"}
    placed = [{"x": x(a), "y": y(b), "label": label} for a, b, label in values]
    return {"points": placed, "zero_x": x(0), "zero_y": y(0), "x_label": x_label, "y_label": y_label, **ends}


def check_report(out: Path, key: Path | None) -> tuple[Path, Path]:
    """Check before long work that a report can be written and signed; returns the paths of its JSON and its page.

    Raises:
        UsageError, NotFoundError: see `write_report`.
    """
    if not out.name or not out.absolute().parent.is_dir():
        raise UsageError(f"`out` {out} is not a name in a folder that exists; make the folder, and give a name such as report")
    paths = (out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.html"))
    for path in paths:
        refuse_existing(path)
    sign({}, key)
    return paths


def write_report(out: Path, content: Mapping[str, Any], page: Mapping[str, Any], key: Path | None = None) -> tuple[Path, Path]:
    """Write a report as `<out>.json` and `<out>.html`.

    Args:
        content: of the report, JSON-ready.
        page: title, summary, warnings, sections and foot.
        key: file with a private Ed25519 key (PEM) to sign with; None signs nothing.

    Raises:
        UsageError: a file exists, or the key is not such.
    """
    paths = check_report(out, None)
    environment = require("jinja2", "evaluation").Environment(autoescape=True, trim_blocks=True)
    template = (resources.files(__package__) / "report.html.jinja").read_text(encoding="utf-8")
    fields = {"summary": [], "warnings": [], "sections": [], "foot": "", **page}
    before, _, after = environment.from_string(template).render(**fields).partition(_BEGIN + _END)
    signed = sign({**content, "page": _page_hash(before, after)}, key)
    embedded = json.dumps(signed).replace("<", "\\u003c")  # no text ends the script
    write_whole(paths[0], (json.dumps(signed, indent=1) + "\n").encode())
    write_whole(paths[1], f"{before}{_BEGIN}{embedded}{_END}{after}".encode(errors="replace"))
    return paths


def _page_hash(before: str, after: str) -> str:
    """Return the SHA-256 of a page without the JSON in it."""
    return hashlib.sha256((before + after).encode(errors="replace")).hexdigest()


def sign(content: Mapping[str, Any], key: Path | None) -> dict[str, Any]:
    """Return a report with a signature, where there is a key.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it is not a private Ed25519 key, or `cryptography` is not installed.
    """
    if key is None:
        return dict(content)
    serialization = require("cryptography.hazmat.primitives.serialization", "evaluation")
    if not key.is_file():
        raise NotFoundError(f"there is no key {key}; make one, such as with: openssl genpkey -algorithm ed25519 -out {key}")
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        signature = private.sign(_canonical(content))
        public = private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{key} is not a private Ed25519 key without a password; make one with openssl genpkey -algorithm ed25519"
        ) from error
    encoded = {name: base64.b64encode(value).decode() for name, value in (("public_key", public), ("value", signature))}
    return {**content, "signature": {"algorithm": "Ed25519", **encoded}}


def verify_report(file: Path, public_key: str | None = None) -> str:
    """Check the signature of a report, JSON or HTML; returns the public key (base64) that it was made with.

    Args:
        public_key: that the report must be signed with; None accepts any, and says only that nothing was changed since.

    Raises:
        NotFoundError: there is no such file.
        IntegrityError: it is not a signed report, or the signature does not fit.
    """
    if not file.is_file():
        raise NotFoundError(f"there is no report {file}")
    if file.stat().st_size > _MOST_BYTES:
        raise IntegrityError(f"{file} is larger than any report")
    text = file.read_bytes().decode("utf-8", "replace")
    page_hash = None
    if _BEGIN in text:
        before, _, rest = text.partition(_BEGIN)
        text, _, after = rest.partition(_END)
        page_hash = _page_hash(before, after)
    ed25519 = require("cryptography.hazmat.primitives.asymmetric.ed25519", "evaluation")
    invalid = require("cryptography.exceptions", "evaluation").InvalidSignature
    try:
        content = json.loads(text, object_pairs_hook=_distinct)
        signature = content.pop("signature")
        key = ed25519.Ed25519PublicKey.from_public_bytes(base64.b64decode(signature["public_key"], validate=True))
        key.verify(base64.b64decode(signature["value"], validate=True), _canonical(content))
        is_whole = page_hash in (None, content.get("page"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{file} is not a signed report; write it with a key") from error
    except invalid as error:
        raise IntegrityError(f"{file} is not what was signed: it was changed") from error
    if not is_whole:
        raise IntegrityError(f"{file} shows something else than what was signed: the page was changed")
    if public_key is not None and public_key != signature["public_key"]:
        raise IntegrityError(f"{file} is signed with another key: {signature['public_key']}")
    return str(signature["public_key"])


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise a ValueError where a name stands twice, of which readers may take either."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name stands twice")
    return content


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
