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

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..store.bits import MATRIX_BITS, rotation_matrix
from ..store.manifest import DenseComponent, Layer, Projection, SparseComponent
from ..store.shapes import Float, Float32, Float64, Int
from ..store.vectors import DenseVectors, SparseVectors
from .batches import IGNORED, Batch
from .capture import Inputs, Map, OutputGradient, accumulation_dtype
from .curvature import Arrays, lost_share
from .models import layer_device, layer_sizes
from .projection import symmetric_eigen
from .transfer import start_copy

STATISTICS = ("moment", "vocabulary", "tokens")

_MEAN_ELEMENTS = 1 << 24  # float32 numbers of gradients that `HeadMean` holds of a batch


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
        self.arrays = arrays
        device = self.device = layer_device(model, component.layer)
        dtype = next(model.parameters()).dtype
        if arrays:
            self.basis, self.eigenvalues, self.vocabulary = (
                torch.from_numpy(np.asarray(arrays[name])).to(device, accumulation_dtype(dtype))
                for name in ("basis", "eigenvalues", "vocabulary")
            )
            self.damping = component.curvature.damping * float(arrays["vocabulary"].mean() * arrays["eigenvalues"].mean())

    @cached_property
    def rotation(self) -> Float32[Tensor, "width bits"] | None:
        """Matrix of the coded coordinates of a rotated vector; None where they are so many that the rotation itself is faster."""
        component = self.component
        if component.bits > MATRIX_BITS:
            return None
        return torch.from_numpy(rotation_matrix(component.width, component.bits, component.seed)).to(self.device)

    @property
    def undivided(self) -> bool:
        """True if all logits' gradients are needed at once, to select the most probable tokens."""
        return self.component.extra_tokens > 0

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

    def plain_component(self) -> tuple[SparseComponent, Mapping[str, np.ndarray]]:
        """Return the component, whose rows can be turned into plain gradients, and its arrays, for an encoder of this model alone."""
        return self.component.model_copy(update={"model": 0}), self.arrays

    def plain_gradients(self, rows: SparseVectors) -> SparseVectors:
        """Return the gradients of rows' tokens before they were whitened, in float64."""
        scale, basis = self._scale_and_basis(rows)
        gradients = np.divide(rows.vectors, scale, out=np.zeros(scale.shape), where=scale > 0) @ basis.T
        return SparseVectors(rows.indptr, rows.keys, gradients)

    def whitened(self, gradients: SparseVectors) -> SparseVectors:
        """Compute the rows of plain gradients."""
        scale, basis = self._scale_and_basis(gradients)
        return SparseVectors(gradients.indptr, gradients.keys, ((gradients.vectors @ basis) * scale).astype(np.float32))

    def decayed(self, gradients: SparseVectors, times: Float64[np.ndarray, " one"]) -> SparseVectors:
        """Multiply plain gradients with exp(-t H), for the curvature H of each token and the learning time t."""
        (time,) = times
        _, basis = self._scale_and_basis(gradients)
        eigenvalues = self.vocabulary.double().cpu().numpy()[gradients.keys][:, None] * self.eigenvalues.double().cpu().numpy()
        lost = (gradients.vectors @ basis) * lost_share(eigenvalues, time)
        return SparseVectors(gradients.indptr, gradients.keys, gradients.vectors - lost @ basis.T)

    def equation_layers(self) -> tuple[Layer, ...]:
        """Return the layer of the equation that refined queries solve."""
        sizes = {"outputs": self.component.vocabulary, "inputs": self.component.width}
        return (self.layer.model_copy(update=sizes),)

    def whole_component(self) -> tuple[DenseComponent | SparseComponent, Mapping[str, np.ndarray]]:
        """Return a component whose rows hold the layer's whole gradient: of the head dense ones, since all tokens have one."""
        if self.component.role == "embeddings":
            return self.plain_component()
        layer = self.layer.model_copy(update={"curvature": "identity"})
        projection = Projection(kind="random", rank=max(layer.outputs, layer.inputs), seed=0)
        component = DenseComponent(
            name=self.component.name,
            kind="dense",
            model=0,
            weight=1.0,
            curvature=self.component.curvature,
            coordinates=None,
            dtype="float32",
            layers=(layer,),
            projection=projection,
        )
        return component, {}

    def whole_gradients(self, rows: Any) -> DenseVectors:
        """Return the gradients that rows of `whole_component` hold, [queries, vocabulary * width] in float64."""
        if self.component.role == "head":
            return DenseVectors(rows.values.astype(np.float64))
        gradients = np.zeros((len(rows), self.component.vocabulary, self.component.width))
        gradients[rows.owners, rows.keys] = self.plain_gradients(rows).vectors
        return DenseVectors(gradients.reshape(len(rows), -1))

    def mean_eigenvalues(self) -> Float64[np.ndarray, " one"]:
        """Return the mean eigenvalue of the layer's curvature, to which damping is relative."""
        return np.array([float(self.vocabulary.double().mean() * self.eigenvalues.double().mean())])

    def solved(self, gradients: DenseVectors, damping: Float64[np.ndarray, " one"]) -> DenseVectors:
        """Multiply whole gradients with (H + a)^-1, for the curvature H and a damping a."""
        basis = self.basis.double().cpu().numpy()
        spectrum = self.vocabulary.double().cpu().numpy()[:, None] * self.eigenvalues.double().cpu().numpy()
        rotated = gradients.values.reshape(-1, *spectrum.shape) @ basis
        return DenseVectors(((rotated / (spectrum + damping[0])) @ basis.T).reshape(len(gradients), -1))

    def by_coordinate(self, values: Float64[np.ndarray, " one"]) -> Float64[Tensor, " parameters"]:
        """Repeat the layer's value for each of its weights."""
        return torch.full((self.component.vocabulary * self.component.width,), float(values[0]), dtype=torch.float64)

    def rows_of_solved(self, gradients: DenseVectors, changed: Callable[[Any], Any]) -> SparseVectors:
        """Compute rows of all tokens whose products with whitened rows are those of solved gradients with plain ones.

        Args:
            changed: function that multiplies rows with the factors that the products will have.
        """
        count = len(gradients)
        tokens = self.component.vocabulary
        width = self.component.width
        indptr = np.arange(count + 1, dtype=np.int64) * tokens
        keys = np.tile(np.arange(tokens, dtype=np.int64), count)
        scale, basis = self._scale_and_basis(SparseVectors(indptr, keys, np.zeros((len(keys), 0), np.float32)))
        scale = scale * changed(SparseVectors(indptr, keys, np.ones((len(keys), width)))).vectors
        vectors = gradients.values.reshape(-1, width) @ basis
        rows = np.divide(vectors, scale, out=np.zeros_like(vectors), where=scale > 0)
        return SparseVectors(indptr, keys, rows.astype(np.float32))

    def _scale_and_basis(self, rows: SparseVectors) -> tuple[Float64[np.ndarray, "entries width"], Float64[np.ndarray, "width width"]]:
        keys = torch.from_numpy(rows.keys).to(self.device)
        return self.scale(keys).double().cpu().numpy(), self.basis.double().cpu().numpy()

    def collector(self, batch: Batch, query: bool) -> "SparseCollector":
        """Visitor of one batch, of queries or not."""
        return SparseCollector(self, batch)


class SparseCollector:
    """Visitor that turns a batch's gradients of the head or the embeddings into rows."""

    sums_examples = False

    def __init__(self, encoder: SparseEncoder, batch: Batch) -> None:
        self._encoder = encoder
        self.layers: Sequence[Layer] = (encoder.layer,)
        self.maps: Mapping[str, tuple[Map, Map]] = {encoder.layer.name: (None, None)}
        tokens = batch.targets if encoder.component.role == "head" else batch.inputs.masked_fill(~batch.valid, IGNORED)
        keys = [np.unique(row[row != IGNORED]) for row in tokens.cpu().numpy()]
        self._counts = np.array([len(row) for row in keys])
        self._keys = _padded(keys).to(encoder.device)
        self._sums: Tensor | None = None

    def __call__(self, layer: Layer, x: Inputs, d: OutputGradient, chunk: Batch) -> None:
        """Add the layer's call; a `Visit`."""
        if self._encoder.component.role == "embeddings":
            self._add(self._by_token(x, d.values, chunk))
            return
        if self._encoder.component.extra_tokens and self._sums is None:
            self._add_others(d.values)
        self._add(d.columns(self._keys).transpose(1, 2) @ x)

    def _add(self, gradients: Float[Tensor, "batch keys width"]) -> None:
        self._sums = gradients if self._sums is None else self._sums.add_(gradients)

    def _add_others(self, d: Float[Tensor, "batch tokens vocabulary"]) -> None:
        """Add the most probable tokens that are not predicted (those whose gradients, summed over positions, are largest)."""
        predicted = self._keys.cpu().numpy()
        rows = np.repeat(np.arange(len(predicted)), self._counts)
        columns = np.concatenate([row[:count] for row, count in zip(predicted, self._counts, strict=True)])
        mass = d.sum(1)
        mass[torch.from_numpy(rows).to(d.device), torch.from_numpy(columns).to(d.device)] = -torch.inf
        most = min(self._encoder.component.extra_tokens, mass.shape[1])
        probable_tokens = torch.topk(mass, most).indices.cpu().numpy()  # one wait for the device
        keys = [
            np.sort(np.concatenate([row[:count], other[: mass.shape[1] - count]]))
            for row, other, count in zip(predicted, probable_tokens, self._counts, strict=True)
        ]
        self._counts = np.array([len(row) for row in keys])
        self._keys = _padded(keys).to(d.device)

    def _by_token(self, x: Inputs, d: Float[Tensor, "batch tokens width"], chunk: Batch) -> Float[Tensor, "batch keys width"]:
        keys = self._keys.contiguous()
        positions = torch.searchsorted(keys, x.contiguous()).clamp(max=keys.shape[1] - 1)
        gradients = d.masked_fill(~chunk.valid.to(d.device)[..., None], 0)
        sums = d.new_zeros(*keys.shape, d.shape[2])
        return sums.scatter_add_(1, positions[..., None].expand_as(d), gradients)

    def rows(self, coded: bool = False) -> Callable[[], SparseVectors]:
        """Start to copy the batch's whitened rows, by token, to the host; the returned function waits for them.

        Args:
            coded: copy only the coordinates of the rotated vectors that an index codes, and the lengths: some hundred times fewer bytes.
        """
        encoder = self._encoder
        filled = torch.arange(self._keys.shape[1])[None] < torch.from_numpy(self._counts)[:, None]
        indptr = np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int64)
        if self._sums is None:
            empty = np.zeros(len(indptr), np.int64)
            return lambda: SparseVectors(empty, np.zeros(0, np.int64), np.zeros((0, encoder.component.width), np.float32))
        positions = filled.flatten().nonzero().flatten().to(encoder.device)
        keys = self._keys.flatten()[positions]
        whitened = (self._sums.flatten(0, 1)[positions] @ encoder.basis) * encoder.scale(keys)
        vectors = whitened.float()
        copied_keys = start_copy(keys)
        if not coded or encoder.rotation is None:
            copied = start_copy(vectors)
            return lambda: SparseVectors(indptr, copied_keys().numpy(), copied().numpy())
        rotated = start_copy(vectors @ encoder.rotation)
        energies = start_copy(vectors.double().square().sum(1))
        return lambda: SparseVectors(indptr, copied_keys().numpy(), rotated().numpy(), energies=energies().numpy())


def _padded(keys: Sequence[np.ndarray]) -> Int[Tensor, "rows keys"]:
    """Stack ascending tokens of several examples; the last token of each is repeated at its end."""
    width = max(1, *(len(row) for row in keys))
    return torch.from_numpy(np.stack([np.pad(row, (0, width - len(row)), mode="edge" if len(row) else "constant") for row in keys]))


class HeadMean:
    """Statistics visitor of the head's full whitened gradients, for the tokens of largest variance, which shows whether they cancel.

    Rows hold only predicted tokens, whose gradients never cancel; over all tokens they do where training has brought the head to a
    stationary point of the loss.

    Args:
        tokens: number of tokens.
        examples: number of examples after which it ignores others. Of a batch it takes the first, as many as keep its memory bounded.
    """

    sums_examples = True

    def __init__(self, encoder: SparseEncoder, tokens: int, examples: int) -> None:
        self._encoder = encoder
        self._most = examples
        self.layers: Sequence[Layer] = (encoder.layer,)
        self.maps: Mapping[str, tuple[Map, Map]] = {encoder.layer.name: (None, None)}
        self._tokens = torch.topk(encoder.vocabulary, min(tokens, len(encoder.vocabulary))).indices
        self._scale = encoder.scale(self._tokens)
        self._of_batch = max(1, _MEAN_ELEMENTS // (len(self._tokens) * encoder.component.width))
        self._gradients: Tensor | None = None
        self._sum = torch.zeros_like(self._scale, dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64, device=self._sum.device)
        self._examples = 0

    def __call__(self, layer: Layer, x: Float[Tensor, "batch tokens width"], d: OutputGradient, chunk: Batch) -> None:
        """Add the head's call."""
        if self._examples >= self._most:
            return
        first = min(len(x), self._of_batch)
        gradients = d.columns(self._tokens.expand(len(x), -1))[:first].transpose(1, 2) @ x[:first]
        self._gradients = gradients if self._gradients is None else self._gradients.add_(gradients)

    def end(self) -> None:
        """End the batch."""
        if self._gradients is not None:
            for gradient in self._gradients:
                z = (gradient @ self._encoder.basis) * self._scale
                self._sum += z
                self._squares += z.square().sum(dtype=torch.float64)
                self._examples += 1
            self._gradients = None

    @property
    def mean_share(self) -> float:
        """Mean score between different examples, divided by an example's mean score with itself."""
        n = self._examples
        squares = float(self._squares)
        between = (float(self._sum.square().sum()) - squares) / max(1, n * (n - 1))
        return between * n / squares if squares > 0 else 0.0


class SparseMeter:
    """Sums of a sparse component's statistics over batches.

    The closed form needs no labels: for the gradient d = p - onehot(y), p (1 - p) is |d| (1 - |d|), whatever y is.
    """

    sums_examples = True

    def __init__(self, component: SparseComponent) -> None:
        layer = vocabulary_layer(component)
        self._component = component
        self.layers: Sequence[Layer] = (layer,)
        self.maps: Mapping[str, tuple[Map, Map]] = {layer.name: (None, None)}
        self.sums: dict[str, Tensor] = {}

    def __call__(self, layer: Layer, x: Inputs, d: OutputGradient, chunk: Batch) -> None:
        """Add the layer's call; a `Visit`."""
        valid = chunk.valid.to(x.device)
        if self._component.role == "embeddings":
            gradients = (d.values * valid[..., None]).flatten(0, 1)
            self._add("moment", gradients.T @ gradients)
            reads = torch.zeros(self._component.vocabulary, dtype=torch.float64, device=x.device)
            self._add("vocabulary", reads.index_add_(0, x.flatten(), valid.flatten().double()))
            self._add("tokens", valid.sum())
            return
        predicted = valid & (chunk.targets.to(x.device) != IGNORED)
        states = (x * predicted[..., None]).flatten(0, 1)
        self._add("moment", states.T @ states)
        size = d.values.abs()
        variances = size.addcmul_(size, size, value=-1) if self._component.closed_form else size.square_()
        self._add("vocabulary", variances.sum((0, 1)))
        self._add("tokens", predicted.sum())

    def end(self) -> None:
        """End the batch."""

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = value.double() if name not in self.sums else self.sums[name].add_(value)


def finish(totals: Mapping[str, np.ndarray], examples: int) -> Arrays:
    """Arrays of a sparse component from the sums of its single pass."""
    values, vectors = symmetric_eigen(totals["moment"] / examples)
    vocabulary: Float64[np.ndarray, " vocabulary"] = np.maximum(totals["vocabulary"], 0.0) / examples
    return {"basis": vectors, "eigenvalues": values / (totals["tokens"] / examples), "vocabulary": vocabulary}
