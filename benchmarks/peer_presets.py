"""Scores of the presets beside those that peers' own code makes of the same gradients.

    python benchmarks/peer_presets.py ours --model MODEL --data corpus.jsonl --queries queries.jsonl --out work
    python -m venv peer && peer/bin/pip install torch numpy scipy
    peer/bin/pip install --no-deps bergson==2.5.1 traker==0.3.2 simple_parsing docstring_parser petname
    peer/bin/python benchmarks/peer_presets.py bergson --out work
    peer/bin/python benchmarks/peer_presets.py traker --out work

`ours` takes a small causal language model with the optimizer's moments beside it (`wherefrom.save_moments`), builds an index by each preset
on whole layers, and keeps its scores with the gradients of all examples, by plain autograd. The peers' functions then run on these:

- TrackStar: Bergson's AdafactorNormalizer, compute_lambda and invert_psd_matrix, layer by layer, and unit length over all layers;
- TRAK: traker's BasicScoreComputer, layer by layer, on the gradients of margins.

Random projections are left out, since each package draws its own. LESS has no package; tests/test_presets.py has its equation.
"""

import argparse
import json
from pathlib import Path

import numpy as np

_LAYERS = ("*.attn.c_proj",)
_DAMPING = {"trackstar": 1e-6, "trak": 1e-3}
_WHOLE = 1 << 20
_SHARED = 1000 / 65536


def ours(model, data, queries, out):
    """Build by the presets, and write scores and gradients."""
    import torch
    from wherefrom import Client, Query
    from wherefrom.indexer.moments import MOMENTS_FILE
    from wherefrom.ray_jobs.build import build
    from wherefrom.ray_jobs.config import BuildConfig

    asked = [Query(**json.loads(line)) for line in queries.read_text().splitlines()]
    arrays = {}
    for preset in ("trackstar", "trak"):
        path = out / preset
        options = {"preset": preset, "rank": _WHOLE, "layers": _LAYERS, "damping": _DAMPING[preset], "dtype": "float64"}
        build(BuildConfig(model=str(model), data=(str(data),), out=str(path), **options))
        client = Client(path)
        arrays[preset] = client.scores(asked, preset=preset)
    from safetensors.numpy import load_file

    moments = load_file(model / MOMENTS_FILE)
    (component,) = client.index.manifest.components
    network = client.encoder.model
    modules = [network.get_submodule(name) for name in component.layer_names]
    weights = [module.weight.requires_grad_(True) for module in modules]
    sets = {"corpus": [client.index.example(i) for i in range(len(client.index))], "asked": client.query_examples(asked)}
    for kind, examples in sets.items():
        rows, losses = [], []
        for example in examples:
            batch = client.recorded.task.collate([example], torch.device("cpu"))
            loss = client.recorded.task.loss(network, batch).sum()
            gradients = torch.autograd.grad(loss, weights)
            transposed = [g if isinstance(m, torch.nn.Linear) else g.T for g, m in zip(gradients, modules, strict=True)]
            rows.append(torch.stack(transposed).numpy())
            losses.append(float(loss.detach()) / int(example.loss_mask[1:].sum()))
        arrays |= {kind: np.stack(rows), f"{kind}_losses": np.array(losses)}
    arrays["moments"] = np.stack([moments[f"{name}/second_moment"] for name in component.layer_names])
    np.savez(out / "arrays.npz", **arrays)
    print(f"{len(arrays['corpus']):,} examples, {len(asked)} queries, {len(component.layer_names)} layers")


def bergson(arrays):
    """TrackStar's scores [queries, examples] by Bergson's functions."""
    import torch
    from bergson.gradients import AdafactorNormalizer
    from bergson.hessians.inversion import invert_psd_matrix
    from bergson.utils.math import compute_lambda

    rows, hessians = {}, {}
    moments = torch.from_numpy(arrays["moments"]).double()
    layers = range(len(moments))
    for kind in ("corpus", "asked"):
        gradients = torch.from_numpy(arrays[kind]).double()
        rows[kind] = []
        for layer in layers:
            normalizer = AdafactorNormalizer(moments[layer].mean(1), moments[layer].mean(0))
            rows[kind].append(torch.stack([normalizer.normalize_weight(g.clone()).flatten() for g in gradients[:, layer]]))
        hessians[kind] = {str(layer): rows[kind][layer].T @ rows[kind][layer] / len(gradients) for layer in layers}
    eigen = {kind: {name: torch.linalg.eigh(h) for name, h in own.items()} for kind, own in hessians.items()}
    dim = sum(len(h) for h in hessians["corpus"].values())
    share = compute_lambda(eigen["asked"], eigen["corpus"], min(max(1, round(_SHARED * dim)), len(arrays["asked"])))
    preconditioned = {}
    for kind in rows:
        parts = []
        for layer in layers:
            mixed = share * hessians["asked"][str(layer)] + (1 - share) * hessians["corpus"][str(layer)]
            parts.append(rows[kind][layer] @ invert_psd_matrix(mixed, damping_factor=_DAMPING["trackstar"], power=-0.5))
        preconditioned[kind] = torch.nn.functional.normalize(torch.cat(parts, 1), dim=1)
    return (preconditioned["asked"] @ preconditioned["corpus"].T).numpy()


def traker(arrays):
    """TRAK's scores [queries, examples] by traker's score computer, summed over layers."""
    import torch
    from trak.score_computers import BasicScoreComputer

    errors = 1 - np.exp(-arrays["corpus_losses"])
    total = torch.zeros(len(arrays["corpus"]), len(arrays["asked"]), dtype=torch.float64)
    for layer in range(arrays["corpus"].shape[1]):
        corpus, asked = (torch.from_numpy(arrays[kind][:, layer].reshape(len(arrays[kind]), -1)) for kind in ("corpus", "asked"))
        margins = -corpus / torch.from_numpy(errors)[:, None]
        xtx = BasicScoreComputer(torch.float64, torch.device("cpu")).get_xtx(margins)
        regularized = float(_DAMPING["trak"] * torch.trace(xtx) / len(xtx))
        computer = BasicScoreComputer(torch.float64, torch.device("cpu"), lambda_reg=regularized)
        features = computer.get_x_xtx_inv(margins, xtx)
        factor = torch.linalg.inv((xtx + regularized * torch.eye(len(xtx))).float()).abs().mean()  # which traker divides by
        scores = torch.zeros_like(total)
        computer.get_scores(features, -asked, scores)
        total += scores * factor
    return (total.numpy() * errors[:, None]).T


def compare(name, ours_scores, peer_scores):
    """Print the agreement of two score matrices."""
    from scipy.stats import spearmanr

    ranks = [spearmanr(a, b).statistic for a, b in zip(ours_scores, peer_scores, strict=True)]
    scale = float((ours_scores * peer_scores).sum() / (peer_scores**2).sum())
    error = float(np.abs(ours_scores - scale * peer_scores).max() / np.abs(ours_scores).max())
    print(f"{name}: Spearman, mean over {len(ranks)} queries {np.mean(ranks):.6f}, least {min(ranks):.6f}")
    print(f"largest difference {error:.2g} of the largest score, after one factor of {scale:.4g} for all")


def main():
    """Compute ours, or compare a peer's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["ours", "bergson", "traker"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--out", type=Path, default=Path("work"))
    args = parser.parse_args()
    if args.action == "ours":
        args.out.mkdir(parents=True, exist_ok=True)
        ours(args.model, args.data, args.queries, args.out)
    else:
        arrays = np.load(args.out / "arrays.npz")
        name, score = {"bergson": ("TrackStar, Bergson", bergson), "traker": ("TRAK, traker", traker)}[args.action]
        compare(name, arrays["trackstar" if args.action == "bergson" else "trak"], score(arrays))


if __name__ == "__main__":
    main()
