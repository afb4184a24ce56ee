"""The first stage of a build: the corpus becomes shards of examples on disk, tokenized, with ids that are known to be unique.

It runs in the driver, in one streaming pass (tokenizers use every core by themselves); all later stages read the shards. What it
found is written to `staging/examples.json` last, so a build that is taken up again trusts the shards named there and no others.
"""

import hashlib
import json
import uuid
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..indexer.examples import DocumentEncoder
from ..store.corpus import Corpus, unread_record
from ..store.documents import Documents, Example, stored_bytes, write_documents
from ..store.errors import DataError
from ..store.fields import Fields
from ..store.files import publish, read_json, sha256, write_whole
from ..store.manifest import UnreadFiles
from ..store.shard import documents_path
from .config import BuildConfig
from .progress import Reporter

_REPORTED = 20
_SHARD_BYTES = 1 << 28


@dataclass(frozen=True)
class ShardPlan:
    """A shard that is to be built: rows `first` to `first + rows`, with so many input tokens."""

    id: str
    first: int
    rows: int
    tokens: int
    documents_sha256: str


@dataclass(frozen=True)
class CorpusPlan:
    """All shards, and what became of documents that were too long or could not be used.

    Attributes:
        unread: of files in the corpus's folders that are not read, how many, and the first with the reasons.
        left_out_columns: column -> what it holds, of those that cannot be kept.
    """

    shards: tuple[ShardPlan, ...]
    documents: int
    split: int
    truncated: int
    skipped: int
    skipped_first: tuple[str, ...]
    unread: dict[str, Any]
    left_out_columns: dict[str, str]

    def not_kept(self) -> dict[str, Any]:
        """What of the corpus the index does not hold, for its record."""
        unread = UnreadFiles(files=self.unread["files"], first=tuple(self.unread["first"]))
        return {"unread": unread, "left_out_columns": self.left_out_columns}

    @property
    def rows(self) -> int:
        """Examples in all shards."""
        return sum(s.rows for s in self.shards)

    @property
    def tokens(self) -> int:
        """Input tokens in all shards."""
        return sum(s.tokens for s in self.shards)

    def counts(self) -> dict[str, Any]:
        """What became of the documents, as an index records it."""
        names = ("documents", "split", "truncated", "skipped", "skipped_first")
        return {name: getattr(self, name) for name in names}


def shard_id(fingerprint: str, number: int) -> str:
    """The name of a build's n-th shard: the same for the same build, so that it finds its own shards again."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"wherefrom:{fingerprint}:{number}"))


def plan_corpus(
    config: BuildConfig,
    fields: Fields,
    encoder: DocumentEncoder,
    out: Path,
    fingerprint: str,
    shard_rows: int,
    reporter: Reporter,
    vocabulary: int | None = None,
) -> CorpusPlan:
    """Read, tokenize, cut and write the corpus, or find that an earlier run did.

    Args:
        shard_rows: examples in a shard; fewer where these would fill more than `_SHARD_BYTES` with text and metadata.
        vocabulary: how many tokens the model embeds; an example with another token cannot be used.

    Raises:
        DataError: no usable document, a bad one (unless they are to be skipped), or an id that stands twice.
    """
    done = out / "staging" / "examples.json"
    known = _read_plan(out, done)
    if known is not None:
        return known
    reporter.stage("reading the corpus", None)
    shards: list[ShardPlan] = []
    pending: list[Example] = []
    hashes = array("Q")
    counts = {"examples": 0, "tokens": 0, "documents": 0, "split": 0, "truncated": 0}
    skipped: list[str] = []
    skipped_count = 0

    def flush() -> None:
        number, tokens = len(shards), sum(e.tokens for e in pending)
        id = shard_id(fingerprint, number)
        staged = out / "staging" / f"{id}.arrow"
        write_documents(staged, pending)
        digest = sha256(staged)
        path = documents_path(out, id)
        path.unlink(missing_ok=True)
        publish(staged, path)
        first = shards[-1].first + shards[-1].rows if shards else 0
        shards.append(ShardPlan(id, first, len(pending), tokens, digest))
        pending.clear()

    read = Corpus(config.sources, fields)
    held = 0
    for encoded in encoder.documents(read):
        example = _usable(encoded, vocabulary)
        if isinstance(example, DataError):
            if config.bad_documents == "error":
                raise DataError(f"{example} (`bad_documents` skip leaves such documents out and counts them)")
            skipped_count += 1
            skipped += [str(example)] if len(skipped) < _REPORTED else []
            continue
        _count(counts, example)
        hashes.append(int.from_bytes(hashlib.blake2b(example.id.encode(), digest_size=8).digest(), "little"))
        pending.append(example)
        held += stored_bytes(example)
        if len(pending) == shard_rows or held > _SHARD_BYTES:
            flush()
            held = 0
            reporter.update(counts["examples"], counts["tokens"])
    if pending:
        flush()
    reporter.update(counts["examples"], counts["tokens"])
    if not shards:
        raise DataError(
            f"there is no usable document in {', '.join(config.sources)}"
            + (f"; the first of {skipped_count}: {skipped[0]}" if skipped else "")
        )
    _refuse_repeated_ids(out, shards, np.frombuffer(hashes, np.uint64))
    told = {name: counts[name] for name in ("documents", "split", "truncated")}
    lost = {"skipped": skipped_count, "skipped_first": tuple(skipped), "unread": unread_record(read.unread)}
    plan = CorpusPlan(tuple(shards), **told, **lost, left_out_columns=read.left_out)  # type: ignore[arg-type]
    write_whole(done, json.dumps(asdict(plan)).encode())
    return plan


def _count(counts: dict[str, int], example: Example) -> None:
    counts["documents"] += example.chunk == 0
    counts["split"] += example.chunk == 1
    counts["truncated"] += example.truncated
    counts["examples"] += 1
    counts["tokens"] += example.tokens


def _usable(example: Example | DataError, vocabulary: int | None) -> Example | DataError:
    if isinstance(example, DataError) or vocabulary is None or not len(example.token_ids) or example.token_ids.max() < vocabulary:
        return example
    return DataError(
        f"example {example.id!r} has token {example.token_ids.max()}, the model embeds only {vocabulary}; tokenizer and model do not fit"
    )


def _read_plan(out: Path, done: Path) -> CorpusPlan | None:
    if not done.is_file():
        return None
    content = read_json(done)
    shards = tuple(ShardPlan(**s) for s in content.pop("shards"))
    for shard in shards:
        path = documents_path(out, shard.id)
        if not path.is_file() or sha256(path) != shard.documents_sha256:
            return None
    content["skipped_first"] = tuple(content["skipped_first"])
    return CorpusPlan(shards, **content)


def _refuse_repeated_ids(out: Path, shards: list[ShardPlan], hashes: np.ndarray) -> None:
    """Ids are compared by 64-bit hash (8 bytes an example in memory); only where two are equal are the ids themselves read."""
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
