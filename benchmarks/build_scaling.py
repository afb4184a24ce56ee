"""Whole builds as processes: memory as the corpus grows, and gain of two workers.

    python benchmarks/build_scaling.py memory  --model MODEL_DIR --data corpus.jsonl
    python benchmarks/build_scaling.py workers --model MODEL_DIR --data corpus.jsonl --documents 1000

memory: peak resident memory of a build over all documents, over that of a build over every tenth document (one worker, in its process).
workers: wall time with one worker over wall time with two, builds in turn; also without what a process pays once (starting Python, Ray
and the model), measured by a build of a handful of documents.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_HANDFUL = 16
_SMALL_SHARDS = ("-o", "shard_rows=16")  # of some hundred documents, the default would make one


def build(model, data, out, workers=1, options=()):
    """Build an index as a process of its own; (wall seconds, peak resident bytes of that process)."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", "from wherefrom.cli import main; main()", "build", "--model", model, "--data", data, "--out", out]
    # A process between, whose children's peak is this build's alone.
    measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); " + (
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", measure, *map(str, command), "--workers", str(workers), *options], check=True, capture_output=True, text=True
    )
    return time.monotonic() - started, int(done.stdout) * 1024


def subset(data, out, step=1, count=None):
    """Every `step`-th line of a JSON-lines file, at most `count`."""
    with open(data) as lines:
        chosen = [line for i, line in enumerate(lines) if i % step == 0]
    out.write_text("".join(chosen[:count]))
    return out


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "workers"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--documents", type=int, default=1000, help="of the workers' comparison, spread over the corpus")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    if args.what == "memory":
        _, tenth = build(args.model, subset(args.data, folder / "tenth.jsonl", step=10), folder / "tenth")
        _, whole = build(args.model, args.data, folder / "whole")
        result = {"tenth_mib": tenth >> 20, "whole_mib": whole >> 20, "ratio": round(whole / tenth, 3)}
    else:
        with open(args.data) as lines:
            total = sum(1 for _ in lines)
        data = subset(args.data, folder / "some.jsonl", step=max(1, total // args.documents), count=args.documents)
        handful = subset(args.data, folder / "handful.jsonl", count=_HANDFUL)
        start = {n: build(args.model, handful, folder / "start", n, _SMALL_SHARDS)[0] for n in (1, 2)}
        ratios, working = [], []
        for _ in range(args.rounds):
            wall = {n: build(args.model, data, folder / f"w{n}", n, _SMALL_SHARDS)[0] for n in (1, 2)}
            ratios.append(wall[1] / wall[2])
            working.append((wall[1] - start[1]) / (wall[2] - start[2]))
        result = {
            "documents": args.documents,
            "one_over_two": [round(f(ratios), 2) for f in (statistics.median, min, max)],
            "without_start": [round(f(working), 2) for f in (statistics.median, min, max)],
        }
    shutil.rmtree(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
