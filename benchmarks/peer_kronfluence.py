"""Kronfluence's EK-FAC scores on an image pack, as a matrix that `wherefrom evaluate lds --scores` judges.

    python -m venv peer && peer/bin/pip install torch safetensors accelerate einops einconv opt_einsum tqdm datasets
    peer/bin/pip install --no-deps kronfluence==1.0.1
    peer/bin/python benchmarks/peer_kronfluence.py --pack packs/mnist-a --data data --out kronfluence.npy
    wherefrom evaluate lds packs/mnist-a --data data --scores kronfluence.npy

Runs in an environment of its own, without Wherefrom: it reads the pack's files itself. No projection, labels sampled from the model
(Kronfluence's defaults), damping 0.1 of the mean eigenvalue (its heuristic); the measurement is the query's cross-entropy. With
`--weights-only` biases are constants, and with `--data-labels` the factors are those of the data's labels, so that nothing is drawn at
random: scores of `wherefrom fit` must then be the same (benchmarks/whole_layers.py compares them).
"""

import argparse
import gzip
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from safetensors.torch import load_file
from torch.utils.data import TensorDataset


class Constant(torch.nn.Module):
    """Adds a bias that is not a parameter."""

    def __init__(self, bias):
        super().__init__()
        self.register_buffer("bias", bias)

    def forward(self, x):
        """The input, plus the bias."""
        return x + self.bias


class Classification(Task):
    """Cross-entropy, in training and of a query."""

    def compute_train_loss(self, batch, model, sample=False):
        """The batch's summed loss, with labels of the data or drawn from the model."""
        logits = model(batch[0])
        if sample:
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(-1), 1).flatten()
            return F.cross_entropy(logits, labels, reduction="sum")
        return F.cross_entropy(logits, batch[1], reduction="sum")

    def compute_measurement(self, batch, model):
        """The queries' summed loss."""
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def images(data, rows):
    """Scaled pixels and labels of some of MNIST's test images."""
    pixels = np.frombuffer(gzip.decompress((data / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16).reshape(-1, 784)[rows]
    labels = np.frombuffer(gzip.decompress((data / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)[rows]
    return TensorDataset(torch.tensor((pixels / 255 - 0.1307) / 0.3081, dtype=torch.float32), torch.tensor(labels.astype(np.int64)))


def main():
    """Fit, score, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights-only", action="store_true")
    parser.add_argument("--data-labels", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    truth = np.load(args.pack / "ground_truth.npz")
    train, queries = images(args.data, truth["train_rows"]), images(args.data, truth["test_rows"])
    weights = load_file(args.pack / "model-0.safetensors")
    layers = []
    for i in range(0, len(weights), 2):
        outputs, inputs = weights[f"{i}.weight"].shape
        linear = torch.nn.Linear(inputs, outputs, bias=not args.weights_only)
        linear.load_state_dict({name: weights[f"{i}.{name}"] for name in linear.state_dict()})
        layers += [linear, *([Constant(weights[f"{i}.bias"])] if args.weights_only else []), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    task = Classification()
    with tempfile.TemporaryDirectory() as scratch:
        analyzer = Analyzer("pack", prepare_model(model, task), task, cpu=True, output_dir=scratch, disable_tqdm=True)
        arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=args.data_labels)
        analyzer.fit_all_factors("ekfac", train, per_device_batch_size=256, factor_args=arguments)
        batches = {"per_device_query_batch_size": 100, "per_device_train_batch_size": 256}
        heuristic = ScoreArguments(damping_factor=None)  # 0.1 of the mean eigenvalue; the default is 1e-8
        analyzer.compute_pairwise_scores("scores", "ekfac", queries, train, score_args=heuristic, **batches)
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    np.save(args.out, scores.T.float().numpy())


if __name__ == "__main__":
    main()
