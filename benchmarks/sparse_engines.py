"""Speed of the search of sparse rows, compared with engines for learned sparse retrieval, over the same tokens.

    pip install bmp pyseismic-lsr
    python benchmarks/sparse_engines.py --index grown/1048576 [--rows 262144] [--count 60] [--rounds 5] [--json]

The rows are those of an index grown by benchmarks/index_scale.py: the tokens of the first sparse component. The engines hold one number
for each token of a document: the length of its vector, in BMP rounded to 5 bits; a query has the lengths of its vectors. Wherefrom holds a
code of 64 bits and a factor, and a query has a vector for each token: it scores whether a token pushed the model the same way, and finds
the worst rows beside the best, which bounds on sums of positive numbers cannot. So times are compared, and not answers.

Engines take turns, query by query, with one thread each, top 10. BMP (block-max pruning) is exact with alpha 1; Seismic is approximate.
Given are medians over queries of each round, as ratios to Wherefrom's in that round, with their spread, and bytes a document.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")

import numpy as np
from wherefrom import Client, Query
from wherefrom.query.metric import Metric
from wherefrom.query.parts import Part, Search
from wherefrom.store.index import Index

_K = 10
_LEVELS = 31  # sums of more overflow in BMP 0.2.8


def documents(index, component, groups):
    """Yield row, tokens and lengths of each row of some groups of shards."""
    for group in groups:
        for shard in group.shards:
            rows = index.rows(shard, component)
            keys, _, factors = rows.entries(0, shard.rows)
            indptr = rows.indptr.astype(np.int64)
            for i in range(shard.rows):
                own = slice(indptr[i], indptr[i + 1])
                yield shard.first + i, keys[own].tolist(), factors[own]


def bmp_engine(index, component, groups, folder, largest):
    """BMP's searcher of a function from tokens and lengths."""
    from bmp import Indexer, Searcher

    path = str(folder / "bmp")
    indexer = Indexer(path, bsize=32, compress_range=False)
    for row, tokens, lengths in documents(index, component, groups):
        levels = np.clip(np.rint(lengths / largest * _LEVELS), 1, _LEVELS).astype(int).tolist()
        indexer.add_document(str(row), dict(zip(map(str, tokens), levels, strict=True)))
    indexer.finish()
    searcher = Searcher(path)
    size = sum(p.stat().st_size for p in folder.rglob("bmp*") if p.is_file())
    return (lambda query: searcher.search(query, k=_K, alpha=1.0, beta=1.0)), size


def seismic_engine(index, component, groups, folder, largest):
    """Seismic's searcher of a function from tokens and lengths."""
    from seismic import SeismicDataset, SeismicIndex, get_seismic_string

    kind = get_seismic_string()
    dataset = SeismicDataset()
    for row, tokens, lengths in documents(index, component, groups):
        dataset.add_document(str(row), np.array(list(map(str, tokens)), dtype=kind), lengths.astype(np.float32))
    engine = SeismicIndex.build_from_dataset(dataset)

    def search(query):
        tokens, lengths = np.array(list(query), dtype=kind), np.array(list(query.values()), np.float32)
        return engine.search("0", tokens, lengths, k=_K, query_cut=len(query), heap_factor=0.9)

    return search, 0


def answered(engines, query):
    """True if all engines answer a query; BMP 0.2.8 panics at some."""
    try:
        for engine in engines.values():
            engine(query)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return False
    return True


def clock(part, asked, engines, rounds):
    """Medians over queries of each engine's seconds, by round; a round before these is not counted."""
    medians = {name: [] for name in ("wherefrom", *engines)}
    for number in range(rounds + 1):
        seconds = {name: [] for name in medians}
        for search, query in asked:
            part.scorer(search)
            started = time.perf_counter()
            part.scan(search, _K)
            seconds["wherefrom"].append(time.perf_counter() - started)
            for name, engine in engines.items():
                started = time.perf_counter()
                engine(query)
                seconds[name].append(time.perf_counter() - started)
        for name, own in seconds.items():
            medians[name] += [statistics.median(own)] if number else []
    return medians


def main():
    """Build, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    index = Index(args.index)
    component = next(c for c in index.manifest.components if not c.has_wide_rows)
    groups = [group for group in index.groups if group.first + group.rows <= args.rows]
    part = Part(index, range(len(groups)), threads=1)
    generator = np.random.default_rng(0)
    client = Client(index)
    weights = {c.name: float(c.name == component.name) for c in index.manifest.components}
    metric = Metric(weights=weights)
    searches, queries = [], []
    for row in generator.choice(groups[-1].first + groups[-1].rows, args.count, replace=False):
        rows = client.encode([Query(row=int(row))])
        searches.append(Search(rows, metric, {}))
        vectors = rows[component.name]
        lengths = np.linalg.norm(vectors.vectors, axis=1)
        queries.append(dict(zip(map(str, vectors.keys.tolist()), (lengths / lengths.max() * 100).tolist(), strict=True)))
    largest = max(float(lengths.max(initial=0)) for _, _, lengths in documents(index, component, groups[:1]))
    report = {"rows": sum(group.rows for group in groups), "ratios": {}, "bytes_a_row": {}}
    with tempfile.TemporaryDirectory() as place:
        engines = {}
        for name, make in (("bmp", bmp_engine), ("seismic", seismic_engine)):
            try:
                engines[name], size = make(index, component, groups, Path(place), largest)
            except ImportError as error:
                print(f"{name} is left out: {error}")
                continue
            report["bytes_a_row"][name] = round(size / report["rows"], 1)
        lists = [index.search_arrays(group, component) for group in groups]
        ours = sum(own.codes.nbytes + own.factors.nbytes + own.rows.nbytes for own in lists)
        report["bytes_a_row"]["wherefrom"] = round(ours / report["rows"], 1)
        asked = [(search, query) for search, query in zip(searches, queries, strict=True) if answered(engines, query)]
        report["queries"] = len(asked)
        seconds = clock(part, asked, engines, args.rounds)
    ratios = {name: [own / other for own, other in zip(seconds[name], seconds["wherefrom"], strict=True)] for name in engines}
    milliseconds = [1e9 * median / report["rows"] for median in seconds["wherefrom"]]
    report["wherefrom_ms_a_million"] = [round(m, 2) for m in sorted(milliseconds)]
    report["ratios"] = {name: [round(r, 3) for r in sorted(own)] for name, own in ratios.items()}
    print(json.dumps(report) if args.json else "\n".join(f"{name}: {value}" for name, value in report.items()))


if __name__ == "__main__":
    main()
