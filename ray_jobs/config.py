"""The configuration of a build: one frozen pydantic model, which the Python interface, the command line and TOML files share.

Nothing heavy but pydantic is imported here, since `wherefrom build --help` is generated from the model.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from ..store.errors import IntegrityError, UsageError
from ..store.fields import Fields, Form
from ..store.manifest import CurvatureKind, LabelKind, ModelDtype, OptimizerUse, RowDtype
from ..store.presets import PRESETS, PresetName

_DEFAULT_BYTES = 800
_MAX_THREADS = 1024
# `bytes_per_example` chooses these:
_SIZES = ("head_bits", "head_max_tokens", "head_extra_tokens", "embedding_bits", "embedding_max_tokens", "coordinates", "row_dtype")
# One of these turns off the default budget:
_ROW_OPTIONS = (*_SIZES, "components", "layers", "projection", "rank", "curvature", "labels", "optimizer", "unit_length")
# These may differ on resuming:
_RUNTIME_OPTIONS = ("out", "workers", "threads", "address", "device", "batch_tokens", "trust_remote_code", "group_rows")


def _path(value: Any) -> Any:
    """A path as text; a list of paths or names as a tuple."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return tuple(map(_path, value)) if isinstance(value, list | tuple) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _fields(value: Any) -> Any:
    """`Fields` from a mapping of its names, or from text such as "prompt=question,completion=answer"; naming a column selects its form."""
    if isinstance(value, str):
        pairs = [pair.partition("=") for pair in value.split(",")]
        value = {name.strip(): column.strip() for name, _, column in pairs}
    if not isinstance(value, dict):
        return value
    unknown = sorted(value.keys() - set(Fields.__dataclass_fields__))
    empty = sorted(name for name, column in value.items() if not column)
    if unknown:
        names = ", ".join(list(Fields.__dataclass_fields__)[1:])
        raise UsageError(f"`fields` names columns as {names}, such as prompt=question,completion=answer; there is no {unknown[0]!r}")
    if empty:
        raise UsageError(f"`fields` names no column for {empty[0]}; write it as {empty[0]}=column")
    if "form" in value:  # the dictionary of a `Fields`, from a manifest
        return Fields(**value)
    forms: dict[Form, tuple[str, ...]] = {"text": ("text",), "completion": ("prompt", "completion"), "chat": ("messages",)}
    named: list[Form] = [form for form, names in forms.items() if value.keys() & set(names)]
    if len(named) > 1:
        raise UsageError("`fields` names several forms of document; name text, or prompt with completion, or messages")
    return Fields(form=named[0] if named else "auto", **value)


Names = Annotated[str | tuple[str, ...], BeforeValidator(_path)]
PathText = Annotated[str, BeforeValidator(_path)]
Globs = Annotated[tuple[str, ...], BeforeValidator(_tuple)]
Positive = Annotated[int, Field(ge=1)]
ComponentRole = Literal["blocks", "head", "embeddings"]


class BuildConfig(BaseModel):
    """Options of a build; None means a default that depends on the model, the data or the machine.

    An option's description is its help on the command line; `wherefrom build --help-all` lists all of them. Some defaults are different
    "with a budget": when `bytes_per_example` is given, or no option that says what a row is made of.

    Raises:
        UsageError: an option is unknown, missing, or has a value that it cannot have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

    model: Names
    """Directory or hub id of a causal language model (safetensors), or several: checkpoints of one run in their order, or an ensemble."""
    data: Names
    """JSONL, CSV, Parquet or text file (also .gz, .bz2, .xz, .zst), folder, saved dataset (of one split, folder:split), or hub
    name:split; several are read in order."""
    out: PathText
    """Index directory to make."""
    bytes_per_example: Positive | None = None
    """Storage budget of a row; chooses components and their sizes.  [default: 800, unless an option says what a row is made of]"""
    layers: Globs = ()
    """Globs over layer names of the blocks, such as 'h.[0-3].mlp.*'.  [default: all inside the blocks; with a budget, those with more
    inputs than outputs, but all of an adapter of a model of 50 million parameters or more]"""
    fields: Annotated[Fields, BeforeValidator(_fields)] = Fields()
    """Names of columns, such as prompt=question,completion=answer,id=key; the loss is on a completion alone, on all of a text, on the
    assistant's turns of messages. `split_text=blank-lines` splits text files at blank lines.  [default: the columns text, prompt,
    completion, messages, id, source]"""
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """Longest example in tokens.  [default: the model's context, at most 2048]"""
    workers: Positive = 1
    """Processes, started by Ray; 1 stays in this one."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, or map: a language model too large for one GPU, spread over all of them."""
    dtype: ModelDtype = "float32"
    """The model's precision; on a GPU, products of float32 models are in TF32."""
    task: str = "causal-lm"
    """causal-lm, mlp (vectors with labels), or module:Class of your own."""
    revision: Names | None = None
    """Branch, tag or commit of a hub model; several for several checkpoints of one."""
    base: PathText | None = None
    """Directory or hub id of the model that training started from; layers that are equal in both were not trained. An adapter, a model in
    memory and the record of our Trainer callback say this themselves."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    long: Literal["split", "truncate"] = "split"
    """Longer documents are split into chunks, or truncated."""
    append_eos: bool = True
    """End each document with the end-of-text token."""
    bad_documents: Literal["error", "skip"] = "error"
    """A document that cannot be used is an error, or is skipped and counted."""
    components: Annotated[tuple[ComponentRole, ...], BeforeValidator(_tuple), Field(min_length=1)] | None = None
    """Parts of a row: blocks (dense rows of linear layers), head and embeddings (sparse, keyed by token).  [default: blocks; with a budget,
    those that it affords]"""
    projection: Literal["random", "pca"] | None = None
    """Projection of gradients.  [default: random; with a budget pca]"""
    rank: Positive | None = None
    """Coordinates of a layer's inputs and outputs each.  [default: 16; with a budget 128]"""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of projections, the fitting sample and sampled labels."""
    curvature: CurvatureKind | None = None
    """Whitening of the blocks' rows; auto chooses by a layer's size.  [default: auto; with a budget kfac for models of tokens, which
    takes one pass]"""
    labels: LabelKind | None = None
    """Labels of the curvature: the data's, sampled from the model, or expected (all classes by their probability, where an example has one
    label); margin takes the data's, with the margin log(p / (1 - p)) for the loss.  [default: data for the blocks, sampled for head and
    embeddings; with a budget, expected for blocks of examples with one label, else sampled]"""
    preset: PresetName | None = None
    """A published method's options, for those that are not given: trackstar, less or trak (docs/how-it-works.md); they are printed."""
    optimizer: OptimizerUse | None = None
    """Use of the optimizer's moments beside each checkpoint's weights: second-moments divides gradients by their square roots,
    preconditioner by their fourth roots (Adam's, for a query's `training`); adam-step makes the rows of training examples Adam's steps.
    [default: none]"""
    unit_length: bool = False
    """Divide the blocks' rows, and queries, by their lengths; checkpoints count by their learning rates, where these were recorded."""
    fit_examples: Positive | None = None
    """Examples that projections and curvature are fitted on.  [default: 5000; with a budget and a model of 50 million parameters or more,
    one in 16 of the corpus, with at least 8,192 tokens, where curvature is kfac]"""
    damping: Annotated[float, Field(ge=1e-6, le=1e9)] | None = None
    """Number added to the eigenvalues, relative to their mean; a query can change it.  [default: 0.1 for the blocks, 1 for head and
    embeddings; with a budget 1, but 0.1 for the blocks of an adapter of a model of 50 million parameters or more]"""
    row_dtype: RowDtype | None = None
    """Storage of the blocks' coordinates.  [default: float32]"""
    coordinates: Positive | None = None
    """Stored coordinates of the blocks; fewer than there are, are selected or mixed.  [default: all]"""
    head_bits: Positive | None = None
    """Bits of each token of the head.  [default: 64]"""
    head_max_tokens: Positive | None = None
    """Tokens of the head kept of an example, those of largest norm.  [default: all]"""
    head_extra_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of the head stored beside those that an example predicts: the most probable ones."""
    embedding_bits: Positive | None = None
    """Bits of each token of the embeddings.  [default: 64]"""
    embedding_max_tokens: Positive | None = None
    """Tokens of the embeddings kept of an example, those of largest norm.  [default: all]"""
    hidden: bool = False
    """Keep mean hidden states (2 bytes a coordinate), for the baseline beside answers."""
    shard_rows: Positive | None = None
    """Examples in a shard.  [default: about 16 MiB of rows]"""
    group_rows: Positive | None = None
    """Examples whose posting lists lie together: the smallest piece of an index that a server's parts can share out.  [default: 262144;
    1048576 in an object store, where a list is a request]"""
    batch_tokens: Positive | None = None
    """Padded tokens in a batch.  [default: 512, 256 for models of 50 million parameters or more, on a GPU 16384]"""
    threads: Annotated[int, Field(ge=1, le=_MAX_THREADS)] = 1
    """Threads of each worker."""
    address: str | None = None
    """Address of a Ray cluster.  [default: a local Ray]"""

    def __init__(self, **options: Any) -> None:
        preset = options.get("preset")
        if isinstance(preset, str) and preset in PRESETS:
            options = {**PRESETS[preset].build, **options}
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise UsageError(option_problem(error.errors()[0], type(self))) from error
        self._check()

    def _check(self) -> None:
        """Check options that depend on one another."""
        if self.bytes_per_example is not None:
            sizes = [name for name in _SIZES if getattr(self, name)]
            if sizes:
                raise UsageError(f"`bytes_per_example` chooses `{sizes[0]}`; give one or the other")
        scales = [name for name in ("preset", "optimizer", "unit_length") if getattr(self, name)]
        if scales and (self.bytes_per_example is not None or self.components not in (None, ("blocks",))):
            raise UsageError(f"`{scales[0]}` is for rows of the blocks alone; leave `bytes_per_example` and other components out")
        if self.optimizer and self.projection == "pca":
            raise UsageError("gradients scaled by the optimizer's moments have random projections; leave `projection` out")
        if self.optimizer == "adam-step" and self.curvature != "identity":
            raise UsageError("Adam's steps are not whitened; give `curvature` identity")
        if self.components is not None and len(set(self.components)) < len(self.components):
            raise UsageError(f"`components` names {','.join(self.components)}; name each once")
        if not self.model or "" in self.models or not self.out or "" in self.sources:
            raise UsageError("model, data or out is empty; name a model, a corpus and the index's directory")
        if not self.sources:
            raise UsageError("no `data` given; name at least one file, folder or dataset")
        if "-" in self.sources:
            raise UsageError("`data` cannot be standard input, which a resumed build could not read again; save it to a file")
        revisions = _as_tuple(self.revision)
        models = _as_tuple(self.model)
        if min(len(revisions), len(models)) > 1 and len(revisions) != len(models):
            raise UsageError(f"there are {len(models)} models and {len(revisions)} revisions; give one for each model, or one for all")
        if len(set(zip(self.models, self.revisions, strict=True))) < len(self.models):
            raise UsageError("a model is named twice; its rows would only count double")

    @property
    def budget(self) -> int | None:
        """`bytes_per_example`, or 800 bytes; None if only other options say what a row is made of."""
        defaults = type(self).model_fields
        has_row_options = any(getattr(self, name) != defaults[name].default for name in _ROW_OPTIONS)
        return self.bytes_per_example or (None if has_row_options else _DEFAULT_BYTES)

    @property
    def sources(self) -> tuple[str, ...]:
        """Files, folders and hub datasets of the corpus."""
        return _as_tuple(self.data)

    @property
    def models(self) -> tuple[str, ...]:
        """Directories or hub ids, one for each model."""
        models = _as_tuple(self.model)
        return models * len(_as_tuple(self.revision)) if len(models) == 1 and self.revision else models

    @property
    def revisions(self) -> tuple[str | None, ...]:
        """Revisions, one for each model."""
        revisions = _as_tuple(self.revision)
        return revisions if len(revisions) > 1 else (revisions[0] if revisions else None,) * len(self.models)

    def content_options(self) -> dict[str, Any]:
        """The options that decide what the index contains, JSON-ready."""
        options = self.model_dump(mode="json", exclude=set(_RUNTIME_OPTIONS))
        return options | {"data": list(self.sources), "bytes_per_example": self.budget}

    def runtime_options(self) -> dict[str, Any]:
        """The options that may differ when a build is resumed: where and by what it runs."""
        return self.model_dump(mode="json", include=set(_RUNTIME_OPTIONS))

    def replace(self, **options: Any) -> "BuildConfig":
        """A configuration with other values of some options."""
        return BuildConfig(**{**dict(self), **options})


def _as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else value


def option_problem(error: ErrorDetails, config: type[BaseModel]) -> str:  # noqa: PLR0911
    """One sentence about an option that pydantic refused."""
    name = str(error["loc"][0]) if error["loc"] else ""
    value = error["input"]
    context = error.get("ctx", {})
    match error["type"]:
        case "value_error":
            return str(context["error"])
        case "missing":
            return f"no `{name}` given; name it"
        case "extra_forbidden":
            return f"there is no option {name!r}; the options are {', '.join(config.model_fields)}"
        case "greater_than_equal":
            return f"`{name}` is {value}; it must be at least {context['ge']:g}"
        case "less_than_equal":
            return f"`{name}` is {value}; it can be at most {context['le']:g}"
        case "literal_error":
            return f"`{name}` is {value!r}; it can be {context['expected'].replace(chr(39), '')}"
        case "too_short":
            return f"`{name}` is empty; leave it out, or name at least one"
        case _:
            return f"`{name}` is {value!r:.80}: {error['msg']}"


def recorded_config(options: dict[str, Any]) -> BuildConfig:
    """A configuration from an index's record, which anybody may have written.

    Raises:
        IntegrityError: they are not the options of a valid build.
    """
    try:
        return BuildConfig(**options)
    except (UsageError, TypeError) as error:
        raise IntegrityError(f"the index's record of its build is damaged ({error}); restore its manifest") from error
