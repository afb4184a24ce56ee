"""Manifests: what an index is, in one JSON file that is created once and never changed.

The highest number under `manifests/` is the index. Every model below is strict: an unknown field, a missing one or a wrong type
is a damaged manifest, an unknown version or feature is one that a newer Whence wrote. Paths are relative and stay inside the index.
"""

import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import IncompatibleError, IntegrityError, NotFoundError, UsageError
from .files import create_only

FORMAT_VERSION = 1
FEATURES = frozenset({"deleted", "dense", "keyed", "reduced", "vectors"})
_NAME = re.compile(r"(\d{6,})\.json")


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise ValueError("must be a relative path inside the index")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
SegmentName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*(-[0-9]+)?$")]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
LayerCurvature = Literal["fisher", "ekfac", "kfac", "diagonal", "identity"]
CurvatureKind = Literal["auto", "fisher", "ekfac", "kfac", "diagonal", "identity"]
LabelKind = Literal["data", "sampled", "expected"]
ModelDtype = Literal["float32", "bfloat16", "float64"]
RowDtype = Literal["float32", "float16", "int8", "1bit"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileRecord(_Model):
    """A file that the manifest vouches for."""

    path: RelativePath
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Layer(_Model):
    """A tracked layer's block of a dense row: `output_rank * input_rank` coordinates from `offset` on."""

    name: str
    outputs: Size
    inputs: Size
    output_rank: Size
    input_rank: Size
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


class _Segment(_Model):
    name: SegmentName

    @property
    def part(self) -> str:
        """The name without the model's number: "blocks", "head" or "embeddings"."""
        return self.name.partition("-")[0]


class DenseSegment(_Segment):
    """A part of a row with its own layers, curvature and code; scores of segments add, times their weights.

    Attributes:
        model: which of the index's models, from 0.
        coordinates: stored of a row; None stores all. Fewer are a selection of the encoder's (its array `kept`) or a random projection.
        dtype: of a stored coordinate.
    """

    kind: Literal["dense"]
    model: Count
    weight: float
    coordinates: Size | None
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


class KeyedSegment(_Segment):
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

    kind: Literal["keyed"]
    model: Count
    weight: float
    role: Literal["head", "embeddings"]
    layer: str
    vocabulary: Size
    width: Size
    bits: Size
    others: Count
    keys: Size | None
    tail: bool
    seed: Count
    curvature: Curvature


Segment = Annotated[DenseSegment | KeyedSegment, Field(discriminator="kind")]


class Model(_Model):
    """Which model the rows came from; a query must come from the very same."""

    id: str
    revision: str | None
    dtype: ModelDtype
    fingerprint: str
    architecture: str
    parameters: Count
    context: int | None


class Tokenizer(_Model):
    """Which tokenizer made the token ids, its chat template included."""

    fingerprint: str


class Shard(_Model):
    """Rows `first` to `first + rows`: `rows/<id>.zarr` and `documents/<id>.arrow`."""

    id: Annotated[str, Field(pattern="^[0-9a-f-]{36}$")]
    first: Count
    rows: Size
    tokens: Count
    files: tuple[FileRecord, ...]


class Manifest(_Model):
    """The whole description of an index; see docs/format.md for the meaning of every field."""

    format: Literal["whence"] = "whence"
    version: Literal[1] = 1
    features: tuple[str, ...]
    number: Size
    created: str
    whence: str
    task: str
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    tokenizer: Tokenizer | None
    segments: Annotated[tuple[Segment, ...], Field(min_length=1)]
    encoder: FileRecord
    rows: Size
    tokens: Count
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]
    tombstones: tuple[Count, ...] = ()
    build: dict[str, Any]


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
    path = directory / "manifests" / f"{manifest.number:06d}.json"
    create_only(path, seal(manifest.model_dump(mode="json")))
    return path


def seal(content: dict[str, Any]) -> bytes:
    """A manifest's bytes, its own SHA-256 (over the same JSON without it, keys sorted, no spaces) in the field `checksum`."""
    return (json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n").encode()


def _checksum(content: dict[str, Any]) -> str:
    plain = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def latest_manifest(directory: Path) -> Path | None:
    """The manifest of the highest number, or None where there is none."""
    folder = directory / "manifests"
    if not folder.is_dir():
        return None
    numbered = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return max(numbered)[1] if numbered else None


def identity(path: Path) -> tuple[str, int, int, int]:
    """What tells a manifest's file from another, also from one of the same number in an index that took the place of this one."""
    found = path.stat()
    return path.name, found.st_ino, found.st_mtime_ns, found.st_size


def read_manifest(directory: Path) -> Manifest:
    """The newest manifest of an index.

    Raises:
        NotFoundError: no such directory, or no index in it.
        IncompatibleError: a format version or feature that this Whence does not know.
        IntegrityError: not what Whence wrote.
    """
    if not directory.is_dir():
        raise NotFoundError(f"there is no index at {directory}; build one with: whence build --out {directory} ...")
    path = latest_manifest(directory)
    if path is None:
        unfinished = (directory / "staging").is_dir()
        raise NotFoundError(
            f"{directory} holds a build that is not finished; run its whence build command again to go on"
            if unfinished
            else f"{directory} is not a Whence index (it has no manifests/); name the directory given to whence build --out"
        )
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON ({error}); restore it or build the index again") from error
    if not isinstance(content, dict) or content.get("format") != "whence":
        raise IntegrityError(f"{path} is not a Whence manifest; restore it or build the index again")
    if content.get("version") != FORMAT_VERSION:
        raise IncompatibleError(
            f"{directory} has format version {content.get('version')!r}, this Whence reads {FORMAT_VERSION}; use a newer Whence"
        )
    features = content.get("features")
    unknown = sorted(set(map(str, features if isinstance(features, list) else [])) - FEATURES)
    if unknown:
        raise IncompatibleError(f"{directory} needs the features {', '.join(unknown)}, which this Whence lacks; use a newer Whence")
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
    """Refuse a manifest whose parts contradict one another: row ranges that leave gaps, layers that overlap."""
    gone = manifest.tombstones
    if bool(gone) != ("deleted" in manifest.features) or any(b <= a for a, b in pairwise(gone)) or (gone and gone[-1] >= manifest.rows):
        raise IntegrityError(f"{path} is damaged: its deleted rows are not in order, or not rows of the index; build the index again")
    first = 0
    if len({shard.id for shard in manifest.shards}) != len(manifest.shards):
        raise IntegrityError(f"{path} is damaged: a shard stands in it twice; build the index again")
    for shard in manifest.shards:
        own = (f"rows/{shard.id}.zarr/", f"documents/{shard.id}.arrow")
        if not shard.files or not all(record.path.startswith(own) for record in shard.files):
            raise IntegrityError(f"{path} is damaged: shard {shard.id} does not name its own files; build the index again")
        if shard.first != first:
            raise IntegrityError(f"{path} is damaged: shard {shard.id} begins at row {shard.first}, not {first}; build the index again")
        first += shard.rows
    if first != manifest.rows:
        raise IntegrityError(f"{path} is damaged: its shards hold {first} rows, not {manifest.rows}; build the index again")
    for segment in manifest.segments:
        if segment.model >= len(manifest.models):
            raise IntegrityError(f"{path} is damaged: segment {segment.name} is of a model that it does not name; build the index again")
        offset = 0
        for layer in segment.layers if segment.kind == "dense" else ():
            if layer.offset != offset:
                raise IntegrityError(f"{path} is damaged: layer {layer.name} does not begin where the one before it ends")
            offset += layer.size
