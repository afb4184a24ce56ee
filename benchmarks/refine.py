"""LDS of refined queries: whole layers by the iterations of conjugate gradients, compared with EK-FAC alone.

    python benchmarks/refine.py PACK... [--queries 20] [--iterations 0 1 3] [--damping 30] [--indexes DIRECTORY] [--results FILE]
        [--write docs/how-it-works.md]

Each index has 800 bytes an example and whole layers (`wherefrom fit`). Some queries, evenly spread over the pack's, are refined with exact
Gauss-Newton products over the whole corpus. All rows are computed again, and the LDS is of the blocks alone and of the weighted sum with
head and embeddings. Without `--damping`, it is the one that a refined query has by default; EK-FAC alone has that of the fit.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from pages import write_between
from wherefrom.client import Client
from wherefrom.evaluation.lds import estimate
from wherefrom.evaluation.packs import read_pack
from wherefrom.query.metric import Metric
from wherefrom.query.scoring import Scorer
from wherefrom.query_rows import query_rows
from whole_layers import judged, opened, products

_SHARES = 0.25, 0.5, 1, 2, 4, 8  # of the blocks, times their weight
_MARKS = "<!-- refine: benchmarks/refine.py -->", "<!-- end of refine -->"


def judge(path, data, count, iterations, damping, folder):
    """The figures of one pack."""
    pack = read_pack(path, data)
    place = folder / pack.name
    place.mkdir(parents=True, exist_ok=True)
    out = place / "index.wherefrom"
    client = Client(out) if (out / "rerank" / "rerank.json").exists() else opened(pack, place)
    chosen = np.unique(np.linspace(0, len(pack.queries) - 1, count).round().astype(int))
    examples = client.to_examples([pack.queries[i] for i in chosen])
    recomputer = client._recomputer
    view, encoder = recomputer.view, recomputer._encoder
    asked, reports = {}, {}
    for number in iterations:
        metric = Metric(refine=number, damping=damping if number else None)
        rows, reports[number] = query_rows(view, encoder, metric, examples)
        scorer = Scorer.of(view, rows, metric)
        asked[number] = {o.component.name: o.scaled(view, rows[o.component.name], stored=False) for o in scorer.operands}
        print(pack.name, number, reports[number], flush=True)
    result = {"examples": len(client.index), "queries": len(chosen), "lines": {}, "shares": {}}
    losses = pack.losses[:, :, chosen]
    for number, by_component in products(client, asked).items():
        whole = sum(by_component.values())
        line = {}
        for name, matrix in {"blocks": by_component["blocks"], "all": whole}.items():
            e = estimate(matrix.T, pack.masks, losses)
            line[name] = [e.value, e.low, e.high]
        others = whole - by_component["blocks"]
        shares = {f: estimate((others + f * by_component["blocks"]).T, pack.masks, losses).value for f in _SHARES}
        result["shares"][str(number)] = {str(f): round(value, 4) for f, value in shares.items()}
        report = reports[number]
        line["residual"] = report and report.residual
        line["seconds"] = report and report.seconds / len(chosen)
        result["lines"][str(number)] = line
        print(pack.name, number, line, result["shares"][str(number)], flush=True)
    return result


def table(known):
    """Markdown."""
    lines = ["| pack | iterations | blocks alone | with head and embeddings | what is left of the equation |", "|---|---|---|---|---|"]
    for pack, found in known.items():
        for number, line in found["lines"].items():
            cells = [f"{line[name][0]:.3f} ({line[name][1]:.3f} to {line[name][2]:.3f})" for name in ("blocks", "all")]
            left = "" if line["residual"] is None else f"{line['residual']:.2f}"
            lines.append(
                f"| {pack}, {found['queries']} queries | {number if number != '0' else 'EK-FAC alone'} | {' | '.join(cells)} | {left} |"
            )
    return "\n".join(lines)


def main():
    """Judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--iterations", nargs="+", type=int, default=[0, 1, 3])
    parser.add_argument("--damping", type=float)
    parser.add_argument("--indexes", type=Path, help="keep the indexes here")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.indexes or Path(scratch)
        known = judged(args.packs, args.results, lambda path: judge(path, args.data, args.queries, args.iterations, args.damping, folder))
    text = table(known)
    print(text)
    if args.write:
        write_between(args.write, _MARKS, text)


if __name__ == "__main__":
    main()
