"""Column names of a corpus. Nothing heavy is imported here, since the command line's help needs them."""

from dataclasses import dataclass
from typing import Literal

Form = Literal["auto", "text", "completion", "chat", "vector"]
SplitText = Literal["file", "blank-lines"]


@dataclass(frozen=True)
class Fields:
    """Names of a record's columns; `form` selects those to use, "auto" the first that a record has.

    `split_text` defines a document of a text file: the full "file", or the text between "blank-lines".
    """

    form: Form = "auto"
    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    features: str = "features"
    label: str = "label"
    id: str = "id"
    source: str = "source"
    split_text: SplitText = "file"
