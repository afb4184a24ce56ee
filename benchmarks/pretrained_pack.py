"""Recipes of ground-truth packs that fine-tune a pretrained model: all of its weights, or a LoRA adapter.

    python benchmarks/pretrained_pack.py convert --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2    (needs `pip install gguf`)
    python benchmarks/pretrained_pack.py documents --data corpus.jsonl --out documents
    cd benchmarks && wherefrom pack --train pretrained_pack:train --model ../smollm2 --data ../documents/train.jsonl \\
        --queries ../documents/query.jsonl --out ../pack-full --subsets 40 --max-tokens 64
    cd benchmarks && wherefrom pack --train pretrained_pack:train_lora ... --out ../pack-lora
    wherefrom evaluate lds pack-full

`convert` saves a quantized GGUF file's weights as safetensors. `documents` draws training documents and queries evenly from the corpus'
sources, and plants the documents of paraphrases.jsonl among the training documents. `train` and `train_lora` are training functions: two
epochs from the pretrained model, on what they are given. Gradients are computed in bfloat16, the weights are float32.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from recipe import draw_documents, fit

_TRAIN, _QUERIES, _LEAST_WORDS = 480, 60, 20
_EPOCHS, _BATCH = 2, 16
_RATE, _LORA_RATE = 1e-4, 1e-3
_LORA_RANK, _LORA_ALPHA = 8, 16
_SMALL_EPOCHS, _SMALL_BATCH, _SMALL_LORA_RATE = 3, 8, 5e-3
_PARAPHRASES = Path(__file__).with_name("paraphrases.jsonl")


def train(examples, model, seed):
    """Fine-tune all weights of the model in the directory `model`."""
    return fit(_pretrained(model), examples, seed, _EPOCHS, _BATCH, _RATE, half=True)


def train_lora(examples, model, seed):
    """Train a LoRA adapter of all linear layers of the blocks of the model in the directory `model`."""
    return fit(_with_adapter(model, seed), examples, seed, _EPOCHS, _BATCH, _LORA_RATE, half=True)


def train_small_lora(examples, model, seed):
    """Train a LoRA adapter of a small model, in float32: three epochs."""
    return fit(_with_adapter(model, seed), examples, seed, _SMALL_EPOCHS, _SMALL_BATCH, _SMALL_LORA_RATE)


def _with_adapter(model, seed):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # draws the adapter's first matrices
    options = LoraConfig(r=_LORA_RANK, lora_alpha=_LORA_ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(_pretrained(model), options)


def _pretrained(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def convert(gguf, out):
    """Save the weights and the tokenizer of a GGUF file in transformers' format, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def documents(data, out):
    """Draw documents, plant the paraphrased ones, and write train.jsonl and query.jsonl."""
    fitting = [d for d in draw_documents(data) if len(d["text"].split()) >= _LEAST_WORDS]
    planted = [{"id": d["id"], "text": d["text"], "source": "planted"} for d in map(json.loads, _PARAPHRASES.read_text().splitlines())]
    chosen = fitting[:_TRAIN] + planted
    random.Random(2).shuffle(chosen)
    out.mkdir(parents=True)
    for name, part in (("train.jsonl", chosen), ("query.jsonl", fitting[_TRAIN : _TRAIN + _QUERIES])):
        (out / name).write_text("".join(json.dumps(d) + "\n" for d in part))


def main():
    """Convert a model, or draw the documents; `wherefrom pack` does the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("convert")
    command.add_argument("--gguf", required=True, type=Path)
    command.add_argument("--out", required=True, type=Path)
    command.set_defaults(run=convert)
    command = commands.add_parser("documents")
    command.add_argument("--data", required=True)
    command.add_argument("--out", required=True, type=Path)
    command.set_defaults(run=documents)
    options = vars(parser.parse_args())
    options.pop("run")(**options)


if __name__ == "__main__":
    main()
