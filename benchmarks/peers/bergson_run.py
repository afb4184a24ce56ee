"""Bergson: a build of projected gradients, and queries. See README.md."""

import time
from pathlib import Path

import torch
from bergson import Attributor, GradientProcessor, collect_gradients
from bergson.config import IndexConfig
from common import (
    batches,
    folder_bytes,
    load_model,
    loss_of,
    median_seconds,
    padded,
    plain_seconds,
    read_arguments,
    read_examples,
    report,
    tokens_of,
)
from datasets import Dataset

RANK = 16


def main():
    """Measure and print."""
    args = read_arguments()
    model, examples, queries = load_model(args.model), read_examples(args.examples), read_examples(args.queries)
    groups = batches(examples)
    plain = plain_seconds(model, examples, groups)
    data = Dataset.from_dict({"input_ids": examples, "length": [len(e) for e in examples], "labels": examples})
    config = IndexConfig(run_path=args.out, projection_dim=RANK, token_batch_size=512)
    processor = GradientProcessor(projection_dim=RANK)
    Path(config.partial_run_path).mkdir(parents=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    started = time.process_time()
    collect_gradients(model, data, processor, config, batches=groups)
    built = time.process_time() - started
    processor.save(config.partial_run_path)
    attributor = Attributor(config.partial_run_path)

    def ask(query):
        with attributor.trace(model.base_model, 10):
            loss_of(model, *padded([query], [0])).backward()

    seconds = median_seconds(ask, queries)
    report(
        tokens_per_cpu_second=tokens_of(examples, groups) / built,
        over_plain=plain / built,
        bytes_per_example=folder_bytes(config.partial_run_path) / len(examples),
        query_seconds=seconds,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
