"""TrackStar, LESS and TRAK as presets, against the papers' formulas on gradients of one example at a time."""

import asyncio
import json
import math
import re

import numpy as np
import pytest
import torch
import wherefrom
from click.testing import CliRunner
from helpers import assert_close, make_examples, make_model, make_tokenizer, random_texts, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_callback import train
from test_gradients import autograd_gradients
from wherefrom import BuildConfig, Client, Query, RemoteClient
from wherefrom.callback import WherefromCallback
from wherefrom.cli import main
from wherefrom.evaluation.checks import labels
from wherefrom.indexer.batches import IGNORED
from wherefrom.indexer.moments import MOMENTS_FILE, adam_step, factored_scales, save_moments
from wherefrom.indexer.projection import random_projection
from wherefrom.indexer.tasks import CausalLM
from wherefrom.query import matrix
from wherefrom.query.mixing import mixed_share
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.plan import estimate
from wherefrom.ray_jobs.rerank import fit_rerank
from wherefrom.server.engine import Engine, Metrics
from wherefrom.store.errors import IncompatibleError, NotFoundError, UsageError

LAYERS = ("*.attn.c_proj", "*.mlp.c_proj")
QUERIES = [Query(text=text) for text in random_texts(6, seed=11, shortest=6)]


def trained(folder, optimizer, seed=0, steps=3):
    """Take some steps, save the model and the optimizer's moments."""
    from transformers import Adafactor

    model = make_model("gpt2", "float64", seed=seed).requires_grad_(True)
    kinds = {
        "adam": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, 0.95), eps=1e-7),
        "adafactor": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    }
    steps_of = kinds[optimizer](model.parameters())
    task = CausalLM()
    examples = make_examples(12, seed=2)
    for _ in range(steps):
        task.loss(model, task.collate(examples, torch.device("cpu"))).sum().backward()
        steps_of.step()
        steps_of.zero_grad()
    model.requires_grad_(False).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    save_moments(model.requires_grad_(True), steps_of, folder)
    return model.requires_grad_(False), steps_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    texts = random_texts(60, seed=4, shortest=5)
    return write_jsonl(tmp_path_factory.mktemp("data") / "c.jsonl", [{"id": f"d{i}", "text": t} for i, t in enumerate(texts)])


def indexed(out, models, data, **options):
    build(BuildConfig(model=models, data=(str(data),), out=str(out), dtype="float64", layers=LAYERS, **options))
    return Client(out)


def plain(client, model, examples):
    """Gradients of each example and layer, [outputs, inputs], one example at a time."""
    layers = client.index.manifest.components[0].layers
    return [autograd_gradients(model, layers, example)[0] for example in examples]


def moments(model, optimizer, name):
    """Adam's moments of a GPT-2 layer, whose weight is [inputs, outputs], as [outputs, inputs]."""
    state = optimizer.state[model.get_submodule(name).weight]
    return state["exp_avg"].T.numpy(), state["exp_avg_sq"].T.numpy()


def projections(layer, seed=0):
    """The random projections of a layer's outputs and inputs."""
    sides = (layer.name, "output", layer.output_rank, layer.outputs, seed), (layer.name, "input", layer.input_rank, layer.inputs, seed)
    matrices = [random_projection(*side) for side in sides]
    return [np.eye(side[3]) if projection is None else projection for projection, side in zip(matrices, sides, strict=True)]


def trackstar(client, model, optimizer, queries, share=None):
    """TrackStar's scores [queries, examples] by its equations, from whole gradients, with one matrix a layer."""
    component = client.index.manifest.components[0]
    corpus = plain(client, model, [client.index.example(i) for i in range(len(client.index))])
    query_gradients = plain(client, model, queries)
    rows = {"corpus": [], "asked": []}
    for number, layer in enumerate(component.layers):
        if isinstance(optimizer, torch.optim.AdamW):
            second = moments(model, optimizer, layer.name)[1]
            r, c = second.mean(1), second.mean(0)
        else:
            state = optimizer.state[model.get_submodule(layer.name).weight]
            r, c = state["exp_avg_sq_col"].double().numpy(), state["exp_avg_sq_row"].double().numpy()
        v = np.outer(r, c) / r.mean()
        out, into = projections(layer)
        for kind, gradients in (("corpus", corpus), ("asked", query_gradients)):
            rows[kind].append(np.stack([(out @ (g[number] / np.sqrt(v)) @ into.T).ravel() for g in gradients]))
    spectra = {kind: [r.T @ r / len(r) for r in parts] for kind, parts in rows.items()}
    if share is None:
        query_eigenvalues, other = (
            np.sort(np.concatenate([np.linalg.eigvalsh(m) for m in spectra[kind]]))[::-1] for kind in ("asked", "corpus")
        )
        k = max(1, round(component.dim * 1000 / 65536)) - 1
        share = other[k] / (query_eigenvalues[k] + other[k])
    damping = component.curvature.damping
    products, lengths = 0.0, {"corpus": 0.0, "asked": 0.0}
    for number, moment in enumerate(spectra["corpus"]):
        damped = moment + damping * np.trace(moment) / len(moment) * np.eye(len(moment))
        inverse = np.linalg.inv(share * spectra["asked"][number] + (1 - share) * damped)
        products = products + rows["asked"][number] @ inverse @ rows["corpus"][number].T
        for kind, value in lengths.items():
            lengths[kind] = value + np.einsum("ri,ij,rj->r", rows[kind][number], inverse, rows[kind][number])
    return products / np.sqrt(np.outer(lengths["asked"], lengths["corpus"]))


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
@pytest.mark.parametrize("share", [None, 0.6])
def test_trackstar_is_its_equations(tmp_path, data, optimizer, share, monkeypatch):
    model, steps = trained(tmp_path / "m", optimizer)
    client = indexed(tmp_path / "i", str(tmp_path / "m"), data, preset="trackstar", rank=5)
    actual = client.scores(QUERIES, preset="trackstar", **({} if share is None else {"mix": str(share)}))
    expected = trackstar(client, model, steps, client.query_examples(QUERIES), share)
    assert_close(actual, expected, 1e-4, scale=1.0)
    batch = client.query_many(QUERIES, k=60, preset="trackstar", mix="auto" if share is None else str(share))
    for answer, scores in zip(batch, actual, strict=True):
        ranked = [(a.row, a.score) for a in (*answer.proponents, *answer.opponents)]
        assert_close([score for _, score in ranked], scores[[row for row, _ in ranked]], 1e-5, scale=1.0)
    alone = client.scores(QUERIES[:1], preset="trackstar")
    assert np.abs(alone - actual[:1]).max() > 1e-3  # the other queries matter
    file = write_jsonl(tmp_path / "queries.jsonl", [{"id": str(i), "text": q.text} for i, q in enumerate(QUERIES)])
    monkeypatch.setattr(matrix, "_BLOCK_BYTES", 1)  # a query at a time
    command = ["scores", str(tmp_path / "i"), "--file", str(file), "--out", str(tmp_path / "s.zarr"), "--preset", "trackstar"]
    result = CliRunner().invoke(main, command + ([] if share is None else ["--mix", str(share)]))
    assert result.exit_code == 0, result.output
    assert_close(matrix.read_matrix(tmp_path / "s.zarr")[0], actual, 1e-5, scale=1.0)
    answers = client.query(QUERIES[0], k=3, preset="trackstar", mix="0.5")
    best = client.scores(QUERIES[:1], preset="trackstar", mix="0.5")[0]
    assert_close([a.score for a in answers.proponents], np.sort(best)[::-1][:3], 1e-5, scale=1.0)
    (explained,) = client.explain([answers.proponents[0].row], QUERIES[0], preset="trackstar", mix="0.5")
    assert_close([explained.score, sum(explained.example.scores), sum(explained.query.scores)], [answers.proponents[0].score] * 3, 1e-4)


def test_adams_moments_in_full_and_factored_scales_agree_where_they_are_of_rank_one():
    generator = np.random.default_rng(0)
    r, c = generator.random(5) + 0.1, generator.random(7) + 0.1
    for power in (-0.5, -0.25):
        scales = factored_scales(np.outer(r, c).mean(1), np.outer(r, c).mean(0), power)
        assert_close(np.outer(scales["output_scale"], scales["input_scale"]), np.outer(r, c) ** power, 1e-6)
    scales = factored_scales(np.array([0.0, 4.0]), np.array([0.0, 1.0, 3.0]), -0.5)
    assert scales["output_scale"][0] == scales["input_scale"][0] == 0


@given(st.integers(1, 6), st.integers(0, 2**31))
def test_the_mixed_share_makes_two_eigenvalues_equal(queries, seed):
    generator = np.random.default_rng(seed)
    sizes = 3, 5
    gradients = [generator.normal(size=(queries, size)) for size in sizes]
    corpus = generator.random(sum(sizes)) + 0.1
    share = mixed_share(corpus, gradients)
    eigenvalues = np.sort(np.concatenate([np.linalg.eigvalsh(g.T @ g / queries) for g in gradients]))[::-1]
    assert_close(share * eigenvalues[0], (1 - share) * np.sort(corpus)[-1], 1e-9)
    assert mixed_share(corpus, [g * 0 for g in gradients]) == 0


def less(client, model, optimizer, queries):
    """LESS's scores [queries, examples] of one checkpoint: the cosines of gradients of mean losses with Adam's steps, both projected."""
    component = client.index.manifest.components[0]
    beta1, beta2, eps = 0.8, 0.95, 1e-7
    rows = []
    for examples, is_query in ((queries, True), ([client.index.example(i) for i in range(len(client.index))], False)):
        part = []
        for example, gradients in zip(examples, plain(client, model, examples), strict=True):
            coordinates = []
            for gradient, layer in zip(gradients, component.layers, strict=True):
                vector = gradient / example.loss_mask[1:].sum()
                if not is_query:
                    first, second = moments(model, optimizer, layer.name)
                    vector = (beta1 * first + (1 - beta1) * vector) / np.sqrt(beta2 * second + (1 - beta2) * vector**2 + eps)
                out, into = projections(layer, component.seed)
                coordinates.append((out @ vector @ into.T).ravel())
            part.append(np.concatenate(coordinates))
        rows.append(np.stack(part) / np.linalg.norm(part, axis=1, keepdims=True))
    return rows[0] @ rows[1].T


@pytest.mark.parametrize("rank", [64, 6])
def test_less_is_its_equations_over_checkpoints_by_their_learning_rates(tmp_path, data, rank):
    checkpoints, expected = [], 0.0
    rates = [2e-3, 5e-4]
    states = []
    for number in range(2):
        place = tmp_path / "run" / f"checkpoint-{number + 1}"
        place.mkdir(parents=True)
        states.append(trained(place, "adam", seed=number, steps=number + 2))
        checkpoints.append(str(place))
    record = {"trained": None, "rates": [[1, 3e-3], [1, 1e-3], [2, rates[1]]]}
    record["checkpoints"] = [{"step": n + 1, "path": f"checkpoint-{n + 1}", "fingerprint": ""} for n in range(2)]
    (tmp_path / "run" / "wherefrom.json").write_text(json.dumps(record))
    client = indexed(tmp_path / "i", tuple(checkpoints), data, preset="less", rank=rank)
    query_examples = client.query_examples(QUERIES)
    for number, (model, optimizer) in enumerate(states):
        single = indexed(tmp_path / f"i{number}", checkpoints[number], data, preset="less", rank=rank, seed=number)
        scores = less(single, model, optimizer, query_examples)
        assert_close(single.scores(QUERIES), scores, 1e-5, scale=1.0)
        expected = expected + rates[number] / rates[0] * scores
    assert_close(client.scores(QUERIES, preset="less"), expected, 1e-5, scale=1.0)
    assert [c.weight for c in client.index.manifest.components] == pytest.approx([1.0, 0.25])
    (explained,) = client.explain([3], QUERIES[0], tokens=False)
    assert_close(sum(part.score for part in explained.layers), expected[0, 3], 1e-4, scale=1.0)
    with pytest.raises(UsageError, match="not linear in the gradient"):
        client.explain([3], QUERIES[0], tokens=True)
    with pytest.raises(UsageError, match="rows of this index are Adam's steps"):
        client.query(row=3)
    with pytest.raises(UsageError, match="would be another method"):
        fit_rerank(tmp_path / "i0")
    with pytest.raises(UsageError, match="all rows of this index have the same length"):
        labels(tmp_path / "i0", "wrong")
    for options in ({"damping": 0.1}, {"curvature": False}, {"training": "0.1,10"}):
        with pytest.raises(UsageError, match=r"unit length|scaled gradients"):
            client.scores(QUERIES[:1], **options)


def test_adams_step_of_a_gradient_that_adam_saw_is_adams_step():
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.99), eps=0.0)
    gradients = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for gradient in gradients:
        before = parameter.detach().clone()
        state = {name: value.clone() for name, value in optimizer.state.get(parameter, {}).items()}
        parameter.grad = gradient.clone()
        optimizer.step()
    steps = float(state["step"]) + 1
    corrected = math.sqrt(1 - 0.99**steps) / (1 - 0.9**steps)
    step = adam_step(gradients[-1:], state["exp_avg"], state["exp_avg_sq"], (0.9, 0.99, 0.0))[0] * corrected
    assert_close(before - parameter.detach(), step, 1e-12)


def trak(client, model, queries):
    """TRAK's scores [queries, examples] of one model, by its equation; a text counts as often as it has predicted tokens."""
    component = client.index.manifest.components[0]
    examples = [client.index.example(i) for i in range(len(client.index))]

    def features(examples):
        rows, errors, lengths = [], [], []
        for example, (gradients, loss) in ((e, autograd_gradients(model, component.layers, e)) for e in examples):
            tokens = example.loss_mask[1:].sum()
            error = 1 - math.exp(-loss / tokens)
            rows.append([-g / tokens / error for g in gradients])  # the gradient of log(p / (1 - p))
            errors.append(error)
            lengths.append(tokens)
        return rows, np.array(errors), np.array(lengths)

    (corpus, errors, lengths), (query_gradients, own_errors, own_lengths) = features(examples), features(queries)
    scores = 0.0
    for number, layer in enumerate(component.layers):
        out, into = projections(layer)
        phi, psi = (np.stack([(out @ g[number] @ into.T).ravel() for g in rows]) for rows in (corpus, query_gradients))
        weighted = phi * lengths[:, None]
        kernel = weighted.T @ weighted / len(phi)
        kernel += component.curvature.damping * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
        scores = scores + (psi * own_lengths[:, None]) @ np.linalg.inv(kernel) @ weighted.T * errors
    return scores * own_errors[:, None]  # of the loss of a query, not of its margin


def test_trak_is_its_equation(tmp_path, data):
    model, _ = trained(tmp_path / "m", "adam")
    client = indexed(tmp_path / "i", str(tmp_path / "m"), data, preset="trak", rank=4)
    actual = client.scores(QUERIES, preset="trak")
    assert_close(actual, trak(client, model, client.query_examples(QUERIES)), 1e-4)


def test_a_margin_of_a_certain_example_is_finite():
    class Certain(CausalLM):
        def loss(self, model, batch, sample_seed=None):
            return torch.tensor([0.0, 1e-9, 2.0], requires_grad=True)

    from wherefrom.indexer.batches import Batch
    from wherefrom.indexer.tasks import Objective

    targets = torch.tensor([[1, IGNORED], [1, IGNORED], [1, 2]])
    values = Certain().value(torch.nn.Linear(1, 1), Batch(("a", "b", "c"), targets, targets, targets >= 0), Objective(margin=True))
    assert torch.isfinite(values).all()
    assert float(values[2].detach()) == pytest.approx(2 / (1 - math.exp(-1)))


def test_the_callback_keeps_the_moments_of_each_checkpoint(tmp_path):
    callback = WherefromCallback(moments=True)
    data, _ = train(tmp_path, callback, save_steps=10)
    places = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert all((place / MOMENTS_FILE).is_file() for place in places)
    options = dict(data=(str(data),), layers=LAYERS)
    build(BuildConfig(model=str(places[-1]), out=str(tmp_path / "t"), preset="trackstar", rank=4, **options))
    build(BuildConfig(model=tuple(map(str, places[-2:])), out=str(tmp_path / "l"), preset="less", rank=4, **options))
    rates = json.loads((tmp_path / "run" / "wherefrom.json").read_text())["rates"]
    weights = [c.weight for c in Client(tmp_path / "l").index.manifest.components]
    steps = [int(place.name.split("-")[1]) for place in places]
    segments = [(a, b) for a, b in zip([0, *steps], steps, strict=False)][-2:]
    means = [np.mean([rate for step, rate in rates if a < step <= b]) for a, b in segments]
    assert weights == pytest.approx(np.array(means) / max(means))
    result = CliRunner().invoke(main, ["query", str(tmp_path / "t"), "--text", "w1 w2 w3", "--preset", "trackstar", "--json"])
    answer = json.loads(result.stdout)
    assert (answer["query"]["mode"], answer["query"]["preset"]) == ("cosine", "trackstar")
    assert answer["query"]["mix"] == "auto"
    assert 0 < answer["query"]["mixed"] < 1
    shown = CliRunner().invoke(main, ["query", str(tmp_path / "t"), "--text", "w1 w2 w3", "--preset", "trackstar"]).stdout
    assert "the queries' second moments mixed in (" in " ".join(shown.split())
    (tmp_path / "sgd").mkdir()
    with pytest.warns(UserWarning, match="moments were not saved: SGD holds no second moments"):
        train(tmp_path / "sgd", WherefromCallback(moments=True), optim="sgd", save_steps=10)


def test_what_a_preset_sets_is_printed(tmp_path, data):
    trained(tmp_path / "m", "adam")
    options = ["--model", str(tmp_path / "m"), "--data", str(data), "--out", str(tmp_path / "i"), "--layers", LAYERS[0]]
    result = CliRunner().invoke(main, ["build", *options, "-o", "preset=trackstar", "-o", "rank=3"])
    assert result.exit_code == 0, result.output
    expected = (
        "preset trackstar (TrackStar, arXiv 2410.17413): components blocks, projection random, rank 3, curvature fisher, labels data, "
    )
    assert expected + "optimizer second-moments, damping 0.1" in " ".join(result.output.split())


def test_what_does_not_go_together_is_refused(tmp_path, data):
    model = str(tmp_path / "m")
    trained(tmp_path / "m", "adam")
    common = dict(model=model, data=(str(data),), out=str(tmp_path / "x"))
    for options, match in (
        ({"preset": "trak", "bytes_per_example": 800}, "rows of the blocks alone"),
        ({"optimizer": "second-moments", "projection": "pca"}, "random projections"),
        ({"optimizer": "adam-step"}, "not whitened"),
        ({"preset": "less", "components": ("head", "blocks")}, "rows of the blocks alone"),
        ({"preset": "other"}, "it can be trackstar, less or trak"),
    ):
        with pytest.raises(UsageError, match=match):
            BuildConfig(**common, **options)
    with pytest.raises(UsageError, match="for the blocks alone"):
        build(BuildConfig(**common, labels="margin", components=("head",)))
    client = indexed(tmp_path / "i", model, data, preset="trackstar", rank=4)
    for options, match in (
        ({"preset": "less"}, "built with the preset trackstar, not with less"),
        ({"mix": "much"}, "write auto, or a share"),
        ({"mix": "1"}, "write auto, or a share"),
        ({"mix": "auto", "damping": 0.1}, "takes the place of damping"),
        ({"refine": 1}, "of scaled weights"),
    ):
        with pytest.raises(UsageError, match=match):
            client.scores(QUERIES[:1], **options)
    with pytest.raises(UsageError, match="rows are not computed again"):
        client.query(QUERIES[0], preset="trackstar", rerank=3)
    sparse = tmp_path / "h"
    build(BuildConfig(model=model, data=(str(data),), out=str(sparse), components=("head",), dtype="float64"))
    with pytest.raises(UsageError, match="those of dense rows alone"):
        Client(sparse).scores(QUERIES[:1], mix="auto")
    coded = indexed(tmp_path / "c", model, data, preset="trak", rank=4, coordinates=32)
    with pytest.raises(UsageError, match="do not hold all coordinates"):
        coded.scores(QUERIES[:1], mix="auto")
    with pytest.raises(UsageError, match="no curvature"):
        indexed(tmp_path / "n", model, data, rank=4, curvature="identity").scores(QUERIES[:1], mix="auto")


def test_moments_that_are_missing_or_of_another_model_are_refused(tmp_path, data):
    from safetensors.numpy import save_file

    place = tmp_path / "m"
    trained(place, "adam")
    file = place / MOMENTS_FILE
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("second_moment") and "attn.c_proj" in name)
    damages = {
        "is 3x16, the layer 16x16": {**tensors, name: tensors[name][:3].copy()},
        f"{name} is not finite": {**tensors, name: tensors[name] * np.nan},
        "or no mean of squares": {**tensors, name: -tensors[name]},
        f"{name} is not finite, or no mean": {**tensors, name: tensors[name] * 0},
        "not of floating-point numbers": {**tensors, name: np.ones((16, 16), np.int64)},
        f"does not contain tensor {name}": {k: v for k, v in tensors.items() if k != name},
        "InvalidHeader": None,
    }
    constants = {"beta1": "0.8", "beta2": "0.95", "eps": "1e-7"}
    for match, damaged in damages.items():
        if damaged is None:
            file.write_bytes(b"x" * 100)
        else:
            save_file(damaged, file, metadata=constants)
        for preset in ("trackstar", "less"):
            with pytest.raises(IncompatibleError, match=re.escape(match).replace("InvalidHeader", "eader")):
                indexed(tmp_path / "i", str(place), data, preset=preset, rank=4)
            assert not (tmp_path / "i").exists()
    for wrong in ({"beta1": "nan"}, {"beta2": "1.5"}, {"eps": "-1"}):
        save_file(tensors, file, metadata=constants | wrong)
        with pytest.raises(IncompatibleError, match="its betas or eps are not Adam's"):
            indexed(tmp_path / "i", str(place), data, preset="less", rank=4)
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    save_file(tensors, file, metadata=constants)
    save_torch({key: tensor.bfloat16() for key, tensor in load_torch(file).items()}, file, metadata=constants)
    assert np.isfinite(indexed(tmp_path / "half", str(place), data, preset="trackstar", rank=4).scores(QUERIES[:1])).all()
    file.unlink()
    with pytest.raises(NotFoundError, match="save_moments"):
        indexed(tmp_path / "i", str(place), data, preset="less", rank=4)


def test_an_adapters_moments_are_those_of_its_matrices(tmp_path, data):
    from peft import LoraConfig, get_peft_model

    base = make_model("llama", "float32")
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"], base_model_name_or_path=str(tmp_path / "base")))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    task = CausalLM()
    for _ in range(3):
        task.loss(adapted, task.collate(make_examples(8, seed=1), torch.device("cpu"))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    save_moments(adapted, optimizer, tmp_path / "adapter")
    build(BuildConfig(model=str(tmp_path / "adapter"), data=(str(data),), out=str(tmp_path / "i"), preset="less"))
    client = Client(tmp_path / "i")
    (component,) = client.index.manifest.components
    assert {layer.name.split(".")[-2] for layer in component.layers} == {"lora_A", "lora_B"}
    scores = client.scores(QUERIES)
    assert np.isfinite(scores).all()
    assert np.abs(scores).max() <= 1 + 1e-5


def test_moments_that_cannot_be_saved_say_why(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))

    def stepped(kind, groups=None, **options):
        optimizer = kind(groups or model.parameters(), lr=1e-3, **options)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return optimizer

    for kind in (torch.optim.SGD, torch.optim.NAdam, torch.optim.RAdam):
        with pytest.raises(UsageError, match=f"{kind.__name__} holds no second moments"):
            save_moments(model, stepped(kind), tmp_path)
    groups = [{"params": model[0].parameters(), "betas": (0.5, 0.6)}, {"params": model[1].parameters()}]
    with pytest.raises(UsageError, match="different betas"):
        save_moments(model, stepped(torch.optim.Adam, groups), tmp_path)
    with pytest.raises(NotFoundError, match="there is no folder"):
        save_moments(model, stepped(torch.optim.Adam), tmp_path / "none")
    assert {key.split("/")[1] for key in load_file(save_moments(model, stepped(torch.optim.Adafactor), tmp_path))} == {
        "row_moments",
        "column_moments",
    }


def test_a_plan_of_a_preset_is_measured(tmp_path, data):
    trained(tmp_path / "m", "adam")
    for preset in ("trackstar", "less", "trak"):
        cost = estimate(BuildConfig(model=str(tmp_path / "m"), data=(str(data),), out=str(tmp_path / "i"), layers=LAYERS, preset=preset))
        assert cost.bytes_per_example > 0


def test_a_model_that_is_a_file_has_its_moments_beside_it_and_one_in_memory_has_none(tmp_path):
    from safetensors.torch import save_file

    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    save_moments(model, optimizer, tmp_path)
    generator = np.random.default_rng(0)
    records = [{"id": str(i), "features": generator.standard_normal(6).tolist(), "label": int(generator.integers(3))} for i in range(30)]
    vectors = write_jsonl(tmp_path / "v.jsonl", records)
    build(BuildConfig(model=str(tmp_path / "m.safetensors"), data=(str(vectors),), out=str(tmp_path / "i"), task="mlp", preset="trackstar"))
    assert np.isfinite(Client(tmp_path / "i").scores([Query(row=0), Query(row=1)], preset="trackstar")).all()
    texts = [{"text": text} for text in random_texts(8)]
    with pytest.raises(UsageError, match="a model in memory"):
        wherefrom.build(make_model("gpt2", "float32"), texts, tmp_path / "j", tokenizer=make_tokenizer(), preset="less")


def test_an_option_beside_a_preset_counts_instead(tmp_path, data):
    config = BuildConfig(model="m", data=(str(data),), out="o", preset="less", optimizer=None, rank=3)
    assert (config.optimizer, config.rank, config.unit_length, config.curvature) == (None, 3, True, "identity")
    assert config.replace(rank=5).rank == 5


def test_checkpoints_without_a_recorded_rate_count_the_same_and_say_so(tmp_path, data):
    places = []
    for number in range(2):
        trained(tmp_path / f"m{number}", "adam", seed=number)
        places.append(str(tmp_path / f"m{number}"))
    with pytest.warns(UserWarning, match="all checkpoints count the same"):
        client = indexed(tmp_path / "i", tuple(places), data, preset="less", rank=4)
    assert [c.weight for c in client.index.manifest.components] == [1.0, 1.0]


def test_queries_of_other_requests_are_not_mixed_in(tmp_path, data):
    trained(tmp_path / "m", "adam")
    client = indexed(tmp_path / "i", str(tmp_path / "m"), data, preset="trackstar", rank=4)
    options = {"preset": "trackstar", "k": 3}

    async def ask():
        engine = Engine("i", Client(tmp_path / "i"), Metrics(), batch=8, queue=9)
        engine.start()
        answers = await asyncio.gather(*(engine.ask(query, options) for query in QUERIES))
        await engine.stop()
        return answers

    for query, answer in zip(QUERIES, asyncio.run(ask()), strict=True):
        alone = client.query(query, **options)
        assert answer.query["mixed"] == pytest.approx(alone.query["mixed"])
        assert [a.row for a in answer.proponents] == [a.row for a in alone.proponents]


def test_a_server_refuses_to_mix_queries_of_several_requests():
    remote = RemoteClient("http://127.0.0.1:1")
    for options in ({"mix": "auto"}, {"preset": "trackstar"}):
        with pytest.raises(UsageError, match="take the index itself"):
            remote.scores(QUERIES, **options)
        with pytest.raises(UsageError, match="`mix` needs all in one"):
            remote.query_many([Query(text=f"w{i}") for i in range(2000)], **options)


def test_the_filter_of_a_training_by_adam_is_that_of_gradient_descent_in_scaled_weights(tmp_path, data):
    model, optimizer = trained(tmp_path / "m", "adam")
    options = {"optimizer": "preconditioner", "curvature": "fisher", "rank": 1 << 20}
    client = indexed(tmp_path / "i", str(tmp_path / "m"), data, **options)
    (component,) = client.index.manifest.components
    tokens = component.curvature.tokens / component.curvature.examples
    corpus = plain(client, model, [client.index.example(i) for i in range(len(client.index))])
    query_gradients = plain(client, model, client.query_examples(QUERIES))
    length = 0.4
    expected = 0.0
    for number, layer in enumerate(component.layers):
        second = moments(model, optimizer, layer.name)[1]
        scale = (np.outer(second.mean(1), second.mean(0)) / second.mean()) ** -0.25
        g, q = (np.stack([(gradients[number] * scale).ravel() for gradients in part]) for part in (corpus, query_gradients))
        values, vectors = np.linalg.eigh(g.T @ g / len(g))
        values = np.maximum(values, 0)
        time = length / tokens
        filtered = np.divide(-np.expm1(-time * values), values, out=np.full(len(values), time), where=values > 1e-12)
        expected = expected + (q @ vectors * filtered) @ (g @ vectors).T
    assert_close(client.scores(QUERIES, training="0.004,100"), expected, 1e-4)
    with pytest.raises(UsageError, match="includes the optimizer's preconditioner"):
        client.scores(QUERIES[:1], training="recorded")


def test_segments_of_a_training_by_adam_are_carried_through_scaled_weights(tmp_path, data):
    states = [trained(tmp_path / f"m{number}", "adam", seed=number, steps=number + 2) for number in range(2)]
    options = {"optimizer": "preconditioner", "curvature": "ekfac", "rank": 1 << 20}
    client = indexed(tmp_path / "i", tuple(str(tmp_path / f"m{number}") for number in range(2)), data, **options)
    components = client.index.manifest.components
    examples = [client.index.example(i) for i in range(len(client.index))]
    query_gradients = plain(client, states[-1][0], client.query_examples(QUERIES))
    expected = 0.0
    for number in range(len(components[0].layers)):
        carried = np.stack([gradients[number] for gradients in query_gradients])
        for component, (model, optimizer) in reversed(list(zip(components, states, strict=True))):
            layer = component.layers[number]
            second = moments(model, optimizer, layer.name)[1]
            scale = (np.outer(second.mean(1), second.mean(0)) / second.mean()) ** -0.25
            array = {key.split("/")[-1]: a for key, a in client.index.arrays.items() if key.startswith(f"{component.name}/{layer.name}/")}
            basis = np.kron(array["output_rotation"], array["input_rotation"])
            values = array["eigenvalues"].astype(float)
            time = 0.4 / 2 / (component.curvature.tokens / component.curvature.examples)
            rows = np.stack([(g[number] * scale).ravel() for g in plain(client, model, examples)])
            scaled = (carried * scale).reshape(len(carried), -1)
            filtered = np.divide(-np.expm1(-time * values), values, out=np.full(len(values), time), where=values > 1e-12)
            expected = expected + components[-1].weight * (scaled @ basis * filtered) @ (rows @ basis).T
            carried = ((scaled @ basis * np.exp(-time * values)) @ basis.T).reshape(carried.shape) / scale
    assert_close(client.scores(QUERIES, training="0.004,100"), expected, 1e-4)
    with pytest.raises(UsageError, match="of scaled weights"):
        indexed(tmp_path / "j", str(tmp_path / "m0"), data, **options).scores(QUERIES[:1], refine=1)
