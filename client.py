"""The Python client of an index directory: encodes queries with the index's models, searches the rows, and returns answers.

This is where the query side meets the models: `query/` gets encoded queries and never imports a model. A query by row needs no model, and
none is loaded for it.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np

from .query.answers import Answer, Explanation, RefineReport, TokenShares
from .query.asking import BaseClient
from .query.assemble import DEFAULT_K, QueryRecord, answer_queries
from .query.baselines import BaselineScores, Words, cosines, row_norms
from .query.explain import by_block, split_score
from .query.metric import Metric
from .query.mixing import Mixing
from .query.options import Options, Query, ScoreOptions, check_queries
from .query.outliers import Outliers, find_outliers
from .query.parts import Parts, Search, WholeIndex, call_all, column_types
from .query.plain import query_document, without_contrasts
from .query.reliability import FEW, QueryEvidence
from .query.rerank import Recomputation
from .query.scoring import Scorer, mixed_components
from .query.select import Limits, Method, Selection, select
from .recompute import Recomputer
from .store.corpus import Document, usable
from .store.documents import Example
from .store.errors import DataError, UsageError
from .store.index import ColumnType, Index
from .store.kinds import KINDS
from .store.manifest import identity, latest_manifest
from .store.objects import StorePath
from .store.presets import mixes
from .store.shapes import Float32, Float64
from .store.usual import MOST_VALUES, HiddenStates, Usual, read_usual, share_below
from .store.vectors import Rows, combine, concatenate, slice_rows

if TYPE_CHECKING:
    from .indexer.encoder import Encoder
    from .indexer.recorded import RecordedEncoder

_QUERY_BATCH_TOKENS = 2048
_CACHED_QUERIES = 128
_REFRESH_SECONDS = 2.0  # between two requests of an object store for a newer state
_RERANKED = 100  # candidates of each side, where no number is given
_RERANK_WORK = {"cpu": 5e10, "cuda": 1e13}  # parameters times tokens: at most about two seconds


class _EncodedQuery(NamedTuple):
    """A query's rows, how they were refined, and what else is known of it."""

    rows: Rows
    refinement: RefineReport | None
    evidence: QueryEvidence


class Client(BaseClient):
    """Client of an index directory. `connect` returns one for a directory, and one with the same methods for a running server.

    Args:
        index: the directory, or an open index.
        model: the models' present location if it is not where the index was built from, in their order: directories, hub ids, or models in
            memory; they must have the very same weights.
        tokenizer: of a model in memory.
        device: "auto", "cpu", "cuda", "cuda:1", "map": whole layers spread over all GPUs, or "tp": every layer split over all GPUs.
        trust_remote_code: run code that comes with the model.
        task: for an index of a custom task, its name again, `module:Class`; an index does not name code to run.
        parts: searchers of the index in other processes (see ray_jobs/fleet.py).

    Raises:
        NotFoundError: there is no index.
        IncompatibleError: a newer version of Wherefrom wrote it; or (at the first query in words) its model is another one.
        IntegrityError: it is damaged.

    Examples:
        >>> answer = Client("my.wherefrom").query(prompt="The capital of France is", completion=" Paris", k=5)  # doctest: +SKIP
        >>> answer.proponents[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        index: str | Path | Index,
        *,
        model: Any = None,
        tokenizer: Any = None,
        device: str = "auto",
        trust_remote_code: bool = False,
        task: str | None = None,
        parts: Parts | None = None,
    ) -> None:
        self.index = parts.index if parts is not None else index if isinstance(index, Index) else Index(index)
        self.parts: Parts = WholeIndex(self.index) if parts is None else parts
        self._open_options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "task": task}
        self._models = () if model is None else tuple(model) if isinstance(model, list | tuple) else (model,)
        self._tokenizer = tokenizer
        self._last_refresh = 0.0  # time at which the newest state was requested
        self._encoded: OrderedDict[tuple[Query, tuple[Any, ...]], _EncodedQuery] = OrderedDict()

    def __repr__(self) -> str:
        return f"Client({str(self.index.path)!r}, {len(self.index):,} rows)"

    def query_many(self, queries: Sequence[Query], **options: Unpack[Options]) -> list[Answer]:
        """Answer several queries in shared passes over the model and the rows: in the same order, or one answer to their mean.

        Raises:
            UsageError: an option is unknown or out of range; a text is empty or longer than the model's context.
        """
        check_queries(queries)
        metric = Metric.of(options)  # an error before the model is loaded
        if options.get("rerank"):  # candidates are found by plain rows
            metric = replace(metric, refine=0)
        if not queries:
            return []
        by_row = [query.row is not None for query in queries]
        if options.get("rerank") is None and not options.get("mean") and not mixes(options) and 0 < sum(by_row) < len(queries):
            answers: dict[int, Answer] = {}  # whether candidates are computed again does not depend on the queries beside one
            for kind in (False, True):
                numbers = [number for number, is_row in enumerate(by_row) if is_row is kind]
                answers |= dict(zip(numbers, self.query_many([queries[number] for number in numbers], **options), strict=True))
            return [answers[number] for number in range(len(queries))]
        rows = self.encode_queries(queries, metric)
        evidence = [self._evidence(query, self._row_key(metric)) for query in queries]
        return self._answer(queries, rows, evidence, {**options, "rerank": self._candidates(queries, options)})

    def _candidates(self, queries: Sequence[Query], options: Options) -> int:
        """Return the number of candidates of each side that are computed again; 0 for none.

        Where no number is given: as many as take about two seconds, at most 100, where stored rows are estimates and the model is at hand.
        """
        given = options.get("rerank")
        if given is not None:
            return given
        manifest = self.index.manifest
        metric = Metric.of_answer(options, manifest.mode)
        are_estimates = any(c.one_bit or c.reduced or getattr(c, "dtype", None) == "int8" for c in manifest.components)
        if metric.mix is not None or metric.refine or not are_estimates or any(query.row is not None for query in queries):
            return 0
        work = sum(model.parameters for model in manifest.models) * manifest.tokens / manifest.rows
        device = next(self.encoder.model.parameters()).device.type
        candidates = min(_RERANKED, int(_RERANK_WORK.get(device, 0.0) / (2 * max(1.0, work))))
        k = options.get("k")
        return candidates if candidates >= (DEFAULT_K if k is None else min(int(k), len(self.index))) else 0

    def answer(self, queries: Sequence[Query], rows: Rows, **options: Unpack[Options]) -> list[Answer]:
        """Answer queries whose rows are known.

        Args:
            queries: what the answers show.
            rows: of the queries (see `encode`), or of anything else that was encoded.
            options: see `Options`; without `rerank`, nothing is computed again.
        """
        return self._answer(queries, rows, [QueryEvidence(by_row=query.row is not None) for query in queries], options)

    def _answer(self, queries: Sequence[Query], rows: Rows, evidence: Sequence[QueryEvidence], options: Options) -> list[Answer]:
        """Answer queries whose rows, and what else is known of them, are given."""
        records = [QueryRecord(query.to_dict(), its_evidence) for query, its_evidence in zip(queries, evidence, strict=True)]
        weights: Float64[np.ndarray, "answers queries"] = np.eye(len(queries))
        if options.get("mean"):
            weights = np.array([[1.0 if query.weight is None else query.weight for query in queries]]) / len(queries)
            if not weights.any():
                raise UsageError("every query of the mean has the weight 0; leave at least one")
            rows = combine(rows, weights)
            has_row = any(query.evidence.by_row for query in records)
            records = [QueryRecord({"mean_of": len(queries)}, QueryEvidence(by_row=has_row))]
        baselines = self._baselines(queries, weights) if options.get("baselines") else None
        recomputation = None
        if options.get("rerank"):
            recomputer = self._recomputer
            recompute = partial(recomputer.scores, queries, weights, Metric.of_answer(options, self.index.manifest.mode))
            layers = recomputer.unprojected_layers
            recomputation = Recomputation(options["rerank"] or 0, recompute, layers, recomputer.query_bits, lambda: recomputer.refinement)
        plain, _ = without_contrasts(queries)
        key = self._row_key(Metric.of(options))
        encoded = (self._encoded.get((query, key)) for query in plain)
        refinement = next((query.refinement if query else None for query in encoded), None)
        needs_types = options.get("where") is not None or options.get("group_by") is not None
        types = self._column_types if needs_types else None
        return answer_queries(self.parts, types, records, rows, options, baselines, recomputation, refinement, self._usual)

    def losses(self, queries: Sequence[Query]) -> list[float | None]:
        """Return the losses of queries, in nats for each token that the loss is on; None of a contrast."""
        self.encode_queries(queries, Metric())
        return [self._evidence(query, ()).loss for query in queries]

    def _evidence(self, query: Query, key: tuple[Any, ...]) -> QueryEvidence:
        """Return what is known of a query besides its rows."""
        if query.row is not None:
            shard, offset = self.index.locate(query.row)
            loss = float(self.index.losses(shard)[offset]) / self.index.example(query.row).loss_tokens
            return QueryEvidence(loss if np.isfinite(loss) else None, None, True)
        encoded = self._encoded.get((query, key))
        return QueryEvidence() if encoded is None else encoded.evidence

    def measure_usual(self, queries: Sequence[Query]) -> Usual | None:
        """Measure what is usual for held-out texts like those that will be asked, in place of training examples, and keep it in the index.

        A model that learned its training examples by heart expects others less, and would be doubted too often.

        Raises:
            UsageError: there are fewer than 50 queries, or more than 4,096.
        """
        from .ray_jobs.usual import measure_usual

        if not FEW <= len(queries) <= MOST_VALUES:
            raise UsageError(f"{len(queries):,} queries are too few or too many to say what is usual; give {FEW} to {MOST_VALUES:,}")
        usual = measure_usual(self.index, None, [self.encoder.ask(self.query_examples(queries))])
        self.__dict__.pop("_usual", None)
        return usual

    def density_percentiles(self, rows: Sequence[int]) -> list[float | None]:
        """Return, for rows, the percentage of sampled training examples around which hidden states lie less densely; None if unknown."""
        usual = self._usual
        if usual is None or usual.densities is None or not rows:
            return [None] * len(rows)
        places = [self.index.locate(row) for row in rows]
        blocks = [self.index.hidden(shard) for shard, _ in places]
        states = np.stack([block[offset] for block, (_, offset) in zip(blocks, places, strict=True) if block is not None])
        distances = self._hidden_states.squared_distances(states.astype(np.float32), list(rows))
        return [100 * share_below(usual.densities, value) for value in HiddenStates.log_densities(distances, usual.bandwidth).tolist()]

    @cached_property
    def _usual(self) -> Usual | None:
        return read_usual(self.index)

    @cached_property
    def _hidden_states(self) -> HiddenStates:
        return HiddenStates(self.index)

    @cached_property
    def _column_types(self) -> dict[str, ColumnType]:
        return column_types(self.parts)

    def scores(
        self, queries: Sequence[Query], where: str | None = None, **options: Unpack[ScoreOptions]
    ) -> Float32[np.ndarray, "queries rows"]:
        """Score every row for every query: an array of queries and rows.

        The score is NaN for deleted rows and those that do not match the filter `where`.
        """
        return np.concatenate([block for _, block in self.score_blocks(queries, where=where, **options)], axis=1)

    def score_blocks(
        self,
        queries: Sequence[Query],
        mixings: Mapping[str, Mixing] | None = None,
        where: str | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Iterator[tuple[int, Float32[np.ndarray, "queries rows"]]]:
        """Yield the first row of each group of shards, and the scores of its rows, as `scores` does.

        Args:
            mixings: of queries that are asked together; by default, of these.
        """
        search = self._search(queries, where, options, mixings)
        for group, block in zip(self.index.groups, self.parts.stream(search), strict=True):
            yield group.first, block

    def histogram(self, query: Query, bins: int, where: str | None = None, **options: Unpack[ScoreOptions]) -> dict[str, Any]:
        """Count the scores of all rows in bins of equal width: `edges`, `counts`, and the number of `rows` that have a score.

        Rows are those of `scores`.
        """
        search = self._search([query], where, options)
        extremes = call_all(self.parts, "extremes", search).values()
        rows = sum(rows for _, _, rows in extremes)
        if not rows:
            return {"edges": [], "counts": [], "rows": 0}
        low = min(low for low, _, _ in extremes)
        high = max(high for _, high, _ in extremes)
        counts = sum(call_all(self.parts, "histogram", search, bins, low, high).values())
        edges = np.histogram_bin_edges(np.zeros(0), bins, (low, high))
        return {"edges": edges.tolist(), "counts": counts.tolist(), "rows": rows}

    def scorer(self, queries: Sequence[Query], **options: Unpack[ScoreOptions]) -> Scorer:
        """Prepare queries for products with the rows."""
        return self.parts.scorer(self._search(queries, None, options))

    def _search(
        self, queries: Sequence[Query], where: str | None, options: ScoreOptions, mixings: Mapping[str, Mixing] | None = None
    ) -> Search:
        """Encode queries for a search of all rows."""
        metric = Metric.of(options)
        rows = self.encode_queries(queries, metric)
        mixings = mixed_components(self.index, rows, metric) if mixings is None else mixings
        search = Search(rows, metric, mixings, where, None if where is None else self._column_types)
        self.parts.scorer(search)  # refuses what is not possible with the index
        return search

    def mixings(self, queries: Sequence[Query], **options: Unpack[ScoreOptions]) -> dict[str, Mixing]:
        """Mix the second moments of queries that are asked together into the curvature of each component, as `mix` says."""
        metric = Metric.of(options)
        return mixed_components(self.index, self.encode_queries(queries, metric), metric)

    def encode(self, queries: Sequence[Query], **options: Unpack[ScoreOptions]) -> Rows:
        """Compute the whitened rows of queries, by component; of a query with `against`, the difference of the two completions' rows.

        The rows of the last 128 queries that are not rows of the index are cached.

        Args:
            options: the rows depend on `training`, with several models, and on `refine`.

        Raises:
            UsageError: an option is unknown or out of range; a text is empty or longer than the model's context.
        """
        return self.encode_queries(queries, Metric.of(options))

    def encode_queries(self, queries: Sequence[Query], metric: Metric) -> Rows:
        """See `encode`."""
        check_queries(queries)
        if any(query.against is not None for query in queries):
            plain, matrix = without_contrasts(queries)
            return combine(self.encode_queries(plain, metric), matrix)
        if any(query.row is not None for query in queries) and self._rows_are_adam_steps:
            raise UsageError("the rows of this index are Adam's steps, and no gradients to ask about; ask by the example's text")
        key = self._row_key(metric)
        missing = [query for query in dict.fromkeys(queries) if (query.row is None or key) and (query, key) not in self._encoded]
        for by_row in (False, True):
            part = [query for query in missing if (query.row is not None) is by_row]
            if part:
                try:
                    encoded = self._encode_with_report(self.query_examples(part), metric, queries=not by_row)
                except DataError as error:  # what the model does not take, such as a class that it does not know
                    raise UsageError(str(error)) from error
                for query, encoded_query in zip(part, encoded, strict=True):
                    self._encoded[query, key] = encoded_query
        rows = concatenate([self._query_rows(query, key) for query in queries])
        while len(self._encoded) > _CACHED_QUERIES:
            self._encoded.popitem(last=False)
        return rows

    def _row_key(self, metric: Metric) -> tuple[Any, ...]:
        """Cache key of encoded rows besides the query; empty for plain rows."""
        special = metric.refine or (metric.training is not None and len(self.index.manifest.models) > 1)
        return metric.row_settings if special else ()

    @property
    def _rows_are_adam_steps(self) -> bool:
        return any("optimizer" in c.features and not c.linear for c in self.index.manifest.components)

    def is_cached(self, query: Query) -> bool:
        """Return True if `encode` does not need the model for a query."""
        return query.row is not None or (query, ()) in self._encoded

    def _query_rows(self, query: Query, key: tuple[Any, ...]) -> Rows:
        if query.row is not None and not key:
            return {component.name: self.index.vectors(query.row, component) for component in self.index.manifest.components}
        self._encoded.move_to_end((query, key))
        return self._encoded[query, key].rows

    def prepare(self) -> None:
        """Load models, tokenizer and compiled loops now instead of at the first queries."""
        from .indexer.models import configure_memory
        from .store import kernels  # noqa: F401

        configure_memory()
        if self.index.manifest.tokenizer is not None:
            _ = self.recorded.converter
        _ = self.recorded.encoder

    def refreshed(self) -> "Client":
        """Return a client of the index's newest state, or itself if nothing changed; models are kept where the encoder is the same."""
        if isinstance(self.index.path, StorePath) and time.monotonic() - self._last_refresh < _REFRESH_SECONDS:
            return self
        self._last_refresh = time.monotonic()
        latest = latest_manifest(self.index.path)
        if latest is not None and identity(latest) == self.index.identity:
            return self
        parts = self.parts.moved_to(Index(self.index.path))
        newer = Client(parts.index, model=self._models, tokenizer=self._tokenizer, **self._open_options, parts=parts)
        if "recorded" in self.__dict__:
            newer.recorded = self.recorded.moved_to(newer.index)
            if newer.index.manifest.encoder == self.index.manifest.encoder:
                plain = [(key, encoded) for key, encoded in self._encoded.items() if not key[1]]  # others depend on the corpus
                newer._encoded = OrderedDict(plain)
        return newer

    @cached_property
    def recorded(self) -> "RecordedEncoder":
        """The index's encoder with its models and tokenizer, loaded when first needed."""
        from .indexer.models import LoadedModel
        from .indexer.recorded import RecordedEncoder

        models: list[str | LoadedModel] = [
            str(model) if isinstance(model, str | Path) else LoadedModel(model, self._tokenizer) for model in self._models
        ]
        return RecordedEncoder(self.index, models, **self._open_options)

    @property
    def encoder(self) -> "Encoder":
        """The encoder that computed the rows of the index.

        Raises:
            IncompatibleError: the model is not the one that the index was built with.
        """
        return self.recorded.encoder

    def complete(self, prompt: str, tokens: int = 16) -> str:
        """Complete a prompt greedily with the (last) model.

        Raises:
            UsageError: the model does not generate text, or the prompt is empty or too long.
        """
        import torch

        from .indexer.examples import TextConverter
        from .indexer.tensor_parallel import is_split

        documents = self.recorded.converter
        model: Any = self.recorded.models[-1]
        if not isinstance(documents, TextConverter) or not hasattr(model, "generate"):
            raise UsageError(f"the model of {self.index.path} does not write text; give a completion")
        ids = documents.tokenizer(prompt, return_tensors="pt")["input_ids"].to(next(model.parameters()).device)
        free = (self.recorded.context or ids.shape[1] + tokens) - ids.shape[1]
        if ids.shape[1] == 0 or free < 1:
            raise UsageError("the prompt is empty, or leaves no room in the model's context; give another")
        with torch.no_grad():
            completed = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(tokens, free),
                do_sample=False,
                use_cache=not is_split(model),
                pad_token_id=documents.tokenizer.eos_token_id,
            )
        return documents.tokenizer.decode(completed[0, ids.shape[1] :], skip_special_tokens=True)

    def to_examples(self, documents: Iterable[Document]) -> list[Example]:
        """Convert documents to examples as the build does: one or more of each.

        Raises:
            DataError: a document cannot be used.
        """
        return list(usable(self.recorded.converter.documents(documents)))

    def encode_examples(self, examples: Sequence[Example], metric: Metric = Metric(), queries: bool = True) -> Rows:
        """Compute the whitened rows of the task's measurement of examples, by component.

        Args:
            metric: see `encode`.
            queries: False for the loss of training examples.
        """
        return concatenate([query.rows for query in self._encode_with_report(examples, metric, queries)])

    def _encode_with_report(self, examples: Sequence[Example], metric: Metric, queries: bool) -> list[_EncodedQuery]:
        """Compute the rows of examples, with reports of their refinement."""
        refinement = None
        evidence = [QueryEvidence()] * len(examples)
        if self._row_key(metric):
            from .query_rows import query_rows

            exact, refinement = query_rows(self.index, self.encoder, metric, examples, queries)
            rows = {c.name: KINDS[c.kind].stored(exact[c.name], c).as_float32() for c in self.index.manifest.components}
        else:
            asked = self.encoder.ask(examples, queries)
            rows = asked.rows
            densities: list[float | None] = [None] * len(examples)
            if asked.hidden is not None and self._usual is not None and self._usual.densities is not None:
                distances = self._hidden_states.squared_distances(asked.hidden)
                densities = HiddenStates.log_densities(distances, self._usual.bandwidth).tolist()
            evidence = [QueryEvidence(loss, density) for loss, density in zip(asked.losses.tolist(), densities, strict=True)]
        return [_EncodedQuery(slice_rows(rows, i, i + 1), refinement, evidence[i]) for i in range(len(examples))]

    @cached_property
    def _recomputer(self) -> Recomputer:
        return Recomputer(self.index, self.encoder, self.query_examples)

    def recomputed_scores(
        self, queries: Sequence[Query], rows: Sequence[int], **options: Unpack[ScoreOptions]
    ) -> Float64[np.ndarray, "queries rows"]:
        """Compute the scores of training examples again with the model, from uncoded rows, as `rerank` does for candidates.

        The vectors of more queries than fit into a gibibyte are kept in 8 bits.

        Args:
            rows: of the examples.
        """
        return self._recomputer.scores(queries, np.eye(len(queries)), Metric.of(options), np.asarray(rows, np.int64))

    def recomputed_blocks(
        self, queries: Sequence[Query], **options: Unpack[ScoreOptions]
    ) -> Iterator[tuple[int, Float32[np.ndarray, "queries rows"]]]:
        """Yield the first row of each group of shards, and recomputed scores of its rows, NaN for deleted ones: a pass over the corpus."""
        scores = self.recomputed_scores(queries, range(len(self.index)), **options).astype(np.float32)  # queries are encoded once
        scores[:, self.index.deleted] = np.nan
        for group in self.index.groups:
            yield group.first, scores[:, group.first : group.first + group.rows]

    def select(
        self,
        targets: Sequence[Query],
        budget: int,
        *,
        by: str = "cosine",
        method: Method = "cover",
        limits: Limits = Limits(),
        where: str | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Selection:
        """Choose training examples for targets, within a budget (see query/select.py).

        Args:
            by: a mode of scores, or "bm25" or "random" for a choice to compare with.
            method: "sum", "max" or "cover".
            limits: what may be chosen together.
            where: choose only rows that match a filter.

        Raises:
            UsageError: an option is out of range, or there is nothing to choose.
        """
        check_queries(targets)
        names = [query.id or str(number) for number, query in enumerate(targets)]
        weights = np.array([1.0 if query.weight is None else query.weight for query in targets])
        if by in ("bm25", "random"):
            mask = self.index.alive if where is None else self.index.alive & self.index.matching(where)
            scores = np.random.default_rng(0).random((len(targets), len(self.index)))
            if by == "bm25":
                scores = self._words.scores([example.text for example in self.query_examples(targets)]).T
            everything = [(0, np.where(mask, scores, np.nan).astype(np.float32))]
            blocks: Any = partial(iter, everything)
        else:
            mode: Any = by  # checked with the other options
            blocks = partial(self.score_blocks, targets, where=where, **{**options, "mode": mode})
        return select(self.index, blocks, names, weights, budget, method=method, by=by, limits=limits)

    def outliers(self, *, k: int = 20, similar: float = 0.95, where: str | None = None) -> Outliers:
        """Find training examples to look at: of largest self-influence, with contradicted labels, and near-duplicates (query/outliers.py).

        Args:
            k: examples of each kind.
            similar: cosine above which rows are near-duplicates.
            where: a filter of the rows.

        Raises:
            UsageError: an option is out of range, or no row matches.
        """
        from .ray_jobs.progress import default_reporter

        with default_reporter() as reporter:
            return find_outliers(self.index, reporter, k=k, similar=similar, where=where)

    def explain(self, examples: Sequence[int], query: Query, *, tokens: bool = True, **options: Unpack[ScoreOptions]) -> list[Explanation]:
        """Split the scores of training examples with one query by component, layer, shared token, and token of either text.

        Args:
            examples: their rows.
            tokens: compute the shares of tokens, which needs the model; vectors have none.

        Raises:
            UsageError: a row is not in the index, or tokens have no shares since rows are not linear in the gradient.
        """
        metric = Metric.of_answer(options, self.index.manifest.mode)
        nonlinear = [component.name for component in self.index.manifest.components if not component.linear]
        if tokens and nonlinear:
            raise UsageError(
                f"the rows of {nonlinear[0]} are not linear in the gradient, so that tokens have no shares; ask without tokens"
            )
        query_rows = self.encode_queries([query], metric)
        scorer = Scorer.of(self.index, query_rows, metric)
        explanations = []
        for row in examples:
            components, layers, vocabulary = split_score(scorer, 0, row)
            example = self.index.example(row)
            score = sum(part.score for part in components)
            explanations.append(Explanation(row, example.id, example.text, score, components, layers, vocabulary, blocks=by_block(layers)))
        with_tokens = tokens and self.index.manifest.tokenizer is not None and explanations and self.recorded.task.has_token_shares
        return self._with_tokens(explanations, scorer, query, query_rows, metric) if with_tokens else explanations

    def _with_tokens(
        self, explanations: Sequence[Explanation], scorer: Scorer, query: Query, query_rows: Rows, metric: Metric
    ) -> list[Explanation]:
        """Name the tokens of the vocabulary, and compute shares by token; of the query's only where its row is a plain gradient."""
        from .indexer.examples import token_name, token_texts
        from .indexer.shares import token_shares

        (query_example,) = self.query_examples([replace(query, against=None)])
        examples = [self.index.example(explanation.row) for explanation in explanations]
        example_rows = self.encoder.rows(examples, exact=True)
        is_plain = not self._row_key(metric)
        if query.row is not None and is_plain:  # the full row, and not what the index stores of it
            query_rows = self.encoder.rows([query_example], exact=True)
        operands = {operand.component.name: operand for operand in scorer.operands}
        scaled_queries: list[Rows] = []
        scaled_examples: list[Rows] = []
        scales = []
        for number, explanation in enumerate(explanations):
            row = slice_rows(example_rows, number, number + 1)
            scaled_queries.append({n: o.scaled(self.index, query_rows[n].shared_with(row[n]), stored=False) for n, o in operands.items()})
            scaled_examples.append({n: o.scaled(self.index, row[n].shared_with(query_rows[n]), stored=False) for n, o in operands.items()})
            scales.append(scorer.scale(0, explanation.row))
            if scorer.mode == "cosine":  # of full rows, as the shares are
                squared = scorer.squared_length(query_rows, stored=False) * scorer.squared_length(row, stored=False)
                scales[-1] = float(squared**-0.5) if squared > 0 else 0.0
        query_shares = None
        if query.against is None and is_plain:
            query_shares = token_shares(self.encoder, query_example, scaled_examples, query=query.row is None)
        tokenizer = self.recorded.converter.tokenizer  # type: ignore[attr-defined]
        result = []
        for number, (explanation, example, scale) in enumerate(zip(explanations, examples, scales, strict=True)):
            shares = token_shares(self.encoder, example, scaled_queries[number : number + 1])[0] * scale
            query_tokens = None
            if query_shares is not None:
                query_tokens = TokenShares(token_texts(tokenizer, query_example.token_ids), tuple((query_shares[number] * scale).tolist()))
            result.append(
                replace(
                    explanation,
                    vocabulary=tuple(replace(part, name=token_name(tokenizer, part.token or 0)) for part in explanation.vocabulary),
                    recomputed=float(shares.sum()),
                    example=TokenShares(token_texts(tokenizer, example.token_ids), tuple(shares.tolist())),
                    query=query_tokens,
                )
            )
        return result

    def query_examples(self, queries: Sequence[Query]) -> list[Example]:
        """Convert queries to examples: tokenized, or those of the index for queries by row.

        Raises:
            UsageError: a text is empty or longer than the model's context; text for an index of vectors, or a vector for one of texts.
        """
        return [self._example(query) if query.row is None else self.index.example(query.row) for query in queries]

    def _example(self, query: Query) -> Example:
        return self.recorded.converter.query(query_document(query), query.span, self.recorded.context)

    def _baselines(self, queries: Sequence[Query], weights: Float64[np.ndarray, "answers asked"]) -> BaselineScores:
        """Compute the baselines' scores of all rows, for queries or for their mean."""
        plain, contrasts = without_contrasts(queries)
        matrix = weights @ contrasts
        examples = self.query_examples(plain)
        baselines = {"norm": np.repeat(row_norms(self.index)[:, None], len(matrix), axis=1)}
        if self.index.manifest.tokenizer:
            baselines["bm25"] = self._words.scores([example.text for example in examples]) @ matrix.T
        hidden = [self.index.hidden(shard) for shard in self.index.shards]
        if all(block is not None for block in hidden):
            states = np.concatenate([block for block in hidden if block is not None]).astype(np.float32)
            query_states = np.stack([states[query.row or 0] for query in plain])
            not_by_row = [i for i, query in enumerate(plain) if query.row is None]
            if not_by_row:
                from .indexer.hidden import mean_hidden

                examples_not_by_row = [examples[i] for i in not_by_row]
                query_states[not_by_row] = mean_hidden(self.recorded.task, self.encoder.model, examples_not_by_row, _QUERY_BATCH_TOKENS)
            baselines["hidden"] = cosines(states, query_states) @ matrix.T
        return baselines

    @cached_property
    def _words(self) -> Words:
        return Words(self.index.column("text").to_pylist())
