"""The Python client: opens an index, hands the search the encoder that made it, returns answers.

This is where the query side meets the models: the `query` room is handed rows and never imports a model. A query by row needs no
model at all, and none is loaded for it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from jaxtyping import Float32, Float64

from .query.answers import Answer, Explanation, Query, TokenShares
from .query.asking import BaseClient, Options, check_options
from .query.assemble import make_answers
from .query.baselines import Scores, Words, compare, cosines, row_norms
from .query.explain import by_block, split_score
from .query.groups import group_scores
from .query.metric import Metric, QueryRows, combine, cut
from .query.parts import DenseQueries
from .query.scoring import Scorer, all_scores, standard_errors
from .query.search import search
from .store.corpus import Document
from .store.documents import Example
from .store.errors import DataError, IncompatibleError, UsageError
from .store.index import Index
from .store.manifest import SparseComponent, identity, latest_manifest
from .store.sparse import SparseVectors, concatenate

if TYPE_CHECKING:
    from .indexer.encoder import Encoder
    from .indexer.examples import DocumentEncoder
    from .indexer.models import ModelSource
    from .indexer.tasks import Task

_QUERY_BATCH_TOKENS = 2048
_DEFAULT_K = 10


def _metric(options: Options) -> Metric:
    check_options(options)
    return Metric(
        options.get("mode", "influence"),
        options.get("damping"),
        options.get("curvature", True),
        options.get("weights") or {},
        tuple(options.get("layers", ())),
    )


class Client(BaseClient):
    """Asks an index.

    Args:
        index: its directory.
        model: where the model lies now, if not where the index was built from (of several, all in their order); it must be the very
            same weights.
        device: where to run it: "auto", "cpu", "cuda", "cuda:1", or "map": spread over all GPUs.
        trust_remote_code: run code that comes with the model.
        task: of an index that was built with a task of one's own, its name again, `module:Class` (an index names no code to run).

    Example:
        >>> answer = Client("my.wherefrom").query(prompt="The capital of France is", completion=" Paris", k=5)  # doctest: +SKIP
        >>> answer.proponents[0].text  # doctest: +SKIP

    `connect` makes one of a directory, or of a running server (see remote.py), which answers the same.

    Raises:
        NotFoundError, IncompatibleError, IntegrityError: the index, or (at the first query in words) its model, is not what it must be.
    """

    def __init__(
        self,
        index: str | Path,
        *,
        model: str | Sequence[str] | None = None,
        device: str = "auto",
        trust_remote_code: bool = False,
        task: str | None = None,
    ) -> None:
        self.index = Index(index)
        self._task_name = task
        self._models = [model] if isinstance(model, str) else list(model or [])
        self._device = device
        self._trust_remote_code = trust_remote_code

    def __repr__(self) -> str:
        return f"Client({str(self.index.path)!r}, {len(self.index):,} rows)"

    def query_many(self, queries: Sequence[Query], **options: Unpack[Options]) -> list[Answer]:
        """Many queries in shared passes over the model and the rows; answers in the same order, or a single one for their mean."""
        _metric(options)  # an error before the model is asked
        return self.answer(queries, self.rows(queries), **options) if queries else []

    def answer(self, queries: Sequence[Query], rows: QueryRows, **options: Unpack[Options]) -> list[Answer]:
        """The same for queries whose rows are at hand (see `rows`)."""
        metric, k = _metric(options), options.get("k")
        asked = [query.to_dict() for query in queries]
        if options.get("mean"):
            weights = np.array([[1.0 if q.weight is None else q.weight for q in queries]])
            if not weights.any():
                raise UsageError("every query of the mean has the weight 0; leave at least one")
            rows, asked = combine(rows, weights / len(queries)), [{"mean_of": len(queries)}]
        where, column = options.get("where"), options.get("group_by")
        allowed = None if where is None else self.index.matching(where)
        searched = int((self.index.alive if allowed is None else self.index.alive & allowed).sum())
        if searched == 0:
            raise UsageError(f"no row matches the filter {where!r}" if where else "every row of this index was deleted")
        k = _DEFAULT_K if k is None else min(k, len(self.index))
        hits = search(self.index, rows, k, metric, allowed, options.get("recall", 1.0))
        own_row = [any(q.row is not None for q in queries)] * len(hits) if options.get("mean") else [q.row is not None for q in queries]
        both = standard_errors(self.index, rows, metric, [np.concatenate([h.proponents, h.opponents]) for h in hits])
        errors = [None if row else (e[: len(h.proponents)], e[len(h.proponents) :]) for h, e, row in zip(hits, both, own_row, strict=True)]
        groups = None if column is None else group_scores(self.index, rows, column, metric, allowed)
        beside = None
        if options.get("baselines"):
            scores = self._baselines(queries, options.get("mean", False))
            kept = self.index.alive if allowed is None else self.index.alive & allowed
            beside = compare(self.index, rows, scores, metric, kept, [h.proponents.tolist() for h in hits], k)
        return make_answers(
            self.index,
            asked,
            hits,
            metric,
            opponents=options.get("opponents", True),
            where=where,
            searched=searched,
            groups=groups,
            baselines=beside,
            errors=errors,
        )

    def scores(self, queries: Sequence[Query], **options: Unpack[Options]) -> Iterator[tuple[int, Float32[np.ndarray, "queries rows"]]]:
        """Every row's score for every query, as (first row, scores of a shard's rows); those of deleted rows too.

        Args:
            options: those that concern scores: mode, damping, curvature, weights, layers.
        """
        return all_scores(self.index, self.rows(queries), _metric(options))

    def prepare(self) -> None:
        """Load the models now, and not at the first query; for a process that does nothing else."""
        from .indexer.models import keep_freed_memory

        keep_freed_memory()
        if self.index.manifest.tokenizer is not None:
            self._documents  # noqa: B018
        self.encoder  # noqa: B018

    def refreshed(self) -> "Client":
        """A client of the index's newest state, which keeps the models where the encoder is still the same; itself if nothing changed."""
        latest = latest_manifest(self.index.path)
        if latest is not None and identity(latest) == self.index.identity:
            return self
        newer = Client(
            self.index.path, model=self._models, device=self._device, trust_remote_code=self._trust_remote_code, task=self._task_name
        )
        known = self.index.manifest
        if "encoder" in self.__dict__ and (newer.index.manifest.encoder, newer.index.manifest.models) == (known.encoder, known.models):
            newer.__dict__["encoder"] = self.encoder
        return newer

    def complete(self, prompt: str, tokens: int = 16) -> str:
        """What the (last) model says after a prompt, greedily.

        Raises:
            UsageError: the model does not generate, or the prompt is empty or too long.
        """
        import torch

        from .indexer.examples import TextEncoder

        model: Any = self.encoder.model
        if not isinstance(self._documents, TextEncoder) or not hasattr(model, "generate"):
            raise UsageError(f"the model of {self.index.path} does not write text; give a completion")
        ids = self._documents.tokenizer(prompt, return_tensors="pt")["input_ids"].to(next(model.parameters()).device)
        room = (self._context or ids.shape[1] + tokens) - ids.shape[1]
        if ids.shape[1] == 0 or room < 1:
            raise UsageError("the prompt is empty, or leaves no room in the model's context; give another")
        with torch.no_grad():
            mask, pad = torch.ones_like(ids), self._documents.tokenizer.eos_token_id
            made = model.generate(ids, attention_mask=mask, max_new_tokens=min(tokens, room), do_sample=False, pad_token_id=pad)
        return self._documents.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    def rows(self, queries: Sequence[Query]) -> QueryRows:
        """The queries' whitened rows, by component; of a query with `against`, the difference of two."""
        if any(query.against is not None for query in queries):
            plain, matrix = _without_contrasts(queries)
            return combine(self.rows(plain), matrix)
        worded = [i for i, query in enumerate(queries) if query.row is None]
        measured = self.measure(self.examples([queries[i] for i in worded])) if worded else {}
        result: dict[str, np.ndarray | SparseVectors] = {}
        for component in self.index.manifest.components:
            if isinstance(component, SparseComponent):
                blocks = [([i], self.index.entries(q.row, component)) for i, q in enumerate(queries) if q.row is not None]
                block = measured.get(component.name)
                result[component.name] = concatenate(
                    [*blocks, *([(worded, block)] if isinstance(block, SparseVectors) else [])], component.width
                )
            else:
                rows = np.zeros((len(queries), component.dim), np.float32)
                for i, q in enumerate(queries):
                    if q.row is not None:
                        rows[i] = self.index.row(q.row, component)
                block = measured.get(component.name)
                if isinstance(block, np.ndarray):
                    rows[worded] = block
                result[component.name] = rows
        return result

    def examples(self, queries: Sequence[Query]) -> list[Example]:
        """Queries as examples: encoded, or the index's own where a row is asked.

        Raises:
            UsageError: a text is empty or longer than the model's context; words are asked of vectors.
        """
        return [self._example(q) if q.row is None else self.index.example(q.row) for q in queries]

    def encode(self, documents: Iterable[Document]) -> list[Example]:
        """Documents as the build encodes them: cut to its longest example, ended, one or more examples of each.

        Raises:
            DataError: a document cannot be used.
        """
        examples = list(self._documents.documents(documents))
        for example in examples:
            if isinstance(example, DataError):
                raise example
        return [e for e in examples if isinstance(e, Example)]

    def measure(self, examples: Sequence[Example]) -> QueryRows:
        """The whitened rows, by component, of the task's measurement of some examples."""
        rows = self.encoder.rows(examples, queries=True)
        return {name: block.astype(np.float32) if isinstance(block, np.ndarray) else block for name, block in rows.items()}

    def explain(self, rows: Sequence[int], query: Query, *, tokens: bool = True, **options: Unpack[Options]) -> list[Explanation]:
        """The scores of some rows with one query, taken apart (see query/explain.py).

        Args:
            tokens: whether shares by token are computed, which asks the model; a row that is the query needs it then, too. Of vectors,
                which have no tokens, none are.
            options: those that concern scores: mode, damping, curvature, weights, layers.

        Raises:
            UsageError: there is no such row.
        """
        asked, metric = self.rows([query]), _metric(options)
        scorer = Scorer.of(self.index, asked, metric)
        tokens = tokens and self.index.manifest.tokenizer is not None
        found = []
        for row in rows:
            components, layers, vocabulary = split_score(scorer, 0, row)
            example = self.index.example(row)
            score = sum(part.score for part in components)
            found.append(Explanation(row, example.id, example.text, score, components, layers, vocabulary, blocks=by_block(layers)))
        return self._with_tokens(found, scorer, query, asked) if tokens and found else found

    def _with_tokens(self, found: Sequence[Explanation], scorer: Scorer, query: Query, asked: QueryRows) -> list[Explanation]:
        """Name the tokens of the vocabulary, and compute shares by token."""
        from .indexer.examples import token_name, token_texts
        from .indexer.shares import token_shares

        (asking,) = self.examples([replace(query, against=None)])
        examples = [self.index.example(e.row) for e in found]
        whole: QueryRows = self.encoder.rows(examples)
        asked = asked if query.row is None else self.encoder.rows([asking])  # whole rows, not what is left of them in the index
        ours: list[dict[str, np.ndarray | SparseVectors]] = []
        theirs: list[dict[str, np.ndarray | SparseVectors]] = []
        scales = []
        for i, explanation in enumerate(found):
            own: Mapping[str, Any] = cut(whole, i, i + 1)
            pairs: dict[str, Any] = {}
            for p in scorer.parts:
                name = p.component.name
                mine, its = asked[name], own[name]
                if isinstance(p, DenseQueries):
                    assert isinstance(mine, np.ndarray)
                    pairs[name] = [p.weighed(self.index, rows[0].astype(np.float32)) for rows in (mine, its)]
                else:
                    assert isinstance(mine, SparseVectors)
                    shared = np.intersect1d(mine.keys, its.keys)
                    pairs[name] = [p.weighed(self.index, rows.only(shared)) for rows in (mine, its)]
            ours.append({name: pair[0] for name, pair in pairs.items()})
            theirs.append({name: pair[1] for name, pair in pairs.items()})
            scales.append(scorer.scale(0, explanation.row))
            if scorer.mode == "cosine":  # of whole rows, as the shares are
                squared = scorer.squared_length(asked, stored=query.row is not None) * scorer.squared_length(own, stored=True)
                scales[-1] = float(squared**-0.5) if squared > 0 else 0.0
        beside = None
        if query.against is None:
            beside = token_shares(self.encoder, asking, theirs, query=query.row is None)
        tokenizer, explanations = self._documents.tokenizer, []  # type: ignore[attr-defined]
        for i, (explanation, example, scale) in enumerate(zip(found, examples, scales, strict=True)):
            shares = token_shares(self.encoder, example, ours[i : i + 1])[0] * scale
            explanations.append(
                replace(
                    explanation,
                    vocabulary=tuple(replace(part, name=token_name(tokenizer, part.token or 0)) for part in explanation.vocabulary),
                    recomputed=float(shares.sum()),
                    example=TokenShares(token_texts(tokenizer, example.token_ids), tuple(shares.tolist())),
                    query=None
                    if beside is None
                    else TokenShares(token_texts(tokenizer, asking.token_ids), tuple((beside[i] * scale).tolist())),
                )
            )
        return explanations

    def _baselines(self, queries: Sequence[Query], mean: bool) -> dict[str, Scores]:
        """What baselines say of all rows for some queries, or for their mean: name -> [rows, queries]."""
        queries, matrix = _without_contrasts(queries)
        examples, shards, asked_of = self.examples(queries), self.index.shards, len(matrix)
        if mean:
            weights = [1.0 if q.weight is None else q.weight for q in queries[:asked_of]]
            matrix = np.array([weights]) @ matrix / asked_of
        found = {}
        if self.index.manifest.tokenizer:
            found["bm25"] = self._words.scores([example.text for example in examples])
        hidden = [self.index.hidden(shard) for shard in shards]
        if all(part is not None for part in hidden):
            states = np.concatenate([part for part in hidden if part is not None]).astype(np.float32)
            asked = np.stack([states[q.row or 0] for q in queries])
            worded = [i for i, q in enumerate(queries) if q.row is None]
            if worded:
                from .indexer.hidden import mean_hidden

                asked[worded] = mean_hidden(self.task, self.encoder.model, [examples[i] for i in worded], _QUERY_BATCH_TOKENS)
            found["hidden"] = cosines(states, asked)
        norms = np.repeat(row_norms(self.index)[:, None], len(matrix), axis=1)
        return {"norm": norms, **{name: scores @ matrix.T for name, scores in found.items()}}

    @cached_property
    def _words(self) -> Words:
        return Words(self.index.column("text").to_pylist())

    @cached_property
    def task(self) -> "Task":
        """What the model is asked.

        Raises:
            UsageError: the index was built with a task of its user's own, and that was not named.
        """
        from .indexer.tasks import find_task

        name = self.index.manifest.task
        if ":" in name and self._task_name != name:
            raise UsageError(f"{self.index.path} was built with the task {name}, whose code runs only when you name it: `task` {name}")
        return find_task(name)

    @cached_property
    def _documents(self) -> "DocumentEncoder":
        options = self.index.manifest.build.what.options
        encoder = self.task.encoder(self._sources[0], options.max_tokens or self._context, options.long, options.append_eos)
        recorded = self.index.manifest.tokenizer
        if encoder.fingerprint != (recorded.fingerprint if recorded else None):
            raise IncompatibleError(
                f"the tokenizer of {self._sources[0].id} is not the one that {self.index.path} was built with; "
                "point `model` at the original, or build the index again"
            )
        return encoder

    def _example(self, query: Query) -> Example:
        from .indexer.examples import TextEncoder

        if not isinstance(self._documents, TextEncoder):
            raise UsageError(f"{self.index.path} holds vectors, not texts; ask it by row, or from Python with Client.measure")
        where = f"query {query.id}" if query.id else "the query"
        return self._documents.query(
            query.prompt,
            query.completion,
            query.text,
            messages=query.messages,
            tools=query.tools,
            span=query.span,
            context=self._context,
            where=where,
        )

    @property
    def _context(self) -> int | None:
        return min((model.context for model in self.index.manifest.models if model.context), default=None)

    @cached_property
    def encoder(self) -> "Encoder":
        """The encoder that made the rows, with its models.

        Raises:
            IncompatibleError: the model is not the one that the index was built with.
        """
        from .indexer.encoder import Encoder, EncoderPlan
        from .indexer.models import model_fingerprint

        manifest = self.index.manifest
        models = []
        for source, recorded in zip(self._sources, manifest.models, strict=True):
            model = self.task.load(source).requires_grad_(False)
            if model_fingerprint(model) != recorded.fingerprint:
                raise IncompatibleError(
                    f"the weights at {source.id} are not those that {self.index.path} was built with (another model, or trained "
                    "since); point `model` at the original, or build the index again"
                )
            models.append(model)
        plan = EncoderPlan(manifest.components, _QUERY_BATCH_TOKENS)
        return Encoder(self.task, tuple(models), plan, self.index.arrays)

    @cached_property
    def _sources(self) -> "list[ModelSource]":
        from .indexer.models import ModelSource

        recorded = self.index.manifest.models
        if self._models and len(self._models) != len(recorded):
            raise UsageError(
                f"{self.index.path} was built with {len(recorded)} models, `model` names {len(self._models)}; name all in order"
            )
        how = self._device, self._trust_remote_code
        if self._models:
            return [ModelSource(id, None, model.dtype, *how) for id, model in zip(self._models, recorded, strict=True)]
        return [ModelSource(model.id, model.revision, model.dtype, *how, model.base) for model in recorded]


def _without_contrasts(queries: Sequence[Query]) -> tuple[list[Query], Float64[np.ndarray, "queries plain"]]:
    """Queries without `against`, and of which of them those asked are the differences."""
    contrasts = [i for i, query in enumerate(queries) if query.against is not None]
    others = [replace(queries[i], completion=queries[i].against, against=None) for i in contrasts]
    matrix = np.eye(len(queries), len(queries) + len(others))
    matrix[contrasts, np.arange(len(queries), matrix.shape[1])] = -1.0
    return [*(replace(query, against=None) for query in queries), *others], matrix
