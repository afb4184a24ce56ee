"""A number of bytes an example: what it buys, what it costs in a real index, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import array_bytes, make_examples, random_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bits import component
from test_sparse import head_plan, make_model
from wherefrom import BuildConfig, Client
from wherefrom.cli import main
from wherefrom.indexer.budget import allocate, count_tokens, row_cost
from wherefrom.indexer.calibrate import Agreement, calibrate
from wherefrom.indexer.encoder import Encoder
from wherefrom.query.metric import Metric
from wherefrom.query.options import Query
from wherefrom.query.scoring import score_matrix
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.schema import fit_examples
from wherefrom.store.errors import UsageError
from wherefrom.store.manifest import Model


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def components(width=256, vocabulary=50_000):
    sizes = {"width": width, "vocabulary": vocabulary}
    sparse = [head_plan(make_model(), role=role).components[0].model_copy(update=sizes) for role in ("head", "embeddings")]
    return [*sparse, component(100_000, None, "float32")]


COMPONENTS = components()
SMALL, LARGE = 6_000_000, 135_000_000  # parameters


@settings(max_examples=200, deadline=None)
@given(st.integers(150, 40_000), st.integers(1, 200), st.integers(0, 9), st.sampled_from([64, 256, 4096]), st.sampled_from([6, 3, 7, 4, 1]))
def test_what_is_bought_costs_what_there_is_and_hardly_less(budget, longest, seed, width, which):
    generator = np.random.default_rng(seed)
    counts = {name: generator.integers(1, longest + 1, 300) for name in ("head", "embeddings")}
    offered = [s for i, s in enumerate(COMPONENTS) if which & (4 >> i)]
    offered = [s.model_copy(update={"width": width}) if s.kind == "sparse" else s for s in offered]
    bought = allocate(budget, offered, counts, SMALL)
    cost = sum(row_cost(s, counts) for s in bought)
    assert cost <= budget
    unbounded = [s for s in bought if s.kind == "dense" or s.max_tokens is not None]
    if unbounded and budget > 1000:  # else everything there is fits
        assert cost > 0.75 * budget
    assert [s.name for s in bought] == [s.name for s in offered if s.name in {b.name for b in bought}]
    if budget < 1200 and any(s.kind == "sparse" for s in offered):
        assert "blocks" not in {s.name for s in bought}


def test_more_bytes_never_take_a_component_or_a_bit_away():
    counts = {name: np.random.default_rng(0).integers(40, 90, 300) for name in ("head", "embeddings")}
    held = [{s.name: s for s in allocate(budget, COMPONENTS, counts, SMALL)} for budget in (400, 800, 1200, 2400, 10_000)]
    assert [sorted(h) for h in held] == [["head"], ["embeddings", "head"], *[["blocks", "embeddings", "head"]] * 3]
    assert [h["head"].bits for h in held[2:]] == sorted(h["head"].bits for h in held[2:])
    assert held[-1]["head"].bits == 256  # as many as coordinates, of all tokens
    assert held[-1]["head"].max_tokens is None


@pytest.mark.parametrize("training", ["adapter", "trained head", "unknown"])
def test_a_large_models_head_and_blocks_share_the_bytes(training):
    counts = {name: np.full(300, 90) for name in ("head", "embeddings")}
    for budget in (800, 2400):
        costs = {s.name: row_cost(s, counts) for s in allocate(budget, COMPONENTS, counts, LARGE, training)}
        assert costs.keys() == {"head", "blocks"}
        assert costs["blocks"] == pytest.approx(budget / 2, rel=0.2)
        assert sum(costs.values()) <= budget
    assert [s.name for s in allocate(400, COMPONENTS, counts, LARGE, training)] == ["blocks" if training == "adapter" else "head"]
    without_blocks = [s for s in COMPONENTS if s.role != "blocks"]
    assert [s.name for s in allocate(800, without_blocks, counts, LARGE, training)] == ["head", "embeddings"]
    without_head = [s for s in COMPONENTS if s.role == "blocks"]
    assert [s.name for s in allocate(800, without_head, counts, LARGE, training)] == ["blocks"]


def test_tokens_are_counted_as_the_rows_hold_them():
    from test_sparse import fitted

    model, examples = make_model(), make_examples(12)
    counts = count_tokens(examples)
    for role in ("head", "embeddings"):
        rows = fitted(model, head_plan(model, role=role), examples).rows(examples)[role]
        assert counts[role].tolist() == np.diff(rows.indptr).tolist()


@pytest.fixture(scope="module")
def index(tmp_path_factory, model_dir, corpus_file):
    out = tmp_path_factory.mktemp("bytes") / "all.wherefrom"
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(out), bytes_per_example=1500, shard_rows=120))
    return out


def test_an_index_of_so_many_bytes(index):
    client = Client(index)
    head, embeddings, blocks = client.index.manifest.components
    assert (head.name, embeddings.name, blocks.name, blocks.dtype) == ("head", "embeddings", "blocks", "1bit")
    assert (head.curvature.damping, blocks.curvature.damping, blocks.curvature.labels) == (1.0, 1.0, "sampled")
    assert all(layer.inputs > layer.outputs for layer in blocks.layers)
    assert embeddings.weight > 0
    counts = count_tokens([client.index.example(i) for i in range(len(client.index))])
    cost = sum(row_cost(s, counts) for s in client.index.manifest.components)
    assert 1200 < cost <= 1500
    assert array_bytes(index) == pytest.approx(cost * 120, rel=0.03)
    assert run("verify", index).exit_code == 0
    for row in (0, 17, 63):
        assert client.query(row=row, mode="cosine", k=1).proponents[0].row == row
        assert client.query(text=client.index.example(row).text, mode="cosine", k=1).proponents[0].row == row


def test_one_bit_scores_and_another_damping_come_close_to_whole_rows(tmp_path, model_dir, corpus_file):
    config = {"model": str(model_dir), "data": (str(corpus_file),), "rank": 64, "curvature": "ekfac"}
    build(BuildConfig(out=str(tmp_path / "whole"), **config))
    build(BuildConfig(out=str(tmp_path / "bits"), row_dtype="1bit", coordinates=1 << 15, **config))
    build(BuildConfig(out=str(tmp_path / "few"), row_dtype="1bit", coordinates=1 << 11, **config))
    all_tokens, bits, few = (Client(tmp_path / name) for name in ("whole", "bits", "few"))
    queries = [Query(text=t) for t in random_texts(6, seed=9)]

    def scores(client, metric):
        return score_matrix(client.index, client.encode(queries), metric)

    for metric in (Metric(), Metric("cosine"), Metric(damping=2.0), Metric(curvature=False)):
        exact = scores(all_tokens, metric)
        assert np.corrcoef(exact.ravel(), scores(bits, metric).ravel())[0, 1] > 0.98, metric
        if metric.mode == "influence" and metric.curvature:
            assert np.corrcoef(exact.ravel(), scores(few, metric).ravel())[0, 1] > 0.8, metric
    with pytest.raises(UsageError, match="a random projection"):
        few.query(row=1, mode="cosine", damping=2.0)


@pytest.mark.parametrize("coordinates", [1 << 15, 1 << 11])  # rotated, and mixed to fewer
@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 1.4), ({"damping": 50.0}, 1.4), ({"curvature": False}, 1.4), ({"training": "0.1,30"}, 1.4), ({"damping": 0.01}, 2.0)],
    ids=str,
)  # at a tenth of the build's damping, few coordinates lead, and the errors come out too small (docs/how-it-works.md)
def test_standard_errors_of_worded_queries_are_those_of_the_estimates(tmp_path, model_dir, corpus_file, coordinates, options, most):
    config = {"model": str(model_dir), "data": (str(corpus_file),), "rank": 64, "curvature": "ekfac"}
    build(BuildConfig(out=str(tmp_path / "whole"), **config))
    build(BuildConfig(out=str(tmp_path / "bits"), row_dtype="1bit", coordinates=coordinates, **config))
    all_tokens, bits = (Client(tmp_path / name) for name in ("whole", "bits"))
    weight = {"blocks": all_tokens.index.manifest.components[0].weight / bits.index.manifest.components[0].weight}
    ratios = []
    for text in random_texts(6, seed=9):
        query = Query(text=text)
        exact = all_tokens.scores([query], **options)[0]
        answer = bits.query(query, k=120, weights=weight, **options)
        ratios += [(a.score - exact[a.row]) / a.error for a in (*answer.proponents, *answer.opponents)]
    assert len(ratios) >= 6 * 120
    assert 0.6 < np.std(ratios) < most  # in standard errors


def test_what_a_budget_refuses(tmp_path, model_dir, corpus_file):
    options = ["build", "--model", model_dir, "--data", corpus_file, "--out", tmp_path / "i"]
    for more, message in (
        (["--bytes-per-example", "9"], "does not pay for one token of the head"),
        (["--bytes-per-example", "800", "-o", "head_bits=64"], "--bytes-per-example chooses -o head_bits; give one or the other"),
        (["--bytes-per-example", "0"], "must be at least 1"),
        (["--bytes-per-example", "800", "--layers", "@narrowing", "--layers", "*"], "cannot be combined"),
        (["-o", "labels=expected"], "sums over the classes"),
    ):
        refused = run(*options, *more)
        assert (refused.exit_code, message in refused.stderr) == (2, True), refused.output
    assert not (tmp_path / "i/manifests").exists()
    info = json.loads(run(*options, "--bytes-per-example", "300", "--json").stdout)
    assert [s["name"] for s in info["components"]] == ["head"]


def test_an_index_says_what_each_component_costs_and_holds(index):
    info = json.loads(run("info", index, "--json").stdout)
    client = Client(index)
    sizes = {s["name"]: s["bytes_per_example"] for s in info["components"]}
    assert sum(sizes.values()) <= info["bytes_per_example"] <= sum(sizes.values()) + 25_000 / 120  # descriptions, losses
    exact_rows = client.encoder.rows([client.index.example(i) for i in range(len(client.index))])  # tokens bounded as in the index
    for part in info["components"][:2]:
        entry = client.index.component(part["name"])
        stored_energy = float(np.square(client.index.norms(entry).astype(float)).sum())

        plan = replace(client.encoder.settings, components=(entry.model_copy(update={"max_tokens": None}),))
        every = Encoder(client.recorded.task, (client.encoder.model,), plan, client.encoder.arrays)
        total = float(every.rows([client.index.example(i) for i in range(len(client.index))])[entry.name].squared_norms.sum())
        assert part["energy_held"] == pytest.approx(stored_energy / total, rel=1e-3)
        assert float(exact_rows[entry.name].squared_norms.sum()) == pytest.approx(stored_energy, rel=1e-3)
    tracked = {n for s in client.index.manifest.components for n in ([s.layer] if s.kind == "sparse" else [x.name for x in s.layers])}
    sizes = {id(m.weight): m.weight.numel() for n, m in client.encoder.model.named_modules() if n in tracked}
    (measured,) = info["tracked"]
    assert measured["parameters"] == sum(sizes.values())
    assert measured["of"] == sum(p.numel() for p in client.encoder.model.parameters())
    assert "measured" in run("info", index).stdout


def _linear_layers(client):
    from wherefrom.indexer.layers import find_layers

    return find_layers(client.encoder.model)


@pytest.mark.parametrize(
    ("parameters", "options", "kind", "rows", "tokens", "expected"),
    [
        (SMALL, {}, "kfac", 8000, 2_000_000, 5000),
        (LARGE, {}, "kfac", 60, 13_300, 37),  # the least tokens
        (LARGE, {}, "kfac", 20, 4_000, 20),
        (LARGE, {}, "kfac", 8000, 2_000_000, 500),  # one in 16
        (LARGE, {}, "kfac", 1_000_000, 250_000_000, 5000),
        (LARGE, {}, "ekfac", 8000, 2_000_000, 5000),  # eigenvalues need examples
        (LARGE, {"fit_examples": 3000}, "kfac", 8000, 2_000_000, 3000),
        (LARGE, {"rank": 16}, "kfac", 8000, 2_000_000, 5000),  # without a budget
    ],
)
def test_a_large_models_second_moments_are_fitted_on_a_sample(parameters, options, kind, rows, tokens, expected):
    config = BuildConfig(model="model", data="corpus.jsonl", out=Path("out"), **options)
    components = [c.model_copy(update={"curvature": c.curvature.model_copy(update={"kind": kind})}) for c in COMPONENTS]
    model = Model.model_construct(parameters=parameters)
    assert fit_examples(config, components, [model], rows, tokens) == expected


def test_an_adapters_bytes_and_weights_go_to_the_embeddings_first():
    counts = {name: np.full(300, 90) for name in ("head", "embeddings")}
    costs = {s.name: row_cost(s, counts) for s in allocate(800, COMPONENTS, counts, SMALL, "adapter")}
    assert costs["embeddings"] > 1.2 * costs["head"] > 0
    assert [s.name for s in allocate(400, COMPONENTS, counts, SMALL, "adapter")] == ["head"]
    agreements = {s.name: Agreement(self_score=2.0, fidelity=1.0, mean_share=0.1) for s in COMPONENTS}
    calibrated, _ = calibrate(COMPONENTS, agreements, 0.0, "adapter")
    assert {s.name: s.weight for s in calibrated} == {"head": 1.0, "embeddings": 1.5, "blocks": 0.55}


def test_a_head_that_is_known_to_be_frozen_or_trained_is_not_guessed():
    agreements = {s.name: Agreement(self_score=2.0, fidelity=1.0, mean_share=0.1) for s in COMPONENTS}
    weighted = {kind: calibrate(COMPONENTS, agreements, 0.2, kind)[0] for kind in ("unknown", "frozen head", "trained head")}
    assert weighted["unknown"] == weighted["frozen head"]
    assert {s.name: s.weight for s in weighted["frozen head"]} == {"head": 1.0, "embeddings": 0.7, "blocks": 0.27}
    assert {s.name: s.weight for s in weighted["trained head"]} == {"head": 1.0, "embeddings": 0.25, "blocks": 0.1}


@pytest.mark.parametrize(("head", "embeddings", "share"), [(1.4e-3, 2.3e-4, 0.7), (6.7e-5, 4e-5, 0.25), (-8e-6, -8e-6, 0.25)])
def test_without_blocks_a_frozen_head_is_clearly_above_the_embeddings(head, embeddings, share):
    shares = {"head": head, "embeddings": embeddings}  # measured on text-frozen and, twice, on a model whose head was trained
    agreements = {name: Agreement(self_score=2.0, fidelity=1.0, mean_share=value) for name, value in shares.items()}
    calibrated, _ = calibrate([s for s in COMPONENTS if s.role in shares], agreements, head)
    assert {s.name: s.weight for s in calibrated} == {"head": 1.0, "embeddings": share}


def test_weights_are_shares_of_the_stored_self_scores_shrunk_by_what_the_codes_keep(index):
    client = Client(index)
    rows = [client.index.example(i) for i in range(120)]
    components = tuple(s.model_copy(update={"max_tokens": None}) if s.kind == "sparse" else s for s in client.encoder.settings.components)
    exact = Encoder(
        client.recorded.task, (client.encoder.model,), replace(client.encoder.settings, components=components), client.encoder.arrays
    ).rows(rows)
    other, expected, correlations = ~np.eye(120, dtype=bool), {}, {}
    for one in components:
        a = exact[one.name]
        if one.kind == "sparse":
            dense = np.zeros((120, one.vocabulary, one.width))
            for i in range(120):
                part = slice(a.indptr[i], a.indptr[i + 1])
                dense[i, a.keys[part]] = a.vectors[part]
            a = dense.reshape(120, -1)
        else:
            a = a.values
        truth = a.astype(float) @ a.T
        alone = Metric(weights={s.name: float(s.name == one.name) for s in components})
        actual = score_matrix(client.index, exact, alone) / one.weight
        correlations[one.name] = np.corrcoef(truth[other], actual[other])[0, 1]
        expected[one.name] = correlations[one.name] ** 2 / np.diag(actual).mean()
    info = {s["name"]: s for s in json.loads(run("info", index, "--json").stdout)["components"]}
    frozen = info["head"]["mean_share"] > info["blocks"]["mean_share"]
    shares = {"head": 1.0, "embeddings": 0.7 if frozen else 0.25, "blocks": 0.27 if frozen else 0.1}
    for name, weight in expected.items():
        assert info[name]["weight"] == pytest.approx(shares[name] * weight / expected["head"], rel=1e-3)
        assert info[name]["fidelity"] == pytest.approx(correlations[name], abs=1e-3)


def test_a_plan_says_what_the_build_then_does(tmp_path, model_dir, corpus_file):
    options = ["--model", model_dir, "--data", corpus_file, "--bytes-per-example", "1500"]
    plan = json.loads(run("plan", *options, "--json").stdout)
    info = json.loads(run("build", *options, "--out", tmp_path / "i", "--json").stdout)
    assert (plan["documents"], plan["rows"], plan["tokens"]) == (120, info["rows"], info["tokens"])
    assert [s["name"] for s in plan["components"]] == [s["name"] for s in info["components"]]
    assert [s.get("bits_per_token") for s in plan["components"]] == [s.get("bits_per_token") for s in info["components"]]
    assert array_bytes(tmp_path / "i") == pytest.approx(plan["bytes_of_rows"], rel=0.03)
    assert plan["encoder_bytes"] == pytest.approx(info["encoder_bytes"], rel=0.05)
    assert plan["row_seconds"] > 0
    assert plan["memory_per_worker"] > 1 << 20
    assert "about 120 rows" in run("plan", *options).stdout
    assert not list(tmp_path.glob("(nothing)"))
    missing = run("plan", "--model", model_dir, "--data", tmp_path / "none.jsonl")
    assert missing.exit_code == 3


def test_options_of_blocks_that_are_not_afforded_are_said_to_have_no_effect(tmp_path, model_dir, corpus_file):
    options = ["--model", model_dir, "--data", corpus_file, "--bytes-per-example", "800", "-o", "rank=4"]
    note = "rank had no effect: 800 bytes an example afford head and embeddings, and no blocks"
    assert json.loads(run("plan", *options, "--json").stdout)["notes"] == [note]
    assert f"note: {note}" in run("plan", *options).stdout
    assert note in run("build", *options, "--out", tmp_path / "i").stderr
    assert json.loads(run("plan", *options, "--bytes-per-example", "2400", "--json").stdout)["notes"] == []


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_whether_training_moved_the_vocabulary_layers_is_seen_in_their_mean_gradient(tmp_path, corpus_file, frozen):
    import torch
    from helpers import make_tokenizer
    from wherefrom.indexer.tasks import CausalLM
    from wherefrom.store.corpus import read_corpus

    model, task = make_model("gpt2", "float32"), CausalLM()
    make_tokenizer().save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    from wherefrom.indexer.models import ModelSource

    examples = list(task.converter(ModelSource(str(tmp_path / "m"))).documents(read_corpus([str(corpus_file)])))
    model.requires_grad_(True)
    if frozen:
        model.get_input_embeddings().weight.requires_grad_(False)  # the head is tied to it
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    torch.manual_seed(0)
    for step in range(240):
        batch = task.collate([examples[i] for i in torch.randperm(len(examples))[:40].tolist()], torch.device("cpu"))
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / 240)
        optimizer.zero_grad()
        (task.loss(model, batch).sum() / (batch.targets >= 0).sum()).backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "m")
    options = {"model": str(tmp_path / "m"), "data": (str(corpus_file),), "bytes_per_example": 1500}
    manifest = build(BuildConfig(out=str(tmp_path / "i"), **options))
    means = {name: record["mean_share"] for name, record in manifest.build.calibration.items()}
    assert (means["head"] > max(0.0, means["blocks"])) == frozen, means
