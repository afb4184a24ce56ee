"""LogIX: a log of LoGra's projected gradients, and queries. See README.md."""

import os
import time

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))

import torch
import yaml
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
from logix import LogIX

RANK = 16


def main():
    """Measure and print."""
    args = read_arguments()
    model, examples, queries = load_model(args.model), read_examples(args.examples), read_examples(args.queries)
    groups = batches(examples)
    plain = plain_seconds(model, examples, groups)
    settings = {"root_dir": args.out, "logging": {"flush_threshold": 50_000_000}, "lora": {"init": "random", "rank": RANK}}
    os.makedirs(args.out)
    with open(os.path.join(args.out, "config.yaml"), "w") as file:
        yaml.safe_dump(settings, file)
    logix = LogIX("run", config=os.path.join(args.out, "config.yaml"))
    blocks = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    logix.watch(model, name_filter=blocks)
    logix.add_lora()
    logix.setup({"grad": ["log", "covariance"]})
    logix.save(True)
    started = time.process_time()
    for group in groups:
        ids, mask, labels = padded(examples, group)
        with logix(data_id=[str(i) for i in group], mask=mask):
            loss_of(model, ids, mask, labels).backward()
        model.zero_grad(set_to_none=True)
    logix.finalize()
    built = time.process_time() - started
    logix.eval()
    loader = logix.build_log_dataloader(batch_size=64, num_workers=0)

    def ask(query):
        ids, mask, labels = padded([query], [0])
        with logix(data_id=["query"], mask=mask):
            loss_of(model, ids, mask, labels).backward()
        model.zero_grad(set_to_none=True)
        scores = logix.compute_influence_all(logix.get_log(), loader)["influence"]
        return torch.as_tensor(scores).flatten().topk(10).indices

    seconds = median_seconds(ask, queries)
    report(
        tokens_per_cpu_second=tokens_of(examples, groups) / built,
        over_plain=plain / built,
        bytes_per_example=folder_bytes(args.out) / len(examples),
        query_seconds=seconds,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
