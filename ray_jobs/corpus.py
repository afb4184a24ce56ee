"""The first stage of a build: conversion of the corpus to shards of tokenized examples on disk, with a check that ids are unique.

It is one streaming pass in the driver, since tokenizers use every core by themselves. All later stages read the shards. The corpus is
written to `staging/examples.json` last, so a resumed build uses the shards that are named there and no others.
"""

import hashlib
import json
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from ..indexer.examples import DocumentConverter
from ..indexer.tasks import find_task
from ..store.corpus import Corpus
from ..store.documents import Documents, Example, stored_bytes, write_documents
from ..store.errors import DataError
from ..store.fields import Fields
from ..store.files import publish, read_json, sha256, write_whole
from ..store.manifest import UnreadFiles
from ..store.shard import derived_id, documents_path
from .config import BuildConfig
from .progress import Reporter

_REPORTED = 20
_SHARD_BYTES = 1 << 28


class WrittenShard(BaseModel):
    """A shard whose rows are to be built.

    Attributes:
        first: number of its first row in the index.
        tokens: number of input tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str
    first: int
    rows: int
    tokens: int
    documents_sha256: str


class WrittenCorpus(BaseModel):
    """All shards of a corpus, and a record of its documents.

    Attributes:
        documents: number of usable documents; `split` and `truncated` are those that were longer than the longest example.
        skipped: number of documents that could not be used, and in `skipped_first` the errors of the first ones.
        unread: the files in the corpus's folders that are not read.
        left_out_columns: the columns that an index cannot hold, each with a description of its content.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    shards: tuple[WrittenShard, ...]
    documents: int
    split: int
    truncated: int
    skipped: int
    skipped_first: tuple[str, ...]
    unread: UnreadFiles
    left_out_columns: dict[str, str]

    def omissions(self) -> dict[str, Any]:
        """Return the files and columns of the corpus that the index does not hold, for its record."""
        return {"unread": self.unread, "left_out_columns": self.left_out_columns}

    @property
    def rows(self) -> int:
        """Number of examples in all shards."""
        return sum(s.rows for s in self.shards)

    def counts(self) -> dict[str, Any]:
        """Return the counts of documents for the record of the index."""
        return self.model_dump(include={"documents", "split", "truncated", "skipped", "skipped_first"})


def corpus_fields(config: BuildConfig) -> Fields:
    """Return the fields of the corpus, in the form that the task needs."""
    form = find_task(config.task).form
    return config.fields if form == "auto" else replace(config.fields, form=form)


def write_corpus(
    config: BuildConfig,
    converter: DocumentConverter,
    out: Path,
    fingerprint: str,
    shard_rows: int,
    reporter: Reporter,
    vocabulary: int | None = None,
) -> WrittenCorpus:
    """Read, tokenize, split and write the corpus, or return the corpus of an earlier run.

    Args:
        shard_rows: examples in a shard; fewer if their text and metadata would be larger than `_SHARD_BYTES`.
        vocabulary: number of tokens that the model embeds; an example with another token cannot be used.

    Raises:
        DataError: there is no usable document, a document cannot be used (with `bad_documents` error), or an id is not unique.
    """
    record_file = out / "staging" / "examples.json"
    earlier = _read_written(out, record_file)
    if earlier is not None:
        return earlier
    reporter.stage("reading the corpus", None)
    shards: list[WrittenShard] = []
    pending: list[Example] = []
    hashes = array("Q")
    counts = {"examples": 0, "tokens": 0, "documents": 0, "split": 0, "truncated": 0}
    skipped: list[str] = []
    skipped_count = 0

    def flush() -> None:
        id = derived_id(fingerprint, len(shards))
        staged = out / "staging" / f"{id}.arrow"
        write_documents(staged, pending)
        digest = sha256(staged)
        path = documents_path(out, id)
        path.unlink(missing_ok=True)
        publish(staged, path)
        first = shards[-1].first + shards[-1].rows if shards else 0
        tokens = sum(e.tokens for e in pending)
        shards.append(WrittenShard(id=id, first=first, rows=len(pending), tokens=tokens, documents_sha256=digest))
        pending.clear()

    corpus = Corpus(config.sources, corpus_fields(config))
    pending_bytes = 0
    for encoded in converter.documents(corpus):
        example = _check_tokens(encoded, vocabulary)
        if isinstance(example, DataError):
            if config.bad_documents == "error":
                raise DataError(f"{example} (`bad_documents=skip` leaves such documents out and counts them)")
            skipped_count += 1
            skipped += [str(example)] if len(skipped) < _REPORTED else []
            continue
        _count(counts, example)
        hashes.append(int.from_bytes(hashlib.blake2b(example.id.encode(), digest_size=8).digest(), "little"))
        pending.append(example)
        pending_bytes += stored_bytes(example)
        if len(pending) == shard_rows or pending_bytes > _SHARD_BYTES:
            flush()
            pending_bytes = 0
            reporter.update(counts["examples"], counts["tokens"])
    if pending:
        flush()
    reporter.update(counts["examples"], counts["tokens"])
    if not shards:
        raise DataError(
            f"there is no usable document in {', '.join(config.sources)}; "
            + (f"fix them, the first of {skipped_count}: {skipped[0]}" if skipped else "check `data`")
        )
    _refuse_repeated_ids(out, shards, np.frombuffer(hashes, np.uint64))
    written = WrittenCorpus(
        shards=tuple(shards),
        documents=counts["documents"],
        split=counts["split"],
        truncated=counts["truncated"],
        skipped=skipped_count,
        skipped_first=tuple(skipped),
        unread=UnreadFiles(files=len(corpus.unread), first=tuple(map(str, corpus.unread[:_REPORTED]))),
        left_out_columns=corpus.left_out,
    )
    write_whole(record_file, written.model_dump_json().encode())
    return written


def _count(counts: dict[str, int], example: Example) -> None:
    """Count an example. Chunk 0 also counts its document, and chunk 1 counts the document as split."""
    counts["documents"] += example.chunk == 0
    counts["split"] += example.chunk == 1
    counts["truncated"] += example.truncated
    counts["examples"] += 1
    counts["tokens"] += example.tokens


def _check_tokens(example: Example | DataError, vocabulary: int | None) -> Example | DataError:
    """Return an example whose tokens the model embeds, or an error."""
    if isinstance(example, DataError) or vocabulary is None or not len(example.token_ids) or example.token_ids.max() < vocabulary:
        return example
    return DataError(
        f"example {example.id!r} has token {example.token_ids.max()}, the model embeds only {vocabulary}; use the model's own tokenizer"
    )


def _read_written(out: Path, record_file: Path) -> WrittenCorpus | None:
    """Read the corpus of an earlier run; None if there is none, or one of its shards is missing or differs."""
    if not record_file.is_file():
        return None
    written = WrittenCorpus.model_validate_json(json.dumps(read_json(record_file)))
    paths = [documents_path(out, shard.id) for shard in written.shards]
    whole = all(path.is_file() and sha256(path) == shard.documents_sha256 for path, shard in zip(paths, written.shards, strict=True))
    return written if whole else None


def _refuse_repeated_ids(out: Path, shards: list[WrittenShard], hashes: np.ndarray) -> None:
    """Refuse ids that are not unique. Only ids with equal 64-bit hashes are read, so memory holds 8 bytes for each example."""
    unique, counts = np.unique(hashes, return_counts=True)
    suspects = set(np.flatnonzero(np.isin(hashes, unique[counts > 1])).tolist()) if len(unique) < len(hashes) else set()
    seen: dict[str, Example] = {}
    for shard in shards if suspects else ():
        documents = Documents(documents_path(out, shard.id), shard.rows)
        for row in sorted(suspects & set(range(shard.first, shard.first + shard.rows))):
            example = documents[row - shard.first]
            if example.id in seen:
                raise DataError(
                    f"duplicate id {example.id!r} in the corpus (sources {seen[example.id].source} and {example.source}); ids must "
                    "be unique: fix them, or name another column for id in `fields`"
                )
            seen[example.id] = example
