"""LDS of reranking: stored rows, uncoded rows, and EK-FAC of whole layers; and the number of candidates that it takes.

    python benchmarks/whole_layers.py PACK... [--data DIRECTORY] [--results FILE] [--write docs/how-it-works.md]
    python benchmarks/whole_layers.py PACK --kronfluence kronfluence.npy [--data DIRECTORY] [--data-labels] [--damping 0.01 0.1 1]

Each index has 800 bytes an example, and `wherefrom fit` takes all of its examples. All rows are computed again, for all queries at once.
A candidate set is the best N by stored rows; the table says which share of the ten best of all rows it holds. With `--kronfluence`,
the scores of the blocks are compared with those of peer_kronfluence.py; give `--data-labels` where its factors had these.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from pages import write_between
from scipy.stats import spearmanr
from wherefrom.client import Client
from wherefrom.evaluation.lds import estimate
from wherefrom.evaluation.packs import read_pack, write_documents_file
from wherefrom.query.metric import Metric
from wherefrom.query.scoring import Scorer, score_matrix
from wherefrom.ray_jobs import worker
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.config import BuildConfig
from wherefrom.ray_jobs.progress import Console
from wherefrom.ray_jobs.rerank import fit_rerank

_BYTES = 800
_ALL = 1 << 20
_BEST = 10
_CANDIDATES = (10, 30, 100, 300)
_MARKS = "<!-- whole layers: benchmarks/whole_layers.py -->", "<!-- end of whole layers -->"


def opened(pack, folder):
    """An index of a pack's training documents with whole layers."""
    out, documents = folder / "index.wherefrom", folder / "train.jsonl"
    write_documents_file(pack.train, documents)
    with Console() as reporter:
        options = {"model": str(pack.model), "data": (str(documents),), "out": str(out), "task": pack.task, **pack.build}
        build(BuildConfig(**options, bytes_per_example=_BYTES), reporter)
        fit_rerank(out, examples=_ALL, reporter=reporter)
    return Client(out)


def products(client, asked):
    """By name of asked rows: the products of these rows with every row, by component. One pass over the corpus."""
    found = {
        name: {component: np.zeros((len(vectors), len(client.index)), np.float32) for component, vectors in rows.items()}
        for name, rows in asked.items()
    }
    examples = [client.index.example(row) for row in range(len(client.index))]
    for batch in client._recomputer._encoder.batches(examples, skip_nonfinite=True):
        for name, rows in asked.items():
            for component, vectors in rows.items():
                found[name][component][:, batch.positions] = vectors.inner_products(batch.exact[component].as_float32())
    return found


def recomputed(client, queries, damping=None):
    """The product of every query with every row, by component, without weights; the blocks under another damping if one is given."""
    encoder, view = client._recomputer._encoder, client._recomputer.view
    asked = {name: vectors.as_float32() for name, vectors in encoder.rows(queries, queries=True, exact=True).items()}
    if damping is not None:
        (operand,) = (o for o in Scorer.of(view, asked, Metric(damping=damping)).operands if o.component.name == "blocks")
        asked["blocks"] = operand.scaled(view, asked["blocks"], stored=False)
    return products(client, {"": asked})[""]


def judged(paths, results, judge_path):
    """Figures of packs by name, those that are known taken from `results`, which new ones are added to."""
    known = json.loads(results.read_text()) if results and results.exists() else {}
    for path in paths:
        if path.name not in known:
            known[path.name] = json.loads(json.dumps(judge_path(path)))
            print(path.name, known[path.name], flush=True)
            if results:
                results.write_text(json.dumps(known, indent=1))
    return known


def judge(path, data):
    """The figures of one pack."""
    pack = read_pack(path, data)
    with tempfile.TemporaryDirectory() as folder:
        client = opened(pack, Path(folder))
        queries = client.to_examples(pack.queries)
        products = recomputed(client, queries)
        stored = score_matrix(client.index, client.encode_examples(queries))
        view = client._recomputer.view
        own_names = [component.name for component in client.index.manifest.components]
        result = {}
        matrices = {"stored rows": stored}
        if "blocks" not in own_names:  # else the index's blocks are other rows than these
            matrices["the same rows without codes"] = sum(c.weight * products[c.name] for c in client.index.manifest.components)
        whole = sum(c.weight * products[c.name] for c in view.manifest.components)
        matrices["whole layers, reranked"] = whole
        for name, matrix in matrices.items():
            e = estimate(matrix.T, pack.masks, pack.losses)
            result[name] = {"lds": e.value, "low": e.low, "high": e.high}
        best = np.argsort(-whole, axis=1)[:, :_BEST]
        order = np.argsort(-stored, axis=1)
        result["candidates"] = {
            n: float(np.mean([np.isin(best[q], order[q, :n]).mean() for q in range(len(queries))]))
            for n in _CANDIDATES
            if n <= stored.shape[1]
        }
        result["whole"] = [[c.name, c.weight, client.index.manifest.rows] for c in view.manifest.components]
        return result


def table(known):
    """Markdown."""
    packs = list(known)
    lines = ["| LDS | " + " | ".join(packs) + " |", "|---|" + "---|" * len(packs)]
    for name in ("stored rows", "the same rows without codes", "whole layers, reranked"):
        cells = [known[pack].get(name) for pack in packs]
        lines.append(f"| {name} | " + " | ".join(f"{c['lds']:.3f} ({c['low']:.3f} to {c['high']:.3f})" if c else "" for c in cells) + " |")
    lines += ["", "| candidates | " + " | ".join(packs) + " |", "|---|" + "---|" * len(packs)]
    for n in map(str, _CANDIDATES):
        lines.append(
            f"| the best {n} by stored rows | " + " | ".join(f"{known[pack]['candidates'].get(n, 1.0):.2f}" for pack in packs) + " |"
        )
    return "\n".join(lines)


def compare(path, data, file, dampings, data_labels):
    """Print how far whole layers and Kronfluence agree, and the LDS of both."""
    if data_labels:
        declared = worker.unprojected_blocks

        def with_data_labels(*arguments):
            component = declared(*arguments)
            return component.model_copy(update={"curvature": component.curvature.model_copy(update={"labels": "data"})})

        worker.unprojected_blocks = with_data_labels
    pack = read_pack(path, data)
    with tempfile.TemporaryDirectory() as folder:
        client = opened(pack, Path(folder))
        queries = client.to_examples(pack.queries)
        matrices = {f"damping {d:g}": recomputed(client, queries, d)["blocks"] for d in dampings}
    peer = np.load(file).T
    for name, matrix in ({file.name: peer} | matrices).items():
        correlations = [spearmanr(a, b).statistic for a, b in zip(matrix, peer, strict=True)]
        halves = [slice(None), slice(0, None, 2), slice(1, None, 2)]
        found = [estimate(matrix.T[:, half], pack.masks, pack.losses[:, :, half]).value for half in halves]
        print(
            f"{pack.name}, {name}: Spearman with {file.name} {np.mean(correlations):.6f} (least {np.min(correlations):.6f}); "
            f"LDS {found[0]:.3f}, even queries {found[1]:.3f}, odd {found[2]:.3f}"
        )


def main():
    """Judge, print, write; or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--kronfluence", type=Path)
    parser.add_argument("--damping", nargs="+", type=float, default=[0.1])
    parser.add_argument("--data-labels", action="store_true")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.kronfluence:
        compare(args.packs[0], args.data, args.kronfluence, args.damping, args.data_labels)
        return
    known = judged(args.packs, args.results, lambda path: judge(path, args.data))
    text = table(known)
    print(text)
    if args.write:
        write_between(args.write, _MARKS, text)


if __name__ == "__main__":
    main()
