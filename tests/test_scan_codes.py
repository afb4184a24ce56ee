"""Quantized scan and rescore: estimates follow theory, certificates hold over thousands of queries, only whole files are trusted."""

import shutil

import numpy as np
import pytest
from helpers import assert_close, assert_same_ranking, build_kinds, dense_index, make_model, make_tokenizer, random_texts, search
from wherefrom import BuildConfig, Client, Query
from wherefrom.query.metric import Metric
from wherefrom.query.scoring import Scorer
from wherefrom.ray_jobs.build import build
from wherefrom.store import scan_codes as module
from wherefrom.store.arrays import ArrayFile, ArrayGroup
from wherefrom.store.bits import to_words
from wherefrom.store.cache import write_cache
from wherefrom.store.errors import IntegrityError, NumericalError, UsageError
from wherefrom.store.index import Index
from wherefrom.store.kernels import count_differences, multiply_int8
from wherefrom.store.scan_codes import RoundedQueries, ScanCodes
from wherefrom.store.shard import rows_path
from wherefrom.store.vectors import DenseVectors

DIM = 256


def kinds_of_rows(count, seed=0):
    """Rows that are easy and rows that are not: (name, rows)."""
    generator = np.random.default_rng(seed)
    gauss = generator.standard_normal((count, DIM))
    yield "gauss", gauss
    yield "uneven", gauss * np.exp(generator.standard_normal((count, 1)) * 1.5) * np.linspace(0.05, 3, DIM)
    sparse = np.zeros((count, DIM))
    sparse[np.arange(count), generator.integers(0, DIM, count)] = 1
    sparse[np.arange(count), generator.integers(0, DIM, count)] += generator.choice([-1, 1], count)
    yield "sparse", sparse
    yield "clustered", gauss[:1] + gauss
    lopsided = np.where(gauss > 0, 1.0, -1.0) * 0.02
    lopsided[:, ::2] = 0.02 * np.sign(gauss[:1, ::2])
    lopsided[np.arange(count), generator.integers(0, DIM, count)] = 127 * 0.02 / 1.51
    yield "lopsided", lopsided  # whose int8 directions are far from unit length


def queries_for(rows, count, seed):
    """Half are near some row, half are not; sparse ones among both."""
    generator = np.random.default_rng(seed)
    query_vectors = generator.standard_normal((count, DIM)) * np.linalg.norm(rows, axis=1).mean() / 16
    query_vectors[::2] += rows[generator.integers(0, len(rows), len(query_vectors[::2]))]
    query_vectors[::5] *= generator.random((len(query_vectors[::5]), DIM)) < 0.02
    query_vectors[:, 0] += 1e-3 * np.linalg.norm(rows, axis=1).mean()
    return {"blocks": DenseVectors(query_vectors.astype(np.float32))}


@pytest.mark.parametrize(
    ("name", "rows", "dtype"),
    [
        *((name, rows, "float32") for name, rows in kinds_of_rows(2000)),
        *(("gauss", next(kinds_of_rows(2000))[1], dtype) for dtype in ("float16", "int8", "1bit")),
        ("lopsided", dict(kinds_of_rows(2000))["lopsided"], "int8"),
    ],
)
def test_estimates_err_as_theory_says(tmp_path, index_dir, name, rows, dtype):
    index = dense_index(tmp_path / "i", index_dir, rows, dtype)
    queries = queries_for(rows, 60, 1)
    scorer = Scorer.of(index, queries, Metric())
    (group,) = index.groups
    exact, e = scorer.scores(group), scorer.estimates(group)
    assert not e.exact.any()
    empty = e.deviations == 0
    assert empty.any() == (name == "sparse")  # a row of zeros
    assert not e.estimate[empty].any()
    errors = ((e.estimate - exact)[~empty] / e.deviations[~empty]).astype(float)
    # Standard deviations are upper bounds, and within 15 % of the truth where query and row are not alike.
    assert abs(errors.mean()) < (0.3 if name == "clustered" else 0.05)  # errors of rows that are alike are alike
    assert np.square(errors).mean() < 1.1
    if name == "gauss":
        assert np.square(errors).mean() > 0.7
    for z, tail in ((2.0, 0.0228), (3.0, 0.00135)):
        assert (errors > z).mean() < 1.3 * tail + 2e-4
        assert (errors < -z).mean() < 1.3 * tail + 2e-4


def test_codes_of_fewer_bits_than_coordinates_err_as_theory_says(tmp_path, index_dir, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BITS", 64)
    rows = next(kinds_of_rows(2000))[1]
    index = dense_index(tmp_path / "i", index_dir, rows)
    scorer = Scorer.of(index, {"blocks": DenseVectors(np.random.default_rng(3).standard_normal((60, DIM)).astype(np.float32))}, Metric())
    (group,) = index.groups
    e = scorer.estimates(group)
    errors = (e.estimate - scorer.scores(group)) / e.deviations
    assert 0.8 < np.square(errors).mean() < 1.1


def test_several_dense_components_add_their_variances(tmp_path, model_dir, corpus_file):
    other = make_model("gpt2", "float32", seed=5)
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    models = (str(model_dir), str(tmp_path / "other"))
    build(BuildConfig(model=models, data=(str(corpus_file),), out=str(tmp_path / "i"), rank=4, components=("blocks",)))
    client = Client(tmp_path / "i")
    queries = [Query(text=t) for t in random_texts(40, seed=12)]
    rows = client.encode(queries)
    scorer = Scorer.of(client.index, rows, Metric())
    (group,) = client.index.groups
    variances = scorer.estimates(group).deviations.astype(float) ** 2
    parts = []
    for name in ("blocks-1", "blocks-2"):
        other_name = "blocks-2" if name == "blocks-1" else "blocks-1"
        alone = Scorer.of(client.index, rows, Metric(weights={other_name: 0.0}))
        parts.append(alone.estimates(group).deviations.astype(float) ** 2)
    np.testing.assert_allclose(variances, parts[0] + parts[1], rtol=1e-4)
    exact, actual = (client.answer(queries, rows, k=5, recall=r) for r in (1.0, 0.99999))
    for x, y in zip(exact, actual, strict=True):
        assert_same_ranking(y.proponents, x.proponents, 1e-5)
    assert actual[0].search.method == "by quantized scan and rescore"


def test_a_recall_of_almost_one_and_queries_that_are_no_numbers(index_dir):
    index = Index(index_dir)
    query_vectors = np.random.default_rng(0).standard_normal((2, index.manifest.components[0].dim)).astype(np.float32)
    for recall in (np.nextafter(1, 0), 1 - 1e-15):
        assert len(search(index, {"blocks": DenseVectors(query_vectors)}, 10, recall=recall)) == 2
    query_vectors[1, 0] = np.nan
    with pytest.raises(NumericalError, match="not finite"):
        search(index, {"blocks": DenseVectors(query_vectors)}, 10, recall=0.9)


def complete(index, queries, k, recall):
    """The share of scan-and-rescore answers that miss nothing, of proponents and of opponents; and rows read."""
    is_complete, rows_read = [], []
    for exact, hit in zip(search(index, queries, k), search(index, queries, k, recall=recall), strict=True):
        if hit.recall == 1:
            continue
        rows_read.append(hit.candidates)
        is_complete += [set(exact.proponents) == set(hit.proponents), set(exact.opponents) == set(hit.opponents)]
    return np.mean(is_complete), len(is_complete), np.mean(rows_read)


@pytest.mark.parametrize(
    ("name", "k", "recall"),
    [
        *((name, 10, 0.9) for name, _ in kinds_of_rows(1)),
        *((name, 1, 0.9) for name in ("gauss", "uneven")),
        *((name, 10, 0.99) for name in ("gauss", "lopsided")),
    ],
)
def test_certificates_are_kept(tmp_path, index_dir, monkeypatch, name, k, recall):
    rows = dict(kinds_of_rows(3000, 4))[name]
    rows = rows * 1e-12 if k == 1 else rows  # the squares of their scores are not float32 numbers
    monkeypatch.setattr("wherefrom.query.search._MOST_READ_OF_FEW", 10**6)
    monkeypatch.setattr("wherefrom.query.search._READ_FIRST", 10)
    index = dense_index(tmp_path / "i", index_dir, rows, "int8" if name == "lopsided" else "float32", group_rows=1000)
    assert len(index.groups) == 3
    share, number_of_queries, rows_read = complete(index, queries_for(rows, 300, 5), k, recall)
    assert number_of_queries > 300
    assert share >= recall - 2.5 * np.sqrt(recall * (1 - recall) / number_of_queries)
    assert rows_read < len(rows)
    if k == 1:
        assert rows_read < len(rows) / 10


@pytest.mark.parametrize("fault", ["too sure", "biased", "one group's codes are another's"])
def test_a_broken_estimator_breaks_certificates(tmp_path, index_dir, monkeypatch, fault):
    monkeypatch.setattr("wherefrom.query.search._MOST_READ_OF_FEW", 10**6)
    monkeypatch.setattr("wherefrom.query.search._READ_FIRST", 10)
    rows = dict(kinds_of_rows(3000, 4))["gauss"]
    index = dense_index(tmp_path / "i", index_dir, rows, group_rows=1000)
    for number, group in enumerate(index.groups):
        codes = index.search_arrays(group, index.manifest.components[0])
        if fault == "too sure":
            broken = ScanCodes(codes.codes, codes.factors, codes.noises * 0.1, codes.norms, codes.checks)
        elif fault == "biased":
            broken = ScanCodes(codes.codes, codes.factors * 0.1, codes.noises, codes.norms, codes.checks)
        else:
            broken = ScanCodes(np.roll(codes.codes, number, axis=0), codes.factors, codes.noises, codes.norms, codes.checks)
        index._caches[(group.id, "blocks")] = broken
    share, _, _ = complete(index, queries_for(rows, 300, 5), 10, 0.9)
    assert share < 0.8


def test_both_loops_count_alike_and_products_are_those_of_the_rounded_query():
    generator = np.random.default_rng(0)
    for rows, bits, count in ((1, 64, 1), (300, 200, 3), (70, 1024, 2)):
        vectors, query_vectors = generator.standard_normal((rows, bits)), generator.standard_normal((count, bits)).astype(np.float32)
        codes, rounded = to_words(np.packbits(vectors > 0, axis=1), "<u8"), RoundedQueries.of(query_vectors)
        module._count_differences._work = 0
        plain = rounded.products(codes)
        module._count_differences._work = module._count_differences._least_work
        assert np.array_equal(rounded.products(codes), plain)
        totals = np.zeros((count, rows), np.uint32)
        count_differences(codes, rounded.planes, totals)
        levels = [[np.unpackbits(plane.view(np.uint8), count=bits) for plane in planes] for planes in rounded.planes]
        levels_of_query = np.array([[2.0 * sum(int(2**p) * plane for p, plane in enumerate(planes)) - 15] for planes in levels])[:, 0]
        levels_of_query *= rounded.half_steps[:, None]
        assert_close(plain, levels_of_query @ np.where(vectors > 0, 1, -1).T, 1e-5, np.abs(levels_of_query).sum(1).max())
        np.testing.assert_allclose(np.linalg.norm(query_vectors - levels_of_query, axis=1), rounded.error_lengths, rtol=1e-4)
        assert (rounded.error_lengths < 0.2 * np.linalg.norm(query_vectors, axis=1)).all()
    assert not RoundedQueries.of(np.zeros((1, 64), np.float32)).products(codes[:1, :1]).any()


def test_int8_products_are_numpys():
    generator = np.random.default_rng(0)
    codes, query_vectors = generator.integers(-127, 128, (50, 333), dtype=np.int8), generator.standard_normal((3, 333)).astype(np.float32)
    actual = np.zeros((3, 50), np.float32)
    multiply_int8(codes, query_vectors, actual)
    assert_close(actual, query_vectors.astype(float) @ codes.T, 1e-6, (np.abs(query_vectors).astype(float) @ np.abs(codes).T).max())


@pytest.fixture(scope="module")
def indexes(tmp_path_factory, model_dir, corpus_file):
    """Of one corpus: dense rows of every dtype, and with sparse components beside them."""
    kinds = {
        "float32": {},
        "int8": {"row_dtype": "int8"},
        "1bit": {"row_dtype": "1bit"},
        "mixed": {"components": ("head", "blocks")},
        "mixed-1bit": {"components": ("head", "blocks"), "row_dtype": "1bit"},
        "head": {"components": ("head",)},
    }
    return build_kinds(tmp_path_factory.mktemp("scan-codes"), model_dir, corpus_file, kinds, rank=4, shard_rows=32, group_rows=40)


@pytest.mark.parametrize("name", ["float32", "int8", "1bit", "mixed", "mixed-1bit", "head"])
@pytest.mark.parametrize("mode", ["influence", "cosine", "loss-normalized"])
def test_answers_are_those_of_the_exact_search(indexes, name, mode):
    assert len(Index(indexes[name]).groups) > 1
    client = Client(indexes[name])
    queries = [Query(row=3), *(Query(text=t) for t in random_texts(9, seed=8))]
    for options in ({}, {"where": "year >= 1960"}, {"weights": {"blocks": 2.0} if name != "head" else {}}):
        exact = client.query_many(queries, k=5, mode=mode, **options)
        answers = client.query_many(queries, k=5, mode=mode, recall=0.99999, **options)
        for a, b in zip(exact, answers, strict=True):
            assert b.search.method == ("exact" if name == "head" else "by quantized scan and rescore"), b.search.note
            assert b.search.recall == (1.0 if name == "head" else 0.99999)
            assert b.search.candidates <= b.search.rows
            assert_same_ranking(b.proponents, a.proponents, 1e-5)
            assert_same_ranking(b.opponents, a.opponents, 1e-5)


def test_what_cannot_be_certified_is_scanned_and_says_so(indexes, tmp_path, monkeypatch):
    path = tmp_path / "i"
    shutil.copytree(indexes["float32"], path)
    Index(path).reindex()
    assert "damping" in Client(path).query(row=1, recall=0.9, mode="cosine", damping=1.0).search.note
    assert Client(path).query(row=1, recall=0.9, damping=1.0).search.method == "by quantized scan and rescore"
    monkeypatch.setattr("wherefrom.query.search._MOST_READ_OF_FEW", 5)
    answer = Client(path).query(row=1, recall=0.9)
    assert (answer.search.method, answer.search.recall, answer.search.candidates) == ("exact", 1.0, 120)
    assert "more rows" in answer.search.note
    monkeypatch.undo()
    for wrong in (0.2, 1.5, float("nan")):
        with pytest.raises(UsageError, match="recall"):
            Client(path).query(row=1, recall=wrong)
    before = Client(path).query(row=1, recall=0.9)
    cache, *further_caches = (path / "search").iterdir()
    raw = cache.read_bytes()
    for name, (start, size, _) in ArrayFile(cache)._entries.items():
        if not name.startswith("blocks/"):
            continue
        cache.write_bytes(raw[: start + size // 2] + bytes([raw[start + size // 2] ^ 1]) + raw[start + size // 2 + 1 :])
        if name != "blocks/zarr.json":
            answer = Client(path).query(row=1, recall=0.9)
            assert answer.search.recall == 1, name
            assert "wherefrom reindex" in answer.search.note
            assert [a.row for a in answer.proponents] == [a.row for a in Client(path).query(row=1).proponents]
    cache.write_bytes(raw[:-1])
    assert "wherefrom reindex" in Client(path).query(row=1, recall=0.9).search.note
    shutil.rmtree(path / "search")
    assert "wherefrom reindex" in Client(path).query(row=1, recall=0.9).search.note
    assert Index(path).reindex() == 1 + len(further_caches)
    assert Client(path).query(row=1, recall=0.9).proponents == before.proponents


def test_codes_of_other_rows_are_not_used(indexes, tmp_path, index_dir):
    shutil.copytree(indexes["float32"], tmp_path / "a")
    shutil.copytree(indexes["int8"], tmp_path / "b")
    a, b = (next((tmp_path / n / "search").iterdir()) for n in "ab")
    shutil.copy(b, a)
    assert "wherefrom reindex" in Client(tmp_path / "a").query(row=1, recall=0.9).search.note


def test_a_damaged_row_is_an_error_when_it_is_read(indexes, tmp_path):
    shutil.copytree(indexes["float32"], tmp_path / "i")
    Index(tmp_path / "i").reindex()
    client = Client(tmp_path / "i")
    row = client.query(row=1, recall=0.9).proponents[0].row
    shard, offset = client.index.locate(row)
    (component,) = client.index.manifest.components
    path = rows_path(tmp_path / "i", shard.id)
    start, _, _ = ArrayFile(path)._entries["blocks/codes/c/0/0"]
    raw = bytearray(path.read_bytes())
    raw[start + offset * component.stored * 4 + 2] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(IntegrityError, match="checksum"):
        search(Index(tmp_path / "i"), client.encode([Query(text="w1 w2 w3")]), 120, recall=0.9)


@pytest.mark.parametrize(
    ("name", "change"), [("factors", np.nan), ("noises", -1.0), ("norms", np.inf), ("codes", "float64"), ("checks", "int32")]
)
def test_codes_that_cannot_be_are_not_read(indexes, tmp_path, name, change):
    shutil.copytree(indexes["float32"], tmp_path / "i")
    index = Index(tmp_path / "i")
    group = index.groups[-1]
    groups = index._cache_groups(group)
    blocks = groups["blocks"]
    array = np.array(blocks.arrays[name])
    array = array.astype(change) if isinstance(change, str) else np.full_like(array, change)
    groups["blocks"] = ArrayGroup({**blocks.arrays, name: array})
    write_cache(index._cache_path(group), group.source, groups, tmp_path / "staging")
    assert "wherefrom reindex" in Client(tmp_path / "i").query(row=1, recall=0.9).search.note


def test_short_rows_of_a_large_index_are_scanned(tmp_path, index_dir, monkeypatch):
    from wherefrom.query import operands

    rows = np.random.default_rng(0).standard_normal((3000, 96)).astype(np.float32)
    index = dense_index(tmp_path / "i", index_dir, rows, "int8")
    query = [{index.manifest.components[0].name: DenseVectors(rows[5:6])}]
    monkeypatch.setattr(operands, "_MANY", 1 << 11)
    (hits,) = search(index, query[0], k=5, recall=0.9)
    assert (hits.candidates, hits.recall) == (3000, 1.0)
    assert "rows of 96 bytes are scanned faster than estimated from codes of 32" in hits.note
