"""Cost and gain of searching an index in parts in Ray actors (`wherefrom serve --ray`).

    python benchmarks/fleet_speed.py --index grown/9961472 [--parts 1 2 4] [--rounds 7] [--serve] [--json]

The same queries by row, alone and 16 together, are asked of one process with one thread and of fleets of one-thread actors, one after the
other in each round; all answers are compared. *load* is the throughput of a fleet that two callers ask at the same time, each 16 queries
together, six times: while one's answers are merged, the actors work for the other. Given are medians of the rounds' ratios to one process
with one thread, which answers the same one after the other, and their spread. *apart* is what two processes that have nothing to do with
each other reach, each with a half of the rows: the time of one after the other over that of both at once. No fleet of two can do better.
*overhead* is the wall time of a query on a fleet of one part, less that in one process with one thread. `--serve` needs the extra
`ray[serve]`: the time of a call of an empty method of an actor, and of a Ray Serve deployment, in turns.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from wherefrom import Client, Query
from wherefrom.query.parts import Part
from wherefrom.ray_jobs.cluster import connected
from wherefrom.ray_jobs.fleet import Fleet, FleetParts
from wherefrom.store.index import Index

_TOGETHER = 16
_CALLERS = 2
_CALLS_OF_EACH = 6
_CALLS = 300


class _OneThread:
    """An index, or a range of its groups, as one part, searched by one thread."""

    def __init__(self, index, groups=None):
        self.index, self.firsts = index, (0,)
        self._part = Part(index, groups, threads=1)

    def call(self, method, search, arguments, partial=False):
        shared = () if search is None else (search,)
        return {number: getattr(self._part, method)(*shared, *own) for number, own in arguments.items()}

    def scorer(self, search):
        return self._part.scorer(search)


def _rows(answers):
    return [[(a.row, a.score) for a in (*answer.proponents, *answer.opponents)] for answer in answers]


def _clock(client, queries):
    started = time.perf_counter()
    answers = client.query_many(queries, k=10, rerank=0)
    return time.perf_counter() - started, answers


def _load(client, queries):
    """Seconds for a call of 16 queries, under load."""
    with ThreadPoolExecutor(_CALLERS) as pool:
        started = time.perf_counter()
        list(pool.map(lambda _: client.query_many(queries, k=10, rerank=0), range(_CALLERS * _CALLS_OF_EACH)))
        return (time.perf_counter() - started) / (_CALLERS * _CALLS_OF_EACH)


def _search_half(path, second, connection):
    """Search a half of the rows whenever told, and tell the seconds; a process of its own."""
    index = Index(path)
    middle = len(index.groups) // 2
    client = Client(index, parts=_OneThread(index, range(middle, 2 * middle) if second else range(middle)))
    queries = _queries(index)
    while True:
        connection.send(_clock(client, queries)[0])
        connection.recv()


def _apart(path, rounds):
    """Ratios of the time of two processes one after the other to that of both at once."""
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for second in (False, True):
        end, other = context.Pipe()
        ends.append(end)
        processes.append(context.Process(target=_search_half, args=(path, second, other), daemon=True))
        processes[-1].start()
        end.recv()  # the first opens files

    def seconds(chosen):
        for end in chosen:
            end.send("again")
        return [end.recv() for end in chosen]

    ratios = [(seconds(ends[:1])[0] + seconds(ends[1:])[0]) / max(seconds(ends)) for _ in range(rounds)]
    for process in processes:
        process.kill()
    return ratios


def _queries(index):
    """Return the queries: rows of the index."""
    return [Query(row=int(row)) for row in np.random.default_rng(0).choice(len(index), _TOGETHER, replace=False)]


def _spread(ratios):
    ordered = sorted(ratios)
    return {"median": round(statistics.median(ordered), 3), "low": round(ordered[0], 3), "high": round(ordered[-1], 3)}


def measure(path, counts, rounds):
    """Ratios of speed by number of parts, for queries alone and together, and the overhead of a fleet in milliseconds."""
    index = Index(path)
    queries = _queries(index)
    single = Client(index, parts=_OneThread(index))
    ratios = {count: {"alone": [], "together": [], "load": []} for count in counts}
    overheads = []
    with connected(None, sum(counts)) as ray:
        fleets = {count: Fleet(ray, index, count, 1, 1) for count in counts}
        for fleet in fleets.values():
            fleet.wait()
        clients = {count: Client(index, parts=FleetParts(fleet, index)) for count, fleet in fleets.items()}
        for number in range(rounds + 1):
            alone, whole = _clock(single, queries[:1])
            together, all_whole = _clock(single, queries)
            for count, client in clients.items():
                seconds, answers = _clock(client, queries[:1])
                many, all_answers = _clock(client, queries)
                loaded = _load(client, queries)
                assert _rows(answers) == _rows(whole)
                assert _rows(all_answers) == _rows(all_whole)
                if number:  # the first round opens files
                    ratios[count]["alone"].append(alone / seconds)
                    ratios[count]["together"].append(together / many)
                    ratios[count]["load"].append(together / loaded)
                    overheads += [1e3 * (seconds - alone)] if count == 1 else []
        for fleet in fleets.values():
            fleet.stop()
    return {
        "rows": len(index),
        "speed": {count: {name: _spread(values) for name, values in own.items()} for count, own in ratios.items()},
        "apart": _spread(_apart(path, rounds)),
        "overhead_ms": _spread(overheads) if overheads else None,
    }


def calls(rounds):
    """Microseconds of an empty call of an actor, and of a Ray Serve deployment."""
    import ray
    from ray import serve

    class Empty:
        def __call__(self):
            return None

        def call(self):
            return None

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    actor = ray.remote(Empty).remote()
    handle = serve.run(serve.deployment(Empty).bind())
    seconds = {"actor": [], "serve": []}
    ways = {"actor": lambda: ray.get(actor.call.remote()), "serve": lambda: handle.remote().result()}
    for _ in range(rounds):
        for name, call in ways.items():
            call()
            started = time.perf_counter()
            for _ in range(_CALLS):
                call()
            seconds[name].append(1e6 * (time.perf_counter() - started) / _CALLS)
    serve.shutdown()
    ray.shutdown()
    ratios = [b / a for a, b in zip(seconds["actor"], seconds["serve"], strict=True)]
    return {name: _spread(values) for name, values in seconds.items()} | {"ratio": _spread(ratios)}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, type=Path)
    parser.add_argument("--parts", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report = measure(args.index, args.parts, args.rounds)
    if args.serve:
        report["calls_us"] = calls(args.rounds)
    if args.json:
        print(json.dumps(report))
        return
    print(f"{report['rows']:,} rows; speed over one process with one thread")
    for count, own in report["speed"].items():
        for name, of in own.items():
            print(f"  {count} parts, {name:8s} {of['median']:.2f} ({of['low']:.2f} to {of['high']:.2f})")
    print("  two processes apart {median:.2f} ({low:.2f} to {high:.2f})".format(**report["apart"]))
    print(f"  overhead of one part, ms: {report['overhead_ms']}")
    if args.serve:
        print(f"  an empty call, microseconds: {report['calls_us']}")


if __name__ == "__main__":
    main()
