"""How does an index grow: files, bytes, and what the commands that read it cost, at a million rows and more?

    wherefrom build --model MODEL_DIR --data corpus.jsonl --out full.wherefrom --bytes-per-example 800
    python benchmarks/index_scale.py --index full.wherefrom [--rows 983040 9830400] [--linked 10]

Grown rows are those of benchmarks/search_speed.py, in shards of 16,384, with documents of 200 characters and 48 tokens. `--linked` also
makes so many copies of the largest by hard links: all is real but the page cache, which sees one copy. Each command runs in a process of
its own after the files were dropped from the cache where the system allows that; printed are its CPU seconds (user and system, with
Python's start), its peak of memory that is not the files', and the bytes that it read.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from growing import grow, link, sparse_sampler
from wherefrom.store.index import Index

_IDS = 10_000
_COMMANDS = {
    "open": "from wherefrom.store.index import Index; Index(sys.argv[1])",
    "info": "from wherefrom.cli import main; main(['info', sys.argv[1], '--json'])",
    "query --row": "from wherefrom.cli import main; main(['query', sys.argv[1], '--row', '123', '--json'])",
    "query --where": "from wherefrom.cli import main; main(['query', sys.argv[1], '--row', '1', '--where', 'year > 2020', '--json'])",
    "delete": "from wherefrom.cli import main; main(['delete', sys.argv[1], '--ids', sys.argv[2]])",
}
_WRAPPED = """
import sys, os
before = os.times()
try:
    {command}
except SystemExit as ended:
    assert not ended.code, ended.code
times = os.times()
own = int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
read = int(next(line for line in open("/proc/self/io") if line.startswith("read_bytes")).split()[1])
print("", round(times.user + times.system, 2), own >> 10, read >> 20, file=sys.stderr)
"""


def measure(command, index, ids):
    """CPU seconds, MiB of its own at the end, MiB read from the disk."""
    for path in index.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    script = [sys.executable, "-c", _WRAPPED.format(command=command), str(index), str(ids)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, own, read = done.stderr.split()[-3:]
    return {"cpu_seconds": float(seconds), "own_mib": int(own), "read_mib": int(read)}


def report(index, commands):
    """Print what an index takes, and what commands on it cost."""
    files = [p for p in index.path.rglob("*") if p.is_file()]
    manifests = sum(p.stat().st_size for p in files if p.parent.name == "manifests")
    print(json.dumps({"rows": len(index), "files": len(files), "manifest_kib": manifests >> 10}), flush=True)
    generator = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.txt"
        ids.write_text("".join(f"r{row}\n" for row in generator.choice(len(index), _IDS, replace=False)))
        for name in commands:
            print(json.dumps({"rows": len(index), "command": name, **measure(_COMMANDS[name], index.path, ids)}), flush=True)


def main():
    """Grow, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[983_040])
    parser.add_argument("--linked", type=int, default=0)
    args = parser.parse_args()
    real = Index(args.index)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    places = []
    try:
        for rows in args.rows:
            places.append(Path(tempfile.mkdtemp(dir=args.index.parent)))
            encoder = places[-1] / real.manifest.encoder.path
            encoder.parent.mkdir()
            shutil.copy(real.path / real.manifest.encoder.path, encoder)
            index = grow(real, places[-1], real.manifest.components, rows, sparse_sampler(real))
            if not (args.linked and rows == args.rows[-1]):
                report(index, _COMMANDS)
        if args.linked:
            places.append(Path(tempfile.mkdtemp(dir=args.index.parent)))
            report(link(index, places[-1], args.linked), ["open", "info", "query --row"])
            report(index, _COMMANDS)
    finally:
        for place in places:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
