"""The tables of docs/evaluation.md: every pack with its baselines, peers' scores, and how the interval narrows with the subsets.

    python benchmarks/evaluate_packs.py PACK... [--data IDX_DIR] [--scores PACK=NAME=FILE]... [--write docs/evaluation.md]

Each pack is indexed with the defaults, by float32 rows of the blocks at ranks 16 and 64 and, language models, by the output head
alone. `--scores` judges a matrix of somebody else's (benchmarks/peer_kronfluence.py makes one) on the pack of that name. `--write` puts
the tables between the page's two marks.
"""

import argparse
import tempfile
from pathlib import Path

from pages import write_between
from wherefrom import Client
from wherefrom.evaluation.judge import judge_index, judge_scores
from wherefrom.evaluation.lds import estimate
from wherefrom.evaluation.packs import read_pack
from wherefrom.query.scoring import score_matrix

_METHODS = {
    "Wherefrom, defaults (800 bytes)": {},
    "Wherefrom, `-o rank=16`": {"rank": 16},
    "Wherefrom, `-o rank=64 -o curvature=ekfac -o labels=sampled`": {"rank": 64, "curvature": "ekfac", "labels": "sampled"},
    "Wherefrom, `-o components=head` (64 bits a token)": {"components": ("head",)},
    "Wherefrom, `-o components=head -o head_bits=256`": {"components": ("head",), "head_bits": 256},
    "Wherefrom, `-o components=head -o head_bits=32 -o head_max_tokens=32`": {
        "components": ("head",),
        "head_bits": 32,
        "head_max_tokens": 32,
    },
}
_NAMES = {
    "random": "random numbers",
    "norm": "norm of the row",
    "dot": "gradient dot product",
    "cosine": "gradient cosine",
    "tfidf": "TF-IDF of words, cosine",
    "chars": "TF-IDF of character 3- to 5-grams, cosine",
    "bm25": "BM25",
    "hidden": "mean hidden state, cosine",
    "pixels": "pixels, cosine",
}
_MARKS = "<!-- tables: benchmarks/evaluate_packs.py -->", "<!-- end of tables -->"
_STEPS = (10, 20, 40, 60, 80, 100)


def _row(name, e, size=""):
    return f"| {name} | {e.value:.3f} | {e.low:.3f} to {e.high:.3f} | {size} |"


def tables(packs, data, scores):
    """Markdown lines."""
    lines, widths = [], {}
    for path in packs:
        judged = None
        rows = []
        with tempfile.TemporaryDirectory() as scratch:
            images = read_pack(path, data).task != "causal-lm"
            methods = {name: options for name, options in _METHODS.items() if not (images and "components" in options)}
            for number, (name, options) in enumerate(methods.items()):
                out = Path(scratch) / str(number)
                judgement = judge_index(path, options, data=data, out=out, baselines=number == 0)
                rows.append(_row(name, judgement.estimate, f"{judgement.bytes_per_example:,.0f}"))
                if number == 0:
                    judged = judgement
                    pack, client = read_pack(path, data), Client(out)
                    found = score_matrix(client.index, client.encode_examples(client.to_examples(pack.queries))).T
                    widths[judged.pack] = {n: estimate(found, pack.masks[:n], pack.losses[:n]) for n in _STEPS if n <= len(pack.masks)}
        for place, name, file in scores:
            if place == judged.pack:
                rows.append(_row(name, judge_scores(path, file, data=data).estimate))
        rows += [_row(_NAMES[name], e) for name, e in judged.baselines.items()]
        if judged.ceiling is not None:
            rows.append(f"| *ceiling* | {judged.ceiling:.3f} | | |")
            rows.append(f"| *half of the seeds, for the others* | {judged.split_half:.3f} | | |")
        lines += [
            f"### {judged.pack}",
            "",
            f"{judged.protocol}.",
            "",
            "| | LDS | 95 % interval | bytes an example |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    lines += ["### How many subsets are enough?", "", "The defaults' LDS on the first so many subsets, with its interval:", ""]
    lines += ["| subsets | " + " | ".join(widths) + " |", "|---|" + "---|" * len(widths)]
    for n in _STEPS:
        cells = [f"{w[n].value:.3f} ({w[n].low:.3f} to {w[n].high:.3f})" if n in w else "" for w in widths.values()]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return lines


def main():
    """Judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--scores", action="append", default=[], help="PACK=NAME=FILE; repeatable")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    scores = [(place, name, Path(file)) for place, name, file in (s.split("=") for s in args.scores)]
    text = "\n".join(tables(args.packs, args.data, scores))
    print(text)
    if args.write:
        write_between(args.write, _MARKS, text)


if __name__ == "__main__":
    main()
