"""A build's work on a GPU: correctness, speed compared with plain training, and memory.

    python benchmarks/gpu.py [--shapes 135M 1B 8B] [--device cuda] [--dtypes bfloat16 float32] [--json]

The models have the shapes of Llama-like models and random weights, so nothing is loaded. For each shape, precision and configuration:

- correctness: the cosine of each row with that of the same model on the CPU in float32 (the smallest of eight examples; shapes up to 1B);
- tokens per second of the row pass over those of plain forward and backward with gradients of all weights, in turns (median, least, most);
- what the overlap of copies and coding with the next batch's computation gains (time without over time with it);
- the peak of the device's memory above the model, for the fit and for the rows;
- with `--device map` (accelerate), the same with the layers spread over all GPUs;
- with `--device tp`, the row pass with every layer split over all GPUs, over plain forward and backward on one.

float32 is measured with TF32, as builds use it, and without: products in full float32 do not use the tensor cores.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from wherefrom import BuildConfig
from wherefrom.indexer import encoder as encoder_module
from wherefrom.indexer.budget import allocate, count_tokens
from wherefrom.indexer.capture import product_precision
from wherefrom.indexer.devices import TENSOR_PARALLEL
from wherefrom.indexer.encoder import Encoder, EncoderSettings
from wherefrom.indexer.fit import Fit, with_known_sample
from wherefrom.indexer.models import ModelSource, load_causal_lm
from wherefrom.indexer.tasks import CausalLM
from wherefrom.indexer.tensor_parallel import is_split
from wherefrom.ray_jobs.schema import candidate_components
from wherefrom.ray_jobs.worker import encode_rows
from wherefrom.store.documents import Example

_SHAPES = {  # width, inner width, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 1_000),
    "135M": (576, 1536, 30, 9, 3, 49_152),
    "1B": (2048, 8192, 16, 32, 8, 128_256),
    "8B": (4096, 14336, 32, 32, 8, 128_256),
}
_CONFIGURATIONS = {"head": {"components": ("head",)}, "800 bytes": {"bytes_per_example": 800}, "2,400 bytes": {"bytes_per_example": 2400}}
_COMPARED = ("tiny", "135M", "1B")


def random_model(shape, dtype, device):
    """A Llama-like model of a shape, with the same random weights on every device."""
    width, inner, layers, heads, groups, vocabulary = _SHAPES[shape]
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=4096,
        tie_word_embeddings=shape == "135M",
    )
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if device.startswith(TENSOR_PARALLEL):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return load_causal_lm(ModelSource(folder, dtype=str(dtype).removeprefix("torch."), device=device))
    if device == "map":
        from accelerate import dispatch_model, infer_auto_device_map

        return dispatch_model(model, infer_auto_device_map(model, no_split_module_classes=["LlamaDecoderLayer"])).eval()
    return model.to(device).eval()


def random_examples(count, tokens, vocabulary):
    """Examples of random tokens."""
    generator = np.random.default_rng(0)
    mask = np.arange(tokens + 1) > 0
    ids = generator.integers(0, vocabulary, (count, tokens + 1)).astype(np.int32)
    return [Example(id=str(i), text="", source="", token_ids=row, loss_mask=mask) for i, row in enumerate(ids)]


def fitted(model, configuration, examples, batch_tokens):
    """An encoder of a configuration, fitted on the examples."""
    config = BuildConfig(model="random", data=("random",), out="random", **_CONFIGURATIONS[configuration])
    task = CausalLM()
    components = candidate_components(config, task, model, 0)
    if config.budget is not None:
        components = allocate(config.budget, components, count_tokens(examples), sum(p.numel() for p in model.parameters()))
    settings = with_known_sample(EncoderSettings(components, batch_tokens), 2048)
    fit, arrays = Fit(settings), {}
    for step in range(len(fit.steps)):
        arrays = fit.finish(step, arrays, fit.sum_statistics(Encoder(task, (model,), settings, arrays), step, examples))
    return Encoder(task, (model,), settings, arrays)


class Meter:
    """Seconds and the device's peak of memory above what was allocated before."""

    def __init__(self, device):
        self._cuda = device.type == "cuda"

    def __enter__(self):
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated() if self._cuda else 0
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error):
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._started
        self.bytes = torch.cuda.max_memory_allocated() - self._before if self._cuda else 0


def plain_step(task, model, examples, batch_tokens):
    """Forward and backward with a gradient for every weight."""
    for _, batch in task.batches((model,), examples, batch_tokens):
        task.loss(model, batch).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None


def smallest_cosine(encoder, reference, examples):
    """The smallest cosine of a row with that of a reference, over examples and components."""
    rows, expected = encoder.rows(examples, exact=True), reference.rows(examples, exact=True)
    cosines = []
    for name, vectors in rows.items():
        products = np.diag(vectors.as_float32().inner_products(expected[name].as_float32()))
        cosines.append(products / np.sqrt(vectors.squared_norms * expected[name].squared_norms))
    return float(np.min(cosines))


def measure(shape, dtype, configuration, args, device):
    """Measure one shape in one precision."""
    task = CausalLM()
    model = random_model(shape, dtype, args.device)
    vocabulary = _SHAPES[shape][5]
    examples = random_examples(args.batches * args.batch_tokens // args.tokens, args.tokens, vocabulary)
    model.requires_grad_(False)
    with Meter(device) as fitting:
        encoder = fitted(model, configuration, examples, args.batch_tokens)
    result = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "configuration": configuration, "fit_bytes": fitting.bytes}
    if shape in _COMPARED and configuration == "head":
        exact = random_model(shape, torch.float32, "cpu").requires_grad_(False)
        reference = replace(encoder, models=(exact,))
        result["smallest_cosine"] = smallest_cosine(encoder, reference, random_examples(8, min(64, args.tokens), vocabulary))
        del exact, reference
    trained = random_model(shape, dtype, device.type) if is_split(model) else model
    ratios, overlaps = [], []
    for round_ in range(args.rounds + 1):
        times = {}
        sides = ("plain", "rows", "one after the other")
        for side in sides if round_ % 2 else reversed(sides):
            trained.requires_grad_(side == "plain")
            encoder.__dict__["copies_asynchronously"] = side == "rows" and device.type != "cpu"
            with Meter(device) as meter:
                if side == "plain":
                    plain_step(task, trained, examples, args.batch_tokens)
                else:
                    encode_rows(encoder, examples)
            times[side] = meter.seconds
            if side == "rows":
                result["row_bytes"] = meter.bytes
        if round_:  # the first warms both up
            ratios.append(times["plain"] / times["rows"])
            overlaps.append(times["one after the other"] / times["rows"])
            result["tokens_per_second"] = round(args.tokens * len(examples) / times["rows"])
    overlap = {"overlap": statistics.median(overlaps), "overlap_low": min(overlaps), "overlap_high": max(overlaps)}
    return result | overlap | {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["135M", "1B"], choices=_SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--configurations", nargs="+", default=list(_CONFIGURATIONS), choices=_CONFIGURATIONS)
    parser.add_argument("--device", default="cuda", help="cuda, cpu, map, tp or tp:N")
    parser.add_argument("--tokens", type=int, default=1024, help="of an example")
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    is_several = args.device == "map" or args.device.startswith(TENSOR_PARALLEL)
    device = torch.device("cuda" if is_several and torch.cuda.is_available() else "cpu" if is_several else args.device)
    results = []
    for shape in args.shapes:
        for name in args.dtypes:
            for tf32 in (True, False) if name == "float32" and device.type == "cuda" else (None,):
                if tf32 is not None:
                    torch.set_float32_matmul_precision("high" if tf32 else "highest")  # of plain training
                    encoder_module.product_precision = product_precision if tf32 else lambda *_: nullcontext()
                for configuration in args.configurations:
                    result = measure(shape, getattr(torch, name), configuration, args, device) | {"tf32": tf32}
                    results.append(result)
                    if not args.json:
                        print(
                            "{shape:>5} {dtype} {configuration:>11}: {ratio:.2f} of plain forward+backward ({low:.2f} to {high:.2f}), "
                            "{tokens_per_second:,} tokens/s; overlap gains {overlap:.2f} ({overlap_low:.2f} to {overlap_high:.2f})".format(
                                **result
                            ),
                            *(f"TF32 {tf32}" for _ in range(tf32 is not None)),
                            *(f"{kind}: {result[kind] / 2**30:.2f} GiB" for kind in ("fit_bytes", "row_bytes") if result[kind]),
                            *(f"smallest cosine {result['smallest_cosine']:.5f}" for _ in range("smallest_cosine" in result)),
                            sep="; ",
                            flush=True,
                        )
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
