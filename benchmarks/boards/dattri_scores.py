"""Scores [examples, queries] of dattri's methods on a board of images.py, for its `--scores`.

    pip install --no-deps --target peers dattri==0.3.0
    PYTHONPATH=peers python benchmarks/boards/dattri_scores.py mnist-lr --method trak --data IDX_DIR --out boards --file trak.npy

- explicit: influence by the inverse of the whole Hessian (logistic regression only), with a regularization of 0.01.
- trak: the projected after-kernel of one model, or with --members of the board's ensemble, on 512 random directions each.

Signs are those of Wherefrom: positive for an example that lowers the query's loss.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from dattri.algorithm.influence_function import IFAttributorExplicit
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from images import images
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from wherefrom.evaluation.packs import read_pack

_REGULARIZATION = 0.01


def network(tensors):
    """The board's perceptron; its bias is left out where it is 0."""
    layers = []
    for i in range(0, len(tensors), 2):
        weight, bias = tensors[f"{i}.weight"], tensors[f"{i}.bias"]
        linear = nn.Linear(*weight.shape[::-1], bias=bool(bias.any()))
        layers += [linear, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    model.load_state_dict({name: value for name, value in tensors.items() if name in model.state_dict()})
    return model.eval()


def main():
    """Compute and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("board")
    parser.add_argument("--method", choices=["explicit", "trak"], required=True)
    parser.add_argument("--members", action="store_true")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--file", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pack = read_pack(args.out / args.board, args.data)
    model = network(load_file(pack.model))

    def loss(params, batch):
        inputs, labels = batch
        return nn.functional.cross_entropy(functional_call(model, params, (inputs.reshape(-1, inputs.shape[-1]),)), labels.reshape(-1))

    def margin(params, batch):
        p = torch.exp(-loss(params, batch))
        return torch.log(p) - torch.log1p(-p)

    def correct_probability(params, batch):
        return torch.exp(-loss(params, batch))

    loaders = [DataLoader(TensorDataset(*images(documents)), batch_size=500) for documents in (pack.train, pack.queries)]
    if args.method == "explicit":
        task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
        attributor = IFAttributorExplicit(task=task, regularization=_REGULARIZATION)
        attributor.cache(DataLoader(loaders[0].dataset, batch_size=len(pack.train)))
        scores = attributor.attribute(*loaders)
    else:
        others = sorted((args.out / args.board).glob("member-*.safetensors")) if args.members else []
        checkpoints = [model.state_dict(), *(network(load_file(file)).state_dict() for file in others)]
        task = AttributionTask(loss_func=margin, model=model, checkpoints=checkpoints)
        attributor = TRAKAttributor(task=task, correct_probability_func=correct_probability)
        attributor.cache(loaders[0])
        scores = attributor.attribute(loaders[1])
    np.save(args.file, scores.detach().numpy())
    print(args.file, tuple(scores.shape))


if __name__ == "__main__":
    main()
