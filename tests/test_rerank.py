"""Reranked answers: their scores are those of rows computed one at a time without codes, and their report bounds the other rows' scores."""

import fnmatch
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import METRICS, assert_close, example_queries, in_nats, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from wherefrom import BuildConfig, Client, Query, recompute
from wherefrom.cli import main
from wherefrom.query.answers import Answer
from wherefrom.query.matrix import read_matrix
from wherefrom.query.metric import Metric
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.rerank import fit_rerank
from wherefrom.store.errors import IncompatibleError, IntegrityError, UsageError
from wherefrom.store.rerank import read_record
from wherefrom.store.vectors import DenseVectors

QUERIES = example_queries()


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
        query_row = exact_row(client, client.query_examples([one])[0], one.row is None)
        return np.array([product(client, query_row, row, options) for row in rows]), product(client, query_row, query_row, options)

    if query.against is not None:
        other = Query(prompt=query.prompt, completion=query.against)
        scores, squared = scored(Query(prompt=query.prompt, completion=query.completion))[0] - scored(other)[0], None
    else:
        scores, squared = scored(query)
    if options.get("mode") == "cosine":
        lengths = np.array([product(client, row, row, options) for row in rows])
        return scores / np.sqrt(lengths * squared)
    if options.get("curvature", True):
        scores = in_nats(client.index, scores)
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
    is_candidate = client.scores([QUERIES[query]], **options)[0] != 0  # codes may cancel exactly
    for hits, sign in ((answer.proponents, 1), (answer.opponents, -1)):
        best = np.sort(sign * expected[is_candidate])[::-1][:7]
        assert_close(sign * np.array([a.score for a in hits]), best[best > 0], 1e-4, scale)
        assert_close(np.array([a.score for a in hits]), expected[[a.row for a in hits]], 1e-4, scale)
        assert all(a.error is None for a in hits)
    assert not answer.search.estimates
    assert answer.search.rerank.highest == 0.0


def test_the_cosine_of_a_contrast_has_the_length_of_the_difference(client):
    query = QUERIES["against"]
    plain = client.query(query, k=3, rerank=120)
    cosine = client.query(query, k=120, rerank=120, mode="cosine")
    query_rows = client._recomputer._query_rows([query], Metric())
    squared = product(client, query_rows, query_rows, {})
    by_row = {a.row: a.score for a in cosine.proponents}
    for a in plain.proponents:
        row = exact_row(client, client.index.example(a.row), False)
        assert by_row[a.row] == pytest.approx(120 * a.score / np.sqrt(squared * product(client, row, row, {})), rel=1e-3)


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
    before = client.query(query, k=30, rerank=0)
    after = client.query(query, k=5, rerank=30)
    stored = {a.row: (a.rank, a.score) for a in (*before.proponents, *before.opponents)}
    for a in (*after.proponents, *after.opponents):
        assert (a.stored_rank, a.stored_score) == stored[a.row]
    report = after.search.rerank
    assert report.candidates == 60
    scores = client.scores([query])[0]
    other_scores = np.delete(scores, list(stored))
    assert (other_scores <= report.highest).all()
    assert (other_scores >= report.lowest).all()
    assert report.highest == before.proponents[-1].score
    exact = expected_scores(client, query, {})
    differences = [exact[row] - score for row, (rank, score) in stored.items() if rank > 15]
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


@pytest.mark.parametrize("count", [-1, 1001, 2.5])
def test_a_count_out_of_range_is_refused(client, count):
    with pytest.raises(UsageError, match="rerank"):
        client.query(QUERIES["text"], rerank=count)


@pytest.fixture(scope="module")
def fitted(client, tmp_path_factory):
    """The same index with EK-FAC of whole layers."""
    out = tmp_path_factory.mktemp("fitted") / "index"
    shutil.copytree(client.index.path, out)
    result = CliRunner().invoke(main, ["fit", str(out), "--examples", "60", "--damping", "0.2", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["examples"] == 60
    return Client(out)


def whole_gradients(client, example):
    """The gradient of every linear layer inside the blocks, [outputs, inputs], by autograd of one example's loss, in float64."""
    model = client.encoder.model
    task = client.recorded.task
    weights = {name: module.weight for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        loss = task.loss(model, task.collate([example], torch.device("cpu"))).sum()
        gradients = torch.autograd.grad(loss, list(weights.values()))
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return {name: gradient.T.double().numpy() for name, gradient in zip(weights, gradients, strict=True)}


def whole_product(view, a, b, damping=None):
    """g^T (EK-FAC + damping)^-1 g over all layers, as a formula of matrices."""
    (dense,) = (component for component in view.manifest.components if component.kind == "dense")
    total = 0.0
    for layer in dense.layers:
        inputs = view.arrays[f"blocks/{layer.input_group}/input_rotation"].astype(float)
        outputs = view.arrays[f"blocks/{layer.name}/output_rotation"].astype(float)
        values = view.arrays[f"blocks/{layer.name}/eigenvalues"].astype(float).reshape(layer.outputs, layer.inputs)
        relative = dense.curvature.damping if damping is None else damping
        one, other = (outputs.T @ gradient[layer.name] @ inputs for gradient in (a, b))
        total += float((one * other / (values + relative * values.mean())).sum())
    return dense.weight * total


@pytest.mark.parametrize("metric", ["plain", "cosine", "damped"])
@pytest.mark.parametrize("query", ["text", "row"])
def test_whole_layers_are_compared_as_a_formula_of_whole_gradients_says(client, fitted, query, metric):
    options = METRICS[metric]
    asked_query = QUERIES[query]
    view = fitted._recomputer.view
    sparse = {component.name: component.weight for component in view.manifest.components if component.kind == "sparse"}
    rows = [3, 50, 11, 0]
    examples = [fitted.index.example(row) for row in rows]
    query_example = fitted.query_examples([asked_query])[0]

    def score(a, b, a_measured):
        """Head and embeddings by rows computed alone, times the weights that the fit gave them, and the blocks by whole gradients."""
        weights = {c.name: sparse.get(c.name, 0.0) / c.weight for c in client.index.manifest.components}
        one, other = exact_row(client, a, a_measured), exact_row(client, b, False)
        damping = {name: value for name, value in options.items() if name == "damping"}
        rest = product(client, one, other, {"weights": weights, **damping})
        return rest + whole_product(view, whole_gradients(client, a), whole_gradients(client, b), options.get("damping"))

    expected = np.array([score(query_example, example, asked_query.row is None) for example in examples])
    if metric == "cosine":
        lengths = np.array([score(example, example, False) for example in examples])
        expected /= np.sqrt(lengths * score(query_example, query_example, asked_query.row is None))
    else:
        expected = in_nats(client.index, expected)
    actual = fitted.recomputed_scores([asked_query], rows, **options)[0]
    assert_close(actual, expected, 1e-3, np.abs(expected).max())
    answer = fitted.query(asked_query, k=120, rerank=120, **options)
    by_row = {a.row: a.score for a in (*answer.proponents, *answer.opponents)}
    assert_close([by_row[row] for row in rows], expected, 1e-3, np.abs(expected).max())
    assert answer.search.rerank.unprojected_layers == 8


def test_the_fit_covers_all_layers_and_its_eigenvalues_are_second_moments(client, fitted):
    view = fitted._recomputer.view
    (dense,) = (component for component in view.manifest.components if component.kind == "dense")
    assert dense.dim == sum(m.weight.numel() for m in client.encoder.model.modules() if type(m).__name__ == "Conv1D")
    for layer in dense.layers:
        for name, size in ((f"{layer.name}/output_rotation", layer.outputs), (f"{layer.input_group}/input_rotation", layer.inputs)):
            rotation = view.arrays[f"blocks/{name}"]
            np.testing.assert_allclose(rotation.T @ rotation, np.eye(size), atol=1e-5)
        assert view.arrays[f"blocks/{layer.name}/eigenvalues"].min() >= 0


@given(st.integers(1, 3), st.integers(1, 9000), st.integers(0, 2**31))
def test_vectors_in_8_bits_err_by_half_a_step_of_their_block(rows, dim, seed):
    generator = np.random.default_rng(seed)
    values = (generator.standard_normal((rows, dim)) * generator.choice([0.0, 1e-20, 1.0, 1e20], dim)).astype(np.float32)
    coded = recompute.CodedVectors.of(DenseVectors(values))
    other_vectors = generator.standard_normal((4, dim)).astype(np.float32)
    blocks = [slice(first, first + 4096) for first in range(0, dim, 4096)]
    largest = sum(np.abs(values[:, b]).max(axis=1)[:, None] / 254 * np.abs(other_vectors[:, b]).sum(axis=1) for b in blocks)
    size = np.abs(values.astype(float)) @ np.abs(other_vectors.astype(float)).T
    errors = np.abs(coded.inner_products(DenseVectors(other_vectors)) - values.astype(float) @ other_vectors.astype(float).T)
    assert (errors <= 1.01 * largest + 1e-4 * size).all()


def test_queries_in_pieces_give_the_same(fitted, monkeypatch):
    queries = [QUERIES["text"], QUERIES["completion"], QUERIES["against"]]
    together = fitted.recomputed_scores(queries, range(20))
    (mean,) = fitted.query_many(queries, k=120, rerank=120, mean=True)
    scores = {a.row: a.score for a in (*mean.proponents, *mean.opponents)}
    assert_close([scores[row] for row in range(20)], together.mean(axis=0), 1e-3, np.abs(together).max())
    monkeypatch.setattr(recompute, "_ROW_BYTES", 1)
    coded = Client(fitted.index.path).recomputed_scores(queries, range(20))
    assert (coded != together).any()
    assert_close(coded, together, 2e-3, np.abs(together).max())
    for options in ({"mode": "cosine"}, {"mode": "loss-normalized"}):
        scores = Client(fitted.index.path).recomputed_scores(queries, range(20), **options)
        monkeypatch.undo()
        expected = Client(fitted.index.path).recomputed_scores(queries, range(20), **options)
        monkeypatch.setattr(recompute, "_ROW_BYTES", 1)
        assert_close(scores, expected, 2e-3, np.abs(expected).max())
    for answer in Client(fitted.index.path).query_many(queries, k=3, rerank=3):
        assert answer.search.rerank.query_bits == 8
    (again,) = Client(fitted.index.path).query_many(queries, k=120, rerank=120, mean=True)
    assert_close([a.score for a in again.proponents], [a.score for a in mean.proponents], 1e-3)


def test_a_matrix_of_recomputed_scores_is_written(fitted, tmp_path):
    queries = [QUERIES["text"], QUERIES["completion"]]
    lines = [{"id": "a", "text": queries[0].text}, {"id": "b", "prompt": queries[1].prompt, "completion": queries[1].completion}]
    file = write_jsonl(tmp_path / "queries.jsonl", lines)
    out = tmp_path / "scores.zarr"
    result = CliRunner().invoke(main, ["scores", str(fitted.index.path), "--file", str(file), "--out", str(out), "--recompute"])
    assert result.exit_code == 0, result.output
    scores, rows, names = read_matrix(out)
    assert names == ["a", "b"]
    assert rows == fitted.index.column("id").to_pylist()
    np.testing.assert_allclose(scores, fitted.recomputed_scores(queries, range(120)), rtol=1e-6)


def test_a_fitted_index_says_so_and_is_verified(fitted):
    run = CliRunner()
    path = str(fitted.index.path)
    assert "EK-FAC of 8 whole layers, fitted on 60 examples" in " ".join(run.invoke(main, ["info", path]).output.split())
    assert json.loads(run.invoke(main, ["info", path, "--json"]).output)["rerank"]["layers"] == 8
    shown = run.invoke(main, ["query", path, "--text", "w1 w2 w3 w4", "-k", "2", "--rerank", "15"])
    assert "computed again with EK-FAC of 8 whole layers" in " ".join(shown.output.split())
    assert run.invoke(main, ["verify", path]).exit_code == 0


def test_a_damaged_fit_is_refused_and_plain_queries_are_not(fitted, tmp_path):
    def damaged(change, error, match):
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(fitted.index.path, copy)
        (arrays,) = (copy / "rerank").glob("*.safetensors")
        change(copy / "rerank/rerank.json", arrays)
        client = Client(copy)
        assert client.query(row=3, k=1).proponents
        with pytest.raises(error, match=match):
            client.query(row=3, k=1, rerank=5)
        assert CliRunner().invoke(main, ["verify", str(copy)]).exit_code == 4

    def edit(**values):
        return lambda record, arrays: record.write_text(json.dumps(json.loads(record.read_text()) | values))

    damaged(lambda record, arrays: arrays.unlink(), IntegrityError, "run wherefrom fit again")
    damaged(lambda record, arrays: arrays.write_bytes(b"x" * arrays.stat().st_size), IntegrityError, "SHA-256 differs")
    damaged(lambda record, arrays: record.write_text("{"), IntegrityError, "is damaged")
    damaged(edit(components=[]), IntegrityError, "is damaged")
    damaged(edit(format="wherefrom rerank 9"), IncompatibleError, "not of this version")
    damaged(edit(encoder="0" * 64), IncompatibleError, "another encoder")
    damaged(edit(file={"path": "../x", "bytes": 1, "sha256": "0" * 64}), IntegrityError, "is damaged")
    damaged(edit(file={"path": "encoder/x", "bytes": 1, "sha256": "0" * 64}), IntegrityError, "not in the folder rerank")
    damaged(lambda record, arrays: (record.unlink(), record.symlink_to("nowhere")), IntegrityError, "cannot be read|is damaged")
    components = json.loads((fitted.index.path / "rerank/rerank.json").read_text())["components"]
    *sparse, dense = components
    damaged(edit(components=sparse), IntegrityError, "one for each part")
    damaged(edit(components=[*components, dense]), IntegrityError, "one for each part")
    damaged(edit(components=[*sparse, {**dense, "model": 7}]), IntegrityError, "one for each part")
    damaged(edit(components=[*sparse, {**dense, "weight": -1}]), IntegrityError, "one for each part")
    damaged(edit(components=[*sparse, {**dense, "coordinates": 3}]), IntegrityError, "not EK-FAC of whole layers")
    damaged(edit(components=[{**sparse[0], "name": "tail"}, *sparse[1:], dense]), IntegrityError, "tail is not the index's")


def test_what_cannot_be_fitted_is_refused(client, tmp_path, model_dir, corpus_file):
    for arguments in (["--examples", "0"], ["--damping", "-1"], ["--damping", "nan"]):
        assert CliRunner().invoke(main, ["fit", str(client.index.path), *arguments]).exit_code == 2
    assert not (client.index.path / "rerank").exists()
    models = str(model_dir), str(shutil.copytree(model_dir, tmp_path / "other"))
    several = BuildConfig(model=models, data=(str(corpus_file),), out=str(tmp_path / "two"), components=("head",))
    build(several)
    with pytest.raises(UsageError, match="several models"):
        fit_rerank(tmp_path / "two")


def test_a_second_fit_replaces_the_first(fitted, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(fitted.index.path, copy)
    before = Client(copy).recomputed_scores([QUERIES["text"]], range(5))
    fit_rerank(copy, examples=60, damping=5.0)
    assert len(list((copy / "rerank").glob("*.safetensors"))) == 1
    assert not np.allclose(before, Client(copy).recomputed_scores([QUERIES["text"]], range(5)))


@pytest.mark.slow
@pytest.mark.processes
def test_workers_fit_the_same(fitted, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(fitted.index.path, copy)
    record = fit_rerank(copy, examples=60, damping=0.2, runtime={"workers": 2})
    assert record.file.sha256 == read_record(fitted.index).file.sha256
