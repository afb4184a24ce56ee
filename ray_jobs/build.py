"""A build from corpus to manifest: describe the model, write the examples, fit, build the shards, publish.

Each stage leaves something whole behind, under a name that depends only on what is being built, so a build that was killed goes on
where it was when the same command is given again. `staging/` holds what is not finished, and the plan that says which build that is.
The manifest is written last; until then there is no index.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256 as digest
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..indexer.budget import row_cost
from ..indexer.calibrate import Agreement, calibrate
from ..indexer.curvature import Arrays, add_sums
from ..indexer.encoder import EncoderPlan
from ..indexer.fit import Fit, with_known_sample
from ..indexer.models import IN_MEMORY, LoadedModel, ModelSource
from ..indexer.tasks import find_task
from ..store.arrays import ArrayFile
from ..store.corpus import describe_sources
from ..store.documents import Documents, Example
from ..store.errors import BusyError, IntegrityError, StorageError, UsageError, WherefromError, WorkerError
from ..store.files import PLAN, exclusive, publish, read_json, regular_size, storage_errors, write_whole
from ..store.index import Index
from ..store.kinds import KINDS, open_rows
from ..store.manifest import (
    FORMAT_VERSION,
    Build,
    Component,
    FileRecord,
    Manifest,
    Model,
    Tokenizer,
    What,
    latest_manifest,
    read_manifest,
)
from ..store.shard import Shard, documents_path, publish_index, rows_path
from .config import BuildConfig
from .corpus import CorpusPlan, plan_corpus, shard_id
from .executor import Executor, Resources, open_executor
from .notes import model_notes, not_finite, report_not_finite, silent_components, tracked
from .progress import Reporter, Silent
from .schema import select_components
from .worker import Worker, absolute, document_encoder, model_sources

_SHARD_BYTES = 16 << 20
_SHARD_ROWS = 16384
_DEFAULT_MAX_TOKENS = 2048
_FIT_PART = 64
_COMPARED_ROWS = 256
_COMPARED_COORDINATES = 1 << 26
_COUNTED = 1024


@dataclass(frozen=True)
class _Job:
    """A build's directory, configuration, models and identity."""

    config: BuildConfig
    out: Path
    sources: Sequence[ModelSource]
    fingerprint: str
    reporter: Reporter

    @property
    def staging(self) -> Path:
        return self.out / "staging"


def build(
    config: BuildConfig, reporter: Reporter | None = None, loaded: Sequence[LoadedModel] = (), data_sha256: str | None = None
) -> Manifest:
    """Build an index, resume a build that was interrupted, or return the manifest of a finished one.

    Args:
        reporter: of progress.
        loaded: the models in memory, in the order of the configuration's names.
        data_sha256: of data that was in memory and is in a temporary file; it identifies the data instead of path and time.

    Returns:
        The published manifest.

    Raises:
        UsageError: an invalid option, or `out` contains something else.
        BusyError: another build is writing there.
        WherefromError: see store/errors.py; finished stages are kept.
    """
    reporter = reporter or Silent()
    out = Path(config.out)
    refuse_occupied(out)
    content = config.content_options()
    corpus_files = describe_sources(config.sources)
    if data_sha256 is not None:
        content["data"] = [IN_MEMORY]
        corpus_files = [{"path": IN_MEMORY, "sha256": data_sha256}]
    # A worker's working directory may be another one.
    absolute_config = config.replace(model=tuple(map(absolute, config.models)), out=str(out.resolve()))
    sources = model_sources(absolute_config)
    if loaded:
        options = config.dtype, config.device, config.trust_remote_code
        sources = tuple(ModelSource.of(model, *options) for model in loaded)
    encoder = document_encoder(config, sources)
    is_new = not out.exists()
    try:
        resources = Resources(config.workers, config.threads, config.address, config.device, ":" in config.task)
        with exclusive(out), open_executor(partial(Worker, absolute_config, sources), resources) as executor:
            models, plan, facts = executor.call("describe")
            what = {
                "format": FORMAT_VERSION,
                "options": content,
                "models": [model.fingerprint for model in models],
                "tokenizer": encoder.fingerprint,
                "corpus": corpus_files,
            }
            job = _Job(config, out, sources, digest(json.dumps(what, sort_keys=True).encode()).hexdigest(), reporter)
            finished = _finished(job, what)
            if finished is not None:
                return finished
            _claim(job, what)
            corpus = _write_corpus(job, models, plan, executor.call("vocabulary"))
            plan = select_components(config, plan, _sampled_examples(job, corpus))
            notes = model_notes(facts, plan.components)
            for note in notes:
                reporter.note(note)
            arrays, plan, file = _fit(job, executor, with_known_sample(plan, min(config.fit_examples, corpus.rows)), corpus)
            shards = _build_shards(job, executor, plan, arrays, corpus)
            components, calibration = _calibrated(job, executor, plan, arrays, corpus)
            silent = silent_components(out, shards[0], components)
            for note in silent:
                reporter.note(note)
            record = Build(
                what=What.model_validate_json(json.dumps(what)),
                how=config.runtime_options(),
                batch_tokens=plan.batch_tokens,
                tracked=tuple(tracked(model, components, number) for number, model in enumerate(facts)),
                calibration=calibration,
                **corpus.counts(),
                **corpus.not_kept(),
                **not_finite(out, shards),
                notes=(*notes, *silent),
            )
            return _publish(job, record, models, components, file, shards)
    except BaseException as error:
        resumable = isinstance(error, (StorageError, WorkerError, BusyError)) or not isinstance(error, Exception)
        has_rows = bool(list(out.glob("rows/*")))
        if is_new and not out.is_symlink() and out.is_dir() and not has_rows and (not resumable or not _begun(out)):
            shutil.rmtree(out)  # a build that cannot be resumed with the same options leaves nothing behind
        raise


def _begun(out: Path) -> bool:
    return bool({p.name for p in out.iterdir()} - {".lock"})


def refuse_occupied(out: Path) -> None:
    """Refuse a directory that holds something else than an index, finished or begun.

    Raises:
        UsageError: it does.
    """
    if out.is_symlink() and not out.exists():
        raise UsageError(f"`out` {out} is a link to nothing; choose another place")
    if out.exists() and not out.is_dir():
        raise UsageError(f"`out` {out} is a file; choose a directory that does not exist yet")
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if names - {".lock"} and not names & {"manifests", "staging"}:
        raise UsageError(f"`out` {out} holds other things and no index; choose a directory that does not exist yet")


def _finished(job: _Job, what: dict[str, Any]) -> Manifest | None:
    """Return the manifest of a finished build with the same inputs; None if there is no index."""
    if latest_manifest(job.out) is None:
        return None
    manifest = read_manifest(job.out)
    _refuse_other(job.out, manifest.build.what.model_dump(mode="json"), what)
    sizes = {job.out / manifest.encoder.path: manifest.encoder.bytes}
    for shard in Index(job.out).shards:
        sizes |= {rows_path(job.out, shard.id): shard.bytes, documents_path(job.out, shard.id): shard.documents_bytes}
    for path, size in sizes.items():
        if regular_size(path) != size:
            raise IntegrityError(f"{path} is missing or truncated; restore it, or remove {job.out} and build again")
    (job.staging / PLAN).unlink(missing_ok=True)
    refresh_search(job.out, job.reporter)
    return manifest


def refresh_search(out: Path, reporter: Reporter) -> None:
    """Write the missing search caches; one that cannot be written is not a failure, since searches then make it anew."""
    try:
        Index(out).reindex()
    except OSError as error:
        reason = str(error) if isinstance(error, WherefromError) else error.strerror or str(error)
        reporter.note(
            f"the posting lists and codes beside the rows could not be written ({reason}); make them with wherefrom reindex {out}"
        )


def _claim(job: _Job, what: dict[str, Any]) -> None:
    """Record the inputs of this build, or check that the build that was begun here has the same.

    A build that has no rows yet is replaced.
    """
    plan = job.staging / PLAN
    if plan.is_file() and read_json(plan) != json.loads(json.dumps(what)) and not list(job.out.glob("rows/*")):
        for folder in ("staging", "documents", "encoder"):
            shutil.rmtree(job.out / folder, ignore_errors=True)
    if plan.is_file():
        _refuse_other(job.out, read_json(plan), what)
    else:
        write_whole(plan, json.dumps(what).encode())


def _refuse_other(out: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to resume a build with other inputs.

    Raises:
        UsageError: names the inputs that differ.
    """
    wanted = json.loads(json.dumps(wanted))  # as the recorded ones were
    before, now = ({**inputs["options"], **{k: v for k, v in inputs.items() if k != "options"}} for inputs in (recorded, wanted))
    different = [name for name in now if before.get(name) != now[name]]
    if different:
        words = {"models": "the model's weights", "tokenizer": "the tokenizer", "corpus": "the corpus files"}
        listed = ", ".join(words.get(name) or f"{name} {before.get(name)!r}, now {now[name]!r}" for name in different)
        raise UsageError(
            f"`out` {out} holds a build that differs from this one ({listed}); choose another `out`, or remove that directory first"
        )


def longest_example(config: BuildConfig, models: Sequence[Model]) -> int:
    """Tokens of the longest example: what was asked for, else the models' shortest context, at most 2,048.

    Raises:
        UsageError: more was asked for than the model's context.
    """
    limit = min((model.context for model in models if model.context), default=None)
    if config.max_tokens and limit and config.max_tokens > limit:
        raise UsageError(f"`max_tokens` is {config.max_tokens}, the model's context is {limit}; it can be at most that")
    return config.max_tokens or min(limit or _DEFAULT_MAX_TOKENS, _DEFAULT_MAX_TOKENS)


def _write_corpus(job: _Job, models: Sequence[Model], plan: EncoderPlan, vocabulary: int | None) -> CorpusPlan:
    config = job.config
    encoder = document_encoder(config, job.sources, longest_example(config, models))
    row_bytes = config.budget or max(row_cost(component, {}) for component in plan.components)
    shard_rows = config.shard_rows or max(1, min(_SHARD_ROWS, int(_SHARD_BYTES // row_bytes)))
    task = find_task(config.task)
    fields = config.fields if task.form == "auto" else replace(config.fields, form=task.form)
    return plan_corpus(config, fields, encoder, job.out, job.fingerprint, shard_rows, job.reporter, vocabulary)


def _sampled_examples(job: _Job, corpus: CorpusPlan) -> list[Example]:
    """Read a sample of the examples."""
    examples = []
    for part in _sample(corpus, min(_COUNTED, corpus.rows), job.config.seed):
        for id, rows, positions in part:
            documents = Documents(documents_path(job.out, id), rows)
            examples += [documents[position] for position in positions]
    return examples


def _fit(job: _Job, executor: Executor, plan: EncoderPlan, corpus: CorpusPlan) -> tuple[Arrays, EncoderPlan, FileRecord]:
    """Fit the encoder on a seeded sample, or read the one that an earlier run published.

    Parts of the sample are fixed and their sums are added in order, so the arrays are the same bits whatever the number of workers.
    """
    from safetensors.numpy import load_file, save_file

    c = job.config
    path = job.out / "encoder" / f"{shard_id(job.fingerprint, -1)}.safetensors"
    done = job.staging / "encoder.json"
    if done.is_file():
        record = read_json(done)
        if path.is_file() and FileRecord.of(job.out, path).model_dump() == record["file"]:
            return load_file(path), _fitted(plan, record["fitted"]), FileRecord(**record["file"])
    shutil.rmtree(job.out / "rows", ignore_errors=True)  # rows of an encoder that is gone are worth nothing
    fit, arrays = Fit(plan), dict[str, np.ndarray]()
    parts = _sample(corpus, min(c.fit_examples, corpus.rows), c.seed)
    for step in range(len(fit.steps)):
        job.reporter.stage(f"fitting, pass {step + 1} of {len(fit.steps)}", min(c.fit_examples, corpus.rows))
        totals: Arrays = {}
        for sums in executor.map("measure", (plan, arrays, step), [(part,) for part in parts], job.reporter):
            totals = add_sums(totals, sums)
        arrays = fit.finish(step, arrays, totals)
    counts = {name: int(totals[name]) if fit.steps else 0 for name in ("examples", "tokens")}
    staged = job.staging / path.name
    with storage_errors(path):
        save_file({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}, staged)
    path.unlink(missing_ok=True)
    publish(staged, path)
    file = FileRecord.of(job.out, path)
    write_whole(done, json.dumps({"file": file.model_dump(), "fitted": counts}).encode())
    return arrays, _fitted(plan, counts), file


def _fitted(plan: EncoderPlan, counts: dict[str, int]) -> EncoderPlan:
    components = tuple(s.model_copy(update={"curvature": s.curvature.model_copy(update=counts)}) for s in plan.components)
    return replace(plan, components=components)


def _calibrated(
    job: _Job, executor: Executor, plan: EncoderPlan, arrays: Arrays, corpus: CorpusPlan
) -> tuple[tuple[Component, ...], dict[str, dict[str, float]]]:
    """Set the components' weights by the first rows of the first shard (see indexer/calibrate.py).

    Returns:
        The components, and the figures for the index's record; none for a single component that stores everything.
    """
    if len(plan.components) == 1 and not plan.components[0].reduced and not plan.components[0].estimated:
        return plan.components, {}
    shard = corpus.shards[0]
    width = sum(component.dim for component in plan.components if component.has_wide_rows)
    rows = min(shard.rows, max(2, min(_COMPARED_ROWS, _COMPARED_COORDINATES // max(1, width))))
    if rows < 2:
        return plan.components, {}
    job.reporter.stage("calibrating components", rows)
    ((exact, head_mean_share),) = executor.map("exact_rows", (plan, arrays), [(shard, rows)], job.reporter)
    file = ArrayFile(rows_path(job.out, shard.id))
    agreements = {}
    for component in plan.components:
        vectors = exact[component.name]
        stored = open_rows(file, component, shard.rows)
        products = KINDS[component.kind].products(stored, component, vectors, arrays)[:, :rows]
        agreements[component.name] = Agreement.of(vectors.inner_products(vectors), products)
    return calibrate(plan.components, agreements, head_mean_share)


def _sample(corpus: CorpusPlan, count: int, seed: int) -> list[list[tuple[str, int, list[int]]]]:
    """Draw `count` rows without replacement, in parts: for each shard its id, its number of rows, and the positions of the sample."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    sample = np.sort(generator.choice(corpus.rows, count, replace=False, shuffle=False))
    firsts = np.array([s.first for s in corpus.shards])
    parts = []
    for start in range(0, count, _FIT_PART):
        rows = sample[start : start + _FIT_PART]
        numbers = np.unique(np.searchsorted(firsts, rows, side="right") - 1)
        shards = [corpus.shards[number] for number in numbers]
        parts.append([(s.id, s.rows, [int(row) - s.first for row in rows if s.first <= row < s.first + s.rows]) for s in shards])
    return parts


def _build_shards(job: _Job, executor: Executor, plan: EncoderPlan, arrays: Arrays, corpus: CorpusPlan) -> tuple[Shard, ...]:
    job.reporter.stage("building rows", corpus.rows)
    return tuple(executor.map("build", (plan, arrays), [(shard,) for shard in corpus.shards], job.reporter))


def _publish(
    job: _Job, record: Build, models: tuple[Model, ...], components: tuple[Component, ...], file: FileRecord, shards: tuple[Shard, ...]
) -> Manifest:
    features = {feature for component in components for feature in component.features}
    if find_task(job.config.task).form == "vector":
        features.add("vectors")
    report_not_finite(record.not_finite, record.not_finite_first, job.reporter)
    fields = dict(
        features=tuple(sorted(features)),
        number=1,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        wherefrom=installed_version(),
        task=job.config.task,
        models=models,
        tokenizer=Tokenizer(fingerprint=record.what.tokenizer) if record.what.tokenizer else None,
        components=components,
        encoder=file,
        build=record,
    )
    manifest = publish_index(job.out, shards, np.zeros(0, np.int64), fields)
    (job.staging / PLAN).unlink(missing_ok=True)
    refresh_search(job.out, job.reporter)
    return manifest


def installed_version() -> str:
    """The version of the installed package."""
    try:
        return version("wherefrom")
    except PackageNotFoundError:
        return "unknown"
