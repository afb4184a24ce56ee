"""Column names of a corpus. Nothing heavy is imported here, since the command line's help needs them."""

from dataclasses import dataclass
from typing import Literal, get_args

from .errors import UsageError

Form = Literal["auto", "text", "completion", "chat", "label", "pair", "texts", "image", "vector"]
SplitText = Literal["file", "blank-lines"]


@dataclass(frozen=True)
class Fields:
    """Names of a record's columns; `form` selects those to use, "auto" the first of text, messages, or prompt with completion.

    "label" is a text, messages, or a prompt with a completion, each with a label; "pair" a chosen and a rejected completion; "texts" an
    anchor, a text like it and one or several unlike it; "image" the path of an image, or its bytes, with a label.

    `split_text` defines a document of a text file: the full "file", or the text between "blank-lines".

    Raises:
        UsageError: a name is not text, or `form` or `split_text` is none of its values.
    """

    form: Form = "auto"
    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    chosen: str = "chosen"
    rejected: str = "rejected"
    anchor: str = "anchor"
    positive: str = "positive"
    negatives: str = "negatives"
    image: str = "image"
    features: str = "features"
    label: str = "label"
    id: str = "id"
    source: str = "source"
    split_text: SplitText = "file"

    def __post_init__(self) -> None:
        for name, kind in (("form", Form), ("split_text", SplitText)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise UsageError(f"`{name}` is {value!r}; it can be {' or '.join(get_args(kind))}")
        for name, column in vars(self).items():
            if not isinstance(column, str):
                raise UsageError(f"`fields` names the column {column!r:.80} as {name}; the name of a column is text")
