"""Sparse components: the whitened gradients of the output head and of the input embeddings, a vector for each of an example's tokens.

**The head.** With h_t the head's input and d_t the gradient of the loss at its output (p_t - onehot(y_t) where nothing follows the
head; autograd covers a soft-cap or a scale), the head's gradient is G[v] = sum_t d_t(v) h_t. Its curvature is taken in
Kronecker form with a diagonal on the vocabulary side:

    q_v = E sum_t p_t(v) (1 - p_t(v))      the closed form of E d_t(v)^2 under the model's own labels; d_t(v)^2 itself for the data's labels
                                            or where something follows the head
    E sum_t h_t h_t^T = U diag(e) U^T,      l_vj = q_v e_j / E[loss tokens],      z[v, j] = (G U)[v, j] / sqrt(l_vj + a)

Only the tokens that an example predicts are stored, and optionally the most probable others: they hold most of the energy, and the
vocabulary x width gradient is never formed. With the weights below frozen, autograd's graph begins at the head's output, so the model only
runs a forward pass.

**The embeddings** are the same with the roles exchanged: with d_t the gradient at the embedding of token x_t, G[v] is the sum of
d_t over the positions that read v, q_v the number of times that an example reads v, and E sum_t d_t d_t^T takes the place of the
inputs' moment. They need the whole backward pass. A weight that head and embeddings share has both components.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..store.manifest import Layer, SparseComponent
from ..store.shapes import Float, Float64, Int
from ..store.vectors import SparseVectors
from .capture import Inputs, Map, accumulation_dtype
from .curvature import Arrays
from .models import layer_device, layer_sizes
from .projection import symmetric_eigen
from .tasks import IGNORED, Batch

STATISTICS = ("moment", "vocabulary", "tokens")


def vocabulary_layer(component: SparseComponent) -> Layer:
    """Layer record of the head or the embeddings, for the capture."""
    sizes = (component.vocabulary, component.width)
    outputs, inputs = sizes if component.role == "head" else sizes[::-1]
    return Layer(
        name=component.layer,
        outputs=outputs,
        inputs=inputs,
        output_rank=outputs,
        input_rank=inputs,
        input_group=component.layer,
        offset=0,
        curvature="kfac",
    )


class SparseEncoder:
    """Computation of a sparse component's rows.

    Args:
        component: the layer, the tokens, the curvature (`damping` is relative to the mean eigenvalue over vocabulary and width).
        arrays: `basis` [width, width], `eigenvalues` [width], `vocabulary` [vocabulary]; empty before the fit.
        model: contains the layer.
    """

    def __init__(self, component: SparseComponent, arrays: Mapping[str, np.ndarray], model: nn.Module) -> None:
        self.component = component
        self.layer = vocabulary_layer(component)
        self.layers = (self.layer,)
        device = self.device = layer_device(model, component.layer)
        dtype = next(model.parameters()).dtype
        if arrays:
            self.basis, self.eigenvalues, self.vocabulary = (
                torch.from_numpy(np.asarray(arrays[name])).to(device, accumulation_dtype(dtype))
                for name in ("basis", "eigenvalues", "vocabulary")
            )
            self.damping = component.curvature.damping * float(arrays["vocabulary"].mean() * arrays["eigenvalues"].mean())

    def matches(self, layer: Layer, module: nn.Module) -> bool:
        """Return True if a module is of the layer's type and has its sizes."""
        if self.component.role == "embeddings":
            return isinstance(module, nn.Embedding) and (module.embedding_dim, module.num_embeddings) == (layer.outputs, layer.inputs)
        return layer_sizes(module) == (layer.outputs, layer.inputs)

    def adjoint(self, keys: Int[Tensor, " keys"], vectors: Float[Tensor, "keys width"]) -> Float[Tensor, "keys width"]:
        """Vectors M_v such that sum_v <M_v, G[v]> is the product of a row with some tokens' whitened vectors."""
        return (vectors.to(self.basis.dtype) * self.scale(keys)) @ self.basis.T

    def scale(self, keys: Int[Tensor, " keys"]) -> Float[Tensor, "keys width"]:
        """(l + a)^(-1/2) for some tokens' eigenvalues; 0 where the layer never had a gradient."""
        damped = self.vocabulary[keys][:, None] * self.eigenvalues + self.damping
        return torch.where(damped > 0, damped, torch.inf).rsqrt()

    def collector(self, batch: Batch) -> "SparseCollector":
        """Visitor of one batch."""
        return SparseCollector(self, batch)


class SparseCollector:
    """Visitor that turns a batch's gradients of the head or the embeddings into rows."""

    def __init__(self, encoder: SparseEncoder, batch: Batch) -> None:
        self._encoder = encoder
        self._batch = batch
        self.layers: Sequence[Layer] = (encoder.layer,)
        self.maps: Mapping[str, tuple[Map, Map]] = {encoder.layer.name: (None, None)}
        tokens = batch.targets if encoder.component.role == "head" else batch.inputs.masked_fill(~batch.valid, IGNORED)
        self._keys = [torch.unique(row[row != IGNORED]).to(encoder.device) for row in tokens]
        self._sums: list[Tensor] | None = None

    def __call__(self, layer: Layer, x: Inputs, d: Float[Tensor, "batch tokens outputs"]) -> None:
        """Add the layer's call; a `Visit`."""
        if self._encoder.component.role == "head":
            if self._encoder.component.extra_tokens and self._sums is None:
                self._keys = [self._with_others(d[i], keys) for i, keys in enumerate(self._keys)]
            sums = [d[i][:, keys].T @ x[i] for i, keys in enumerate(self._keys)]
        else:
            sums = [self._by_token(d[i], i) for i in range(len(self._keys))]
        self._sums = sums if self._sums is None else [a + b for a, b in zip(self._sums, sums, strict=True)]

    def _with_others(self, d: Float[Tensor, "tokens vocabulary"], keys: Int[Tensor, " keys"]) -> Int[Tensor, " more_keys"]:
        """The predicted tokens and the most probable others (those whose gradients, summed over positions, are largest)."""
        mass = d.sum(0).index_fill(0, keys, -torch.inf)
        others = torch.topk(mass, min(self._encoder.component.extra_tokens, len(mass) - len(keys))).indices
        return torch.sort(torch.cat([keys, others])).values

    def _by_token(self, d: Float[Tensor, "tokens width"], example: int) -> Float[Tensor, "keys width"]:
        keys = self._keys[example]
        valid = self._batch.valid[example].to(d.device)
        positions = torch.searchsorted(keys, self._batch.inputs[example].to(d.device)[valid])
        return d.new_zeros(len(keys), d.shape[1]).index_add_(0, positions, d[valid])

    def rows(self) -> SparseVectors:
        """The batch's whitened rows, by token."""
        encoder = self._encoder
        limit = encoder.component.max_tokens
        keys = []
        vectors = []
        counts = []
        totals = []
        for tokens, gradient in zip(self._keys, self._sums or [], strict=True):
            z = (gradient @ encoder.basis) * encoder.scale(tokens)
            energy = z.square().sum(1)
            totals.append(float(energy.double().sum()))
            if limit is not None and len(tokens) > limit:
                largest = torch.sort(torch.topk(energy, limit).indices).values
                tokens, z = tokens[largest], z[largest]  # noqa: PLW2901
            keys.append(tokens.cpu().numpy())
            vectors.append(z.float().cpu().numpy())
            counts.append(len(tokens))
        indptr = np.concatenate([[0], np.cumsum(counts)])
        return SparseVectors(indptr, np.concatenate(keys), np.concatenate(vectors), np.array(totals))


class HeadMean:
    """Visitor that sums the head's full whitened gradients over examples, for the tokens of largest variance, to see whether they cancel.

    Rows hold only predicted tokens, whose gradients never cancel; over all tokens they do where training has brought the head to a
    stationary point of the loss.
    """

    def __init__(self, encoder: SparseEncoder, tokens: int) -> None:
        self._encoder = encoder
        self.layers: Sequence[Layer] = (encoder.layer,)
        self.maps: Mapping[str, tuple[Map, Map]] = {encoder.layer.name: (None, None)}
        self._tokens = torch.topk(encoder.vocabulary, min(tokens, len(encoder.vocabulary))).indices
        self._scale = encoder.scale(self._tokens)
        self._sum = torch.zeros_like(self._scale, dtype=torch.float64)
        self._squares = 0.0
        self._examples = 0

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens inputs"], d: Float[Tensor, "batch tokens outputs"]) -> None:
        """Add the head's call."""
        for i in range(len(x)):
            z = (d[i][:, self._tokens].T @ x[i] @ self._encoder.basis) * self._scale
            self._sum += z
            self._squares += float(z.square().sum(dtype=torch.float64))
            self._examples += 1

    @property
    def mean_share(self) -> float:
        """Mean score between different examples, divided by an example's mean score with itself."""
        n = self._examples
        between = (float(self._sum.square().sum()) - self._squares) / max(1, n * (n - 1))
        return between * n / self._squares if self._squares > 0 else 0.0


class SparseMeter:
    """Sums of a sparse component's statistics over batches."""

    def __init__(self, component: SparseComponent) -> None:
        layer = vocabulary_layer(component)
        self._component = component
        self._closed_form = component.curvature.labels == "sampled" and not component.postprocessed
        self.layers: Sequence[Layer] = (layer,)
        self.maps: Mapping[str, tuple[Map, Map]] = {layer.name: (None, None)}
        self.sums: dict[str, Tensor] = {}
        self._batch: Batch | None = None

    def begin(self, batch: Batch) -> None:
        """Start a batch."""
        self._batch = batch

    def __call__(self, layer: Layer, x: Inputs, d: Float[Tensor, "batch tokens outputs"]) -> None:
        """Add the layer's call; a `Visit`."""
        assert self._batch is not None
        if self._component.role == "embeddings":
            g = d[self._batch.valid.to(d.device)]
            self._add("moment", g.T @ g)
            self._add("vocabulary", torch.bincount(self._batch.inputs[self._batch.valid], minlength=self._component.vocabulary))
            self._add("tokens", torch.tensor(float(len(g)), dtype=torch.float64))
            return
        valid = self._batch.valid.to(d.device)
        for i, targets in enumerate(self._batch.targets.to(d.device)):
            positions = ((targets != IGNORED) & valid[i]).nonzero()[:, 0]
            h = x[i, positions]
            g = d[i, positions]
            self._add("moment", h.T @ h)
            self._add("vocabulary", _variance(g, targets[positions]) if self._closed_form else g.square().sum(0))
            self._add("tokens", torch.tensor(float(len(positions)), dtype=torch.float64))

    def end(self) -> None:
        """End the batch."""

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = value.double() if name not in self.sums else self.sums[name].add_(value)


def _variance(g: Float[Tensor, "tokens vocabulary"], targets: Tensor) -> Float[Tensor, " vocabulary"]:
    """sum_t p_t(v) (1 - p_t(v)) from gradients p_t - onehot(y_t)."""
    p = g.clone()
    p[torch.arange(len(p), device=p.device), targets] += 1
    return (p * (1 - p)).sum(0)


def finish(totals: Mapping[str, np.ndarray], examples: int) -> Arrays:
    """Arrays of a sparse component from the sums of its single pass."""
    values, vectors = symmetric_eigen(totals["moment"] / examples)
    vocabulary: Float64[np.ndarray, " vocabulary"] = np.maximum(totals["vocabulary"], 0.0) / examples
    return {"basis": vectors, "eigenvalues": values / (totals["tokens"] / examples), "vocabulary": vocabulary}
