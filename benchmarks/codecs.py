"""Codecs for object stores: how small do the arrays of an index become, and how fast are they decoded?

    python benchmarks/codecs.py INDEX

For a shard's rows, its documents, and the posting lists of a group: bytes after each of numcodecs' codecs over bytes before, and megabytes
(of the array) that one core decodes in a second. Posting lists are compressed list by list, for the hundred longest, since a query reads
lists.
"""

import argparse
import json
import time
from pathlib import Path

import numcodecs
import numpy as np
import pyarrow as pa
import zarr
from wherefrom import Index
from wherefrom.store.shard import documents_path, rows_path

_LISTS = 100


def codecs(dtype):
    """Chains of codecs for an array, by name."""
    zstd = numcodecs.Zstd(3)
    chains = {"zstd": [zstd], "shuffle, zstd": [numcodecs.Shuffle(dtype.itemsize), zstd]}
    if dtype.kind in "iu":
        delta = numcodecs.Delta(dtype)
        chains |= {"delta, zstd": [delta, zstd], "delta, shuffle, zstd": [delta, numcodecs.Shuffle(dtype.itemsize), zstd]}
    return chains


def measure(pieces):
    """Sizes and speed of decoding of some arrays of one type, each compressed by itself."""
    before = sum(piece.nbytes for piece in pieces)
    results = {}
    for name, chain in codecs(pieces[0].dtype).items():
        coded = []
        for piece in pieces:
            content = np.ascontiguousarray(piece).ravel()
            for codec in chain:
                content = codec.encode(content)
            coded.append(content)
        started = time.process_time()
        for content in coded:
            plain = content
            for codec in reversed(chain):
                plain = codec.decode(plain)
        seconds = time.process_time() - started
        size = sum(len(memoryview(content).cast("B")) for content in coded)
        results[name] = {"share": round(size / before, 3), "megabytes_a_second": round(before / 1e6 / max(seconds, 1e-9))}
    return {"bytes": before, **results}


def documents(path):
    """Sizes of an Arrow file with its buffers compressed, and the speed of reading it."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    before = path.stat().st_size
    results = {"bytes": before}
    for codec in ("zstd", "lz4"):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            writer.write_table(table, 256)
        content = sink.getvalue()
        started = time.process_time()
        pa.ipc.open_file(content, options=pa.ipc.IpcReadOptions(use_threads=False)).read_all()
        seconds = time.process_time() - started
        results[codec] = {"share": round(content.size / before, 3), "megabytes_a_second": round(before / 1e6 / seconds)}
    return results


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    index = Index(parser.parse_args().index)
    shard = index.shards[0]
    rows = zarr.open_group(zarr.storage.ZipStore(rows_path(index.path, shard.id), mode="r"), mode="r")
    results = {}
    for component in index.manifest.components:
        for name in ("indptr", "keys", "codes", "factors", "norms", "scales"):
            path = f"{component.name}/{name}"
            if path in rows:
                results[f"rows: {path}"] = measure([rows[path][:]])
        lists = index.search_arrays(index.groups[0], component)
        if component.has_wide_rows or lists is None:
            continue
        longest = np.argsort(-np.diff(lists.starts))[:_LISTS]
        for name in ("rows", "codes", "factors"):
            pieces = [getattr(lists, name)[lists.starts[i] : lists.starts[i + 1]] for i in longest]
            results[f"lists: {component.name}/{name}"] = measure(pieces)
    results["documents"] = documents(documents_path(index.path, shard.id))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
