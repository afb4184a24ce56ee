"""Would refined queries be better with head and embeddings in the equation? LDS by what is refined, on a small language model.

    python benchmarks/refine_joint.py PACK --index INDEX [--queries 8] [--iterations 0 1 3] [--damping 1 10] [--results FILE]

INDEX has whole layers (`wherefrom fit`) and the components head, embeddings and blocks, such as those that benchmarks/refine.py keeps.
Conjugate gradients solve (G + a) v = g with exact Gauss-Newton products over the whole corpus, in the weights of the head, of the blocks'
layers, or of all of them together with the terms between; a head and embeddings that are one weight are one. The preconditioner is that of
the index: EK-FAC of the blocks, the Kronecker form of the head. Damping is relative to the mean eigenvalue of each layer's weights.
Scores are products of v with the whole gradients of all examples, one example at a time.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from wherefrom.client import Client
from wherefrom.evaluation.lds import estimate
from wherefrom.evaluation.packs import read_pack
from wherefrom.indexer.gauss_newton import GaussNewton
from wherefrom.indexer.models import is_transposed
from wherefrom.store.vectors import DenseVectors


class Weights:
    """The weights of an equation: those of the blocks' layers, of the head, or of both.

    Args:
        kinds: "blocks", "head".
    """

    def __init__(self, client, kinds):
        recomputer = client._recomputer
        view, self.encoder = recomputer.view, recomputer._encoder
        components = {component.role: component for component in view.manifest.components}
        self.parts = {}
        layers = []
        offset = 0
        if "blocks" in kinds:
            part = self.encoder.component_encoders[components["blocks"].name]
            (plain, _) = part.plain_component()
            layers += plain.layers
            offset = plain.dim
            means = [view.arrays[f"{components['blocks'].name}/{layer.name}/eigenvalues"].mean() for layer in plain.layers]
            self.parts["blocks"] = slice(0, offset), part, np.array(means)
        if "head" in kinds:
            part = self.encoder.component_encoders[components["head"].name]
            vocabulary, eigenvalues = part.vocabulary.double(), part.eigenvalues.double()
            spectrum = vocabulary[:, None] * eigenvalues
            layers.append(part.layer.model_copy(update={"offset": offset}))
            self.parts["head"] = slice(offset, offset + spectrum.numel()), (part.basis.double(), spectrum), spectrum.mean()
        self.layers = layers
        self.size = layers[-1].offset + layers[-1].outputs * layers[-1].inputs

    def damping(self, relative):
        """What is added, for each weight."""
        values = torch.empty(self.size, dtype=torch.float64)
        for kind, (part, of, means) in self.parts.items():
            values[part] = of.by_coordinate(relative * means) if kind == "blocks" else float(relative * means)
        return values

    def preconditioned(self, vectors, relative):
        """Vectors times the index's inverse."""
        result = torch.empty_like(vectors)
        for kind, (part, of, means) in self.parts.items():
            own = vectors[:, part]
            if kind == "blocks":
                result[:, part] = torch.from_numpy(of.solved(DenseVectors(own.numpy()), relative * means).values)
            else:
                basis, spectrum = of
                rotated = own.unflatten(1, spectrum.shape) @ basis
                result[:, part] = ((rotated / (spectrum + float(relative * means))) @ basis.T).flatten(1)
        return result

    def gradients(self, examples, measured=False):
        """Yield each example's whole gradient."""
        task, model = self.encoder.task, self.encoder.model
        modules = [model.get_submodule(layer.name) for layer in self.layers]
        weights = [module.weight.requires_grad_(True) for module in modules]
        for example in examples:
            batch = task.collate([example], torch.device("cpu"))
            loss = (task.measurement if measured else task.loss)(model, batch).sum()
            found = torch.autograd.grad(loss, weights)
            yield torch.cat([(g.T if is_transposed(m) else g).flatten() for g, m in zip(found, modules, strict=True)]).double()
        for weight in weights:
            weight.requires_grad_(False)


def solve(weights, matrix, g, relative, most):
    """Yield the number of iterations, the solution and what is left of the equation, for each number of iterations up to the most."""
    damping = weights.damping(relative)
    v = weights.preconditioned(g, relative)
    residual = g - matrix.product(v) - damping * v
    z = direction = weights.preconditioned(residual, relative)
    size = (residual * z).sum(1, keepdim=True)
    for number in range(most + 1):
        yield number, v, float((residual.norm(dim=1) / g.norm(dim=1)).mean())
        if number == most:
            return
        image = matrix.product(direction) + damping * direction
        step = size / (direction * image).sum(1, keepdim=True)
        v = v + step * direction
        residual = residual - step * image
        z = weights.preconditioned(residual, relative)
        before, size = size, (residual * z).sum(1, keepdim=True)
        direction = z + size / before * direction


def main():
    """Solve, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--iterations", nargs="+", type=int, default=[0, 1, 3])
    parser.add_argument("--damping", nargs="+", type=float, default=[1.0, 10.0])
    parser.add_argument("--weights", nargs="+", default=["head", "blocks", "head,blocks"])
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pack, client = read_pack(args.pack), Client(args.index)
    chosen = np.unique(np.linspace(0, len(pack.queries) - 1, args.queries).round().astype(int))
    queries = client.to_examples([pack.queries[i] for i in chosen])
    corpus = [client.index.example(row) for row in range(len(client.index))]
    known = json.loads(args.results.read_text()) if args.results and args.results.exists() else {}
    for kinds in args.weights:
        weights = Weights(client, kinds.split(","))
        matrix = GaussNewton(weights.encoder.task, weights.encoder.model, weights.layers, corpus)
        asked = torch.stack(list(weights.gradients(queries, measured=True)))
        for relative in args.damping:
            label = f"{kinds}, damping {relative:g}"
            if label in known:
                continue
            known[label] = {}
            kept = [found for found in solve(weights, matrix, asked, relative, max(args.iterations)) if found[0] in args.iterations]
            solutions = torch.cat([v for _, v, _ in kept])
            products = torch.stack([solutions @ gradient for gradient in weights.gradients(corpus)]).numpy()
            for (number, _, left), scores in zip(kept, np.split(products, len(kept), axis=1), strict=True):
                e = estimate(scores, pack.masks, pack.losses[:, :, chosen])
                known[label][str(number)] = [e.value, e.low, e.high, left]
                print(f"{label}, {number} iterations: LDS {e.value:.3f} ({e.low:.3f} to {e.high:.3f}), left {left:.2f}", flush=True)
            if args.results:
                args.results.write_text(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
