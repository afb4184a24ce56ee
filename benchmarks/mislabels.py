"""Wrong labels: AUC of label contrast, self-influence and the loss, on MNIST digits of which a tenth have a random other label.

python benchmarks/mislabels.py --shared ../shared
"""

import argparse
import gzip
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from wherefrom import BuildConfig, Index
from wherefrom.query.baselines import row_norms
from wherefrom.query.outliers import label_contrast
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.progress import Silent
from wherefrom.store.files import write_tensors


def main() -> None:
    """Train a perceptron for a few and for many epochs, index it, and print the AUC of each measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=5000)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    content = {
        name: gzip.decompress((arguments.shared / f"data/t10k-{name}-ubyte.gz").read_bytes()) for name in ("images-idx3", "labels-idx1")
    }
    pixels = np.frombuffer(content["images-idx3"][16:], np.uint8).reshape(-1, 784)[: arguments.examples]
    features = ((pixels / 255 - 0.1307) / 0.3081).astype(np.float32)
    truth = np.frombuffer(content["labels-idx1"][8:], np.uint8)[: arguments.examples].astype(np.int64)
    generator = np.random.default_rng(0)
    wrong = generator.random(len(truth)) < 0.1
    labels = np.where(wrong, (truth + generator.integers(1, 10, len(truth))) % 10, truth)
    for epochs in (3, 15):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)]
        network = torch.nn.Sequential(*layers)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        inputs, targets = torch.from_numpy(features), torch.from_numpy(labels)
        for _ in range(epochs):
            for batch in torch.randperm(len(inputs)).split(64):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(network(inputs[batch]), targets[batch]).backward()
                optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            write_tensors(place / "m.safetensors", {name: value.detach().numpy() for name, value in network.state_dict().items()})
            lines = ({"id": str(i), "features": f.tolist(), "label": int(y)} for i, (f, y) in enumerate(zip(features, labels, strict=True)))
            (place / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            build(BuildConfig(model=str(place / "m.safetensors"), data=(str(place / "data.jsonl"),), out=str(place / "i"), task="mlp"))
            index = Index(place / "i")
            measures = {
                "label contrast": label_contrast(index, np.arange(len(index)), Silent()),
                "self-influence": row_norms(index),
                "loss": np.concatenate([index.losses(shard) for shard in index.shards]),
            }
        print(
            f"{epochs} epochs: " + ", ".join(f"{name} {roc_auc_score(wrong, values):.3f}" for name, values in measures.items()), flush=True
        )


if __name__ == "__main__":
    main()
