"""How fast is an exact search of sparse rows, on an index of real rows and on one grown from it?

    wherefrom build --model MODEL_DIR --data corpus.jsonl --out full.wherefrom
    python benchmarks/search_speed.py --index full.wherefrom --queries queries.jsonl [--rows 1000000]

Grown rows have the tokens and lengths of real rows drawn at random, with a quarter of their bits flipped, so that the tokens' distribution
is the real one and hardly two rows are alike; they have no documents. Prints, for the top 10 proponents and opponents of real queries
asked one at a time: wall time (median and 95th percentile), postings touched, bytes of posting lists, memory; and the wall time of a whole
process that asks for one row of the real index.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from functools import partial
from pathlib import Path

import numpy as np
from wherefrom import Client, Query
from wherefrom.query.search import search
from wherefrom.ray_jobs.worker import file_record
from wherefrom.store.corpus import read_queries
from wherefrom.store.errors import UsageError
from wherefrom.store.index import Index
from wherefrom.store.manifest import publish_manifest
from wherefrom.store.rows import write_shard
from wherefrom.store.sparse import Coded, write_sparse

_SHARD_ROWS = 8192
_FLIPPED = 4  # one bit in so many


def grow(index, rows, out):
    """An index of so many rows like those of `index`, at `out`; returns it."""
    generator, shards, components = np.random.default_rng(0), [], index.manifest.components
    real = {s.name: [index.sparse(shard, s) for shard in index.manifest.shards] for s in components}
    arrays = {
        name: {
            "counts": np.concatenate([np.diff(r.indptr) for r in parts]),
            **{array: np.concatenate([getattr(r, array) for r in parts]) for array in ("keys", "codes", "factors", "norms")},
        }
        for name, parts in real.items()
    }
    for first in range(0, rows, _SHARD_ROWS):
        count = min(_SHARD_ROWS, rows - first)
        chosen, writers, id = generator.integers(0, len(index), count), {}, str(uuid.UUID(int=first + 1))
        for s in components:
            own = arrays[s.name]
            starts = np.concatenate([[0], np.cumsum(own["counts"])])
            entries = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])
            flips = generator.integers(0, 256, (len(entries), own["codes"].shape[1]), np.uint8)
            flips &= generator.integers(0, 256, flips.shape, np.uint8)
            norms = own["norms"][chosen]
            coded = Coded(
                own["counts"][chosen],
                own["keys"][entries].astype(np.uint32),
                own["codes"][entries] ^ flips,
                own["factors"][entries],
                norms,
                norms**2,
            )
            writers[s.name] = partial(write_sparse, rows=coded, vocabulary=s.vocabulary, bits=s.bits)
        place = out / "rows" / f"{id}.zarr"
        write_shard(place, writers, {}, {"losses": np.ones(count, np.float32)})
        files = tuple(file_record(out, path) for path in sorted(p for p in place.rglob("*") if p.is_file()))
        shards.append(index.manifest.shards[0].model_copy(update={"id": id, "first": first, "rows": count, "files": files}))
    publish_manifest(out, index.manifest.model_copy(update={"rows": rows, "shards": tuple(shards), "number": 1}))
    Index(out).reindex()
    return Index(out)


def measure(index, asked, repeats):
    """Wall times and postings of every query, asked alone."""
    names = [s.name for s in index.manifest.components]
    count = len(asked[names[0]])
    parts = [{name: rows.part(i, i + 1) for name, rows in asked.items()} for i in range(count)]
    for part in parts[:3]:
        search(index, part, 10)
    seconds, touched = [], []
    for part in parts * repeats:
        started = time.perf_counter()
        search(index, part, 10)
        seconds.append(time.perf_counter() - started)
    for part in parts:
        total = 0
        for s in index.manifest.components:
            for group in index.groups:
                lists = index.postings(group, s)
                at = np.flatnonzero(np.isin(lists.tokens, part[s.name].keys))
                total += int((lists.starts[at + 1] - lists.starts[at]).sum())
        touched.append(total)
    entries = sum(len(index.postings(group, s).rows) for group in index.groups for s in index.manifest.components)
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


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, type=Path)
    parser.add_argument("--queries", required=True)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    client = Client(args.index)
    queries = []
    for record in read_queries(args.queries):
        query = Query(**record)
        try:
            client.examples([query])
            queries.append(query)
        except UsageError:  # longer than the model's context
            continue
    asked = client.rows(queries[: args.count])
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
            print(json.dumps(measure(grow(client.index, rows, place), asked, args.repeats)), flush=True)
        finally:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
