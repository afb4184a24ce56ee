"""A build from corpus to manifest: describe the model, write the examples, fit, build the shards, publish.

Each stage leaves something whole behind, under a name that depends only on what is being built, so a build that was killed goes on
where it was when the same command is given again. `staging/` holds what is not finished, and the plan that says which build that is.
The manifest is written last; until then there is no index.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256 as digest
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..indexer.curvature import Arrays, add_sums
from ..indexer.encoder import EncoderPlan
from ..indexer.fit import Fit, with_known_sample
from ..indexer.tasks import find_task
from ..store.arrays import ArrayFile
from ..store.bits import rotate
from ..store.corpus import describe_sources
from ..store.dense import DenseRows, block_rows, row_bytes
from ..store.documents import Documents
from ..store.errors import BusyError, IntegrityError, StorageError, UsageError, WherefromError, WorkerError
from ..store.files import PLAN, exclusive, publish, read_json, regular_size, storage_errors, write_whole
from ..store.index import Index, dense_reduction
from ..store.manifest import (
    FORMAT_VERSION,
    Build,
    DenseComponent,
    FileRecord,
    Manifest,
    Model,
    SparseComponent,
    Tokenizer,
    Tracked,
    What,
    latest_manifest,
    read_manifest,
)
from ..store.postings import Postings, byte_tables
from ..store.shard import Shard, documents_path, open_rows, publish_index, rows_path
from ..store.sparse import SparseRows, inner_products
from .budget import count_tokens, spend
from .config import BuildConfig
from .corpus import CorpusPlan, plan_corpus, shard_id
from .executor import Executor, Resources, open_executor
from .progress import Reporter, Silent
from .worker import AboutModel, Worker, absolute, document_encoder

_SHARD_BYTES = 16 << 20
_SHARD_ROWS = 16384
_DEFAULT_MAX_TOKENS = 2048
_FIT_PART = 64
_COMPARED_ROWS = 256
_COMPARED_COORDINATES = 1 << 26
_COUNTED = 1024
_LITTLE = 0.5  # a share of the parameters below which it is said that the rest is not measured
_NAMED = 20
_SHARES = {"head": 1.0, "embeddings": 0.3, "blocks": 0.5}
_SHARES_FROZEN = {"head": 1.0, "embeddings": 0.5, "blocks": 1.5}


@dataclass(frozen=True)
class _Job:
    """One build's directory, configuration and identity."""

    config: BuildConfig
    out: Path
    fingerprint: str
    reporter: Reporter

    @property
    def staging(self) -> Path:
        return self.out / "staging"


def build(config: BuildConfig, reporter: Reporter | None = None) -> Manifest:
    """Build an index, or go on with a build that was interrupted, or find it finished.

    Returns:
        The published manifest.

    Raises:
        UsageError: options that cannot be meant, or `out` holds something else.
        BusyError: another build is writing there.
        DataError, NumericalError, StorageError, WorkerError, ...: see store/errors.py; what is finished is kept.
    """
    reporter = reporter or Silent()
    out = Path(config.out)
    refuse_occupied(out)
    sources = describe_sources(config.sources)
    encoder = document_encoder(config)
    fresh = not out.exists()
    try:
        own = replace(
            config, model=tuple(map(absolute, config.models)), out=str(out.resolve())
        )  # a worker's working directory may be its own
        resources = Resources(config.workers, config.threads, config.address, config.device, ":" in config.task)
        with exclusive(out), open_executor(partial(Worker, own), resources) as executor:
            models, plan, about_models = executor.call("describe")
            what = {
                "format": FORMAT_VERSION,
                "options": config.what(),
                "models": [model.fingerprint for model in models],
                "tokenizer": encoder.fingerprint,
                "corpus": sources,
            }
            job = _Job(config, out, digest(json.dumps(what, sort_keys=True).encode()).hexdigest(), reporter)
            finished = _finished(job, what)
            if finished is not None:
                return finished
            _claim(job, what)
            corpus = _write_corpus(job, models, plan, executor.call("vocabulary"))
            plan = _afforded(job, plan, corpus)
            for note in (notes := _notes(about_models, plan)):
                reporter.note(note)
            arrays, plan, file = _fit(job, executor, with_known_sample(plan, min(config.fit_examples, corpus.rows)), corpus)
            shards = _build_shards(job, executor, plan, arrays, corpus)
            components, weighed = _weighted(job, executor, plan, arrays, corpus)
            plan = replace(plan, components=components)
            made = Build(
                what=What.model_validate_json(json.dumps(what)),
                how=config.how(),
                batch_tokens=plan.batch_tokens,
                tracked=tuple(tracked(about, plan.components, number) for number, about in enumerate(about_models)),
                weighed=weighed,
                **corpus.counts(),
                **corpus.not_kept(),
                **not_finite(out, shards),
                notes=(*notes, *(silent := _zeros(out, shards[0], components))),
            )
            for note in silent:
                reporter.note(note)
            return _publish(job, made, models, plan, file, shards)
    except BaseException as error:
        kept = isinstance(error, (StorageError, WorkerError, BusyError)) or not isinstance(error, Exception)
        if fresh and not out.is_symlink() and out.is_dir() and not list(out.glob("rows/*")) and (not kept or not _begun(out)):
            shutil.rmtree(out)  # a build that cannot go on as it was asked leaves nothing behind
        raise


def _begun(out: Path) -> bool:
    return bool({p.name for p in out.iterdir()} - {".lock"})


def _notes(about: Sequence[AboutModel], plan: EncoderPlan) -> tuple[str, ...]:
    """What whoever reads the answers should know of the models."""
    notes: list[str] = []
    for number, model in enumerate(about):
        notes += model.notes
        found = tracked(model, plan.components, number)
        if found.share < _LITTLE:
            some = ", ".join(found.left_out[:4]) + (" ..." if len(found.left_out) > 4 else "")
            whose = "the parameters that the adapter trained" if model.trained is not None else "the model's parameters"
            notes.append(f"the rows measure {found.share:.1%} of {whose}; they do not measure {some}")
    return tuple(notes)


def tracked(model: AboutModel, components: Sequence[DenseComponent | SparseComponent], number: int) -> Tracked:
    """How many of a model's parameters have gradients in the rows; of an adapter, how many of those that it trained."""
    layers = {
        n for s in components if s.model == number for n in ([s.layer] if isinstance(s, SparseComponent) else [x.name for x in s.layers])
    }
    counted, whole, left_out = 0, 0, Counter[str]()
    for owners, name, size in model.parameters:
        if model.trained is not None and not model.trained & set(owners):
            continue
        whole += size
        if name == "weight" and layers & set(owners):
            counted += size
        else:
            left_out[re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{owners[0]}.{name}".removesuffix(".weight"))] += size
    return Tracked(parameters=counted, of=whole, left_out=tuple(name for name, _ in left_out.most_common(_NAMED)))


def not_finite(out: Path, shards: Sequence[Shard]) -> dict[str, Any]:
    """How many rows were stored as zeros, because the model's loss or gradient of them is not finite, and the first of them."""
    count, first = 0, list[str]()
    for shard in shards:
        losses = ArrayFile(rows_path(out, shard.id)).array("losses", (shard.rows,), "float32")
        bad = np.flatnonzero(~np.isfinite(losses))
        count += len(bad)
        if len(bad) and len(first) < _NAMED:
            documents = Documents(documents_path(out, shard.id), shard.rows)
            first += [documents[int(row)].id for row in bad[: _NAMED - len(first)]]
    return {"not_finite": count, "not_finite_first": tuple(first)}


def say_not_finite(count: int, first: Sequence[str], reporter: Reporter) -> None:
    """Name rows that were stored as zeros."""
    if count:
        some = ", ".join(map(repr, first[:3])) + (" ..." if count > min(3, len(first)) else "")
        reporter.note(f"{count:,} rows are stored as zeros, since the model's loss or gradient of them is not finite: {some}")


def _zeros(out: Path, shard: Shard, components: Sequence[DenseComponent | SparseComponent]) -> list[str]:
    """Components all of whose gradients (in the first shard) are zero: they add nothing to any score."""
    silent = []
    for component in components:
        rows = open_rows(ArrayFile(rows_path(out, shard.id)), component, shard.rows)
        if not rows.norms.any():
            silent.append(
                f"the gradients of {component.name} are zero (or too small for float32) for every example: they add nothing to scores"
            )
    return silent


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
    """The index that is there already, when it is the one asked for."""
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
    """Write down which build this is, or see that the one begun here is the same; clear what a killed run left half-written.

    A begun build that has no rows yet is nothing to protect: another one takes its place.
    """
    plan = job.staging / PLAN
    if plan.is_file() and read_json(plan) != json.loads(json.dumps(what)) and not list(job.out.glob("rows/*")):
        for folder in ("staging", "documents", "encoder"):
            shutil.rmtree(job.out / folder, ignore_errors=True)
    if plan.is_file():
        _refuse_other(job.out, read_json(plan), what)
    else:
        write_whole(plan, json.dumps(what).encode())


def _refuse_other(out: Path, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    known, wanted = ({**w["options"], **{k: v for k, v in w.items() if k != "options"}} for w in (known, wanted))
    # Through JSON, as the known one came.
    different = [k for k in wanted if known.get(k) != json.loads(json.dumps(wanted[k]))]
    if different:
        short = {"models": "the model's weights", "tokenizer": "the tokenizer", "corpus": "the corpus files"}
        listed = ", ".join(short.get(k) or f"{k} {known.get(k)!r}, now {wanted[k]!r}" for k in different)
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
    c = job.config
    encoder = document_encoder(c, longest_example(c, models))
    fitting = [_shard_rows(s) for s in plan.components if isinstance(s, DenseComponent)]
    if c.budget is not None:
        fitting = [max(1, _SHARD_BYTES // c.budget)]
    shard_rows = c.shard_rows or min([_SHARD_ROWS, *fitting])
    task = find_task(c.task)
    fields = c.fields if task.form == "auto" else replace(c.fields, form=task.form)
    return plan_corpus(c, fields, encoder, job.out, job.fingerprint, shard_rows, job.reporter, vocabulary)


def _afforded(job: _Job, plan: EncoderPlan, corpus: CorpusPlan) -> EncoderPlan:
    """The plan with the components that the bytes asked for pay, sized by the tokens of a sample of the examples."""
    c = job.config
    if c.budget is None:
        return plan
    examples = []
    for part in _sample(corpus, min(_COUNTED, corpus.rows), c.seed):
        for id, rows, chosen in part:
            documents = Documents(documents_path(job.out, id), rows)
            examples += [documents[i] for i in chosen]
    return replace(plan, components=spend(c.budget, plan.components, count_tokens(examples)))


def _fit(job: _Job, executor: Executor, plan: EncoderPlan, corpus: CorpusPlan) -> tuple[Arrays, EncoderPlan, FileRecord]:
    """Fit the encoder on a seeded sample, or take the one that an earlier run published.

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


def _shard_rows(component: DenseComponent) -> int:
    whole_chunks = block_rows(component.stored, component.dtype)
    fitting = _SHARD_BYTES // row_bytes(component.stored, component.dtype) // whole_chunks * whole_chunks
    return max(whole_chunks, fitting)


def _weighted(
    job: _Job, executor: Executor, plan: EncoderPlan, arrays: Arrays, corpus: CorpusPlan
) -> tuple[tuple[DenseComponent | SparseComponent, ...], dict[str, dict[str, float]]]:
    """The components with weights that make their scores comparable, and by component what they rest on: `fidelity` and `mean_share`.

    Between the first rows, exact scores are compared with those that the stored codes give. A component's weight is its share (head 1,
    embeddings 0.3, blocks 0.5: docs/components.md says why) over the exact scores' standard deviation, times the squared correlation of the
    two: of a noisy estimate, that part is what is known (Wiener's shrinkage). The head's weight is 1, else the first component's.

    Where training moved a layer until the loss was stationary, its examples' gradients cancel; where it was frozen, they have a mean. If
    the head's mean share (mean score between examples over mean score with themselves) is above the blocks', training went into the
    blocks, and the shares are those of `_SHARES_FROZEN`. Of several models the last decides this, since earlier ones have not arrived.
    """
    if len(plan.components) == 1 and isinstance(plan.components[0], DenseComponent) and not plan.components[0].coordinates:
        return plan.components, {}
    shard = corpus.shards[0]
    width = sum(s.dim for s in plan.components if isinstance(s, DenseComponent))
    rows = max(2, min(_COMPARED_ROWS, _COMPARED_COORDINATES // max(1, width)))
    if shard.rows < rows and shard.rows < 2:
        return plan.components, {}
    rows = min(rows, shard.rows)
    job.reporter.stage("weighing components", rows)
    ((exact, head_mean),) = executor.map("exact_rows", (plan, arrays), [(shard, rows)], job.reporter)
    other = ~np.eye(rows, dtype=bool)
    file = ArrayFile(rows_path(job.out, shard.id))
    known, spreads, means = dict[str, float](), dict[str, float](), dict[str, float]()
    for component in plan.components:
        block = exact[component.name]
        stored = open_rows(file, component, shard.rows)
        if isinstance(component, SparseComponent):
            assert isinstance(stored, SparseRows)
            owners = np.repeat(np.arange(rows), np.diff(block.indptr))
            tables = byte_tables(rotate(block.vectors, component.bits, component.seed))
            found = np.zeros((rows, shard.rows), np.float32)
            Postings.of([stored]).add_scores(block.keys, owners, tables, found)
            found = found[:, :rows]
            truth = inner_products(block, block)
        else:
            assert isinstance(stored, DenseRows)
            values = np.concatenate([stored.values(codes) for _, codes in stored.blocks()])[:rows]
            asked = dense_reduction(component, arrays).apply(block.astype(np.float32))
            found = (asked @ values.T) * (stored.norms * stored.factors())[:rows]
            truth = block @ block.T
        spreads[component.name] = float(truth[other].std())
        own = float(np.diag(truth).mean())
        means[component.name] = float(truth[other].mean()) / own if own > 0 else 0.0
        varied = spreads[component.name] > 0 and found[other].std() > 0
        known[component.name] = float(np.corrcoef(truth[other], found[other])[0, 1]) if varied else 0.0
    last = {s.part: s.name for s in plan.components if s.model == plan.components[-1].model}
    if head_mean is not None:
        means[last["head"]] = head_mean
    of_head, of_blocks = means.get(last.get("head", ""), 0.0), means.get(last.get("blocks", ""), np.inf)
    shares = _SHARES_FROZEN if of_head > max(0.0, of_blocks) else _SHARES
    known_parts = {s.name: shares[s.part] * known[s.name] ** 2 for s in plan.components}
    weights = {n: known_parts[n] / spread if spread > 0 and known[n] > 0 else 0.0 for n, spread in spreads.items()}
    first = weights.get("head") or next((weight for weight in weights.values() if weight > 0), 1.0)
    components = tuple(s.model_copy(update={"weight": weights[s.name] / first if any(weights.values()) else 1.0}) for s in plan.components)
    return components, {n: {"fidelity": round(known[n], 4), "mean_share": round(means[n], 6)} for n in known}


def _sample(corpus: CorpusPlan, count: int, seed: int) -> list[list[tuple[str, int, list[int]]]]:
    """`count` rows drawn without replacement, in parts: lists of (shard id, its rows, which of them)."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    chosen = np.sort(generator.choice(corpus.rows, count, replace=False, shuffle=False))
    firsts = np.array([s.first for s in corpus.shards])
    parts = []
    for start in range(0, count, _FIT_PART):
        rows = chosen[start : start + _FIT_PART]
        at = np.searchsorted(firsts, rows, side="right") - 1
        used = [corpus.shards[i] for i in np.unique(at)]
        parts.append([(s.id, s.rows, [int(r) - s.first for r in rows if s.first <= r < s.first + s.rows]) for s in used])
    return parts


def _build_shards(job: _Job, executor: Executor, plan: EncoderPlan, arrays: Arrays, corpus: CorpusPlan) -> tuple[Shard, ...]:
    job.reporter.stage("building rows", corpus.rows)
    return tuple(executor.map("build", (plan, arrays), [(shard,) for shard in corpus.shards], job.reporter))


def _publish(job: _Job, made: Build, models: tuple[Model, ...], plan: EncoderPlan, file: FileRecord, shards: tuple[Shard, ...]) -> Manifest:
    c, components = job.config, plan.components
    reduced = {"reduced" for s in components if isinstance(s, DenseComponent) and (s.coordinates or s.dtype == "1bit")}
    features = {s.kind for s in components} | reduced | ({"vectors"} if find_task(c.task).form == "vector" else set())
    say_not_finite(made.not_finite, made.not_finite_first, job.reporter)
    fields = dict(
        features=tuple(sorted(features)),
        number=1,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        wherefrom=installed_version(),
        task=c.task,
        models=models,
        tokenizer=Tokenizer(fingerprint=made.what.tokenizer) if made.what.tokenizer else None,
        components=components,
        encoder=file,
        build=made,
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
