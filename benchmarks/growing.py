"""Indexes of any size, grown from a real one, for the benchmarks."""

import os
import uuid
from dataclasses import replace

import numpy as np
from wherefrom.store.documents import Example, write_documents
from wherefrom.store.index import Index
from wherefrom.store.shard import documents_path, publish_index, rows_path, shard_entry, write_shard
from wherefrom.store.sparse import Coded, encode_sparse

SHARD_ROWS = 16384
GROUP_ROWS = 1 << 18  # the default of a build
_FLIPPED = 2  # a bit flips where so many random bits are all 1: one in four
_TEXT = 200
_TOKENS = 48
_YEARS = 2000, 2026
_LICENSES = ("cc0", "cc-by", "mit", "unknown")


def grow(index, out, components, rows, arrays_of):
    """Write an index of so many rows at `out`, and return it.

    Args:
        index: a real one, whose models and texts the grown one has.
        components: of the grown index.
        arrays_of: a function of a numpy generator and a number of rows, which gives by component the arrays of so many rows.
    """
    generator = np.random.default_rng(0)
    texts = [index.example(row) for row in range(min(len(index), 1000))]
    shards = []
    for first in range(0, rows, SHARD_ROWS):
        count = min(SHARD_ROWS, rows - first)
        shard_id = str(uuid.UUID(int=first + 1))
        write_documents(documents_path(out, shard_id), _examples(texts, first, count, generator))
        write_shard(out, shard_id, arrays_of(generator, count), np.ones(count, np.float32))
        shards.append(shard_entry(out, shard_id, first, count, count * _TOKENS, components))
    fields = {**dict(index.manifest), "components": tuple(components), "number": 1, "group_rows": GROUP_ROWS}
    publish_index(out, shards, np.zeros(0, np.int64), fields)
    Index(out).reindex()
    return Index(out)


def _examples(texts, first, count, generator):
    """Examples with ids of their own, real texts and tokens cut short, a year and a license."""
    years = generator.integers(*_YEARS, count)
    licenses = generator.integers(0, len(_LICENSES), count)
    mask = np.ones(_TOKENS, bool)
    mask[0] = False
    examples = []
    for i, text in enumerate(generator.integers(0, len(texts), count)):
        example = texts[text]
        tokens = np.resize(example.token_ids, _TOKENS)
        metadata = {"year": int(years[i]), "license": _LICENSES[licenses[i]]}
        examples.append(Example(f"r{first + i}", example.text[:_TEXT], "grown", tokens, mask, f"r{first + i}", metadata=metadata))
    return examples


def sparse_sampler(index):
    """Sparse rows like those of an index: its rows' tokens and lengths, drawn at random, with a quarter of their bits flipped."""
    components = index.manifest.components
    arrays = {}
    for component in components:
        shards = [index.rows(shard, component) for shard in index.shards]
        keys, codes, factors = (np.concatenate(parts) for parts in zip(*(rows.entries(0, len(rows)) for rows in shards), strict=True))
        counts = np.concatenate([np.diff(rows.indptr) for rows in shards])
        arrays[component.name] = counts, keys, codes, factors, np.concatenate([rows.norms for rows in shards])

    def sample(generator, count):
        rows = generator.integers(0, len(index), count)
        groups = {}
        for component in components:
            counts, keys, codes, factors, norms = arrays[component.name]
            starts = np.concatenate([[0], np.cumsum(counts)])
            entries = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
            flips = np.bitwise_and.reduce(generator.integers(0, 256, (_FLIPPED, len(entries), codes.shape[1]), np.uint8))
            coded = Coded(
                counts[rows], keys[entries].astype(np.uint32), codes[entries] ^ flips, factors[entries], norms[rows], norms[rows] ** 2
            )
            groups[component.name] = encode_sparse(coded, component.vocabulary, component.bits)
        return groups

    return sample


def link(index, out, copies):
    """An index of so many copies of the shards of another, by hard links; all rows have the same ids as those that they are copies of.

    Args:
        index: one whose last group of shards is full, so that the copies' groups are copies of its own.
    """
    assert len(index) % index.groups[0].rows == 0, f"{len(index):,} rows are no multiple of {index.groups[0].rows:,}"
    shards = []
    for copy in range(copies):
        names = {}
        for shard in index.shards:
            shard_id = str(uuid.uuid5(uuid.UUID(shard.id), str(copy)))
            names[shard.id] = shard_id
            for path_of in (rows_path, documents_path):
                target = path_of(out, shard_id)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(path_of(index.path, shard.id), target)
            shards.append(shard._replace(id=shard_id))
        for group in index.groups:
            renamed = replace(group, shards=tuple(shard._replace(id=names[shard.id]) for shard in group.shards))
            target = out / "search" / f"{renamed.id}.zarr.zip"
            target.parent.mkdir(exist_ok=True)
            os.link(index.path / "search" / f"{group.id}.zarr.zip", target)
    encoder = out / index.manifest.encoder.path
    encoder.parent.mkdir(exist_ok=True)
    os.link(index.path / index.manifest.encoder.path, encoder)
    publish_index(out, shards, np.zeros(0, np.int64), {**dict(index.manifest), "number": 1})
    return Index(out)
