"""Memory of the output head's rows at a large vocabulary and width, where one example's dense gradient would be gigabytes.

    python benchmarks/head_memory.py [--vocabulary 256000] [--width 8192] [--tokens 128] [--examples 8]

A random Llama with one narrow block and a tied head in bfloat16; examples go through the whole path: fitting the head's curvature, and
coded rows. What the process holds at its peak above the loaded model is compared with one dense float32 gradient (vocabulary x width).
The curvature's eigenbasis (width x width, float64, once) is counted in, and so are the logits of a batch, which the model itself makes.
"""

import argparse
import json
import resource

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from wherefrom.indexer.encoder import Encoder, EncoderSettings
from wherefrom.indexer.fit import Fit
from wherefrom.indexer.tasks import CausalLM
from wherefrom.ray_jobs.worker import encode_rows
from wherefrom.store.documents import Example
from wherefrom.store.manifest import Curvature, SparseComponent


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("vocabulary", 256_000), ("width", 8192), ("tokens", 128), ("examples", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu").requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    task, generator = CausalLM(), np.random.default_rng(0)
    examples = []
    for i in range(args.examples):
        ids = generator.integers(0, args.vocabulary, args.tokens).astype(np.int32)
        mask = np.arange(args.tokens) > 0
        examples.append(Example(id=str(i), text="", source="", token_ids=ids, loss_mask=mask))
    layer, vocabulary, width, postprocessed = task.sparse_head(model)
    component = SparseComponent(
        name="head",
        kind="sparse",
        model=0,
        weight=1.0,
        role="head",
        layer=layer,
        vocabulary=vocabulary,
        width=width,
        bits=64,
        extra_tokens=0,
        max_tokens=None,
        postprocessed=postprocessed,
        seed=0,
        curvature=Curvature(kind="kfac", labels="sampled", examples=0, tokens=0, damping=1.0),
    )
    settings = EncoderSettings((component,), args.tokens)
    loaded = _peak()
    task.loss(model, task.collate(examples[:1], torch.device("cpu")))
    forward = _peak()
    fit = Fit(settings)
    arrays = fit.finish(0, {}, fit.sum_statistics(Encoder(task, (model,), settings, {}), 0, examples))
    fitted = _peak()
    encode_rows(Encoder(task, (model,), settings, arrays), examples)
    dense = vocabulary * width * 4
    found = {"dense_gradient": dense, "model": loaded, "forward": forward - loaded, "fit": fitted - loaded, "rows": _peak() - loaded}
    print(json.dumps({name: f"{value / 2**30:.2f} GiB" for name, value in found.items()}))
    print(f"peak above the model over one dense gradient: {(_peak() - loaded) / dense:.2f}")


if __name__ == "__main__":
    main()
