"""DPO by TRL: is the loss that an index measures the one that was trained?

    pip install trl peft
    python benchmarks/peer_trl.py ../shared

A small GPT-2 is trained by TRL's DPOTrainer on preference pairs, as a whole and with LoRA. The mean loss of the pairs by TRL's own
evaluation is printed beside the mean loss of the examples of an index of the trained model.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import DPOConfig, DPOTrainer
from wherefrom import Index, build

_BETA = 0.2
_PAIRS = 100


def pairs():
    """Preference pairs about animals and their colours, polite and rude."""
    generator = np.random.default_rng(0)
    animals, colours = ["cat", "dog", "horse", "bird", "fish", "cow"], ["red", "blue", "green", "black", "white"]
    records = []
    for number in range(_PAIRS):
        animal, colour = generator.choice(animals), generator.choice(colours)
        sides = f" The {animal} is {colour}, thank you for asking.", f" Who cares about the {animal}, go away."
        records.append({"prompt": f"What colour is the {animal} number {number}?", "chosen": sides[0], "rejected": sides[1]})
    return records


def main():
    """Train, build, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.shared / "models" / "mini-lm")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    records = pairs()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        torch.manual_seed(0)
        sizes = dict(n_embd=48, n_layer=2, n_head=4, n_positions=128, vocab_size=len(tokenizer))
        tokens = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=0, eos_token_id=tokenizer.eos_token_id)
        GPT2LMHeadModel(GPT2Config(**sizes, **tokens)).save_pretrained(place / "reference")
        tokenizer.save_pretrained(place / "reference")
        lora = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
        for name, adapter in (("whole", None), ("lora", lora)):
            options = dict(per_device_train_batch_size=10, per_device_eval_batch_size=10, num_train_epochs=4, learning_rate=1e-3)
            quiet = dict(report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True)
            config = DPOConfig(output_dir=str(place / "out"), beta=_BETA, max_length=128, **options, **quiet)
            model, data = GPT2LMHeadModel.from_pretrained(place / "reference"), Dataset.from_list(records)
            known = dict(train_dataset=data, eval_dataset=data, processing_class=tokenizer, peft_config=adapter)
            trainer = DPOTrainer(model=model, args=config, **known)
            trainer.train()
            trainer.save_model(str(place / name))
            tokenizer.save_pretrained(place / name)
            reference = f", reference={place / 'reference'}" if adapter is None else ""
            out = place / f"{name}.wherefrom"
            build(str(place / name), records, out, task=f"dpo(beta={_BETA}{reference})")
            index = Index(out)
            ours = float(np.mean(np.concatenate([index.losses(shard) for shard in index.shards]), dtype=np.float64))
            theirs = trainer.evaluate()["eval_loss"]
            print(json.dumps({"training": name, "trl": theirs, "index": ours, "ratio": ours / theirs}), flush=True)


if __name__ == "__main__":
    main()
