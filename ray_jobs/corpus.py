"""The first stage of a build: conversion of the corpus to shards of tokenized examples on disk, with a check that ids are unique.

The corpus is divided into pieces, by its files alone, so that any number of workers writes the same shards. A worker reads, tokenizes and
writes a piece. A file that only this machine has is read here. A piece's record is written last, so a resumed build goes on with the pieces
that are not finished.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ..indexer.encoder import Progress, ignore_progress
from ..indexer.examples import DocumentConverter
from ..indexer.tasks import find_task
from ..store.corpus import Corpus, Slice, check_columns
from ..store.documents import Documents, Example, stored_bytes, write_documents
from ..store.errors import DataError
from ..store.fields import Fields
from ..store.files import publish, read_bytes, sha256, staging_folder, write_whole
from ..store.manifest import UnreadFiles
from ..store.shard import derived_id, documents_path
from .config import BuildConfig
from .executor import Executor
from .progress import Reporter, Silent

_REPORTED = 20
_SHARD_BYTES = 1 << 28
_PIECES = 64
_LEAST_PIECE = 1 << 18
_LARGEST_PIECE = 1 << 26
_ID_BYTES = 8  # of an id's hash


class WrittenShard(BaseModel):
    """A shard whose rows are to be built.

    Attributes:
        first: number of its first row in the index; in the record of a piece, in the piece.
        tokens: number of input tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str
    first: int
    rows: int
    tokens: int
    documents_sha256: str


class _Written(BaseModel):
    """Shards, and a record of their documents.

    Attributes:
        documents: number of usable documents; `split` and `truncated` are those that were longer than the longest example.
        skipped: number of documents that could not be used, and in `skipped_first` the errors of the first ones.
        left_out_columns: the columns that an index cannot hold, each with a description of its content.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_bytes="base64", val_json_bytes="base64")

    shards: tuple[WrittenShard, ...]
    documents: int
    split: int
    truncated: int
    skipped: int
    skipped_first: tuple[str, ...]
    left_out_columns: dict[str, str]


class WrittenPiece(_Written):
    """The shards of a piece of the corpus, and a record of its documents.

    Attributes:
        columns: names of the columns.
        id_hashes: 64-bit hashes of the examples' ids, in order.
    """

    columns: tuple[str, ...]
    id_hashes: bytes


class WrittenCorpus(_Written):
    """All shards of a corpus, and a record of its documents.

    Attributes:
        unread: the files in the corpus's folders that are not read.
    """

    unread: UnreadFiles

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


@dataclass(frozen=True)
class CorpusWriter:
    """Settings that all pieces of a corpus are written with.

    Attributes:
        out: directory of the index.
        fingerprint: of the build, by which shards are named.
        shard_rows: examples in a shard; fewer if their text and metadata would be larger than `_SHARD_BYTES`, and at the end of a piece.
        max_tokens: tokens of the longest example.
        vocabulary: number of tokens that the model embeds; an example with another token cannot be used.
    """

    out: Path
    fingerprint: str
    shard_rows: int
    max_tokens: int
    vocabulary: int | None

    def write(
        self, config: BuildConfig, converter: DocumentConverter, number: int, slices: Sequence[Slice], progress: Progress
    ) -> WrittenPiece:
        """Read, tokenize, split and write the documents of a piece, or return the record of an earlier run.

        Raises:
            DataError: a document cannot be used (with `bad_documents` error).
        """
        record_file = staging_folder(self.out) / f"piece-{number}.json"
        earlier = self._read_written(record_file)
        if earlier is not None:
            progress(sum(shard.rows for shard in earlier.shards), sum(shard.tokens for shard in earlier.shards))
            return earlier
        corpus = Corpus.of(slices, corpus_fields(config))
        shards: list[WrittenShard] = []
        pending: list[Example] = []
        pending_bytes = 0
        hashes = bytearray()
        counts = {"documents": 0, "split": 0, "truncated": 0}
        skipped: list[str] = []
        skipped_count = 0
        for encoded in converter.documents(corpus):
            example = _check_tokens(encoded, self.vocabulary)
            if isinstance(example, DataError):
                if config.bad_documents == "error":
                    raise DataError(f"{example} (`bad_documents=skip` leaves such documents out and counts them)")
                skipped_count += 1
                skipped += [str(example)] if len(skipped) < _REPORTED else []
                continue
            _count(counts, example)
            hashes += hashlib.blake2b(example.id.encode(), digest_size=_ID_BYTES).digest()
            pending.append(example)
            pending_bytes += stored_bytes(example)
            if len(pending) == self.shard_rows or pending_bytes > _SHARD_BYTES:
                shards.append(self._write_shard(number, shards, pending))
                progress(shards[-1].rows, shards[-1].tokens)
                pending = []
                pending_bytes = 0
        if pending:
            shards.append(self._write_shard(number, shards, pending))
            progress(shards[-1].rows, shards[-1].tokens)
        written = WrittenPiece(
            shards=tuple(shards),
            **counts,
            skipped=skipped_count,
            skipped_first=tuple(skipped),
            columns=tuple(sorted(corpus.columns)),
            left_out_columns=corpus.left_out,
            id_hashes=bytes(hashes),
        )
        write_whole(record_file, written.model_dump_json().encode())
        return written

    def _write_shard(self, piece: int, shards: Sequence[WrittenShard], examples: Sequence[Example]) -> WrittenShard:
        """Write the shard that follows some of the same piece."""
        id = derived_id(f"{self.fingerprint}:{piece}", len(shards))
        staged = staging_folder(self.out) / f"{id}.arrow"
        write_documents(staged, examples)
        digest = sha256(staged)
        path = documents_path(self.out, id)
        path.unlink(missing_ok=True)
        publish(staged, path)
        first = shards[-1].first + shards[-1].rows if shards else 0
        return WrittenShard(id=id, first=first, rows=len(examples), tokens=sum(e.tokens for e in examples), documents_sha256=digest)

    def _read_written(self, record_file: Path) -> WrittenPiece | None:
        """Read the record of a piece that an earlier run wrote; None if there is none, or one of its shards is missing or differs."""
        if not record_file.is_file():
            return None
        try:
            written = WrittenPiece.model_validate_json(read_bytes(record_file))
        except ValidationError:
            return None
        paths = [documents_path(self.out, shard.id) for shard in written.shards]
        whole = all(path.is_file() and sha256(path) == shard.documents_sha256 for path, shard in zip(paths, written.shards, strict=True))
        return written if whole else None


def write_corpus(
    config: BuildConfig, writer: CorpusWriter, executor: Executor, converter: Callable[[], DocumentConverter], reporter: Reporter
) -> WrittenCorpus:
    """Write the corpus on the workers, without what an earlier run wrote.

    Args:
        converter: returns the converter, for pieces with files that workers do not see.

    Raises:
        DataError: there is no usable document, a document cannot be used (with `bad_documents` error), or an id is not unique.
    """
    corpus = Corpus(config.sources, corpus_fields(config))
    pieces = corpus.divide(min(_LARGEST_PIECE, max(_LEAST_PIECE, corpus.bytes // _PIECES)))
    if config.address is not None:
        pieces = [tuple(slice.with_checksum() for slice in piece) for piece in pieces]
    pieces = _with_line_numbers(pieces, executor)
    reporter.stage("reading the corpus", None)
    written: list[WrittenPiece] = []
    columns: set[str] = set()
    own_converter = cache(converter)
    for number, result in enumerate(executor.map("write_documents", (writer,), list(enumerate(pieces)), reporter)):
        written.append(result or writer.write(config, own_converter(), number, pieces[number], ignore_progress))
        columns.update(written[-1].columns)
        check_columns(columns, pieces[number][-1].name)
    skipped = [error for piece in written for error in piece.skipped_first][:_REPORTED]
    skipped_count = sum(piece.skipped for piece in written)
    shards: list[WrittenShard] = []
    for shard in (shard for piece in written for shard in piece.shards):
        first = shards[-1].first + shards[-1].rows if shards else 0
        shards.append(shard.model_copy(update={"first": first}))
    if not shards:
        raise DataError(
            f"there is no usable document in {', '.join(config.sources)}; "
            + (f"fix them, the first of {skipped_count}: {skipped[0]}" if skipped else "check `data`")
        )
    _refuse_repeated_ids(writer.out, shards, np.frombuffer(b"".join(piece.id_hashes for piece in written), "<u8"))
    left_out: dict[str, str] = {}
    for piece in written:
        left_out |= piece.left_out_columns
    return WrittenCorpus(
        shards=tuple(shards),
        documents=sum(piece.documents for piece in written),
        split=sum(piece.split for piece in written),
        truncated=sum(piece.truncated for piece in written),
        skipped=skipped_count,
        skipped_first=tuple(skipped),
        unread=UnreadFiles(files=len(corpus.unread), first=tuple(map(str, corpus.unread[:_REPORTED]))),
        left_out_columns=left_out,
    )


def _with_line_numbers(pieces: Sequence[tuple[Slice, ...]], executor: Executor) -> list[tuple[Slice, ...]]:
    """Return pieces whose ranges of lines have the number of their first line."""
    ranges = [slice for piece in pieces for slice in piece if slice.range is not None and slice.source.has_lines]
    numbered: dict[tuple[str, int], Slice] = {}
    lines_before: dict[str, int] = {}
    counts = executor.map("count_lines", (), [(slice,) for slice in ranges], Silent())
    for slice, count in zip(ranges, counts, strict=True):
        assert slice.range is not None
        first = lines_before.get(slice.name, 0)
        numbered[slice.name, slice.range.start] = replace(slice, range=slice.range._replace(first=first))
        lines_before[slice.name] = first + (slice.count_lines() if count is None else count)
    return [tuple(s if s.range is None else numbered.get((s.name, s.range.start), s) for s in piece) for piece in pieces]


def _count(counts: dict[str, int], example: Example) -> None:
    """Count an example. Chunk 0 also counts its document, and chunk 1 counts the document as split."""
    counts["documents"] += example.chunk == 0
    counts["split"] += example.chunk == 1
    counts["truncated"] += example.truncated


def _check_tokens(example: Example | DataError, vocabulary: int | None) -> Example | DataError:
    """Return an example whose tokens the model embeds, or an error."""
    if isinstance(example, DataError) or vocabulary is None or not len(example.token_ids) or example.token_ids.max() < vocabulary:
        return example
    return DataError(
        f"example {example.id!r} has token {example.token_ids.max()}, the model embeds only {vocabulary}; use the model's own tokenizer"
    )


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
