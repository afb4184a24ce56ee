"""Fit of the encoder that `query --rerank` recomputes candidates with: EK-FAC of all layers inside the blocks, without projection.

Head and embeddings of recomputed rows are those of the index, with all tokens and without codes. Weights are chosen as at the end of a
build (indexer/calibrate.py), from rows of some examples; which layers training changed is taken from the build's record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..indexer.calibrate import calibrate
from ..indexer.encoder import EncoderSettings
from ..indexer.recorded import RecordedEncoder
from ..store.errors import UsageError
from ..store.files import exclusive
from ..store.index import Index
from ..store.manifest import Component, DenseComponent
from ..store.rerank import RerankRecord, write_rerank
from .add import build_config
from .build import draw_sample, run_fit, with_counts
from .executor import Resources, open_executor
from .progress import Reporter, Silent
from .schema import known_training
from .worker import Worker

DEFAULT_EXAMPLES = 2000
_COMPARED = 256


def fit_rerank(
    out: Path,
    examples: int = DEFAULT_EXAMPLES,
    damping: float | None = None,
    runtime: Mapping[str, Any] | None = None,
    models: Sequence[str] = (),
    reporter: Reporter = Silent(),
    task: str | None = None,
) -> RerankRecord:
    """Fit the encoder of recomputed rows on examples of the index, and write it into the index.

    Args:
        examples: most examples to fit on; two passes.
        damping: relative to each layer's mean eigenvalue; by default 0.1, and 1 for a model without tokens.
        runtime, models, task: see `add`.

    Raises:
        UsageError: an option is out of range, or the index has several models.
        IncompatibleError: a model differs from that of the build.
        BusyError: another process is changing the index.
    """
    if examples < 1 or (damping is not None and not 0 < damping < np.inf):
        raise UsageError(f"`examples` is {examples} and `damping` {damping}; both must be above 0")
    runtime = runtime or {}
    recorded = RecordedEncoder(Index(out), models, runtime.get("device") or "auto", bool(runtime.get("trust_remote_code")), task)
    if any(component.features & {"optimizer", "unit-length"} for component in recorded.index.manifest.components):
        raise UsageError(f"the rows of {out} are scaled gradients, and whole layers would be another method; candidates need no fit")
    if len(recorded.index.manifest.models) > 1:
        raise UsageError(f"{out} has several models, whose candidates are recomputed with its own rows only")
    config = build_config(recorded, (str(out),), runtime)
    resources = Resources(config.workers, config.threads, config.address, config.device, ":" in config.task)
    with exclusive(out), open_executor(partial(Worker, config, recorded.sources), resources) as executor:
        index = Index(out)
        descriptions, settings, _ = executor.call("describe")
        recorded.check_models([model.fingerprint for model in descriptions])
        alive = np.flatnonzero(index.alive)
        count = min(examples, len(alive))
        dense: DenseComponent = executor.call("unprojected_blocks")
        dense = dense.model_copy(update={"curvature": dense.curvature.model_copy(update={"damping": damping or dense.curvature.damping})})
        fitting = EncoderSettings((dense,), settings.batch_tokens, False)
        seed = config.seed
        arrays, counts = run_fit(executor, fitting, draw_sample(index.shards, alive, count, seed), count, reporter)
        (dense,) = with_counts(fitting, counts).components  # type: ignore[assignment]
        arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
        sparse = tuple(c.model_copy(update={"weight": 1.0}) for c in index.manifest.components if c.role != "blocks")
        components: tuple[Component, ...] = (*sparse, dense)
        sparse_names = {component.name for component in sparse}
        sparse_arrays = {name: array for name, array in index.arrays.items() if name.split("/", 1)[0] in sparse_names}
        compared = min(len(alive), _COMPARED)
        part = [shard for drawn in draw_sample(index.shards, alive, compared, seed + 1) for shard in drawn]
        reporter.stage("comparing components", compared)
        together = replace(fitting, components=components)
        (agreements,) = executor.map("compare_exact", (together, sparse_arrays | arrays), [(part,)], reporter)
        shares = {name: record.get("mean_share") for name, record in index.manifest.build.calibration.items()}
        training = known_training(components, index.manifest.models[-1])
        weighted, _ = calibrate(components, agreements, shares.get("head"), training, whole_layers=True)
        return write_rerank(index, weighted, arrays)
