"""Options of queries (filters, groups, contrasts, spans, means, layers, norms), against brute force or an index built so."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from click.testing import CliRunner
from helpers import assert_close, make_tokenizer, random_texts, words, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from wherefrom import BuildConfig, Client, Query, connect
from wherefrom.cli import main
from wherefrom.query.groups import _POISSON, Sums
from wherefrom.query.metric import Metric
from wherefrom.query.scoring import all_scores
from wherefrom.ray_jobs.build import build
from wherefrom.store.errors import NumericalError, UsageError
from wherefrom.store.index import Index
from wherefrom.store.vectors import DenseVectors

COLORS = ("red", "green", None)


def record(i, text):
    extra = {"day": f"2020-01-{1 + i % 28:02d}", "a b": i % 3} if i >= 60 else {}
    return {
        "id": f"d{i}",
        "text": text,
        "year": 1900 + i,
        "color": COLORS[i % 3],
        "good": i % 2 == 0,
        "mixed": (4, "4", None)[i % 3],
        **extra,
    }


RECORDS = [record(i, t) for i, t in enumerate(random_texts(120, seed=3))]


@pytest.fixture(scope="module")
def index_path(tmp_path_factory, model_dir):
    """Dense float32 rows and a head; four shards, of which the first two lack two columns."""
    here = tmp_path_factory.mktemp("queries")
    data = write_jsonl(here / "c.jsonl", RECORDS)
    options = dict(components=("blocks", "head"), rank=4, head_bits=32, shard_rows=30)
    build(BuildConfig(model=str(model_dir), data=(str(data),), out=str(here / "i"), **options))
    return here / "i"


@pytest.fixture(scope="module")
def client(index_path):
    return Client(index_path)


def matrix(client, queries, metric=Metric()):
    return np.concatenate([s for _, s in all_scores(client.index, client.encode(queries), metric)], axis=1)


# --- filters

FILTERS = {
    "year >= 1950": lambda r: r["year"] >= 1950,
    "1950 <= year < 1960 or year == 1901": lambda r: 1950 <= r["year"] < 1960 or r["year"] == 1901,
    'color == "red"': lambda r: r["color"] == "red",
    'color != "red"': lambda r: r["color"] is not None and r["color"] != "red",
    "color == None": lambda r: r["color"] is None,
    "color is not None": lambda r: r["color"] is not None,
    'not (color == "red" or good == True)': lambda r: r["color"] == "green" and not r["good"],
    'color in ["red", "blue"]': lambda r: r["color"] == "red",
    'color not in ["red"]': lambda r: r["color"] == "green",
    "good == False and year > 1910.5": lambda r: not r["good"] and r["year"] > 1910.5,
    'day > "2020-01-20"': lambda r: r.get("day", "") > "2020-01-20",
    'column("a b") == 2': lambda r: r.get("a b") == 2,
    'id.startswith("d1") and text.contains("w1 ")': lambda r: r["id"].startswith("d1") and "w1 " in r["text"],
    "-1 < chunk": lambda r: True,
    "document == id": lambda r: True,
    "year == -5": lambda r: False,
    "mixed == 4": lambda r: r["mixed"] == 4,
    "mixed != '4'": lambda r: r["mixed"] == 4,
}


@pytest.mark.parametrize("text", FILTERS)
def test_a_filter_matches_what_python_would(client, text):
    assert client.index.matching(text).tolist() == [FILTERS[text](r) for r in RECORDS]


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.tuples(st.sampled_from(["<", "<=", "==", "!=", ">", ">="]), st.integers(1895, 2025)),
        lambda e: st.tuples(e, st.sampled_from(["and", "or"]), e),
    )
)
def test_any_combination_of_comparisons(client, tree):
    def text(node):
        return f"year {node[0]} {node[1]}" if len(node) == 2 else f"({text(node[0])} {node[1]} {text(node[2])})"

    assert client.index.matching(text(tree)).tolist() == [bool(eval(text(tree), {"year": r["year"]})) for r in RECORDS]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yaer > 3", "there is no column 'yaer'; this index has"),
        ("year > 'x'", "cannot be compared with 'x'"),
        ("color > 3", "cannot be compared with 3"),
        ("good == 1", "cannot be compared with 1"),
        ("year", "cannot be compared"),
        ("year >", "is not an expression"),
        ("", "is not an expression"),
        ("(" * 5000 + ")" * 5000, "is not an expression"),
        ("__import__('os').system('true')", "a filter cannot contain"),
        ("year.__class__ == 3", "is not a column's name"),
        ("[y for y in [1]] == year", "is neither"),
        ("year > None", "None has no order"),
        ("3 > 2", "is not a column's name"),
        ("year in id", "needs a list"),
        ("year in [year]", "is neither"),
        ("day + 3 > 2", "is not a column's name"),
        ("year == (lambda: 3)()", "is neither"),
        ("year if good else good", "a filter cannot contain"),
    ],
)
def test_what_a_filter_refuses(client, text, message):
    with pytest.raises(UsageError) as error:
        client.index.matching(text)
    assert message in str(error.value)


@pytest.mark.parametrize("mode", ["influence", "cosine", "loss-normalized"])
def test_only_matching_rows_are_ranked(client, mode):
    query = Query(text=words(3, 9, 27, 41))
    scores = matrix(client, [query], Metric(mode))[0]
    allowed = np.array([r["year"] >= 1960 and r["good"] for r in RECORDS])
    answer = client.query_many([query], mode=mode, where="year >= 1960 and good == True", k=5, rerank=0)[0]
    assert answer.search.rows == allowed.sum()
    assert answer.query["where"] == "year >= 1960 and good == True"
    for hits, sign in ((answer.proponents, 1), (answer.opponents, -1)):
        rows, best = [a.row for a in hits], sign * np.sort(sign * scores[allowed])[:-6:-1]
        assert len(set(rows)) == 5
        assert allowed[rows].all()
        assert_close([a.score for a in hits], best, 1e-5)
        assert_close(scores[rows], best, 1e-5)  # rows of nearly one score may change places
    with pytest.raises(UsageError, match="no row matches"):
        client.query(text="w1 w2", where="year > 3000")


# --- groups


def test_groups_add_up_and_their_intervals_are_those_of_a_bootstrap(client):
    query = Query(text=words(3, 9, 27, 41))
    scores = matrix(client, [query])[0].astype(float)
    codes, values = client.index.distinct("color", 10)
    groups = Sums.of(codes, values, scores[None].astype(np.float32), client.index.alive, 0).groups(0)
    assert {g.value for g in groups} == set(COLORS)
    generator = np.random.default_rng(5)
    for g in groups:
        is_of_group = np.array([r["color"] == g.value for r in RECORDS])
        assert (g.rows, g.positive, g.negative) == (is_of_group.sum(), (scores[is_of_group] > 0).sum(), (scores[is_of_group] < 0).sum())
        assert_close(g.total, scores[is_of_group].sum(), 1e-4, np.abs(scores[is_of_group]).sum())
        assert g.positive_share == pytest.approx(scores[is_of_group & (scores > 0)].sum() / scores[scores > 0].sum(), rel=1e-4)
        assert g.negative_share == pytest.approx(scores[is_of_group & (scores < 0)].sum() / scores[scores < 0].sum(), rel=1e-4)
        draws = [(scores * is_of_group)[generator.integers(0, 120, 120)].sum() for _ in range(4000)]
        width = np.quantile(draws, 0.975) - np.quantile(draws, 0.025)
        assert g.high - g.low == pytest.approx(width, rel=0.35)
        assert g.low < g.total < g.high
    assert [g.total for g in groups] == sorted((g.total for g in groups), reverse=True)
    assert _POISSON.mean() == pytest.approx(1, abs=1e-6)
    assert _POISSON.var() == pytest.approx(1, abs=0.03)
    some = Sums.of(codes, values, scores[None].astype(np.float32), np.arange(120) < 10, 0).groups(0)
    assert sum(g.rows for g in some) == 10
    with pytest.raises(UsageError, match="there is no column 'colour'"):
        client.query(text="w1 w2", group_by="colour")


def test_groups_of_a_column_of_several_kinds_are_told_apart(index_path, client):
    groups = client.query(row=3, group_by="mixed").groups
    assert {(g.value, type(g.value), g.rows) for g in groups} == {(4, int, 40), ("4", str, 40), (None, type(None), 40)}
    shown = CliRunner().invoke(main, ["query", str(index_path), "--row", "3", "--group-by", "mixed"]).stdout
    assert {line.split()[0] for line in shown[shown.index("influence ") :].splitlines() if line.startswith((" 4", " '4'", " (none)"))} == {
        "4",
        "'4'",
        "(none)",
    }


# --- what is asked


def test_a_contrast_is_the_gradient_of_the_difference_of_log_probabilities(client):
    prompt, one, other = "w1 w2", " w3 w4", " w9"
    scores = matrix(client, [Query(prompt, one, against=other), Query(prompt, one), Query(prompt, other)])
    assert_close(scores[0], scores[1] - scores[2], 1e-4, np.abs(scores).max())
    # and against autograd: rows of the blocks are whitened projections of the gradient, which is linear
    tokenizer, model = make_tokenizer(), client.encoder.model
    model.requires_grad_(True)

    def log_probability(completion):
        ids = torch.tensor([tokenizer(prompt + completion).input_ids])
        log_p = model(ids).logits.log_softmax(-1)
        return sum(log_p[0, t - 1, ids[0, t]] for t in range(2, ids.shape[1]))

    layer = client.index.component("blocks").layers[0]
    weight = model.get_submodule(layer.name).weight
    (gradient,) = torch.autograd.grad(-(log_probability(one) - log_probability(other)), weight)
    model.requires_grad_(False)
    maps = client.encoder.component_encoders["blocks"].maps[layer.name]
    projected = (maps[1] @ gradient.T @ maps[0].T).flatten()[None]
    whitened = client.encoder.component_encoders["blocks"].whiten(layer, projected)[0].numpy()
    actual = client.encode([Query(prompt, one, against=other)])["blocks"].values[0][: layer.size]
    assert_close(actual, whitened, 1e-4)


def test_spans_of_a_completion_add_up_to_the_whole(client):
    full_query = Query("w1 w2", " w3 w4 w5")
    parts = [Query("w1 w2", " w3 w4 w5", span=span) for span in ("w3", "w4 w5")]
    scores = matrix(client, [full_query, *parts], Metric(weights={"head": 0}))  # the head's rows hold the tokens that are asked about alone
    assert_close(scores[0], scores[1] + scores[2], 1e-4, np.abs(scores).max())
    in_text = matrix(client, [Query(text="w1 w2 w3 w4 w5", span="w3"), parts[0]])
    assert_close(in_text[0], in_text[1], 1e-5, np.abs(scores).max())
    for query in (Query("w1", " w3 w3", span="w3"), Query("w1", " w3", span="w1")):
        with pytest.raises(UsageError, match="times in the queried text"):
            client.encode([query])
    with pytest.raises(UsageError, match="the span is empty"):
        client.encode([Query(text="w1 w2", span="")])
    with pytest.raises(UsageError, match="needs a completion"):
        Query(text="w1 w2", against="w3")


def test_a_mean_of_queries_scores_the_mean_of_their_scores(client):
    queries = [
        Query(text=words(4, 5, 6), weight=2.0),
        Query("w1", " w2"),
        Query(row=7, weight=-0.5),
        Query("w1", " w2", against=" w8"),
    ]
    scores = matrix(client, queries)
    expected = np.array([2.0, 1.0, -0.5, 1.0]) @ scores / 4
    (answer,) = client.query_many(queries, mean=True, k=120)
    actual = np.zeros(120)
    for a in (*answer.proponents, *answer.opponents):
        actual[a.row] = a.score
    assert_close(actual, expected, 1e-4, np.abs(scores).max())
    assert answer.query["mean_of"] == 4


def test_layers_left_out_equal_an_index_without_them(tmp_path, client, model_dir):
    data = write_jsonl(tmp_path / "c.jsonl", RECORDS)
    options = dict(rank=4, shard_rows=30, layers=("h.0.mlp.*", "h.1.attn.c_attn"))
    build(BuildConfig(model=str(model_dir), data=(str(data),), out=str(tmp_path / "i"), **options))
    scratch, queries = Client(tmp_path / "i"), [Query(text=t) for t in random_texts(3, seed=9)]
    for mode in ("influence", "cosine"):
        few = matrix(client, queries, Metric(mode, layers=options["layers"]))
        scratch_scores = matrix(scratch, queries, Metric(mode))
        assert_close(few / np.abs(few).max(), scratch_scores / np.abs(scratch_scores).max(), 1e-4)
    head = matrix(client, queries, Metric(layers=("lm_head",)))
    assert_close(head, matrix(client, queries, Metric(weights={"blocks": 0})), 1e-5)
    with pytest.raises(UsageError, match="no layer of this index matches"):
        client.query(text="w1 w2", layers=("x.*",))


def test_without_curvature_scores_are_those_of_plain_projected_gradients(tmp_path, client, model_dir):
    data = write_jsonl(tmp_path / "c.jsonl", RECORDS)
    build(BuildConfig(model=str(model_dir), data=(str(data),), out=str(tmp_path / "i"), rank=4, curvature="identity"))
    plain, queries = Client(tmp_path / "i"), [Query(text=t) for t in random_texts(3, seed=9)]
    for mode in ("influence", "cosine"):
        metric = Metric(mode, curvature=False, weights={"head": 0})
        actual, expected = matrix(client, queries, metric), matrix(plain, queries, Metric(mode))
        scale = 1 if mode == "cosine" else client.index.component("blocks").weight
        assert_close(actual, expected * scale, 1e-3)
    assert client.query(row=3, curvature=False).query["curvature"] is False


def test_per_nat_divides_by_the_examples_own_losses(client):
    examples = [client.index.example(i) for i in range(120)]
    from wherefrom.evaluation.retrain import compute_losses

    losses = compute_losses(client.recorded.task, client.encoder.model, examples)
    stored = np.concatenate([client.index.losses(shard) for shard in client.index.shards])
    np.testing.assert_allclose(stored, losses, rtol=1e-4)
    query = [Query(text=words(1, 2, 3))]
    assert_close(matrix(client, query, Metric("loss-normalized")), matrix(client, query) / stored, 1e-5)


# --- the whole matrix


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_matrix_of_scores_in_zarr_and_parquet(tmp_path, client, index_path, monkeypatch):
    records = [{"id": f"q{i}", "text": t} for i, t in enumerate(random_texts(7, seed=2))]
    file = write_jsonl(tmp_path / "q.jsonl", records)
    expected = matrix(client, [Query(text=a["text"]) for a in records])
    monkeypatch.setattr("wherefrom.query.matrix._BLOCK_BYTES", 4 * 30 * 3)  # three queries at a time
    done = run("scores", index_path, "--file", file, "--out", tmp_path / "s.zarr")
    assert done.exit_code == 0, done.output
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    assert_close(group["scores"][:], expected, 1e-5)
    assert list(group["rows"][:]) == [r["id"] for r in RECORDS]
    assert list(group["queries"][:]) == [a["id"] for a in records]
    done = run("scores", index_path, "--file", file, "--out", tmp_path / "s.parquet", "--mode", "cosine", "--json")
    assert json.loads(done.stdout) == {"out": str(tmp_path / "s.parquet"), "queries": 7, "rows": len(RECORDS)}
    table = pq.read_table(tmp_path / "s.parquet")
    assert table["id"].to_pylist() == [r["id"] for r in RECORDS]
    cosines = matrix(client, [Query(text=a["text"]) for a in records], Metric("cosine"))
    assert_close(np.stack([table[a["id"]] for a in records]), cosines, 1e-5, 1)
    again = run("scores", index_path, "--file", file, "--out", tmp_path / "s.zarr")
    assert (again.exit_code, "exists" in again.stderr) == (2, True)
    assert run("scores", index_path, "--file", file, "--out", tmp_path / "s.csv").exit_code == 2
    twice = write_jsonl(tmp_path / "t.jsonl", [records[0], records[0]])
    assert "the same id" in run("scores", index_path, "--file", twice, "--out", tmp_path / "t.parquet").stderr
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".s") or p.name.startswith(".t")]


def test_everything_from_the_command_line(tmp_path, index_path):
    options = ["--where", 'color == "red"', "--group-by", "year", "--layers", "h.0.*", "--no-curvature", "-k", "3", "--json"]
    done = run("query", index_path, "--prompt", "w1", "--completion", " w2", "--against", " w3", *options)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["query"]["against"] == " w3"
    assert answer["query"]["layers"] == ["h.0.*"]
    assert {a["metadata"]["color"] for a in answer["proponents"] + answer["opponents"]} == {"red"}
    assert sum(g["rows"] for g in answer["groups"]) == 40
    file = write_jsonl(tmp_path / "q.jsonl", [{"text": "w1 w2 w3", "weight": 2}, {"prompt": "w1", "completion": " w5", "against": " w6"}])
    shown = run("query", index_path, "--file", file, "--mean", "--group-by", "color", "--mode", "loss-normalized")
    assert shown.exit_code == 0, shown.output
    assert "the mean of 2 queries" in shown.stdout
    assert "(none)" in shown.stdout
    assert "with --file" in run("query", index_path, "--text", "w1 w2", "--mean").stderr
    assert Index(index_path).manifest.number == 1


# --- baselines


@pytest.fixture(scope="module")
def hidden_path(tmp_path_factory, model_dir):
    here = tmp_path_factory.mktemp("baselines")
    data = write_jsonl(here / "c.jsonl", RECORDS)
    build(BuildConfig(model=str(model_dir), data=(str(data),), out=str(here / "i"), components=("head",), shard_rows=50, hidden=True))
    return here / "i"


def test_baselines_are_bm25_hidden_states_and_norms(hidden_path, model_dir):
    from bm25s import BM25, tokenize
    from scipy.stats import spearmanr
    from transformers import AutoModelForCausalLM

    client = Client(hidden_path)
    texts = [r["text"] for r in RECORDS]
    texts_of_queries = [words(5, 9, 11, 5), RECORDS[7]["text"]]
    queries = [Query(text=texts_of_queries[0]), Query(row=7)]
    answers = client.query_many(queries, k=6, baselines=True, where="year >= 1905")
    is_searched = np.arange(120) >= 5
    ours = matrix(client, queries)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), make_tokenizer()

    def state(text):
        ids = torch.tensor([tokenizer(text)["input_ids"] + [0]])
        with torch.no_grad():
            return model(ids, output_hidden_states=True).hidden_states[-1][0, :-1].mean(0).double().numpy()

    states = np.stack([state(t) for t in texts])
    engine = BM25()
    engine.index(tokenize(texts, stopwords=None, show_progress=False), show_progress=False)
    for number, answer in enumerate(answers):
        query_state = state(texts_of_queries[number])
        expected = {
            "bm25": engine.get_scores(tokenize([texts_of_queries[number]], stopwords=None, show_progress=False, return_ids=False)[0]),
            "hidden": states @ query_state / np.linalg.norm(states, axis=1) / np.linalg.norm(query_state),
            "norm": client.index.norms(client.index.manifest.components[0]),
        }
        assert {c.name for c in answer.baselines} == set(expected)
        for baseline in answer.baselines:
            scores = expected[baseline.name]
            assert_close(baseline.scores, np.sort(scores[is_searched])[::-1][:6], 2e-3)
            assert baseline.correlation == pytest.approx(spearmanr(scores[is_searched], ours[number][is_searched]).statistic, abs=0.02)
            assert all(is_searched[list(baseline.rows)])
            assert baseline.ids == tuple(RECORDS[row]["id"] for row in baseline.rows)
            assert baseline.shared == len(set(baseline.rows) & {a.row for a in answer.proponents})


def test_baselines_of_means_and_contrasts_are_means_and_differences(hidden_path):
    def said(queries, **options):
        answers = Client(hidden_path).query_many(queries, k=120, baselines=True, **options)
        return [{c.name: np.array(c.scores)[np.argsort(c.rows)] for c in answer.baselines} for answer in answers]

    ends = " w9 w11", " w5"
    plain = said([*(Query(prompt="w3 w5", completion=end) for end in ends), Query(row=7)])
    (contrast,) = said([Query(prompt="w3 w5", completion=ends[0], against=ends[1])])
    queries = [Query(prompt="w3 w5", completion=ends[0], against=ends[1], weight=0.5), Query(row=7, weight=-3.0)]
    (mean,) = said(queries, mean=True)
    for name in ("bm25", "hidden"):
        difference, largest = plain[0][name] - plain[1][name], max(np.abs(p[name]).max() for p in plain)
        assert np.abs(difference).max() > 0.01
        assert_close(contrast[name], difference, 1e-5, largest)
        assert_close(mean[name], (0.5 * difference - 3 * plain[2][name]) / 2, 1e-5, 2 * largest)
    assert np.array_equal(contrast["norm"], plain[0]["norm"])
    assert np.array_equal(mean["norm"], plain[0]["norm"])


def test_baselines_on_the_command_line_and_without_hidden_states(hidden_path, index_path):
    shown = CliRunner().invoke(main, ["query", str(hidden_path), "--row", "3", "--baselines"])
    assert shown.exit_code == 0, shown.output
    for name in ("baselines", "bm25", "hidden", "norm"):
        assert name in shown.output
    record = json.loads(CliRunner().invoke(main, ["query", str(index_path), "--row", "3", "--baselines", "--json"]).stdout)
    assert [c["name"] for c in record["baselines"]] == ["norm", "bm25"]
    assert "baselines" not in json.loads(CliRunner().invoke(main, ["query", str(index_path), "--row", "3", "--json"]).stdout)


def test_hidden_states_follow_additions_and_compaction(hidden_path, tmp_path):
    import shutil

    path = tmp_path / "i"
    shutil.copytree(hidden_path, path)
    data = write_jsonl(tmp_path / "more.jsonl", [{**record(i, t), "id": f"m{i}"} for i, t in enumerate(random_texts(8, seed=77))])
    for command in (["add", str(path), "--data", str(data)], ["delete", str(path), "--where", "year < 1904"], ["compact", str(path)]):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
    index = Index(path)
    states = np.concatenate([index.hidden(shard) for shard in index.shards])
    from wherefrom.indexer.hidden import mean_hidden

    client = Client(path)
    fresh = mean_hidden(client.recorded.task, client.encoder.model, [index.example(i) for i in range(len(index))], 500)
    assert_close(states, fresh, 1e-3)


# --- what must not be answered


@pytest.mark.parametrize(
    "options",
    [
        {"weights": {"head": 1e7}},
        {"weights": {"head": 1e-9}},
        {"weights": {"head": float("nan")}},
        {"where": "year in [1950.5]"},
        {"where": "color in [None]"},
        {"where": "not " * 2000 + "year == 1"},
        {"where": 'id == "\\ud800"'},
        {"group_by": "nothing"},
    ],
)
def test_what_would_overflow_or_mislead_is_refused(client, options):
    with pytest.raises(UsageError):
        client.query(row=1, **options)


def test_weights_of_a_mean_are_bounded_and_one_must_count(client):
    for weight in (1e300, -1e7, 1e-300, float("inf")):
        with pytest.raises(UsageError, match="1e6"):
            Query(row=1, weight=weight)
    with pytest.raises(UsageError, match="weight 0"):
        client.query_many([Query(row=1, weight=0), Query(row=2, weight=0)], mean=True)


def test_a_score_that_is_not_finite_is_an_error(client):
    rows = client.encode([Query(row=3)])
    huge = {**rows, "blocks": DenseVectors(rows["blocks"].values * np.float32(1e38))}
    for recall in (1.0, 0.9):
        with pytest.raises(NumericalError, match="not finite"), np.errstate(all="ignore"):
            client.answer([Query(row=3)], huge, recall=recall)


def test_a_column_of_too_many_values_is_not_grouped_by(client, monkeypatch):
    monkeypatch.setattr("wherefrom.query.parts.MOST_VALUES", 50)
    with pytest.raises(UsageError, match="more than 50 values"):
        client.query(row=1, group_by="id")
    monkeypatch.undo()
    monkeypatch.setattr("wherefrom.query.groups.MOST_VALUES", 50)
    with pytest.raises(UsageError, match="more than 50 values"):
        client.query(row=1, group_by="id")


@pytest.mark.parametrize(
    "wrong",
    [{"text": 5}, {"text": b"x"}, {"row": 1.5}, {"row": True}, {"text": "a", "span": 3}, {"text": "a", "weight": "1"}, {"messages": 5}],
)
def test_a_query_of_other_types_is_refused(wrong):
    with pytest.raises(UsageError):
        Query(**wrong)


def test_options_and_messages_of_other_types_are_refused(client):
    for wrong in ({"k": 1.5}, {"k": "3"}, {"damping": "1"}, {"recall": "x"}, {"where": 5}, {"group_by": 5}):
        with pytest.raises(UsageError, match="of another type"):
            client.query(row=1, **wrong)
    circular = [{"role": "user", "content": []}]
    circular[0]["content"].append(circular)
    with pytest.raises(UsageError, match="what JSON cannot"):
        Query(messages=circular)
    assert client.query(row=np.int64(3), k=np.int64(2)).proponents


def test_clients_indexes_and_answers_show_themselves(client):
    names = ", ".join(component.name for component in client.index.manifest.components)
    answer = client.query(row=3, k=2)
    assert (
        repr(answer)
        == f"Answer(2 proponents, 2 opponents of 120 rows, best {answer.proponents[0].id!r} ({answer.proponents[0].score:.4g}))"
    )
    assert repr(client) == f"Client({str(client.index.path)!r}, 120 rows)"
    assert repr(client.index) == f"Index({str(client.index.path)!r}, 120 rows of {names})"
    assert repr(connect("http://127.0.0.1:9", index="a")) == "RemoteClient('http://127.0.0.1:9', index='a')"
    assert connect(client.index.path).query(row=3, k=2).proponents == answer.proponents
    hostile = dataclasses.replace(answer.proponents[0], id="<script>alert(1)</script>", text="a\x1b[2J<b>")
    shown = dataclasses.replace(answer, proponents=(hostile,))._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "\x1b" not in shown


def test_a_label_is_refused_where_texts_have_none(index_dir):
    with pytest.raises(UsageError, match="has a label, and the texts of this index have none"):
        Client(index_dir).query(text="w1 w2 w3", label=1)
