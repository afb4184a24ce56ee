"""Conversion of documents, and of queries that are documents, to examples: token ids and a loss mask, at most `max_tokens` of a document.

Every form of document becomes one text with *loss spans* (all of it; the completion; the assistant's turns). The full text is tokenized
at once, as in training, and a token is in the loss when it holds a character of a span: a token across the end of a prompt belongs to the
completion. The first token is never in the loss, since nothing predicts it.

Split documents overlap by one token, which is context in the later chunk: every loss token is counted in exactly one chunk.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from ..store.corpus import Document
from ..store.documents import Example
from ..store.errors import DataError, UsageError
from ..store.shapes import Bool, Int64
from .chat import Conversation
from .models import tokenizer_fingerprint

_TOKENIZE_BATCH = 256
_MOST_PENDING = 48  # tokens that may wait for the end of a character; each is decoded with those before it
Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]  # token ids, loss mask, character offsets [tokens, 2]


@dataclass(frozen=True)
class Rendered:
    """The text of a document, with its loss spans (start and end in characters).

    Attributes:
        add_special_tokens: the tokenizer adds its special tokens, which the text does not hold.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    add_special_tokens: bool = True


@runtime_checkable
class DocumentConverter(Protocol):
    """Conversion of documents to examples.

    Errors of the reader pass through in their places, so that documents keep their order and their number.
    """

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the tokenizer; None without one."""

    def documents(self, documents: Iterable[Document | DataError]) -> Iterator[Example | DataError]:
        """Convert a stream of documents, in order; an unusable one yields its error."""

    def query(self, document: Document, span: str | None = None, context: int | None = None) -> Example:
        """Convert a query, given as a document, to one example, which is never cut.

        Args:
            document: its text, completion, messages or features; its id is not used.
            span: a part of the text; the loss is on its tokens alone.
            context: the model's longest input, in tokens; the example may have one more, the last target.

        Raises:
            UsageError: it is empty or too long, or holds a text for an index of vectors, or a vector for an index of texts.
        """


def convert_each(
    documents: Iterable[Document | DataError], convert: Callable[[Document], Iterable[Example]]
) -> Iterator[Example | DataError]:
    """Yield the examples of each document, and errors with the document's place, in order."""
    for document in documents:
        if isinstance(document, DataError):
            yield document
            continue
        try:
            yield from convert(document)
        except DataError as error:
            yield DataError(f"{document.where}: {error}")


class ArrayConverter(ABC):
    """Conversion of documents that hold no texts, each to one example.

    Attributes:
        ask: what the index holds, and how it is asked, for the error of a query of another kind.
    """

    ask: ClassVar[str]

    @property
    def fingerprint(self) -> None:
        """None, since there is no tokenizer."""
        return

    def documents(self, documents: Iterable[Document | DataError]) -> Iterator[Example | DataError]:
        """See `DocumentConverter`."""
        return convert_each(documents, lambda document: (self.example(document),))

    def query(self, document: Document, span: str | None = None, context: int | None = None) -> Example:
        """See `DocumentConverter`."""
        if not self.accepts(document):
            raise UsageError(self.ask)
        try:
            return self.example(document)
        except DataError as error:
            raise UsageError(f"{document.where}: {error}") from error

    @abstractmethod
    def accepts(self, document: Document) -> bool:
        """Return True if a document is of the kind that the index holds."""

    @abstractmethod
    def example(self, document: Document) -> Example:
        """Convert a document.

        Raises:
            DataError: it lacks something, or cannot be read.
        """


@dataclass(frozen=True)
class VectorConverter(ArrayConverter):
    """Conversion of documents that hold vectors.

    Attributes:
        needs_label: a document without a label is an error.
    """

    needs_label: bool = True

    ask = "the index holds vectors, not texts; ask it by row, or with features and a label"

    def accepts(self, document: Document) -> bool:
        """See `ArrayConverter`."""
        return document.features is not None

    def example(self, document: Document) -> Example:
        """See `ArrayConverter`."""
        if document.features is None:
            raise DataError("a text, but this task needs the fields features and label")
        if document.label is None and self.needs_label:
            raise DataError("there is no label; this task needs the fields features and label")
        return Example(
            id=document.id,
            text=f"{len(document.features):,} numbers" if document.label is None else f"label {document.label}",
            source=document.source,
            token_ids=np.zeros(0, np.int32),
            loss_mask=np.zeros(0, bool),
            document=document.id,
            metadata=document.metadata,
            features=document.features,
            label=document.label,
        )


@dataclass(frozen=True)
class TextConverter:
    """Conversion of text documents.

    Attributes:
        takes_label: a query may have a label.
        tokenizer: a fast `transformers` tokenizer (character offsets are needed).
        max_tokens: longest example, in tokens.
        long: treatment of a longer document: "split" into chunks, or "truncate".
        append_eos: append the end-of-text token to a document, where it is predicted, as in most pre-training; not to chats, whose
            template writes it, nor to a query's completion.
    """

    takes_label: ClassVar[bool] = False

    tokenizer: Any
    max_tokens: int
    long: Literal["split", "truncate"] = "split"
    append_eos: bool = True

    @property
    def fingerprint(self) -> str:
        """See `DocumentConverter`."""
        return tokenizer_fingerprint(self.tokenizer)

    def documents(self, documents: Iterable[Document | DataError]) -> Iterator[Example | DataError]:
        """See `DocumentConverter`; documents are tokenized in batches."""
        stream = iter(documents)
        while batch := list(islice(stream, _TOKENIZE_BATCH)):
            rendered = [self._try_render(d) for d in batch]
            tokens = iter(self._tokenize([r for r in rendered if isinstance(r, Rendered)]))
            for document, result in zip(batch, rendered, strict=True):
                if isinstance(result, DataError):
                    yield result
                elif isinstance(document, Document):
                    yield from self._cut(document, result, *next(tokens))

    def query(self, document: Document, span: str | None = None, context: int | None = None) -> Example:
        """See `DocumentConverter`: the loss is on the completion, the full text, the assistant's turns of messages, or a `span` of these.

        A text without a span ends with the end-of-text token where `append_eos` is set, as a document does; a completion never does.
        """
        if document.features is not None:
            raise UsageError("the index holds texts, not vectors; ask it with a text")
        self._refuse_label(document)
        where = document.where
        rendered = self._try_render(document)
        if isinstance(rendered, DataError):
            raise UsageError(str(rendered))
        if span is not None:
            rendered = replace(rendered, spans=(occurrence(rendered, span, where),))
        ids, mask, offsets = self._tokenize([rendered])[0]
        if document.text is not None and span is None:
            ids, mask, _ = self._end(document, rendered, ids, mask, offsets)
        if context is not None and len(ids) - 1 > context:  # the last token is only predicted
            raise UsageError(f"{where} is {len(ids)} tokens long, the model's context is {context}; shorten it")
        if not mask.any():
            raise UsageError(f"{where} has no token to predict (nothing precedes a single token); give a prompt or more text")
        return Example(id="query", text=rendered.text, source="query", token_ids=ids, loss_mask=mask)

    def _refuse_label(self, document: Document) -> None:
        if document.label is not None and not self.takes_label:
            raise UsageError(f"{document.where} has a label, and the texts of this index have none; leave it out")

    def _try_render(self, document: Document | DataError) -> Rendered | DataError:
        if isinstance(document, DataError):
            return document
        try:
            return self._render(document)
        except DataError as error:
            return DataError(f"{document.where}: {error}")

    def _render(self, document: Document) -> Rendered:
        if document.messages is not None:
            chat = Conversation(self.tokenizer, document.messages, document.template)
            spans = chat.after(document.prompt_messages) if document.prompt_messages else chat.assistant_spans()
            return Rendered(chat.text, tuple(spans), add_special_tokens=False)
        if document.completion is not None:
            if not document.completion:
                raise DataError("the completion is empty; there is nothing to predict")
            text = document.prompt + document.completion
            return Rendered(text, ((len(document.prompt), len(text)),), not self._has_bos(text))
        if not document.text or not document.text.strip():
            raise DataError("the text is empty; there is nothing to predict")
        return Rendered(document.text, ((0, len(document.text)),), not self._has_bos(document.text))

    def _has_bos(self, text: str) -> bool:
        """True if a text already starts with the token that the tokenizer would prepend."""
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos) and self._adds_bos

    @cached_property
    def _adds_bos(self) -> bool:
        return self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]

    def _tokenize(self, rendered: Sequence[Rendered], truncation: bool = False) -> list[Tokens]:
        """Tokenize texts; a character span of a text becomes its loss mask.

        Args:
            truncation: cut each to `max_tokens`, special tokens included.
        """
        results: dict[int, Tokens] = {}
        for special in (True, False):
            indices = [i for i, r in enumerate(rendered) if r.add_special_tokens == special]
            if not indices:
                continue
            encoded = self.tokenizer(
                [rendered[i].text for i in indices],
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                truncation=truncation,
                max_length=self.max_tokens if truncation else None,
                verbose=False,
            )
            for i, ids, pairs in zip(indices, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                offsets = np.array(pairs, np.int64).reshape(-1, 2)
                mask = np.zeros(len(ids), bool)
                for start, end in rendered[i].spans:
                    mask |= _is_in_span(offsets, start, end)
                mask[:1] = False  # nothing predicts the first token
                results[i] = (np.array(ids, np.int32), mask, offsets)
        return [results[i] for i in range(len(rendered))]

    def _end(self, document: Document, rendered: Rendered, ids: np.ndarray, mask: np.ndarray, offsets: np.ndarray) -> Tokens:
        """Append the end-of-text token to a document's tokens, where `append_eos` applies. It is in the loss if a token precedes it."""
        eos = self.tokenizer.eos_token_id
        if not self.append_eos or document.messages is not None or eos is None:
            return ids, mask, offsets
        if len(ids) and ids[-1] == eos:  # the tokenizer appended it already
            mask = mask.copy()
            mask[-1] = len(ids) > 1
            return ids, mask, offsets
        end = len(rendered.text)
        return np.append(ids, np.int32(eos)), np.append(mask, len(ids) > 0), np.vstack([offsets, [[end, end]]])

    def _cut(
        self, document: Document, rendered: Rendered, ids: np.ndarray, mask: np.ndarray, offsets: np.ndarray
    ) -> Iterator[Example | DataError]:
        """Yield a document's examples: one, or the chunks of a document longer than `max_tokens` that have a loss token, numbered from 0.

        The text of a document that fits is its full text, and that of a chunk the characters of its tokens.
        """
        ids, mask, offsets = self._end(document, rendered, ids, mask, offsets)
        starts = range(0, max(1, len(ids) - 1), self.max_tokens - 1) if self.long == "split" else (0,)
        complete = len(ids) <= self.max_tokens
        pieces = []
        for start in starts:
            piece = slice(start, start + self.max_tokens)
            piece_mask = mask[piece].copy()
            piece_mask[:1] = False
            if piece_mask.any():
                length = int(np.flatnonzero(piece_mask)[-1]) + 1  # tokens after the last loss token cannot change the loss
                pieces.append((start, ids[piece][:length], piece_mask[:length]))
        if not pieces:
            yield DataError(f"{document.where}: no token to predict within {self.max_tokens} tokens (too short, or all prompt)")
        for number, (start, token_ids, loss_mask) in enumerate(pieces):
            characters = offsets[start : start + len(token_ids)]
            visible = characters[:, 1] > characters[:, 0]
            characters = characters[visible] if visible.any() else characters
            yield Example(
                id=document.id if len(starts) == 1 else f"{document.id}#{number}",
                text=rendered.text if complete else rendered.text[int(characters[0, 0]) : int(characters[-1, 1])],
                source=document.source,
                token_ids=token_ids,
                loss_mask=loss_mask,
                document=document.id,
                chunk=number,
                metadata=document.metadata,
                truncated=not complete and self.long == "truncate",
            )


class WholeTextConverter(TextConverter):
    """Conversion of documents whose texts are never split: each side of a document becomes one sequence, cut at `max_tokens`.

    A document has one side, unless a subclass says otherwise (see `_sides`).
    """

    def documents(self, documents: Iterable[Document | DataError]) -> Iterator[Example | DataError]:
        """See `DocumentConverter`."""
        return convert_each(documents, self._examples)

    def query(self, document: Document, span: str | None = None, context: int | None = None) -> Example:
        """See `DocumentConverter`."""
        if document.features is not None or document.image is not None:
            raise UsageError("the index holds texts; ask it with one")
        self._refuse_label(document)
        whole = replace(self, max_tokens=context or self.max_tokens)
        try:
            example = whole._example(document, span)
        except DataError as error:
            raise UsageError(f"{document.where}: {error}") from error
        if example.truncated:
            raise UsageError(f"{document.where} is longer than the model's context of {whole.max_tokens} tokens; shorten it")
        return replace(example, id="query", document="", source="query")

    def _examples(self, document: Document) -> Iterable[Example]:
        """Return the examples of a document."""
        return (self._example(document),)

    def _sides(self, document: Document) -> Sequence[Document]:
        """Return the documents that become the sequences of an example."""
        return (document,)

    def _shown(self, rendered: Sequence[Rendered]) -> str:
        """Return the text that an answer shows."""
        return rendered[0].text

    def _example(self, document: Document, span: str | None = None) -> Example:
        """Convert a document.

        Raises:
            DataError: it cannot be used.
            UsageError: examples of this kind have no spans.
        """
        if span is not None:
            raise UsageError("a span is a part of what a language model predicts; ask with the text alone")
        rendered = [self._render(side) for side in self._sides(document)]
        tokens = self._tokenize(rendered, truncation=True)
        truncated = any(len(whole[0]) > len(cut[0]) for whole, cut in zip(self._tokenize(rendered), tokens, strict=True))
        if not all(len(ids) for ids, _, _ in tokens):
            raise DataError("the text has no tokens; leave it out")
        return Example(
            id=document.id,
            text=self._shown(rendered),
            source=document.source,
            token_ids=np.concatenate([ids for ids, _, _ in tokens]),
            loss_mask=np.concatenate([mask for _, mask, _ in tokens]),
            document=document.id,
            metadata=document.metadata,
            truncated=truncated,
            label=document.label,
            lengths=tuple(len(ids) for ids, _, _ in tokens) if len(tokens) > 1 else (),
        )


def occurrence(rendered: Rendered, span: str, where: str) -> tuple[int, int]:
    """Return the start and end, in characters, of the only occurrence of a span in the loss spans of a query; refuse any other span."""
    if not span:
        raise UsageError(f"{where}: the span is empty; give a part of the queried text")
    occurrences = f"(?={re.escape(span)})"  # a lookahead, since occurrences may overlap
    starts = [first + match.start() for first, last in rendered.spans for match in re.finditer(occurrences, rendered.text[first:last])]
    if len(starts) != 1:
        raise UsageError(f"{where}: the span {span[:80]!r} occurs {len(starts)} times in the queried text; it must occur once")
    return starts[0], starts[0] + len(span)


def _is_in_span(offsets: Int64[np.ndarray, "tokens 2"], start: int, end: int) -> Bool[np.ndarray, " tokens"]:
    """Return a mask of the tokens that hold a character of a span.

    A token without characters belongs to the span that ends there or goes on: whitespace that the tokenizer trimmed, whose offset is after
    it. Special tokens are at 0, and in no span.
    """
    first = offsets[:, 0]
    last = offsets[:, 1]
    return np.where(first == last, (first > start) & (first <= end), (first < end) & (last > start))


def token_texts(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """Return the text that each token adds to the tokens before it; these texts join to the full text.

    A token that ends within a character adds nothing, the one that completes it adds the character. Decoding tokens one by one would lose
    such characters, and for many tokenizers the spaces between words. (In long runs of bytes that are not characters, boundaries between
    pieces of 48 tokens may be off by one replacement character.)
    """
    decode = partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    texts = [""] * len(ids)
    start = 0
    end = 0  # ids[start:end] are decoded already, as context of the next token
    ids = [int(id) for id in ids]
    for i in range(len(ids)):
        before = decode(ids[start:end])
        text = decode(ids[start : i + 1])
        incomplete = len(text) <= len(before) or text.endswith("\ufffd")
        if i == len(ids) - 1 or not incomplete or i - end == _MOST_PENDING - 1:
            texts[i] = text[len(before) :]
            start = end
            end = i + 1
    return tuple(texts)


def token_name(tokenizer: Any, id: int) -> str:
    """Return the name of a single token: its text, or its bytes, such as <0xE5>, if they are not a character."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    text: str = tokenizer.backend_tokenizer.decode([id], skip_special_tokens=False)
    if "\ufffd" not in text:
        return text
    name = tokenizer.backend_tokenizer.id_to_token(id) or text
    codes = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return "".join(f"<0x{codes[c]:02X}>" for c in name) if all(c in codes for c in name) and not name.startswith("<0x") else name
