"""Slopes of one index by trainings on half and on 90 % of its examples: how much more an example weighs in a smaller training.

    python benchmarks/slope_fractions.py [--subsets 40] [--passes 4 16] [--bytes-per-example 800 2400]

A GPT-2 of two layers is trained on the demo's corpus, without 40 documents that are the queries. Prints the slopes and their ratio.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from importlib import resources
from pathlib import Path

import torch
from wherefrom import BuildConfig
from wherefrom.evaluation.packs import read_pack
from wherefrom.evaluation.retrain import PackConfig, make_pack
from wherefrom.evaluation.slope import slope
from wherefrom.indexer.tasks import CausalLM
from wherefrom.ray_jobs.build import build

_QUERIES = 40
_BATCH = 16


def train(examples, model, seed):
    """Train for as many passes as the variable PASSES says."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_pretrained(model)
    task, optimizer = CausalLM(), torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(int(os.environ["PASSES"])):
        order = torch.randperm(len(examples), generator=generator).tolist()
        for first in range(0, len(order), _BATCH):
            batch = task.collate([examples[i] for i in order[first : first + _BATCH]], torch.device("cpu"))
            optimizer.zero_grad()
            (task.loss(network, batch).sum() / (batch.targets >= 0).sum()).backward()
            optimizer.step()
    return network.eval()


def prepare(place):
    """Write the corpus, the queries, a tokenizer and an untrained model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    lines = resources.files("wherefrom.demo").joinpath("corpus.jsonl").read_text(encoding="utf-8").strip().split("\n")
    random.Random(0).shuffle(lines)
    (place / "queries.jsonl").write_text("\n".join(lines[:_QUERIES]), encoding="utf-8")
    (place / "train.jsonl").write_text("\n".join(lines[_QUERIES:]), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines[_QUERIES:]), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>").save_pretrained(place / "base")
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**sizes, **none)).save_pretrained(place / "base")


def main():
    """Make the packs and the indexes, and print the slopes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--passes", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--bytes-per-example", type=int, nargs="*", default=[800, 2400])
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(place)
        data = (str(place / "train.jsonl"),)
        for passes in arguments.passes:
            os.environ["PASSES"] = str(passes)
            packs = {fraction: place / f"{passes}-{fraction}" for fraction in (0.5, 0.9)}
            for fraction, out in packs.items():
                fields = {"train": "slope_fractions:train", "model": str(place / "base"), "data": data, "out": str(out)}
                queries = str(place / "queries.jsonl")
                make_pack(PackConfig(**fields, queries=queries, subsets=arguments.subsets, fraction=fraction))
            model = str(read_pack(packs[0.5]).model)
            for size in arguments.bytes_per_example:
                index = place / f"{passes}-{size}.wherefrom"
                build(
                    BuildConfig(model=model, data=data, out=str(index), bytes_per_example=size, base=str(place / "base"), append_eos=True)
                )
                slopes = [next(iter(slope(index, pack, keep=False).figures.values())).value for pack in packs.values()]
                halves, most = slopes
                print(
                    f"{passes} passes, {size} bytes: slope {halves:.3f} by halves, {most:.3f} by 90 %, ratio {halves / most:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
