"""Tasks of images: classifiers of `transformers`, and those of timm through it."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..store.corpus import Document
from ..store.documents import Example
from ..store.errors import DataError
from ..store.extras import require
from ..store.fields import Form
from ..store.shapes import Float
from . import models
from .batches import IGNORED, Batch
from .examples import ArrayConverter
from .tasks import Task, label_loss

_MOST_PIXELS = 1 << 26


@dataclass(frozen=True)
class ImageConverter(ArrayConverter):
    """Conversion of image files with labels. The bytes of the file are the example; a batch is made from them by the model's processor.

    Attributes:
        names: of the classes, by number.
    """

    names: Mapping[int, str]

    ask = "the index holds images; ask it by row, or with an image and a label"

    def accepts(self, document: Document) -> bool:
        """See `ArrayConverter`."""
        return document.image is not None

    def example(self, document: Document) -> Example:
        """See `ArrayConverter`."""
        if document.image is None or document.label is None:
            raise DataError("this task needs the fields image and label")
        image = open_image(document.image)
        name = self.names.get(document.label, "")
        return Example(
            id=document.id,
            text=f"{image.width} x {image.height} pixels, label {document.label}" + (f" ({name})" if name else ""),
            source=document.source,
            token_ids=np.zeros(0, np.int32),
            loss_mask=np.zeros(0, bool),
            document=document.id,
            metadata=document.metadata,
            label=document.label,
            image=document.image,
        )


def open_image(content: bytes) -> Any:
    """Read an image file's bytes as an RGB image of Pillow.

    Raises:
        DataError: it is not an image, or a very large one.
    """
    require("PIL", "images")
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > _MOST_PIXELS:
            raise DataError(f"the image has {image.width} x {image.height} pixels, more than {_MOST_PIXELS:,}; make it smaller")
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the image cannot be read ({type(error).__name__}); give a PNG, JPEG or another file that Pillow reads") from error


class Images:
    """Images of a batch, of which a model's processor makes pixels at their first use."""

    def __init__(self, contents: Sequence[bytes]) -> None:
        self.contents = contents
        self._pixels: Tensor | None = None

    def pixels(self, model: nn.Module) -> Float[Tensor, "images channels height width"]:
        """Return the input of a model, on its device and in its dtype."""
        if self._pixels is None:
            images = [open_image(content) for content in self.contents]
            self._pixels = model.image_processor(images, return_tensors="pt")["pixel_values"]  # type: ignore[operator]
        weight = next(model.parameters())
        return self._pixels.to(weight.device, weight.dtype)

    def flip(self, dimension: int) -> "Images":
        """Return the images in the opposite order."""
        return Images(self.contents[::-1])


class ImageClassification(Task):
    """A classifier of images: documents have an `image` and a `label`, the loss is the label's cross-entropy, in nats.

    The model's image processor makes its input, without the random changes of training.
    """

    form: Form = "image"
    features = frozenset({"images", "labels"})
    mode = "loss-normalized"
    auto_class = "AutoModelForImageClassification"
    batch_tokens = {"cpu": 16, "cuda": 256}  # noqa: RUF012

    def attach(self, model: nn.Module, source: models.ModelSource) -> None:
        """Remember the image processor."""
        model.image_processor = models.load_processor(source)

    def converter(
        self, source: models.ModelSource, max_tokens: int | None = None, long: Any = "split", append_eos: bool = True
    ) -> ImageConverter:
        """See `Task`."""
        return ImageConverter(models.class_names(source))

    def collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """See `Task`."""
        images = Images([e.image for e in examples if e.image is not None])
        targets = torch.tensor([[IGNORED if e.label is None else e.label] for e in examples], device=device)
        return Batch(tuple(e.id for e in examples), images, targets, torch.ones_like(targets, dtype=torch.bool))

    def loss(self, model: nn.Module, batch: Batch, sample_seed: int | None = None) -> Float[Tensor, " batch"]:
        """See `Task`."""
        return label_loss(self.logits(model, {}, batch), batch, sample_seed)

    def logits(self, model: nn.Module, weights: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, "batch one classes"]:
        """See `Task`."""
        logits: Tensor = functional_call(model, dict(weights), kwargs={"pixel_values": batch.inputs.pixels(model)}).logits
        return logits[:, None]

    def probe(self, model: nn.Module, device: torch.device) -> Batch:
        """See `Task`."""
        from PIL import Image

        contents = []
        for shade in (64, 192):
            file = io.BytesIO()
            Image.linear_gradient("L").point(lambda value, shade=shade: value * shade // 255).save(file, "PNG")
            contents.append(file.getvalue())
        targets = torch.zeros((2, 1), dtype=torch.long, device=device)
        return Batch(("probe", "probe"), Images(contents), targets, torch.ones_like(targets, dtype=torch.bool))

    def classes(self, model: nn.Module) -> int:
        """See `Task`."""
        return int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
