"""Tasks: the model's loss and measurement, the two functions whose gradients are indexed and compared.

The gradients of a task's *loss*, which training lowered, are the rows; those of its *measurement*, which a query explains, are the
queries. Both fall as the model improves (nats), so a positive score means that training on the example lowered the query's measurement.
They are the same unless a task overrides the measurement. A task also loads the model and collates examples to a batch; capture,
projection and curvature depend on nothing else of it. Wherefrom has a causal language model and a perceptron; any other nn.Module needs a
subclass of `Task`, `ArrayTask` or `VectorTask`, named as `module:Class`.

A text batch is right-padded and carries no attention mask: in a causal model nothing to the left can see the padding, and positions count
from the left, so that padding cannot change a row. The last token is only predicted, so it is not in the input.
"""

import importlib
import inspect
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from ..store.documents import Example
from ..store.errors import DataError, IncompatibleError, NotFoundError, UsageError
from ..store.fields import Form
from ..store.shapes import Float, Int
from . import models
from .batches import IGNORED, Batch, batches_by_length
from .budget import LARGE
from .capture import Window
from .examples import DocumentConverter, TextConverter, VectorConverter
from .experts import is_fused, unfuse
from .logits import Accept, Head, cross_entropies, draw_uniform

_PADDED = 16
_LEAST_ERROR = 1e-6  # of 1 - p, in a margin
_SPLITS: "WeakKeyDictionary[nn.Module, dict[int, bool]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Objective:
    """The function of an example that is differentiated: its loss, unless told otherwise.

    Attributes:
        query: the task's measurement instead of its loss.
        label_seed: the loss with labels that are drawn from the model's distribution (see `Task.loss`).
        margin: the loss over 1 - p, with the probability p = exp(-loss / number of predicted tokens); its gradient is that of minus
            log(p / (1 - p)) times the number of tokens.
        label: the loss for that class, times the square root of the class's probability under the model: squares of gradients, summed over
            all classes, are then their expectation under the model.
        undivided: all logits are computed at once, since a visitor needs all their gradients.
    """

    query: bool = False
    label_seed: int | None = None
    label: int | None = None
    margin: bool = False
    undivided: bool = False


LOSS = Objective()
MEASUREMENT = Objective(query=True)


class VocabularyLayer(NamedTuple):
    """A layer with a vector for each token of the vocabulary: the output head or the input embeddings.

    Attributes:
        name: of the module.
        vocabulary, width: of its weight.
        postprocessed: the logits differ from the head's output (a soft-cap, a scale).
    """

    name: str
    vocabulary: int
    width: int
    postprocessed: bool = False


class Task(ABC):
    """Interface of a task.

    Attributes:
        form: the form of its documents; "auto" accepts text, prompt and completion, or chat messages.
        within_blocks: track only layers inside the model's blocks (its outermost ModuleLists) by default.
        batch_tokens: padded tokens in a batch by default, by kind of device; see `default_batch_tokens`.
        features: names of what a reader of the index must know of its examples (see `FEATURES` in store/manifest.py).
        auto_class: the class of transformers that loads the model; see `load`.
        mode: in which answers are ranked where a query does not say. Classifiers are trained until most losses are near zero, and the few
            examples that are not fitted have gradients so large that they lead every ranking by influence; so theirs is loss-normalized.
        has_token_shares: every tracked layer sees the example's tokens, and one sequence, so that scores can be split by token.
    """

    form: Form
    within_blocks: bool = False
    batch_tokens: dict[str, int]
    features: frozenset[str] = frozenset()
    auto_class: str = ""
    mode: Literal["influence", "loss-normalized"] = "influence"
    has_token_shares: bool = False

    def default_batch_tokens(self, models: Sequence[nn.Module]) -> int:
        """Padded tokens in a batch by default; on a CPU half for `LARGE` models, for which they are as fast and take less memory."""
        device = next(models[0].parameters()).device.type
        tokens = self.batch_tokens.get(device, self.batch_tokens["cpu"])
        is_large = max(sum(p.numel() for p in model.parameters()) for model in models) >= LARGE
        return tokens // 2 if device == "cpu" and is_large else tokens

    def load(self, source: models.ModelSource) -> nn.Module:
        """Load the model, in evaluation mode, in its dtype and on its device; the caller freezes it. By default, `auto_class` loads it.

        Raises:
            UsageError: the task does not say how, so that its model must be in memory.
        """
        if not self.auto_class:
            raise UsageError(f"the task {type(self).__name__} loads no model; give it a model in memory, or set auto_class")
        return models.load_pretrained(source, self.auto_class)

    def attach(self, model: nn.Module, source: models.ModelSource) -> None:  # noqa: B027
        """Attach to a loaded model what the task needs beside it, such as a reference model; nothing by default."""

    @abstractmethod
    def converter(
        self, source: models.ModelSource, max_tokens: int | None = None, long: Any = "split", append_eos: bool = True
    ) -> DocumentConverter:
        """Return the converter of documents to examples.

        Args:
            max_tokens: the longest example.
            long: treatment of a longer document, "split" or "truncate".
            append_eos: append the end-of-text token.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """Combine examples to a batch."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, sample_seed: int | None = None) -> Float[Tensor, " batch"]:
        """Each example's training loss (nats).

        Args:
            sample_seed: draw targets from the model's distribution (the true Fisher's labels) instead of the data's; the draw depends on
                the seed and the example's id, not on the batch.
        """

    def measurement(self, model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """Each query's measurement (nats), lower when the model is better; the training loss by default."""
        return self.loss(model, batch)

    def logits(self, model: nn.Module, weights: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, "batch targets classes"]:
        """The logits of which the loss is the cross-entropy with `batch.targets`, under other weights of some parameters.

        Head and embeddings that are one weight are two here: each has its own name in `weights`.

        Raises:
            UsageError: the task has none.
        """
        raise UsageError(f"the task {type(self).__name__} does not say which logits its loss is of; leave `refine` out")

    def value(self, model: nn.Module, batch: Batch, objective: Objective) -> Float[Tensor, " batch"]:
        """Each example's objective (nats)."""
        if objective.query:
            return self.measurement(model, batch)
        if objective.label is not None:
            losses = self.loss(model, replace(batch, targets=torch.full_like(batch.targets, objective.label)))
            return losses * torch.exp(-losses.detach() / 2)
        if objective.margin:
            losses = self.loss(model, batch)
            means = losses.detach() / (batch.targets != IGNORED).sum(1).to(losses.device).clamp(min=1)
            return losses / (-torch.expm1(-means)).clamp(min=_LEAST_ERROR)
        return self.loss(model, batch) if objective.label_seed is None else self.loss(model, batch, objective.label_seed)

    @property
    def draws_labels(self) -> bool:
        """True if the loss can draw labels from the model's distribution."""
        return "sample_seed" in inspect.signature(self.loss).parameters

    def prepare(self, model: nn.Module) -> None:  # noqa: B027
        """Find out what `differentiate` needs to know of a model; called before a capture is opened."""

    def differentiate(self, model: nn.Module, objective: Objective, window: Window, accept: Accept) -> Float[Tensor, " batch"]:
        """Run the objective of a batch forward and backward, under an open capture; returns its values (nats), detached.

        Args:
            window: of the capture.
            accept: is called with the values before they are differentiated.
        """
        values = self.value(model, window.batch, objective)
        accept(values.detach()[:, None])
        values.sum().backward()
        return values.detach()

    @abstractmethod
    def probe(self, model: nn.Module, device: torch.device) -> Batch:
        """Two small examples that show the layers' calls; if they have several tokens, all but the last are equal in both."""

    def check(self, model: nn.Module) -> None:  # noqa: B027
        """Raise an IncompatibleError if the model does not fit the task; any does by default."""

    def group(self, models: Sequence[nn.Module], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
        """Group examples by length (tokens) into batches of indices; see `batches_by_length`."""
        splits = {split for model in models for split in self.splits(model, max(lengths, default=0))}
        return batches_by_length(lengths, token_budget, sorted(splits))

    def batches(self, models: Sequence[nn.Module], examples: Sequence[Example], token_budget: int) -> Iterator[tuple[list[int], Batch]]:
        """Yield batches of examples of similar length, with the positions of the examples, on the last model's device; see `group`."""
        device = next(models[-1].parameters()).device
        by_kind: dict[int, list[int]] = {}
        for position, example in enumerate(examples):
            by_kind.setdefault(self.batch_kind(example), []).append(position)
        for kind in sorted(by_kind):
            of_kind = by_kind[kind]
            for group in self.group(models, [examples[i].tokens for i in of_kind], token_budget):
                positions = [of_kind[i] for i in group]
                yield positions, self.collate([examples[i] for i in positions], device)

    def batch_kind(self, example: Example) -> int:
        """Return a number; only examples with the same one share a batch. By default, that of the example's sequences."""
        return len(example.lengths)

    def splits(self, model: nn.Module, longest: int) -> Sequence[int]:
        """Lengths (tokens) at and below which the model computes differently, as in `batches_by_length`."""
        return ()

    def context(self, model: nn.Module) -> int | None:
        """The longest input, in tokens; None if unbounded."""
        return None

    def vocabulary(self, model: nn.Module) -> int | None:
        """Number of tokens that the model embeds; None if its inputs are not tokens."""
        return None

    def classes(self, model: nn.Module) -> int | None:
        """Number of classes of a model with one label per example; None for texts, which predict many tokens."""
        return None

    def watch_hidden(self, model: nn.Module, watch: Callable[[Tensor], None]) -> RemovableHandle:
        """Call a function with the model's last hidden states, the inputs of its last layer, in every forward pass until it is removed."""
        last = [m for m in model.modules() if models.layer_sizes(m)][-1]
        return last.register_forward_pre_hook(lambda module, args: watch(args[0]))

    def sparse_head(self, model: nn.Module) -> VocabularyLayer | None:
        """An output head with sparse rows; None if the model has none."""
        return None

    def sparse_embeddings(self, model: nn.Module) -> VocabularyLayer | None:
        """The embeddings of the batch's inputs; None if these are not tokens."""
        return None


class TextTask(Task):
    """A `transformers` model of texts. The inputs of a batch are token ids [examples, tokens], those of several sequences side by side."""

    form: Form = "auto"
    batch_tokens = {"cpu": 512, "cuda": 16384}  # noqa: RUF012

    def context(self, model: nn.Module) -> int | None:
        """See `Task`."""
        return models.context_length(model)

    def vocabulary(self, model: nn.Module) -> int:
        """See `Task`."""
        return models.vocabulary_size(model)

    def check_tokens(self, model: nn.Module, batch: Batch, tokens: Int[Tensor, "batch tokens"]) -> None:
        """Refuse a batch with a token that the model does not embed.

        Raises:
            DataError: names the example.
        """
        vocabulary = models.vocabulary_size(model)
        largest = tokens.amax(1)
        if int(largest.max()) >= vocabulary:
            id = batch.ids[int(largest.argmax())]
            raise DataError(
                f"example {id!r} has token {int(largest.max())}, the model embeds only {vocabulary}; tokenizer and model do not fit"
            )

    def sparse_embeddings(self, model: nn.Module) -> VocabularyLayer | None:
        """See `Task`."""
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        names = [name for name, module in model.named_modules() if module is embeddings]
        if not names or not isinstance(embeddings, nn.Embedding):
            return None
        return VocabularyLayer(names[0], embeddings.num_embeddings, embeddings.embedding_dim)


class CausalLM(TextTask):
    """A `transformers` causal language model; loss and measurement are the *sum* over loss tokens of the cross-entropy."""

    auto_class = "AutoModelForCausalLM"
    within_blocks = True
    has_token_shares = True

    def converter(
        self, source: models.ModelSource, max_tokens: int | None = None, long: Any = "split", append_eos: bool = True
    ) -> TextConverter:
        """See `Task`."""
        return TextConverter(models.load_tokenizer(source), max_tokens or 1 << 30, long, append_eos)

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """Combine examples to a batch, without their last tokens as inputs."""
        longest = max(e.tokens for e in examples)
        inputs = np.zeros((len(examples), longest), np.int64)
        targets = np.full((len(examples), longest), IGNORED, np.int64)
        valid = np.zeros((len(examples), longest), bool)
        for i, example in enumerate(examples):
            inputs[i, : example.tokens] = example.token_ids[:-1]
            targets[i, : example.tokens] = np.where(example.loss_mask[1:], example.token_ids[1:], IGNORED)
            valid[i, : example.tokens] = True
        tensors = [torch.from_numpy(a).to(device) for a in (inputs, targets, valid)]
        return Batch(tuple(e.id for e in examples), tensors[0], tensors[1], tensors[2])

    def loss(self, model: nn.Module, batch: Batch, sample_seed: int | None = None) -> Float[Tensor, " batch"]:
        """See `Task`."""
        self.check_tokens(model, batch, torch.maximum(batch.inputs, batch.targets))
        head = None if torch.is_grad_enabled() else Head.of(model, self.text_probe)
        if head is not None:  # in pieces, as nothing is differentiated
            return head.differentiate(model, Window(batch, lambda *call: None), sample_seed, lambda values: None)
        uniform = None if sample_seed is None else draw_uniform(batch, sample_seed)
        return cross_entropies(models.logits_of(model, batch.inputs), batch, uniform)

    def logits(self, model: nn.Module, weights: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, "batch tokens vocabulary"]:
        """See `Task`."""
        arguments = {"input_ids": batch.inputs, **models.without_cache(model)}
        logits: Tensor = functional_call(model, dict(weights), kwargs=arguments, tie_weights=False).logits
        return logits

    def prepare(self, model: nn.Module) -> None:
        """See `Task`."""
        Head.of(model, self.text_probe)

    def differentiate(self, model: nn.Module, objective: Objective, window: Window, accept: Accept) -> Float[Tensor, " batch"]:
        """See `Task`; the logits are computed in pieces (see logits.py), unless a subclass has another loss or measurement."""
        head = None
        overridden = type(self).loss is not CausalLM.loss or type(self).measurement is not Task.measurement
        if not overridden and not objective.undivided and objective.label is None and not objective.margin:
            head = Head.of(model, self.text_probe)
        if head is None:
            return super().differentiate(model, objective, window, accept)
        self.check_tokens(model, window.batch, torch.maximum(window.batch.inputs, window.batch.targets))
        values = head.differentiate(model, window, objective.label_seed, accept)
        accept(values[:, None])
        return values

    def probe(self, model: nn.Module, device: torch.device) -> Batch:
        """See `Task`."""
        return self.text_probe(model, device)

    def text_probe(self, model: nn.Module, device: torch.device) -> Batch:
        """Return two short texts that differ in their last tokens."""
        texts = torch.tensor([[0, 1, 2], [0, 1, 3]]).to(device)
        return Batch(("probe", "probe"), texts, texts, torch.ones_like(texts, dtype=torch.bool))

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Check that the prediction for a token does not depend on the tokens after it.

        Raises:
            IncompatibleError: it does.
        """
        probe = self.text_probe(model, next(model.parameters()).device)
        first, second = models.logits_of(model, probe.inputs)[:, :2].float()
        if models.differ(first, second, next(model.parameters()).dtype):
            raise IncompatibleError(
                f"{type(model).__name__} is not causal in this configuration: a token's prediction depends on the tokens after it; give a "
                "causal language model"
            )

    def splits(self, model: nn.Module, longest: int) -> Sequence[int]:
        """See `Task`; runs a short text alone and padded, to a few tokens and to the lengths where the configuration changes positions."""
        results = _SPLITS.setdefault(model, {})
        switches = models.rotary_switches(model)
        splits: list[int] = []
        for padded, split in ((min((_PADDED, *switches)), 0), *((length + 1, length) for length in switches)):
            if split < longest and padded <= (self.context(model) or padded):
                if padded not in results:
                    results[padded] = _depends_on_padding(model, padded, at_switch=split > 0)
                splits += [split] if results[padded] else []
        return range(1, longest) if 0 in splits else splits

    def watch_hidden(self, model: nn.Module, watch: Callable[[Tensor], None]) -> RemovableHandle:
        """See `Task`."""
        if Head.of(model, self.text_probe) is None:
            head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
            return head.register_forward_pre_hook(lambda module, args: watch(args[0]))
        body: nn.Module = model.base_model  # type: ignore[assignment]
        return body.register_forward_hook(lambda module, args, output: watch(output[0]))

    @torch.no_grad()
    def sparse_head(self, model: nn.Module) -> VocabularyLayer | None:
        """See `Task`."""
        probe = self.text_probe(model, next(model.parameters()).device)
        return vocabulary_head(model, lambda: models.logits_of(model, probe.inputs))


def vocabulary_head(model: nn.Module, run: Callable[[], Tensor]) -> VocabularyLayer | None:
    """Describe the output head of a model; None if it has none that is a linear layer.

    Args:
        run: computes logits of a batch.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    sizes = models.layer_sizes(head) if head is not None else None
    names = [name for name, module in model.named_modules() if module is head]
    if sizes is None or not names:
        return None
    outputs: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    try:
        logits = run()
    finally:
        handle.remove()
    postprocessed = len(outputs) != 1 or not torch.equal(outputs[0].reshape(logits.shape).to(logits.device), logits)
    return VocabularyLayer(names[0], *sizes, postprocessed)


def label_loss(logits: Float[Tensor, "batch one classes"], batch: Batch, sample_seed: int | None) -> Float[Tensor, " batch"]:
    """The cross-entropy of each example's label, or of one that is drawn from the model (see `Task.loss`), in nats.

    Raises:
        DataError: a label is not a class of the model; names the first example with one.
    """
    classes = logits.shape[-1]
    wrong = (batch.targets[:, 0] < 0) | (batch.targets[:, 0] >= classes)
    if bool(wrong.any()):
        index = int(wrong.int().argmax())
        raise DataError(f"example {batch.ids[index]!r} has the label {int(batch.targets[index])}, the model knows 0 to {classes - 1}")
    return cross_entropies(logits, batch, None if sample_seed is None else draw_uniform(batch, sample_seed))


@dataclass(frozen=True)
class ArrayTask(Task):
    """A task over arrays of numbers, the `features` of the documents. A subclass has the loss, and may have a measurement.

    The model is in memory, or a subclass loads it. A loss without the argument `sample_seed` draws no labels.

    Attributes:
        shape: in which the model takes an array, such as "3x32x32"; by default as it is.
    """

    shape: str = ""

    form = "vector"
    features = frozenset({"vectors"})
    batch_tokens = {"cpu": 256, "cuda": 4096}  # noqa: RUF012
    needs_label = False
    """True if every document has a `label`; it is the example's target."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\d+(x\d+)*)?", self.shape):
            raise ValueError("shape is numbers with x between, such as 3x32x32")

    def converter(
        self, source: models.ModelSource, max_tokens: int | None = None, long: Any = "split", append_eos: bool = True
    ) -> VectorConverter:
        """See `Task`."""
        return VectorConverter(self.needs_label)

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """Stack arrays, in float32."""
        sizes = {len(e.features) for e in examples if e.features is not None}
        if len(sizes) != 1:
            raise DataError(
                f"examples of one batch have vectors of {' and '.join(map(str, sorted(sizes))) or 'no'} numbers; make them equally long"
            )
        inputs = torch.from_numpy(np.stack([e.features for e in examples if e.features is not None])).to(device)
        targets = torch.tensor([[e.label or 0] for e in examples], device=device)
        return Batch(tuple(e.id for e in examples), inputs, targets, torch.ones_like(targets, dtype=torch.bool))

    def inputs(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch ..."]:
        """Return the arrays of a batch in the model's dtype, and in `shape`."""
        vectors = batch.inputs.to(next(model.parameters()).dtype)
        sizes = [int(size) for size in self.shape.split("x") if size]
        if sizes and vectors.shape[1] != math.prod(sizes):
            raise DataError(f"examples have vectors of {vectors.shape[1]} numbers, and the shape {self.shape} takes {math.prod(sizes)}")
        return vectors.reshape(len(vectors), *sizes) if sizes else vectors

    def probe(self, model: nn.Module, device: torch.device) -> Batch:
        """Two arrays of `shape`, else of the first layer's input size.

        Raises:
            UsageError: there is no shape, and the first layer is not an nn.Linear.
        """
        first = next((m for m in model.modules() if models.layer_sizes(m)), None)
        if not self.shape and not isinstance(first, nn.Linear):
            raise UsageError(
                "the model's first layer does not say how long its inputs are; give their shape, as in task vectors(shape=3x32x32), or "
                f"override {type(self).__name__}.probe (docs/tasks.md)"
            )
        size = math.prod(map(int, self.shape.split("x"))) if self.shape else int(first.in_features)  # type: ignore[union-attr, arg-type]
        vectors = torch.linspace(0, 1, 2 * size, device=device).reshape(2, size)
        targets = torch.zeros((2, 1), dtype=torch.int64, device=device)
        return Batch(("probe", "probe"), vectors, targets, torch.ones_like(targets, dtype=torch.bool))


@dataclass(frozen=True)
class VectorTask(ArrayTask):
    """A classifier of vectors: documents have `features` and a `label`, the loss is the label's cross-entropy, in nats."""

    mode = "loss-normalized"
    needs_label = True

    def loss(self, model: nn.Module, batch: Batch, sample_seed: int | None = None) -> Float[Tensor, " batch"]:
        """See `Task`."""
        try:
            logits = self.logits(model, {}, batch)
        except RuntimeError as error:
            raise DataError(f"the model does not take vectors of {batch.inputs.shape[1]} numbers: {str(error).splitlines()[0]}") from error
        return label_loss(logits, batch, sample_seed)

    def logits(self, model: nn.Module, weights: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, "batch one classes"]:
        """See `Task`."""
        logits: Tensor = functional_call(model, dict(weights), (self.inputs(model, batch),))
        return logits[:, None]

    @torch.no_grad()
    def classes(self, model: nn.Module) -> int:
        """See `Task`."""
        weight = next(model.parameters())
        return int(self.logits(model, {}, self.probe(model, weight.device)).shape[-1])


@dataclass(frozen=True)
class MLP(VectorTask):
    """A perceptron with ReLU between its layers, from a safetensors file with the parameter names of a `torch.nn.Sequential`."""

    def load(self, source: models.ModelSource) -> nn.Module:
        """See `Task`."""
        return models.load_mlp(source)


@torch.no_grad()
def _depends_on_padding(model: nn.Module, padded: int, at_switch: bool) -> bool:
    """True if a short text's predictions change when it is padded to a length (tokens).

    Round-off changes them, too, since products of other shapes are summed in another order. How much, five copies of the text in one batch
    show, which have no padding: a change counts from four times theirs. In bfloat16, attention's round-off depends on the length alone;
    through 30 layers it is 2 % of the largest logit, and a change counts from 5 %. At a switch of positions, which may change little and
    whose cost is small, round-off counts as well.
    """
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    short = torch.tensor([[0, 1, 2]])[:, : padded - 1].to(device)
    long = F.pad(short, (0, padded - short.shape[1]))
    texts = short, long, short.expand(5, -1)
    first, second, copy = (models.logits_of(model, ids)[:1, : short.shape[1]].float() for ids in texts)
    if at_switch:
        return models.differ(first, second, dtype)
    least = (5e-2 if dtype == torch.bfloat16 else 1e-5) * first.abs().max()
    return bool((first - second).abs().max() > torch.maximum(least, 4 * (first - copy).abs().max()))


_TASKS = {
    "causal-lm": "tasks:CausalLM",
    "classification": "text_tasks:Classification",
    "reward": "pair_tasks:Reward",
    "dpo": "pair_tasks:DPO",
    "masked-lm": "text_tasks:MaskedLM",
    "seq2seq": "text_tasks:Seq2SeqLM",
    "embedding": "pair_tasks:Embedding",
    "image-classification": "image_tasks:ImageClassification",
    "diffusion": "diffusion:Diffusion",
    "vectors": "tasks:VectorTask",
    "mlp": "tasks:MLP",
}
"""Modules of this package, and their classes, by the name of the task."""

_NAME = re.compile(r"(?P<name>[^(]+)(\((?P<options>[^()]*)\))?")


def find_task(name: str) -> Task:
    """Create a task by its name, such as "causal-lm", or `module:Class` for a custom one, whose module is imported (its code runs).

    The fields of a task that is a dataclass may follow in parentheses: "dpo(beta=0.2)".

    Raises:
        UsageError, NotFoundError: there is no such task, or it has no such field.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(f"the task {name!r} is not of the form name, or name(option=value, ...)")
    if match["name"] in _TASKS:
        module, _, attribute = _TASKS[match["name"]].partition(":")
        cls = getattr(importlib.import_module(f".{module}", __package__), attribute)
    else:
        cls = import_object(match["name"], "task")
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise UsageError(f"{name} is not a subclass of wherefrom.Task")
    options = _task_options(name, cls, match["options"] or "")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:  # abstract, with arguments, or out of range
        raise UsageError(f"the task {name} cannot be created: {error}") from error


def with_whole_paths(name: str) -> str:
    """Return a task's name with the directories among its options as absolute paths, so that the index finds them from anywhere."""
    match = _NAME.fullmatch(name)
    if match is None or not match["options"]:
        return name
    parts = [part.strip().partition("=") for part in match["options"].split(",")]
    texts = (f"{key}={os.path.abspath(value.strip()) if os.path.isdir(value.strip()) else value}" for key, _, value in parts)
    return f"{match['name']}({', '.join(texts)})"


def _task_options(name: str, cls: type[Task], text: str) -> dict[str, Any]:
    """Read the fields of a task from text."""
    options: dict[str, Any] = {}
    known: dict[str, Any] = {field.name: field for field in fields(cls)} if is_dataclass(cls) else {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (item.strip() for item in part.partition("="))
        if key not in known or not equals:
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise UsageError(f"the task {name} has no option {part!r}; {has}")
        kind = type(known[key].default)
        try:
            options[key] = value if kind not in (int, float) else kind(value)
        except ValueError as error:
            raise UsageError(f"the option {key} of the task {name} is {value!r}, not a number") from error
    return options


def load_model(task: Task, source: models.ModelSource) -> nn.Module:
    """Load a task's model and freeze it; of a model in memory, take a frozen copy that shares its weights."""
    model = models.frozen_copy(source, source.loaded) if source.loaded is not None else task.load(source).requires_grad_(False)
    task.attach(model, source)
    if is_fused(model):
        _unfuse(task, model)
    return model


@torch.no_grad()
def _unfuse(task: Task, model: nn.Module) -> None:
    """Make linear layers of a model's fused experts and routers, if its losses stay the same; see experts.py."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # type: ignore[operator]  # of what stays fused; others do not know all dtypes
    probe = task.probe(model, next(model.parameters()).device)
    before = task.loss(model, probe)
    restore = unfuse(model)
    try:
        is_same = not models.differ(before, task.loss(model, probe), next(model.parameters()).dtype)
    except (RuntimeError, TypeError, AttributeError):  # experts of another form after all
        is_same = False
    if not is_same:
        restore()


def import_object(path: str, kind: str) -> Any:
    """Import `module:attribute` from Python's path, including the working directory.

    Raises:
        UsageError: the path does not have that form.
        NotFoundError: there is no such module or attribute.
    """
    import sys

    module, colon, attribute = path.partition(":")
    if not colon or not module or not attribute:
        raise UsageError(f"the {kind} {path!r} is neither built in nor of the form module:name")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # an import runs arbitrary code
        reason = f"{type(error).__name__}: {error}"
        raise NotFoundError(
            f"the {kind} {path} cannot be imported ({reason}); is its module in this directory, or on PYTHONPATH?"
        ) from error
