"""The recipe of a ground-truth pack for a Llama-like model with an untied output head: 0.45 million parameters, 800 documents, 80 subsets.

    python benchmarks/llama_pack.py prepare --data corpus.jsonl --out llama
    cd benchmarks && wherefrom pack --train llama_pack:train --model ../llama/base --data ../llama/train.jsonl \\
        --queries ../llama/query.jsonl --out ../llama/pack --subsets 80 --workers 2
    wherefrom evaluate lds llama/pack

`prepare` draws training documents and queries from the corpus (evenly from its sources), trains a tokenizer and a base model on the rest,
and writes all of it. `train` is the training function: three epochs from the base, on what it is given. `--architecture qwen3` makes a
base with that architecture instead, for a pack of an adapter (`pretrained_pack:train_small_lora`).
"""

import argparse
import json
import random
from pathlib import Path

import torch
from recipe import draw_documents, fit
from wherefrom.indexer.examples import TextConverter
from wherefrom.store.corpus import Document
from wherefrom.store.documents import Example

_TRAIN, _QUERIES, _BASE = 800, 80, 4000
_VOCABULARY, _WIDTH, _LAYERS, _HEADS, _INNER, _TOKENS = 1024, 96, 3, 4, 256, 128
_EPOCHS, _BATCH, _RATE = 3, 8, 1e-3
_BASE_EPOCHS, _BASE_BATCH, _BASE_RATE = 2, 16, 3e-3


def train(examples, model, seed):
    """Three epochs of AdamW over `examples` from the base model in the directory `model`."""
    from transformers import LlamaForCausalLM

    return fit(LlamaForCausalLM.from_pretrained(model), examples, seed, _EPOCHS, _BATCH, _RATE)


def prepare(data, out, architecture):
    """Draw the documents, train tokenizer and base model on others, write everything."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    with open(data) as lines:
        documents = [json.loads(line) for line in lines]
    mixed = draw_documents(data)
    chosen, queries = mixed[:_TRAIN], mixed[_TRAIN : _TRAIN + _QUERIES]
    taken = {d["id"] for d in chosen + queries}
    rest = [d for d in random.Random(1).sample(documents, len(documents)) if d["id"] not in taken][:_BASE]
    out.mkdir(parents=True)
    for name, part in (("train.jsonl", chosen), ("query.jsonl", queries)):
        (out / name).write_text("".join(json.dumps(d) + "\n" for d in part))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((d["text"] for d in rest), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")
    encoder = TextConverter(fast, _TOKENS, "truncate")
    encoded = [e for e in encoder.documents(Document(d["id"], d["source"], "", text=d["text"]) for d in rest) if isinstance(e, Example)]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=_INNER,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        head_dim=_WIDTH // _HEADS,
        max_position_embeddings=_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    base = fit(AutoModelForCausalLM.from_config(config), encoded, 0, _BASE_EPOCHS, _BASE_BATCH, _BASE_RATE)
    base.save_pretrained(out / "base")
    fast.save_pretrained(out / "base")


def main():
    """Prepare; `wherefrom pack` does the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--architecture", choices=["llama", "qwen3"], default="llama")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prepare(args.data, args.out, args.architecture)


if __name__ == "__main__":
    main()
