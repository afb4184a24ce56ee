"""The encoder that recomputes candidates' rows without projection, in the folder `rerank/` of an index; rows of it are never stored.

    rerank/rerank.json               the components of recomputed rows, and which encoder of the index they go with
    rerank/<uuid>.safetensors        the curvature of the dense component, in the form of the index's encoder

The file can be made again from the index and its model (`wherefrom fit`), so no manifest names it.
"""

import copy
import uuid
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import IncompatibleError, IntegrityError
from .files import publish, read_bytes, write_tensors, write_whole
from .index import Index, array_problem, file_problem
from .manifest import DenseComponent, FileRecord, SparseComponent
from .objects import fetched

_FOLDER = "rerank"
_RECORD = "rerank.json"
_FORMAT = "wherefrom rerank 1"


class RerankRecord(BaseModel):
    """Record of the encoder of recomputed rows.

    Attributes:
        encoder: SHA-256 of the encoder of the index, which its sparse components share.
        components: with their weights; the dense one has all layers inside the blocks, without projection.
        file: the arrays of the dense component.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["wherefrom rerank 1"] = _FORMAT  # type: ignore[assignment]
    encoder: str
    components: tuple[Annotated[DenseComponent | SparseComponent, Field(discriminator="kind")], ...] = Field(min_length=1)
    file: FileRecord

    @model_validator(mode="after")
    def _check(self) -> "RerankRecord":
        """Refuse components that cannot be those of recomputed rows."""
        dense = [component for component in self.components if component.role == "blocks"]
        names = {component.name for component in self.components}
        if len(dense) != 1 or len(names) != len(self.components) or any(c.model != 0 or c.weight < 0 for c in self.components):
            raise ValueError("its components are not one for each part of one model")
        (blocks,) = dense
        is_whole = all(layer.input_rank == layer.inputs and layer.output_rank == layer.outputs for layer in blocks.layers)
        if not is_whole or blocks.coordinates is not None or any(layer.curvature != "ekfac" for layer in blocks.layers):
            raise ValueError("its blocks are not EK-FAC of whole layers")
        if not self.file.path.startswith(f"{_FOLDER}/"):
            raise ValueError(f"its file is not in the folder {_FOLDER}")
        return self

    @property
    def dense(self) -> DenseComponent:
        """The component without projection."""
        return next(component for component in self.components if component.role == "blocks")


def write_rerank(index: Index, components: tuple[DenseComponent | SparseComponent, ...], arrays: Mapping[str, np.ndarray]) -> RerankRecord:
    """Write the encoder of recomputed rows, in place of an earlier one.

    Args:
        arrays: of the dense component, with its name before them.

    Raises:
        StorageError: a file cannot be written.
    """
    folder = index.path / _FOLDER
    path = folder / f"{uuid.uuid4()}.safetensors"
    staged = path.with_name(f".{path.name}")
    try:
        write_tensors(staged, arrays)
        publish(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    record = RerankRecord(encoder=index.manifest.encoder.sha256, components=components, file=FileRecord.of(index.path, path))
    write_whole(folder / _RECORD, record.model_dump_json(indent=1).encode())
    for other in folder.glob("*.safetensors"):
        if other != path and other.is_file():
            other.unlink()
    return record


def read_record(index: Index) -> RerankRecord | None:
    """Read the record of the encoder of recomputed rows; None if the index has none.

    Raises:
        IncompatibleError: it is of another version, or of another encoder.
        IntegrityError: it is damaged.
    """
    path = index.path / _FOLDER / _RECORD
    if not path.exists() and not path.is_symlink():
        return None
    try:
        record = RerankRecord.model_validate_json(read_bytes(path))
    except ValidationError as error:
        if error.errors()[0]["loc"] == ("format",):
            raise IncompatibleError(
                f"{path} is not of this version ({_FORMAT}); run wherefrom fit again, or remove {path.parent}"
            ) from error
        raise IntegrityError(f"{path} is damaged ({error.errors()[0]['msg']}); run wherefrom fit again, or remove {path.parent}") from error
    except OSError as error:
        raise IntegrityError(f"{path} is damaged ({error}); run wherefrom fit again, or remove {path.parent}") from error
    components = {component.name: component for component in index.manifest.components}
    for component in record.components:
        same = components.get(component.name)
        if component.role != "blocks" and (same is None or component != same.model_copy(update={"weight": component.weight})):
            raise IntegrityError(
                f"{path} is damaged ({component.name} is not the index's); run wherefrom fit again, or remove {path.parent}"
            )
    if record.encoder != index.manifest.encoder.sha256:
        raise IncompatibleError(f"{path} is of another encoder than the index has; run wherefrom fit again, or remove {path.parent}")
    return record


def rerank_problems(index: Index) -> Iterator[tuple[str, str | None]]:
    """Check the files of the encoder of recomputed rows: yield (relative path, problem or None) as `Index.verify` does."""
    try:
        record = read_record(index)
        if record is not None:
            rerank_view(index)
            yield record.file.path, None
    except (IncompatibleError, IntegrityError) as error:
        yield f"{_FOLDER}/{_RECORD}", str(error)


def rerank_view(index: Index) -> Index | None:
    """A view of an index whose components are those of recomputed rows, with their arrays; None if it has no encoder for them.

    Its stored rows are not of these components.

    Raises:
        IncompatibleError, IntegrityError: see `read_record`; the arrays are damaged or do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    record = read_record(index)
    if record is None:
        return None
    path = index.path / record.file.path
    problem = file_problem(index.path, record.file)
    if problem is None:
        try:
            dense = load_file(fetched(path))
            problem = array_problem(record.dense, dense)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{path} is not a whole safetensors file ({error})"
    if problem is not None:
        raise IntegrityError(f"{problem}; run wherefrom fit again, or remove {index.path / _FOLDER}")
    sparse_names = {component.name for component in record.components if component.role != "blocks"}
    sparse_arrays = {name: array for name, array in index.arrays.items() if name.split("/", 1)[0] in sparse_names}
    view = copy.copy(index)
    view.manifest = index.manifest.model_copy(update={"components": record.components, "slope": None})
    view.__dict__["arrays"] = sparse_arrays | dense
    return view
