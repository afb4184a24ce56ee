"""Attribution of a small diffusion model: how well do scores predict retraining, by method?

    python benchmarks/diffusion.py FOLDER [--subsets 24]

FOLDER has Fashion-MNIST's train-images-idx3-ubyte.gz (Debian's dataset-fashion-mnist). A UNet of diffusers is trained on 200 pictures of
16 x 16 from fixed first weights, and again on random halves, twice each with other orders and noise. Queries are pictures that the model
drew. The LDS (rank correlation of the sums of scores over a half with the queries' mean losses after training on it, averaged over queries)
is printed with its 95 % interval by bootstrap over queries: of rows in 800 bytes, of EK-FAC of all layers without projection, with noise
drawn around the model's prediction (Mlodozeniec et al., arXiv 2410.13850), of TRAK, of D-TRAK (Zheng et al., arXiv 2311.00500) and of
pixels' cosines. Dampings are chosen on the even queries and judged on the odd ones.
"""

import argparse
import copy
import gzip
import json
import multiprocessing
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from kinds import interval, lds
from PIL import Image
from scipy.stats import spearmanr
from wherefrom import Client, Query, build
from wherefrom.indexer.diffusion import predict
from wherefrom.indexer.tasks import find_task
from wherefrom.store.corpus import Document
from wherefrom.store.errors import UsageError

_TRAIN, _QUERIES, _SIDE, _STEPS = 200, 32, 16, 100
_EPOCHS, _BATCH, _RATE = 100, 32, 2e-3
_TASK = f"diffusion(shape=1x{_SIDE}x{_SIDE}, timesteps={_STEPS}, schedule=cosine, draws=16, query_draws=64"
_DAMPINGS = (None, 1e-4, 1e-3, 1e-2, 1.0, 10.0)


def pictures(folder):
    """Pictures of 16 x 16 from -1 to 1, [n, 1, 16, 16]."""
    content = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    pixels = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)[:_TRAIN]
    small = [np.asarray(Image.fromarray(picture).resize((_SIDE, _SIDE))) for picture in pixels]
    return torch.from_numpy(np.stack(small)).float()[:, None] / 127.5 - 1


def network():
    """A UNet of two levels, with attention on the lower one."""
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8)
    return UNet2DModel(sample_size=_SIDE, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, **blocks)


def train(start, x, signal, numbers, seed=0):
    """A denoiser trained on pictures, whose timesteps and noise in an epoch are the same in every training, whatever else is trained on.

    Args:
        numbers: of the pictures.
    """
    model = copy.deepcopy(start).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), _RATE)
    steps = _EPOCHS * -(-len(numbers) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(_EPOCHS):
        drawn = torch.Generator().manual_seed(1000 * seed + epoch)
        times = torch.randint(0, _STEPS, (_TRAIN,), generator=drawn)
        noises = torch.randn(x.shape, generator=drawn)
        for part in torch.randperm(len(numbers), generator=generator).split(_BATCH):
            rows = numbers[part]
            t, noise = times[rows], noises[rows]
            share = signal[t].view(-1, 1, 1, 1)
            optimizer.zero_grad()
            (predict(model, share.sqrt() * x[rows] + (1 - share).sqrt() * noise, t) - noise).square().mean().backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def draw(model, signal, count):
    """Pictures that a model draws (Ho et al., algorithm 2)."""
    generator = torch.Generator().manual_seed(1)
    alphas = signal / torch.cat([torch.ones(1), signal[:-1]])
    x = torch.randn((count, 1, _SIDE, _SIDE), generator=generator)
    for t in range(_STEPS - 1, -1, -1):
        predicted = predict(model, x, torch.full((count,), t))
        x = (x - (1 - alphas[t]) / (1 - signal[t]).sqrt() * predicted) / alphas[t].sqrt()
        if t:
            x = x + (1 - alphas[t]).sqrt() * torch.randn(x.shape, generator=generator)
    return x.clamp(-1, 1)


@torch.no_grad()
def losses(task, model, records):
    """Each query's loss."""
    documents = [Document(id="x", source="s", where="x", features=np.array(r["features"], np.float32)) for r in records]
    examples = list(task.converter(None).documents(documents))
    return torch.cat(
        [task.measurement(model, task.collate(examples[i : i + 4], torch.device("cpu"))) for i in range(0, len(examples), 4)]
    ).numpy()


def retrain(job):
    """Queries' losses after a training on a half."""
    torch.set_num_threads(1)
    start, x, signal, half, seed, asked = job
    return losses(find_task(f"{_TASK})"), train(start, x, signal, half, seed), asked)


def lds_of_seeds(by_seed):
    """The rank correlation, over subsets, of the losses of two seeds: mean over queries, with its interval."""
    return interval(np.array([spearmanr(*columns).statistic for columns in by_seed[:, :2].transpose(2, 1, 0)]))


def main():
    """Retrain, score, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--subsets", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    task = find_task(f"{_TASK})")
    signal = torch.from_numpy(task.signal).float()
    x, start = pictures(args.folder), network()
    model = train(start, x, signal, torch.arange(_TRAIN))
    drawn = draw(model, signal, _QUERIES)
    records, asked = ([{"features": v.flatten().tolist()} for v in part] for part in (x, drawn))
    masks = np.random.default_rng(1).permuted(np.tile(np.arange(_TRAIN) < _TRAIN // 2, (args.subsets, 1)), axis=1)
    halves = [torch.from_numpy(np.flatnonzero(mask)) for mask in masks]
    jobs = [(start, x, signal, half, seed, asked) for half in halves for seed in range(args.seeds)]
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:
        by_seed = np.stack(pool.map(retrain, jobs, chunksize=1)).reshape(args.subsets, args.seeds, len(asked))
    truth = by_seed.mean(axis=1)
    agreement = lds_of_seeds(by_seed) if args.seeds > 1 else None
    about = {"parameters": sum(p.numel() for p in model.parameters()), "one_seed_with_another": agreement}
    print(json.dumps(about), flush=True)
    even, odd = np.arange(0, _QUERIES, 2), np.arange(1, _QUERIES, 2)
    flat = [part.flatten(1).numpy() for part in (drawn, x)]
    flat = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in flat]
    print(json.dumps({"method": "pixels", "lds": interval(lds(flat[0] @ flat[1].T, truth, masks)[odd])}), flush=True)
    queries = [Query(features=r["features"]) for r in asked]
    methods = {
        "800 bytes": (f"{_TASK})", {"labels": "sampled"}),
        "2,400 bytes": (f"{_TASK})", {"labels": "sampled", "bytes_per_example": 2400}),
        "EK-FAC, no projection": (f"{_TASK})", {"rank": 4096, "curvature": "ekfac", "labels": "sampled"}),
        "EK-FAC, no projection, the data's noise": (f"{_TASK})", {"rank": 4096, "curvature": "ekfac", "labels": "data"}),
        "TRAK": (f"{_TASK})", {"rank": 32, "curvature": "fisher"}),
        "D-TRAK": (f"{_TASK}, objective=square)", {"rank": 32, "curvature": "fisher"}),
    }
    with tempfile.TemporaryDirectory() as place:
        for name, (task_name, options) in methods.items():
            out = Path(place) / "index"
            build(model, records, out, task=task_name, **options)
            client = Client(out, model=model)
            judged = {}
            for damping in _DAMPINGS:
                try:
                    scores = client.scores(queries, **({} if damping is None else {"damping": damping}))
                except UsageError:
                    continue
                judged[damping] = lds(scores, truth, masks)
            best = max(judged, key=lambda damping: judged[damping][even].mean())
            by_damping = {str(damping): round(float(values.mean()), 3) for damping, values in judged.items()}
            result = {"method": name, "lds": interval(judged[best][odd]), "damping": best, "default": interval(judged[None][odd])}
            print(json.dumps({**result, "by_damping": by_damping}), flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
