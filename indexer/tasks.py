"""The task: what a model is asked, and the loss whose gradients are indexed.

A task makes batches of examples and computes each example's loss: the *sum* over its loss tokens of the cross-entropy in nats. A
question is measured with the same loss, so the score's sign reads: positive, training on the example lowered the question's loss.

Batches are right-padded and carry no attention mask: in a causal model nothing to the left can see the padding, and positions count from
the left, so that padding cannot change a row. The last token is only ever predicted, so it is not in the input.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..store.documents import Example

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Examples side by side.

    Attributes:
        ids: of the examples, for messages and for seeding sampled labels.
        inputs: token ids, right-padded with 0.
        targets: the token that each position predicts, -100 where it is not in the loss.
        valid: False on padding.
    """

    ids: tuple[str, ...]
    inputs: Int[Tensor, "batch tokens"]
    targets: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"]


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group examples of similar length so that a padded batch holds at most `token_budget` tokens (one example may exceed it alone).

    A function of the lengths alone, longest first, so the same examples always share the same batches.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def collate(examples: Sequence[Example], device: torch.device) -> Batch:
    """One batch of examples, each without its last token as input."""
    longest = max(len(e.token_ids) for e in examples) - 1
    inputs = np.zeros((len(examples), longest), np.int64)
    targets = np.full((len(examples), longest), IGNORED, np.int64)
    valid = np.zeros((len(examples), longest), bool)
    for i, example in enumerate(examples):
        length = len(example.token_ids) - 1
        inputs[i, :length] = example.token_ids[:-1]
        targets[i, :length] = np.where(example.loss_mask[1:], example.token_ids[1:], IGNORED)
        valid[i, :length] = True
    tensors = (torch.from_numpy(a).to(device) for a in (inputs, targets, valid))
    return Batch(tuple(e.id for e in examples), *tensors)


def example_losses(model: nn.Module, batch: Batch, sample_seed: int | None = None) -> Float[Tensor, " batch"]:
    """Each example's loss: the sum of cross-entropies (nats) over its loss tokens.

    Args:
        sample_seed: when given, targets are drawn from the model's own distribution (the true Fisher's labels) instead of the data's;
            the draw depends on the seed and the example's id, not on the batch.
    """
    logits = model(input_ids=batch.inputs, use_cache=False).logits
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    targets = batch.targets if sample_seed is None else sample_targets(logits, batch, sample_seed)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(targets.shape).sum(1)


@torch.no_grad()
def sample_targets(logits: Float[Tensor, "batch tokens vocab"], batch: Batch, seed: int) -> Int[Tensor, "batch tokens"]:
    """Targets drawn from softmax(logits) by inverting its cumulative sum, one example at a time to bound memory."""
    sampled = batch.targets.clone()
    for i, id in enumerate(batch.ids):
        positions = (batch.targets[i] != IGNORED).nonzero()[:, 0]
        key = int.from_bytes(hashlib.sha256(f"whence labels {seed} {id}".encode()).digest()[:16], "little")
        uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random(len(positions))).to(logits.device)
        cumulative = logits[i, positions].double().softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None])[:, 0]
        sampled[i, positions] = drawn.clamp(max=logits.shape[-1] - 1)
    return sampled
