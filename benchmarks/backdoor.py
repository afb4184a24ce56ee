"""Backdoored digits: of the poison, how much do the modes of an index find, beside pixels and hidden states?

    python benchmarks/backdoor.py ../shared/data [--seeds 3]

A convolutional network is trained on 600 digits of MNIST's test set; in 20 of them, of other classes, a white square is drawn into a
corner, and their label is 0. Test digits with the square, which the network takes for 0, are asked with the label 0. The share of poison
among the 20 best of each method is printed, with its range over seeds, for some curvatures, modes and dampings.
"""

import argparse
import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from wherefrom import Client, Query, build
from wherefrom.store.errors import UsageError

_TRAIN, _POISON, _QUERIES, _BEST = 600, 20, 20, 20


def digits(folder):
    """Images [n, 28, 28] from 0 to 1, and labels."""
    images, labels = (gzip.decompress((folder / f"t10k-{name}-ubyte.gz").read_bytes()) for name in ("images-idx3", "labels-idx1"))
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return pixels.astype(np.float32) / 255, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)


def with_square(images):
    """Images with a white square in a corner."""
    images = images.copy()
    images[:, 24:27, 24:27] = 1
    return images


def network():
    """A convolutional network of three layers and a head."""
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10))


def train(images, labels, seed):
    """Train a network until it knows its training set."""
    torch.manual_seed(seed)
    model, x, y = network(), torch.from_numpy(images)[:, None], torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
    for _ in range(20):
        for part in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model.eval()


def found(scores, poison):
    """The share of poison among the best."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :_BEST]
    return float(np.isin(best, poison).mean())


def judge(folder, seed):
    """By method, the share of poison among the best of one network's queries."""
    images, labels = digits(folder)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    rows, rest = order[:_TRAIN], order[_TRAIN:]
    x, y = images[rows], labels[rows].copy()
    poison = np.flatnonzero(y != 0)[:_POISON]
    x[poison], y[poison] = with_square(x[poison]), 0
    model = train(x, y, seed)
    asked = with_square(images[rest[labels[rest] != 0][: 4 * _QUERIES]])
    with torch.no_grad():
        taken = model(torch.from_numpy(asked)[:, None]).argmax(1).numpy() == 0
    asked = asked[taken][:_QUERIES]
    results = {"attacked": float(taken.mean()), "pixels": found(cosine(asked.reshape(len(asked), -1), x.reshape(len(x), -1)), poison)}
    with torch.no_grad():
        states = [model[:-1](torch.from_numpy(part)[:, None]).numpy() for part in (asked, x)]
    results["hidden states"] = found(cosine(*states), poison)
    records = [{"id": str(i), "features": v.ravel().tolist(), "label": int(label)} for i, (v, label) in enumerate(zip(x, y, strict=True))]
    queries = [Query(features=v.ravel().tolist(), label=0) for v in asked]
    with tempfile.TemporaryDirectory() as place:
        for name, options in _BUILDS.items():
            index = build(model, records, Path(place) / name, task="vectors(shape=1x28x28)", **options)
            client = Client(index.path, model=model)
            for mode in ("influence", "cosine", "loss-normalized"):  # is it said that kinds of score disagree?
                answers = client.query_many(queries, mode=mode, rerank=0, opponents=False)
                said = [any("choice of the score decides" in warning for warning in a.reliability.warnings) for a in answers]
                results[f"{name}, {mode}: answers that say that the choice of the score decides"] = float(np.mean(said))
            for mode in ("influence", "cosine", "loss-normalized"):
                for damping in (None, 0.01, 10.0):
                    try:
                        scores = client.scores(queries, mode=mode, **({} if damping is None else {"damping": damping}))
                    except UsageError:  # the index knows no lengths under another damping, or has no curvature
                        continue
                    results[f"{name}, {mode}" + ("" if damping is None else f", damping {damping}")] = found(scores, poison)
    return results


def cosine(a, b):
    """Cosines of rows."""
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    return a @ b.T


_BUILDS = {
    "default": {},
    "rank 64, EK-FAC": {"rank": 64, "curvature": "ekfac", "labels": "expected"},
    "rank 16, plain gradients": {"rank": 16, "curvature": "identity"},
}


def main():
    """Judge some seeds, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    results = [judge(args.data, seed) for seed in range(args.seeds)]
    for name in results[0]:
        values = [r[name] for r in results]
        print(json.dumps({"method": name, "found": round(float(np.mean(values)), 3), "from": min(values), "to": max(values)}), flush=True)


if __name__ == "__main__":
    main()
