"""The Python client: opens an index, hands the search the encoder that made it, returns answers.

This is where the query side meets the models: the `query` room is handed rows and never imports a model. A question by row needs no
model at all, and none is loaded for it.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .query.answers import Answer, Question, make_answers
from .query.search import Metric, Mode, QueryRows, search
from .store.errors import IncompatibleError
from .store.index import Index

if TYPE_CHECKING:
    from .indexer.encoder import Encoder
    from .indexer.examples import ExampleEncoder
    from .indexer.models import ModelSource

_QUESTION_BATCH_TOKENS = 2048
_DEFAULT_K = 10


class Client:
    """Asks an index.

    Args:
        index: its directory.
        model: where the model lies now, if not where the index was built from; it must be the very same weights.
        device: where to run it: "auto", "cpu", "cuda", "cuda:1".
        trust_remote_code: run code that comes with the model.

    Example:
        >>> answer = Client("my.whence").query(prompt="The capital of France is", completion=" Paris", k=5)  # doctest: +SKIP
        >>> answer.proponents[0].text  # doctest: +SKIP

    Raises:
        NotFoundError, IncompatibleError, IntegrityError: the index, or (at the first question in words) its model, is not what it must be.
    """

    def __init__(self, index: str | Path, *, model: str | None = None, device: str = "auto", trust_remote_code: bool = False) -> None:
        self.index = Index(index)
        self._model = model
        self._device = device
        self._trust_remote_code = trust_remote_code

    def query(
        self,
        *,
        prompt: str = "",
        completion: str | None = None,
        text: str | None = None,
        row: int | None = None,
        k: int | None = None,
        opponents: bool = True,
        mode: Mode = "influence",
        damping: float | None = None,
    ) -> Answer:
        """The k strongest proponents and opponents of one question.

        Args:
            prompt, completion: the loss is taken on the completion alone.
            text: the loss is taken on all of it; encoded as the documents were, with the end-of-text token unless the build left it out.
            row: a training example, as it lies in the index.
            k: at most so many of each; by default 10, or all rows where there are fewer.
            opponents: whether to return opponents.
            mode: "influence" (self-influential examples weigh more) or "cosine".
            damping: relative to the mean eigenvalue; None keeps the build's.

        Raises:
            UsageError: not exactly one question, k out of range, a text that is empty or longer than the model's context.
        """
        question = Question(prompt, completion, text, row)
        return self.query_many([question], k=k, opponents=opponents, mode=mode, damping=damping)[0]

    def query_many(
        self,
        questions: Sequence[Question],
        *,
        k: int | None = None,
        opponents: bool = True,
        mode: Mode = "influence",
        damping: float | None = None,
    ) -> list[Answer]:
        """Many questions in shared passes over the model and the rows; answers in the same order."""
        metric = Metric(mode, damping)
        if not questions:
            return []
        hits = search(self.index, self.rows(questions), min(_DEFAULT_K, len(self.index)) if k is None else k, metric)
        return make_answers(self.index, questions, hits, metric, opponents)

    def rows(self, questions: Sequence[Question]) -> QueryRows:
        """The questions' whitened rows, by segment."""
        (segment,) = self.index.manifest.segments
        result = np.zeros((len(questions), segment.dim), np.float32)
        worded = []
        for i, question in enumerate(questions):
            if question.row is not None:
                result[i] = self.index.row(question.row, segment)
            else:
                worded.append(i)
        if worded:
            examples = []
            for i in worded:
                q = questions[i]
                where = f"question {q.id}" if q.id else "the question"
                context = self.index.manifest.model.context
                examples.append(self._tokens.question(q.prompt, q.completion, q.text, context=context, where=where))
            result[worded] = self._encoder.rows(examples)
        return {segment.name: result}

    @cached_property
    def _tokens(self) -> "ExampleEncoder":
        from .indexer.examples import ExampleEncoder
        from .indexer.models import load_tokenizer, tokenizer_fingerprint

        tokenizer = load_tokenizer(self._source())
        if tokenizer_fingerprint(tokenizer) != self.index.manifest.tokenizer.fingerprint:
            raise IncompatibleError(
                f"the tokenizer of {self._source().id} is not the one that {self.index.path} was built with; "
                "point --model at the original, or build the index again"
            )
        append_eos = self.index.manifest.build["what"]["options"]["append_eos"]
        return ExampleEncoder(tokenizer, max_tokens=1 << 30, append_eos=append_eos)

    @cached_property
    def _encoder(self) -> "Encoder":
        from .indexer.encoder import Encoder, EncoderPlan
        from .indexer.models import load_model, model_fingerprint

        manifest = self.index.manifest
        model = load_model(self._source())
        if model_fingerprint(model) != manifest.model.fingerprint:
            raise IncompatibleError(
                f"the weights at {self._source().id} are not those that {self.index.path} was built with (another model, or trained "
                "since); point --model at the original, or build the index again"
            )
        (segment,) = manifest.segments
        plan = EncoderPlan(segment.layers, segment.projection, segment.curvature, _QUESTION_BATCH_TOKENS)
        return Encoder(model, plan, self.index.arrays)

    def _source(self) -> "ModelSource":
        from .indexer.models import ModelSource

        recorded = self.index.manifest.model
        return ModelSource(
            self._model or recorded.id,
            None if self._model else recorded.revision,
            recorded.dtype,
            self._device,
            self._trust_remote_code,
        )
