"""Fitting projections and curvature: passes over a sample, each a sum that any split of the sample adds up to.

A pass is `measure` (on parts of the sample, anywhere) -> `add_sums` -> `finish` (once), which returns the encoder's next arrays. PCA is
the first pass where it is asked for; then come the passes that the layers' curvature strategies declare, side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..store.documents import Example
from ..store.errors import NumericalError
from ..store.manifest import Layer
from .capture import GradientSum
from .curvature import GRADIENT_STATISTICS, STRATEGIES, TOKEN_STATISTICS, Arrays, Sums
from .encoder import Encoder, EncoderPlan, Progress, backward, batches, ignore_progress, key
from .projection import principal_projection

_PCA = ("input_covariance", "output_covariance")


def _owner(layer: Layer, name: str) -> str:
    """Whose a statistic or an array is: what concerns inputs belongs to all layers that share the input."""
    return layer.input_group if name.startswith("input_") else layer.name


@dataclass(frozen=True)
class Fit:
    """The passes that an encoder's arrays need; labels that are sampled from the model are seeded by the projection's seed."""

    plan: EncoderPlan

    @property
    def passes(self) -> int:
        """How many passes over the sample there are."""
        return self._pca + max(len(STRATEGIES[layer.curvature].passes) for layer in self.plan.layers)

    def measure(self, encoder: Encoder, step: int, examples: Sequence[Example], progress: Progress = ignore_progress) -> Arrays:
        """The sums of pass `step` over some examples.

        Args:
            encoder: this plan's, with the arrays of the passes before.

        Returns:
            `<layer or input group>/<statistic>` -> float64 array, and `examples` and `tokens` counted beside them.
        """
        computed = self._computed(step)
        tracked = tuple(layer for layer in self.plan.layers if computed[layer.name])
        whole = step < self._pca
        maps = {layer.name: (None, None) if whole else encoder.maps[layer.name] for layer in tracked}
        sums: dict[str, Tensor] = {}

        def add(name: str, statistic: str, value: Tensor) -> None:
            at = f"{name}/{statistic}"
            sums[at] = value.double() if at not in sums else sums[at].add_(value)

        counts = {"examples": 0, "tokens": 0}
        device = next(encoder.model.parameters()).device
        for chosen, batch in batches(encoder.task, examples, self.plan.batch_tokens, device):
            gradients = GradientSum()
            valid = batch.valid

            def visit(layer: Layer, x: Tensor, d: Tensor, gradients: GradientSum = gradients, valid: Tensor = valid) -> None:
                for statistic in computed[layer.name]:
                    if statistic in TOKEN_STATISTICS:
                        add(layer.name, statistic, TOKEN_STATISTICS[statistic](x, d, valid.to(x.dtype)))
                if any(s in GRADIENT_STATISTICS for s in computed[layer.name]):
                    gradients(layer, x, d)

            sampled = self.plan.projection.seed if self.plan.curvature.labels == "sampled" else None
            backward(encoder.model, batch, tracked, maps, visit, partial(encoder.task.loss, sample_seed=sampled))
            for layer in tracked:
                for statistic in computed[layer.name]:
                    if statistic in GRADIENT_STATISTICS and layer.name in gradients.by_layer:
                        add(layer.name, statistic, GRADIENT_STATISTICS[statistic](gradients.by_layer[layer.name]))
            tokens = int(valid.sum())
            counts = {"examples": counts["examples"] + len(chosen), "tokens": counts["tokens"] + tokens}
            progress(len(chosen), tokens)
        arrays = {name: value.to("cpu", torch.float64).numpy() for name, value in sums.items()}
        return arrays | {name: np.array(float(count)) for name, count in counts.items()}

    def finish(self, step: int, arrays: Arrays, totals: Arrays) -> Arrays:
        """The encoder's arrays after pass `step`, from those before it and its merged sums.

        Raises:
            NumericalError: a statistic is not finite; names the layer.
        """
        made = dict(arrays)
        for layer in self.plan.layers:
            statistics = {}
            for statistic in self._wanted(step, layer):
                owner = _owner(layer, statistic)
                value = totals.get(f"{owner}/{statistic}")
                if value is None or not np.isfinite(value).all():
                    raise NumericalError(
                        f"the {statistic} of layer {layer.name} is {'missing: no gradient reaches it' if value is None else 'not finite'}; "
                        "leave the layer out with --layers, try --dtype float32, or look for broken weights"
                    )
                statistics[statistic] = value
            if not statistics:
                continue
            sums = Sums(statistics, int(totals["examples"]))
            for name, array in self._arrays(step, layer, sums).items():
                made[key(_owner(layer, name), name)] = array
        return made

    @property
    def _pca(self) -> int:
        return 1 if self.plan.projection.kind == "pca" else 0

    def _wanted(self, step: int, layer: Layer) -> tuple[str, ...]:
        if step < self._pca:
            return _PCA
        passes = STRATEGIES[layer.curvature].passes
        return passes[step - self._pca] if step - self._pca < len(passes) else ()

    def _computed(self, step: int) -> dict[str, set[str]]:
        """The statistics that each layer sums; those of a shared input are summed by the group's first layer alone."""
        computed: dict[str, set[str]] = {layer.name: set() for layer in self.plan.layers}
        for layer in self.plan.layers:
            for statistic in self._wanted(step, layer):
                computed[_owner(layer, statistic)].add(statistic)
        return computed

    def _arrays(self, step: int, layer: Layer, sums: Sums) -> Arrays:
        if step >= self._pca:
            return STRATEGIES[layer.curvature].finish[step - self._pca](sums)
        found = {
            "input_projection": principal_projection(sums.statistics["input_covariance"], layer.input_rank),
            "output_projection": principal_projection(sums.statistics["output_covariance"], layer.output_rank),
        }
        return {name: array for name, array in found.items() if array is not None}
