"""Ranks of training documents asked for in other words: the planted documents of paraphrases.jsonl, by a paraphrase and in German.

    python benchmarks/component_table.py PACK --indexes indexes
    python benchmarks/planted.py PACK --indexes indexes [--write docs/components.md]

The pack is of documents drawn by `benchmarks/pretrained_pack.py documents`. A query is the loss of a whole text. The table says of how many
planted documents, asked in their own words, by the paraphrase, or by the translation, the document is the first of all training documents,
and of how many it is among the first ten. A line for cosines follows where they find other numbers.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from component_table import LINES, index_path
from pages import write_between
from wherefrom import Client, Query
from wherefrom.evaluation.baselines import content_baselines, hidden_baseline

_MARKS = "<!-- planted: benchmarks/planted.py -->", "<!-- end of planted -->"
_PLANTED = Path(__file__).with_name("paraphrases.jsonl")
_WORDINGS = {"text": "its own words", "paraphrase": "a paraphrase", "german": "a translation"}
_BASELINES = {"chars": "TF-IDF of character 3- to 5-grams", "bm25": "BM25", "hidden": "mean hidden states, cosine"}
_MODES = "influence", "cosine"


def ranks(scores, rows):
    """Rank of each query's own document, from 1, by scores [documents, queries]."""
    own = scores[rows, np.arange(len(rows))]
    return 1 + (scores > own).sum(axis=0)


def cells(by_wording):
    """Of each wording: documents that are first, documents that are among the first ten."""
    return " | ".join(f"{(by_wording[wording] == 1).sum()}, {(by_wording[wording] <= 10).sum()}" for wording in _WORDINGS)


def table(pack, indexes):
    """Markdown lines of a pack."""
    planted = [json.loads(line) for line in _PLANTED.read_text().splitlines()]
    lines = [f"| {pack.name} | score | " + " | ".join(_WORDINGS.values()) + " |", "|---|---|---|---|---|"]
    client = None
    for name in LINES:
        if not index_path(indexes, pack, name).is_dir():
            print(f"{pack.name}: no index of {name}")
            continue
        client = Client(index_path(indexes, pack, name))
        ids = [client.index.example(row).id for row in range(len(client.index))]
        rows = np.array([ids.index(document["id"]) for document in planted])
        asked = {wording: [Query(text=document[wording]) for document in planted] for wording in _WORDINGS}
        found = {mode: {w: ranks(client.scores(q, mode=mode).T, rows) for w, q in asked.items()} for mode in _MODES}
        for mode in _MODES:
            if mode == _MODES[0] or cells(found[mode]) != cells(found[_MODES[0]]):
                lines.append(f"| {name} | {mode} | {cells(found[mode])} |")
        print(lines[-1], flush=True)
    train = [client.index.example(row) for row in range(len(client.index))]
    by_baseline = {baseline: {} for baseline in _BASELINES}
    for wording in _WORDINGS:
        asked = client.query_examples([Query(text=document[wording]) for document in planted])
        scores = content_baselines(train, asked)
        scores["hidden"] = hidden_baseline(client.recorded.task, client.encoder.model, train, asked, client.encoder.settings.batch_tokens)
        for baseline, found in by_baseline.items():
            found[wording] = ranks(scores[baseline], rows)
    lines += [f"| {title} | | {cells(by_baseline[baseline])} |" for baseline, title in _BASELINES.items()]
    return [*lines, "", f"{len(planted)} planted documents among {len(train)}.", ""]


def main():
    """Ask, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", nargs="+", type=Path)
    parser.add_argument("--indexes", type=Path, required=True)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    text = "\n".join(line for pack in args.packs for line in table(pack, args.indexes))
    print(text)
    if args.write:
        write_between(args.write, _MARKS, text)


if __name__ == "__main__":
    main()
