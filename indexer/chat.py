"""Chat messages to text: what the tokenizer's template makes of them, and which of its characters the loss is on.

Where a template marks what is trained (`{% generation %}`), its marks decide. Where it does not, the loss is on what each assistant turn
adds to the text, its end included: from the end of the generation prompt to the next turn. Templates may show a turn otherwise once
others follow it (earlier thinking is dropped, as Qwen3 and DeepSeek-R1 do), so that turns are looked for in the whole text: the
conversation is rendered once more with a mark in the place of the turn's content, and what differs is that content.
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
    """Messages under a tokenizer's chat template.

    Args:
        tokenizer: a `transformers` tokenizer.
        messages: each with a role.
        template: `tools`, and the template's own options.

    Raises:
        DataError: the tokenizer has no template, or the template refuses the messages.
    """

    def __init__(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> None:
        self._options = dict(template)
        tools = self._options.pop("tools", None)
        self._tools, self._special = tools, getattr(tokenizer, "special_tokens_map", {})
        try:
            self._template = tokenizer.get_chat_template(tools=tools)
            if not isinstance(self._template, str):
                raise TypeError("not a text")
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError("the tokenizer has no chat template; give the documents as text, or use a model with one") from error
        self.messages, self.text, self._marks = self._readable([dict(message) for message in messages])

    def _readable(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str, list[Span]]:
        """The messages in the first form in which the template takes them and says what they say, its text of them, and its marks.

        As they are; with content in every message; with contents as lists of parts, which templates of models that see images ask for.
        """
        filled = [{"content": "", **message} for message in messages]
        parts = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) and m["content"] else m
            for m in filled
        ]
        refused: DataError | None = None
        for form in (messages, filled, parts):
            marks: list[Span] = []
            try:
                text = self._render(form, marks=marks)
            except DataError as error:
                refused = refused or error
                continue
            if _shows_contents(text, messages):
                return form, text, marks
        raise refused or DataError("the chat template leaves out what the messages say")

    def assistant_spans(self) -> list[Span]:
        """The characters that the loss is on: where the template marks them, else the assistant's turns.

        Raises:
            DataError: there are none, or the template changes the messages in such a way that they cannot be found.
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
        """The characters of all messages behind the first so many.

        Raises:
            DataError: the template changes the messages in such a way that they cannot be found.
        """
        asked = self._render(self.messages[:prompt], add_generation_prompt=True)
        if self.text.startswith(asked):
            return [(len(asked), len(self.text))]
        span = self._turn(prompt)
        if span is None:
            raise DataError("the chat template leaves the completion out; there is nothing to predict")
        return [(span[0], len(self.text))]

    def _turn(self, i: int) -> Span | None:
        """Where a turn of the assistant's lies in the text, behind the generation prompt and with its end; None where it is not there."""
        asked = self._asked(i)
        said = self._render(self.messages[: i + 1])
        if said.startswith(asked) and self.text.startswith(said):
            return len(asked), len(said)
        parts = isinstance(self.messages[i].get("content"), list)
        marked = {**self.messages[i], "content": [{"type": "text", "text": _MARK}] if parts else _MARK}
        whole = self._render([*self.messages[:i], marked, *self.messages[i + 1 :]])
        at = whole.find(_MARK)
        if at < 0:
            return None
        before = _whole_tags(_common(self._render(self.messages[:i]), asked)) if i else ""
        alone = self._render([*self.messages[:i], marked])
        ending = _ending(alone[alone.find(_MARK) + len(_MARK) :], whole[at + len(_MARK) :])
        rest = whole[at + len(_MARK) + len(ending) :]
        start = len(_common(_common(whole[:at], asked), self.text))
        end = len(self.text) - len(rest)
        if _MARK not in alone or not len(before) <= start <= end or self.text[end:] != rest:
            raise DataError(
                "the chat template changes other messages with an assistant's turn, whose part of the text cannot be told; give prompt and "
                "completion"
            )
        return start, end

    def _asked(self, i: int) -> str:
        """What stands before a turn: the messages before it and the generation prompt; nothing where a template takes no empty list."""
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
            (text,), found = render_jinja_template(
                [list(messages)],
                tools=self._tools,
                chat_template=self._template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=add_generation_prompt,
                **{**self._special, **self._options},
            )
        except Exception as error:  # templates are Jinja programs and raise what they like
            if isinstance(error, TypeError) and any(isinstance(message.get("content"), list) for message in messages):
                raise DataError("the chat template takes text, and these contents are lists of parts; write each as one text") from error
            raise DataError(f"the chat template refuses these messages: {first_sentence(error)}") from error
        if marked and marks is not None:
            marks[:] = [(int(start), int(end)) for start, end in found[0]]
        return str(text)


def _shows_contents(text: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a text has something of what messages say in plain text, where they do."""
    said = [m["content"].strip()[-_SHOWN:] for m in messages if isinstance(m.get("content"), str)]
    return not any(said) or any(ending in text for ending in said if ending)


def _ending(alone: str, followed: str) -> str:
    """What ends a turn: what follows its content where it is the last, as far as that stands there when others follow; and where another
    tag ends it then, that tag.
    """
    if followed.startswith(alone):
        return alone
    known = _whole_tags(_common(alone, followed))
    tag = _TAG.match(followed, len(known))
    return known if known or tag is None else tag[0]


def _whole_tags(text: str) -> str:
    """A text without the tag that it ends within."""
    opened = text.rfind("<")
    return text[:opened] if opened >= 0 and ">" not in text[opened:] else text


def _common(a: str, b: str) -> str:
    """What two texts both begin with."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]
