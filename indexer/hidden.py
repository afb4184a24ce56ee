"""Mean last hidden states: the model's own embedding of an example, which stands beside its gradient as a baseline."""

from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from ..store.documents import Example
from .tasks import Batch, Task


class HiddenMeans:
    """While it is entered, keeps what the layer that makes the predictions is given, and averages it over an example's tokens.

    Args:
        task: which says which layer that is.
        model: whose.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._head = task.head(model)
        self._seen: Tensor | None = None

    def __enter__(self) -> "HiddenMeans":
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._seen = args[0].detach()

        self._handle = self._head.register_forward_pre_hook(keep)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handle.remove()

    def of(self, batch: Batch) -> Float32[np.ndarray, "batch width"]:
        """The means of the batch that the model has just seen."""
        assert self._seen is not None
        valid = batch.valid.to(self._seen.device)
        states = self._seen.reshape(*valid.shape, -1).float() * valid[..., None]
        return (states.sum(1) / valid.sum(1, keepdim=True)).cpu().numpy()


@torch.no_grad()
def mean_hidden(task: Task, model: nn.Module, examples: Sequence[Example], batch_tokens: int) -> Float32[np.ndarray, "examples width"]:
    """The mean hidden states of some examples."""
    found: dict[int, np.ndarray] = {}
    device = next(model.parameters()).device
    with HiddenMeans(task, model) as means:
        for chosen in task.group((model,), [e.tokens for e in examples], batch_tokens):
            batch = task.collate([examples[i] for i in chosen], device)
            task.loss(model, batch)
            found.update(zip(chosen, means.of(batch), strict=True))
    return np.stack([found[i] for i in range(len(examples))])
