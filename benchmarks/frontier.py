"""Bytes against truth: what an index of so many bytes an example is worth on ground-truth packs, and how well it recalls exact scores.

    python benchmarks/frontier.py PACK... [--data IDX_DIR] [--bytes 400 800 ...] [--results FILE] [--write docs/components.md]

For each number of bytes the index that `wherefrom build --bytes-per-example` makes, with its LDS over all queries and over the even- and
the odd-numbered half, and the share of its top 10 that is in the top 10 of the same components in float32, nothing left out. Beside them
what other tools store: LoGra's float32 rows at ranks 16 and 64, and EK-FAC over all layers (of a language model on its 128 leading
directions, of a perceptron without projection). `--results` keeps finished lines, so that a run is taken up where it was; `--write` puts
table and plot (frontier.svg beside the page) into the docs.
"""

import argparse
import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np
from pages import write_between
from wherefrom import BuildConfig, Client
from wherefrom.evaluation.baselines import content_baselines
from wherefrom.evaluation.lds import estimate
from wherefrom.evaluation.packs import read_pack, write_documents_file
from wherefrom.query.scoring import score_matrix
from wherefrom.ray_jobs.build import build

_BYTES = (200, 400, 800, 1600, 2400, 5000, 10_000)
_SEVERAL_BYTES = (2400, 4096, 10_000)
_MARKS = "<!-- frontier: benchmarks/frontier.py -->", "<!-- end of frontier -->"
_PEERS = {
    "LoGra, rank 16, float32": {"rank": 16},
    "LoGra, rank 64, float32, the model's labels": {"rank": 64, "curvature": "ekfac", "labels": "sampled"},
}
_EXACT = {
    "causal-lm": ("EK-FAC, 128 PCA directions, float16", {"rank": 128, "projection": "pca", "labels": "sampled"}),
    "mlp": ("EK-FAC, no projection, float16", {"rank": 100_000, "labels": "expected", "damping": 1.0}),
}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def _exact(client, train, queries):
    """Scores [examples, queries] of the index's components without codes, reduction or bound on tokens."""
    rows, asked = client.encoder.rows(train, exact=True), client.encoder.rows(queries, queries=True, exact=True)
    components = client.encoder.settings.components
    return sum(s.weight * rows[s.name].as_float32().inner_products(asked[s.name].as_float32()) for s in components)


def _overlap(found, exact, k=10):
    top = [np.argsort(-scores, axis=0)[:k] for scores in (found, exact)]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(top[0].T, top[1].T, strict=True)]))


def _halves(scores, pack):
    found = {"all": estimate(scores, pack.masks, pack.losses)}
    for name, part in (("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
        found[name] = estimate(scores[:, part], pack.masks, pack.losses[:, :, part])
    return {name: [e.value, e.low, e.high] for name, e in found.items()}


def _measured(pack, options, scratch, recall):
    data = pack.train_file or scratch / "train.jsonl"
    if pack.train_file is None and not data.exists():
        write_documents_file(pack.train, data)
    out = Path(tempfile.mkdtemp(dir=scratch)) / "index"
    given = {"model": str(pack.model), **pack.build, **options}
    build(BuildConfig(task=pack.task, data=(str(data),), out=str(out), **given))
    client = Client(out)
    queries = client.to_examples(pack.queries)
    scores = score_matrix(client.index, client.encode_examples(queries)).T
    found = _halves(scores, pack)
    summary = client.index.summary()
    found["bytes"], found["encoder"] = summary["bytes_per_example"], summary["encoder_bytes"]
    found["components"] = {
        s["name"]: [s.get("bits_per_token"), s.get("tokens"), s.get("coordinates"), s["weight"]] for s in summary["components"]
    }
    if recall:
        exact = _exact(client, [client.index.example(i) for i in range(len(client.index))], queries)
        found["recall"], found["exact"] = _overlap(scores, exact), estimate(exact, pack.masks, pack.losses).value
    return found


def _several(path):
    """A pack's further models: up to four checkpoints of the indexed one's run, in order, and as many models trained apart."""
    epochs = {
        int(found[1]): str(file)
        for file in path.iterdir()
        if (found := re.fullmatch(r"model-(?:0-)?epoch(\d+)(?:\.safetensors)?", file.name))
    }
    chosen = np.unique(np.linspace(0, len(epochs) - 1, min(4, len(epochs))).round().astype(int)) if len(epochs) > 1 else []
    apart = sorted(str(file) for file in path.glob("model-[0-3].safetensors"))
    return {
        **({"checkpoints": tuple(epochs[sorted(epochs)[i]] for i in chosen)} if len(chosen) else {}),
        **({"models": tuple(apart)} if len(apart) > 1 else {}),
    }


def measure(path, data, sizes, results):
    """Every line of a pack, those that are known already taken from `results`; calls `results(name, line)` for new ones."""
    pack = read_pack(path, data)
    with tempfile.TemporaryDirectory() as scratch:
        lines = {f"{size} bytes": ({"bytes_per_example": size}, True) for size in sizes}
        for what, models in _several(path).items():
            for size in _SEVERAL_BYTES:
                lines[f"{len(models)} {what}, {size} bytes"] = ({"bytes_per_example": size, "model": models}, False)
        exact, options = _EXACT[pack.task]
        peers = {**_PEERS, exact: {"row_dtype": "float16", "curvature": "ekfac", **options}}
        for name, (given, recall) in (lines | {name: (options, False) for name, options in peers.items()}).items():
            results(pack.name, name, lambda given=given, recall=recall: _measured(pack, given, Path(scratch), recall))
        task_examples = {"train": pack.train, "queries": pack.queries}

        def baseline(name):
            with_task = _encoded(pack, task_examples)
            return {**_halves(content_baselines(*with_task)[name], pack), "bytes": None, "encoder": None}

        name = "chars" if pack.task == "causal-lm" else "pixels"
        results(pack.name, f"baseline: {name}", lambda: baseline(name))


def _encoded(pack, documents):
    from wherefrom.indexer.models import ModelSource
    from wherefrom.indexer.tasks import find_task

    build_ = pack.build
    encoder = find_task(pack.task).converter(
        ModelSource(str(pack.model)), build_.get("max_tokens"), build_.get("long", "split"), build_.get("append_eos", True)
    )
    return [list(encoder.documents(part)) for part in documents.values()]


def _one(name):
    return re.fullmatch(r"\d+ bytes", name)


def _several_models(name):
    return re.fullmatch(r"\d+ (checkpoints|models), .*", name)


def _size(value):
    return "" if value is None else f"{value:,.0f}"


def table(known):
    """Markdown of all packs' lines."""
    lines = []
    for pack, found in known.items():
        lines += [
            f"### {pack}",
            "",
            "| | bytes an example | LDS | 95 % interval | even, odd queries | top 10 of float32 | encoder, bytes |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, line in found.items():
            shown = f"`--bytes-per-example {name.split()[0]}`" if _one(name) else name
            value, low, high = line["all"]
            recall = f"{line['recall']:.2f}" if "recall" in line else ""
            halves = f"{line['even'][0]:.3f}, {line['odd'][0]:.3f}"
            cells = (shown, _size(line["bytes"]), f"{value:.3f}", f"{low:.3f} to {high:.3f}", halves, recall, _size(line["encoder"]))
            lines.append("| " + " | ".join(cells) + " |")
        best = max((line for name, line in found.items() if "exact" in line), key=lambda line: line["bytes"])
        lines += ["", f"The components of the largest, in float32 and with nothing left out: {best['exact']:.3f}.", ""]
    return lines


def plot(known, file):
    """The frontier as a picture: bytes to the right (logarithmic), LDS upwards; a line for each pack, crosses for what others store."""
    left, top, width, height = 50, 20, 640, 340
    low, high = math.log10(150), math.log10(2_000_000)

    def x(size):
        return left + (math.log10(size) - low) / (high - low) * width

    def y(value):
        return top + height - value / 0.8 * height

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 160} {top + height + 50}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for size in (200, 1000, 10_000, 100_000, 1_000_000):
        parts.append(f'<line x1="{x(size):.0f}" x2="{x(size):.0f}" y1="{top}" y2="{top + height}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(size):.0f}" y="{top + height + 16}" text-anchor="middle">{size:,}</text>')
    for tenth in range(0, 9, 2):
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y(tenth / 10):.0f}" y2="{y(tenth / 10):.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tenth / 10) + 4:.0f}" text-anchor="end">{tenth / 10}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">bytes an example</text>')
    legend = "LDS; lines: --bytes-per-example, rings: several checkpoints or models, crosses: float rows"
    parts.append(f'<text x="{left}" y="14">{legend}</text>')
    for number, (pack, found) in enumerate(known.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        ours = sorted((line["bytes"], line["all"][0]) for name, line in found.items() if _one(name))
        points = " ".join(f"{x(size):.1f},{y(value):.1f}" for size, value in ours)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(size):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>' for size, value in ours]
        others = [line for name, line in found.items() if line["bytes"] and not _one(name) and not _several_models(name)]
        for line in (line for name, line in found.items() if _several_models(name)):
            at, over = x(line["bytes"]), y(line["all"][0])
            parts.append(f'<circle cx="{at:.1f}" cy="{over:.1f}" r="4" fill="none" stroke="{colour}" stroke-width="2"/>')
        for line in others:
            at, over = x(line["bytes"]), y(line["all"][0])
            parts.append(f'<path d="M{at - 5:.1f} {over - 5:.1f}l10 10m0 -10l-10 10" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="{left + width + 20}" y="{top + 20 * number}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{left + width + 38}" y="{top + 20 * number + 11}">{pack}</text>')
    file.write_text("\n".join([*parts, "</svg>"]) + "\n")


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bytes", nargs="+", type=int, default=list(_BYTES))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    known = json.loads(args.results.read_text()) if args.results and args.results.exists() else {}

    def results(pack, name, make):
        if name not in known.setdefault(pack, {}):
            known[pack][name] = make()
            print(pack, name, json.dumps(known[pack][name]), flush=True)
            if args.results:
                args.results.write_text(json.dumps(known, indent=1))

    for path in args.packs:
        measure(path, args.data, args.bytes, results)
    text = "\n".join(table(known))
    print(text)
    if args.write:
        write_between(args.write, _MARKS, text)
        plot(known, args.write.parent / "frontier.svg")


if __name__ == "__main__":
    main()
