"""LDS of a build's default settings: its damping, weights and norm against every other setting of a grid, on ground-truth packs.

    python benchmarks/settings.py PACK... [--data IDX_DIR] [--bytes 2400] [--write docs/components.md]

An index is built with the defaults and asked in many ways, which needs no other build: dampings, components' weights, influence, cosine and
per nat. The best setting is chosen on the even-numbered queries with retraining's outcome in hand; what a user has is the build's choice,
made without. Both are judged on the odd-numbered queries. `--write` puts the table between the page's two marks.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
from pages import write_between
from wherefrom import BuildConfig, Client
from wherefrom.evaluation.lds import difference, estimate, lds
from wherefrom.evaluation.packs import read_pack, write_documents_file
from wherefrom.query.metric import Metric
from wherefrom.query.scoring import score_matrix
from wherefrom.ray_jobs.build import build

_DAMPINGS = (None, 0.1, 0.3, 3.0, 10.0)
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_MARKS = "<!-- settings: benchmarks/settings.py -->", "<!-- end of settings -->"


def settings(components):
    """Every metric of the grid, the build's own first."""
    yield Metric()
    others = [s.role for s in components[1:]]
    for factors in itertools.product(_FACTORS, repeat=len(others)):
        weights = {name: factor for name, factor in zip(others, factors, strict=True) if factor != 1.0}
        for mode in ("influence", "cosine", "loss-normalized"):
            for damping in _DAMPINGS if mode != "cosine" else (None,):
                if weights or damping or mode != "influence":
                    yield Metric(mode, damping, weights=weights)


def _shown(metric):
    parts = [metric.mode, *([f"damping {metric.damping:g}"] if metric.damping else [])]
    return ", ".join([*parts, *(f"{name} x {weight:g}" for name, weight in metric.weights.items())])


def measure(path, data, size):
    """A line of the table."""
    pack = read_pack(path, data)
    with tempfile.TemporaryDirectory() as scratch:
        documents = pack.train_file or Path(scratch) / "train.jsonl"
        if pack.train_file is None:
            write_documents_file(pack.train, documents)
        out = Path(scratch) / "index"
        build(
            BuildConfig(model=str(pack.model), task=pack.task, data=(str(documents),), out=str(out), bytes_per_example=size, **pack.build)
        )
        client = Client(out)
        queries = client.encode_examples(client.to_examples(pack.queries))
        scores = {_shown(metric): score_matrix(client.index, queries, metric).T for metric in settings(client.index.manifest.components)}
    even, odd = slice(0, None, 2), slice(1, None, 2)
    on_even = {name: float(np.nanmean(lds(s[:, even], pack.masks, pack.losses[:, :, even]))) for name, s in scores.items()}
    own, best = next(iter(scores)), max(on_even, key=on_even.get)
    judged = {name: estimate(scores[name][:, odd], pack.masks, pack.losses[:, :, odd]) for name in (own, best)}
    gap = difference(scores[own][:, odd], scores[best][:, odd], pack.masks, pack.losses[:, :, odd])
    share = judged[own].value / judged[best].value
    return (
        f"| {pack.name} | {judged[own].value:.3f} | {judged[best].value:.3f} | {best} | {share:.1%} | {gap.low:.3f} to {gap.high:.3f} | "
        f"{len(scores)} |"
    )


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bytes", type=int, default=2400)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    lines = [
        f"| {args.bytes:,} bytes | the build's choice | the best setting | which | share | interval of the difference | tried |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in args.packs:
        lines.append(measure(path, args.data, args.bytes))
        print(lines[-1], flush=True)
    if args.write:
        text = "\n".join(lines)
        write_between(args.write, _MARKS, text)


if __name__ == "__main__":
    main()
