"""Evaluation of an index, or of any scores, on a ground-truth pack, with the baselines."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..client import Client
from ..indexer.models import ModelSource, load_tokenizer
from ..indexer.tasks import Task, find_task
from ..query.baselines import Scores
from ..query.matrix import read_matrix
from ..query.metric import Metric
from ..query.options import ScoreOptions, check_options
from ..query.scoring import score_matrix
from ..query.tables import data_frame, html_table
from ..ray_jobs.build import build, refuse_occupied
from ..ray_jobs.config import BuildConfig
from ..ray_jobs.progress import Reporter, Silent
from ..ray_jobs.worker import model_sources
from ..store.corpus import usable
from ..store.documents import Example
from ..store.errors import IncompatibleError, IntegrityError, NotFoundError, UsageError
from ..store.files import write_whole
from .baselines import content_baselines, gradient_baselines, hidden_baseline, require_libraries
from .lds import Estimate, ceiling, difference, estimate, split_half
from .packs import Half, Pack, read_pack, write_documents_file
from .retrain import compute_losses

if TYPE_CHECKING:
    import pandas as pd

_JUDGED = ("name", "lds", "low", "high", "lead", "lead_low", "lead_high")
_FEW_SUBSETS = 20
_SAME_MODEL = 0.02  # mean relative difference of losses; bfloat16 weights stay within it


@dataclass(frozen=True)
class Judgement:
    """Result of an index or a matrix of scores on a pack.

    Attributes:
        pack: its name.
        estimate: the LDS with its interval.
        bytes_per_example, encoder_bytes: of the index; None for scores from a file.
        queries, subsets, seeds, examples: their numbers; `half` names the queries used.
        ceiling: the highest LDS that the noise between seeds allows; None with one seed.
        split_half: correlation of one half of the seeds with the other; None with one seed.
        baselines: name -> estimate on the same queries and subsets.
        leads: name -> difference of the scores' LDS to that baseline's.
        method: the build's options that differ from the defaults, or the file of scores.
    """

    pack: str
    estimate: Estimate
    bytes_per_example: float | None
    encoder_bytes: int | None
    queries: int
    subsets: int
    seeds: int
    examples: int
    half: Half
    ceiling: float | None
    split_half: float | None
    baselines: Mapping[str, Estimate]
    leads: Mapping[str, Estimate]
    method: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as `wherefrom evaluate lds --json` prints it."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("estimate", "baselines", "leads")}
        fields |= {name: None if fields[name] is None else round(fields[name], 4) for name in ("ceiling", "split_half")}
        leads = {
            name: {"lead": round(e.value, 4), "lead_low": round(e.low, 4), "lead_high": round(e.high, 4)} for name, e in self.leads.items()
        }
        baselines = {name: {**_plain(e), **leads[name]} for name, e in self.baselines.items()}
        return {"pack": self.pack, **_plain(self.estimate), **fields, "baselines": baselines, "protocol": self.protocol}

    def to_pandas(self) -> "pd.DataFrame":
        """The LDS of the index (or the scores) and of the baselines, one a line, with intervals and the lead over each baseline.

        Raises:
            UsageError: pandas is not installed.
        """
        return data_frame(self._lines(), _JUDGED)

    def _repr_html_(self) -> str:
        """The table of `to_pandas`, and the protocol, for notebooks."""
        lines = [tuple(line[name] for name in _JUDGED) for line in self._lines()]
        return html_table(f"LDS on {self.pack}", _JUDGED, lines) + f"<p>{escape(self.protocol)}.</p>"

    def _lines(self) -> list[dict[str, Any]]:
        name = "these scores" if self.bytes_per_example is None else "this index"
        lines = [dict(zip(_JUDGED, (name, *_interval(self.estimate), None, None, None), strict=True))]
        for baseline, value in self.baselines.items():
            lines.append(dict(zip(_JUDGED, (baseline, *_interval(value), *_interval(self.leads[baseline])), strict=True)))
        return lines

    @property
    def protocol(self) -> str:
        """Description of the protocol, in a sentence."""
        half = {"all": "all", "even": "the even-numbered", "odd": "the odd-numbered"}[self.half]
        return (
            f"Spearman's correlation over {self.subsets} retrained subsets (mean of {self.seeds} seed{'s' if self.seeds > 1 else ''}) of "
            f"{self.examples:,} examples, mean over {half} {self.queries} queries; 95 % intervals by bootstrap over subsets and queries"
            + ("; so few subsets say hardly anything: look at the interval" if self.subsets < _FEW_SUBSETS else "")
        )


def judge_index(
    directory: Path,
    options: Mapping[str, Any],
    *,
    index: str | Path | None = None,
    data: Path | None = None,
    half: Half = "all",
    scoring: ScoreOptions | None = None,
    out: Path | None = None,
    baselines: bool = True,
    reporter: Reporter = Silent(),
) -> Judgement:
    """Build an index over a pack's training examples, score its queries, and judge both the scores and the baselines.

    Args:
        directory: the pack.
        options: of the build (`BuildConfig`), without data and out; the pack defines the encoding of its documents.
        index: an index of the pack's training documents; None builds one.
        data: directory of an image pack's IDX files.
        half: the queries to use.
        scoring: options of the scores; those of the index's preset where they are not given.
        out: the index to write; by default a temporary one.
        baselines: judge these too, which may take longer than the index.

    Raises:
        NotFoundError, IntegrityError: see `read_pack`.
        IncompatibleError: the model or its tokenizer does not fit the pack's documents.
    """
    require_libraries()
    check_options(scoring or {})
    pack = read_pack(directory, data).half(half)
    with tempfile.TemporaryDirectory(prefix="wherefrom-") as scratch:
        folder = Path(scratch)
        if out is not None:
            refuse_occupied(out)
        documents = pack.train_file or _images_file(pack, folder, out)
        settings = {"model": str(pack.model), "task": pack.task, **pack.build, **{k: v for k, v in options.items() if v is not None}}
        config = BuildConfig(data=(str(documents),), out=str(out or folder / "index.wherefrom"), **settings)
        _check_append_token(pack, config)
        if index is None:
            build(config, reporter)
        client = Client(index or config.out, device=config.device, trust_remote_code=config.trust_remote_code, task=config.task)
        train, query_examples = pack_examples(client, pack, directory)
        if options.get("model") is None:
            _check_model(pack, client.recorded.task, client.encoder.model, query_examples)
        metric = Metric.of({**(scoring or {}), "preset": client.index.manifest.build.inputs.options.preset})
        scores = score_matrix(client.index, client.encode_examples(query_examples, metric), metric).T
        baseline_scores = {}
        if baselines:
            baseline_scores = content_baselines(train, query_examples) | gradient_baselines(client, train, query_examples)
            baseline_scores["hidden"] = hidden_baseline(
                client.recorded.task, client.encoder.model, train, query_examples, client.encoder.settings.batch_tokens
            )
        summary = client.index.summary()
        judgement = _judge(pack, half, scores, baseline_scores)
        defaults = BuildConfig(model="-", data="x", out="-").model_dump(mode="json")
        hidden = {"model", "data", "out", "task", "workers", "address", *pack.build}
        method = {k: v for k, v in config.model_dump(mode="json").items() if k not in hidden and v != defaults[k]}
        shown = ("curvature", "projection", "damping", "bits_per_token", "weight")
        components = {c["name"]: {k: v for k, v in c.items() if k in shown} for c in summary["components"]}
        sizes = {"bytes_per_example": summary["bytes_per_example"], "encoder_bytes": summary["encoder_bytes"]}
        return replace(judgement, **sizes, method={**metric.settings(), **components, **method})


def pack_examples(client: Client, pack: Pack, directory: Path) -> tuple[list[Example], list[Example]]:
    """Return the training examples of an index, which must be those of a pack, and the pack's queries as examples.

    Raises:
        IntegrityError: the index has other examples.
    """
    train = [client.index.example(row) for row in range(len(client.index))]
    if [e.id for e in train] != [d.id for d in pack.train]:
        raise IntegrityError(f"{directory}: its {len(pack.train)} documents gave {len(train)} examples that differ; each must give one")
    return train, client.to_examples(pack.queries)


def _images_file(pack: Pack, scratch: Path, out: Path | None) -> Path:
    """Write an image pack's examples to a file for the build: next to the index if that is kept, so the build can resume."""
    file = scratch / "train.jsonl"
    write_documents_file(pack.train, file)
    if out is None:
        return file
    path = Path(f"{out.resolve()}.images.jsonl")
    if not path.exists():
        write_whole(path, file.read_bytes())
    elif not path.is_file() or path.read_bytes() != file.read_bytes():
        raise UsageError(f"{path} exists and is not the pack's images; choose another out")
    return path


def judge_scores(
    directory: Path, file: Path, *, model: str | None = None, data: Path | None = None, half: Half = "all", device: str = "auto"
) -> Judgement:
    """Judge a matrix of scores [examples, queries] (.npy, or the only array of an .npz; or .zarr as `wherefrom scores` and
    `wherefrom replay` write it) on a pack, with the baselines without index.

    Args:
        file: scores of all the pack's queries, positive for an example that lowers the query's loss.

    Raises:
        NotFoundError, IntegrityError: see `read_pack`; there is no such file.
        UsageError: the file is not a matrix, or its shape does not fit the pack.
    """
    require_libraries()
    full_pack = read_pack(directory, data)
    pack = full_pack.half(half)
    scores = _scores_of_zarr(file, full_pack) if file.suffix == ".zarr" else _read_scores(file)
    if scores.ndim != 2 or scores.shape[1] != full_pack.losses.shape[2]:
        raise UsageError(
            f"{file} has the shape {scores.shape}; this pack needs {(len(full_pack.train), full_pack.losses.shape[2])} (examples, queries)"
        )
    columns = {"even": slice(0, None, 2), "odd": slice(1, None, 2), "all": slice(None)}[half]
    task = find_task(pack.task)
    source = ModelSource(model or str(pack.model), device=device)
    converter = task.converter(source, pack.build.get("max_tokens"), pack.build.get("long", "split"), pack.build.get("append_eos", True))
    train, query_examples = (list(usable(converter.documents(documents))) for documents in (pack.train, pack.queries))
    network = task.load(source)
    if model is None:
        _check_model(pack, task, network, query_examples)
    baselines = content_baselines(train, query_examples)
    baselines["hidden"] = hidden_baseline(task, network, train, query_examples, task.default_batch_tokens((network,)))
    return replace(_judge(pack, half, scores[:, columns], baselines), method={"scores": str(file)})


def _judge(pack: Pack, half: Half, scores: Scores, baselines: Mapping[str, Scores]) -> Judgement:
    subsets, seeds, queries = pack.losses.shape
    return Judgement(
        pack=pack.name,
        estimate=estimate(scores, pack.masks, pack.losses),
        bytes_per_example=None,
        encoder_bytes=None,
        queries=queries,
        subsets=subsets,
        seeds=seeds,
        examples=len(pack.train),
        half=half,
        ceiling=ceiling(pack.losses),
        split_half=split_half(pack.losses),
        baselines={name: estimate(baseline, pack.masks, pack.losses) for name, baseline in baselines.items()},
        leads={name: difference(scores, baseline, pack.masks, pack.losses) for name, baseline in baselines.items()},
        method={},
    )


def _check_append_token(pack: Pack, config: BuildConfig) -> None:
    """Check that the tokenizer's end-of-text token is the one that the pack appended."""
    if pack.append_token is None:
        return
    eos = load_tokenizer(model_sources(config)[0]).eos_token_id
    if eos != pack.append_token:
        raise IncompatibleError(
            f"the pack's documents end with token {pack.append_token}, this tokenizer's with {eos}; give the pack's model"
        )


def _check_model(pack: Pack, task: Task, model: nn.Module, queries: Sequence[Example]) -> None:
    """Check that the model gives the pack's queries the losses in the pack, up to the precision that it was saved in."""
    if pack.full_losses is not None:
        losses = compute_losses(task, model, queries)
        if np.abs(losses - pack.full_losses).mean() > _SAME_MODEL * pack.full_losses.mean():
            raise IncompatibleError(
                f"{pack.model} is not the pack's model: its mean loss on the queries is {losses.mean():.4g} nats, in the pack it is "
                f"{pack.full_losses.mean():.4g}; restore it, or set model"
            )


def _read_scores(file: Path) -> np.ndarray:
    if not file.is_file():
        raise NotFoundError(f"there is no file {file}")
    try:
        content = np.load(file, allow_pickle=False)
        matrix = content if isinstance(content, np.ndarray) else content[content.files[0]] if len(content.files) == 1 else None
    except Exception:  # numpy's readers raise many kinds of error, and advise to allow pickles
        matrix = None
    if matrix is None or matrix.dtype.kind not in "fiu":
        raise UsageError(f"{file} is not a matrix of numbers saved by numpy (.npy, or an .npz with one array)")
    return matrix.astype(np.float64)


def _scores_of_zarr(file: Path, pack: Pack) -> np.ndarray:
    """Read scores [examples, queries] of a pack's documents by their ids."""
    scores, rows, queries = read_matrix(file)
    positions = {id: i for i, id in enumerate(rows)}
    missing = [document.id for document in pack.train if document.id not in positions]
    if missing or len(positions) != len(pack.train) or queries != [document.id for document in pack.queries]:
        problem = f"none of {missing[0]!r}" if missing else "other queries, or other documents"
        raise UsageError(f"{file} is not of the pack {pack.name}: it has {problem}; write the scores of its train.jsonl and query.jsonl")
    return scores[:, [positions[document.id] for document in pack.train]].T.astype(np.float64)


def _interval(value: Estimate) -> tuple[float, float, float]:
    return value.value, value.low, value.high


def _plain(e: Estimate) -> dict[str, float]:
    return {"lds": round(e.value, 4), "low": round(e.low, 4), "high": round(e.high, 4)}
