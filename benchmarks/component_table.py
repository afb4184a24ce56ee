"""LDS of rows on a ground-truth pack: numbers of bytes, single components, float rows as other tools store, baselines.

    python benchmarks/component_table.py PACK... [--dtype bfloat16] [--indexes DIR] [--results FILE]
        [--write docs/components.md --section adapters]

Each line is an index that is built and judged, with its LDS and the 95 % interval. For a pack of a LoRA adapter, the blocks are the
adapter's matrices, and lines with the frozen layers beside them follow. `--indexes` keeps the indexes, which benchmarks/planted.py asks.
`--second-seed` names a pack of some of the same subsets with two seeds, from which the noise ceiling of one seed is estimated.
`--results` keeps finished lines, so that a run is taken up where it was; `--write` puts the tables between a section's marks of a page.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from pages import write_between
from wherefrom.evaluation.judge import judge_index
from wherefrom.evaluation.lds import split_half
from wherefrom.evaluation.packs import read_pack

_LOGRA = {"components": ("blocks",), "rank": 16}
_EKFAC = {"components": ("blocks",), "rank": 128, "projection": "pca", "curvature": "ekfac", "labels": "sampled", "row_dtype": "float16"}
LINES = {
    "`--bytes-per-example 400`": {"bytes_per_example": 400},
    "`--bytes-per-example 800`, the default": {"bytes_per_example": 800},
    "the default, fitted on all examples": {"bytes_per_example": 800, "fit_examples": 5000},
    "`--bytes-per-example 2400`": {"bytes_per_example": 2400},
    "the head alone": {"components": ("head",), "bytes_per_example": 800},
    "the embeddings alone": {"components": ("embeddings",), "bytes_per_example": 800},
    "head and embeddings": {"components": ("head", "embeddings"), "bytes_per_example": 800},
    "the blocks alone, one bit a coordinate": {"components": ("blocks",), "bytes_per_example": 800},
    "the blocks alone, one bit a coordinate, EK-FAC": {"components": ("blocks",), "bytes_per_example": 800, "curvature": "ekfac"},
    "LoGra, rank 16, float32": _LOGRA,
    "EK-FAC, 128 PCA directions, float16": _EKFAC,
}
_FROZEN_LINES = {
    "LoGra of the frozen layers, rank 16, float32": {**_LOGRA, "layers": ("*.base_layer",)},
}
_BASELINES = ("chars", "bm25", "hidden")


def index_path(indexes, pack, name):
    """Directory of the index of a line; None if indexes are not kept."""
    words = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    return indexes and indexes / pack.name / f"{words}.wherefrom"


def measure(pack, dtype, indexes, known, keep):
    """Judge every line of a pack that is not known, and call `keep` after each."""
    adapted = any(pack.glob("model-epoch*/adapter_config.json"))
    for name, options in (LINES | (_FROZEN_LINES if adapted else {})).items():
        if name not in known:
            first = name == next(iter(LINES))
            judgement = judge_index(pack, {**options, "dtype": dtype}, out=index_path(indexes, pack, name), baselines=first)
            if judgement.baselines:
                known["baselines"] = {b: judgement.to_dict()["baselines"][b] for b in _BASELINES}
            result = judgement.to_dict()
            known["about"] = {key: result[key] for key in ("examples", "queries", "subsets", "seeds", "ceiling")}
            known[name] = {key: result[key] for key in ("lds", "low", "high", "bytes_per_example")}
            print(pack.name, name, known[name], flush=True)
            keep()


def table(pack, known):
    """Markdown of a pack's lines."""
    about = known["about"]
    ceiling = f", noise ceiling {about['ceiling']:.2f}{about.get('estimated', '')}" if about["ceiling"] else ""
    lines = [f"#### {pack}", "", f"{about['examples']:,} examples, {about['queries']} queries, {about['subsets']} subsets{ceiling}.", ""]
    lines += ["| rows | bytes an example | LDS | 95 % interval |", "|---|---|---|---|"]
    for name in (*LINES, *_FROZEN_LINES):
        if name in known:
            line = known[name]
            lines.append(f"| {name} | {line['bytes_per_example']:,.0f} | {line['lds']:.3f} | {line['low']:.3f} to {line['high']:.3f} |")
    for name, line in known["baselines"].items():
        lines.append(f"| baseline: {name} | | {line['lds']:.3f} | {line['low']:.3f} to {line['high']:.3f} |")
    return [*lines, ""]


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", nargs="+", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--indexes", type=Path)
    parser.add_argument("--second-seed", nargs="*", default=[], metavar="PACK=DIRECTORY", help="by the name of a pack")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--section", choices=["adapters", "pretrained"], default="adapters", help="of the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(args.results.read_text()) if args.results and args.results.exists() else {}

    def keep():
        if args.results:
            args.results.write_text(json.dumps(known, indent=1))

    for pack in args.packs:
        measure(pack, args.dtype, args.indexes, known.setdefault(pack.name, {}), keep)
    for pair in args.second_seed:
        name, _, directory = pair.partition("=")
        losses = read_pack(Path(directory)).losses
        estimated = {"ceiling": split_half(losses) ** 0.5, "estimated": f" (two seeds on {len(losses)} subsets)"}
        known[name]["about"] |= estimated
        keep()
    text = "\n".join(line for pack in args.packs for line in table(pack.name, known[pack.name]))
    print(text)
    if args.write:
        marks = f"<!-- {args.section}: benchmarks/component_table.py -->", f"<!-- end of {args.section} -->"
        write_between(args.write, marks, text)


if __name__ == "__main__":
    main()
