"""Reranked answers: their scores are those of rows computed one at a time without codes, and their report bounds the other rows' scores."""

import fnmatch
import json

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import assert_close, example_queries
from wherefrom import BuildConfig, Client, Query
from wherefrom.cli import main
from wherefrom.query.answers import Answer
from wherefrom.ray_jobs.build import build
from wherefrom.store.errors import UsageError

QUERIES = example_queries()
METRICS = {
    "plain": {},
    "cosine": {"mode": "cosine"},
    "loss-normalized": {"mode": "loss-normalized"},
    "damped": {"damping": 3.0},
    "uncurved": {"curvature": False},
    "weights": {"weights": {"head": 0.3}},
    "layers": {"layers": ("h.0.*", "lm_head")},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory, model_dir, corpus_file):
    """Rows of few tokens and few coordinates, one bit each."""
    out = tmp_path_factory.mktemp("rerank") / "index"
    options = {
        "components": ("head", "embeddings", "blocks"),
        "row_dtype": "1bit",
        "coordinates": 16,
        "head_bits": 8,
        "head_max_tokens": 3,
        "rank": 4,
    }
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(out), shard_rows=50, hidden=True, **options))
    return Client(out)


def exact_row(client, example, measured):
    """The whole row of one example, computed alone."""
    return client.encoder.rows([example], queries=measured, exact=True)


def product(client, a, b, options):
    """Sum over components of the weighted product of two whole rows, coordinate by coordinate in float64, under a metric."""

    def change(eigenvalues, mean, built):
        """Factors that take the build's curvature away, and put another damping in its place."""
        plain = eigenvalues + built * mean
        if not options.get("curvature", True):
            return plain
        return plain / (eigenvalues + options.get("damping", built) * mean)

    def is_asked(layer):
        patterns = options.get("layers", ("*",))
        return any(fnmatch.fnmatchcase(layer, form) for pattern in patterns for form in (pattern, f"*.{pattern}"))

    total = 0.0
    for component in client.index.manifest.components:
        weight = component.weight * options.get("weights", {}).get(component.name, 1.0)
        one, other, built = a[component.name], b[component.name], component.curvature.damping
        if component.kind == "dense":
            mask = np.concatenate([np.full(layer.size, is_asked(layer.name)) for layer in component.layers])
            factors = mask * change(*client.index.spectrum(component), built)
            total += weight * float((one.values[0].astype(float) * factors) @ other.values[0].astype(float))
        elif is_asked(component.layer):
            vocabulary, inputs = client.index.sparse_spectrum(component)
            vectors = dict(zip(one.keys.tolist(), one.vectors.astype(float), strict=True))
            for key, vector in zip(other.keys.tolist(), other.vectors.astype(float), strict=True):
                factors = change(vocabulary[key] * inputs, vocabulary.mean() * inputs.mean(), built)
                total += weight * float((vectors.get(key, np.zeros(len(vector))) * factors) @ vector)
    return total


def expected_scores(client, query, options):
    """Scores of all rows, from rows computed one at a time."""
    examples = [client.index.example(row) for row in range(len(client.index))]
    rows = [exact_row(client, example, False) for example in examples]

    def scored(one):
        asked = exact_row(client, client.query_examples([one])[0], one.row is None)
        return np.array([product(client, asked, row, options) for row in rows]), product(client, asked, asked, options)

    if query.against is not None:
        other = Query(prompt=query.prompt, completion=query.against)
        scores, squared = scored(Query(prompt=query.prompt, completion=query.completion))[0] - scored(other)[0], None
    else:
        scores, squared = scored(query)
    if options.get("mode") == "cosine":
        lengths = np.array([product(client, row, row, options) for row in rows])
        return scores / np.sqrt(lengths * squared)
    if options.get("mode") == "loss-normalized":
        return scores / np.concatenate([client.index.losses(shard) for shard in client.index.shards])
    return scores


@pytest.mark.parametrize(
    ("query", "metric"), [(query, metric) for query in QUERIES for metric in METRICS if (query, metric) != ("against", "cosine")]
)
def test_scores_are_those_of_rows_computed_one_at_a_time(client, query, metric):
    options = METRICS[metric]
    expected = expected_scores(client, QUERIES[query], options)
    answer = client.query(QUERIES[query], k=7, rerank=len(client.index), **options)
    scale = np.abs(expected).max()
    for found, sign in ((answer.proponents, 1), (answer.opponents, -1)):
        best = np.sort(sign * expected)[::-1][:7]
        assert_close(sign * np.array([a.score for a in found]), best[best > 0], 1e-4, scale)
        assert_close(np.array([a.score for a in found]), expected[[a.row for a in found]], 1e-4, scale)
        assert all(a.error is None for a in found)
    assert not answer.search.estimates
    assert answer.search.rerank.highest == 0.0


def test_the_cosine_of_a_contrast_has_the_length_of_the_difference(client):
    query = QUERIES["against"]
    plain = client.query(query, k=3, rerank=120)
    cosine = client.query(query, k=120, rerank=120, mode="cosine")
    whole = client._exact_rows([query])
    squared = product(client, whole, whole, {})
    by_row = {a.row: a.score for a in cosine.proponents}
    for a in plain.proponents:
        row = exact_row(client, client.index.example(a.row), False)
        assert by_row[a.row] == pytest.approx(a.score / np.sqrt(squared * product(client, row, row, {})), rel=1e-3)


def test_several_queries_and_their_mean_are_reranked_as_one_at_a_time(client):
    queries = [QUERIES["row"], QUERIES["text"], QUERIES["against"], QUERIES["completion"]]
    together = client.query_many(queries, k=5, rerank=20)
    for query, answer in zip(queries, together, strict=True):
        alone = client.query(query, k=5, rerank=20)
        assert [a.row for a in answer.proponents] == [a.row for a in alone.proponents]
        assert_close([a.score for a in answer.proponents], [a.score for a in alone.proponents], 1e-4)
    (mean,) = client.query_many(queries, k=5, rerank=120, mean=True)
    expected = np.mean([expected_scores(client, query, {}) for query in queries], axis=0)
    assert_close([a.score for a in mean.proponents], np.sort(expected)[::-1][:5], 1e-4)


def test_ranks_and_scores_by_stored_rows_stay_beside_the_new_ones(client):
    query = QUERIES["text"]
    before = client.query(query, k=30)
    after = client.query(query, k=5, rerank=30)
    stored = {a.row: (a.rank, a.score) for a in (*before.proponents, *before.opponents)}
    for a in (*after.proponents, *after.opponents):
        assert (a.stored_rank, a.stored_score) == stored[a.row]
    report = after.search.rerank
    assert report.candidates == 60
    scores = client.scores([query])[0]
    others = np.delete(scores, list(stored))
    assert (others <= report.highest).all()
    assert (others >= report.lowest).all()
    assert report.highest == before.proponents[-1].score
    exact = expected_scores(client, query, {})
    differences = [exact[row] - score for row, (_, score) in stored.items()]
    assert report.difference == pytest.approx(np.sqrt(np.mean(np.square(differences))), rel=1e-3)


def test_fewer_positive_scores_than_candidates_leave_no_row_above_zero(client):
    report = client.query(QUERIES["text"], k=2, rerank=120).search.rerank
    assert (report.highest, report.lowest) == (0.0, 0.0)


def test_candidates_of_baselines_join(client):
    pytest.importorskip("bm25s")
    query = QUERIES["text"]
    plain = client.query(query, k=1, rerank=1)
    joined = client.query(query, k=1, rerank=1, baselines=True)
    assert plain.search.rerank.candidates == 2
    best = {b.name: b.rows[0] for b in joined.baselines}
    candidates = {plain.proponents[0].row, plain.opponents[0].row, best["bm25"], best["hidden"]}
    assert joined.search.rerank.candidates == len(candidates)
    exact = expected_scores(client, query, {})
    assert joined.proponents[0].row == max(candidates, key=lambda row: exact[row])


def test_filters_deletions_and_missing_opponents_are_kept(client):
    sources = client.index.column("source").to_pylist()
    answer = client.query(QUERIES["text"], k=120, rerank=120, where=f"source == {json.dumps(sources[0])}", opponents=False)
    assert answer.opponents == ()
    assert answer.search.rerank.lowest is None
    assert client.query(QUERIES["text"], k=2, rerank=9, opponents=False).search.rerank.candidates == 9
    assert {a.source for a in answer.proponents} == {sources[0]}


def test_an_answer_survives_json(client):
    answer = client.query(QUERIES["text"], k=3, rerank=9)
    assert Answer.from_dict(json.loads(json.dumps(answer.to_dict()))) == answer


def test_the_command_line_shows_both_scores(client):
    result = CliRunner().invoke(main, ["query", str(client.index.path), "--text", "w1 w2 w3 w4", "-k", "2", "--rerank", "15"])
    assert result.exit_code == 0, result.output
    assert "stored" in result.output
    assert "30 candidates computed again without codes" in " ".join(result.output.split())


@pytest.mark.parametrize("count", [0, 1001, 2.5])
def test_a_count_out_of_range_is_refused(client, count):
    with pytest.raises(UsageError, match="rerank"):
        client.query(QUERIES["text"], rerank=count)
