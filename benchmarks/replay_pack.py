"""A recorded training run and ground truth from the same run, repeated without some examples: what exact replay is worth.

    python benchmarks/llama_pack.py prepare --data corpus.jsonl --out llama
    python benchmarks/replay_pack.py record --base llama --out run
    wherefrom pack --train wherefrom.evaluation.replay:retrain --model run --data llama/train.jsonl --queries llama/query.jsonl \\
        --out pack90 --subsets 40 --fraction 0.9
    python benchmarks/replay_pack.py judge --run run --pack pack90 --pack pack50 --scores replay.npy --results replay.json \\
        --write docs/replay.md

`record` fine-tunes the base model of llama_pack.py with AdamW for three epochs, and saves each with the optimizer's moments in
`<run>-checkpoints`. A subset of the pack keeps the run's order, learning rates
and denominators; what it leaves out has a weight of 0 (the protocol of MAGIC, arXiv 2503.13751). `judge` replays the pack's queries and
judges them, indexes of several sizes, and the baselines, by their LDS. pack50 is made as pack90, of halves.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from pages import write_between
from wherefrom import TrainingRecorder
from wherefrom.evaluation.judge import judge_index, judge_scores
from wherefrom.evaluation.packs import read_pack
from wherefrom.evaluation.replay import match_rows, replay_examples
from wherefrom.indexer.models import ModelSource
from wherefrom.indexer.moments import save_moments
from wherefrom.indexer.tasks import CausalLM
from wherefrom.indexer.trained import RECORD
from wherefrom.ray_jobs.progress import Console
from wherefrom.store.corpus import read_corpus, usable
from wherefrom.store.fields import Fields
from whole_layers import judge as judge_whole_layers

_TOKENS = 128
_EKFAC = {"components": ("blocks",), "rank": 128, "projection": "pca", "curvature": "ekfac", "labels": "sampled", "row_dtype": "float16"}
_INDEXES = {
    "index, 800 bytes": {"bytes_per_example": 800},
    "index, 2,400 bytes": {"bytes_per_example": 2400},
    "index, 10,000 bytes": {"bytes_per_example": 10000},
    "index of the blocks, EK-FAC": _EKFAC,
    "index of the blocks, LoGra of rank 16": {"components": ("blocks",), "rank": 16},
}
_WHOLE = "the 800 bytes, reranked with whole layers"
_BASELINES = ("chars", "bm25", "hidden")
_MARKS = "<!-- replay: benchmarks/replay_pack.py -->", "<!-- end of replay -->"
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
    rates: list[list[float]] = []
    checkpoints: list[dict[str, object]] = []
    with TrainingRecorder(out, model, optimizer, tokenizer=tokenizer, clip_norm=1.0) as recorder:
        for epoch in range(1, epochs + 1):
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
                rates.append([len(rates) + 1, schedule.get_last_lr()[0]])
                schedule.step()
            place = out.with_name(f"{out.name}-checkpoints") / f"epoch-{epoch}"
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
            save_moments(model, optimizer, place)
            checkpoints.append({"step": len(rates), "path": place.name})
    record = {"trained": None, "checkpoints": checkpoints, "rates": rates}
    (place.parent / RECORD).write_text(json.dumps(record))


def replay_scores(run, pack, file):
    """Replay a pack's queries, and keep the scores [examples, queries]."""
    converter = CausalLM().converter(ModelSource(str(run)), pack.build["max_tokens"], "truncate", pack.build["append_eos"])
    train, queries = (list(usable(converter.documents(documents))) for documents in (pack.train, pack.queries))
    with Console() as reporter:
        replayed = replay_examples(run, queries, reporter)
    pairs = match_rows(train, replayed.examples)
    assert [row for row, _ in pairs] == list(range(len(train)))
    np.save(file, replayed.scores[:, [number for _, number in pairs]].T)
    print(f"the repeated run ends {replayed.difference:.2e} of its way from the recorded end", flush=True)


def judge(run, packs, scores, results, write):
    """Judge the replay's scores, indexes and baselines on packs of the same run."""
    known = json.loads(results.read_text()) if results.exists() else {}
    if not scores.exists():
        replay_scores(run, read_pack(packs[0]), scores)
    for pack in packs:
        lines = known.setdefault(pack.name, {})
        for name, options in ({"replay": None} | _INDEXES).items():
            if name not in lines:
                judgement = judge_scores(pack, scores) if options is None else judge_index(pack, options, baselines=False)
                result = judgement.to_dict()
                lines[name] = {key: result[key] for key in ("lds", "low", "high", "bytes_per_example")}
                if options is None:
                    lines["baselines"] = result["baselines"]
                    lines["about"] = {key: result[key] for key in ("examples", "queries", "subsets")}
                    lines["about"]["kept"] = float(read_pack(pack).masks.mean())
                results.write_text(json.dumps(known, indent=1))
                print(pack.name, name, lines[name], flush=True)
        if _WHOLE not in lines:
            lines[_WHOLE] = judge_whole_layers(pack, None)["whole layers, reranked"] | {"bytes_per_example": None}
            results.write_text(json.dumps(known, indent=1))
    text = table(known, [pack.name for pack in packs])
    print(text)
    if write:
        write_between(write, _MARKS, text)


def table(known, packs):
    """Markdown: a line for each method, a column for each pack."""
    about = known[packs[0]]["about"]
    kept = [f"{known[pack]['about']['kept']:.0%} of the examples" for pack in packs]
    subsets = ", ".join(str(known[pack]["about"]["subsets"]) for pack in packs)
    lines = [f"{about['examples']:,} examples, {about['queries']} queries; {subsets} subsets; LDS with its 95 % interval.", ""]
    lines += ["| | bytes an example | " + " | ".join(f"subsets of {k}" for k in kept) + " |", "|---|---|" + "---|" * len(packs)]

    def cells(found):
        return " | ".join(f"{f['lds']:.3f} ({f['low']:.3f} to {f['high']:.3f})" for f in found)

    for name in ("replay", _WHOLE, *_INDEXES):
        found = [known[pack][name] for pack in packs]
        size = "" if found[0]["bytes_per_example"] is None else f"{found[0]['bytes_per_example']:,.0f}"
        lines.append(f"| {name} | {size} | {cells(found)} |")
    for name in _BASELINES:
        lines.append(f"| baseline: {name} | | {cells([known[pack]['baselines'][name] for pack in packs])} |")
    return "\n".join(lines)


def main():
    """Record a run, or judge its replay and indexes of its model."""
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
    command.add_argument("--pack", required=True, type=Path, dest="packs", action="append")
    command.add_argument("--scores", required=True, type=Path, help="the replay's, as .npy; computed if it is missing")
    command.add_argument("--results", required=True, type=Path, help="finished lines, as JSON")
    command.add_argument("--write", type=Path)
    command.set_defaults(run=lambda directory, **options: judge(directory, **options))
    options = vars(parser.parse_args())
    options.pop("run")(**options)


if __name__ == "__main__":
    main()
