"""Selection of training data, put to the test: the loss on held-out targets after training on what each method chose.

    python benchmarks/selection.py --shared ../shared --work /tmp/selection

A small model learns from half of the texts and a few problems: the base, which has not seen the rest. The base is trained further on a part
of the rest, the pool, and indexed with it. Targets are held-out problems; half of them are what examples are chosen for, the other half is
measured. Then the base is trained on each selection, with three seeds, and as many steps for all.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from wherefrom import BuildConfig, Client, Query
from wherefrom.query.select import Limits
from wherefrom.ray_jobs.build import build

_METHODS = {
    "cosine, sum": {"by": "cosine"},
    "cosine, max": {"by": "cosine", "method": "max"},
    "cosine, cover": {"by": "cosine", "method": "cover"},
    "cosine, cover, distinct 0.9": {"by": "cosine", "method": "cover", "limits": Limits(distinct=0.9)},
    "influence, sum": {"by": "influence"},
    "influence, cover": {"by": "influence", "method": "cover"},
    "loss-normalized, sum": {"by": "loss-normalized"},
    "BM25, sum": {"by": "bm25"},
    "BM25, cover": {"by": "bm25", "method": "cover"},
    "random": {"by": "random"},
}
_LENGTH = 192
_BATCH = 16


def train(model, tokenizer, texts, steps, seed, rate=1e-3):
    """Train a model on random batches of texts."""
    generator = torch.Generator().manual_seed(seed)
    encoded = [[*tokenizer(text, truncation=True, max_length=_LENGTH - 1).input_ids, 0] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 20) * (1 - step / steps))
    model.train()
    for _ in range(steps):
        chosen = [encoded[i] for i in torch.randint(len(encoded), (_BATCH,), generator=generator).tolist()]
        ids = torch.full((_BATCH, max(map(len, chosen))), -100)
        for row, tokens in zip(ids, chosen, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        optimizer.zero_grad()
        model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def loss(model, tokenizer, problems):
    """The mean loss of completions, in nats a token."""
    total, count = 0.0, 0
    for problem in problems:
        prompt = tokenizer(problem["prompt"]).input_ids
        ids = torch.tensor([(prompt + tokenizer(problem["completion"]).input_ids)[:256]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        tokens = int((labels[:, 1:] >= 0).sum())
        if tokens:
            total += float(model(input_ids=ids, labels=labels).loss) * tokens
            count += tokens
    return total / count


def split(shared: Path, size: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Documents that the base learns from, and the pool that it has not seen."""
    documents = [json.loads(line) for line in (shared / "data/corpus.jsonl").read_text().strip().split("\n")]
    order = np.random.default_rng(0).permutation(len(documents)).tolist()
    others = [documents[i] for i in order if documents[i]["source"] != "gsm8k"]
    problems = [documents[i] for i in order if documents[i]["source"] == "gsm8k"]
    seen = others[len(others) // 2 :] + problems[-200:]
    ids = {document["id"] for document in seen}
    return seen, [documents[i] for i in order if documents[i]["id"] not in ids][:size]


def make_models(work: Path, tokenizer, seen, pool, steps: int) -> None:
    """Train the base, and the model that is indexed, unless they are there."""
    if (work / "model").exists():
        return
    torch.manual_seed(0)
    sizes = dict(n_embd=128, n_layer=4, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes))
    train(model, tokenizer, [document["text"] for document in seen], steps, 0, 2e-3)
    model.save_pretrained(work / "base")
    train(model, tokenizer, [document["text"] for document in pool], steps // 2, 1)
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")


def main() -> None:
    """Build the base, the index and the selections, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--budget", type=int, default=300)
    parser.add_argument("--pool", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=150, help="Of each training on a selection.")
    parser.add_argument("--base-steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", help="Some of them, by name.  [default: all]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.shared / "models/mini-lm")
    seen, pool = split(arguments.shared, arguments.pool)
    make_models(arguments.work, tokenizer, seen, pool, arguments.base_steps)
    data = arguments.work / "pool.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in pool))
    options = {"model": str(arguments.work / "model"), "data": (str(data),), "max_tokens": _LENGTH}
    build(BuildConfig(out=str(arguments.work / "index"), **options))
    client = Client(arguments.work / "index")
    targets = [json.loads(line) for line in (arguments.shared / "data/gsm8k-questions.jsonl").read_text().strip().split("\n")]
    short = [t for t in targets[:60] if len(tokenizer(t["prompt"] + t["completion"]).input_ids) < 250]
    queries = [Query(prompt=t["prompt"], completion=t["completion"]) for t in short]
    measured = targets[150:250]
    print(f"base: {loss(GPT2LMHeadModel.from_pretrained(arguments.work / 'base'), tokenizer, measured):.3f} nats a token", flush=True)
    documents = {document["id"]: document for document in pool}
    for name, method in {"all of the pool": None, **_METHODS}.items():
        if arguments.methods and name not in arguments.methods:
            continue
        ids = list(documents)
        if method is not None:
            ids = list(dict.fromkeys(e.document for e in client.select(queries, arguments.budget, **method).examples))
        losses = []
        for seed in range(arguments.seeds):
            model = GPT2LMHeadModel.from_pretrained(arguments.work / "base")
            train(model, tokenizer, [documents[id]["text"] for id in ids], arguments.steps, 10 + seed)
            losses.append(loss(model, tokenizer, measured))
        part = np.mean([documents[id]["source"] == "gsm8k" for id in ids])
        print(f"| {name} | {len(ids):,} | {part:.0%} | {np.mean(losses):.3f} | {min(losses):.3f} to {max(losses):.3f} |", flush=True)


if __name__ == "__main__":
    main()
