"""Manifests: the description of an index, in one JSON file that is created once and never changed.

A separate table lists shards and deleted rows (see shard.py), so that a manifest stays small. The current state of an index is the manifest
with the highest number in `manifests/`. The classes below are strict: an unknown or missing field or a wrong type means a damaged
manifest; an unknown version or feature means one of a newer Wherefrom. Paths are relative and stay inside the index.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import IncompatibleError, IntegrityError, NotFoundError
from .files import create_only, read_bytes, sha256, staging_folder, write_whole
from .presets import PresetName

FORMAT_VERSION = 2
FEATURES = frozenset({"deleted", "dense", "sparse", "reduced", "vectors", "labels", "sequences", "images", "optimizer", "unit-length"})
_NAME = re.compile(r"(\d{6,18})\.json")
_LATEST = "latest"
_MOST_BYTES = 1 << 30


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts or not path.isprintable():
        raise ValueError("must be a relative path inside the index")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
ComponentName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*(-[0-9]+)?$")]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=1 << 26)]  # of a layer, or of its projection
LayerCurvature = Literal["fisher", "ekfac", "kfac", "diagonal", "identity"]
CurvatureKind = Literal["auto", "fisher", "ekfac", "kfac", "diagonal", "identity"]
LabelKind = Literal["data", "sampled", "expected", "margin"]
OptimizerUse = Literal["second-moments", "preconditioner", "adam-step"]
ModelDtype = Literal["float32", "bfloat16", "float64"]
RowDtype = Literal["float32", "float16", "int8", "1bit"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileRecord(_Model):
    """A file of the index, with its size and SHA-256."""

    @classmethod
    def of(cls, index: Path, path: Path) -> "FileRecord":
        """Return the record of a file of the index."""
        return cls(path=path.relative_to(index).as_posix(), bytes=path.stat().st_size, sha256=sha256(path))

    path: RelativePath
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Layer(_Model):
    """A tracked layer and its part of a dense row: `output_rank * input_rank` coordinates from `offset` on."""

    name: str
    outputs: Width
    inputs: Width
    output_rank: Width
    input_rank: Width
    input_group: str
    offset: Count
    curvature: LayerCurvature

    @property
    def size(self) -> int:
        """The number of this layer's coordinates in a row."""
        return self.output_rank * self.input_rank


class Projection(_Model):
    """The projection of a layer's inputs and output gradients to a few coordinates."""

    kind: Literal["random", "pca"]
    rank: Size
    seed: Count


class Curvature(_Model):
    """The curvature that whitens a component's rows, and the amount of data that it was fitted on."""

    kind: CurvatureKind
    labels: LabelKind
    examples: Count
    tokens: Count
    damping: Annotated[float, Field(gt=0)]


class _Component(_Model):
    """Fields of every component. A kind of component declares its layers, its encoder's arrays, and how it is described."""

    name: ComponentName
    model: Count
    weight: float
    curvature: Curvature

    def described(self, **about: Any) -> dict[str, Any]:
        """Combine fields of every component with those of a kind, JSON-ready."""
        curvature = {"labels": self.curvature.labels, "fitted_on": self.curvature.examples, "damping": self.curvature.damping}
        return {"name": self.name, "kind": self.kind, "weight": self.weight, **about, **curvature}  # type: ignore[attr-defined]


class DenseComponent(_Component):
    """A component in which every row has the same coordinates.

    Attributes:
        role: its part of the model: the linear layers inside the blocks.
        estimated: True if scores need a calibration against exact ones, though nothing was left out.
        has_wide_rows: True if a whitened row has all `dim` coordinates in memory.
        model: the number of the index's model, from 0.
        coordinates: the number of stored coordinates of a row, a selection (the encoder's array `kept`) or a random mixture; None for all.
        dtype: the type of a stored coordinate.
        optimizer: how gradients are scaled by the optimizer's moments (see indexer/moments.py); None for not at all.
        unit_length: rows, and those of queries, are divided by their lengths.
    """

    role: ClassVar[Literal["blocks"]] = "blocks"
    estimated: ClassVar[bool] = False
    has_wide_rows: ClassVar[bool] = True

    kind: Literal["dense"]
    coordinates: Width | None
    dtype: RowDtype
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]
    projection: Projection
    optimizer: OptimizerUse | None = None
    unit_length: bool = False

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The names of its layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def seed(self) -> int:
        """The seed of projection, folding and rotation."""
        return self.projection.seed

    @property
    def reduced(self) -> bool:
        """True if coordinates are selected by the encoder, or mixed."""
        return self.coordinates is not None

    @property
    def one_bit(self) -> bool:
        """True if scores are estimates from one-bit codes."""
        return self.dtype == "1bit"

    @property
    def has_search_arrays(self) -> bool:
        """True if search caches hold arrays of it."""
        return not self.one_bit

    @property
    def features(self) -> frozenset[str]:
        """The features that a reader of the index needs."""
        optional = {"reduced": self.reduced or self.one_bit, "optimizer": self.optimizer is not None, "unit-length": self.unit_length}
        return frozenset({"dense", *(name for name, needed in optional.items() if needed)})

    @property
    def scales_sides(self) -> bool:
        """True if inputs and outputs of each layer are scaled before they are projected."""
        return self.optimizer in ("second-moments", "preconditioner")

    @property
    def linear(self) -> bool:
        """True if a row is linear in the gradient."""
        return self.optimizer != "adam-step" and not self.unit_length

    @property
    def dim(self) -> int:
        """The number of coordinates of a whitened row, before its reduction."""
        return self.layers[-1].offset + self.layers[-1].size

    @property
    def stored(self) -> int:
        """The number of coordinates of a stored row. One-bit rows may have more than `dim`, for more exact estimates."""
        return (self.coordinates or self.dim) if self.one_bit else min(self.coordinates or self.dim, self.dim)

    @model_validator(mode="after")
    def _check_layers(self) -> "DenseComponent":
        """Refuse layers that contradict one another."""
        offset = 0
        names = set[str]()
        inputs = dict[str, tuple[int, int]]()
        for layer in self.layers:
            if layer.offset != offset:
                raise ValueError(f"layer {layer.name} does not begin where the one before it ends")
            shared = inputs.setdefault(layer.input_group, (layer.inputs, layer.input_rank))
            if self.optimizer and layer.input_group != layer.name:
                raise ValueError(f"layer {layer.name} is scaled by its own moments and shares an input group")
            if layer.name in names or shared != (layer.inputs, layer.input_rank):
                raise ValueError(f"layer {layer.name} is a duplicate or not of its input group")
            if layer.output_rank > layer.outputs or layer.input_rank > layer.inputs:
                raise ValueError(f"layer {layer.name} has a rank above its size")
            names.add(layer.name)
            offset += layer.size
        return self

    def encoder_arrays(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Return, by the name of the encoder's array, its shape and whether it must be there."""
        arrays: dict[str, tuple[tuple[int, ...], bool]] = {}
        pca = self.projection.kind == "pca"
        for layer in self.layers:
            kronecker = layer.curvature in ("ekfac", "kfac")
            sides = (("input", layer.input_group, layer.input_rank, layer.inputs), ("output", layer.name, layer.output_rank, layer.outputs))
            for side, owner, rank, size in sides:
                arrays[f"{owner}/{side}_rotation"] = ((rank, rank), kronecker)
                arrays[f"{owner}/{side}_projection"] = ((rank, size), pca and rank < size)
            arrays[f"{layer.name}/eigenvalues"] = ((layer.size,), layer.curvature != "identity")
            arrays[f"{layer.name}/basis"] = ((layer.size, layer.size), layer.curvature == "fisher")
            arrays[f"{layer.name}/input_scale"] = ((layer.inputs,), self.scales_sides)
            arrays[f"{layer.name}/output_scale"] = ((layer.outputs,), self.scales_sides)
            for moment in ("first_moment", "second_moment"):
                arrays[f"{layer.name}/{moment}"] = ((layer.outputs, layer.inputs), self.optimizer == "adam-step")
        arrays["adam"] = ((3,), self.optimizer == "adam-step")
        return arrays

    def sizes(self) -> dict[str, Any]:
        """Describe what is stored of a row, JSON-ready, as `wherefrom plan --json` prints it."""
        return {"name": self.name, "layers": len(self.layers), "coordinates": self.stored, "stored_as": self.dtype}

    def describe(self) -> dict[str, Any]:
        """Describe the component, JSON-ready, as `wherefrom info --json` prints it."""
        return self.described(
            coordinates=self.stored,
            of_coordinates=self.dim,
            stored_as=self.dtype,
            layers=len(self.layers),
            parameters=sum(layer.outputs * layer.inputs for layer in self.layers),
            projection=f"{self.projection.kind}, rank {self.projection.rank}, seed {self.projection.seed}",
            curvature=", ".join(sorted({layer.curvature for layer in self.layers})),
            optimizer=self.optimizer,
            unit_length=self.unit_length,
        )


class SparseComponent(_Component):
    """A component of a vocabulary layer: a row is a list of tokens, each with a vector of `width` coordinates that is coded in `bits` bits.

    Its codes depend on no array of the encoder (`reduced`), and search caches hold its posting lists (`has_search_arrays`); the other
    constants are those of `DenseComponent`.

    Attributes:
        model: the number of the index's model, from 0.
        role: "head", the output head keyed by the tokens that an example predicts, or "embeddings", keyed by those that it reads.
        layer: the name of the module.
        vocabulary, width: the shape of the layer's weight matrix.
        bits: the length of a vector's code.
        extra_tokens: the number of most probable tokens that are stored besides those that an example predicts.
        max_tokens: the largest number of stored tokens of an example, those with the longest vectors; None for all.
        postprocessed: True if the model transforms the head's output (a soft-cap, a scale), so that the curvature has no closed form.
        seed: the seed of the rotation.
        curvature: in Kronecker form: a weight for each token, and the second moment of the head's inputs or the embeddings' gradients.
    """

    reduced: ClassVar[bool] = False
    one_bit: ClassVar[bool] = True
    estimated: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    has_wide_rows: ClassVar[bool] = False
    has_search_arrays: ClassVar[bool] = True

    kind: Literal["sparse"]
    role: Literal["head", "embeddings"]
    layer: str
    vocabulary: Width
    width: Width
    bits: Width
    extra_tokens: Count
    max_tokens: Size | None
    postprocessed: bool
    seed: Count

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The name of its layer."""
        return (self.layer,)

    @property
    def features(self) -> frozenset[str]:
        """The features that a reader of the index needs."""
        return frozenset({"sparse"})

    @property
    def dim(self) -> int:
        """The number of coordinates of a token's vector."""
        return self.width

    @property
    def closed_form(self) -> bool:
        """True if the head's curvature has a closed form (sampled labels)."""
        return self.role == "head" and self.curvature.labels == "sampled" and not self.postprocessed

    def encoder_arrays(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Return, by the name of the encoder's array, its shape and whether it must be there."""
        return {
            "basis": ((self.width, self.width), True),
            "eigenvalues": ((self.width,), True),
            "vocabulary": ((self.vocabulary,), True),
        }

    def sizes(self) -> dict[str, Any]:
        """Describe what is stored of a row, JSON-ready, as `wherefrom plan --json` prints it."""
        return {"name": self.name, "tokens": self.max_tokens, "bits_per_token": self.bits}

    def describe(self) -> dict[str, Any]:
        """Describe the component, JSON-ready, as `wherefrom info --json` prints it."""
        every = "all that are predicted" if self.role == "head" else "all that are read"
        every += f", {self.extra_tokens} extra ones" if self.extra_tokens else ""
        return self.described(
            layer=self.layer,
            vocabulary=self.vocabulary,
            width=self.width,
            tokens=every if self.max_tokens is None else f"{self.max_tokens} of largest norm",
            bits_per_token=self.bits,
            parameters=self.vocabulary * self.width,
        )


Component = Annotated[DenseComponent | SparseComponent, Field(discriminator="kind")]


class Model(_Model):
    """A model whose gradients the rows are. Queries must use the same model.

    Attributes:
        base: for an adapter, the directory or hub id of the model that it adapts.
        trained: the layers that training changed; None where this is not known, and the whole model counts as trained.
        learning_times: by layer, the sum of the learning rates of all steps of training up to this model, over 1 - momentum, for Adam times
            its mean preconditioner; None where this is not known.
    """

    id: str
    base: str | None
    revision: str | None
    dtype: ModelDtype
    fingerprint: str
    architecture: str
    parameters: Count
    context: int | None
    trained: tuple[str, ...] | None = None
    learning_times: dict[str, Annotated[float, Field(ge=0)]] | None = None


class Tokenizer(_Model):
    """The tokenizer of the token ids, with its chat template."""

    fingerprint: str


class BuildOptions(_Model):
    """The options of a build. Those that a query needs are checked; all others are stored unchecked."""

    model_config = ConfigDict(extra="allow")

    task: str
    fields: dict[str, str]
    max_tokens: Size | None
    long: Literal["split", "truncate"]
    append_eos: bool
    preset: PresetName | None = None


class Inputs(_Model):
    """The inputs that determine the contents of an index: options, models, tokenizer and corpus files."""

    format: Size
    options: BuildOptions
    models: tuple[str, ...]
    tokenizer: str | None
    corpus: tuple[dict[str, Any], ...]


class Tracked(_Model):
    """The share of a model's parameters whose gradients are in the rows.

    Attributes:
        parameters: the number of parameters whose gradients are in the rows, each counted once.
        of: the number of all parameters; of those that training changed, where this is known.
        left_out: names of the other parameters, the largest first.
    """

    parameters: Count
    of: Count
    left_out: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share, from 0 to 1."""
        return self.parameters / self.of if self.of else 1.0


class UnreadFiles(_Model):
    """Files in the corpus's folders that were not read: their number, and the first of them with the reasons."""

    files: Count
    first: tuple[str, ...]


class Addition(_Model):
    """An addition of documents after the build: the identity of the call, the number of the manifest that it published, and its data."""

    call: str
    manifest: Size
    corpus: tuple[dict[str, Any], ...]
    rows: Count
    drift: dict[str, float]
    unread: UnreadFiles
    left_out_columns: dict[str, str]


class Build(_Model):
    """The record of a build.

    Attributes:
        runtime: options that do not change the contents of the index.
        calibration: by component, the numbers from which its weight was computed.
        not_finite: the number of rows that are stored as zeros, since loss or gradient is not finite; `_first` are some of their ids.
        left_out_columns: by name, the type of the corpus's columns that were not stored.
        notes: sentences about the models for readers of answers.
    """

    inputs: Inputs
    runtime: dict[str, Any]
    batch_tokens: Size
    tracked: tuple[Tracked, ...]
    calibration: dict[str, dict[str, float]]
    documents: Count
    split: Count
    truncated: Count
    skipped: Count
    skipped_first: tuple[str, ...]
    unread: UnreadFiles
    left_out_columns: dict[str, str]
    not_finite: Count
    not_finite_first: tuple[str, ...]
    notes: tuple[str, ...]
    added: tuple[Addition, ...] = ()


class Slope(_Model):
    """The measured change of queries' losses for each nat that scores predicted, with its 95 % interval.

    Attributes:
        measured_by: what measured it, for readers of answers.
        trainings, queries: the numbers that it rests on.
        lds: the linear datamodeling score on the same changes, with its interval; None where it was not computed.
    """

    value: Annotated[float, Field(ge=1e-9, le=1e9)]
    low: Annotated[float, Field(ge=-1e12, le=1e12)]
    high: Annotated[float, Field(ge=-1e12, le=1e12)]
    measured_by: Annotated[str, Field(max_length=200)]
    trainings: Size
    queries: Size
    lds: Annotated[float, Field(ge=-1, le=1)] | None = None
    lds_low: Annotated[float, Field(ge=-1, le=1)] | None = None
    lds_high: Annotated[float, Field(ge=-1, le=1)] | None = None


class Manifest(_Model):
    """The description of an index; see docs/format.md for the meaning of every field.

    Attributes:
        rows: the number of rows, deleted rows included.
        training_rows: the number of rows of the build and its additions, also of those that `compact` dropped: the size of the training
            set, by which scores in nats are divided.
        mode: in which answers are ranked where a query does not say.
        shards, deleted: the numbers of shards and of deleted rows; the file `table` lists them (see `shard.read_table`).
        group_rows: the largest number of rows that consecutive shards have which are searched together.
        slope: of scores by stored rows under the build's curvature; None where it was not measured.
    """

    format: Literal["wherefrom"] = "wherefrom"
    version: Literal[2] = 2
    features: tuple[str, ...]
    number: Annotated[int, Field(ge=1, le=10**15)]
    created: str
    wherefrom: str
    task: str
    mode: Literal["influence", "loss-normalized"] = "influence"
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    tokenizer: Tokenizer | None
    components: Annotated[tuple[Component, ...], Field(min_length=1)]
    encoder: FileRecord
    rows: Size
    training_rows: Count = 0
    tokens: Count
    shards: Size
    deleted: Count
    group_rows: Size = 1 << 16
    slope: Slope | None = None
    table: FileRecord
    build: Build


def publish_manifest(directory: Path, manifest: Manifest) -> Path:
    """Create `manifests/<number>.json`, which makes the manifest the current state of the index.

    Raises:
        BusyError: another process published that number first.
    """
    path = manifest_path(directory, manifest.number)
    create_only(path, seal(manifest.model_dump(mode="json")))
    write_whole(directory / "manifests" / _LATEST, f"{manifest.number}\n".encode())
    return path


def seal(content: dict[str, Any]) -> bytes:
    """Return a manifest's bytes, with the field `checksum`: SHA-256 of the JSON without this field, keys sorted, no spaces."""
    return (json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n").encode()


def _checksum(content: dict[str, Any]) -> str:
    plain = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def latest_manifest(directory: Path) -> Path | None:
    """Return the path of the manifest with the highest number; None if there is none."""
    numbers = manifest_numbers(directory)
    return manifest_path(directory, numbers[-1]) if numbers else None


def manifest_path(directory: Path, number: int) -> Path:
    """Return the path of the manifest of a number."""
    return directory / "manifests" / f"{number:06d}.json"


def manifest_numbers(directory: Path) -> list[int]:
    """Return the numbers of the existing manifests, ascending."""
    folder = directory / "manifests"
    if not folder.is_dir():
        return []
    numbers = (int(m[1]) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)))
    return sorted(number for number in numbers if manifest_path(directory, number).exists())


def _recorded_latest(directory: Path) -> int:
    """Read the number of the manifest that was published last from the file `latest`; 0 if there is no such file."""
    path = directory / "manifests" / _LATEST
    try:
        return int(read_bytes(path, most=32).decode("ascii"))
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except ValueError as error:
        raise IntegrityError(f"{path} does not hold the number of a manifest; restore or remove it") from error


def identity(path: Path) -> tuple[str, int, int, int]:
    """Return a value that differs between two files of manifests, also of the same number if another index replaced this one."""
    status = path.stat()
    return path.name, status.st_ino, status.st_mtime_ns, status.st_size


def read_manifest(directory: Path, number: int | None = None) -> Manifest:
    """Read a manifest of an index: the newest, or that of a number.

    Raises:
        NotFoundError: there is no such directory, or no index in it.
        IncompatibleError: the index has a format version or a feature that this Wherefrom does not support.
        IntegrityError: the manifest is damaged.
    """
    if not directory.is_dir():
        raise NotFoundError(f"there is no index at {directory}; build one with wherefrom build")
    recorded = _recorded_latest(directory)  # read first, since another process may publish meanwhile
    path = latest_manifest(directory)
    if path is None:
        unfinished = staging_folder(directory).is_dir()
        raise NotFoundError(
            f"{directory} holds a build that is not finished; run the same build again to continue it"
            if unfinished
            else f"{directory} is not a Wherefrom index (it has no manifests/); give the directory that was the `out` of a build"
        )
    if number is not None:
        path = manifest_path(directory, number)
    elif recorded > manifest_numbers(directory)[-1]:
        raise IntegrityError(
            f"{manifest_path(directory, recorded)} is missing, the newest state of the index (it may have deleted rows); restore it, or "
            f"remove {directory / 'manifests' / _LATEST} to use the state before it"
        )
    try:
        content = json.loads(read_bytes(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON ({error}); restore it or build the index again") from error
    if not isinstance(content, dict) or content.get("format") != "wherefrom":
        raise IntegrityError(f"{path} is not a Wherefrom manifest; restore it or build the index again")
    if content.get("version") != FORMAT_VERSION:
        older = content.get("version") in range(1, FORMAT_VERSION)
        raise IncompatibleError(
            f"{directory} has format version {content.get('version')!r}, and this Wherefrom reads {FORMAT_VERSION}; "
            + ("build it again" if older else "use a newer Wherefrom")
        )
    features = content.get("features")
    unknown = sorted(set(map(str, features if isinstance(features, list) else [])) - FEATURES)
    if unknown:
        raise IncompatibleError(f"{directory} needs the features {', '.join(unknown)}, which this Wherefrom lacks; use a newer Wherefrom")
    if content.pop("checksum", None) != _checksum(content):
        raise IntegrityError(f"{path} is not what was written (its checksum differs); restore it or build the index again")
    try:
        manifest = Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{path} is damaged: {where}: {first['msg']}; restore it or build the index again") from error
    problem = next(_contradictions(manifest, int(path.stem)), None)
    if problem:
        raise IntegrityError(f"{path} {problem}; restore it or build the index again")
    return manifest


def _contradictions(manifest: Manifest, number: int) -> Iterator[str]:
    """Yield contradictions in a manifest: another number than in its file name, duplicate components, missing models."""
    if manifest.number != number:
        yield f"is manifest {manifest.number} under another's name"
    if bool(manifest.deleted) != ("deleted" in manifest.features) or manifest.deleted > manifest.rows:
        yield "is damaged: its features and its number of deleted rows disagree on whether rows were deleted"
    if len({component.name for component in manifest.components}) < len(manifest.components):
        yield "is damaged: it lists a component twice"
    for component in manifest.components:
        if component.model >= len(manifest.models):
            yield f"is damaged: component {component.name} has a model that is not listed"
