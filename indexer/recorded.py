"""The encoder that an index records: its task, models and tokenizer, opened and compared with the index's fingerprints."""

from collections.abc import Sequence
from functools import cached_property

from torch import nn

from ..store.errors import IncompatibleError, UsageError
from ..store.index import Index
from .encoder import Encoder, EncoderSettings
from .examples import DocumentConverter
from .models import IN_MEMORY, LoadedModel, ModelSource, model_fingerprint, set_trained
from .tasks import Task, find_task, load_model
from .tensor_parallel import is_lost

_QUERY_BATCH_TOKENS = 2048


class RecordedEncoder:
    """The encoder of an index, loaded when first needed.

    Args:
        index: the index.
        models: directories or hub ids of its models, in order, or loaded ones, if they are not where the index was built from.
        device: "auto", "cpu", "cuda", "cuda:1", "map" or "tp".
        trust_remote_code: run code that comes with a model.
        task: for an index of a custom task, the task's name again, since an index does not name code to run.

    Raises:
        UsageError: another number of models than the index has, or a custom task that is not named.
    """

    def __init__(
        self,
        index: Index,
        models: Sequence[str | LoadedModel] = (),
        device: str = "auto",
        trust_remote_code: bool = False,
        task: str | None = None,
    ) -> None:
        self.index = index
        self._options = device, trust_remote_code
        self._models = models
        self._task_name = task

    @cached_property
    def task(self) -> Task:
        """The task that the index was built for."""
        name = self.index.manifest.task
        if ":" in name and self._task_name != name:
            raise UsageError(f"{self.index.path} was built with the task {name}, whose code runs only when you name it: `task` {name}")
        return find_task(name)

    @cached_property
    def sources(self) -> tuple[ModelSource, ...]:
        """The sources that the models are loaded from."""
        records = self.index.manifest.models
        if not self._models and any(model.id.startswith(IN_MEMORY) for model in records):
            raise UsageError(f"{self.index.path} was built from a model in memory; give `model` (of texts, `tokenizer` too), or ask by row")
        if not self._models:
            return tuple(ModelSource(model.id, model.revision, model.dtype, *self._options, model.base) for model in records)
        if len(self._models) != len(records):
            raise UsageError(
                f"{self.index.path} was built with {len(records)} models, `model` names {len(self._models)}; name all in order"
            )
        return tuple(ModelSource.of(model, record.dtype, *self._options) for model, record in zip(self._models, records, strict=True))

    @cached_property
    def context(self) -> int | None:
        """The shortest context of the models, in tokens; None where they have no limit."""
        return min((model.context for model in self.index.manifest.models if model.context), default=None)

    @cached_property
    def converter(self) -> DocumentConverter:
        """The converter of documents and queries to examples, with the tokenizer.

        Raises:
            IncompatibleError: the tokenizer is not the one that the index was built with.
        """
        options = self.index.manifest.build.inputs.options
        converter = self.task.converter(self.sources[0], options.max_tokens or self.context, options.long, options.append_eos)
        self.check_converter(converter)
        return converter

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The models, frozen. Split ones whose processes have ended are loaded again.

        Raises:
            IncompatibleError: a model is not the one that the index was built with.
        """
        self._drop_lost()
        return self._loaded

    def _drop_lost(self) -> None:
        """Forget models that are split over processes which have ended, so that they are loaded again."""
        if any(map(is_lost, self.__dict__.get("_loaded", ()))):
            del self._loaded
            self.__dict__.pop("_encoder", None)

    @cached_property
    def _loaded(self) -> tuple[nn.Module, ...]:
        models = tuple(load_model(self.task, source) for source in self.sources)
        self.check_models([model_fingerprint(model) for model in models])
        for model, record in zip(models, self.index.manifest.models, strict=True):
            if record.trained is not None:
                set_trained(model, frozenset(record.trained))
        return models

    @property
    def encoder(self) -> Encoder:
        """The encoder that computed the rows of the index; of the same models as long as these are not lost (see `models`)."""
        self._drop_lost()
        return self._encoder

    @cached_property
    def _encoder(self) -> Encoder:
        has_hidden = self.index.hidden(self.index.shards[0]) is not None
        settings = EncoderSettings(self.index.manifest.components, _QUERY_BATCH_TOKENS, has_hidden)
        return Encoder(self.task, self.models, settings, self.index.arrays)

    def check_models(self, fingerprints: Sequence[str]) -> None:
        """Compare the fingerprints of models with those that the index records.

        Raises:
            IncompatibleError: names the first model that differs.
        """
        for source, record, fingerprint in zip(self.sources, self.index.manifest.models, fingerprints, strict=True):
            if fingerprint != record.fingerprint:
                raise IncompatibleError(
                    f"the weights at {source.id} are not those that {self.index.path} was built with (another model, or trained "
                    "since); point `model` at the original, or build the index again"
                )

    def check_converter(self, converter: DocumentConverter) -> None:
        """Compare the fingerprint of a tokenizer with the one that the index records.

        Raises:
            IncompatibleError: they differ.
        """
        record = self.index.manifest.tokenizer
        if converter.fingerprint != (record.fingerprint if record else None):
            raise IncompatibleError(
                f"the tokenizer of {self.sources[0].id} is not the one that {self.index.path} was built with; "
                "point `model` at the original, or build the index again"
            )

    def moved_to(self, index: Index) -> "RecordedEncoder":
        """The encoder of a newer state of the index, with the loaded models where both states have the same encoder."""
        newer = RecordedEncoder(index, self._models, *self._options, self._task_name)
        if (index.manifest.encoder, index.manifest.models) == (self.index.manifest.encoder, self.index.manifest.models):
            loaded = {"task", "sources", "converter", "_loaded"} & self.__dict__.keys()
            newer.__dict__.update({name: self.__dict__[name] for name in loaded})
        return newer
