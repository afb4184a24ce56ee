"""Building rows beside plain training: tokens per CPU second of both, interleaved in one process with one thread.

    python benchmarks/build_speed.py --model MODEL_DIR --data corpus.jsonl

Plain: forward and backward with gradients of all weights. Wherefrom: the capture, projection, whitening and writing of a shard, as a build
does it. Both see the same batches in turn; each pair gives a ratio, and the table shows the median with the smallest and the largest.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from wherefrom import BuildConfig
from wherefrom.indexer.encoder import Encoder
from wherefrom.indexer.examples import TextConverter
from wherefrom.indexer.fit import Fit, with_known_sample
from wherefrom.indexer.models import ModelSource, configure_memory, load_tokenizer
from wherefrom.indexer.tasks import CausalLM
from wherefrom.ray_jobs.schema import select_components
from wherefrom.ray_jobs.worker import Worker, encode_rows
from wherefrom.store.corpus import read_corpus
from wherefrom.store.documents import Example, write_documents
from wherefrom.store.shard import documents_path, write_shard

_SHARD = "00000000-0000-0000-0000-000000000001"
_CONFIGURATIONS = {
    "rank 16": {"rank": 16},
    "rank 64": {"rank": 64},
    "head": {"components": ("head",)},
    "head and 1-bit rank 16": {"components": ("blocks", "head"), "row_dtype": "1bit"},
    "800 bytes": {"bytes_per_example": 800},
    "2,400 bytes": {"bytes_per_example": 2400},
}


def plain_step(model, batch):
    """Forward and backward with a gradient for every weight."""
    CausalLM().loss(model, batch).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--configurations", nargs="+", default=list(_CONFIGURATIONS), choices=_CONFIGURATIONS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--examples", type=int, default=48, help="examples of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    configure_memory()
    results = []
    for dtype in args.dtypes:
        source, task = ModelSource(args.model, dtype=dtype, device="cpu"), CausalLM()
        frozen, trained, tokenizer = task.load(source), task.load(source).requires_grad_(True), load_tokenizer(source)
        stream = TextConverter(tokenizer, args.max_tokens, "truncate").documents(read_corpus([args.data]))
        examples = [e for e, _ in zip((e for e in stream if isinstance(e, Example)), range(args.examples * 4), strict=False)][::4]
        for name in args.configurations:
            options = {"model": args.model, "data": (args.data,), "out": "-", "dtype": dtype, "batch_tokens": args.batch_tokens}
            config = BuildConfig(**options, **_CONFIGURATIONS[name])
            models, settings, _ = Worker(config).describe()
            settings = select_components(config, settings, examples, models)
            settings = with_known_sample(settings, 2048)  # the curvature that a build of a real corpus has
            fit, arrays = Fit(settings), {}
            for step in range(len(fit.steps)):
                arrays = fit.finish(step, arrays, fit.sum_statistics(Encoder(task, (frozen,), settings, arrays), step, examples))
            encoder = Encoder(task, (frozen,), settings, arrays)
            planned = [b for _, b in task.batches((frozen,), examples, args.batch_tokens)]
            tokens = sum(int(b.valid.sum()) for b in planned)
            folder = Path(tempfile.mkdtemp())
            write_documents(documents_path(folder, _SHARD), examples)
            ratios = []
            for round_ in range(args.rounds + 1):
                times = {}
                for side in ("plain", "wherefrom") if round_ % 2 else ("wherefrom", "plain"):
                    started = time.process_time()
                    if side == "plain":
                        for batch in planned:
                            plain_step(trained, batch)
                    else:
                        write_shard(folder, _SHARD, *encode_rows(encoder, examples))
                    times[side] = time.process_time() - started
                if round_:  # the first warms both up
                    ratios.append(times["plain"] / times["wherefrom"])
            shutil.rmtree(folder)
            result = {"dtype": dtype, "configuration": name, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
            results.append(result | {"tokens": tokens})
            if not args.json:
                spread = "{ratio:.2f} of plain forward+backward ({low:.2f} to {high:.2f})".format(**result)
                print(f"{dtype:>9} {name:>21}: {spread}, {tokens} tokens a round")
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
