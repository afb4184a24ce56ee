"""Ground-truth packs: the losses of some queries after retraining on subsets of a training set.

A pack is a directory (docs/evaluation.md specifies it): `meta.json`, `ground_truth.npz` with the subsets and the losses, the training
examples and queries (JSON lines; or rows of MNIST's IDX files, stored elsewhere), and the model trained on all examples. Every part is
checked, since an inconsistent pack would otherwise give a meaningless figure.
"""

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..store.corpus import Document, read_corpus, usable
from ..store.errors import IntegrityError, NotFoundError, UsageError
from ..store.fields import Fields
from ..store.files import sha256
from ..store.shapes import Bool, Float32

Half = Literal["all", "even", "odd"]
_IMAGES = {
    "images": ("t10k-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte"),
    "labels": ("t10k-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte"),
}
_PIXEL_MEAN = 0.1307
_PIXEL_DEVIATION = 0.3081
_EPOCH = re.compile(r"model-epoch(\d+)")


@dataclass(frozen=True)
class Pack:
    """A pack, checked.

    Attributes:
        name: of its directory.
        task: "causal-lm" or "mlp".
        model: the model to index: a directory, or a safetensors file.
        masks: True for the training examples in each subset.
        losses: the queries' losses (nats) under the models trained on the subsets.
        train, queries: the documents, in the masks' and the losses' order.
        build: options that the pack sets for a build: the encoding of its documents in training.
        train_file: the training documents as JSON lines; None for images.
        append_token: the token at the end of each document; None without one.
        full_losses: the queries' losses under `model`, if the pack has them.
    """

    name: str
    task: str
    model: Path
    masks: Bool[np.ndarray, "subsets examples"]
    losses: Float32[np.ndarray, "subsets seeds queries"]
    train: tuple[Document, ...]
    queries: tuple[Document, ...]
    build: dict[str, Any]
    train_file: Path | None
    append_token: int | None
    full_losses: Float32[np.ndarray, " queries"] | None

    def half(self, which: Half) -> "Pack":
        """The pack with all queries, or those of even or odd number: tune on one half, report on the other.

        Raises:
            UsageError: no query in that half has losses that differ.
        """
        if which == "all":
            return self
        part = slice(0 if which == "even" else 1, None, 2)
        if not (self.losses[:, :, part].mean(axis=1).std(axis=0) > 0).any():
            raise UsageError(f"no {which}-numbered query of {self.name} has losses that differ; use all queries")
        full = None if self.full_losses is None else self.full_losses[part]
        return replace(self, losses=self.losses[:, :, part], queries=self.queries[part], full_losses=full)


def read_pack(directory: Path, data: Path | None = None) -> Pack:
    """Read and check a pack.

    Args:
        directory: the pack.
        data: directory of an image pack's IDX files; by default the pack, or `../../data` from there.

    Raises:
        NotFoundError: the pack or one of its files is missing.
        IntegrityError: its parts are inconsistent, or have invalid values.
    """
    meta = _meta(directory)
    truth = _truth(directory)
    packed_masks, losses = _read_arrays(directory, truth, meta)
    if "arch" in meta:
        pixels, labels = read_images(directory, data)
        train, queries = (_images(directory, pixels, labels, truth, name) for name in ("train_rows", "test_rows"))
        task = "mlp"
        build = {}
        append = None
        file = None
        model = directory / "model-0.safetensors"
    else:
        file = directory / str(meta.get("train_file", "train.jsonl"))
        train, queries = (_documents(directory, meta, kind) for kind in ("train", "query"))
        encoding = meta.get("encoding", {})
        append = encoding.get("append_token")
        for name, least in (("append_token", 0), ("max_tokens", 2)):
            value = encoding.get(name)
            if value is not None and (type(value) is not int or value < least):
                raise IntegrityError(f"{directory}/meta.json: {name} is {value!r}, not a whole number from {least}; make the pack again")
        task = "causal-lm"
        build = {"long": "truncate", "max_tokens": encoding.get("max_tokens"), "append_eos": append is not None}
        model = _last_model(directory)
    if not model.exists():
        raise NotFoundError(f"{model} is missing from the pack; restore it, or set model")
    unpacked = np.unpackbits(packed_masks, axis=1)
    if packed_masks.shape[1] != -(-len(train) // 8) or unpacked[:, len(train) :].any():
        raise IntegrityError(f"{directory}: the masks are not of its {len(train)} training examples; make the pack again")
    masks = unpacked[:, : len(train)].astype(bool)
    if losses.shape[2] != len(queries):
        raise IntegrityError(f"{directory}: there are losses of {losses.shape[2]} queries, but {len(queries)} queries; make the pack again")
    empty = ~masks.any(axis=1) | masks.all(axis=1)
    if empty.any() or len(np.unique(masks, axis=0)) < 2:
        raise IntegrityError(
            f"{directory}: subset {int(empty.argmax())} holds none or all of the examples, or all subsets are the same; make the pack again"
        )
    full = truth.get("full_losses")
    if full is not None and (full.dtype.kind != "f" or full.shape != losses.shape[2:] or not np.isfinite(full).all()):
        raise IntegrityError(
            f"{directory}: full_losses are not a finite number for each of the {len(queries)} queries; make the pack again"
        )
    return Pack(directory.resolve().name, task, model, masks, losses, train, queries, build, file, append, full)


def _meta(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise NotFoundError(f"there is no pack at {directory} (a directory with meta.json and ground_truth.npz)")
    try:
        meta = json.loads((directory / "meta.json").read_bytes())
    except FileNotFoundError as error:
        raise NotFoundError(f"{directory} is not a pack: it has no meta.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{directory}/meta.json cannot be read ({error}); restore it or make the pack again") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("encoding", {}), dict):
        raise IntegrityError(f"{directory}/meta.json does not describe a pack; restore it or make the pack again")
    return meta


def _truth(directory: Path) -> dict[str, np.ndarray]:
    path = directory / "ground_truth.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays}
    except FileNotFoundError as error:
        raise NotFoundError(f"{directory} is not a pack, or not a finished one: it has no ground_truth.npz") from error
    except Exception as error:  # zip, zlib and header parsing raise many kinds of error
        raise IntegrityError(f"{path} cannot be read ({error}); restore it or make the pack again") from error


def _read_arrays(directory: Path, truth: dict[str, np.ndarray], meta: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    for name in ("masks", "losses", *(("train_rows", "test_rows") if "arch" in meta else ())):
        if name not in truth:
            raise IntegrityError(f"{directory}/ground_truth.npz has no {name}; restore it or make the pack again")
    masks = truth["masks"]
    losses = truth["losses"]
    if masks.dtype != np.uint8 or masks.ndim != 2 or losses.ndim != 3 or not np.issubdtype(losses.dtype, np.floating):
        raise IntegrityError(
            f"{directory}: masks must be bit-packed bytes [subsets, examples / 8] and losses floats [subsets, seeds, queries]; they are "
            f"{masks.dtype} {list(masks.shape)} and {losses.dtype} {list(losses.shape)}"
        )
    if len(masks) != len(losses):
        raise IntegrityError(f"{directory}: there are masks of {len(masks)} subsets, but losses of {len(losses)}; make the pack again")
    if len(losses) < 2 or 0 in losses.shape:
        raise IntegrityError(f"{directory}: losses have shape {list(losses.shape)}; a pack needs at least two subsets, a seed and a query")
    if not np.isfinite(losses).all():
        subset, seed, query = np.argwhere(~np.isfinite(losses))[0]
        raise IntegrityError(f"{directory}: the loss of query {query} on subset {subset}, seed {seed}, is not a finite number")
    if (losses.mean(axis=1).std(axis=0) == 0).all():
        raise IntegrityError(
            f"{directory}: every query's loss is the same on all subsets, so there is nothing to rank; make the pack again"
        )
    return masks, losses


def _documents(directory: Path, meta: dict[str, Any], kind: str) -> tuple[Document, ...]:
    path = directory / str(meta.get(f"{kind}_file", f"{kind}.jsonl"))
    if not path.is_file():
        raise NotFoundError(f"the pack's file {path} is missing; restore it")
    checksums = meta.get("sha256", {})
    if isinstance(checksums, dict) and checksums.get(f"{kind}.jsonl", sha256(path)) != sha256(path):
        raise IntegrityError(f"{path} is not the file that the pack was made with (SHA-256 differs); restore it or make the pack again")
    return tuple(usable(read_corpus([str(path)], Fields())))


def _last_model(directory: Path) -> Path:
    models = [(int(m[1]), p) for p in directory.iterdir() if (m := _EPOCH.fullmatch(p.name)) and p.is_dir()]
    return max(models)[1] if models else directory / "model-epoch1"


def read_images(directory: Path, data: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Read the images and labels of an image pack's IDX files; see `read_pack`."""
    places = [data] if data else [directory, directory.resolve().parents[1] / "data"]
    arrays = {}
    for kind, names in _IMAGES.items():
        paths = [place / name for place in places for name in names if (place / name).is_file()]
        if not paths:
            raise NotFoundError(f"there is no {names[0]} in {' or '.join(map(str, places))}; set data to the directory of the IDX files")
        arrays[kind] = _idx(paths[0])
    images = arrays["images"]
    labels = arrays["labels"]
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise IntegrityError(f"the IDX files have arrays of shapes {images.shape} and {labels.shape}, not images and their labels")
    return images, labels


def _idx(path: Path) -> np.ndarray:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", dimensions, 4)
        if content[:3] != b"\0\0\x08" or not 1 <= dimensions <= 3:
            raise ValueError("its first bytes are not those of bytes in IDX format")
        return np.frombuffer(content, np.uint8, int(shape.prod()), 4 + 4 * dimensions).reshape(shape)
    except (OSError, ValueError, IndexError, EOFError, zlib.error) as error:
        raise IntegrityError(f"{path} is not a complete IDX file ({error}); fetch it again") from error


def _images(directory: Path, images: np.ndarray, labels: np.ndarray, truth: dict[str, np.ndarray], name: str) -> tuple[Document, ...]:
    rows = truth[name]
    if (
        rows.ndim != 1
        or not np.issubdtype(rows.dtype, np.integer)
        or len(rows) == 0
        or rows.min() < 0
        or rows.max() >= len(images)
        or len(set(rows.tolist())) < len(rows)
    ):
        raise IntegrityError(f"{directory}: {name} has duplicates, or indices outside the {len(images)} images; check data")
    scaled = ((images[rows].reshape(len(rows), -1) / 255.0 - _PIXEL_MEAN) / _PIXEL_DEVIATION).astype(np.float32)
    return tuple(
        Document(id=f"{name}-{i}", source="mnist", where=f"image {row}", features=scaled[i], label=int(labels[row]))
        for i, row in enumerate(rows)
    )


def write_documents_file(documents: Sequence[Document], path: Path) -> None:
    """Write documents of any form as JSON lines that a build can read."""
    if not documents:
        raise UsageError("there are no documents to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for d in documents:
            if d.features is not None:
                content: dict[str, Any] = {"features": d.features.tolist(), "label": d.label}
            elif d.completion is not None:
                content = {"prompt": d.prompt, "completion": d.completion}
            else:
                content = {"messages": d.messages} if d.messages is not None else {"text": d.text}
            file.write(json.dumps({"id": d.id, "source": d.source, **content, **d.metadata}, ensure_ascii=False, default=str) + "\n")
