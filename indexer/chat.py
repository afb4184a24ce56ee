"""Rendering of chat messages as text by the tokenizer's template, with the spans of characters in the loss.

If a template marks the trained parts (`{% generation %}`), these are the spans. Otherwise the loss is on the text that each assistant turn
adds, including its end: from the end of the generation prompt to the next turn. Templates may render a turn differently when others follow
(Qwen3 and DeepSeek-R1 drop earlier thinking), so turns are located in the full text: the conversation is rendered again with a mark in
place of the turn's content, and the part that differs is that content.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..store.errors import DataError
from .models import first_sentence

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TAG = re.compile(r"<[^<>\s]{1,40}>")
_SHOWN = 20
_MARK = "\ue000\ue001mark\ue001\ue000"

Span = tuple[int, int]


class Conversation:
    """Messages rendered by a tokenizer's chat template.

    Args:
        template: `tools`, and other options of the template.

    Raises:
        DataError: the tokenizer has no template, or the template rejects the messages.
    """

    def __init__(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> None:
        self._options = dict(template)
        tools = self._options.pop("tools", None)
        self._tools = tools
        self._special = getattr(tokenizer, "special_tokens_map", {})
        try:
            self._template = tokenizer.get_chat_template(tools=tools)
            if not isinstance(self._template, str):
                raise TypeError("not a text")
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError("the tokenizer has no chat template; give the documents as text, or use a model with one") from error
        self.messages, self.text, self._marks = self._first_form([dict(message) for message in messages])

    def _first_form(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str, list[Span]]:
        """The first form of the messages that the template accepts and shows, with its text and marks.

        The forms: unchanged; with content in every message; with contents as lists of parts, for templates of models with images.
        """
        filled = [{"content": "", **message} for message in messages]
        parts = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) and m["content"] else m
            for m in filled
        ]
        first_error: DataError | None = None
        for form in (messages, filled, parts):
            marks: list[Span] = []
            try:
                text = self._render(form, marks=marks)
            except DataError as error:
                first_error = first_error or error
                continue
            if _shows_contents(text, messages):
                return form, text, marks
        raise first_error or DataError("the chat template omits the messages' contents")

    def assistant_spans(self) -> list[Span]:
        """Spans of the characters in the loss: those that the template marks, else the assistant's turns.

        Raises:
            DataError: there are none, or they cannot be located since the template changes the messages.
        """
        if _GENERATION.search(self._template):
            spans = self._marks
        else:
            turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
            spans = [span for i in turns if (span := self._turn(i)) is not None]
        spans = [(start, end) for start, end in spans if end > start]
        if not spans:
            raise DataError("no assistant turn; there is nothing to predict")
        return spans

    def after(self, prompt: int) -> list[Span]:
        """Span of all messages after the first `prompt` ones.

        Raises:
            DataError: it cannot be located since the template changes the messages.
        """
        prompt_text = self._render(self.messages[:prompt], add_generation_prompt=True)
        if self.text.startswith(prompt_text):
            return [(len(prompt_text), len(self.text))]
        span = self._turn(prompt)
        if span is None:
            raise DataError("the chat template omits the completion; there is nothing to predict")
        return [(span[0], len(self.text))]

    def _turn(self, i: int) -> Span | None:
        """Span of an assistant turn, after the generation prompt and including its end; None if the text lacks it."""
        prompt = self._prompt(i)
        text = self._render(self.messages[: i + 1])
        if text.startswith(prompt) and self.text.startswith(text):
            return len(prompt), len(text)
        parts = isinstance(self.messages[i].get("content"), list)
        marked = {**self.messages[i], "content": [{"type": "text", "text": _MARK}] if parts else _MARK}
        full = self._render([*self.messages[:i], marked, *self.messages[i + 1 :]])
        offset = full.find(_MARK)
        if offset < 0:
            return None
        before = _complete_tags(_common(self._render(self.messages[:i]), prompt)) if i else ""
        last = self._render([*self.messages[:i], marked])
        ending = _ending(last[last.find(_MARK) + len(_MARK) :], full[offset + len(_MARK) :])
        suffix = full[offset + len(_MARK) + len(ending) :]
        start = len(_common(_common(full[:offset], prompt), self.text))
        end = len(self.text) - len(suffix)
        if _MARK not in last or not len(before) <= start <= end or self.text[end:] != suffix:
            raise DataError(
                "the chat template changes other messages along with an assistant's turn, so it cannot be located; give prompt, completion"
            )
        return start, end

    def _prompt(self, i: int) -> str:
        """Text before a turn: the messages before it and the generation prompt; empty if the template rejects an empty list."""
        try:
            return self._render(self.messages[:i], add_generation_prompt=True)
        except DataError:
            if i:
                raise
            return ""

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, marks: list[Span] | None = None) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        marked = marks is not None and bool(_GENERATION.search(self._template))
        try:
            (text,), spans = render_jinja_template(
                [list(messages)],
                tools=self._tools,
                chat_template=self._template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=add_generation_prompt,
                **{**self._special, **self._options},
            )
        except Exception as error:  # templates are Jinja programs and raise any error
            if isinstance(error, TypeError) and any(isinstance(message.get("content"), list) for message in messages):
                raise DataError("the chat template accepts text, and these contents are lists of parts; write each as one text") from error
            raise DataError(f"the chat template rejects these messages: {first_sentence(error)}") from error
        if marked and marks is not None:
            marks[:] = [(int(start), int(end)) for start, end in spans[0]]
        return str(text)


def _shows_contents(text: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """True if a text contains the end of a message's plain text, or no message has any."""
    endings = [m["content"].strip()[-_SHOWN:] for m in messages if isinstance(m.get("content"), str)]
    return not any(endings) or any(ending in text for ending in endings if ending)


def _ending(suffix: str, rest: str) -> str:
    """End of a turn: the text after its content as the last turn, as far as it is the same before other turns; else the tag there."""
    if rest.startswith(suffix):
        return suffix
    common = _complete_tags(_common(suffix, rest))
    tag = _TAG.match(rest, len(common))
    return common if common or tag is None else tag[0]


def _complete_tags(text: str) -> str:
    """A text without an incomplete tag at its end."""
    start = text.rfind("<")
    return text[:start] if start >= 0 and ">" not in text[start:] else text


def _common(a: str, b: str) -> str:
    """Common prefix of two texts."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]
