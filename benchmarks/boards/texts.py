"""Board of a fine-tuned language model: our rungs, presets and baselines, judged by LDS and QLD on the run of replay_pack.py.

    python benchmarks/boards/texts.py --run run --pack pack50 --out boards --results boards.json [--queries 16]

`run` is recorded by benchmarks/replay_pack.py, with checkpoints of each epoch and the optimizer's moments beside it, and the pack made of
it as there. All methods are judged on the same queries, evenly spread over the pack's. QLD is the mean rise of a query's loss (nats) when
the run is repeated without its highest 1 % of examples, above the rise without random 1 %. table.py prints the results.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from images import judged, random_sets
from wherefrom import BuildConfig, Client
from wherefrom.evaluation.baselines import content_baselines
from wherefrom.evaluation.packs import read_pack, write_documents_file
from wherefrom.evaluation.replay import match_rows, replay_examples, retrain
from wherefrom.query.metric import Metric
from wherefrom.query.scoring import Scorer, score_matrix
from wherefrom.query_rows import query_rows
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.rerank import fit_rerank

_ITERATIONS = 3
_EKFAC = {"components": ("blocks",), "rank": 128, "projection": "pca", "curvature": "ekfac", "labels": "sampled", "row_dtype": "float16"}


class Board:
    """The run and its pack.

    Args:
        count: number of queries.
    """

    def __init__(self, run, pack, out, results, count):
        self.run, self.pack, self.results = run, read_pack(pack, None), results
        self.scratch = out / f"{self.pack.name}-indexes"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.documents = self.scratch / "train.jsonl"
        write_documents_file(self.pack.train, self.documents)
        self.checkpoints = sorted(str(path.parent) for path in run.with_name(f"{run.name}-checkpoints").glob("*/model.safetensors"))
        self.chosen = np.unique(np.linspace(0, len(self.pack.queries) - 1, count).round().astype(int))
        client = self.index("800", bytes_per_example=800)
        self.train = client.to_examples(self.pack.train)
        self.queries = client.to_examples([self.pack.queries[i] for i in self.chosen])
        self.known = json.loads(results.read_text()) if results.exists() else {}
        self.lines = self.known.setdefault(self.pack.name, {})

    def index(self, label, models=None, **options):
        """An index of the pack's documents."""
        path = self.scratch / label
        if not (path / "manifests").exists():
            models = models or self.checkpoints[-1]
            config = BuildConfig(
                model=models, data=(str(self.documents),), out=str(path), task=self.pack.task, **self.pack.build, **options
            )
            build(config)
        return Client(path)

    def losses_without(self, sets):
        """Losses [sets, queries] of the run repeated without some examples."""
        losses = []
        for rows in sets:
            left = set(map(int, rows))
            model = retrain([example for i, example in enumerate(self.train) if i not in left], str(self.run), 0).eval()
            client = self.index("800", bytes_per_example=800)
            own = np.zeros(len(self.queries))
            with torch.no_grad():
                for positions, batch in client.recorded.task.batches((model,), self.queries, 512):
                    own[positions] = client.recorded.task.loss(model, batch).numpy()
            losses.append(own)
        return np.stack(losses)

    def record(self, method, score, size=None):
        """Judge a method, unless it is known.

        Args:
            score: function that returns scores [examples, queries].
        """
        if method in self.lines:
            return
        start = time.perf_counter()
        scores = score()
        seconds = (time.perf_counter() - start) / len(self.queries)
        if "random" not in self.lines:
            sets = random_sets(len(self.train), len(self.queries))
            self.lines["random"] = {"losses": self.losses_without(sets).mean(axis=0).tolist()}
        losses = self.pack.losses[:, :, self.chosen]
        line = judged(scores, self.pack, losses, self.lines["random"]["losses"], self.losses_without)
        self.lines[method] = line | {"bytes": size, "seconds": seconds}
        print(self.pack.name, method, self.lines[method], flush=True)
        self.results.write_text(json.dumps(self.known, indent=1))

    def record_index(self, method, client, **options):
        """Judge the stored rows of an index."""
        metric = Metric.of(options)
        size = client.index.bytes_per_example
        client.encode_examples(self.queries[:1], metric)  # loads the model
        self.record(method, lambda: score_matrix(client.index, client.encode_examples(self.queries, metric), metric).T, size)

    def recomputed(self, client, metric):
        """Scores [examples, queries] by rows of whole layers."""
        recomputer = client._recomputer
        view, encoder = recomputer.view, recomputer._encoder
        rows, _ = query_rows(view, encoder, metric, self.queries)
        operands = Scorer.of(view, rows, metric).operands
        asked = {o.component.name: o.scaled(view, rows[o.component.name], stored=False) for o in operands}
        scores = np.zeros((len(self.train), len(self.queries)))
        for batch in encoder.batches(self.train, skip_nonfinite=True):
            for name, vectors in asked.items():
                scores[batch.positions] += vectors.inner_products(batch.exact[name].as_float32()).T
        return scores

    def replayed(self):
        """Scores [examples, queries] by an exact replay."""
        replayed = replay_examples(self.run, self.queries)
        pairs = match_rows(self.train, replayed.examples)
        return replayed.scores[:, [number for _, number in pairs]].T


def judge(board):
    """LDS and QLD of every method."""
    board.record_index("index, 800 bytes", board.index("800", bytes_per_example=800))
    board.record_index("index, 2,400 bytes", board.index("2400", bytes_per_example=2400))
    board.record_index("LoGra, rank 16, float32", board.index("logra", rank=16))
    board.record_index("TRAK of one model", board.index("trak", preset="trak"), preset="trak")
    board.record_index("TrackStar", board.index("trackstar", preset="trackstar"), preset="trackstar")
    board.record_index("LESS, 3 checkpoints", board.index("less", tuple(board.checkpoints), preset="less"), preset="less")
    board.record_index("EK-FAC, 128 directions", board.index("ekfac", **_EKFAC))
    for name, scores in content_baselines(board.train, board.queries).items():
        if name in ("bm25", "chars"):
            board.record(f"baseline: {name}", lambda scores=scores: scores)
    fitted = board.index("fitted", bytes_per_example=800)
    if not (Path(fitted.index.path) / "rerank" / "rerank.json").exists():
        fit_rerank(fitted.index.path, examples=len(board.train))
        fitted = board.index("fitted", bytes_per_example=800)
    size = fitted.index.bytes_per_example
    board.record("whole layers, all rows computed again", lambda: board.recomputed(fitted, Metric()), size)
    board.record("replay", board.replayed)
    refined = f"whole layers, refined by {_ITERATIONS} iterations"
    board.record(refined, lambda: board.recomputed(fitted, Metric(refine=_ITERATIONS)), size)


def main():
    """Judge a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--pack", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=Path("boards"))
    parser.add_argument("--results", type=Path, default=Path("boards.json"))
    parser.add_argument("--queries", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    judge(Board(args.run, args.pack, args.out, args.results, args.queries))


if __name__ == "__main__":
    main()
