"""Tasks of several texts an example: preference pairs (DPO, reward models) and sentence embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..store.bits import philox
from ..store.corpus import Document
from ..store.documents import Example
from ..store.errors import DataError, IncompatibleError, UsageError
from ..store.shapes import Float
from . import models
from .batches import IGNORED, Batch
from .capture import accumulation_dtype
from .examples import Rendered, WholeTextConverter
from .logits import cross_entropies, draw_uniform
from .tasks import CausalLM, TextTask
from .text_tasks import fill_padding, padded

_PROBE = ((3, 1, 2), (3, 2, 1), (1, 3, 3), (2, 3, 1))
_LEAST_TEXTS = 3
_REFERENCES: "WeakKeyDictionary[nn.Module, nn.Module]" = WeakKeyDictionary()


@dataclass(frozen=True)
class PairConverter(WholeTextConverter):
    """Conversion of preference pairs to two sequences, the chosen and the rejected one, each with its prompt.

    A query may also be a text, or a prompt with a completion, alone.
    """

    def _sides(self, document: Document) -> Sequence[Document]:
        if document.rejected is None:
            return (document,)
        return replace(document, rejected=None), document.rejected

    def _shown(self, rendered: Sequence[Rendered]) -> str:
        if len(rendered) == 1:
            return rendered[0].text
        (start, _), *_ = rendered[1].spans or ((0, 0),)
        return f"{rendered[0].text}\n\n[rejected] {rendered[1].text[start:]}"

    def _example(self, document: Document, span: str | None = None) -> Example:
        example = super()._example(document, span)
        sides = example.sequences()
        if not all(mask.any() for _, mask in sides):
            raise DataError(f"no token of a completion is within {self.max_tokens} tokens; shorten the prompt")
        if len(sides) > 1 and np.array_equal(sides[0][0], sides[1][0]):
            raise DataError(f"the two sides have the same {len(sides[0][0])} tokens, so that the pair says nothing; leave it out")
        return example

    def _tokenize(self, rendered: Sequence[Rendered], truncation: bool = False) -> Any:
        """See `TextConverter`; the end-of-text token follows a completion where `append_eos` is set, as in TRL's training."""
        results = []
        for item, (ids, mask, offsets) in zip(rendered, super()._tokenize(rendered, truncation), strict=True):
            eos = self.tokenizer.eos_token_id
            takes_eos = self.append_eos and len(ids) < self.max_tokens and item.add_special_tokens
            if takes_eos and eos is not None and len(ids) and ids[-1] != eos:
                end = [[len(item.text)] * 2]
                ids, mask, offsets = np.append(ids, np.int32(eos)), np.append(mask, len(ids) > 0), np.vstack([offsets, end])  # noqa: PLW2901
            results.append((ids, mask, offsets))
        return results


def draw_preferred(probabilities: Float[Tensor, " batch"], batch: Batch, seed: int) -> Float[Tensor, " batch"]:
    """Draw, for each pair, 1 (the chosen side is preferred) with a probability, else -1; by the seed and the example's id."""
    uniform = [np.random.Generator(philox(f"wherefrom labels {seed} {id}")).random() for id in batch.ids]
    return torch.where(torch.tensor(uniform).to(probabilities) < probabilities, 1.0, -1.0).to(probabilities)


def preference_loss(margins: Float[Tensor, " batch"], batch: Batch, sample_seed: int | None) -> Float[Tensor, " batch"]:
    """The negative log probability, in nats, that the chosen side is preferred, by the model of Bradley and Terry.

    Args:
        sample_seed: the preferred side is drawn from the model instead.
    """
    if sample_seed is not None:
        margins = margins * draw_preferred(torch.sigmoid(margins.detach()), batch, sample_seed)
    return -F.logsigmoid(margins)


def sequence_count(examples: Sequence[Example]) -> int:
    """Return the number of sequences of each example.

    Raises:
        DataError: they differ.
    """
    counts = {max(1, len(e.lengths)) for e in examples}
    if len(counts) > 1:
        raise DataError("examples of one batch have different numbers of texts; ask pairs and single texts apart")
    return counts.pop()


@dataclass(frozen=True)
class DPO(CausalLM):
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290, eq. 7) of a causal language model.

    The loss of a pair is -log sigmoid(beta (log p(chosen) - log p(rejected) - the same of the reference model)), in nats. A query may be a
    pair, or a text or completion alone, whose measurement is its cross-entropy.

    Attributes:
        beta: as in training.
        reference: directory or hub id of the reference model, from which training started; by default the base of the adapter.
    """

    beta: float = 0.1
    reference: str = ""

    form = "pair"
    features = frozenset({"sequences"})
    has_token_shares = False

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError("beta is above 0")

    def attach(self, model: nn.Module, source: models.ModelSource) -> None:
        """Load the reference model.

        Raises:
            UsageError: it is not named.
            IncompatibleError: it has a vocabulary of another size, or cannot be loaded.
        """
        base = self.reference or models.loaded(model).base
        if not base:
            raise UsageError("DPO compares with the model that training started from; name it, as in task dpo(reference=DIRECTORY)")
        reference = replace(source, id=base, revision=None, base=None, loaded=None)
        _REFERENCES[model] = models.load_causal_lm(reference).requires_grad_(False)
        if models.vocabulary_size(_REFERENCES[model]) != models.vocabulary_size(model):
            raise IncompatibleError(f"the reference model {base} has a vocabulary of another size; name the one that training started from")

    def converter(
        self, source: models.ModelSource, max_tokens: int | None = None, long: Any = "split", append_eos: bool = True
    ) -> PairConverter:
        """See `Task`."""
        return PairConverter(models.load_tokenizer(source), max_tokens or 1 << 30, "truncate", append_eos)

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """See `Task`; the two sequences of a pair are side by side."""
        count = sequence_count(examples)
        sequences = [replace(e, token_ids=ids, loss_mask=mask, lengths=()) for e in examples for ids, mask in e.sequences()]
        batch = super().collate(sequences, device)
        inputs, targets, valid = (x.reshape(len(examples), -1) for x in (batch.inputs, batch.targets, batch.valid))
        return Batch(tuple(e.id for e in examples), inputs, targets, valid, sequences=count)

    def loss(self, model: nn.Module, batch: Batch, sample_seed: int | None = None) -> Float[Tensor, " batch"]:
        """See `Task`; of a single text, the cross-entropy."""
        self.check_tokens(model, batch, torch.maximum(batch.inputs, batch.targets))
        trained = self._log_probabilities(model, batch)
        if batch.sequences == 1:
            return -trained[:, 0]
        with torch.no_grad():
            reference = self._log_probabilities(_REFERENCES[model], batch).to(trained.device)
        chosen, rejected = (trained - reference).unbind(1)
        return preference_loss(self.beta * (chosen - rejected), batch, sample_seed)

    @staticmethod
    def _log_probabilities(model: nn.Module, batch: Batch) -> Float[Tensor, "batch sequences"]:
        """Return the log probability of each completion, in nats."""
        targets = batch.stacked(batch.targets)
        logits = models.logits_of(model, batch.stacked(batch.inputs))
        log_p = torch.log_softmax(logits.to(accumulation_dtype(logits.dtype)), dim=-1)
        losses = F.nll_loss(log_p.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
        return -losses.view(targets.shape).sum(1).view(-1, batch.sequences)

    def probe(self, model: nn.Module, device: torch.device) -> Batch:
        """See `Task`."""
        ids = torch.tensor(_PROBE, device=device).reshape(2, -1)
        return Batch(("probe", "probe"), ids, ids, torch.ones_like(ids, dtype=torch.bool), sequences=2)


class Reward(TextTask):
    """A reward model: a classifier with one output, trained on preference pairs by the model of Bradley and Terry.

    The loss of a pair is -log sigmoid(reward(chosen) - reward(rejected)), in nats. A query may be a pair, or a text or completion alone,
    whose measurement is minus its reward.
    """

    form = "pair"
    features = frozenset({"sequences"})
    auto_class = "AutoModelForSequenceClassification"

    def converter(
        self, source: models.ModelSource, max_tokens: int | None = None, long: Any = "split", append_eos: bool = True
    ) -> PairConverter:
        """See `Task`."""
        return PairConverter(models.load_tokenizer(source), max_tokens or 1 << 30, "truncate", append_eos)

    def check(self, model: nn.Module) -> None:
        """See `Task`."""
        outputs = model.config.num_labels  # type: ignore[union-attr]
        if outputs != 1:
            raise IncompatibleError(f"the model has {outputs} outputs, a reward model has one; for a classifier, give task classification")

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """See `Task`; the two sequences of a pair are side by side. An example has one target, class 0, the chosen side."""
        count = sequence_count(examples)
        ids, valid = padded([ids for e in examples for ids, _ in e.sequences()], device)
        ids, valid = (x.reshape(len(examples), -1) for x in (ids, valid))
        targets = torch.zeros((len(examples), 1), dtype=torch.long, device=device)
        return Batch(tuple(e.id for e in examples), ids, targets, valid, sequences=count)

    def loss(self, model: nn.Module, batch: Batch, sample_seed: int | None = None) -> Float[Tensor, " batch"]:
        """See `Task`; of a single text, minus its reward."""
        self.check_tokens(model, batch, batch.inputs)
        valid = batch.stacked(batch.valid)
        arguments = {"input_ids": fill_padding(model, batch.stacked(batch.inputs), valid), "attention_mask": valid.long()}
        logits = model(**arguments, **models.without_cache(model)).logits
        rewards = logits.to(accumulation_dtype(logits.dtype)).view(len(batch.ids), batch.sequences)
        if batch.sequences == 1:
            return -rewards[:, 0]
        return preference_loss(rewards[:, 0] - rewards[:, 1], batch, sample_seed)

    def probe(self, model: nn.Module, device: torch.device) -> Batch:
        """See `Task`."""
        ids = torch.tensor(_PROBE, device=device).reshape(2, -1)
        targets = torch.zeros((2, 1), dtype=torch.long, device=device)
        return Batch(("probe", "probe"), ids, targets, torch.ones_like(ids, dtype=torch.bool), sequences=2)


class _TextsConverter(WholeTextConverter):
    """Conversion of an anchor, a text like it, and texts unlike it, to sequences."""

    def _sides(self, document: Document) -> Sequence[Document]:
        if len(document.texts) < _LEAST_TEXTS:
            raise DataError(f"there are {len(document.texts)} texts; give an anchor, a positive text and at least one negative, as `texts`")
        return tuple(replace(document, text=text, texts=()) for text in document.texts)

    def _shown(self, rendered: Sequence[Rendered]) -> str:
        return "\n\n".join([item.text for item in rendered[:2]] + [f"[negative] {item.text}" for item in rendered[2:]])


@dataclass(frozen=True)
class Embedding(TextTask):
    """Sentence embeddings, trained with negatives (InfoNCE; van den Oord et al., arXiv 1807.03748, eq. 4).

    The loss of an anchor is the cross-entropy, in nats, of its positive text among the positive and the negative ones, by cosine times
    `scale`. Negatives are those of the document: the other texts of a training batch, which also served as negatives there, are not known.

    Attributes:
        scale: as in training (the inverse of the temperature).
        pooling: "mean" of the tokens' last hidden states, "cls" for the first token's, or "last" for the last token's.
    """

    scale: float = 20.0
    pooling: str = "mean"

    form = "texts"
    features = frozenset({"sequences"})
    auto_class = "AutoModel"

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "cls", "last") or not self.scale > 0:
            raise ValueError("pooling is mean, cls or last, and scale is above 0")

    def converter(
        self, source: models.ModelSource, max_tokens: int | None = None, long: Any = "split", append_eos: bool = True
    ) -> WholeTextConverter:
        """See `Task`."""
        return _TextsConverter(models.load_tokenizer(source), max_tokens or 1 << 30)

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """See `Task`; the texts of an example are side by side. Its target is the positive text."""
        count = max(len(e.lengths) for e in examples)
        absent = np.zeros(0, np.int32)  # of an example with fewer negatives
        texts = [ids for e in examples for ids in [*(ids for ids, _ in e.sequences()), *[absent] * (count - len(e.lengths))]]
        ids, valid = padded(texts, device)
        ids, valid = (x.reshape(len(examples), -1) for x in (ids, valid))
        targets = torch.zeros((len(examples), 1), dtype=torch.long, device=device)
        return Batch(tuple(e.id for e in examples), ids, targets, valid, sequences=count)

    def loss(self, model: nn.Module, batch: Batch, sample_seed: int | None = None) -> Float[Tensor, " batch"]:
        """See `Task`."""
        self.check_tokens(model, batch, batch.inputs)
        valid = batch.stacked(batch.valid)
        present = valid.any(1)
        mask = valid | ~present[:, None]  # a text that is absent is read, and left out below
        states = model(input_ids=fill_padding(model, batch.stacked(batch.inputs), mask), attention_mask=mask.long())[0]
        states = states.to(accumulation_dtype(states.dtype))
        vectors = F.normalize(self._pooled(states, mask), dim=1).view(len(batch.ids), batch.sequences, -1)
        logits = self.scale * torch.einsum("bd,bsd->bs", vectors[:, 0], vectors[:, 1:])
        logits = logits.masked_fill(~present.view(len(batch.ids), -1)[:, 1:], -torch.inf)
        return cross_entropies(logits[:, None], batch, None if sample_seed is None else draw_uniform(batch, sample_seed))

    def batch_kind(self, example: Example) -> int:
        """See `Task`; examples with fewer negatives share batches with others."""
        return 0

    def _pooled(self, states: Float[Tensor, "texts tokens width"], mask: Tensor) -> Float[Tensor, "texts width"]:
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "last":
            return states[torch.arange(len(states)), mask.sum(1) - 1]
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def probe(self, model: nn.Module, device: torch.device) -> Batch:
        """See `Task`."""
        ids = torch.tensor((*_PROBE, *_PROBE[:2]), device=device).reshape(2, -1)
        targets = torch.zeros((2, 1), dtype=torch.long, device=device)
        return Batch(("probe", "probe"), ids, targets, torch.ones_like(ids, dtype=torch.bool), sequences=3)
