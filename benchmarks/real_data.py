"""Does an index of real data answer as it must? Training documents asked back, and queries of one source.

    wherefrom build --model MODEL_DIR --data corpus.jsonl --out full.wherefrom --workers 2
    python benchmarks/real_data.py --index full.wherefrom --queries gsm8k-questions.jsonl --source gsm8k

Prints how many of the sampled training examples find themselves (or an exact copy, where the corpus has one) first in cosine mode when
their text is asked, and the share of the
queries' top 10 that comes from the expected source, in both modes.
"""

import argparse
import json

import numpy as np
from wherefrom import Client, Query
from wherefrom.query.files import read_queries
from wherefrom.store.errors import UsageError


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True)
    parser.add_argument("--queries", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--count", type=int, default=100, help="queries asked")
    args = parser.parse_args()
    client = Client(args.index)
    rows = np.sort(np.random.default_rng(0).choice(len(client.index), args.sample, replace=False)).tolist()
    answers = client.query_many([Query(text=client.index.example(r).text) for r in rows], k=1, mode="cosine", rerank=0)
    first = [(client.index.example(r), a.proponents[0]) for r, a in zip(rows, answers, strict=True)]
    missed = [e.id for e, found in first if found.text != e.text]
    copies = [e.id for e, found in first if found.text == e.text and found.id != e.id]
    result = {"index": args.index, "rows": len(client.index), "asked_back": len(rows), "found_first": len(rows) - len(missed)}
    result |= {"missed": missed, "found_as_exact_copy": copies}
    for mode in ("influence", "cosine"):
        found, asked, too_long = [], 0, 0
        for query in read_queries(args.queries):
            if asked == args.count:
                break
            try:
                found += [a.source for a in client.query(query, k=10, mode=mode, rerank=0).proponents]
                asked += 1
            except UsageError:  # longer than the model's context
                too_long += 1
        result |= {"queries": asked, "queries_too_long": too_long}
        result[f"top10_from_{args.source}_{mode}"] = found.count(args.source) / len(found)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
