"""Pages of an index's training examples, for people who look through a corpus."""

from typing import Any, Literal

import numpy as np

from ..client import Client
from ..query.baselines import row_norms
from ..query.metric import Metric
from ..query.units import Unit
from ..store.shapes import Float64

Order = Literal["row", "self-influence", "loss"]
_TEXT = 2000


def browse(client: Client, where: str | None, first: int, count: int, order: Order) -> dict[str, Any]:
    """Return a page of training examples, JSON-ready.

    Args:
        where: a filter; None for all that are not deleted.
        first: number of matching examples before the page.
        order: by row, or the largest self-influence or loss first.
    """
    index = client.index
    mask = index.alive if where is None else index.alive & index.matching(where)
    rows = np.flatnonzero(mask)
    factor = Unit.of(index, Metric()).factor
    norms: Float64[np.ndarray, " rows"] | None = None
    if order == "self-influence":
        norms = np.asarray(row_norms(index))
        rows = rows[np.argsort(-norms[rows], kind="stable")]
    if order == "loss":
        losses = np.concatenate([index.losses(shard) for shard in index.shards])
        rows = rows[np.argsort(-np.nan_to_num(losses[rows], nan=-1.0), kind="stable")]
    page = rows[first : first + count].tolist()
    densities = client.density_percentiles(page)
    listed = []
    for row, density in zip(page, densities, strict=True):
        e = index.example(row)
        shard, offset = index.locate(row)
        squared = sum(c.weight * float(index.rows(shard, c).norms[offset]) ** 2 for c in index.manifest.components)
        loss = float(index.losses(shard)[offset])
        listed.append(
            {
                "row": row,
                "id": e.id,
                "text": e.text[:_TEXT],
                "cut": max(0, len(e.text) - _TEXT),
                "source": e.source,
                "document": e.document,
                "metadata": e.metadata,
                "label": e.label,
                "tokens": e.loss_tokens,
                "loss": loss if np.isfinite(loss) else None,
                "self_influence": squared * factor,
                "density_percentile": density,
            }
        )
    return {"rows": listed, "first": first, "matching": len(rows), "unit": Unit.of(index, Metric()).name}
