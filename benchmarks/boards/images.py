"""Boards of image classifiers: public protocols that two cores can run, with our rungs and our peers' scores, judged by LDS and QLD.

    python benchmarks/boards/images.py make mnist-lr --data IDX_DIR --out boards
    python benchmarks/boards/images.py judge mnist-lr --data IDX_DIR --out boards --results boards.json [--scores NAME=FILE ...]

`make` trains a classifier on 5,000 images, and again on 100 random halves with several seeds; it writes a ground-truth pack
(docs/evaluation.md) with checkpoints of the first model. `judge` builds indexes of it and scores them. `--scores` judges a matrix
[examples, queries] of a peer (dattri_scores.py beside this file makes some).

- mnist-lr: logistic regression without bias, SGD 0.01 for 20 epochs; dattri's protocol, but on images of MNIST's test set.
- mnist-mlp: 784-128-64-10, SGD 0.01 with momentum 0.9 for 50 epochs, likewise.
- fashion: the same perceptron on Fashion-MNIST's test set, SGD 0.03 with momentum 0.9 and weight decay 0.001 for 20 epochs.

LDS is as in `wherefrom evaluate lds`. QLD is the mean rise of a query's loss (nats) when its highest 1 % of examples are left out of
training, above the rise when random 1 % are left out. table.py prints the results.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from wherefrom import BuildConfig, Client
from wherefrom.evaluation.baselines import content_baselines
from wherefrom.evaluation.lds import ceiling, estimate
from wherefrom.evaluation.packs import read_images, read_pack, write_documents_file
from wherefrom.evaluation.retrain import draw_masks
from wherefrom.query.metric import Metric
from wherefrom.query.scoring import score_matrix
from wherefrom.ray_jobs.build import build

_TRAIN = 5000
_QUERIES = 500
_REMOVED = 0.01
_SEGMENTS = 3
_MEMBERS = 10  # of an ensemble
_ITERATIONS = 3
_AT_ONCE = 50  # models trained side by side
_WHOLE = {"rank": 1 << 20, "curvature": "ekfac", "labels": "expected", "row_dtype": "float16"}


@dataclass(frozen=True)
class Protocol:
    """A training."""

    sizes: tuple[int, ...]
    rate: float
    epochs: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch: int = 64
    bias: bool = True
    subsets: int = 100
    seeds: int = 1

    @property
    def steps(self):
        """The number of the optimizer's steps."""
        return self.epochs * -(-_TRAIN // self.batch)


PROTOCOLS = {
    "mnist-lr": Protocol((784, 10), 0.01, 20, bias=False),
    "mnist-mlp": Protocol((784, 128, 64, 10), 0.01, 50, momentum=0.9),
    "fashion": Protocol((784, 128, 64, 10), 0.03, 20, momentum=0.9, weight_decay=0.001, seeds=2),
}


class Models:
    """Several perceptrons that are trained side by side, each on its own examples in its own order."""

    def __init__(self, protocol, seeds):
        self.protocol, self.count = protocol, len(seeds)
        weights, biases = [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            own = []
            for inputs, outputs in zip(protocol.sizes, protocol.sizes[1:], strict=False):
                bound = inputs**-0.5  # as torch.nn.Linear
                own.append([(torch.rand(shape, generator=generator) * 2 - 1) * bound for shape in ((outputs, inputs), (outputs,))])
            weights.append([w for w, _ in own])
            biases.append([b * protocol.bias for _, b in own])
        self.weights = [torch.stack(ws).requires_grad_() for ws in zip(*weights, strict=True)]
        self.biases = [torch.stack(bs).requires_grad_(protocol.bias) for bs in zip(*biases, strict=True)]

    def logits(self, x):
        """[models, examples, classes] of x [models, examples, inputs]."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
            x = x if i == len(self.weights) - 1 else x.relu()
        return x

    def train(self, pixels, labels, members, orders, each_epoch=lambda epoch: None):
        """Train on members [models, examples], in an order that a seed for each model draws."""
        protocol = self.protocol
        parameters = [*self.weights, *(self.biases if protocol.bias else [])]
        optimizer = torch.optim.SGD(parameters, lr=protocol.rate, momentum=protocol.momentum, weight_decay=protocol.weight_decay)
        generators = [np.random.default_rng(seed) for seed in orders]
        for epoch in range(protocol.epochs):
            order = torch.from_numpy(np.stack([g.permutation(m) for g, m in zip(generators, members, strict=True)]))
            for first in range(0, order.shape[1], protocol.batch):
                rows = order[:, first : first + protocol.batch]
                logits = self.logits(pixels[rows])
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), reduction="sum") / rows.shape[1]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            each_epoch(epoch + 1)
        return self

    @torch.no_grad()
    def losses(self, pixels, labels):
        """Cross-entropies [models, examples] in nats."""
        logits = self.logits(pixels.expand(self.count, *pixels.shape))
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels.expand(self.count, -1), reduction="none").numpy()

    def save(self, number, path):
        """Write one of the models as `torch.nn.Sequential` names it."""
        tensors = {}
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            tensors |= {f"{2 * i}.weight": weight.detach()[number].clone(), f"{2 * i}.bias": bias.detach()[number].clone()}
        save_file(tensors, path)


def images(documents):
    """Pixels and labels of a pack's documents."""
    return torch.from_numpy(np.stack([d.features for d in documents])), torch.tensor([d.label for d in documents])


def losses_without(protocol, train, queries, members, seeds):
    """Losses [models, queries] after training on members [models, examples]; a seed sets initial weights and order."""
    parts = []
    for first in range(0, len(members), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        models = Models(protocol, seeds[part])
        parts.append(models.train(*train, members[part], [s + 1 for s in seeds[part]]).losses(*queries))
        print(f"{min(first + _AT_ONCE, len(members)):,} of {len(members):,} trainings", flush=True)
    return np.concatenate(parts)


def make(name, data, out):
    """Write the pack of a board."""
    protocol, folder = PROTOCOLS[name], out / name
    folder.mkdir(parents=True, exist_ok=True)
    pixels, _ = read_images(folder, data)
    rows = np.random.default_rng(0).permutation(len(pixels))[: _TRAIN + _QUERIES]
    truth = {"train_rows": np.sort(rows[:_TRAIN]), "test_rows": np.sort(rows[_TRAIN:])}
    masks = draw_masks(_TRAIN, protocol.subsets, 0.5, 0)
    placeholder = np.random.default_rng(1).random((2, 1, _QUERIES)).astype(np.float32)
    meta = {"arch": list(protocol.sizes), "protocol": repr(protocol)}
    (folder / "meta.json").write_text(json.dumps(meta))
    model = Models(protocol, [0])
    model.save(0, folder / "model-0.safetensors")
    np.savez(folder / "ground_truth.npz", masks=np.packbits(masks[:2], axis=1), losses=placeholder, **truth)
    pack = read_pack(folder, data)
    train, queries = images(pack.train), images(pack.queries)
    ends = [round(protocol.epochs * (i + 1) / (2 * _SEGMENTS)) for i in range(2 * _SEGMENTS)]

    def keep(epoch):
        if epoch in ends:
            model.save(0, folder / f"model-0-epoch{epoch}.safetensors")

    model.train(*train, np.arange(_TRAIN)[None], [1], keep)
    model.save(0, folder / "model-0.safetensors")
    members = np.stack([np.flatnonzero(mask) for mask in masks for _ in range(protocol.seeds)])
    seeds = [2 + 2 * i for i in range(len(members))]
    losses = losses_without(protocol, train, queries, members, seeds).reshape(len(masks), protocol.seeds, -1)
    full = model.losses(*queries)[0]
    np.savez(folder / "ground_truth.npz", masks=np.packbits(masks, axis=1), losses=losses, full_losses=full, **truth)
    accuracy = float((model.logits(queries[0][None])[0].argmax(1) == queries[1]).float().mean())
    (folder / "meta.json").write_text(json.dumps({**meta, "accuracy": accuracy}))
    print(f"{name}: accuracy {accuracy:.3f}, noise ceiling {ceiling(losses)}")


def members(protocol, train, folder):
    """Files of models of an ensemble: the pack's, and others from other seeds, which are trained unless they are there."""
    files = [folder / f"member-{number}.safetensors" for number in range(1, _MEMBERS)]
    if not all(file.exists() for file in files):
        seeds = [10_000 + 2 * number for number in range(1, _MEMBERS)]
        models = Models(protocol, seeds).train(*train, np.tile(np.arange(len(train[1])), (len(seeds), 1)), [seed + 1 for seed in seeds])
        for number, file in enumerate(files):
            models.save(number, file)
    return (str(folder / "model-0.safetensors"), *map(str, files))


def our_scores(name, pack, folder, scratch):
    """Return, by the name of each of our rungs, a function: scores [examples, queries], bytes an example and seconds a query."""
    protocol = PROTOCOLS[name]
    documents = scratch / "train.jsonl"
    write_documents_file(pack.train, documents)
    epochs = sorted(int(p.stem.removeprefix("model-0-epoch")) for p in folder.glob("model-0-epoch*.safetensors"))
    checkpoints = [str(folder / f"model-0-epoch{epoch}.safetensors") for epoch in epochs]
    training = f"{protocol.rate / (1 - protocol.momentum)},{protocol.steps}"

    def index(label, models, **options):
        path = scratch / label
        if not (path / "manifests").exists():
            build(BuildConfig(task="mlp", data=(str(documents),), out=str(path), model=models, **options))
        return Client(path)

    def scored(client, metric):
        examples = client.to_examples(pack.queries)
        start = time.perf_counter()
        rows = client.encode_examples(examples, metric)
        scores = score_matrix(client.index, rows, metric).T
        return scores, client.index.bytes_per_example, (time.perf_counter() - start) / len(examples)

    last = str(pack.model)
    halves = tuple(checkpoints[1::2])

    def whole():
        return index("whole", last, damping=1.0, **_WHOLE)

    def several():
        return index("several", halves, damping=1.0, **_WHOLE)

    def ensemble():
        return index("ensemble", members(protocol, images(pack.train), folder), preset="trak")

    refined = f"refined by {_ITERATIONS} iterations"
    rungs = {
        "index, 800 bytes": lambda: scored(index("800", last, bytes_per_example=800), Metric()),
        f"index, 800 bytes, {refined}": lambda: scored(index("800", last, bytes_per_example=800), Metric(refine=_ITERATIONS)),
        "LoGra, rank 16, float32": lambda: scored(index("logra", last, rank=16), Metric()),
        "TRAK of one model": lambda: scored(index("trak", last, preset="trak"), Metric(preset="trak")),
        f"TRAK of {_MEMBERS} models": lambda: scored(ensemble(), Metric(preset="trak")),
        "EK-FAC, whole layers": lambda: scored(whole(), Metric()),
        "EK-FAC, damping 0.1": lambda: scored(whole(), Metric(damping=0.1)),
        "SOURCE's filter, last weights": lambda: scored(whole(), Metric(training=training)),
        f"EK-FAC, {refined}": lambda: scored(whole(), Metric(refine=_ITERATIONS)),
        f"EK-FAC, {refined}, damping of the training": lambda: scored(whole(), Metric(refine=_ITERATIONS, training=training)),
        "gradient dot product": lambda: scored(whole(), Metric(curvature=False)),
        f"EK-FAC, {_SEGMENTS} checkpoints": lambda: scored(several(), Metric()),
        f"SOURCE, {_SEGMENTS} segments": lambda: scored(several(), Metric(training=training)),
        f"TracIn, {_SEGMENTS} checkpoints": lambda: scored(several(), Metric(curvature=False, weights=_even(several()))),
    }
    if len(checkpoints) > _SEGMENTS:
        every = f"SOURCE, {len(checkpoints)} segments"
        rungs[every] = lambda: scored(index("every", tuple(checkpoints), damping=1.0, **_WHOLE), Metric(training=training))
    return rungs


def _even(client):
    """Factors that give all components the same weight."""
    return {c.name: 1 / c.weight for c in client.index.manifest.components}


def explicit(pack, dampings=(1e-3, 1e-2)):
    """Influence by the inverse of the whole Hessian of a logistic regression, plus damping: [examples, queries] by damping."""
    from safetensors.torch import load_file

    weight = load_file(pack.model)["0.weight"].double()
    (x, y), (xq, yq) = images(pack.train), images(pack.queries)
    x, xq = x.double(), xq.double()

    def residual(inputs, labels):
        p = torch.softmax(inputs @ weight.T, 1)
        return p, p - torch.nn.functional.one_hot(labels, 10)

    p, d = residual(x, y)
    _, dq = residual(xq, yq)
    classes, inputs = weight.shape
    hessian = torch.zeros(classes, inputs, classes, inputs, dtype=torch.float64)
    for a in range(classes):
        for b in range(a, classes):
            block = x.T @ ((p[:, a] * (float(a == b) - p[:, b]))[:, None] * x) / len(x)
            hessian[a, :, b, :] = block
            hessian[b, :, a, :] = block
    hessian = hessian.reshape(classes * inputs, -1)
    gradients = torch.einsum("qc,qi->qci", dq, xq).flatten(1)
    result = {}
    for damping in dampings:
        factor = torch.linalg.cholesky(hessian + damping * torch.eye(len(hessian), dtype=torch.float64))
        solved = torch.cholesky_solve(gradients.T, factor).T.reshape(-1, classes, inputs)
        result[damping] = torch.einsum("nc,qci,ni->nq", d, solved, x).numpy()
    return result


def random_sets(examples, count):
    """Random 1 % of the examples, a set for each query."""
    generator = np.random.default_rng(2)
    return [generator.choice(examples, round(_REMOVED * examples), replace=False) for _ in range(count)]


def judged(scores, pack, losses, chance, losses_without):
    """A line of a board: LDS and QLD of scores [examples, queries].

    Args:
        losses: of the retrained models, for the LDS.
        chance: losses of the first queries without random examples; QLD is over these.
        losses_without: function from sets of examples to losses [sets, queries].
    """
    e = estimate(scores, pack.masks, losses)
    best = np.argsort(-scores[:, : len(chance)], axis=0)[: round(_REMOVED * len(scores))].T
    rises = np.diagonal(losses_without(best)) - np.array(chance)
    spread = float(rises.std(ddof=1) / len(rises) ** 0.5)
    return {"lds": e.value, "low": e.low, "high": e.high, "qld": float(rises.mean()), "qld_error": spread}


def judge(name, data, out, scratch, peers, results, queries):
    """LDS and QLD of every method."""
    folder, protocol = out / name, PROTOCOLS[name]
    pack = read_pack(folder, data)
    known = json.loads(results.read_text()) if results.exists() else {}
    board = known.setdefault(name, {})
    scratch.mkdir(parents=True, exist_ok=True)
    train, asked = images(pack.train), images(pack.queries[:queries])

    def without(sets):
        kept = np.stack([np.setdiff1d(np.arange(len(pack.train)), rows) for rows in sets])
        return losses_without(protocol, train, asked, kept, [0] * queries)

    if "random" not in board:
        board["random"] = {"losses": without(random_sets(len(pack.train), queries)).mean(axis=0).tolist()}
        results.write_text(json.dumps(known, indent=1))

    def record(method, scores, size=None, seconds=None):
        if method in board:
            return
        board[method] = judged(scores, pack, pack.losses, board["random"]["losses"], without) | {"bytes": size, "seconds": seconds}
        print(name, method, board[method], flush=True)
        results.write_text(json.dumps(known, indent=1))

    for method, compute in our_scores(name, pack, folder, scratch).items():
        if method not in board:
            record(method, *compute())
    examples = [Client(scratch / "800").to_examples(documents) for documents in (pack.train, pack.queries)]
    for method, scores in content_baselines(*examples).items():
        if method in ("pixels", "random"):
            record(f"baseline: {method}" if method == "pixels" else "random numbers", scores)
    if len(protocol.sizes) == 2:
        for damping, scores in explicit(pack).items():
            record(f"inverse of the whole Hessian, damping {damping:g}", scores)
    for peer, file in peers:
        record(peer, np.load(file).astype(np.float64))


def main():
    """Make or judge a board, or write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["make", "judge"])
    parser.add_argument("board", choices=list(PROTOCOLS))
    parser.add_argument("--data", type=Path, help="directory of the IDX files")
    parser.add_argument("--out", type=Path, default=Path("boards"))
    parser.add_argument("--results", type=Path, default=Path("boards.json"))
    parser.add_argument("--queries", type=int, default=100, help="for QLD")
    parser.add_argument("--scores", nargs="*", default=[], metavar="NAME=FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.action == "make":
        make(args.board, args.data, args.out)
    else:
        peers = [text.split("=", 1) for text in args.scores]
        judge(args.board, args.data, args.out, args.out / f"{args.board}-indexes", peers, args.results, args.queries)


if __name__ == "__main__":
    main()
