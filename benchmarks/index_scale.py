"""Growth of an index: files, bytes, and cost of the commands that read it, at a million rows, ten million and a hundred million.

    wherefrom build --model MODEL_DIR --data corpus.jsonl --out full.wherefrom --bytes-per-example 800
    python benchmarks/index_scale.py --index full.wherefrom [--rows 1048576 9961472] [--linked 10] [--rounds 5] [--grown DIR] [--json]

Grown rows are those of benchmarks/search_speed.py, in shards of 16,384, with documents of 200 characters and 48 tokens: ten million take 22
GB and about five minutes. `--linked` also makes so many copies of the largest by hard links: all is real but the page cache, which sees one
copy, and the ids, which every copy has. `--grown` names a folder where grown indexes are kept, and found again.

Commands take turns, each in a process of its own after the files were dropped from the cache where the system allows that. Given are CPU
seconds (user and system, with Python's start; the median, the least and the most of all rounds), the peak of memory that is not the files',
and what was read from the disk. A round before these, in which memory is watched, is not timed: it may compile. `delete` takes 10,000 ids
out of a copy by links, which is made anew for every round; `compact` writes one shard again, `add` adds 8 documents, and `scores` asks 3
queries.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from growing import grow, link, sparse_sampler
from processes import run
from wherefrom.store.index import Index

_IDS = 10_000
_MIB = 1 << 20
_CLI = "from wherefrom.cli import main; main([{}])"
_COMMANDS = {
    "open": "from wherefrom.store.index import Index; Index(sys.argv[1])",
    "info": _CLI.format("'info', sys.argv[1], '--json'"),
    "query --row": _CLI.format("'query', sys.argv[1], '--row', '123', '--json'"),
    "query --where": _CLI.format("'query', sys.argv[1], '--row', '123', '--where', 'year > 2020', '--json'"),
    "query --group-by": _CLI.format("'query', sys.argv[1], '--row', '123', '--group-by', 'license', '--json'"),
    "scores": _CLI.format("'scores', sys.argv[1], '--file', sys.argv[3], '--out', sys.argv[5]"),
    "delete": _CLI.format("'delete', sys.argv[1], '--ids', sys.argv[2]"),
    "compact": _CLI.format("'compact', sys.argv[1]"),
    "add": _CLI.format("'add', sys.argv[1], '--data', sys.argv[4]"),
    "verify": _CLI.format("'verify', sys.argv[1]"),
}
_WRITERS = ("delete", "compact", "add")
_OF_LINKED = ("open", "info", "query --row", "query --where")
_QUERIES, _ADDED = 3, 8


def _drop(index):
    """Drop an index's files from the cache, where the system allows that."""
    for path in index.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(index, commands, rounds):
    """Cost of commands, by name: figures of some rounds in which they take turns, and of one whose memory is watched."""
    generator = np.random.default_rng(1)
    seconds = {name: [] for name in commands}
    figures = {name: {} for name in commands}
    with tempfile.TemporaryDirectory(dir=index.path.parent) as folder:
        ids, copy, few = Path(folder) / "ids.txt", Path(folder) / "copy", Path(folder) / "few.txt"
        queries, data, out = Path(folder) / "queries.jsonl", Path(folder) / "data.jsonl", Path(folder) / "scores.zarr"
        ids.write_text("".join(f"r{row}\n" for row in generator.choice(len(index), _IDS, replace=False)))
        few.write_text("".join(f"r{row}\n" for row in range(10)))  # of one shard
        queries.write_text("".join(json.dumps({"row": row}) + "\n" for row in range(_QUERIES)))
        data.write_text("".join(json.dumps({"id": f"new{n}", "text": "An added text."}) + "\n" for n in range(_ADDED)))
        for number in range(rounds + 1):
            for name in commands:
                place = index.path
                shutil.rmtree(out, ignore_errors=True)
                if name in _WRITERS:
                    shutil.rmtree(copy, ignore_errors=True)
                    shutil.copytree(index.path, copy, copy_function=os.link)
                    place = copy
                if name == "compact":
                    run(_COMMANDS["delete"], place, few, watched=False)
                _drop(place)
                _, used, own = run(_COMMANDS[name], place, ids, queries, data, out, watched=number == 0)
                if number == 0:
                    figures[name]["own_mib"] = own // _MIB
                else:
                    seconds[name].append(used.ru_utime + used.ru_stime)
                    figures[name]["read_mib"] = used.ru_inblock * 512 // _MIB
    return {name: {"cpu_seconds": [round(s, 3) for s in sorted(seconds[name])], **figures[name]} for name in commands}


def report(index, commands, rounds, linked):
    """Size of an index, and cost of commands on it."""
    files = [path for path in index.path.rglob("*") if path.is_file()]
    return {
        "rows": len(index),
        "linked": linked,
        "shards": len(index.shards),
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "manifest_bytes": sum(path.stat().st_size for path in files if path.parent.name == "manifests"),
        "commands": measure(index, commands, rounds),
    }


def show(found):
    """Print a report as lines for people."""
    how = ", by hard links" if found["linked"] else ""
    print(
        f"{found['rows']:,} rows{how}: {found['shards']:,} shards, {found['files']:,} files, {found['bytes'] / 1e9:.1f} GB, "
        f"manifests {found['manifest_bytes']:,} bytes"
    )
    for name, of in found["commands"].items():
        seconds = of["cpu_seconds"]
        spread = f"{statistics.median(seconds):6.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"
        print(f"  {name:14s} CPU s {spread}, own memory {of['own_mib']:,} MiB, read {of['read_mib']:,} MiB", flush=True)


def _grown(real, place, rows):
    """The index of so many rows at a place: that which lies there, or one that is grown there."""
    if (place / "manifests").is_dir():
        return Index(place)
    encoder = place / real.manifest.encoder.path
    encoder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(real.path / real.manifest.encoder.path, encoder)
    return grow(real, place, real.manifest.components, rows, sparse_sampler(real))


def main():
    """Grow, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_048_576, 9_961_472])
    parser.add_argument("--linked", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grown", type=Path)
    parser.add_argument("--commands", nargs="*", default=list(_COMMANDS), choices=list(_COMMANDS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    real = Index(args.index)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with ExitStack() as stack:
        folder = args.grown or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.index.parent)))
        say = (lambda found: print(json.dumps(found), flush=True)) if args.json else show
        for rows in args.rows:
            index = _grown(real, folder / f"{rows}", rows)
            say(report(index, args.commands, args.rounds, linked=False))
        if args.linked:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                say(report(link(index, Path(place), args.linked), list(_OF_LINKED), args.rounds, linked=True))


if __name__ == "__main__":
    main()
