"""Requests and bytes that a query fetches from an object store whose index was not read before.

    python benchmarks/cold_query.py --index grown/9961472 [--count 12] [--group-rows 262144] [--json]

The index is opened as a store (`file://`, by obstore's local store), so that requests and bytes are those of any store. For rows drawn at
random, each in a process with an empty cache: requests and bytes of a query by row, with its 10 proponents and 10 opponents; the same
again, when all that is needed is there; and, for the posting lists alone, what an exact search could leave out at best: with the true score
of the tenth row known beforehand, lists are left out as long as the sum of their bounds (the largest factor of the list times the sum of
the query's absolute coordinates) is below it. For proponents alone, and for both sides.

With `--group-rows`, all of it is measured on a copy of the index with search groups of that many rows (its shards are hard links),
which is removed at the end.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from wherefrom import Client, Query
from wherefrom.query.metric import Metric
from wherefrom.query.scoring import Scorer
from wherefrom.store.index import Index
from wherefrom.store.shard import publish_index

_K = 10
_ONE = """
import json, sys
from wherefrom import Client
from wherefrom.store.objects import TRAFFIC
client = Client(sys.argv[1])
opened = TRAFFIC.requests, TRAFFIC.fetched
client.query(row=int(sys.argv[2]), k=10)
print(json.dumps({"open": opened, "all": (TRAFFIC.requests, TRAFFIC.fetched)}))
"""


def regrouped(index, copy, group_rows):
    """A copy of an index with search groups of another size; it shares the files of its shards by hard links."""
    shutil.copytree(index, copy, copy_function=os.link, ignore=shutil.ignore_patterns("search", "manifests"))
    source = Index(index)
    publish_index(copy, source.shards, source.deleted, {**dict(source.manifest), "number": 1, "group_rows": group_rows})
    Index(copy).reindex()
    return copy


def fetched(index, row, cache):
    """Requests and bytes of one process."""
    environment = {**os.environ, "WHEREFROM_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", _ONE, f"file://{index}", str(row)], check=True, capture_output=True, text=True, env=environment
    )
    return json.loads(done.stdout)


def bounds(index, row):
    """Bytes of the posting lists of a query: all, and those that bounds cannot exclude, for proponents and for both sides."""
    scorer = Scorer.of(index, Client(index).encode([Query(row=row)]), Metric())
    scores = np.concatenate([scorer.scores(group)[0] for group in index.groups])
    best, worst = np.partition(scores, -_K)[-_K], -np.partition(scores, _K - 1)[_K - 1]
    sizes, limits = [], []
    for operand in scorer.operands:
        lengths = operand.tables.max(-1).sum(-1)
        for entry, token in enumerate(operand.keys):
            size, largest = 0, 0.0
            for group in index.groups:
                lists = index.search_arrays(group, operand.component)
                number = int(np.searchsorted(lists.tokens, token))
                if number < len(lists.tokens) and lists.tokens[number] == token:
                    own = slice(lists.starts[number], lists.starts[number + 1])
                    size += lists.codes[own].nbytes + lists.factors[own].nbytes + lists.rows[own].nbytes
                    largest = max(largest, float(lists.factors[own].max(initial=0)))
            sizes.append(size)
            limits.append(largest * lengths[entry])
    sizes, limits = np.array(sizes), np.array(limits)
    order = np.argsort(-sizes / np.maximum(limits, 1e-30))
    left_out = np.cumsum(limits[order])
    return [int(sizes.sum())] + [int(sizes.sum() - sizes[order[left_out < score]].sum()) for score in (best, min(best, worst))]


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, type=Path)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--group-rows", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    place = args.index.resolve()
    with tempfile.TemporaryDirectory(dir=place.parent) as own:
        if args.group_rows is not None:
            place = regrouped(place, Path(own) / "copy", args.group_rows)
        report = measure(place, args.count)
    print(json.dumps(report) if args.json else "\n".join(f"{name}: {value}" for name, value in report.items()))


def measure(place, count):
    """The report for `count` rows of the index in the directory `place`."""
    index = Index(place)
    first, again, lists = [], [], []
    for row in np.random.default_rng(0).choice(len(index), count, replace=False).tolist():
        with tempfile.TemporaryDirectory(dir=place.parent) as cache:
            first.append(fetched(place, row, cache))
            again.append(fetched(place, row, cache))
        lists.append(bounds(index, row))
    median = statistics.median
    return {
        "rows": len(index),
        "requests": [min(f["all"][0] for f in first), median(f["all"][0] for f in first), max(f["all"][0] for f in first)],
        "megabytes": [round(f(x["all"][1] for x in first) / 1e6, 1) for f in (min, median, max)],
        "open_megabytes": round(median(f["open"][1] for f in first) / 1e6, 2),
        "again_megabytes": round(median(f["all"][1] for f in again) / 1e6, 2),
        "lists_megabytes": {
            name: [round(f(own[i] for own in lists) / 1e6, 1) for f in (min, median, max)]
            for i, name in enumerate(("all", "bounds, proponents", "bounds, both sides"))
        },
    }


if __name__ == "__main__":
    main()
