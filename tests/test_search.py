"""Search against brute force, FAISS, and indexes built the other way from scratch."""

import shutil

import faiss
import numpy as np
import pytest
from helpers import assert_close, assert_same_ranking, in_nats, random_texts, search, words
from hypothesis import given, settings
from hypothesis import strategies as st
from wherefrom import BuildConfig, Client, Query
from wherefrom.query.metric import Metric
from wherefrom.query.parts import Best
from wherefrom.query.scoring import Scorer, score_matrix
from wherefrom.ray_jobs.build import build
from wherefrom.store.errors import UsageError
from wherefrom.store.index import Index
from wherefrom.store.kernels import best_of
from wherefrom.store.vectors import DenseVectors, concatenate


def dense_rows(index):
    (component,) = index.manifest.components
    return np.concatenate([index.vectors(i, component).values for i in range(len(index))])


def random_queries(index, count, seed=0):
    (component,) = index.manifest.components
    return {"blocks": DenseVectors(np.random.default_rng(seed).normal(size=(count, component.dim)).astype(np.float32))}


@pytest.mark.parametrize("mode", ["influence", "cosine"])
def test_exact_search_equals_faiss_flat_both_ways(index_dir, mode):
    index = Index(index_dir)
    rows, queries = dense_rows(index), random_queries(index, 300)
    against = rows / np.linalg.norm(rows, axis=1, keepdims=True) if mode == "cosine" else rows
    values = queries["blocks"].values
    query_values = values / np.linalg.norm(values, axis=1, keepdims=True) if mode == "cosine" else in_nats(index, values)
    hits = search(index, queries, 7, Metric(mode))
    best, best_rows = faiss.knn(query_values, against, 7, metric=faiss.METRIC_INNER_PRODUCT)
    worst, worst_rows = faiss.knn(-query_values, against, 7, metric=faiss.METRIC_INNER_PRODUCT)
    for i, hit in enumerate(hits):
        largest = max(best[i].max(), worst[i].max())
        assert_close(hit.proponent_scores, best[i], 1e-5, largest)
        assert_close(hit.opponent_scores, -worst[i], 1e-5, largest)
        scores = against @ query_values[i]
        for its_rows, expected_rows in ((hit.proponents, best_rows[i]), (hit.opponents, worst_rows[i])):
            assert len(set(its_rows)) == 7
            assert_close(scores[its_rows], scores[expected_rows], 1e-5, largest)  # rows of nearly one score may change places
        assert (hit.proponent_scores > 0).all()
        assert (np.diff(hit.proponent_scores) <= 0).all()
        assert (hit.opponent_scores < 0).all()
        assert (np.diff(hit.opponent_scores) >= 0).all()


def test_all_scores_are_all_inner_products(index_dir):
    index = Index(index_dir)
    queries = random_queries(index, 3)
    actual = score_matrix(index, queries)
    rows, query_values = dense_rows(index).astype(float), in_nats(index, queries["blocks"].values.astype(float))
    assert_close(actual, query_values @ rows.T, 1e-6, np.outer(np.linalg.norm(query_values, axis=1), np.linalg.norm(rows, axis=1)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 9), st.sampled_from([1, -1]))
def test_merging_blocks_is_sorting_the_whole(scores, k, block, sign):
    scores = np.array(scores, np.float32)
    best = Best(k, sign)
    late = []
    for number, first in enumerate(range(0, len(scores), block)):
        part = scores[first : first + block]
        candidates = best.candidates(first, None, part)
        rows, values = np.empty(k, np.int64), np.empty(k, np.float32)  # the compiled loop finds the best of them
        rows = rows[: best_of(part, np.float32(sign), np.nextafter(best._threshold, np.float32(0)), rows, values)]
        of_candidates = np.lexsort((candidates[0], -sign * candidates[1]))[:k]
        assert (first + rows).tolist() == candidates[0][of_candidates].tolist()
        late.append(candidates if number % 3 else (first + rows, part[rows]))
        if number % 2:  # groups come in any order, and later ones may be found before earlier ones are added
            while late:
                best.add(*late.pop())
    for candidates in late:
        best.add(*candidates)
    actual = best.ranked()
    order = [i for i in sorted(range(len(scores)), key=lambda i: (-sign * scores[i], i)) if sign * scores[i] > 0][:k]
    assert actual[0].tolist() == order
    assert actual[1].tolist() == scores[order].tolist()


def built(tmp_path, model_dir, corpus_file, name, **options):
    out = tmp_path / f"{name}.wherefrom"
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(out), shard_rows=32, **({"rank": 4} | options)))
    return out


@pytest.mark.parametrize("curvature", ["fisher", "ekfac", "kfac", "diagonal"])
@pytest.mark.parametrize("mode", ["influence", "cosine"])
def test_query_time_damping_equals_an_index_built_with_it(tmp_path, model_dir, corpus_file, curvature, mode):
    low = Client(built(tmp_path, model_dir, corpus_file, "low", curvature=curvature, damping=0.05))
    high = Client(built(tmp_path, model_dir, corpus_file, "high", curvature=curvature, damping=2.0))
    queries = [Query(text=t) for t in random_texts(3, seed=9)]
    rows_low, rows_high = low.encode(queries), high.encode(queries)
    low_scores = score_matrix(low.index, rows_low, Metric(mode, 2.0))
    scratch = score_matrix(high.index, rows_high, Metric(mode))
    assert_close(low_scores, scratch, 2e-4)
    plain = score_matrix(low.index, rows_low, Metric(mode))
    assert np.abs(plain - scratch).max() > 1e-2 * np.abs(scratch).max()
    same = score_matrix(low.index, rows_low, Metric(mode, 0.05))
    assert_close(same, plain, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("int8", 2e-2)])
def test_smaller_rows_keep_the_scores(tmp_path, model_dir, corpus_file, index_dir, dtype, tolerance):
    small = Index(built(tmp_path, model_dir, corpus_file, dtype, row_dtype=dtype))
    queries = random_queries(small, 5)
    exact = score_matrix(Index(index_dir), queries)
    actual = score_matrix(small, queries)
    assert np.abs(actual - exact).max() < tolerance * np.abs(exact).max()
    for metric in (Metric("cosine"), Metric("cosine", 1.0)):
        exact = score_matrix(Index(index_dir), queries, metric)
        actual = score_matrix(small, queries, metric)
        assert np.abs(actual - exact).max() < tolerance * np.abs(exact).max()
        assert np.abs(actual).max() <= 1 + 1e-5


def test_every_row_finds_itself_first_in_cosine_mode(index_dir):
    client = Client(index_dir)
    answers = client.query_many([Query(row=i) for i in range(len(client.index))], k=1, mode="cosine")
    for i, answer in enumerate(answers):
        assert answer.proponents[0].score == pytest.approx(1, abs=1e-5)
        first_example = client.index.example(answer.proponents[0].row)
        assert answer.proponents[0].row == i or first_example.text == client.index.example(i).text


def test_asking_a_training_text_finds_it_and_the_self_influence_is_the_squared_norm(tmp_path, model_dir, corpus_file):
    client = Client(built(tmp_path, model_dir, corpus_file, "again"))
    (component,) = client.index.manifest.components
    for i in (0, 17, 119):
        example = client.index.example(i)
        query_rows = client.encode([Query(text=example.text)])["blocks"]
        stored = client.index.vectors(i, component)
        assert_close(query_rows.values, stored.values, 1e-4)
        answer = client.query(text=example.text, k=120)
        (self_hit,) = [a for a in answer.proponents if a.row == i]
        assert self_hit.score == pytest.approx(in_nats(client.index, float(np.linalg.norm(stored.values)) ** 2), rel=1e-3)


def test_a_query_by_row_loads_no_model(index_dir, monkeypatch):
    client = Client(index_dir)
    monkeypatch.setattr(type(client), "recorded", None)
    answer = client.query(row=5, k=3)
    assert answer.query["row"] == 5
    assert answer.search.recall == 1.0
    assert (answer.search.method, answer.search.rows, answer.search.candidates) == ("exact", 120, 120)


def test_answers_as_dictionaries_and_tables(index_dir):
    answer = Client(index_dir).query(prompt="w1 w2", completion=" w3", k=4)
    content = answer.to_dict()
    assert list(content) == ["query", "proponents", "opponents", "search", "reliability", "index"]
    assert content["query"] == {"prompt": "w1 w2", "completion": " w3", "mode": "influence", "damping": 0.1}
    assert {"rank", "row", "id", "score", "text", "source", "metadata"} <= content["proponents"][0].keys()
    assert [p["rank"] for p in content["proponents"]] == [1, 2, 3, 4]
    assert content["proponents"][0]["metadata"]["year"] == 1900 + content["proponents"][0]["row"]
    table = answer.to_pandas()
    assert table.kind.tolist() == ["proponent"] * 4 + ["opponent"] * 4
    assert (table.score[:4] > 0).all()
    assert (table.score[4:] < 0).all()
    assert Client(index_dir).query(row=1, opponents=False).opponents == ()


def test_many_queries_answer_like_each_alone(index_dir):
    client = Client(index_dir)
    queries = [Query(text=words(1, 2, 3, 4)), Query(row=7), Query(prompt="w5", completion=" w6 w7")]
    together = client.query_many(queries, k=3)
    for query, answer in zip(queries, together, strict=True):
        (alone,) = client.query_many([query], k=3)
        assert_same_ranking(answer.proponents, alone.proponents, 1e-5)
    assert client.query_many([]) == []


@pytest.mark.parametrize("recall", [1.0, 0.9])
def test_more_answers_than_rows_are_all_rows(index_dir, recall):
    client = Client(index_dir)
    answer = client.query(row=1, k=120, recall=recall)
    assert 100 < len(answer.proponents) + len(answer.opponents) <= 120
    for k in (121, 5 * 10**9):
        more = client.query(row=1, k=k, recall=recall)
        assert (more.proponents, more.opponents) == (answer.proponents, answer.opponents)
    few = client.query(row=1, k=121, where='id in ["d1", "d2"]')
    assert {a.id for a in (*few.proponents, *few.opponents)} == {"d1", "d2"}


def test_bad_queries_are_usage_errors(index_dir, tmp_path, model_dir, corpus_file):
    client = Client(index_dir)
    for options, message in [
        ({"row": 1, "k": 0}, "`k` is 0"),
        ({"row": 120}, "row 120"),
        ({"row": -1}, "row is -1; it must be at least 0"),
        ({}, "exactly one"),
        ({"text": "w1 w2", "row": 1}, "exactly one"),
        ({"prompt": "w1"}, "exactly one"),
        ({"row": 1, "mode": "vibes"}, "vibes"),
        ({"row": 1, "damping": 0.0}, "damping` is 0.0; it must be between 1e-06 and"),
        ({"row": 1, "damping": float("nan")}, "damping` is nan; it must be between 1e-06 and"),
        ({"text": words(*[1] * 65)}, "66 tokens long"),
    ]:
        with pytest.raises(UsageError, match=message):
            client.query(**options)
    plain = Client(built(tmp_path, model_dir, corpus_file, "plain", curvature="identity"))
    with pytest.raises(UsageError, match="no eigenvalues"):
        plain.query(row=1, damping=0.5)
    assert plain.query(row=1).proponents


def test_copies_of_an_index_answer_alike_wherever_they_lie(index_dir, tmp_path):
    moved = shutil.copytree(index_dir, tmp_path / "moved")
    assert [a.row for a in Client(moved).query(row=3).proponents] == [a.row for a in Client(index_dir).query(row=3).proponents]


@pytest.mark.parametrize("curvature", ["fisher", "ekfac", "diagonal", "identity"])
@pytest.mark.parametrize("mode", ["influence", "cosine"])
def test_undoing_the_curvature_equals_an_index_without(tmp_path, model_dir, corpus_file, curvature, mode):
    whitened, plain = (Client(built(tmp_path, model_dir, corpus_file, name, curvature=name)) for name in (curvature, "identity"))
    rows, query_rows = (
        concatenate([{"blocks": client.index.vectors(row, client.index.component("blocks"))} for row in (3, 50)])
        for client in (whitened, plain)
    )
    actual = score_matrix(whitened.index, rows, Metric(mode, curvature=False))
    expected = score_matrix(plain.index, query_rows, Metric(mode))
    assert_close(actual, expected, 2e-4)


@pytest.mark.parametrize("mode", ["influence", "cosine", "loss-normalized"])
def test_one_bit_scores_err_by_their_standard_error(tmp_path, model_dir, corpus_file, mode):
    """Over many rows and queries, the errors of estimates over what is stated are as wide as a standard normal, or a little narrower."""
    options = dict(model=str(model_dir), data=(str(corpus_file),), components=("head", "embeddings", "blocks"), rank=12, labels="data")
    build(BuildConfig(out=str(tmp_path / "bits"), row_dtype="1bit", coordinates=512, head_bits=16, embedding_bits=32, **options))
    client = Client(tmp_path / "bits")
    components = client.index.manifest.components
    examples = [client.index.example(i) for i in range(120)]
    rows, queries = client.encoder.rows(examples), [Query(text=t) for t in random_texts(40, seed=77, shortest=12)]
    query_rows = client.encode(queries)
    exact, squared = 0, 0
    for s in components:
        exact = exact + s.weight * query_rows[s.name].inner_products(rows[s.name])
        squared = squared + s.weight * rows[s.name].squared_norms
        norms = s.weight * query_rows[s.name].squared_norms + (0 if s is components[0] else norms)
    exact = exact / np.sqrt(norms[:, None] * squared[None]) if mode == "cosine" else in_nats(client.index, exact)
    if mode == "loss-normalized":
        exact = exact / np.concatenate([client.index.losses(shard) for shard in client.index.shards])
    metric = Metric(mode)
    scorer = Scorer.of(client.index, query_rows, metric)
    actual = score_matrix(client.index, query_rows, metric)
    errors = np.stack([scorer.standard_errors(query, np.arange(120)) for query in range(40)])
    z = ((actual - exact) / errors)[exact < np.quantile(exact, 0.9)]  # for rows that agree with the query the stated error is too large
    assert 0.8 < z.std() < 1.1
    assert np.mean(np.abs(z) > 3) < 0.01
    answer = client.query(text=examples[3].text, mode=mode, k=4, rerank=0)
    assert all(a.error > 0 for a in answer.proponents)
    first_hit = client.query(row=3, mode=mode, k=4).proponents[0]
    assert first_hit.error is None
    assert mode != "cosine" or (first_hit.row == 3 and first_hit.score <= 1)


def test_float_rows_have_no_error_of_their_own(index_dir):
    assert {a.error for a in Client(index_dir).query(text=words(1, 2, 3)).proponents} == {0.0}
