"""Mean last hidden states: the model's embedding of an example, a baseline for gradient rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..store.documents import Example
from ..store.shapes import Float32
from .batches import Batch
from .tasks import Task
from .transfer import start_copy


@contextmanager
def hidden_means(task: Task, model: nn.Module) -> Iterator[Callable[[Batch], Callable[[], Float32[np.ndarray, "batch width"]]]]:
    """Capture the inputs of the task's prediction layer.

    The value is a function that averages those of the batch since its last call and starts to copy the means to the host; its value
    returns them.
    """
    states: list[Tensor] = []

    def watch(state: Tensor) -> None:
        states.append(state.detach())

    def means(batch: Batch) -> Callable[[], Float32[np.ndarray, "batch width"]]:
        count = batch.valid.shape[1]
        pieces: list[Tensor] = []
        while states and sum(piece.shape[1] for piece in pieces) < count:  # the logits may be computed in pieces
            state = states.pop()
            pieces.insert(0, state.reshape(len(batch.ids), -1, state.shape[-1]))
        states.clear()
        joined = torch.cat(pieces, dim=1).float()
        valid = batch.valid_of(joined.shape[1]).to(joined.device)
        valid_states = joined * valid[..., None]
        copied = start_copy(valid_states.sum(1) / valid.sum(1, keepdim=True))
        return lambda: copied().numpy()

    handle = task.watch_hidden(model, watch)
    try:
        yield means
    finally:
        handle.remove()


@torch.no_grad()
def mean_hidden(task: Task, model: nn.Module, examples: Sequence[Example], batch_tokens: int) -> Float32[np.ndarray, "examples width"]:
    """Mean hidden states of some examples."""
    rows: dict[int, np.ndarray] = {}
    with hidden_means(task, model) as means:
        for positions, batch in task.batches((model,), examples, batch_tokens):
            task.loss(model, batch)
            rows.update(zip(positions, means(batch)(), strict=True))
    return np.stack([rows[i] for i in range(len(examples))])
