"""Speed of the search of dense rows grown from real ones: exact, by quantized scan and rescore, and by FAISS indexes of the same rows.

    wherefrom build --model MODEL_DIR --data corpus.jsonl --out dense.wherefrom -o rank=16
    python benchmarks/dense_search.py --index dense.wherefrom --queries queries.jsonl --rows 1000000
    python benchmarks/dense_search.py --index dense.wherefrom --queries queries.jsonl --rows 1000000 --coordinates 512 \\
        --faiss SQ8 --faiss "HNSW32_SQ8 efSearch=64 efSearch=256" --faiss "IVF4096_HNSW32,SQ8 nprobe=16 nprobe=64"

Real rows are searched as they are. For more, real rows and queries are folded to `--coordinates`; a grown row's direction is nine parts
of one real row's and four of another's, its length the first one's, stored in int8; quantiles of the queries' cosines with real and with
grown rows stand side by side in the output. Each search runs in a process of its own: queries one at a time, top 10 proponents and
opponents, all cores; wall time, how many of the exact scan's top 10 are found, rows read, and memory (that of this process alone, and that
of the files that it maps). FAISS finds candidates as `query --engine faiss` does, opponents by the negated query, and they are scored
again from the stored rows; each index is searched with each of the parameters that follow its factory.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from growing import grow as grow_index
from wherefrom import Client
from wherefrom.indexer.models import configure_memory
from wherefrom.query.faiss_index import make_faiss
from wherefrom.query.files import read_queries
from wherefrom.query.metric import Metric
from wherefrom.query.parts import Search, WholeIndex
from wherefrom.query.search import find, find_by_faiss
from wherefrom.ray_jobs.progress import Silent
from wherefrom.store.bits import fold
from wherefrom.store.dense import encode_dense, row_bytes
from wherefrom.store.errors import UsageError
from wherefrom.store.index import Index
from wherefrom.store.manifest import Layer
from wherefrom.store.vectors import DenseVectors

_K = 10
_RECALLS = (1.0, 0.9, 0.99, 0.999)


def folded(rows, coordinates):
    """Rows in so many coordinates."""
    return fold(rows.astype(np.float32), coordinates, 0)


def grow(index, rows, coordinates, out):
    """An index of so many rows like those of `index`, at `out`."""
    (component,) = index.manifest.components
    real = []
    for shard in index.shards:
        stored = index.rows(shard, component)
        real += [
            folded(stored.values(codes) * stored.factors()[first : first + len(codes), None], coordinates)
            for first, codes in stored.blocks()
        ]
    real = np.concatenate(real)
    norms = index.norms(component)
    sizes = dict(outputs=1, inputs=coordinates, output_rank=1, input_rank=coordinates, input_group="all", offset=0, curvature="identity")
    grown = component.model_copy(update={"layers": (Layer(name="all", **sizes),), "dtype": "int8"})

    def sample(generator, count):
        one, other = generator.integers(0, len(real), (2, count))
        made = 0.9 * real[one] + 0.4 * real[other]
        made *= (norms[one] / np.linalg.norm(made, axis=1))[:, None]
        return {grown.name: encode_dense(made, "int8")}

    return grow_index(index, out, (grown,), rows, sample), real


def cosines(queries, rows):
    """Quantiles of cosines."""
    directions = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, rows)]
    return [round(float(q), 4) for q in np.quantile(directions[0] @ directions[1].T, (0.01, 0.5, 0.99, 0.999, 0.9999))]


def memory():
    """This process's own memory and that of the files it maps, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) >> 10 for line in lines if line.startswith("Rss")}
    return {"own_mib": found["RssAnon"], "mapped_mib": found["RssFile"]}


def measure(place, queries, recall, repeats):
    """Search with one recall; prints a line of JSON and keeps what was found beside the queries."""
    configure_memory()
    index, asked = Index(place), np.load(queries)
    (component,) = index.manifest.components
    parts = [{component.name: DenseVectors(row[None])} for row in asked]
    whole = WholeIndex(index)
    for part in parts[:2]:
        find(whole, Search(part, Metric(), {}), 1, _K, recall)
    seconds, hits = [], []
    for part in parts * repeats:
        started = time.perf_counter()
        hits += find(whole, Search(part, Metric(), {}), 1, _K, recall).hits
        seconds.append(time.perf_counter() - started)
    found = np.stack([np.concatenate([h.proponents, h.opponents]) for h in hits[: len(parts)]])
    kept = queries.with_name(f"{place.name}-exact.npy")
    if recall == 1:
        np.save(kept, found)
    right = [len(set(a) & set(b)) / len(a) for a, b in zip(np.load(kept).tolist(), found.tolist(), strict=True)]
    stored = len(index) * row_bytes(index.manifest.components[0].stored, index.manifest.components[0].dtype)
    beside = sum(p.stat().st_size for p in (place / "search").rglob("*") if p.is_file())
    times = queries.with_name(f"{place.name}-times.json")
    known = (json.loads(times.read_text()) if times.exists() else {}) | {str(recall): float(np.median(seconds))}
    times.write_text(json.dumps(known))
    return {
        "rows": len(index),
        "recall_asked": recall,
        "exact_takes_times": round(known["1.0"] / known[str(recall)], 2),
        "recall_certified": min(h.recall for h in hits),
        "recall_found": round(float(np.mean(right)), 4),
        **milliseconds(seconds),
        "read_median": int(np.median([h.candidates for h in hits])),
        "gigabytes_a_second": round((stored if recall == 1 else beside) / np.median(seconds) / 1e9, 1),
        "row_bytes": round(stored / len(index)),
        "code_bytes_a_row": round(beside / len(index)),
        **memory(),
    }


def milliseconds(seconds):
    """Median and 95th percentile."""
    return {"p50_ms": round(float(np.median(seconds)) * 1e3, 2), "p95_ms": round(float(np.quantile(seconds, 0.95)) * 1e3, 2)}


def _values(rows):
    """A shard's rows of a dense component, as float32."""
    return np.concatenate([rows.values(codes) for _, codes in rows.blocks()]) * (rows.factors() * rows.norms)[:, None]


def compare(place, queries, factory, settings):
    """Make a FAISS index and search with each setting: a line of JSON for each."""
    configure_memory()
    index, asked = Index(place), np.load(queries)
    (component,) = index.manifest.components
    exact = np.load(queries.with_name(f"{place.name}-exact.npy"))
    exact_seconds = json.loads(queries.with_name(f"{place.name}-times.json").read_text())["1.0"]
    parts = [{component.name: DenseVectors(row[None])} for row in asked]
    started = time.perf_counter()
    record = make_faiss(index, factory, "", component.name, Silent())
    built = time.perf_counter() - started
    whole = WholeIndex(index)
    for setting in settings or [""]:
        used = record.model_copy(update={"parameters": setting})
        (place / "faiss" / f"{component.name}.json").write_text(used.model_dump_json())
        find_by_faiss(whole, Search(parts[0], Metric(), {}), _K)
        hits, seconds = [], []
        for part in parts:
            started = time.perf_counter()
            hits += find_by_faiss(whole, Search(part, Metric(), {}), _K).hits
            seconds.append(time.perf_counter() - started)
        shares = {"proponents_found": [], "opponents_found": []}
        for right, hit in zip(exact.tolist(), hits, strict=True):
            shares["proponents_found"].append(len(set(right[:_K]) & set(hit.proponents.tolist())) / _K)
            shares["opponents_found"].append(len(set(right[_K:]) & set(hit.opponents.tolist())) / _K)
        about = {
            "faiss": f"{factory} {setting}".strip(),
            "rows": len(index),
            "takes_times_exact": round(float(np.median(seconds)) / exact_seconds, 2),
            **{name: round(float(np.mean(values)), 3) for name, values in shares.items()},
            **milliseconds(seconds),
        }
        size = record.file.bytes / len(index)
        print(json.dumps({**about, "bytes_a_row": round(size), "build_seconds": round(built), **memory()}), flush=True)


def main():
    """Grow, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--coordinates", type=int, default=4096)
    parser.add_argument("--faiss", action="append", default=[], help="a factory string, and parameters of its searches to try")
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where rows are grown, and found again the next time")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--recall", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        if args.recall is None:
            factory, *settings = args.faiss[0].split()
            compare(args.measure, args.queries, factory, settings)
        else:
            print(json.dumps(measure(args.measure, args.queries, args.recall, args.repeats)), flush=True)
        return
    client = Client(args.index)
    queries = []
    for query in read_queries(args.queries):
        try:
            client.query_examples([query])
            queries.append(query)
        except UsageError:  # longer than the model's context
            continue
    scratch = args.scratch or Path(tempfile.mkdtemp(dir=args.index.parent))
    (component,) = client.index.manifest.components
    asked = folded(client.encode(queries[: args.count])[component.name].values, args.coordinates)
    scratch.mkdir(exist_ok=True)
    np.save(scratch / "queries.npy", asked)
    np.save(scratch / "whole.npy", client.encode(queries[: args.count])[component.name].values)
    client.index.reindex()
    again = [sys.executable, __file__, "--repeats", str(args.repeats), "--queries"]
    for recall in _RECALLS:
        subprocess.run([*again, str(scratch / "whole.npy"), "--measure", str(args.index), "--recall", str(recall)], check=True)
    again.append(str(scratch / "queries.npy"))
    place = scratch / str(args.rows)
    if not place.exists():
        grown, real = grow(client.index, args.rows, args.coordinates, place)
        first = _values(grown.rows(grown.shards[0], grown.manifest.components[0]))
        print(json.dumps({"real": cosines(asked, real), "grown": cosines(asked, first)}), flush=True)
    for recall in _RECALLS:
        subprocess.run([*again, "--measure", str(place), "--recall", str(recall)], check=True)
    for factory in args.faiss:
        subprocess.run([*again, "--measure", str(place), "--faiss", factory], check=True)
    if args.scratch is None:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
