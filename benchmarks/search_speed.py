"""Speed of an exact search of sparse rows, on an index of real rows and on one grown from it.

    wherefrom build --model MODEL_DIR --data corpus.jsonl --out full.wherefrom
    python benchmarks/search_speed.py --index full.wherefrom --queries queries.jsonl [--rows 1000000]
    python benchmarks/search_speed.py --grown grown/1048576 grown/9961472

Grown rows have the tokens and lengths of real rows drawn at random, with a quarter of their bits flipped, so that the tokens' distribution
is the real one and hardly two rows are alike. Prints, for the top 10 proponents and opponents of real queries
asked one at a time: wall time (median and 95th percentile), postings touched, bytes of posting lists, memory; and the wall time of a whole
process that asks for one row of the real index. `--grown` searches indexes that are there (of benchmarks/index_scale.py) by rows of their
own, with one thread and with two in turns: the search alone, and with 10 proponents and opponents and their texts.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from growing import grow, sparse_sampler
from wherefrom import Client, Query
from wherefrom.query.files import read_queries
from wherefrom.query.metric import Metric
from wherefrom.query.parts import Part, Search, WholeIndex
from wherefrom.query.search import find
from wherefrom.store.errors import UsageError
from wherefrom.store.index import Index


def measure(index, asked, repeats):
    """Wall times and postings of every query, asked alone."""
    names = [s.name for s in index.manifest.components]
    count = len(asked[names[0]])
    parts = [{name: rows.slice(i, i + 1) for name, rows in asked.items()} for i in range(count)]
    whole = WholeIndex(index)
    for part in parts[:3]:
        find(whole, Search(part, Metric(), {}), 1, 10, 1.0)
    seconds, touched = [], []
    for part in parts * repeats:
        started = time.perf_counter()
        find(whole, Search(part, Metric(), {}), 1, 10, 1.0)
        seconds.append(time.perf_counter() - started)
    for part in parts:
        total = 0
        for s in index.manifest.components:
            for group in index.groups:
                lists = index.search_arrays(group, s)
                at = np.flatnonzero(np.isin(lists.tokens, part[s.name].keys))
                total += int((lists.starts[at + 1] - lists.starts[at]).sum())
        touched.append(total)
    entries = sum(len(index.search_arrays(group, s).rows) for group in index.groups for s in index.manifest.components)
    lists = sum(p.stat().st_size for p in (index.path / "search").rglob("*") if p.is_file())
    return {
        "rows": len(index),
        "median_ms": round(float(np.median(seconds)) * 1e3, 2),
        "p95_ms": round(float(np.quantile(seconds, 0.95)) * 1e3, 2),
        "postings_touched": int(np.median(touched)),
        "of_all": round(float(np.median(touched)) / entries, 4),
        "ns_a_posting": round(float(np.median(seconds)) / max(1, np.median(touched)) * 1e9, 2),
        "list_bytes_a_row": round(lists / len(index), 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def by_rows(path, count, rounds):
    """Milliseconds of searches by row, and of whole answers, as median and 95th percentile of all rounds but the first."""
    index = Index(path)
    client = Client(index)
    queries = [Query(row=int(row)) for row in np.random.default_rng(0).choice(len(index), count, replace=False)]
    searches = [Search(client.encode([query]), Metric(), {}) for query in queries]
    parts = {threads: Part(index, threads=threads) for threads in (1, 2)}
    seconds = {"1 thread": [], "2 threads": [], "answers": []}
    for number in range(rounds + 1):
        for search, query in zip(searches, queries, strict=True):
            for threads, part in parts.items():
                part.scorer(search)
                started = time.perf_counter()
                part.scan(search, 10)
                seconds["1 thread" if threads == 1 else "2 threads"].append(time.perf_counter() - started)
            started = time.perf_counter()
            client.query_many([query], k=10, rerank=0)
            seconds["answers"].append(time.perf_counter() - started)
        if number == 0:
            seconds = {name: [] for name in seconds}
    quantiles = {name: [round(float(np.quantile(own, q)) * 1e3, 2) for q in (0.5, 0.95)] for name, own in seconds.items()}
    return {"rows": len(index), "group_rows": index.manifest.group_rows, **quantiles}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path)
    parser.add_argument("--queries")
    parser.add_argument("--grown", type=Path, nargs="*", default=[])
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for path in args.grown:
        print(json.dumps(by_rows(path, args.count, args.repeats)), flush=True)
    if args.grown:
        return
    client = Client(args.index)
    queries = []
    for query in read_queries(args.queries):
        try:
            client.query_examples([query])
            queries.append(query)
        except UsageError:  # longer than the model's context
            continue
    asked = client.encode(queries[: args.count])
    whole = [sys.executable, "-c", "from wherefrom.cli import main; main()", "query", str(args.index), "--row", "1", "--json"]
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run(whole, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"process_seconds": [round(s, 3) for s in sorted(seconds)]}))
    client.index.reindex()
    print(json.dumps(measure(client.index, asked, args.repeats)))
    for rows in args.rows:
        place = Path(tempfile.mkdtemp(dir=args.index.parent))
        try:
            print(
                json.dumps(
                    measure(
                        grow(client.index, place, client.index.manifest.components, rows, sparse_sampler(client.index)), asked, args.repeats
                    )
                ),
                flush=True,
            )
        finally:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
