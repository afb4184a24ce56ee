"""Units, percentiles and shares of scores against all scores; and what an answer says against itself."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import assert_close, build_kinds, random_texts, words, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from wherefrom import BuildConfig, Client, Query
from wherefrom.cli import main
from wherefrom.evaluation.packs import read_pack, write_documents_file
from wherefrom.evaluation.slope import fitted_slope, slope
from wherefrom.query.metric import Metric
from wherefrom.query.parts import _signed_sums
from wherefrom.query.units import Unit
from wherefrom.ray_jobs.add import add
from wherefrom.ray_jobs.build import build, draw_sample
from wherefrom.store.errors import IntegrityError, UsageError
from wherefrom.store.index import Index
from wherefrom.store.manifest import Slope
from wherefrom.store.update import compact, delete, record_slope
from wherefrom.store.usual import HiddenStates, read_usual, share_below

KINDS = {
    "float": {"rank": 4},
    "bits": {"components": ("head", "blocks"), "row_dtype": "1bit", "coordinates": 16, "head_bits": 8, "rank": 4, "hidden": True},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory, model_dir, corpus_file):
    return build_kinds(tmp_path_factory.mktemp("reliable"), model_dir, corpus_file, KINDS, shard_rows=50)


@pytest.fixture(scope="module")
def clients(paths):
    return {name: Client(path) for name, path in paths.items()}


# --- units


def test_nats_are_the_first_order_change_of_the_loss_without_an_example(tmp_path, model_dir, corpus_file):
    """g_q (H + a)^-1 g_i / n, with the diagonal Fisher matrix summed up here, from gradients of an index without curvature."""
    common = {"components": ("blocks",), "rank": 4, "layers": ("*mlp.c_fc",)}
    kinds = {"plain": {**common, "curvature": "identity"}, "i": {**common, "curvature": "diagonal", "labels": "data"}}
    plain, curved = (Client(path) for path in build_kinds(tmp_path, model_dir, corpus_file, kinds).values())
    query = Query(text=words(3, 9, 27))

    def gradients(client):
        (component,) = client.index.manifest.components
        rows = np.concatenate([client.index.vectors(i, component).values for i in range(120)]).astype(float)
        return component, rows, client.encode([query])["blocks"].values[0].astype(float)

    component, rows, asked = gradients(plain)
    expected = np.zeros(120)
    damping = curved.index.manifest.components[0].curvature.damping
    for layer in component.layers:
        part = slice(layer.offset, layer.offset + layer.size)
        fisher = (rows[:, part] ** 2).mean(axis=0)
        expected += rows[:, part] @ (asked[part] / (fisher + damping * fisher.mean())) / 120
    answer = curved.query(query, k=120)
    assert answer.search.unit == "nats"
    for a in (*answer.proponents, *answer.opponents):
        assert a.score == pytest.approx(expected[a.row], rel=1e-3, abs=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "unit"),
    [
        ({}, "nats"),
        ({"mode": "loss-normalized"}, "nats per nat"),
        ({"damping": 1.0}, "nats"),
        ({"mode": "cosine"}, None),
        ({"curvature": False}, None),
    ],
)
def test_scores_without_curvature_and_cosines_have_no_unit(clients, options, unit):
    answer = clients["float"].query(row=3, **options)
    assert answer.search.unit == unit
    assert Unit.of(clients["float"].index, Metric.of(options)).factor == (1.0 if unit is None else 1 / 120)


def test_the_size_of_the_training_set_outlives_a_compaction_and_grows_by_an_addition(tmp_path, model_dir, corpus_file):
    path = build_kinds(tmp_path, model_dir, corpus_file, {"i": {"rank": 4}}, shard_rows=50)["i"]
    before = {a.id: a.score for a in Client(path).query(row=0, k=120).proponents}
    delete(path, [f"d{i}" for i in range(100, 120)])
    compact(path)
    after = {a.id: a.score for a in Client(path).query(row=0, k=120).proponents}
    assert len(Index(path)) == 100
    assert after == {id: score for id, score in before.items() if id in after}
    more = write_jsonl(tmp_path / "more.jsonl", [{"id": f"n{i}", "text": t, "year": 1} for i, t in enumerate(random_texts(40, seed=9))])
    add(path, [str(more)])
    assert (len(Index(path)), Index(path).manifest.training_rows) == (140, 160)
    added = {a.id: a.score for a in Client(path).query(row=0, k=200).proponents}
    assert_close([added[id] * 160 for id in after], [score * 120 for score in after.values()], 1e-5)


def test_a_measured_slope_scales_the_scores_it_was_measured_for_alone(tmp_path, model_dir, corpus_file):
    path = build_kinds(tmp_path, model_dir, corpus_file, {"i": {"rank": 4}})["i"]
    queries = {"plain": {}, "damped": {"damping": 1.0}, "cosine": {"mode": "cosine"}}
    before = {name: Client(path).query(row=5, **options) for name, options in queries.items()}
    record_slope(path, Slope(value=0.25, low=0.2, high=0.3, measured_by="a test", trainings=3, queries=4))
    after = {name: Client(path).query(row=5, **options) for name, options in queries.items()}
    factor = {"plain": 0.25, "damped": 1.0, "cosine": 1.0}
    for name, answer in after.items():
        assert_close([a.score for a in answer.proponents], [a.score * factor[name] for a in before[name].proponents], 1e-5)
    kept = {"value": 0.25, "low": 0.2, "high": 0.3, "measured_by": "a test", "trainings": 3, "queries": 4}
    assert {name: after["plain"].search.slope[name] for name in kept} == kept
    assert after["damped"].search.slope is None
    assert "0.25 (0.2 to 0.3), by a test" in CliRunner().invoke(main, ["info", str(path)]).output
    said = CliRunner().invoke(main, ["query", str(path), "--row", "5", "--local"]).output
    assert "measured slope 0.25" in " ".join(said.split())


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.floats(0.1, 10), st.integers(0, 10**6))
def test_the_slope_of_a_multiple_is_its_factor_and_least_squares_gives_it(subsets, queries, factor, seed):
    generator = np.random.default_rng(seed)
    predicted = generator.normal(size=(subsets, queries))
    measured = factor * predicted + generator.normal(size=queries)  # each query has a loss of its own
    assert fitted_slope(predicted, measured) == pytest.approx(factor, rel=1e-6)
    noisy = measured + generator.normal(size=measured.shape)
    centered = (predicted - predicted.mean(0)).ravel()[:, None]
    (expected,) = np.linalg.lstsq(centered, (noisy - noisy.mean(0)).ravel(), rcond=None)[0]
    assert fitted_slope(predicted, noisy) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_slope_from_half_of_a_packs_queries_holds_for_the_other_half(tmp_path, shared):
    pytest.importorskip("scipy")
    data = shared / "data"
    pack = read_pack(shared / "lds/mnist-a", data)
    write_documents_file(pack.train, tmp_path / "train.jsonl")
    options = {"model": str(pack.model), "task": pack.task, "data": (str(tmp_path / "train.jsonl"),), **pack.build}
    build(BuildConfig(out=str(tmp_path / "i"), **options))
    slope(tmp_path / "i", shared / "lds/mnist-a", data=data, half="even")
    report = slope(tmp_path / "i", shared / "lds/mnist-a", data=data, half="odd", keep=False)
    (ratio,) = [figure for name, figure in report.figures.items() if "the slope that the index had" in name]
    assert 0.8 < ratio.value < 1.2
    assert 0.5 * ratio.value < ratio.low < 1 < ratio.high < 2 * ratio.value
    plain = report.figures["measured change for each nat predicted without a slope"]
    assert not 0.8 < plain.value < 1.2


def test_a_slope_needs_one_measurement_and_scores_with_a_unit(tmp_path, model_dir, corpus_file):
    path = build_kinds(tmp_path, model_dir, corpus_file, {"i": {"components": ("blocks",), "curvature": "identity", "rank": 4}})["i"]
    with pytest.raises(UsageError, match="give one of them"):
        slope(path)
    with pytest.raises(UsageError, match="have no unit"):
        slope(path, "nothing")


# --- percentiles and shares


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"where": "year >= 1950"}, {"mode": "cosine"}, {"mode": "loss-normalized"}])
def test_percentiles_and_shares_are_those_of_all_scores(clients, kind, options):
    client = clients[kind]
    query = Query(text=words(3, 9, 27, 41))
    mode = {name: value for name, value in options.items() if name == "mode"}
    scores = client.scores([query], options.get("where"), **mode)[0]
    scores = scores[np.isfinite(scores)].astype(float)
    answer = client.query(query, rerank=0, **options)
    assert answer.search.positive == pytest.approx(scores[scores > 0].sum(), rel=1e-5)
    assert answer.search.negative == pytest.approx(scores[scores < 0].sum(), rel=1e-5)
    for side, sign in ((answer.proponents, 1), (answer.opponents, -1)):
        for a in side:
            number = a.rank if sign > 0 else len(scores) - a.rank + 1
            assert a.percentile == pytest.approx(100 * (len(scores) - number) / len(scores))
            assert abs((scores > a.score * (1 + sign * 1e-6)).sum() - number) <= 1
            assert a.share == pytest.approx(a.score / scores[sign * scores > 0].sum(), rel=1e-4)
    assert answer.reliability.unmatched == (scores == 0).sum()


def test_shares_after_a_rerank_are_those_of_stored_scores(clients):
    query = Query(text=words(5, 6, 7))
    stored = {a.row: a for a in clients["bits"].query(query, k=120, rerank=0).proponents}
    answer = clients["bits"].query(query, k=120, rerank=120)
    assert answer.search.rerank is not None
    assert sum(a.share for a in answer.proponents if a.row in stored) <= 1 + 1e-6
    for a in answer.proponents:
        assert a.share == pytest.approx(stored[a.row].share if a.row in stored else 0.0, rel=1e-4, abs=1e-9)


def test_what_a_query_is_compared_with_is_told_in_percentiles(clients):
    client = clients["bits"]
    usual = read_usual(client.index)
    query = Query(text=words(3, 9, 27, 41))
    reliability = client.query(query, rerank=0).reliability
    cosine = float(client.scores([query], mode="cosine").max())
    assert reliability.similarity == pytest.approx(min(1.0, cosine), rel=1e-5)
    assert reliability.similarity_percentile == 100 * np.mean(np.array(usual.similarities) < reliability.similarity)
    assert reliability.loss_percentile == 100 * np.mean(np.array(usual.losses) < reliability.loss)
    state = client.encoder.ask(client.query_examples([query])).hidden.astype(float)
    states = np.concatenate([client.index.hidden(shard) for shard in client.index.shards]).astype(float)
    density = np.log(np.exp(-((state - states) ** 2).sum(axis=1) / (2 * usual.bandwidth**2)).mean())
    below = [np.mean(np.array(usual.densities) < density + error) * 100 for error in (-1e-2, 1e-2)]
    assert below[0] <= reliability.density_percentile <= below[1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_signed_sums_are_those_of_the_scores_of_each_sign(rows):
    scores = np.array(rows, np.float32)
    size = float(np.abs(scores).sum())
    for total, row in zip(_signed_sums(scores), scores.astype(float), strict=True):
        assert total[0] == pytest.approx(row[row > 0].sum(), abs=1e-6 * (1 + size))
        assert total[1] == pytest.approx(row[row < 0].sum(), abs=1e-6 * (1 + size))
        assert total[2] == (row != 0).sum()


def test_a_search_that_skips_rows_knows_no_shares(clients):
    answer = clients["float"].query(row=3, recall=0.9)
    if answer.search.recall < 1:
        assert {a.share for a in answer.proponents} == {None}
    assert all(a.percentile > 50 for a in answer.proponents)


# --- what is usual


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_usual_is_what_asking_the_examples_themselves_gives(clients, kind):
    client = clients[kind]
    usual = read_usual(client.index)
    parts = draw_sample(client.index.shards, np.arange(120), 50, client.index.manifest.build.inputs.options.seed)
    first = {shard.id: shard.first for shard in client.index.shards}
    rows = [first[id] + position for part in parts for id, _, positions in part for position in positions]
    assert len(set(rows)) == len(rows) == 50
    queries = [Query(text=client.index.example(row).text) for row in rows]
    cosines = client.scores(queries, mode="cosine").astype(float)
    cosines[range(50), rows] = 0.0
    assert_close(usual.similarities, np.sort(cosines.max(axis=1)), 1e-5)
    losses = np.concatenate([client.index.losses(shard) for shard in client.index.shards])
    tokens = [client.index.example(row).loss_mask.sum() for row in range(120)]
    assert_close(usual.losses, np.sort((losses / tokens)[rows]), 1e-5)
    if KINDS[kind].get("hidden"):
        states = np.concatenate([client.index.hidden(shard) for shard in client.index.shards]).astype(float)
        squared = ((states[rows, None] - states[None]) ** 2).sum(-1)
        squared[range(50), rows] = np.inf
        bandwidth = math.sqrt(np.median(np.sort(squared, axis=1)[:, 9]))
        assert usual.bandwidth == pytest.approx(bandwidth, rel=1e-2)  # states are stored in half precision
        densities = np.log(np.exp(-squared / (2 * bandwidth**2)).mean(axis=1))
        assert_close(usual.densities, np.sort(densities), 2e-2)
    else:
        assert usual.densities is None


def test_densities_are_kernel_sums(clients):
    index = clients["bits"].index
    states = np.concatenate([index.hidden(shard) for shard in index.shards]).astype(float)
    queries = np.random.default_rng(0).normal(size=(3, states.shape[1]))
    distances = HiddenStates(index).squared_distances(queries.astype(np.float32))
    expected = [np.log(np.mean([np.exp(-((q - x) ** 2).sum() / (2 * 1.5**2)) for x in states])) for q in queries]
    assert_close(HiddenStates.log_densities(distances, 1.5), expected, 1e-3)


def test_shares_below():
    assert [share_below((1.0, 2.0, 2.0, 3.0), value) for value in (0, 1, 2, 2.5, 9)] == [0, 0, 0.25, 0.75, 1]


def test_a_damaged_record_is_named_and_one_that_is_gone_is_measured_again(tmp_path, model_dir, corpus_file):
    path = tmp_path / "i"
    config = BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(path), rank=4)
    build(config)
    record = (path / "usual.json").read_bytes()
    for damaged in (b"{", b'{"format": "wherefrom usual 1", "losses": []}', b'{"losses": [NaN]}', b'{"losses": [2, 1]}'):
        (path / "usual.json").write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"usual\.json is damaged; remove it"):
            Client(path).query(row=1)
        assert CliRunner().invoke(main, ["verify", str(path)]).exit_code == 4
    (path / "usual.json").unlink()
    assert Client(path).query(row=1).reliability.loss_percentile is None
    build(config)
    assert (path / "usual.json").read_bytes() == record


def test_what_is_usual_can_be_that_of_held_out_texts(tmp_path, model_dir, corpus_file):
    path = build_kinds(tmp_path, model_dir, corpus_file, {"i": {"rank": 4, "hidden": True}})["i"]
    client = Client(path)
    before = read_usual(client.index)
    texts = random_texts(60, seed=55, shortest=6)
    file = write_jsonl(tmp_path / "q.jsonl", [{"text": text} for text in texts])
    done = CliRunner().invoke(main, ["evaluate", "usual", str(path), "--file", str(file), "--json"])
    assert done.exit_code == 0, done.output
    after = read_usual(Client(path).index)
    assert (before.of, after.of) == ("training examples", "held-out texts")
    queries = [Query(text=text) for text in texts]
    assert_close(after.similarities, np.sort(client.scores(queries, mode="cosine").astype(float).max(axis=1)), 1e-5)
    assert_close(after.losses, np.sort([answer.reliability.loss for answer in client.query_many(queries, rerank=0)]), 1e-5)
    assert len(after.densities) == 60
    with pytest.raises(UsageError, match="too few"):
        client.measure_usual(queries[:20])


# --- what an answer says against itself


def test_scores_of_either_sign_are_counted(clients):
    answer = clients["bits"].query(text=words(5, 6, 7), k=60, rerank=0)
    for side, name, count in (
        (answer.proponents, "proponents", answer.reliability.uncertain_proponents),
        (answer.opponents, "opponents", answer.reliability.uncertain_opponents),
    ):
        assert count == sum(abs(a.score) < 2 * a.error for a in side) == sum(a.uncertain for a in side)
        said = [warning for warning in answer.reliability.warnings if f"of the {len(side)} {name} lie" in warning]
        assert bool(said) == bool(count)
    assert answer.reliability.uncertain_opponents > 0
    recomputed = clients["bits"].query(text=words(5, 6, 7), k=60)
    assert recomputed.search.rerank is not None
    assert recomputed.reliability.uncertain_proponents == recomputed.reliability.uncertain_opponents == 0


def test_rows_that_share_no_token_are_counted_and_said(tmp_path, model_dir):
    texts = [words(1, 2, 3, 4)] * 2 + [words(*range(20 + i % 9, 30)) for i in range(58)]
    data = write_jsonl(tmp_path / "c.jsonl", [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    path = build_kinds(tmp_path, model_dir, data, {"i": {"components": ("head",), "append_eos": False}})["i"]
    reliability = Client(path).query(text=words(1, 2, 3, 4), rerank=0).reliability
    assert reliability.unmatched == 58
    assert "58 of 60 examples share no token with this and cannot be found by the rows of this index" in reliability.warnings
    assert "nothing in the searched examples speaks for this" in Client(path).query(text=words(5, 6, 7), rerank=0).reliability.warnings


def test_agreement_is_the_share_of_proponents_that_other_modes_find(clients):
    query = Query(text=words(5, 6, 7, 8))
    modes = ("influence", "cosine", "loss-normalized")
    best = {mode: {a.row for a in clients["bits"].query(query, mode=mode, rerank=0).proponents} for mode in modes}
    for mode in modes:
        agreement = clients["bits"].query(query, mode=mode, rerank=0).reliability.agreement
        assert agreement == {other: len(best[mode] & best[other]) / 10 for other in modes if other != mode}


def test_a_certain_query_and_an_unexpected_one_are_named(clients, monkeypatch):
    client = clients["float"]
    unexpected = client.query(text=words(*range(1, 12)))
    monkeypatch.setitem(client.__dict__, "_usual", read_usual(client.index).model_copy(update={"losses": (0.001,) * 60}))
    assert any("the model does not expect this" in warning for warning in client.query(text=words(*range(1, 12))).reliability.warnings)
    assert not any("does not expect" in warning for warning in unexpected.reliability.warnings)
    (entry,) = [entry for key, entry in client._encoded.items() if key[0] == Query(text=words(*range(1, 12)))]
    certain = entry._replace(evidence=entry.evidence.__class__(loss=0.002))
    monkeypatch.setitem(client._encoded, (Query(text=words(*range(1, 12))), ()), certain)
    assert any("nearly certain" in warning for warning in client.query(text=words(*range(1, 12))).reliability.warnings)


def test_warnings_are_in_every_form_of_an_answer(clients, paths):
    answer = clients["bits"].query(text=words(5, 6, 7), k=60, rerank=0)
    assert answer.reliability.warnings
    assert answer.__class__.from_dict(json.loads(json.dumps(answer.to_dict()))) == answer
    assert all(warning.replace("'", "&#x27;") in answer._repr_html_() for warning in answer.reliability.warnings)
    arguments = ["query", str(paths["bits"]), "--text", words(5, 6, 7), "-k", "60", "--no-rerank", "--local"]
    said = " ".join(CliRunner().invoke(main, arguments).output.split())
    assert all(f"! {warning}" in said for warning in answer.reliability.warnings)


# --- a rerank by default


def test_estimates_are_computed_again_where_the_model_is_at_hand_and_it_is_small(clients, monkeypatch):
    query = Query(text=words(5, 6, 7))
    assert clients["bits"].query(query).search.rerank.candidates <= 200
    assert clients["bits"].query(query, rerank=0).search.rerank is None
    assert clients["bits"].query(row=3).search.rerank is None
    assert clients["float"].query(query).search.rerank is None  # exact rows
    monkeypatch.setattr("wherefrom.client._RERANK_WORK", {"cpu": 1.0})
    assert clients["bits"].query(query).search.rerank is None  # it would take long


def test_a_query_is_answered_alike_beside_others(clients):
    queries = [Query(row=3), Query(text=words(5, 6, 7)), Query(row=9), Query(text=words(1, 2, 40))]
    together = clients["bits"].query_many(queries, k=5)
    for query, answer in zip(queries, together, strict=True):
        alone = clients["bits"].query(query, k=5)
        assert (answer.search.rerank is None) == (alone.search.rerank is None) == (query.row is not None)
        assert [a.row for a in answer.proponents] == [a.row for a in alone.proponents]
        assert_close([a.score for a in answer.proponents], [a.score for a in alone.proponents], 1e-5)


def test_rerank_and_no_rerank_are_not_given_together(paths):
    done = CliRunner().invoke(main, ["query", str(paths["bits"]), "--row", "1", "--rerank", "5", "--no-rerank"])
    assert (done.exit_code, "opposites" in done.output) == (2, True)
