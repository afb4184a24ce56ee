"""Wherefrom: a build with one worker and one thread, and queries. See README.md."""

import json
import time
import warnings
from pathlib import Path

import torch
from common import batches, load_model, median_seconds, plain_seconds, read_arguments, read_examples, report, tokens_of
from transformers import AutoTokenizer
from wherefrom import BuildConfig, Client, Query
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.progress import Silent

METHODS = {
    "800 bytes": {},
    "rank 16": {"components": ("blocks",), "rank": 16, "projection": "random", "curvature": "identity"},
}


class Stages(Silent):
    """CPU seconds at which the stages of a build begin."""

    def __init__(self):
        self.started = []

    def stage(self, name, total):
        """Note a stage."""
        self.started.append((name, time.process_time()))


def main():
    """Measure and print."""
    args = read_arguments("method")
    model, examples, queries = load_model(args.model), read_examples(args.examples), read_examples(args.queries)
    groups = batches(examples)
    plain = plain_seconds(model, examples, groups)
    del model
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    corpus = Path(f"{args.out}.jsonl")
    corpus.write_text("".join(json.dumps({"text": tokenizer.decode(e)}) + "\n" for e in examples))
    warnings.simplefilter("ignore")
    stages = Stages()
    options = {"append_eos": False, "max_tokens": 256, "batch_tokens": 512, **METHODS[args.method]}
    build(BuildConfig(model=args.model, data=(str(corpus),), out=args.out, **options), stages)
    ended = time.process_time()
    first_fit = next((at for name, at in stages.started if name.startswith("fitting")), None)
    rows_began = next(at for name, at in stages.started if name.startswith("building rows"))
    client = Client(args.out)
    tokens = int(client.index.manifest.tokens)
    texts = [Query(text=tokenizer.decode(query)) for query in queries]
    seconds = median_seconds(lambda query: client.query(query, k=10, opponents=False), texts)
    search = median_seconds(lambda row: client.query(row=row, k=10, opponents=False), list(range(len(queries))))
    plain_rate = tokens_of(examples, groups) / plain
    report(
        tokens_per_cpu_second=tokens / (ended - rows_began),
        over_plain=tokens / (ended - rows_began) / plain_rate,
        with_fit_over_plain=tokens / (ended - (first_fit or rows_began)) / plain_rate,
        bytes_per_example=client.index.summary()["bytes_per_example"],
        query_seconds=seconds,
        search_seconds=search,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
