"""Training of the benchmarks' models, and the drawing of their documents."""

import copy
import json
import random
from itertools import zip_longest

import torch
from wherefrom.indexer.tasks import CausalLM

_CLIP = 1.0
_WARM_UP = 10


def fit(model, examples, seed, epochs, batch_size, rate, half=False):
    """Train with AdamW: ten steps of warm-up, then linearly to a tenth; the mean loss of a batch's tokens.

    Args:
        half: compute gradients in bfloat16, by a copy of the model, and update the float32 weights with them.
    """
    torch.manual_seed(seed)
    order, task = random.Random(seed), CausalLM()
    working = copy.deepcopy(model).to(torch.bfloat16) if half else model
    pairs = [(p, w) for p, w in zip(model.parameters(), working.parameters(), strict=True) if p.requires_grad]
    parameters = [parameter for parameter, _ in pairs]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = epochs * -(-len(examples) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / _WARM_UP) * (1 - 0.9 * s / steps))
    working.train()
    for _ in range(epochs):
        shuffled = order.sample(range(len(examples)), len(examples))
        for first in range(0, len(shuffled), batch_size):
            batch = task.collate([examples[i] for i in shuffled[first : first + batch_size]], next(model.parameters()).device)
            loss = task.loss(working, batch).sum() / (batch.targets >= 0).sum()
            loss.backward()
            if half:
                for parameter, copied in pairs:
                    parameter.grad, copied.grad = copied.grad.float(), None
            torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if half:
                with torch.no_grad():
                    for parameter, copied in pairs:
                        copied.copy_(parameter)
    return model


def draw_documents(data):
    """The documents of a corpus in random order, one of each source in turn while they last."""
    by_source = {}
    with open(data) as lines:
        for document in map(json.loads, lines):
            by_source.setdefault(document["source"], []).append(document)
    drawn = [random.Random(0).sample(found, len(found)) for _, found in sorted(by_source.items())]
    return [document for group in zip_longest(*drawn) for document in group if document is not None]
