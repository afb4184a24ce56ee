"""Posting lists: scores are plain sums over shared tokens, by either loop to the bit; what is on disk is right, or made again."""

import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import assert_close, random_texts, sparse_component, sparse_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from wherefrom import BuildConfig, Client, Query
from wherefrom.cli import main
from wherefrom.query.metric import Metric
from wherefrom.query.scoring import score_matrix
from wherefrom.ray_jobs.build import build
from wherefrom.store import postings as module
from wherefrom.store.arrays import ArrayFile, ArrayGroup
from wherefrom.store.bits import rotate, signs_of
from wherefrom.store.cache import read_cache, write_cache
from wherefrom.store.errors import IntegrityError
from wherefrom.store.index import Index
from wherefrom.store.kernels import add_lists, add_squares, scale_by_lengths
from wherefrom.store.postings import Postings, add_lists_plainly, byte_tables
from wherefrom.store.vectors import SparseVectors


def random_rows(rows, vocabulary, width, seed):
    generator = np.random.default_rng(seed)
    keys = [np.sort(generator.choice(vocabulary, generator.integers(i == 0, min(9, vocabulary) + 1), replace=False)) for i in range(rows)]
    indptr = np.concatenate([[0], np.cumsum([len(k) for k in keys])]).astype(np.int64)
    return SparseVectors(indptr, np.concatenate(keys).astype(np.int64), generator.standard_normal((indptr[-1], width)).astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.sampled_from([8, 12, 20, 64]), st.integers(0, 10**6), st.integers(1, 4))
def test_scores_are_sums_over_shared_tokens_by_both_loops(tmp_path_factory, rows, vocabulary, bits, seed, queries):
    path = tmp_path_factory.mktemp("postings")
    example_rows, query_rows = random_rows(rows, vocabulary, bits, seed), random_rows(queries, vocabulary, bits, seed + 1)
    read = sparse_rows(path, example_rows, vocabulary, bits, 5)
    keys, codes, factors = read.entries(0, rows)
    rotated, owners = rotate(query_rows.vectors, bits, 5), np.repeat(np.arange(queries), np.diff(query_rows.indptr))
    expected, size = np.zeros((2, queries, rows))
    for i in range(rows):
        for e in range(read.indptr[i], read.indptr[i + 1]):
            for j in np.flatnonzero(query_rows.keys == keys[e]):
                terms = factors[e] * signs_of(codes[e : e + 1], bits)[0].astype(float) * rotated[j]
                expected[owners[j], i] += terms.sum()
                size[owners[j], i] += np.abs(terms).sum()
    lists = Postings.of([read], sparse_component(vocabulary, bits, bits, 5))
    assert (np.diff(lists.tokens.astype(int)) > 0).all()
    actual = np.zeros((2, queries, rows), np.float32)
    lists.add_scores(query_rows.keys, owners, byte_tables(rotated), actual[0])
    assert_close(actual[0], expected, 1e-5, size)
    write_cache(path / "c.zarr.zip", "source", {"head": lists.arrays()}, path / "staging")
    back = Postings.read(read_cache(path / "c.zarr.zip", "source"), sparse_component(vocabulary, bits, bits), rows)
    back.add_scores(query_rows.keys, owners, byte_tables(rotated), actual[1])
    assert np.array_equal(*actual)
    assert read_cache(path / "c.zarr.zip", "another") is None
    if len(lists.tokens):
        list_numbers = np.arange(len(lists.tokens))
        tables = byte_tables(np.random.default_rng(seed).standard_normal((len(list_numbers), bits)).astype(np.float32))
        both = [np.zeros(rows, np.float32) for _ in range(2)]
        for loop, scores in zip((add_lists, add_lists_plainly), both, strict=True):
            loop(list_numbers, list_numbers % 3 != 1, tables, lists.starts, lists.rows, lists.codes, lists.factors, scores)
        assert np.array_equal(*both)


@pytest.fixture
def index(tmp_path, model_dir, corpus_file, monkeypatch):
    monkeypatch.setattr("wherefrom.store.arrays.PAGE_BYTES", 256)  # several pages in small arrays, too
    options = dict(components=("head", "embeddings"), head_bits=32, shard_rows=40)
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(tmp_path / "i"), **options))
    return tmp_path / "i"


def scores(path):
    client = Client(path)
    rows = client.encode([Query(text=t) for t in random_texts(3, seed=4)])
    return score_matrix(client.index, rows)


def files(path):
    return sorted(p for p in (path / "search").rglob("*") if p.is_file())


def test_lists_that_are_missing_stale_or_damaged_are_made_again(index, monkeypatch):
    before = scores(index)
    made = []

    def counted(cls, shards, component, of=Postings.of):
        made.append(1)
        return of(shards, component)

    monkeypatch.setattr(module.Postings, "of", classmethod(counted))
    assert np.array_equal(scores(index), before)
    assert made == []  # a build leaves them
    (path,) = files(index)
    raw = path.read_bytes()
    start, _, _ = ArrayFile(path)._entries["zarr.json"]
    for damage, content in {"cut": raw[:-1], "remove": None, "source": raw[:start] + raw[start:].replace(b"version", b"virsion")}.items():
        path.unlink() if content is None else path.write_bytes(content)
        made.clear()
        assert np.array_equal(scores(index), before), damage
        assert made, damage
        done = CliRunner().invoke(main, ["reindex", str(index)])
        assert done.exit_code == 0, done.output
        made.clear()
        assert np.array_equal(scores(index), before)
        assert made == []
    for name in ("head/codes/c/0/0", "head/factors/c/0", "head/rows/c/0", "head/starts/c/0", "embeddings/tokens/c/0"):
        start, size, _ = ArrayFile(path)._entries[name]
        path.write_bytes(raw[:start] + bytes(byte ^ 1 for byte in raw[start : start + size]) + raw[start + size :])
        if "starts" in name or "tokens" in name:  # read whole when the file is opened
            assert np.array_equal(scores(index), before)
        else:
            with pytest.raises(IntegrityError, match="checksum; run wherefrom reindex"):
                scores(index)
        assert CliRunner().invoke(main, ["reindex", str(index)]).exit_code == 0
        assert path.read_bytes() == raw
    shutil.rmtree(index / "search")
    assert np.array_equal(scores(index), before)
    assert Index(index).reindex() == 1
    assert Index(index).reindex() == 0
    assert not (index / "staging").exists()


def test_one_query_of_a_small_index_loads_no_compiled_code(index):
    import subprocess
    import sys

    command = (
        "import sys; from wherefrom import Client; Client(sys.argv[1]).query(row=3); print('numba' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", command, str(index)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


FORGED = {
    "starts that jump": ("starts", lambda a: np.concatenate([a[:1], np.full(len(a) - 2, 2**40), a[-1:]])),
    "unsigned starts": ("starts", lambda a: a.astype(np.uint64)),
    "tokens in no order": ("tokens", lambda a: a[::-1].copy()),
    "tokens in two dimensions": ("tokens", lambda a: a[:, None]),
    "rows of another type": ("rows", lambda a: a.astype(np.int64)),
    "too few codes": ("codes", lambda a: a[:-1]),
    "rows beyond": ("rows", lambda a: np.full_like(a, 60_000)),
    "factors that are not numbers": ("factors", lambda a: np.full_like(a, np.nan)),
}


@pytest.mark.parametrize("name", FORGED)
def test_lists_that_would_lead_the_loops_astray_are_not_read(index, name):
    before, opened = scores(index), Index(index)
    array, change = FORGED[name]
    (group,) = opened.groups
    groups = opened._cache_groups(group)
    head = groups["head"]
    arrays = {**head.arrays, array: change(np.array(head.arrays[array]))}
    write_cache(opened._cache_path(group), group.source, {**groups, "head": ArrayGroup(arrays, paged=head.paged)}, index / "staging")
    if name in ("rows beyond", "factors that are not numbers"):
        with pytest.raises(IntegrityError, match="run wherefrom reindex"):
            scores(index)
    else:
        assert np.array_equal(scores(index), before)
    Index(index).reindex(compare=True)
    assert np.array_equal(scores(index), before)


def test_reindex_removes_nothing_that_is_not_its_own(index, tmp_path):
    (index / "search/data.zarr.zip").write_text("mine")
    (index / "search/067e7efd-44ce-533c-9bb4-35e6cbf94749.zarr.zip").write_text("left over")
    Index(index).reindex()
    assert (index / "search/data.zarr.zip").exists()
    assert not (index / "search/067e7efd-44ce-533c-9bb4-35e6cbf94749.zarr.zip").exists()
    shutil.move(index / "search", tmp_path / "elsewhere")
    (index / "search").symlink_to(tmp_path / "elsewhere")
    done = CliRunner().invoke(main, ["reindex", str(index)])
    assert (done.exit_code, "remove it" in done.output) == (2, True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.floats(0.01, 100), st.floats(1e-3, 1e3), st.integers(0, 10**6))
def test_compiled_scales_are_those_of_plain_arithmetic_to_the_bit(rows, weight, norm, seed):
    generator = np.random.default_rng(seed)
    norms = np.where(generator.random(rows) < 0.2, 0, generator.exponential(size=rows)).astype(np.float32)
    products = generator.normal(size=rows).astype(np.float32)
    losses = np.where(generator.random(rows) < 0.2, np.nan, norms).astype(np.float32)  # of examples that were not finite
    squared = generator.random(rows)
    expected = squared + weight * np.square(norms, dtype=np.float64)
    add_squares(weight, norms, squared)
    np.testing.assert_array_equal(squared, expected)
    squared[::7] = 0.0
    for lengths, factor, are_squared in ((squared, norm, True), (losses, 1.0, False)):
        divisors = factor * np.sqrt(lengths) if are_squared else lengths.astype(np.float64)
        scale = np.divide(1.0, divisors, out=np.zeros(rows), where=divisors > 1e-37).astype(np.float32)
        scores = np.empty(rows, np.float32)
        scale_by_lengths(products, lengths, factor, are_squared, 1e-37, scores)
        np.testing.assert_array_equal(scores, products * scale)


@pytest.mark.parametrize("mode", ["cosine", "loss-normalized"])
def test_lengths_and_losses_are_read_from_the_search_caches_and_are_those_of_the_rows(tmp_path, model_dir, corpus_file, mode):
    out = tmp_path / "i"
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(out), components=("head",), shard_rows=16, group_rows=32))
    rows = Index(out).vectors(5, Index(out).manifest.components[0]).as_float32()
    index = Index(out)
    scores = score_matrix(index, {"head": rows}, Metric(mode))
    assert not index._readers  # no shard was opened
    (head,) = index.manifest.components
    for group in index.groups:
        assert np.array_equal(index.group_norms(group, head), np.concatenate([index.rows(s, head).norms for s in group.shards]))
        assert np.array_equal(index.group_losses(group), np.concatenate([index.losses(s) for s in group.shards]))
    shutil.rmtree(out / "search")
    np.testing.assert_array_equal(score_matrix(Index(out), {"head": rows}, Metric(mode)), scores)
