"""An index that lives: examples are added under the encoder that there is, taken out, and the room that they took given back.

Every change publishes a new manifest and leaves the files of the one before, so that a reader keeps the snapshot that it opened; `prune`
removes what the newest manifest does not name.

Added rows are whitened with the curvature of the build. With H its second moment and H' that of the new examples, the mean squared length
of their rows is tr((H + a)^-1 H'): its ratio to that of the first rows is the *drift*, 1 where nothing has changed.
"""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256 as digest
from pathlib import Path
from typing import Any

import numpy as np

from ..indexer.encoder import EncoderPlan
from ..indexer.tasks import find_task
from ..store.arrays import ArrayFile
from ..store.corpus import describe_sources
from ..store.documents import Documents
from ..store.errors import DataError, IncompatibleError, UsageError
from ..store.files import PLAN, exclusive, read_json, write_whole
from ..store.index import Index
from ..store.manifest import Addition, Manifest, manifest_path
from ..store.shard import Shard, documents_path, open_rows, publish_index, rows_path
from .build import longest_example, not_finite, refresh_search, say_not_finite
from .config import BuildConfig, recorded_config
from .corpus import plan_corpus, shard_id
from .executor import Executor, Resources, open_executor
from .progress import Reporter, Silent
from .worker import Worker, absolute, document_encoder

_DRIFTED = 1.5
_OURS = ("rows/*.zarr.zip", "documents/*.arrow", "encoder/*.safetensors", "manifests/*.json", "manifests/*.zarr.zip")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def add(
    out: Path,
    data: Sequence[str],
    how: dict[str, Any] | None = None,
    models: Sequence[str] = (),
    reporter: Reporter | None = None,
    task: str | None = None,
) -> Manifest:
    """Add documents to an index.

    An interrupted call is taken up by the same call; one that was interrupted after it had published is recognized.

    Args:
        data: files, folders or hub datasets, of the same columns as the build's.
        how: options of `BuildConfig` that say how, not what: workers, threads, address, device, batch_tokens, trust_remote_code.
        models: where the models lie now, if they were moved.
        task: of an index that was built with a task of one's own, its name again, `module:Class` (an index names no code to run).

    Raises:
        IncompatibleError: a model or its tokenizer is not the one that the index was built with.
        DataError: an id is in the index already.
        BusyError: another process is writing there.
    """
    reporter = reporter or Silent()
    known = Index(out).manifest  # an error before the lock is made
    if ":" in known.task and known.task != task:
        raise UsageError(f"{out} was built with the task {known.task}, whose code runs only when you name it: `task` {known.task}")
    options = known.build.what.options.model_dump(mode="json")
    kept = {name: value for name, value in options.items() if name not in ("model", "revision", "task")}
    moved = {"model": tuple(models), "revision": None} if models else {}
    recorded = {"model": tuple(m.id for m in known.models), "revision": _revisions(known), "batch_tokens": known.build.batch_tokens}
    given = {name: value for name, value in (how or {}).items() if value is not None}
    own = recorded_config({**kept, **recorded, **moved, "task": known.task, "data": tuple(data), "out": str(out.resolve()), **given})
    own = replace(own, model=tuple(map(absolute, own.models)))
    if len(own.models) != len(known.models):
        raise UsageError(f"{out} was built with {len(known.models)} models, `model` names {len(own.models)}; name all in order")
    bases = () if models else tuple(m.base for m in known.models)
    sources = describe_sources(data)
    resources = Resources(own.workers, own.threads, own.address, own.device, ":" in own.task)
    with exclusive(out):
        known = Index(out).manifest
        call = digest(json.dumps({"encoder": known.encoder.sha256, "corpus": sources}, sort_keys=True).encode()).hexdigest()
        if known.build.added and (known.build.added[-1].call, known.build.added[-1].manifest) == (call, known.number):
            (out / "staging" / PLAN).unlink(missing_ok=True)  # published by a call that was then interrupted
            refresh_search(out, reporter)
            return known
        with open_executor(partial(Worker, own, bases), resources) as executor:
            return _add(out, own, bases, call, sources, executor, reporter)


def _add(
    out: Path,
    own: BuildConfig,
    bases: Sequence[str | None],
    call: str,
    sources: list[dict[str, Any]],
    executor: Executor,
    reporter: Reporter,
) -> Manifest:
    index = Index(out)
    known = index.manifest
    described, _, _ = executor.call("describe")
    if [m.fingerprint for m in described] != [m.fingerprint for m in known.models]:
        raise IncompatibleError(f"the model at {', '.join(own.models)} is not the one that {out} was built with; name the original")
    encoder = document_encoder(own, longest_example(own, described), bases)
    if encoder.fingerprint != (known.tokenizer.fingerprint if known.tokenizer else None):
        raise IncompatibleError(f"the tokenizer at {own.models[0]} is not the one that {out} was built with; name the original")
    what = {"adds_to": known.number, "call": call}
    fingerprint = digest(json.dumps(what, sort_keys=True).encode()).hexdigest()
    _claim(out, what)
    task, rows = find_task(own.task), max(shard.rows for shard in index.shards)
    form = own.fields if task.form == "auto" else replace(own.fields, form=task.form)
    corpus = plan_corpus(own, form, encoder, out, fingerprint, rows, reporter, executor.call("vocabulary"))
    _refuse_known_ids(index, [Documents(documents_path(out, shard.id), shard.rows) for shard in corpus.shards])
    plan = EncoderPlan(known.components, own.batch_tokens or known.build.batch_tokens, own.hidden)
    shards = [replace(shard, first=shard.first + known.rows) for shard in corpus.shards]
    reporter.stage("building rows", corpus.rows)
    added = tuple(executor.map("build", (plan, index.arrays), [(shard,) for shard in shards], reporter))
    about = Addition(
        call=call,
        manifest=known.number + 1,
        corpus=tuple(sources),
        rows=corpus.rows,
        drift=_drift(index, added),
        **corpus.not_kept(),
    )
    before, lost = known.build, not_finite(out, added)
    say_not_finite(lost["not_finite"], lost["not_finite_first"], reporter)
    counts = {name: getattr(before, name) + value for name, value in {**corpus.counts(), **lost}.items() if not name.endswith("_first")}
    fields = {**dict(known), "number": known.number + 1, "build": before.model_copy(update={**counts, "added": (*before.added, about)})}
    grown = publish_index(out, (*index.shards, *added), index.deleted, fields)
    (out / "staging" / PLAN).unlink(missing_ok=True)
    refresh_search(out, reporter)
    return grown


def _revisions(manifest: Manifest) -> tuple[str, ...] | None:
    found = [m.revision for m in manifest.models if m.revision is not None]
    return tuple(found) if len(found) == len(manifest.models) else None


def _claim(out: Path, what: dict[str, Any]) -> None:
    """See whether an interrupted call was this one; if not, forget it."""
    plan = out / "staging" / PLAN
    if not plan.is_file() or read_json(plan) != json.loads(json.dumps(what)):
        shutil.rmtree(out / "staging", ignore_errors=True)
    write_whole(plan, json.dumps(what).encode())


def _refuse_known_ids(index: Index, added: Iterable[Documents]) -> None:
    ids = np.array(index.column("id").to_pylist(), object)[index.alive]
    known = set(ids.tolist())
    for documents in added:
        for id in documents.ids():
            if id in known:
                raise DataError(f"the id {id!r} is in the index already; fix it, or delete that example first (wherefrom delete)")


def _drift(index: Index, added: Sequence[Shard]) -> dict[str, float]:
    """By component, the mean squared length of the added rows over that of the build's (those of earlier additions left out)."""
    first = index.manifest.rows - sum(part.rows for part in index.manifest.build.added)
    found = {}
    for component in index.manifest.components:
        old = np.square(index.norms(component)[: max(1, first)], dtype=np.float64).mean()
        rows = (open_rows(ArrayFile(rows_path(index.path, s.id)), component, s.rows) for s in added)
        new = np.square(np.concatenate([r.norms for r in rows]), dtype=np.float64).mean()
        found[component.name] = round(float(new / old), 4) if old > 0 else 1.0
    return found


def drifted(drift: dict[str, float]) -> list[str]:
    """The components whose curvature should be fitted anew (that is, the index built again): drift beyond 1.5 or below its inverse."""
    return [name for name, ratio in drift.items() if not 1 / _DRIFTED <= ratio <= _DRIFTED]


def delete(out: Path, ids: Iterable[str] = (), where: str | None = None) -> int:
    """Take examples out of all answers from now on.

    Args:
        ids: of examples, or of documents with all their chunks.
        where: a filter (see store/filters.py).

    Returns:
        How many rows were deleted that were not before.

    Raises:
        UsageError: an id is not in the index; or every row would be deleted.
    """
    Index(out)
    with exclusive(out):
        index = Index(out)
        manifest = index.manifest
        chosen, unknown = index.rows_of(ids)
        if unknown:
            raise UsageError(f"{len(unknown)} of the ids are not in {out}, such as {min(unknown)!r}; nothing was deleted")
        if where is not None:
            chosen |= index.matching(where)
        gone = chosen & index.alive
        left = index.alive & ~chosen
        if not left.any():
            raise UsageError(f"that would delete every example of {out}; remove the directory instead")
        if gone.any():
            publish_index(out, index.shards, np.flatnonzero(~left), {**dict(manifest), "number": manifest.number + 1})
    return int(gone.sum())


def compact(out: Path) -> int:
    """Write the shards that hold deleted rows again without them; rows behind them move up. Files of older manifests stay: see `prune`.

    Returns:
        How many rows were dropped.
    """
    Index(out)
    with exclusive(out):
        index = Index(out)
        manifest = index.manifest
        shards = []
        for shard in index.shards:
            kept = np.flatnonzero(index.alive[shard.first : shard.first + shard.rows])
            if len(kept) == shard.rows:
                shards.append(shard)
            elif len(kept):
                shards.append(_without(index, shard, kept))
        dropped = manifest.rows - sum(shard.rows for shard in shards)
        if not shards:
            raise UsageError(f"every example of {out} was deleted; remove the directory instead")
        if dropped:
            publish_index(out, shards, np.zeros(0, np.int64), {**dict(manifest), "number": manifest.number + 1})
        _abandon(out)
        refresh_search(out, Silent())
    return dropped


def _abandon(out: Path) -> None:
    """Forget an addition that was interrupted: what it had begun was for another state of the index."""
    (out / "staging" / PLAN).unlink(missing_ok=True)


def _without(index: Index, shard: Shard, kept: np.ndarray) -> Shard:
    """A shard's kept rows as a shard of its own, their codes to the bit as they were."""
    return index.reader(shard).select(kept, shard_id(f"{shard.id}:{digest(kept.tobytes()).hexdigest()}", 0))


def prune(out: Path) -> int:
    """Remove files that the newest manifest does not name, and older manifests; readers that opened these lose them.

    Returns:
        Bytes given back.
    """
    Index(out)
    with exclusive(out):
        index = Index(out)
        manifest = index.manifest
        named = {out / manifest.encoder.path, out / manifest.table.path, manifest_path(out, manifest.number)}
        for shard in index.shards:
            named |= {rows_path(out, shard.id), documents_path(out, shard.id)}
        freed = 0
        for path in sorted(path for pattern in _OURS for path in out.glob(pattern)):
            if path not in named and _is_ours(path):
                freed += path.stat().st_size
                path.unlink()
        _abandon(out)
        refresh_search(out, Silent())
    return freed


def _is_ours(path: Path) -> bool:
    """Whether a regular file carries the name of a file that this library makes."""
    named = _UUID.fullmatch(path.name.partition(".")[0]) is not None or re.fullmatch(r"[0-9]{6,18}\.json", path.name) is not None
    return named and not path.is_symlink() and path.is_file()
