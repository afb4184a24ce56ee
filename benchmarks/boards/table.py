"""The boards' results as tables and as one picture: LDS and QLD against the cost of a query.

    pip install matplotlib
    python benchmarks/boards/table.py boards.json texts.json --write docs/boards.md

The results are those of images.py and texts.py. The picture, boards.svg beside the page, has seconds a query relative to those of the
index of 800 bytes of the same board, measured in one run; methods without a cost of their own (baselines, peers' scores) are lines.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pages import write_between

_ABOUT = {
    "mnist-lr": "Published: dattri's board, with MNIST's training images: explicit influence 0.80, LiSSA 0.79, TRAK of 50 models 0.68, of "
    "one 0.42, TracIn 0.33.",
    "mnist-mlp": "Published: dattri's board, with MNIST's training images and dropout: TRAK of 50 models 0.45, of 10 0.33, influence by "
    "conjugate gradients 0.26, TracIn 0.15, TRAK of one model 0.11.",
    "fashion": "Published: SOURCE's board (arXiv 2405.12186), with another perceptron and recipe: SOURCE 0.46, influence functions 0.30.",
    "pack50": "The run of [replay](replay.md#what-it-is-worth): a Llama-like model of 0.5 million parameters, fine-tuned on 800 documents "
    "by AdamW; subsets are halves, {queries} of its queries.",
}
_TITLES = {"pack50": "texts"}
_MARKS = "<!-- boards: benchmarks/boards/table.py -->", "<!-- end of boards -->"
_REFERENCE = "index, 800 bytes"
_OTHERS = ("dattri", "Kronfluence", "LoGra", "TRAK", "TrackStar", "LESS", "TracIn", "gradient dot")
_COLOURS = {**dict.fromkeys(_OTHERS, "#d55e00"), "baseline": "#888888", "inverse": "#888888", "random": "#bbbbbb"}
_OURS = "#0072b2"


def lines_of(board):
    """Judged methods of a board, best first."""
    judged = {method: line for method, line in board.items() if "lds" in line}
    return dict(sorted(judged.items(), key=lambda item: -item[1]["lds"]))


def table(known):
    """Markdown of all boards."""
    lines = []
    for name, board in known.items():
        about = _ABOUT[name].format(queries=len(board["random"]["losses"]))
        lines += [f"### {_TITLES.get(name, name)}", "", about, ""]
        lines += ["| | method | bytes an example | query, relative | LDS | 95 % interval | QLD |", "|---|---|---|---|---|---|---|"]
        reference = board[_REFERENCE]["seconds"]
        for number, (method, line) in enumerate(lines_of(board).items(), 1):
            size = f"{line['bytes']:,.0f}" if line["bytes"] else ""
            cost = f"{line['seconds'] / reference:,.2g}" if _has_cost(method, line) else ""
            interval = f"{line['low']:.3f} to {line['high']:.3f}"
            qld = f"{line['qld']:.2f} ± {line['qld_error']:.2f}"
            lines.append(f"| {number} | {method} | {size} | {cost} | {line['lds']:.3f} | {interval} | {qld} |")
        lines.append("")
    return "\n".join(lines)


def _has_cost(method, line):
    """True if a method's seconds are of queries."""
    return bool(line["seconds"]) and not method.startswith(("baseline", "random"))


def _colour(method):
    return next((colour for start, colour in _COLOURS.items() if method.startswith(start)), _OURS)


def picture(known, file):
    """Draw LDS and QLD of each board against the cost of a query; the numbers are those of the tables."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "boards", "font.size": 9, "font.family": "sans-serif"})
    figure, panels = plt.subplots(2, len(known), figsize=(3.3 * len(known), 6.2), sharex="col", layout="constrained")
    for column, (name, board) in enumerate(known.items()):
        reference = board[_REFERENCE]["seconds"]
        for panel, key, label in zip(panels[:, column], ("lds", "qld"), ("LDS", "QLD, nats"), strict=True):
            for number, (method, line) in enumerate(lines_of(board).items(), 1):
                if not _has_cost(method, line):
                    if not method.startswith("random"):
                        panel.axhline(line[key], color=_colour(method), linewidth=0.8, linestyle=(0, (4, 3)))
                        panel.annotate(str(number), (1.0, line[key]), xycoords=("axes fraction", "data"), fontsize=7, color=_colour(method))
                    continue
                cost = line["seconds"] / reference
                size = 12 * (line["bytes"] or 100) ** 0.2
                panel.scatter(cost, line[key], s=size, color=_colour(method), alpha=0.75, linewidths=0, zorder=3)
                panel.annotate(str(number), (cost, line[key]), xytext=(4, 3), textcoords="offset points", fontsize=7.5)
            panel.set_xscale("log")
            panel.axhline(0, color="#dddddd", linewidth=0.8, zorder=0)
            panel.spines[["top", "right"]].set_visible(False)
            if column == 0:
                panel.set_ylabel(label)
        panels[0, column].set_title(_TITLES.get(name, name))
        panels[1, column].set_xlabel("cost of a query, index of 800 bytes = 1")
    figure.savefig(file, metadata={"Date": None})
    text = "\n".join(line.rstrip() for line in file.read_text().splitlines())
    file.write_text(text + "\n")


def main():
    """Print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    known = {name: board for file in args.results for name, board in json.loads(file.read_text()).items()}
    known = {name: known[name] for name in _ABOUT if name in known}
    text = table(known)
    print(text)
    if args.write:
        write_between(args.write, _MARKS, text)
        picture(known, args.write.with_suffix(".svg"))


if __name__ == "__main__":
    main()
