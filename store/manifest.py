"""Manifests: the description of an index, in one JSON file that is created once and never changed.

Shards and deleted rows stand in a table beside it (see shard.py), so that a manifest stays small however many rows there are. The highest
number under `manifests/` is the index. Every model below is strict: an unknown field, a missing one or a wrong type
is a damaged manifest, an unknown version or feature is one that a newer Wherefrom wrote. Paths are relative and stay inside the index.
"""

import hashlib
import json
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import IncompatibleError, IntegrityError, NotFoundError, UsageError
from .files import create_only, read_bytes, sha256, write_whole

FORMAT_VERSION = 2
FEATURES = frozenset({"deleted", "dense", "sparse", "reduced", "vectors"})
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
Width = Annotated[int, Field(ge=1, le=1 << 26)]  # of a layer, or of what is kept of it
LayerCurvature = Literal["fisher", "ekfac", "kfac", "diagonal", "identity"]
CurvatureKind = Literal["auto", "fisher", "ekfac", "kfac", "diagonal", "identity"]
LabelKind = Literal["data", "sampled", "expected"]
ModelDtype = Literal["float32", "bfloat16", "float64"]
RowDtype = Literal["float32", "float16", "int8", "1bit"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileRecord(_Model):
    """A file that the manifest vouches for, by its size and SHA-256."""

    @classmethod
    def of(cls, index: Path, path: Path) -> "FileRecord":
        """The record of one of an index's files."""
        return cls(path=path.relative_to(index).as_posix(), bytes=path.stat().st_size, sha256=sha256(path))

    path: RelativePath
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Layer(_Model):
    """A tracked layer's block of a dense row: `output_rank * input_rank` coordinates from `offset` on."""

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
        """Coordinates of this layer in a row."""
        return self.output_rank * self.input_rank


class Projection(_Model):
    """How a layer's gradient is brought to its ranks."""

    kind: Literal["random", "pca"]
    rank: Size
    seed: Count


class Curvature(_Model):
    """What whitens a row, and on how much it was fitted."""

    kind: CurvatureKind
    labels: LabelKind
    examples: Count
    tokens: Count
    damping: Annotated[float, Field(gt=0)]


class _Component(_Model):
    name: ComponentName

    @property
    def part(self) -> str:
        """The name without the model's number: "blocks", "head" or "embeddings"."""
        return self.name.partition("-")[0]


class DenseComponent(_Component):
    """A part of a row with its own layers, curvature and code; scores of components add, times their weights.

    Attributes:
        model: which of the index's models, from 0.
        coordinates: stored of a row; None stores all. Fewer are a selection of the encoder's (its array `kept`) or a random projection.
        dtype: of a stored coordinate.
    """

    kind: Literal["dense"]
    model: Count
    weight: float
    coordinates: Width | None
    dtype: RowDtype
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]
    projection: Projection
    curvature: Curvature

    @property
    def dim(self) -> int:
        """Coordinates of a whitened row, before its reduction."""
        return self.layers[-1].offset + self.layers[-1].size

    @property
    def stored(self) -> int:
        """Coordinates of a stored row; one bit each may be more than the row's own, which makes the estimate better."""
        return (self.coordinates or self.dim) if self.dtype == "1bit" else min(self.coordinates or self.dim, self.dim)


class SparseComponent(_Component):
    """A vocabulary layer: a vector of `width` coordinates for each token of an example, at `bits` bits.

    Attributes:
        model: which of the index's models, from 0.
        role: "head", the output head keyed by the tokens that an example predicts, or "embeddings", keyed by those that it reads.
        layer: the module's name.
        vocabulary, width: its size.
        bits: of a vector's code.
        others: tokens beside those that an example predicts, the most probable ones.
        keys: tokens kept of an example, those of largest norm; None keeps all.
        tail: whether something follows the head's output (a soft-cap, a scale), so that curvature has no closed form.
        seed: of the rotation.
        curvature: of Kronecker form: a weight for each token, and the second moment of the head's inputs or the embeddings' gradients.
    """

    kind: Literal["sparse"]
    model: Count
    weight: float
    role: Literal["head", "embeddings"]
    layer: str
    vocabulary: Width
    width: Width
    bits: Width
    others: Count
    keys: Size | None
    tail: bool
    seed: Count
    curvature: Curvature


Component = Annotated[DenseComponent | SparseComponent, Field(discriminator="kind")]


class Model(_Model):
    """Which model the rows came from; a query must come from the very same.

    Attributes:
        base: of an adapter, the directory or hub id of the model that it was merged into.
    """

    id: str
    base: str | None
    revision: str | None
    dtype: ModelDtype
    fingerprint: str
    architecture: str
    parameters: Count
    context: int | None


class Tokenizer(_Model):
    """Which tokenizer made the token ids, its chat template included."""

    fingerprint: str


class Options(_Model):
    """A build's options as they were recorded; those that a query needs are typed, the others kept as they are."""

    model_config = ConfigDict(extra="allow")

    task: str
    fields: dict[str, str]
    max_tokens: Size | None
    long: Literal["split", "truncate"]
    append_eos: bool


class What(_Model):
    """What decided the contents of the index: options, models, tokenizer and corpus files."""

    format: Size
    options: Options
    models: tuple[str, ...]
    tokenizer: str | None
    corpus: tuple[dict[str, Any], ...]


class Tracked(_Model):
    """How much of the model the rows measure.

    Attributes:
        parameters: of the layers that have gradients in the rows, each counted once.
        of: all parameters; of an adapter those that it changed.
        left_out: names of what is not measured, the largest first.
    """

    parameters: Count
    of: Count
    left_out: tuple[str, ...]

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.parameters / self.of if self.of else 1.0


class UnreadFiles(_Model):
    """Files in the corpus's folders that were not read: how many, and the first with the reasons."""

    files: Count
    first: tuple[str, ...]


class Addition(_Model):
    """Documents that were added after the build: the call's identity and the manifest that it published, files, rows, and each component's
    drift.
    """

    call: str
    manifest: Size
    corpus: tuple[dict[str, Any], ...]
    rows: Count
    drift: dict[str, float]
    unread: UnreadFiles
    left_out_columns: dict[str, str]


class Build(_Model):
    """How the index was made, and what was left out of it.

    Attributes:
        how: options that do not change what the index holds.
        weighed: by component, what its weight rests on.
        not_finite: rows stored as zeros, since the model's loss or gradient of them is not finite; `_first` are some of their ids.
        left_out_columns: column -> what it holds, of the corpus's columns that were not kept.
        notes: sentences about the models that a reader of answers should know.
    """

    what: What
    how: dict[str, Any]
    batch_tokens: Size
    tracked: tuple[Tracked, ...]
    weighed: dict[str, dict[str, float]]
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


class Manifest(_Model):
    """The description of an index; see docs/format.md for the meaning of every field.

    Attributes:
        rows: deleted ones, too.
        shards, deleted: how many there are; `table` names the file that lists them (see `shard.read_table`).
    """

    format: Literal["wherefrom"] = "wherefrom"
    version: Literal[2] = 2
    features: tuple[str, ...]
    number: Annotated[int, Field(ge=1, le=10**15)]
    created: str
    wherefrom: str
    task: str
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    tokenizer: Tokenizer | None
    components: Annotated[tuple[Component, ...], Field(min_length=1)]
    encoder: FileRecord
    rows: Size
    tokens: Count
    shards: Size
    deleted: Count
    table: FileRecord
    build: Build


def check_damping(damping: float) -> None:
    """Refuse a damping, relative to the mean eigenvalue, under which round-off would decide (below 1e-6) or that cannot be meant.

    Raises:
        UsageError: it is not a number from 1e-6 to 1e9.
    """
    if not 1e-6 <= damping <= 1e9:
        raise UsageError(f"the damping is {damping}; it must be a number from 1e-6 to 1e9 (relative to the mean eigenvalue, such as 0.1)")


def publish_manifest(directory: Path, manifest: Manifest) -> Path:
    """Create `manifests/<number>.json`; from then on the index is what it says.

    Raises:
        BusyError: that number was published meanwhile.
    """
    path = manifest_path(directory, manifest.number)
    create_only(path, seal(manifest.model_dump(mode="json")))
    write_whole(directory / "manifests" / _LATEST, f"{manifest.number}\n".encode())
    return path


def seal(content: dict[str, Any]) -> bytes:
    """A manifest's bytes, its own SHA-256 (over the same JSON without it, keys sorted, no spaces) in the field `checksum`."""
    return (json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n").encode()


def _checksum(content: dict[str, Any]) -> str:
    plain = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def latest_manifest(directory: Path) -> Path | None:
    """The manifest of the highest number, or None where there is none."""
    numbers = manifest_numbers(directory)
    return manifest_path(directory, numbers[-1]) if numbers else None


def manifest_path(directory: Path, number: int) -> Path:
    """Where the manifest of a number lies."""
    return directory / "manifests" / f"{number:06d}.json"


def manifest_numbers(directory: Path) -> list[int]:
    """The numbers of the manifests that are there, ascending."""
    folder = directory / "manifests"
    if not folder.is_dir():
        return []
    found = (int(m[1]) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)))
    return sorted(number for number in found if manifest_path(directory, number).exists())


def _recorded_latest(directory: Path) -> int:
    """The number of the manifest that was published last, by the file `latest`; 0 where it says nothing."""
    path = directory / "manifests" / _LATEST
    try:
        return int(read_bytes(path, most=32).decode("ascii"))
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except ValueError as error:
        raise IntegrityError(f"{path} is not the number of a manifest; remove it, or restore it") from error


def identity(path: Path) -> tuple[str, int, int, int]:
    """What tells a manifest's file from another, also from one of the same number in an index that took the place of this one."""
    found = path.stat()
    return path.name, found.st_ino, found.st_mtime_ns, found.st_size


def read_manifest(directory: Path) -> Manifest:
    """The newest manifest of an index.

    Raises:
        NotFoundError: no such directory, or no index in it.
        IncompatibleError: a format version or feature that this Wherefrom does not know.
        IntegrityError: not what Wherefrom wrote.
    """
    if not directory.is_dir():
        raise NotFoundError(f"there is no index at {directory}; build one with: wherefrom build --out {directory} ...")
    recorded = _recorded_latest(directory)  # read first, since another process may publish meanwhile
    path = latest_manifest(directory)
    if path is None:
        unfinished = (directory / "staging").is_dir()
        raise NotFoundError(
            f"{directory} holds a build that is not finished; run its wherefrom build command again to go on"
            if unfinished
            else f"{directory} is not a Wherefrom index (it has no manifests/); name the directory given to wherefrom build --out"
        )
    if recorded > manifest_numbers(directory)[-1]:
        raise IntegrityError(
            f"{manifest_path(directory, recorded)} is missing, the newest state of the index (it may have deleted rows); restore it, or "
            f"remove {directory / 'manifests' / _LATEST} to go on with the state before it"
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
            f"{directory} has format version {content.get('version')!r}, this Wherefrom reads {FORMAT_VERSION}; "
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
    _check_consistent(path, manifest)
    return manifest


def _check_consistent(path: Path, manifest: Manifest) -> None:
    """Refuse a manifest whose parts contradict one another: another number than its name's, duplicate components, layers that overlap."""
    if int(path.stem) != manifest.number:
        raise IntegrityError(f"{path} is manifest {manifest.number} under another's name; restore it or build the index again")
    if bool(manifest.deleted) != ("deleted" in manifest.features) or manifest.deleted > manifest.rows:
        raise IntegrityError(f"{path} is damaged: its features do not tell whether rows were deleted; build the index again")
    if len({component.name for component in manifest.components}) < len(manifest.components):
        raise IntegrityError(f"{path} is damaged: it names a component twice; build the index again")
    for component in manifest.components:
        if component.model >= len(manifest.models):
            raise IntegrityError(
                f"{path} is damaged: component {component.name} is of a model that it does not name; build the index again"
            )
        offset, names, inputs = 0, set[str](), dict[str, tuple[int, int]]()
        for layer in component.layers if component.kind == "dense" else ():
            if layer.offset != offset:
                raise IntegrityError(f"{path} is damaged: layer {layer.name} does not begin where the one before it ends")
            shared = inputs.setdefault(layer.input_group, (layer.inputs, layer.input_rank))
            if layer.name in names or shared != (layer.inputs, layer.input_rank):
                raise IntegrityError(f"{path} is damaged: layer {layer.name} is a duplicate, or does not have the inputs of its group")
            if layer.output_rank > layer.outputs or layer.input_rank > layer.inputs:
                raise IntegrityError(f"{path} is damaged: layer {layer.name} has a rank above its size; build the index again")
            names.add(layer.name)
            offset += layer.size
