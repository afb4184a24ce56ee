"""Mean last hidden states: the model's embedding of an example, a baseline for gradient rows."""

from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from ..store.documents import Example
from ..store.shapes import Float32
from .tasks import Batch, Task


class HiddenMeans:
    """Context manager that captures the prediction layer's inputs and averages them over an example's tokens.

    Args:
        task: names the layer.
        model: contains it.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._head = task.head(model)
        self._states: Tensor | None = None

    def __enter__(self) -> "HiddenMeans":
        def capture(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._states = args[0].detach()

        self._handle = self._head.register_forward_pre_hook(capture)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handle.remove()

    def of(self, batch: Batch) -> Float32[np.ndarray, "batch width"]:
        """Means of the model's last batch."""
        assert self._states is not None
        valid = batch.valid.to(self._states.device)
        states = self._states.reshape(*valid.shape, -1).float() * valid[..., None]
        return (states.sum(1) / valid.sum(1, keepdim=True)).cpu().numpy()


@torch.no_grad()
def mean_hidden(task: Task, model: nn.Module, examples: Sequence[Example], batch_tokens: int) -> Float32[np.ndarray, "examples width"]:
    """Mean hidden states of some examples."""
    rows: dict[int, np.ndarray] = {}
    device = next(model.parameters()).device
    with HiddenMeans(task, model) as means:
        for positions in task.group((model,), [e.tokens for e in examples], batch_tokens):
            batch = task.collate([examples[i] for i in positions], device)
            task.loss(model, batch)
            rows.update(zip(positions, means.of(batch), strict=True))
    return np.stack([rows[i] for i in range(len(examples))])
