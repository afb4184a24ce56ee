"""Keyed segments: the output head's whitened gradient, one row for each vocabulary entry that an example predicts.

With h_t the head's input and d_t the gradient of the loss at its output (p_t - onehot(y_t) where nothing follows the head; whatever
autograd makes of a soft-cap or a scale), the head's gradient is G[v] = sum_t d_t(v) h_t. Its curvature is taken in Kronecker form with a
diagonal on the vocabulary side:

    q_v = E sum_t p_t(v) (1 - p_t(v))      the closed form of E d_t(v)^2 under the model's own labels; where something follows the head,
                                            or for the data's labels, d_t(v)^2 itself
    E sum_t h_t h_t^T = U diag(e) U^T,      l_vj = q_v e_j / E[loss tokens],      z[v, j] = (G U)[v, j] / sqrt(l_vj + a)

Only the tokens that an example predicts are kept: they hold most of the energy, and the vocabulary x width gradient is never formed. With
weights frozen below, autograd's graph begins at the head's output, so a forward pass is all that the model is asked for.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..store.keyed import KeyedVectors
from ..store.manifest import KeyedSegment, Layer
from .capture import Map, accumulation_dtype
from .curvature import Arrays
from .projection import symmetric_eigen
from .tasks import IGNORED, Batch

STATISTICS = ("input_moment", "vocabulary_variance", "loss_tokens")


def head_layer(segment: KeyedSegment) -> Layer:
    """The head as a layer that the capture can track."""
    v, d = segment.vocabulary, segment.width
    return Layer(
        name=segment.layer, outputs=v, inputs=d, output_rank=v, input_rank=d, input_group=segment.layer, offset=0, curvature="kfac"
    )


class KeyedPart:
    """Makes the rows of a keyed segment.

    Args:
        segment: the head, the keys, the curvature (`damping` is relative to the mean eigenvalue over vocabulary and width).
        arrays: `input_basis` [width, width], `input_eigenvalues` [width], `vocabulary` [vocabulary].
        device, dtype: the model's.
    """

    def __init__(self, segment: KeyedSegment, arrays: Mapping[str, np.ndarray], device: torch.device, dtype: torch.dtype) -> None:
        self.segment, self.layer = segment, head_layer(segment)
        if arrays:
            self.basis, self.inputs, self.vocabulary = (
                torch.from_numpy(np.asarray(arrays[name])).to(device, accumulation_dtype(dtype))
                for name in ("input_basis", "input_eigenvalues", "vocabulary")
            )
            self.damping = segment.curvature.damping * float(arrays["vocabulary"].mean() * arrays["input_eigenvalues"].mean())

    def collector(self, batch: Batch) -> "KeyedCollector":
        """What is visited for one batch."""
        return KeyedCollector(self, batch)


class KeyedCollector:
    """A batch's head gradients on their way to rows."""

    def __init__(self, part: KeyedPart, batch: Batch) -> None:
        self._part, self._batch = part, batch
        self.layers: Sequence[Layer] = (part.layer,)
        self.maps: Mapping[str, tuple[Map, Map]] = {part.layer.name: (None, None)}
        self._keys = [torch.unique(targets[targets != IGNORED]) for targets in batch.targets]
        self._sums: list[Tensor] | None = None

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens width"], d: Float[Tensor, "batch tokens vocabulary"]) -> None:
        """Add the head's call; a `Visit`."""
        found = [d[i][:, keys].T @ x[i] for i, keys in enumerate(self._keys)]
        self._sums = found if self._sums is None else [a + b for a, b in zip(self._sums, found, strict=True)]

    def rows(self) -> KeyedVectors:
        """The batch's whitened rows, by token."""
        part, limit = self._part, self._part.segment.keys
        keys, vectors, counts = [], [], []
        for tokens, gradient in zip(self._keys, self._sums or [], strict=True):
            eigenvalues = part.vocabulary[tokens][:, None] * part.inputs + part.damping
            z = (gradient @ part.basis) * eigenvalues.rsqrt()
            if limit is not None and len(tokens) > limit:
                kept = torch.sort(torch.topk(z.square().sum(1), limit).indices).values
                tokens, z = tokens[kept], z[kept]  # noqa: PLW2901
            keys.append(tokens.cpu().numpy())
            vectors.append(z.float().cpu().numpy())
            counts.append(len(tokens))
        return KeyedVectors(np.concatenate([[0], np.cumsum(counts)]), np.concatenate(keys), np.concatenate(vectors))


class KeyedMeter:
    """Sums a keyed segment's statistics over batches."""

    def __init__(self, segment: KeyedSegment) -> None:
        self._closed_form, layer = segment.curvature.labels == "sampled" and not segment.tail, head_layer(segment)
        self.layers: Sequence[Layer] = (layer,)
        self.maps: Mapping[str, tuple[Map, Map]] = {layer.name: (None, None)}
        self.sums: dict[str, Tensor] = {}
        self._batch: Batch | None = None

    def begin(self, batch: Batch) -> None:
        """The batch that comes next."""
        self._batch = batch

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens width"], d: Float[Tensor, "batch tokens vocabulary"]) -> None:
        """Add the head's call; a `Visit`."""
        assert self._batch is not None
        for i, targets in enumerate(self._batch.targets):
            at = (targets != IGNORED).nonzero()[:, 0]
            h, g = x[i, at], d[i, at]
            self._add("input_moment", h.T @ h)
            self._add("vocabulary_variance", _variance(g, targets[at]) if self._closed_form else g.square().sum(0))
            self._add("loss_tokens", torch.tensor(float(len(at)), dtype=torch.float64))

    def end(self) -> None:
        """The batch is over."""

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = value.double() if name not in self.sums else self.sums[name].add_(value)


def _variance(g: Float[Tensor, "tokens vocabulary"], targets: Tensor) -> Float[Tensor, " vocabulary"]:
    """sum_t p_t(v) (1 - p_t(v)) from gradients p_t - onehot(y_t)."""
    p = g.clone()
    p[torch.arange(len(p), device=p.device), targets] += 1
    return (p * (1 - p)).sum(0)


def finish(totals: Mapping[str, np.ndarray], examples: int) -> Arrays:
    """The arrays of a keyed segment from the sums of its only pass."""
    values, vectors = symmetric_eigen(totals["input_moment"] / examples)
    vocabulary: Float64[np.ndarray, " vocabulary"] = np.maximum(totals["vocabulary_variance"], 0.0) / examples
    return {"input_basis": vectors, "input_eigenvalues": values / (totals["loss_tokens"] / examples), "vocabulary": vocabulary}
