"""Tasks of single texts and of texts with a target: classifiers, masked language models and encoder-decoders of `transformers`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..store.bits import philox
from ..store.corpus import Document
from ..store.documents import Example
from ..store.errors import DataError, IncompatibleError, UsageError
from ..store.fields import Form
from ..store.shapes import Bool, Float, Int
from . import models
from .batches import IGNORED, Batch
from .examples import Rendered, WholeTextConverter, occurrence
from .logits import cross_entropies, draw_uniform
from .tasks import TextTask, VocabularyLayer, label_loss, vocabulary_head

_PROBE = ((3, 1, 2), (1, 3, 3))


def padded(
    sequences: Sequence[Int[np.ndarray, " _tokens"]], device: torch.device, filler: int = 0
) -> tuple[Int[Tensor, "sequences tokens"], Bool[Tensor, "sequences tokens"]]:
    """Stack sequences, padded on the right, with a mask that is False on padding."""
    longest = max(map(len, sequences))
    ids = np.full((len(sequences), longest), filler, np.int64)
    valid = np.zeros((len(sequences), longest), bool)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = sequence
        valid[i, : len(sequence)] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(valid).to(device)


def fill_padding(model: Any, ids: Tensor, valid: Tensor) -> Tensor:
    """Put the padding token of a model's configuration where a batch is padded, since some models look for it."""
    token = getattr(model.config, "pad_token_id", None)
    if token is None and not bool(valid.all()):
        raise UsageError(
            "the model's configuration has no pad_token_id, so that it knows no batches of several texts; set it as in training"
        )
    return ids if token is None else ids.masked_fill(~valid, token)


class _LabelConverter(WholeTextConverter):
    """Conversion of texts, or messages, with a label."""

    takes_label = True

    def _sides(self, document: Document) -> Sequence[Document]:
        if document.label is None:
            raise DataError("there is no label; a classifier's example is a text with a label")
        if document.completion is not None and document.messages is None:
            raise DataError("a prompt with a completion; a classifier's example is one text, or messages, with a label")
        return (document,)


class Classification(TextTask):
    """A classifier of texts: documents have a `label`, the loss is its cross-entropy.

    A text that is longer than the longest example is cut, as in training, and never split.
    """

    form: Form = "label"
    features = frozenset({"labels"})
    mode = "loss-normalized"
    auto_class = "AutoModelForSequenceClassification"

    def converter(
        self, source: models.ModelSource, max_tokens: int | None = None, long: Any = "split", append_eos: bool = True
    ) -> WholeTextConverter:
        """See `Task`."""
        return _LabelConverter(models.load_tokenizer(source), max_tokens or 1 << 30)

    def check(self, model: nn.Module) -> None:
        """See `Task`."""
        config: Any = model.config
        if config.num_labels < 2:
            raise IncompatibleError("the model has one output and no classes; for a reward model, give task reward")
        if config.problem_type not in (None, "single_label_classification"):
            raise IncompatibleError(f"the model is trained for {config.problem_type}; this task has one label an example")

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """See `Task`."""
        ids, valid = padded([e.token_ids for e in examples], device)
        targets = torch.tensor([[IGNORED if e.label is None else e.label] for e in examples], device=device)
        return Batch(tuple(e.id for e in examples), ids, targets, valid)

    def loss(self, model: nn.Module, batch: Batch, sample_seed: int | None = None) -> Float[Tensor, " batch"]:
        """See `Task`."""
        self.check_tokens(model, batch, batch.inputs)
        return label_loss(self.logits(model, {}, batch), batch, sample_seed)

    def logits(self, model: nn.Module, weights: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, "batch one classes"]:
        """See `Task`."""
        ids = fill_padding(model, batch.inputs, batch.valid)
        arguments = {"input_ids": ids, "attention_mask": batch.valid.long(), **models.without_cache(model)}
        logits: Tensor = functional_call(model, dict(weights), kwargs=arguments, tie_weights=False).logits
        return logits[:, None]

    def probe(self, model: nn.Module, device: torch.device) -> Batch:
        """See `Task`."""
        ids = torch.tensor(_PROBE, device=device)
        return Batch(("probe", "probe"), ids, torch.zeros((2, 1), dtype=torch.long, device=device), torch.ones_like(ids, dtype=torch.bool))

    def classes(self, model: nn.Module) -> int:
        """See `Task`."""
        return int(model.config.num_labels)  # type: ignore[union-attr, arg-type]


class _MaskedConverter(WholeTextConverter):
    """Conversion of texts for a masked language model; a longer text is split into chunks with special tokens of their own.

    The loss mask is true for tokens that may be masked, which the first, a special one in all such tokenizers, may not. The lengths of an
    example whose completion or span is masked at once are those of the parts before, within and after it.
    """

    def _examples(self, document: Document) -> Iterator[Example]:
        """Yield the examples of a document, whose text is split where it is too long; chunks without a token to mask are left out."""
        whole = self._example(document)
        if not whole.truncated or self.long == "truncate" or document.text is None:
            yield whole
            return
        encoded = self.tokenizer(
            document.text,
            truncation=True,
            max_length=self.max_tokens,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        for number, offsets in enumerate(encoded["offset_mapping"]):
            ends = [pair for pair in offsets if pair[1] > pair[0]]
            with suppress(DataError):
                text = document.text[ends[0][0] : ends[-1][1]] if ends else ""
                yield replace(self._example(replace(document, text=text)), id=f"{document.id}#{number}", chunk=number)

    def _example(self, document: Document, span: str | None = None) -> Example:
        rendered = self._render(document)
        if span is not None:
            rendered = replace(rendered, spans=(occurrence(rendered, span, document.where),))
        ids, mask, _ = self._tokenize([rendered], truncation=True)[0]
        if not mask.any() or len(ids) < 2:
            raise DataError("the text has no token to mask; leave it out")
        at_once = span is not None or document.completion is not None
        first, last = np.flatnonzero(mask)[[0, -1]]
        return Example(
            id=document.id,
            text=rendered.text,
            source=document.source,
            token_ids=ids,
            loss_mask=mask,
            document=document.id,
            metadata=document.metadata,
            truncated=len(self._tokenize([rendered])[0][0]) > len(ids),
            lengths=tuple(int(n) for n in np.diff([0, first, last + 1, len(ids)]) if n) if at_once else (),
        )


@dataclass(frozen=True)
class MaskedLM(TextTask):
    """A masked language model: the mean, over draws of masks, of the summed cross-entropy of the masked tokens.

    Of a document with a completion, and of a query's span, all tokens are masked at once. Masks are drawn by the example's tokens alone.

    Attributes:
        probability: that a token is masked in a draw, as in training; it is then replaced by the mask token.
        draws: number of masks of an example.
    """

    probability: float = 0.15
    draws: int = 4

    form = "auto"
    auto_class = "AutoModelForMaskedLM"
    within_blocks = True
    features = frozenset({"sequences"})

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1 or self.draws < 1:
            raise ValueError("probability is above 0 and at most 1, and draws is at least 1")

    def converter(
        self, source: models.ModelSource, max_tokens: int | None = None, long: Any = "split", append_eos: bool = True
    ) -> WholeTextConverter:
        """See `Task`."""
        return _MaskedConverter(models.load_tokenizer(source), max_tokens or 1 << 30, long)

    def attach(self, model: nn.Module, source: models.ModelSource) -> None:
        """Record the tokenizer's mask token in the model's configuration, where few models have it."""
        token = models.load_tokenizer(source).mask_token_id
        if token is None:
            raise IncompatibleError(f"the tokenizer of {source.id} has no mask token, which a masked language model needs")
        model.config.mask_token_id = token  # type: ignore[union-attr]

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """See `Task`; each example is there once for each draw, side by side. The inputs are not masked yet."""
        repeated = [e for e in examples for _ in range(self.draws)]
        ids, valid = padded([e.token_ids for e in repeated], device)
        masks = [self._mask(e, i % self.draws) for i, e in enumerate(repeated)]
        masked, _ = padded(masks, device)
        targets = torch.where(masked.bool(), ids, IGNORED)
        ids, targets, valid = (x.reshape(len(examples), -1) for x in (ids, targets, valid))
        return Batch(tuple(e.id for e in examples), ids, targets, valid, sequences=self.draws)

    def batch_kind(self, example: Example) -> int:
        """See `Task`; all examples share batches, whose sequences are draws of masks."""
        return 0

    def _mask(self, example: Example, draw: int) -> Int[np.ndarray, " tokens"]:
        eligible = example.loss_mask
        if not example.lengths:
            uniform = np.random.Generator(philox(f"wherefrom mask {draw} {example.token_ids.tolist()}")).random(len(eligible))
            eligible = eligible & ((uniform < self.probability) | (uniform == uniform[eligible].min()))
        return eligible.astype(np.int64)

    def loss(self, model: nn.Module, batch: Batch, sample_seed: int | None = None) -> Float[Tensor, " batch"]:
        """See `Task`."""
        self.check_tokens(model, batch, batch.inputs)
        logits = self.logits(model, {}, batch)
        return cross_entropies(logits, batch, None if sample_seed is None else draw_uniform(batch, sample_seed)) / self.draws

    def logits(self, model: nn.Module, weights: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, "batch targets classes"]:
        """See `Task`."""
        ids, valid, targets = map(batch.stacked, (batch.inputs, batch.valid, batch.targets))
        ids = ids.masked_fill(targets != IGNORED, model.config.mask_token_id)  # type: ignore[union-attr, arg-type]
        arguments = {"input_ids": ids, "attention_mask": valid.long()}
        logits: Tensor = functional_call(model, dict(weights), kwargs=arguments, tie_weights=False).logits
        return logits.reshape(len(batch.ids), -1, logits.shape[-1])

    def probe(self, model: nn.Module, device: torch.device) -> Batch:
        """See `Task`."""
        ids = torch.tensor(_PROBE, device=device).repeat_interleave(self.draws, 0).view(2, -1)
        targets = torch.full_like(ids, IGNORED)
        targets[:, 1 :: len(_PROBE[0])] = 1
        return Batch(("probe", "probe"), ids, targets, torch.ones_like(ids, dtype=torch.bool), sequences=self.draws)

    @torch.no_grad()
    def sparse_head(self, model: nn.Module) -> VocabularyLayer | None:
        """See `Task`."""
        probe = self.probe(model, next(model.parameters()).device)
        return vocabulary_head(model, lambda: self.logits(model, {}, probe))

    def sparse_embeddings(self, model: nn.Module) -> None:
        """None: the tokens that a masked model reads are not those of the example."""


class _PromptConverter(WholeTextConverter):
    """Conversion of prompts, which an encoder reads, with completions, which a decoder predicts."""

    def _sides(self, document: Document) -> Sequence[Document]:
        if document.completion is None:
            raise DataError("there is no completion; an encoder-decoder's example is a prompt with a completion")
        return tuple(replace(document, completion=None, prompt="", text=text) for text in (document.prompt, document.completion))

    def _shown(self, rendered: Sequence[Rendered]) -> str:
        return f"{rendered[0].text}\n\n{rendered[1].text}"


class Seq2SeqLM(TextTask):
    """An encoder-decoder: the summed cross-entropy of the completion's tokens, special tokens included, given the prompt."""

    form: Form = "completion"
    features = frozenset({"sequences"})
    auto_class = "AutoModelForSeq2SeqLM"
    within_blocks = True

    def converter(
        self, source: models.ModelSource, max_tokens: int | None = None, long: Any = "split", append_eos: bool = True
    ) -> WholeTextConverter:
        """See `Task`."""
        return _PromptConverter(models.load_tokenizer(source), max_tokens or 1 << 30)

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """See `Task`. Both sides are padded to different lengths, so that a layer's number of tokens tells encoder from decoder."""
        read, predicted = ([e.sequences()[side][0] for e in examples] for side in (0, 1))
        targets, valid = padded(predicted, device, IGNORED)
        ids, read_valid = padded(read, device)
        if ids.shape[1] == targets.shape[1]:
            ids, read_valid = (nn.functional.pad(x, (0, 1)) for x in (ids, read_valid))
        return Batch(tuple(e.id for e in examples), {"ids": ids, "valid": read_valid}, targets, valid, other_valid=(read_valid,))

    def loss(self, model: nn.Module, batch: Batch, sample_seed: int | None = None) -> Float[Tensor, " batch"]:
        """See `Task`."""
        self.check_tokens(model, batch, batch.inputs["ids"])
        self.check_tokens(model, batch, batch.targets)
        logits = self.logits(model, {}, batch)
        return cross_entropies(logits, batch, None if sample_seed is None else draw_uniform(batch, sample_seed))

    def logits(self, model: nn.Module, weights: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, "batch targets classes"]:
        """See `Task`."""
        read = batch.inputs["ids"], batch.inputs["valid"]
        arguments = {
            "input_ids": fill_padding(model, *read),
            "attention_mask": read[1].long(),
            "decoder_input_ids": self._shifted(model, batch),
            **models.without_cache(model),
        }
        logits: Tensor = functional_call(model, dict(weights), kwargs=arguments, tie_weights=False).logits
        return logits

    def _shifted(self, model: Any, batch: Batch) -> Int[Tensor, "batch tokens"]:
        """Return the decoder's inputs: its start token, then the targets but the last."""
        start = model.config.decoder_start_token_id
        if start is None:
            raise IncompatibleError("the model's configuration has no decoder_start_token_id; set it as in training")
        filled = batch.targets.masked_fill(batch.targets == IGNORED, model.config.pad_token_id or 0)
        return torch.cat([torch.full_like(filled[:, :1], start), filled[:, :-1]], dim=1)

    def probe(self, model: nn.Module, device: torch.device) -> Batch:
        """See `Task`."""
        ids, targets = torch.tensor(_PROBE, device=device), torch.tensor(_PROBE, device=device)[:, :2]
        valid = torch.ones_like(ids, dtype=torch.bool)
        return Batch(("probe", "probe"), {"ids": ids, "valid": valid}, targets, valid[:, :2], other_valid=(valid,))

    @torch.no_grad()
    def sparse_head(self, model: nn.Module) -> VocabularyLayer | None:
        """See `Task`."""
        probe = self.probe(model, next(model.parameters()).device)
        return vocabulary_head(model, lambda: self.logits(model, {}, probe))

    def sparse_embeddings(self, model: nn.Module) -> None:
        """None: encoder and decoder read other tokens through one layer."""
