"""Model, batches and measurements that all runners share; needs torch and transformers alone."""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

BATCH_TOKENS = 512


def load_model(directory):
    """The model in float32, with Linear layers in place of GPT-2's Conv1D ones."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = torch.nn.Linear(*module.weight.shape)
            linear.weight.data = module.weight.data.T.contiguous()
            linear.bias.data = module.bias.data
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


def read_examples(file):
    """Token ids of the examples."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def batches(examples):
    """Numbers of examples that share a batch, of similar lengths, at most `BATCH_TOKENS` padded tokens together."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    groups, group = [], []
    for i in order:
        if group and len(examples[i]) * (len(group) + 1) > BATCH_TOKENS:
            groups.append(group)
            group = []
        group.append(i)
    return [*groups, group]


def padded(examples, group):
    """Input ids, attention mask and labels of a batch."""
    length = max(len(examples[i]) for i in group)
    ids = torch.zeros(len(group), length, dtype=torch.long)
    mask = torch.zeros(len(group), length, dtype=torch.long)
    for row, i in enumerate(group):
        ids[row, : len(examples[i])] = torch.tensor(examples[i])
        mask[row, : len(examples[i])] = 1
    return ids, mask, ids.masked_fill(mask == 0, -100)


def loss_of(model, ids, mask, labels):
    """Summed cross-entropy of a batch (nats)."""
    logits = model(input_ids=ids, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def plain_seconds(model, examples, groups):
    """CPU seconds of plain forward and backward passes over some batches, all weights with gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    started = time.process_time()
    for group in groups:
        loss_of(model, *padded(examples, group)).backward()
        model.zero_grad(set_to_none=True)
    return time.process_time() - started


def tokens_of(examples, groups):
    """Tokens that are predicted in some batches."""
    return sum(len(examples[i]) - 1 for group in groups for i in group)


def median_seconds(function, arguments):
    """Median wall time of a function over its arguments, after one call that does not count."""
    function(arguments[0])
    times = []
    for argument in arguments:
        started = time.perf_counter()
        function(argument)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def read_arguments(*more):
    """Model, examples, queries and folder that a runner is given, and what follows them."""
    parser = argparse.ArgumentParser()
    for name in ("model", "examples", "queries", "out", *more):
        parser.add_argument(name)
    return parser.parse_args()


def report(**figures):
    """Print a runner's figures, and the largest memory of this process."""
    print(json.dumps({**figures, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}))


def folder_bytes(folder):
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
