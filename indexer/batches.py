"""Batches of examples, and their grouping by length."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..store.shapes import Bool, Int

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Batch of examples, or some columns of one.

    Attributes:
        ids: of the examples, for messages and for seeding sampled labels.
        inputs: the model's input; for text token ids, right-padded with 0.
        targets: the class (for text, the token) that each position predicts, -100 where it is not in the loss.
        valid: False on padding.
        first: of some columns, the number of the first in the batch that they are of.
    """

    ids: tuple[str, ...]
    inputs: Tensor
    targets: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"]
    first: int = 0

    def columns(self, first: int, last: int) -> "Batch":
        """Return the tokens from `first` to `last` of each example, the last not included; they share memory with the batch."""
        return Batch(self.ids, self.inputs[:, first:last], self.targets[:, first:last], self.valid[:, first:last], first)


def batches_by_length(lengths: Sequence[int], token_budget: int, splits: Sequence[int] = ()) -> list[list[int]]:
    """Group examples of similar length so that a padded batch holds at most `token_budget` tokens (one example may exceed it alone).

    A function of the lengths alone, longest first, so the same examples always share the same batches.

    Args:
        splits: lengths; an example of at most that length shares no batch with a longer one.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        room = batches and (len(batches[-1]) + 1) * longest <= token_budget
        if room and not any(lengths[i] <= split < longest for split in splits):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
