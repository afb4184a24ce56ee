"""Speed of a running server, of one-shot commands in front of it and of many clients at once, and growth of the server's memory.

    wherefrom build --model MODEL_DIR --data corpus.jsonl --out my.wherefrom
    python benchmarks/serve_speed.py --index my.wherefrom --queries queries.jsonl

Prints, as JSON lines: wall times of whole processes of `wherefrom query` against the server, with and without `--json`; for 1, 8 and 64
clients at once, each asking its own queries one after the other, the latency and the throughput, with micro-batching (16 queries a
pass) and without; and the server's memory before and after `--requests` requests.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from wherefrom import Client, Query
from wherefrom.query.files import read_queries
from wherefrom.remote import RemoteClient
from wherefrom.store.errors import UsageError

_MAIN = [sys.executable, "-c", "from wherefrom.cli import main; main()"]


class Server:
    """`wherefrom serve` in a process of its own."""

    def __init__(self, index, environment, batch):
        command = [*_MAIN, "serve", str(index), "--port", "0", "--batch", str(batch)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.url = re.search(r"http://\S+", self.process.stderr.readline())[0]

    def memory(self):
        """Resident, MiB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmRSS"))

    def stop(self):
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def spread(seconds):
    """Median, 95th percentile, and how many."""
    return {
        "p50_ms": round(float(np.median(seconds)) * 1e3, 1),
        "p95_ms": round(float(np.quantile(seconds, 0.95)) * 1e3, 1),
        "n": len(seconds),
    }


def processes(index, query, environment, rounds):
    """Whole processes that ask the same query over and over, with another completion each time."""
    found = {"json": [], "table": [], "python -c pass": []}
    for number in range(rounds):
        asked = ["query", str(index), "--prompt", query.prompt, "--completion", f"{query.completion} {number}", "--no-rerank"]
        for kind, command in {
            "json": [*_MAIN, *asked, "--json"],
            "table": [*_MAIN, *asked],
            "python -c pass": [sys.executable, "-c", "pass"],
        }.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=environment)
            found[kind].append(time.perf_counter() - started)
    bare = float(np.median(found["python -c pass"]))
    return {kind: {**spread(seconds), "over_bare_python": round(float(np.median(seconds)) / bare, 1)} for kind, seconds in found.items()}


def together(url, queries, clients, each):
    """Some clients at once, each with its own queries."""
    seconds, lock = [], threading.Lock()

    def ask(number):
        client, own = RemoteClient(url), []
        for i in range(each):
            query = queries[(number * each + i) % len(queries)]
            started = time.perf_counter()
            client.query(prompt=query.prompt, completion=f"{query.completion} {number} {i}", rerank=0)
            own.append(time.perf_counter() - started)
        with lock:
            seconds.extend(own)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"clients": clients, **spread(seconds), "queries_a_second": round(len(seconds) / (time.perf_counter() - started), 1)}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, type=Path)
    parser.add_argument("--queries", required=True)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--requests", type=int, default=10_000)
    args = parser.parse_args()
    client, queries = Client(args.index), []
    for query in read_queries(args.queries):
        try:
            client.query_examples([Query(query.prompt, f"{query.completion} 00 00")])
            queries.append(query)
        except UsageError:  # longer than the model's context
            continue
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "XDG_RUNTIME_DIR": scratch}
        for batch in (16, 1):
            server = Server(args.index, environment, batch)
            try:
                together(server.url, queries, 4, 3)  # what is compiled and loaded once
                if batch == 16:
                    print(json.dumps({"processes": processes(args.index, queries[0], environment, args.rounds)}), flush=True)
                for clients, each in ((1, 40), (8, 10), (64, 4)):
                    print(json.dumps({"batch": batch, **together(server.url, queries, clients, each)}), flush=True)
                if batch == 16:
                    rows, sizes = RemoteClient(server.url), []
                    for number in range(args.requests):
                        rows.query(row=number % len(client.index), k=3)
                        if number % (args.requests // 10) == 0:
                            sizes.append(server.memory())
                    print(json.dumps({"requests": args.requests, "memory_mib": [*sizes, server.memory()]}), flush=True)
            finally:
                server.stop()


if __name__ == "__main__":
    main()
