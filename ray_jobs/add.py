"""Addition of documents to an index, with the encoder that it has.

An addition publishes a new manifest and keeps the files of the previous one, so an open index stays a snapshot of its manifest.

Added rows are whitened with the curvature of the build. Let H be the second moment of the gradients of the build's examples, H' that of the
added ones, and a the damping. The mean squared length of the added rows is then tr((H + a)^-1 H'). Its ratio to the mean squared length of
the build's rows is the *drift*.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256 as digest
from pathlib import Path
from typing import Any

import numpy as np

from ..indexer.encoder import EncoderSettings
from ..indexer.recorded import RecordedEncoder
from ..store.corpus import describe_sources
from ..store.documents import Documents
from ..store.errors import DataError
from ..store.files import INPUTS, discard_inputs, exclusive, read_json, remove_tree, staging_folder, write_whole
from ..store.index import Index
from ..store.manifest import Addition, Manifest
from ..store.shard import Shard, documents_path, publish_index
from .build import longest_example, refresh_search
from .config import BuildConfig, recorded_config
from .corpus import CorpusWriter, write_corpus
from .executor import Executor, Resources, open_executor
from .notes import not_finite, report_not_finite
from .progress import Reporter, Silent
from .worker import Worker, absolute, document_converter

_LARGEST_DRIFT = 1.5


def add(
    out: Path,
    data: Sequence[str],
    runtime: dict[str, Any] | None = None,
    models: Sequence[str] = (),
    reporter: Reporter = Silent(),
    task: str | None = None,
) -> Manifest:
    """Add documents to an index.

    The same call resumes an interrupted one. If that one was interrupted after it had published, nothing is added again.

    Args:
        data: files, folders or hub datasets, with the same columns as those of the build.
        runtime: options of `BuildConfig` that do not change the rows: workers, threads, address, device, batch_tokens, trust_remote_code.
        models: new paths of the models, if they were moved.
        task: `module:Class` of a custom task; needed if the index was built with one, since code that an index names is not run.

    Raises:
        IncompatibleError: a model or its tokenizer differs from that of the build.
        DataError: an id is in the index already.
        BusyError: another process is changing the index.
    """
    runtime = runtime or {}
    recorded = RecordedEncoder(Index(out), models, runtime.get("device") or "auto", bool(runtime.get("trust_remote_code")), task)
    config = build_config(recorded, data, runtime)
    corpus_files = describe_sources(data)
    resources = Resources(config.workers, config.threads, config.address, config.device, ":" in config.task)
    with exclusive(out):
        index = Index(out)
        manifest = index.manifest
        call = digest(json.dumps({"encoder": manifest.encoder.sha256, "corpus": corpus_files}, sort_keys=True).encode()).hexdigest()
        if manifest.build.added and (manifest.build.added[-1].call, manifest.build.added[-1].manifest) == (call, manifest.number):
            discard_inputs(out)  # published by a call that was then interrupted
            refresh_search(out, reporter)
            return manifest
        with open_executor(partial(Worker, config, recorded.sources), resources) as executor:
            return _add(recorded.moved_to(index), config, call, corpus_files, executor, reporter)


def build_config(recorded: RecordedEncoder, data: Sequence[str], runtime: Mapping[str, Any]) -> BuildConfig:
    """Return the configuration of an index's build, with other data and runtime options."""
    manifest = recorded.index.manifest
    content = manifest.build.inputs.options.model_dump(mode="json")
    _ = recorded.task  # raises an error if the custom task is not named
    options = {
        **{name: value for name, value in content.items() if name != "revision"},
        "model": tuple(absolute(source.id) for source in recorded.sources),
        "task": manifest.task,
        "batch_tokens": manifest.build.batch_tokens,
        "data": tuple(data),
        "out": str(recorded.index.path.resolve()),
        **{name: value for name, value in runtime.items() if value is not None},
    }
    return recorded_config(options)


def _add(
    recorded: RecordedEncoder, config: BuildConfig, call: str, corpus_files: list[dict[str, Any]], executor: Executor, reporter: Reporter
) -> Manifest:
    """Write the shards of new documents and publish them."""
    index = recorded.index
    out = index.path
    manifest = index.manifest
    models, _, _ = executor.call("describe")
    recorded.check_models([model.fingerprint for model in models])
    converter = document_converter(config, recorded.sources, longest_example(config, models))
    recorded.check_converter(converter)
    identity = {"adds_to": manifest.number, "call": call}
    fingerprint = digest(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    _claim(out, identity)
    shard_rows = max(shard.rows for shard in index.shards)
    writer = CorpusWriter(out, fingerprint, shard_rows, longest_example(config, models), executor.call("vocabulary"))
    corpus = write_corpus(config, writer, executor, lambda: converter, reporter)
    _refuse_existing_ids(index, [Documents(documents_path(out, shard.id), shard.rows) for shard in corpus.shards])
    settings = EncoderSettings(manifest.components, config.batch_tokens or manifest.build.batch_tokens, config.hidden)
    shards = [shard.model_copy(update={"first": shard.first + manifest.rows}) for shard in corpus.shards]
    reporter.stage("building rows", corpus.rows)
    added = tuple(executor.map("build", (settings, index.arrays), [(shard,) for shard in shards], reporter))
    addition = Addition(
        call=call,
        manifest=manifest.number + 1,
        corpus=tuple(corpus_files),
        rows=corpus.rows,
        drift=_drift(index, added),
        **corpus.omissions(),
    )
    build = manifest.build
    invalid = not_finite(out, added)
    report_not_finite(invalid["not_finite"], invalid["not_finite_first"], reporter)
    counts = {name: getattr(build, name) + value for name, value in {**corpus.counts(), **invalid}.items() if not name.endswith("_first")}
    record = build.model_copy(update={**counts, "added": (*build.added, addition)})
    training_rows = max(manifest.training_rows, manifest.rows) + corpus.rows
    manifest_fields = {**dict(manifest), "number": manifest.number + 1, "build": record, "training_rows": training_rows}
    new_manifest = publish_index(out, (*index.shards, *added), index.deleted, manifest_fields)
    discard_inputs(out)
    refresh_search(out, reporter, executor)
    return new_manifest


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Record the identity of this call, and discard the files of another call that was interrupted."""
    record = staging_folder(out) / INPUTS
    if not record.is_file() or read_json(record) != identity:
        remove_tree(staging_folder(out))
    write_whole(record, json.dumps(identity).encode())


def _refuse_existing_ids(index: Index, added: Iterable[Documents]) -> None:
    """Refuse documents with an id of the index."""
    known = index.first_known_id(id for documents in added for id in documents.ids())
    if known is not None:
        raise DataError(f"the id {known!r} is in the index already; change it, or delete that example first with wherefrom delete")


def _drift(index: Index, added: Sequence[Shard]) -> dict[str, float]:
    """Return, by component, the mean squared length of the added rows over that of the build's rows."""
    built = index.manifest.rows - sum(addition.rows for addition in index.manifest.build.added)
    first = [shard for shard in index.shards if shard.first < max(1, built)]
    means = [np.sum([shard.energy for shard in shards], axis=0)[:, 1] / sum(shard.rows for shard in shards) for shards in (first, added)]
    names = [component.name for component in index.manifest.components]
    return {name: round(float(after / before), 4) if before > 0 else 1.0 for name, before, after in zip(names, *means, strict=True)}


def drifted(drift: dict[str, float]) -> list[str]:
    """Return the components whose drift is above 1.5 or below its inverse. Their curvature no longer fits: the index should be rebuilt."""
    return [name for name, ratio in drift.items() if not 1 / _LARGEST_DRIFT <= ratio <= _LARGEST_DRIFT]
