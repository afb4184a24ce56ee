"""Exact products with the Gauss-Newton matrix of a model's loss, in the weights of some layers together.

    G = (1/N) sum over examples and their predicted tokens of J^T (diag(p) - p p^T) J

J is the derivative of a token's logits in the weights and p its probabilities: the Hessian of the loss of the linearized model
(Schraudolph, 2002), which is also its Fisher matrix under the model's own labels, with all terms between layers. A product takes a
forward-mode and a reverse-mode derivative of a pass over the examples, and no matrix is formed.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..store.documents import Example
from ..store.errors import UsageError
from ..store.manifest import Layer
from ..store.shapes import Float
from .batches import IGNORED, Batch
from .models import is_transposed
from .tasks import Task
from .tensor_parallel import refuse_split

_BATCH_TOKENS = 1024


class GaussNewton:
    """Products with the matrix.

    Args:
        task, model: as of an encoder.
        layers: whose weights it covers, from their `offset`s on, without projection; head and embeddings that are one weight have one.
        examples: those that the mean is over.
    """

    def __init__(self, task: Task, model: nn.Module, layers: Sequence[Layer], examples: Sequence[Example]) -> None:
        self._task = task
        self._model = model
        self._layers = layers
        self._examples = examples
        self._size = max(layer.offset + layer.outputs * layer.inputs for layer in layers)
        refuse_split(model, "the product with the exact curvature (`refine`)")
        modules = [model.get_submodule(layer.name) for layer in layers]
        self._transposed = [is_transposed(module) for module in modules]
        self._weights: dict[str, Tensor] = {
            f"{layer.name}.weight": module.weight.detach()  # type: ignore[operator]
            for layer, module in zip(layers, modules, strict=True)
        }

    def product(self, vectors: Float[Tensor, "queries parameters"]) -> Float[Tensor, "queries parameters"]:
        """Multiply vectors with the matrix.

        Raises:
            UsageError: the task has no logits, or these cannot be differentiated (an operation may have no forward-mode derivative).
            torch.OutOfMemoryError: of a GPU.
        """
        result = torch.zeros_like(vectors)
        device = next(iter(self._weights.values())).device
        tangents = [self._by_name(vector.to(device)) for vector in vectors]
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for _, batch in self._task.batches((self._model,), self._examples, _BATCH_TOKENS):
                try:
                    for number, product in enumerate(self._products(batch, tangents)):
                        result[number] += product.to(result.device)
                except torch.OutOfMemoryError:
                    raise
                except (NotImplementedError, RuntimeError) as error:
                    reason = str(error).splitlines()[0]
                    raise UsageError(f"the model's logits cannot be differentiated forward ({reason}); leave `refine` out") from error
        return result / len(self._examples)

    def _products(self, batch: Batch, tangents: Sequence[Mapping[str, Tensor]]) -> Iterator[Float[Tensor, " parameters"]]:
        """Yield the product of a batch's part of the matrix with each vector."""

        def logits_of(weights: Mapping[str, Tensor]) -> Tensor:
            return self._task.logits(self._model, weights, batch)

        logits, transposed_product = vjp(logits_of, self._weights)  # type: ignore[misc]
        p = torch.softmax(logits, dim=-1) * (batch.targets != IGNORED)[..., None].to(logits.device)
        for tangent in tangents:
            _, change = jvp(logits_of, (self._weights,), (tangent,))  # type: ignore[misc]
            weighted = p * change
            (gradient,) = transposed_product(weighted - p * weighted.sum(-1, keepdim=True))
            yield self._flat(gradient)

    def _by_name(self, vector: Float[Tensor, " parameters"]) -> dict[str, Tensor]:
        parts = {}
        for layer, transposed, (name, weight) in zip(self._layers, self._transposed, self._weights.items(), strict=True):
            size = layer.outputs * layer.inputs
            matrix = vector[layer.offset : layer.offset + size].reshape(layer.outputs, layer.inputs)
            parts[name] = (matrix.T if transposed else matrix).reshape(weight.shape).to(weight.dtype)
        return parts

    def _flat(self, gradient: Mapping[str, Tensor]) -> Float[Tensor, " parameters"]:
        flat = torch.zeros(self._size, dtype=torch.float64)
        for layer, transposed, name in zip(self._layers, self._transposed, self._weights, strict=True):
            matrix = gradient[name]
            flat_layer = flat[layer.offset : layer.offset + layer.outputs * layer.inputs]
            flat_layer += (matrix.T if transposed else matrix).reshape(-1).to(flat_layer)
        return flat
