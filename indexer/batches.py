"""Batches of examples, and their grouping by length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..store.shapes import Bool, Int

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Batch of examples, or some columns of one.

    Attributes:
        ids: of the examples, for messages and for seeding sampled labels.
        inputs: the model's input; for text token ids, right-padded with 0; for a model of several inputs, these by their names.
        targets: the class (for text, the token) that each position predicts, -100 where it is not in the loss.
        valid: False on padding.
        first: of some columns, the number of the first in the batch that they are of.
        sequences: the number of sequences of each example, whose tokens stand side by side.
        other_valid: the masks of layers that see another number of tokens, such as those of an encoder beside a decoder.
    """

    ids: tuple[str, ...]
    inputs: Any
    targets: Int[Tensor, "batch predicted"]
    valid: Bool[Tensor, "batch tokens"]
    first: int = 0
    sequences: int = 1
    other_valid: tuple[Bool[Tensor, "batch _"], ...] = ()

    def valid_of(self, tokens: int) -> Bool[Tensor, "batch tokens"]:
        """Return the mask of a layer that sees so many tokens of each example; all of them are valid where no mask has their number."""
        for mask in (self.valid, *self.other_valid):
            if mask.shape[1] == tokens:
                return mask & self.valid.any(dim=1, keepdim=True)  # of an example that was dropped, none is
        return self.valid.any(dim=1, keepdim=True).expand(-1, tokens)

    def stacked(self, values: Tensor) -> Tensor:
        """Return values of all tokens, [batch, tokens], with one sequence a row."""
        return values.reshape(len(self.ids) * self.sequences, -1)

    def swapped(self) -> "Batch":
        """Return the examples in the opposite order, a few of them."""
        inputs = {name: value.flip(0) for name, value in self.inputs.items()} if isinstance(self.inputs, Mapping) else self.inputs.flip(0)
        masks = tuple(mask.flip(0) for mask in self.other_valid)
        return replace(self, ids=self.ids[::-1], inputs=inputs, targets=self.targets.flip(0), valid=self.valid.flip(0), other_valid=masks)

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
