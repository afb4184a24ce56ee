"""What a build is asked to do: one frozen record, checked when made, written into the manifest."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..store.corpus import Fields
from ..store.errors import IntegrityError, UsageError
from ..store.manifest import CurvatureKind, LabelKind, ModelDtype, RowDtype, check_damping
from ..store.sources import SplitText

_POSITIVE = (
    "bytes_per_example",
    "rank",
    "head_bits",
    "head_keys",
    "embedding_bits",
    "embedding_keys",
    "coordinates",
    "max_tokens",
    "batch_tokens",
    "shard_rows",
    "fit_examples",
    "workers",
    "threads",
)
_CHOICES = {
    "dtype": ("float32", "bfloat16", "float64"),
    "long": ("split", "truncate"),
    "bad_documents": ("error", "skip"),
    "projection": ("random", "pca", None),
    "curvature": ("auto", "fisher", "ekfac", "kfac", "diagonal", "identity"),
    "labels": ("data", "sampled", "expected", None),
    "row_dtype": ("float32", "float16", "int8", "1bit", None),
}
_SIZES = ("head_bits", "head_keys", "embedding_bits", "embedding_keys", "coordinates", "row_dtype")
_OF_ROWS = (*_SIZES, "head_others", "components", "layers", "projection", "rank", "curvature", "labels")
_DEFAULT_BYTES = 800
_COMPONENTS = ("blocks", "head", "embeddings")
_MAX_THREADS = 1024
_HOW_NOT_WHAT = ("out", "workers", "threads", "address", "device", "batch_tokens", "trust_remote_code")


@dataclass(frozen=True)
class BuildConfig:
    """A build's options; None means a default that depends on the model, the data or the machine.

    Attributes:
        model: a directory or hub id of a causal language model, or several: checkpoints of one run in their order, or models trained
            apart, which read the same tokens. Each has components of its own, and their weighted scores add up.
        revision: of a hub id, or several: one for each model, or several of one model.
        task: "causal-lm", "mlp" (a perceptron of vectors with labels), or one's own as `module:Class`.
        data: a file, folder or hub dataset, or several (see `store.corpus.read_corpus`).
        out: the index directory to make.
        dtype, device, trust_remote_code: how the model is loaded.
        fields: which columns hold text, prompt and completion, messages, id and source, and what a document of a text file is.
        max_tokens: longest example in tokens; by default the model's context, at most 2,048.
        long, append_eos, bad_documents: what becomes of long documents, their ends, and bad ones.
        bytes_per_example: of a row, from which components and their sizes follow (see `ray_jobs.budget`); 800 where none of the options
            that say what a row is made of is given (`_OF_ROWS`).
        components: parts of a row: "blocks" (dense rows of linear layers), "head" and "embeddings" (keyed by token); by default what the
            bytes afford, and without a number of bytes the blocks.
        layers: globs over layer names of the blocks; by default every linear layer inside them, or, for a number of bytes, those that
            narrow ("@narrowing").
        projection, rank, seed: how gradients are projected; by default at random to rank 16, or, for a number of bytes, by PCA to 128.
        curvature, labels, fit_examples, damping: how rows are whitened; damping is relative to the mean eigenvalue. By default labels
            are the data's and damping 0.1 for the blocks, the model's and 1 for head and embeddings; for a number of bytes all labels are
            the model's and all dampings 1. "expected" labels are all classes by their probability under the model, where an example has
            one label.
        coordinates, row_dtype: how many of the blocks' coordinates are stored (None stores all), and how.
        head_bits, head_keys, embedding_bits, embedding_keys: bits of each of an example's tokens, and how many tokens are kept (those of
            largest norm; None keeps all); 64 bits by default. `head_others`: how many tokens of the head are stored beside those that the
            example predicts, the most probable ones.
        hidden: keep each example's mean last hidden state (float16), for the baseline beside answers.
        shard_rows: examples in a shard; by default about 16 MiB of rows.
        batch_tokens: padded tokens in a batch; by default 2,048, on a GPU 16,384.
        workers: processes; 1 runs in this one, without Ray. `threads` of each; `address` of a Ray cluster.
    """

    model: str | tuple[str, ...]
    data: str | tuple[str, ...]
    out: str
    task: str = "causal-lm"
    revision: str | tuple[str, ...] | None = None
    dtype: ModelDtype = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    fields: Fields = Fields()
    max_tokens: int | None = None
    long: Literal["split", "truncate"] = "split"
    append_eos: bool = True
    bad_documents: Literal["error", "skip"] = "error"
    bytes_per_example: int | None = None
    components: tuple[str, ...] | None = None
    layers: tuple[str, ...] = ()
    projection: Literal["random", "pca"] | None = None
    rank: int | None = None
    seed: int = 0
    curvature: CurvatureKind = "auto"
    labels: LabelKind | None = None
    fit_examples: int = 5000
    damping: float | None = None
    coordinates: int | None = None
    row_dtype: RowDtype | None = None
    head_bits: int | None = None
    head_keys: int | None = None
    head_others: int = 0
    embedding_bits: int | None = None
    embedding_keys: int | None = None
    hidden: bool = False
    shard_rows: int | None = None
    batch_tokens: int | None = None
    workers: int = 1
    threads: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`{name}` is {value}; it must be at least 1")
        if self.max_tokens == 1:
            raise UsageError("`max_tokens` is 1; an example needs at least 2 tokens, one to predict and one before it")
        if self.fields.split_text not in get_args(SplitText):
            raise UsageError(f"`split_text` is {self.fields.split_text!r}; it can be {' or '.join(get_args(SplitText))}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"`{name}` is {getattr(self, name)!r}; it can be {', '.join(filter(None, allowed))}")
        if self.bytes_per_example is not None:
            given = [name for name in _SIZES if getattr(self, name) is not None] + ["head_others"] * bool(self.head_others)
            if given:
                raise UsageError(f"`bytes_per_example` chooses `{given[0]}`; give one or the other")
        if self.components is not None and not self.components:
            raise UsageError("`components` names nothing; leave it out, or name at least one")
        if self.components is not None and (len(set(self.components)) < len(self.components) or set(self.components) - set(_COMPONENTS)):
            raise UsageError(
                f"`components` is {','.join(self.components)!r}; it can be {', '.join(_COMPONENTS)}, or several with commas between"
            )
        if self.damping is not None:
            check_damping(self.damping)
        if self.threads > _MAX_THREADS:
            raise UsageError(f"`threads` is {self.threads}; it can be at most {_MAX_THREADS}")
        if not self.model or "" in self.models or not self.out or "" in self.sources:
            raise UsageError("model, data or out is empty; name a model, a corpus and the index's directory")
        for name in ("seed", "head_others"):
            if getattr(self, name) < 0:
                raise UsageError(f"`{name}` is {getattr(self, name)}; it must be at least 0")
        if not self.sources:
            raise UsageError("no `data` given; name at least one file, folder or dataset")
        if "-" in self.sources:
            raise UsageError(
                "`data` cannot be standard input, which a build that is taken up again could not read twice; save it to a file"
            )

        revisions = () if self.revision is None else (self.revision,) if isinstance(self.revision, str) else self.revision
        named = (self.model,) if isinstance(self.model, str) else self.model
        if min(len(revisions), len(named)) > 1 and len(revisions) != len(named):
            raise UsageError(f"there are {len(named)} models and {len(revisions)} revisions; give one for each model, or one for all")
        if len(set(zip(self.models, self.revisions, strict=True))) < len(self.models):
            raise UsageError("a model is named twice; its rows would only count double")

    @property
    def budget(self) -> int | None:
        """Bytes of a row to be spent; None where what a row is made of was named."""
        named = any(getattr(self, name) != _DEFAULTS[name] for name in _OF_ROWS)
        return self.bytes_per_example or (None if named else _DEFAULT_BYTES)

    @property
    def sources(self) -> tuple[str, ...]:
        """Files, folders and hub datasets of the corpus."""
        return (self.data,) if isinstance(self.data, str) else self.data

    @property
    def models(self) -> tuple[str, ...]:
        """Directories or hub ids, one for each model."""
        named = (self.model,) if isinstance(self.model, str) else self.model
        return named * len(self.revision) if len(named) == 1 and isinstance(self.revision, tuple) else named

    @property
    def revisions(self) -> tuple[str | None, ...]:
        """Revisions, one for each model."""
        if not isinstance(self.revision, tuple) or len(self.revision) == 1:
            return (self.revision[0] if isinstance(self.revision, tuple) else self.revision,) * len(self.models)
        return self.revision

    def what(self) -> dict[str, Any]:
        """The options that decide what the index holds (not how or where it is made), JSON-ready."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in _HOW_NOT_WHAT}
        options["data"] = list(self.sources)
        return options | {"bytes_per_example": self.budget}

    def how(self) -> dict[str, Any]:
        """The other options, which may differ when a build is taken up again."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in _HOW_NOT_WHAT}


def recorded_config(options: dict[str, Any]) -> BuildConfig:
    """A configuration from an index's record, which anybody may have written.

    Raises:
        IntegrityError: an option is unknown, or of another type than it can have.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(BuildConfig).validate_python(options)
    except (ValidationError, TypeError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        else:
            reason = str(error)
        raise IntegrityError(f"the index's record of its build is damaged ({reason}); restore its manifest") from error


_DEFAULTS = {f.name: f.default for f in fields(BuildConfig)}
