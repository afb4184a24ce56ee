"""Denoising diffusion models (Ho et al., arXiv 2006.11239) as a task, after Mlodozeniec et al., arXiv 2410.13850.

The loss of an example x is the mean, over draws of a timestep t and of noise e, of half the squared error of the noise that the model
predicts at x_t = sqrt(a_t) x + sqrt(1 - a_t) e: a Gaussian negative log-likelihood of unit variance, in nats. Its generalized Gauss-Newton
matrix is the second moment of gradients with noise drawn around the model's own prediction, which is what `labels=sampled` fits.
"""

import math
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..store.bits import philox
from ..store.corpus import Document
from ..store.documents import Example
from ..store.errors import DataError, UsageError
from ..store.extras import require
from ..store.fields import Form
from ..store.shapes import Float, Float64, Int64
from . import models
from .batches import Batch
from .capture import accumulation_dtype
from .examples import VectorConverter
from .image_tasks import open_image
from .tasks import ArrayTask

_MEASUREMENTS = ("loss", "elbo", "trajectory", "square")
_LEAST, _MOST = 1e-4, 0.02  # of the linear schedule (Ho et al., section 4)
_OFFSET = 0.008  # of the cosine schedule (Nichol and Dhariwal, arXiv 2102.09672, eq. 17)


@dataclass(frozen=True)
class DiffusionConverter(VectorConverter):
    """Conversion of vectors, or of images to vectors of values from -1 to 1, channel after channel.

    Attributes:
        shape: channels, height and width of an image.
    """

    needs_label: bool = False
    shape: tuple[int, ...] = ()

    ask = "the index holds images or vectors; ask it by row, or with an image or features"

    def accepts(self, document: Document) -> bool:
        """See `ArrayConverter`."""
        return document.image is not None or document.features is not None

    def example(self, document: Document) -> Example:
        """See `ArrayConverter`."""
        if document.image is not None:
            channels, height, width = self.shape
            image = open_image(document.image)
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB").resize((width, height)), np.float32) / 127.5 - 1
            document = replace(document, image=None, features=pixels.reshape(height, width, channels).transpose(2, 0, 1).ravel())
        return super().example(document)


@dataclass(frozen=True)
class Diffusion(ArrayTask):
    """A denoiser: a UNet of diffusers, or any module in memory that predicts the noise from a noisy input and a timestep.

    Documents have `features`, of as many numbers as `shape`, or with `source=image` an `image`; a label is kept as a column alone.

    Attributes:
        shape: of the model's input, such as "3x32x32".
        timesteps, schedule: of training, "linear" (betas from 0.0001 to 0.02) or "cosine".
        draws, query_draws: of timestep and noise, of a training example and of a query; spread evenly over the timesteps.
        measurement_of_queries: "loss"; "elbo", the negative evidence lower bound but for what no weight changes, in nats; "trajectory", the
            negative log probability of a sampled trajectory, in nats, for which a query's features are x_T, ..., x_0 one after the other;
            or "square" (see `objective`).
        objective: "loss", or "square": half the mean squared length of the prediction, whose gradients D-TRAK compares (Zheng et al., arXiv
            2311.00500, eq. 8).
        source: "features" or "image".
    """

    timesteps: int = 1000
    schedule: str = "linear"
    draws: int = 8
    query_draws: int = 64
    measurement_of_queries: str = "loss"
    objective: str = "loss"
    source: str = "features"

    batch_tokens = {"cpu": 8, "cuda": 128}  # noqa: RUF012

    def __post_init__(self) -> None:
        sizes = self.shape.split("x")
        if not all(size.isdecimal() and int(size) > 0 for size in sizes) or (self.source == "image" and len(sizes) != 3):
            raise ValueError("shape is numbers with x between, such as 3x32x32; those of images are channels, height and width")
        if (
            self.schedule not in ("linear", "cosine")
            or self.objective not in ("loss", "square")
            or self.source not in ("features", "image")
        ):
            raise ValueError("schedule is linear or cosine, objective is loss or square, source is features or image")
        if self.measurement_of_queries not in _MEASUREMENTS:
            raise ValueError(f"measurement_of_queries is one of {', '.join(_MEASUREMENTS)}")
        if min(self.timesteps, self.draws, self.query_draws) < 1:
            raise ValueError("timesteps, draws and query_draws are at least 1")

    @property
    def form(self) -> Form:  # type: ignore[override]
        """The form of its documents."""
        return "image" if self.source == "image" else "vector"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the model's input."""
        return tuple(map(int, self.shape.split("x")))

    @property
    def signal(self) -> Float64[np.ndarray, " timesteps"]:
        """The cumulated product a_t: the share of the signal in the variance of x_t."""
        if self.schedule == "linear":
            return np.cumprod(1 - np.linspace(_LEAST, _MOST, self.timesteps))
        steps = np.arange(self.timesteps + 1) / self.timesteps
        shares = np.cos((steps + _OFFSET) / (1 + _OFFSET) * np.pi / 2) ** 2
        betas = np.minimum(1 - shares[1:] / shares[:-1], 0.999)
        return np.cumprod(1 - betas)

    def load(self, source: models.ModelSource) -> nn.Module:
        """Load a UNet of diffusers from its directory."""
        diffusers = require("diffusers", "diffusion")
        try:
            model = diffusers.UNet2DModel.from_pretrained(source.id, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"there is no UNet2DModel of diffusers at {source.id}: {models.first_sentence(error)}") from error
        return models.onto_device(model.to(models.DTYPES[source.dtype]), models.resolve_device(source.device))

    def converter(
        self, source: models.ModelSource, max_tokens: int | None = None, long: Any = "split", append_eos: bool = True
    ) -> DiffusionConverter:
        """See `Task`."""
        return DiffusionConverter(shape=self.sizes)

    def batch_kind(self, example: Example) -> int:
        """See `Task`; trajectories have batches of their own."""
        return 0 if example.features is None else len(example.features)

    def loss(self, model: nn.Module, batch: Batch, sample_seed: int | None = None) -> Float[Tensor, " batch"]:
        """See `Task`; with a seed, the noise is drawn around the model's prediction."""
        return self._value(model, batch, self.objective, self.draws, sample_seed)

    def measurement(self, model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """See `Task`."""
        if self.measurement_of_queries == "trajectory":
            return self._trajectory(model, batch)
        kind = self.measurement_of_queries if self.objective == "loss" else "square"
        return self._value(model, batch, kind, self.query_draws, None)

    def _value(self, model: nn.Module, batch: Batch, kind: str, draws: int, sample_seed: int | None) -> Float[Tensor, " batch"]:
        inputs = self.inputs(model, batch)
        steps, noise = self._draw(batch, draws)
        signal = torch.from_numpy(self.signal[steps]).to(inputs).view(-1, *[1] * len(self.sizes))
        noise_tensor = torch.from_numpy(noise).to(inputs).view(-1, *self.sizes)
        noisy = signal.sqrt() * inputs.repeat_interleave(draws, 0) + (1 - signal).sqrt() * noise_tensor
        predicted = predict(model, noisy, torch.from_numpy(steps).to(inputs.device))
        if kind == "square":
            target = torch.zeros_like(predicted)
        elif sample_seed is not None:
            target = predicted.detach() + torch.from_numpy(self._noise(batch, draws, f"labels {sample_seed}")).to(predicted).view_as(
                predicted
            )
        else:
            target = noise_tensor
        errors = (target - predicted).to(accumulation_dtype(predicted.dtype)).square().flatten(1).sum(1)
        weights = self._elbo_weights[steps] * self.timesteps if kind == "elbo" else np.full(len(steps), 0.5)
        return (errors * torch.from_numpy(weights).to(errors)).view(-1, draws).mean(1)

    @property
    def _elbo_weights(self) -> Float64[np.ndarray, " timesteps"]:
        """Weights of the squared errors in the evidence lower bound (Ho et al., eq. 12), with variances of beta_t."""
        signal = self.signal
        alphas = signal / np.concatenate([[1.0], signal[:-1]])
        return (1 - alphas) / (2 * alphas * (1 - signal))

    def _trajectory(self, model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """The negative log probability of the steps of a trajectory, but for constants, from some of them, spread evenly."""
        count, rest = divmod(batch.inputs.shape[1], math.prod(self.sizes))
        if count != self.timesteps + 1 or rest:
            size = batch.inputs.shape[1]
            raise DataError(
                f"a trajectory has {self.timesteps + 1:,} inputs of {self.shape}, from x_T to x_0; the features have {size:,} numbers"
            )
        states = batch.inputs.to(next(model.parameters()).dtype)
        states = states.view(len(batch.ids), count, *self.sizes)
        draws = min(self.query_draws, self.timesteps)
        steps = np.unique(np.linspace(0, self.timesteps - 1, draws).round().astype(np.int64))
        signal = self.signal
        alphas = (signal / np.concatenate([[1.0], signal[:-1]]))[steps]
        place = torch.from_numpy(self.timesteps - 1 - steps)  # x_(t+1) in the trajectory, for the timestep t
        before, after = states[:, place].flatten(0, 1), states[:, place + 1].flatten(0, 1)
        predicted = predict(model, before, torch.from_numpy(np.tile(steps, len(batch.ids))).to(before.device))
        alpha, share = (
            torch.from_numpy(np.tile(v, len(batch.ids))).to(before).view(-1, *[1] * len(self.sizes)) for v in (alphas, signal[steps])
        )
        mean = (before - (1 - alpha) / (1 - share).sqrt() * predicted) / alpha.sqrt()
        errors = ((after - mean).square() / (2 * (1 - alpha))).to(accumulation_dtype(mean.dtype)).flatten(1).sum(1)
        return errors.view(len(batch.ids), -1).mean(1) * self.timesteps

    def _draw(self, batch: Batch, draws: int) -> tuple[Int64[np.ndarray, " steps"], Float64[np.ndarray, "steps size"]]:
        """Draw timesteps, spread evenly, and noise for each example; they depend on its numbers alone."""
        steps = []
        for vector in batch.inputs.cpu().numpy():
            places = (np.arange(draws) + _generator(vector, "steps").random(draws)) / draws
            steps.append((places * self.timesteps).astype(np.int64))
        return np.concatenate(steps), self._noise(batch, draws, "noise")

    def _noise(self, batch: Batch, draws: int, purpose: str) -> Float64[np.ndarray, "steps size"]:
        size = math.prod(self.sizes)
        vectors = batch.inputs.cpu().numpy()
        return np.concatenate([_generator(vector, purpose).standard_normal((draws, size)) for vector in vectors])


def predict(model: nn.Module, noisy: Tensor, steps: Tensor) -> Tensor:
    """Return the noise that a model predicts."""
    output = model(noisy, steps)
    predicted: Tensor = getattr(output, "sample", output)
    return predicted


def _generator(vector: np.ndarray, purpose: str) -> np.random.Generator:
    return np.random.Generator(philox(f"wherefrom diffusion {purpose} {sha256(vector.tobytes()).hexdigest()}"))
