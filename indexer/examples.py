"""Documents to examples: token ids and a loss mask, long documents cut to the model's window.

Every form of document becomes one text with *loss spans* (all of it; the completion; the assistant's turns). The text is tokenized as
a whole, as it was in training, and a token is in the loss when it holds a character of a span: a token that straddles the end of a
prompt belongs to the completion. The first token is never in the loss, since nothing predicts it.

Split documents overlap by one token, which is context in the later chunk: every loss token is counted in exactly one chunk.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np

from ..store.corpus import Document
from ..store.documents import Example
from ..store.errors import DataError, UsageError
from .chat import Conversation
from .models import tokenizer_fingerprint

_TOKENIZE_BATCH, _MOST_PENDING = 256, 48
_Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]  # token ids, loss mask, character offsets [tokens, 2]


@dataclass(frozen=True)
class _Rendered:
    text: str
    spans: tuple[tuple[int, int], ...]
    special_tokens: bool = True


class DocumentEncoder(Protocol):
    """Turns documents into examples."""

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the tokenizer that it uses; None where there is none."""

    def documents(self, documents: Iterable[Document | DataError]) -> Iterator[Example | DataError]:
        """Encode a stream of documents; what cannot be used comes out as its error, in order."""


@dataclass(frozen=True)
class VectorEncoder:
    """Documents that are vectors already."""

    fingerprint: None = None

    def documents(self, documents: Iterable[Document | DataError]) -> Iterator[Example | DataError]:
        """See `DocumentEncoder`."""
        nothing = np.zeros(0, np.int32), np.zeros(0, bool)
        for d in documents:
            if isinstance(d, DataError):
                yield d
            elif d.features is None:
                yield DataError(f"{d.where}: a text, where this task needs the fields features and label")
            else:
                yield Example(
                    d.id, f"label {d.label}", d.source, *nothing, document=d.id, metadata=d.metadata, features=d.features, label=d.label
                )


@dataclass(frozen=True)
class TextEncoder:
    """Turns documents of text into examples.

    Attributes:
        tokenizer: a fast `transformers` tokenizer (character offsets are needed).
        max_tokens: longest example, in tokens.
        long: what becomes of a longer document: "split" into chunks, or "truncate".
        append_eos: whether the end-of-text token follows a document (and is predicted), as in most pre-training. Chat templates write
            their own, and a completion that is asked about is never ended.
    """

    tokenizer: Any
    max_tokens: int
    long: Literal["split", "truncate"] = "split"
    append_eos: bool = True

    @property
    def fingerprint(self) -> str:
        """See `DocumentEncoder`."""
        return tokenizer_fingerprint(self.tokenizer)

    def documents(self, documents: Iterable[Document | DataError]) -> Iterator[Example | DataError]:
        """Encode a stream of documents, some hundred at a time; what cannot be used comes out as its error, in order."""
        stream = iter(documents)
        while batch := list(islice(stream, _TOKENIZE_BATCH)):
            rendered = [self._try_render(d) for d in batch]
            encoded = iter(self._tokenize([r for r in rendered if isinstance(r, _Rendered)]))
            for document, text in zip(batch, rendered, strict=True):
                if isinstance(text, DataError):
                    yield text
                elif isinstance(document, Document):
                    yield from self._cut(document, text, *next(encoded))

    def query(
        self,
        prompt: str = "",
        completion: str | None = None,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        span: str | None = None,
        context: int | None = None,
        where: str = "the query",
    ) -> Example:
        """Encode one query whole: the loss is on the completion, or on all of the text, or on the assistant's turns of messages, or on
        a `span` of these.

        A text is encoded as a document is, with its end where `append_eos` says so (unless a span is asked about); a completion is never
        ended.

        Raises:
            UsageError: empty, without a token to predict, or longer than the model's `context` (tokens); the span is not there, or twice.
        """
        asked: dict[str, Any] = {"text": text, "prompt": prompt, "completion": completion, "messages": messages}
        document = Document(id="query", source="query", where=where, template={"tools": tools} if tools else {}, **asked)
        rendered = self._try_render(document)
        if isinstance(rendered, DataError):
            raise UsageError(str(rendered))
        if span is not None:
            places = [a + m.start() for a, b in rendered.spans for m in re.finditer(f"(?={re.escape(span)})", rendered.text[a:b]) if span]
            if len(places) != 1:
                raise UsageError(
                    f"{where}: the span {span[:80]!r} stands {len(places)} times in what is asked about; it must stand there once"
                )
            rendered = replace(rendered, spans=((places[0], places[0] + len(span)),))
        ids, mask, at = self._tokenize([rendered])[0]
        if text is not None and span is None:
            ids, mask, _ = self._end(document, rendered, ids, mask, at)
        if context is not None and len(ids) - 1 > context:  # the last token is only predicted
            raise UsageError(f"{where} is {len(ids)} tokens long, the model's context is {context}; shorten it")
        if not mask.any():
            raise UsageError(f"{where} has no token to predict (a single token has nothing before it); give a prompt or more text")
        return Example(id="query", text=rendered.text, source="query", token_ids=ids, loss_mask=mask)

    def _try_render(self, document: Document | DataError) -> _Rendered | DataError:
        if isinstance(document, DataError):
            return document
        try:
            return self._render(document)
        except DataError as error:
            return DataError(f"{document.where}: {error}")

    def _render(self, document: Document) -> _Rendered:
        if document.messages is not None:
            chat = Conversation(self.tokenizer, document.messages, document.template)
            spans = chat.after(document.prompt_messages) if document.prompt_messages else chat.assistant_spans()
            return _Rendered(chat.text, tuple(spans), special_tokens=False)
        if document.completion is not None:
            if not document.completion:
                raise DataError("the completion is empty; there is nothing to predict")
            text = document.prompt + document.completion
            return _Rendered(text, ((len(document.prompt), len(text)),), not self._begun(text))
        if not document.text or not document.text.strip():
            raise DataError("the text is empty; there is nothing to predict")
        return _Rendered(document.text, ((0, len(document.text)),), not self._begun(document.text))

    def _begun(self, text: str) -> bool:
        """Whether a text has the token already by which the tokenizer would begin it."""
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos) and self._adds_bos

    @cached_property
    def _adds_bos(self) -> bool:
        return self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]

    def _tokenize(self, rendered: Sequence[_Rendered]) -> list[_Tokens]:
        """(token ids, loss mask, character offsets [tokens, 2]) of each text."""
        results: dict[int, _Tokens] = {}
        for special in (True, False):
            chosen = [i for i, r in enumerate(rendered) if r.special_tokens == special]
            if not chosen:
                continue
            encoded = self.tokenizer(
                [rendered[i].text for i in chosen],
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                truncation=False,
                verbose=False,
            )
            for i, ids, offsets in zip(chosen, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                at = np.array(offsets, np.int64).reshape(-1, 2)
                mask = np.zeros(len(ids), bool)
                empty = at[:, 0] == at[:, 1]  # whitespace of a tokenizer that trims offsets stands behind it; special tokens at 0
                for start, end in rendered[i].spans:
                    mask |= np.where(empty, (at[:, 0] > start) & (at[:, 0] <= end), (at[:, 0] < end) & (at[:, 1] > start))
                mask[:1] = False
                results[i] = (np.array(ids, np.int32), mask, at)
        return [results[i] for i in range(len(rendered))]

    def _end(self, document: Document, rendered: _Rendered, ids: np.ndarray, mask: np.ndarray, at: np.ndarray) -> _Tokens:
        """The tokens of a document with the end-of-text token after them, where it is wanted."""
        eos = self.tokenizer.eos_token_id
        if not self.append_eos or document.messages is not None or eos is None:
            return ids, mask, at
        if len(ids) and ids[-1] == eos:  # the tokenizer has ended it already
            mask = mask.copy()
            mask[-1] = len(ids) > 1
            return ids, mask, at
        end = len(rendered.text)
        return np.append(ids, np.int32(eos)), np.append(mask, len(ids) > 0), np.vstack([at, [[end, end]]])

    def _cut(
        self, document: Document, rendered: _Rendered, ids: np.ndarray, mask: np.ndarray, at: np.ndarray
    ) -> Iterator[Example | DataError]:
        ids, mask, at = self._end(document, rendered, ids, mask, at)
        starts = range(0, max(1, len(ids) - 1), self.max_tokens - 1) if self.long == "split" else (0,)
        pieces = []
        for start in starts:
            piece = slice(start, start + self.max_tokens)
            piece_mask = mask[piece].copy()
            piece_mask[:1] = False
            if piece_mask.any():
                length = int(np.flatnonzero(piece_mask)[-1]) + 1  # what follows the last loss token cannot change the loss
                pieces.append((start, ids[piece][:length], piece_mask[:length]))
        if not pieces:
            yield DataError(f"{document.where}: no token to predict within {self.max_tokens} tokens (too short, or the prompt fills them)")
        for number, (start, token_ids, loss_mask) in enumerate(pieces):
            shown = at[start : start + len(token_ids)]
            shown = shown[shown[:, 1] > shown[:, 0]] if (shown[:, 1] > shown[:, 0]).any() else shown
            whole = len(ids) <= self.max_tokens
            yield Example(
                id=document.id if len(starts) == 1 else f"{document.id}#{number}",
                text=rendered.text if whole else rendered.text[int(shown[0, 0]) : int(shown[-1, 1])],
                source=document.source,
                token_ids=token_ids,
                loss_mask=loss_mask,
                document=document.id,
                chunk=number,
                metadata=document.metadata,
                truncated=not whole and self.long == "truncate",
            )


def token_texts(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """What each token adds to the text of those before it; joined, they are the text.

    A token that ends within a character adds nothing, the one that completes it adds the character. Decoded one by one, tokens would lose
    such characters, and of many tokenizers the spaces between words. (Where bytes that are not characters run on and on, joints between
    pieces of 48 tokens may be off by one of the signs that stand for them.)
    """
    decode = partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    texts, known, read = [""] * len(ids), 0, 0  # ids[known:read] have been decoded, and stand before what comes next
    ids = [int(id) for id in ids]
    for i in range(len(ids)):
        before, now = decode(ids[known:read]), decode(ids[known : i + 1])
        waits = len(now) <= len(before) or now.endswith("\ufffd")
        if i == len(ids) - 1 or not waits or i - read == _MOST_PENDING - 1:
            texts[i], known, read = now[len(before) :], read, i + 1
    return tuple(texts)


def token_name(tokenizer: Any, id: int) -> str:
    """A token alone: its text, or where that is not a whole character its bytes, as <0xE5>."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    text: str = tokenizer.backend_tokenizer.decode([id], skip_special_tokens=False)
    if "\ufffd" not in text:
        return text
    name, known = tokenizer.backend_tokenizer.id_to_token(id) or text, {letter: byte for byte, letter in bytes_to_unicode().items()}
    return "".join(f"<0x{known[c]:02X}>" for c in name) if all(c in known for c in name) and not name.startswith("<0x") else name
