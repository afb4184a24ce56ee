"""A recorded training run and ground truth from the same run, repeated without some examples: what exact replay is worth.

    python benchmarks/llama_pack.py prepare --data corpus.jsonl --out llama
    python benchmarks/replay_pack.py record --base llama --out run
    wherefrom pack --train wherefrom.evaluation.replay:retrain --model run --data llama/train.jsonl --queries llama/query.jsonl \\
        --out pack --subsets 60 --fraction 0.9
    python benchmarks/replay_pack.py judge --run run --pack pack --scores replay.npy

`record` fine-tunes the base model of llama_pack.py with AdamW for three epochs. A subset of the pack keeps the run's order, learning rates
and denominators; what it leaves out has a weight of 0 (the protocol of MAGIC, arXiv 2503.13751). `judge` replays the pack's queries and
prints their LDS.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from wherefrom import TrainingRecorder
from wherefrom.evaluation.judge import judge_scores
from wherefrom.evaluation.packs import read_pack
from wherefrom.evaluation.replay import match_rows, replay_examples
from wherefrom.indexer.models import ModelSource
from wherefrom.indexer.tasks import CausalLM
from wherefrom.ray_jobs.progress import Console
from wherefrom.store.corpus import read_corpus, usable
from wherefrom.store.fields import Fields

_TOKENS = 128
_WARM_UP = 10


def record(base, out, epochs, batch_size, rate, eps):
    """Fine-tune the base model on its pack's documents, in an order drawn for each epoch, and record the run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(base / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    converter = CausalLM().converter(ModelSource(folder), _TOKENS, "truncate", True)
    examples = list(usable(converter.documents(read_corpus([str(base / "train.jsonl")], Fields()))))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, eps=eps)
    steps = epochs * -(-len(examples) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / _WARM_UP) * (1 - 0.9 * s / steps))
    order = random.Random(0)
    with TrainingRecorder(out, model, optimizer, tokenizer=tokenizer, clip_norm=1.0) as recorder:
        for _ in range(epochs):
            shuffled = order.sample(examples, len(examples))
            for first in range(0, len(shuffled), batch_size):
                batch = shuffled[first : first + batch_size]
                width = max(len(e.token_ids) for e in batch)
                inputs, mask = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
                for i, example in enumerate(batch):
                    inputs[i, : len(example.token_ids)] = torch.from_numpy(example.token_ids)
                    mask[i, : len(example.token_ids)] = 1
                labels = torch.where(mask == 1, inputs, -100)
                recorder.batch(inputs, labels, mask, ids=[e.id for e in batch])
                model(input_ids=inputs, attention_mask=mask, labels=labels).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()


def judge(run, pack_path, scores):
    """Replay a pack's queries, keep the scores [examples, queries], and print their LDS beside the baselines'."""
    pack = read_pack(pack_path)
    source = ModelSource(str(run))
    converter = CausalLM().converter(source, pack.build["max_tokens"], "truncate", pack.build["append_eos"])
    train, queries = (list(usable(converter.documents(documents))) for documents in (pack.train, pack.queries))
    if not scores.exists():
        with Console() as reporter:
            replayed = replay_examples(run, queries, reporter)
        pairs = match_rows(train, replayed.examples)
        assert [row for row, _ in pairs] == list(range(len(train)))
        np.save(scores, replayed.scores[:, [number for _, number in pairs]].T)
        print(f"difference at the end: {replayed.difference:.2e}")
    print(json.dumps(judge_scores(pack_path, scores).to_dict(), indent=1))


def main():
    """Record a run, or judge its replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("record")
    command.add_argument("--base", required=True, type=Path)
    command.add_argument("--out", required=True, type=Path)
    command.add_argument("--epochs", type=int, default=3)
    command.add_argument("--batch-size", type=int, default=16)
    command.add_argument("--rate", type=float, default=1e-3)
    command.add_argument("--eps", type=float, default=1e-8)
    command.set_defaults(run=record)
    command = commands.add_parser("judge")
    command.add_argument("--run", required=True, type=Path, dest="directory")
    command.add_argument("--pack", required=True, type=Path, dest="pack_path")
    command.add_argument("--scores", required=True, type=Path)
    command.set_defaults(run=lambda directory, **options: judge(directory, **options))
    options = vars(parser.parse_args())
    options.pop("run")(**options)


if __name__ == "__main__":
    main()
