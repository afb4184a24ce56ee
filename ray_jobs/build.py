"""A build from corpus to manifest: describe the models, write the examples, fit the encoder, build the shards, publish the manifest.

Each stage writes complete files, whose names depend only on the inputs of the build, so the same command resumes a build that was killed.
`staging/` holds unfinished files and a record of the build's inputs. The manifest is written last; until then there is no index.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256 as digest
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..indexer.budget import Training, row_cost
from ..indexer.calibrate import Agreement, calibrate
from ..indexer.curvature import Arrays, add_sums
from ..indexer.encoder import EncoderSettings
from ..indexer.fit import Fit, with_known_sample
from ..indexer.models import IN_MEMORY, LoadedModel, ModelSource
from ..indexer.tasks import find_task, with_whole_paths
from ..store.arrays import ArrayFile
from ..store.corpus import describe_sources
from ..store.documents import Documents, Example
from ..store.errors import BusyError, IntegrityError, NumericalError, StorageError, UsageError, WorkerError
from ..store.files import (
    INPUTS,
    discard_inputs,
    exclusive,
    publish,
    read_json,
    regular_size,
    remove_tree,
    staging_folder,
    write_tensors,
    write_whole,
)
from ..store.index import Index, write_search_caches
from ..store.kinds import KINDS, open_rows
from ..store.manifest import (
    FORMAT_VERSION,
    Build,
    Component,
    FileRecord,
    Inputs,
    Manifest,
    Model,
    Tokenizer,
    latest_manifest,
    read_manifest,
)
from ..store.objects import STAGING, StorePath, fetched, local_or_store
from ..store.shapes import Int64
from ..store.shard import Shard, derived_id, documents_path, publish_index, rows_path
from ..store.usual import read_usual
from .config import BuildConfig
from .corpus import CorpusWriter, WrittenCorpus, WrittenShard, write_corpus
from .executor import Executor, Resources, open_executor
from .notes import costs, model_notes, not_finite, report_not_finite, silent_components, tracked
from .progress import Reporter, Silent
from .schema import fit_examples, known_training, preset_note, select_components, unused_options, weight_notes
from .usual import measure_usual, sample_size
from .worker import Part, Worker, absolute, document_converter, model_sources, read_compared

_SHARD_BYTES = 16 << 20
_SHARD_ROWS = 16384
_GROUP_ROWS = 1 << 18  # whose scores fit into a core's cache
_STORE_GROUP_ROWS = 1 << 20
_DEFAULT_MAX_TOKENS = 2048
_FIT_PART = 64  # examples of a part of a fitting sample, if it has between `_LEAST_FIT_PARTS` and `_MOST_FIT_PARTS` of these
_LEAST_FIT_PART = 8
_LEAST_FIT_PARTS = 4  # so that several workers share a small sample
_MOST_FIT_PARTS = 16  # whose sums, as large as the curvature, all travel to the driver
_COMPARED_ROWS = 256
_COMPARED_COORDINATES = 1 << 25
_COUNTED = 1024


@dataclass(frozen=True)
class _Job:
    """Directory, configuration and models of a build, with the hash of its inputs."""

    config: BuildConfig
    out: Path
    sources: Sequence[ModelSource]
    fingerprint: str
    reporter: Reporter

    @property
    def staging(self) -> Path:
        return staging_folder(self.out)


def build(
    config: BuildConfig, reporter: Reporter = Silent(), loaded: Sequence[LoadedModel] = (), data_sha256: str | None = None
) -> Manifest:
    """Build an index, resume an interrupted build, or return the manifest of a finished one.

    Args:
        reporter: of progress.
        loaded: models in memory, in the order of the configuration's names.
        data_sha256: of data that was in memory and is in a temporary file; it identifies the data instead of path and time.

    Returns:
        The published manifest.

    Raises:
        UsageError: an option is invalid, or `out` contains other files.
        BusyError: another build is writing to `out`.
        WherefromError: see store/errors.py; finished stages are kept.
    """
    out = local_or_store(config.out)
    refuse_occupied(out)
    content = config.content_options()
    corpus_files = describe_sources(config.sources)
    if data_sha256 is not None:
        content["data"] = [IN_MEMORY]
        corpus_files = [{"path": IN_MEMORY, "sha256": data_sha256}]
    # Paths are absolute, since a worker may have another working directory.
    absolute_config = config.replace(model=tuple(map(absolute, config.models)), out=str(out.resolve()))
    sources = model_sources(absolute_config)
    if loaded:
        options = config.dtype, config.device, config.trust_remote_code
        sources = tuple(ModelSource.of(model, *options) for model in loaded)
    tokenizer = document_converter(config, sources).fingerprint  # before the model is loaded; a tokenizer can take hundreds of megabytes
    is_new = not out.exists()
    try:
        resources = Resources(config.workers, config.threads, config.address, config.device, ":" in config.task)
        with exclusive(out), open_executor(partial(Worker, absolute_config, sources), resources) as executor:
            models, settings, facts = executor.call("describe")
            inputs = {
                "format": FORMAT_VERSION,
                "options": content,
                "models": [model.fingerprint for model in models],
                "tokenizer": tokenizer,
                "corpus": corpus_files,
            }
            known = json.dumps([inputs, [model.trained for model in models]], sort_keys=True)
            job = _Job(config, out, sources, digest(known.encode()).hexdigest(), reporter)
            manifest = _finished_manifest(job, inputs)
            if manifest is not None:
                _measure_usual(job, executor, settings)
                return manifest
            _claim(job, inputs)
            corpus = _write_corpus(job, models, settings, executor)
            training = known_training(settings.components, models[-1])
            settings = select_components(config, settings, _read_sample(job, corpus), models)
            notes = model_notes(facts, settings.components)
            preset = [] if config.preset is None else [preset_note(config)]
            for note in [*preset, *weight_notes(settings.components), *notes, *costs(facts), *unused_options(config, settings.components)]:
                reporter.note(note)
            fitted = fit_examples(config, settings.components, models, corpus.rows, sum(shard.tokens for shard in corpus.shards))
            arrays, settings, file = _fit(job, executor, with_known_sample(settings, fitted), corpus, fitted)
            reporter.stage("building rows", corpus.rows)
            compared = _compared_rows(settings.components, corpus)
            tasks = [(shard, 0 if number else compared) for number, shard in enumerate(corpus.shards)]
            shards = tuple(executor.map("build", (settings, arrays), tasks, reporter))
            components, calibration = _calibrate(out, settings.components, arrays, shards[0], compared, training)
            silent = silent_components(out, shards[0], components)
            for note in silent:
                reporter.note(note)
            record = Build(
                inputs=Inputs.model_validate_json(json.dumps(inputs)),
                runtime=config.runtime_options(),
                batch_tokens=settings.batch_tokens,
                tracked=tuple(tracked(model, components, number) for number, model in enumerate(facts)),
                calibration=calibration,
                **corpus.counts(),
                **corpus.omissions(),
                **not_finite(out, shards),
                notes=(*notes, *silent),
            )
            manifest = _publish(job, record, models, components, file, shards, executor)
            _measure_usual(job, executor, settings)
            return manifest
    except BaseException as error:
        resumable = isinstance(error, (StorageError, WorkerError, BusyError)) or not isinstance(error, Exception)
        has_rows = bool(list(out.glob("rows/*")))
        if is_new and not out.is_symlink() and out.is_dir() and not has_rows and not (resumable and _names(out)):
            remove_tree(out)  # the build cannot be resumed with the same options
        raise


def _names(out: Path) -> set[str]:
    """Return the names of the files and folders in a directory, without the lock file."""
    return {path.name for path in out.iterdir()} - {".lock"}


def refuse_occupied(out: Path) -> None:
    """Refuse a directory that holds other files than those of an index, finished or not.

    Raises:
        UsageError: the directory holds other files, or is not a directory.
    """
    if out.is_symlink() and not out.exists():
        raise UsageError(f"`out` {out} is a link whose target does not exist; choose another directory")
    if out.exists() and not out.is_dir():
        raise UsageError(f"`out` {out} is a file; choose a directory that does not exist yet")
    names = _names(out) if out.is_dir() else set()
    if names and not names & {"manifests", STAGING}:
        raise UsageError(f"`out` {out} holds other things and no index; choose a directory that does not exist yet")


def _finished_manifest(job: _Job, inputs: dict[str, Any]) -> Manifest | None:
    """Return the manifest of a finished build with the same inputs; None if there is no index."""
    if latest_manifest(job.out) is None:
        return None
    manifest = read_manifest(job.out)
    _refuse_other_inputs(job.out, manifest.build.inputs.model_dump(mode="json"), inputs)
    for record in (manifest.encoder, *(file for shard in Index(job.out).shards for file in shard.files())):
        if regular_size(job.out / record.path) != record.bytes:
            raise IntegrityError(f"{job.out / record.path} is missing or truncated; restore it, or remove {job.out} and build again")
    discard_inputs(job.out)
    refresh_search(job.out, job.reporter)
    return manifest


def refresh_search(out: Path, reporter: Reporter, executor: Executor | None = None) -> None:
    """Write the missing search caches, on the workers if there are some; a failure is only a note."""
    index = Index(out)
    if executor is not None and len(index.groups) > 1:
        reporter.stage("writing posting lists", len(index))
        with suppress(OSError):  # what is missing is written, or noted, below
            for _ in executor.map("write_search_cache", (), [(number,) for number in range(len(index.groups))], reporter):
                pass
    problem = write_search_caches(out)
    if problem is not None:
        reporter.note(problem)


def _claim(job: _Job, inputs: dict[str, Any]) -> None:
    """Record the inputs of this build, or check that an unfinished build in the directory has the same; one without rows is replaced."""
    record = job.staging / INPUTS
    if record.is_file() and read_json(record) != json.loads(json.dumps(inputs)) and not list(job.out.glob("rows/*")):
        for folder in (STAGING, "documents", "encoder"):
            remove_tree(job.out / folder)
    if record.is_file():
        _refuse_other_inputs(job.out, read_json(record), inputs)
    else:
        write_whole(record, json.dumps(inputs).encode())


def _refuse_other_inputs(out: Path, recorded: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Refuse to resume a build with other inputs; the error names them."""
    before = recorded["options"] | {name: value for name, value in recorded.items() if name != "options"}
    inputs = json.loads(json.dumps(inputs))  # converts tuples to lists, as in the recorded inputs
    now = inputs.pop("options") | inputs
    different = [name for name in now if before.get(name) != now[name]]
    if different:
        words = {"models": "the model's weights", "tokenizer": "the tokenizer", "corpus": "the corpus files"}
        listed = ", ".join(words.get(name) or f"{name} {before.get(name)!r}, now {now[name]!r}" for name in different)
        raise UsageError(
            f"`out` {out} holds a build that differs from this one ({listed}); choose another `out`, or remove that directory first"
        )


def longest_example(config: BuildConfig, models: Sequence[Model]) -> int:
    """Return the tokens of the longest example: `max_tokens`, else the shortest context of the models, at most 2,048.

    Raises:
        UsageError: `max_tokens` is larger than a model's context.
    """
    limit = min((model.context for model in models if model.context), default=None)
    if config.max_tokens and limit and config.max_tokens > limit:
        raise UsageError(f"`max_tokens` is {config.max_tokens}, the model's context is {limit}; choose at most {limit}")
    return config.max_tokens or min(limit or _DEFAULT_MAX_TOKENS, _DEFAULT_MAX_TOKENS)


def _write_corpus(job: _Job, models: Sequence[Model], settings: EncoderSettings, executor: Executor) -> WrittenCorpus:
    """Write the shards' examples. Without `shard_rows`, the rows of a shard take at most `_SHARD_BYTES`."""
    config = job.config
    row_bytes = config.budget or max(row_cost(component, {}) for component in settings.components)
    shard_rows = config.shard_rows or max(1, min(_SHARD_ROWS, int(_SHARD_BYTES // row_bytes)))
    writer = CorpusWriter(job.out, job.fingerprint, shard_rows, longest_example(config, models), executor.call("vocabulary"))
    return write_corpus(config, writer, executor, partial(document_converter, config, job.sources, writer.max_tokens), job.reporter)


def _read_sample(job: _Job, corpus: WrittenCorpus) -> list[Example]:
    """Read a sample of the examples."""
    examples = []
    for part in draw_sample(corpus.shards, np.arange(corpus.rows), min(_COUNTED, corpus.rows), job.config.seed):
        for id, rows, positions in part:
            documents = Documents(documents_path(job.out, id), rows)
            examples += [documents[position] for position in positions]
    return examples


def _fit(
    job: _Job, executor: Executor, settings: EncoderSettings, corpus: WrittenCorpus, count: int
) -> tuple[Arrays, EncoderSettings, FileRecord]:
    """Fit the encoder on a seeded sample of `count` examples, or read the encoder of an earlier run.

    The parts of the sample are fixed, and their sums are added in order, so the arrays are the same bits for any number of workers.
    """
    from safetensors.numpy import load_file

    path = job.out / "encoder" / f"{derived_id(job.fingerprint, -1)}.safetensors"
    record_file = job.staging / "encoder.json"
    if record_file.is_file():
        record = read_json(record_file)
        if path.is_file() and FileRecord.of(job.out, path).model_dump() == record["file"]:
            return load_file(fetched(path)), with_counts(settings, record["fitted"]), FileRecord(**record["file"])
    remove_tree(job.out / "rows")  # of an encoder that no longer exists
    parts = draw_sample(corpus.shards, np.arange(corpus.rows), count, job.config.seed)
    arrays, counts = run_fit(executor, settings, parts, count, job.reporter, known=executor.call("moments"))
    staged = job.staging / path.name
    write_tensors(staged, arrays)
    path.unlink(missing_ok=True)
    publish(staged, path)
    file = FileRecord.of(job.out, path)
    write_whole(record_file, json.dumps({"file": file.model_dump(), "fitted": counts}).encode())
    return arrays, with_counts(settings, counts), file


def run_fit(
    executor: Executor, settings: EncoderSettings, parts: Sequence[Part], count: int, reporter: Reporter, known: Arrays | None = None
) -> tuple[Arrays, dict[str, int]]:
    """Run the passes of a fit over the parts of a sample of `count` examples; return the arrays, and the numbers that entered the last.

    Args:
        known: arrays of the encoder that are not fitted.
    """
    fit = Fit(settings)
    arrays: Arrays = known or {}
    totals: Arrays = {}
    for step in range(len(fit.steps)):
        reporter.stage(f"fitting, pass {step + 1} of {len(fit.steps)}", count)
        totals = {}
        for sums in executor.map("sum_statistics", (settings, arrays, step), [(part,) for part in parts], reporter):
            add_sums(totals, sums)
            del sums  # as large as the totals
        arrays = fit.combine(step, arrays, executor.map("decompose", (settings,), fit.decompositions(step, totals), Silent()))
    return arrays, {name: int(totals[name]) if fit.steps else 0 for name in ("examples", "tokens")}


def with_counts(settings: EncoderSettings, counts: dict[str, int]) -> EncoderSettings:
    """Return settings whose curvatures have the numbers of examples and tokens of the fit."""
    components = tuple(s.model_copy(update={"curvature": s.curvature.model_copy(update=counts)}) for s in settings.components)
    return replace(settings, components=components)


def _compared_rows(components: Sequence[Component], corpus: WrittenCorpus) -> int:
    """Return how many of the first shard's rows are compared with their codes; none for a single component, which needs no weight, and none
    of unit length, whose weights are rates."""
    if len(components) == 1 or any("unit-length" in component.features for component in components):
        return 0
    shard = corpus.shards[0]
    coordinates = sum(component.dim * (1.0 if component.has_wide_rows else shard.tokens / shard.rows) for component in components)
    rows = min(shard.rows, max(2, min(_COMPARED_ROWS, int(_COMPARED_COORDINATES / max(1, coordinates)))))
    return rows if rows > 1 else 0


def _calibrate(
    out: Path, components: tuple[Component, ...], arrays: Arrays, shard: Shard, compared: int, training: Training
) -> tuple[tuple[Component, ...], dict[str, dict[str, float]]]:
    """Set the components' weights by the first rows of the first shard (see indexer/calibrate.py).

    Returns:
        The components, and figures for the record of the index; none where no rows are compared.
    """
    if not compared:
        return components, {}
    exact, head_mean_share = read_compared(out)
    file = ArrayFile(rows_path(out, shard.id))
    agreements = {}
    for component in components:
        vectors: Any = exact[component.name]
        stored = open_rows(file, component, shard.rows)
        products = KINDS[component.kind].products(stored, component, vectors, arrays)[:, :compared]
        agreements[component.name] = Agreement.of(vectors.inner_products(vectors), products)
    return calibrate(components, agreements, head_mean_share, training)


def draw_sample(shards: Sequence[Shard] | Sequence[WrittenShard], rows: Int64[np.ndarray, " rows"], count: int, seed: int) -> list[Part]:
    """Draw `count` of some rows without replacement, in parts."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    sample = np.sort(generator.choice(rows, count, replace=False, shuffle=False))
    firsts = np.array([s.first for s in shards])
    parts: list[Part] = []
    number_of_parts = min(_MOST_FIT_PARTS, max(_LEAST_FIT_PARTS, count // _FIT_PART))
    size = max(_LEAST_FIT_PART, -(-count // number_of_parts))
    for start in range(0, count, size):
        drawn = sample[start : start + size]
        numbers = np.unique(np.searchsorted(firsts, drawn, side="right") - 1)
        chosen = [shards[number] for number in numbers]
        parts.append([(s.id, s.rows, [int(row) - s.first for row in drawn if s.first <= row < s.first + s.rows]) for s in chosen])
    return parts


def _publish(
    job: _Job,
    record: Build,
    models: tuple[Model, ...],
    components: tuple[Component, ...],
    file: FileRecord,
    shards: tuple[Shard, ...],
    executor: Executor,
) -> Manifest:
    features = {feature for component in components for feature in component.features} | find_task(job.config.task).features
    report_not_finite(record.not_finite, record.not_finite_first, job.reporter)
    fields = dict(
        features=tuple(sorted(features)),
        number=1,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        wherefrom=installed_version(),
        task=with_whole_paths(job.config.task),
        mode=find_task(job.config.task).mode,
        models=models,
        tokenizer=Tokenizer(fingerprint=record.inputs.tokenizer) if record.inputs.tokenizer else None,
        components=components,
        encoder=file,
        group_rows=job.config.group_rows or (_STORE_GROUP_ROWS if isinstance(job.out, StorePath) else _GROUP_ROWS),
        build=record,
    )
    manifest = publish_index(job.out, shards, np.zeros(0, np.int64), fields)
    discard_inputs(job.out)
    refresh_search(job.out, job.reporter, executor)
    return manifest


def _measure_usual(job: _Job, executor: Executor, settings: EncoderSettings) -> None:
    """Measure what is usual for training examples (see store/usual.py), unless that is known or they are few."""
    index = Index(job.out)
    rows = np.flatnonzero(index.alive)
    count = sample_size(len(rows))
    if read_usual(index) is not None or not count:
        return
    parts = draw_sample(index.shards, rows, count, job.config.seed)
    firsts = {shard.id: shard.first for shard in index.shards}
    sampled = [firsts[id] + position for part in parts for id, _, positions in part for position in positions]
    job.reporter.stage("asking with training examples", count)
    settings = replace(settings, components=index.manifest.components)
    try:
        asked = executor.map("ask_examples", (settings, index.arrays), [(part,) for part in parts], job.reporter)
        measure_usual(index, np.array(sampled), asked)
    except (UsageError, NumericalError) as error:
        job.reporter.note(f"what is usual for training examples was not measured: {error}")


def installed_version() -> str:
    """Return the version of the installed package."""
    try:
        return version("wherefrom")
    except PackageNotFoundError:
        return "unknown"
