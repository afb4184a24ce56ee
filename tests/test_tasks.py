"""Tasks of one's own: convolutions and a measurement of their own against autograd, perceptrons, and what is refused."""

import json

import numpy as np
import pytest
import torch
import training
from click.testing import CliRunner
from helpers import assert_close, in_nats, write_jsonl
from safetensors.torch import save_file
from wherefrom import Client, Query
from wherefrom.cli import main
from wherefrom.store.corpus import read_corpus
from wherefrom.store.errors import UsageError


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def vectors(count, size, classes, seed=0):
    generator = np.random.default_rng(seed)
    return [
        {"id": f"v{i}", "features": generator.standard_normal(size).round(3).tolist(), "label": int(generator.integers(classes)), "year": i}
        for i in range(count)
    ]


@pytest.fixture
def pictures(tmp_path):
    """Weights and data of the task in training.py."""
    torch.manual_seed(0)
    parts = {"1.weight": (3, 1, 3, 3), "1.bias": (3,), "3.weight": (4, 3, 2, 3), "5.weight": (3, 8), "5.bias": (3,)}
    save_file({name: torch.randn(*shape) for name, shape in parts.items()}, tmp_path / "cnn.safetensors")
    return tmp_path / "cnn.safetensors", write_jsonl(tmp_path / "p.jsonl", vectors(20, 36, 3))


def autograd(model, objective, record):
    inputs, targets = torch.tensor([record["features"]], dtype=torch.float32), torch.tensor([[record["label"]]])
    batch = training.Batch(("x",), inputs, targets, torch.ones_like(targets, dtype=torch.bool))
    weights = [model[i].weight for i in (1, 3, 5)]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(objective(model, batch).sum(), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return torch.cat([g.flatten() for g in gradients]).numpy()


def test_convolutions_and_a_measurement_of_ones_own_equal_autograd(pictures, tmp_path):
    model_file, data = pictures
    task = "training:Pictures"
    options = ["--model", model_file, "--data", data, "--out", tmp_path / "p.wherefrom", "-o", f"task={task}", "-o", "rank=1000"]
    result = run("build", *options, "-o", "curvature=fisher", "-o", "batch_tokens=7", "-o", "damping=0.3")
    assert result.exit_code == 0, result.output
    client = Client(tmp_path / "p.wherefrom", task=task)
    model, records = client.encoder.model, vectors(20, 36, 3)
    rows = np.stack([autograd(model, client.recorded.task.loss, r) for r in records])
    query_gradients = np.stack([autograd(model, client.recorded.task.measurement, r) for r in records[:4]])
    expected = 0
    for layer in client.index.component("blocks").layers:
        block = slice(layer.offset, layer.offset + layer.size)
        H = rows[:, block].T @ rows[:, block] / len(rows)
        expected = expected + query_gradients[:, block] @ np.linalg.solve(H + 0.3 * np.trace(H) / len(H) * np.eye(len(H)), rows[:, block].T)
    queries = client.encode_examples(client.to_examples(list(read_corpus([str(data)], training_fields())))[:4])["blocks"].values
    stored = np.concatenate([client.index.vectors(i, client.index.component("blocks")).values for i in range(20)])
    assert_close(queries @ stored.T, expected, 1e-4)
    assert client.query(row=3, k=2, mode="influence").proponents[0].metadata == {"year": 3}
    default = client.query(row=3, k=2)
    assert (default.query["mode"], default.reliability.agreement["influence"]) == ("loss-normalized", 0.5)
    vector = {"features": records[2]["features"], "label": records[2]["label"]}
    assert_close(client.scores([Query(**vector)])[0], in_nats(client.index, expected[2]), 1e-4)
    assert client.query(**vector, k=1, mode="influence").query == {**vector, "mode": "influence", "damping": 0.3}
    with pytest.raises(UsageError, match="holds vectors, not texts"):
        client.query(text="w1 w2")
    with pytest.raises(UsageError, match="there is no label"):
        client.query(features=[1.0])
    with pytest.raises(UsageError, match="a label is the class of"):
        Query(completion="w1", label=1)


def test_expected_labels_are_the_fisher_under_the_models_own_distribution(tmp_path):
    from wherefrom.indexer.encoder import Encoder
    from wherefrom.indexer.fit import Fit
    from wherefrom.indexer.models import ModelSource
    from wherefrom.indexer.tasks import MLP
    from wherefrom.ray_jobs.config import BuildConfig
    from wherefrom.ray_jobs.worker import Worker

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    records = vectors(11, 7, 3)
    data = write_jsonl(tmp_path / "v.jsonl", records)
    source = {"model": str(tmp_path / "m.safetensors"), "data": (str(data),), "task": "mlp", "dtype": "float64"}
    config = BuildConfig(out="x", curvature="diagonal", labels="expected", **source)
    worker = Worker(config)
    _, settings, _ = worker.describe()
    examples = list(MLP().converter(ModelSource("x")).documents(read_corpus([str(data)], training_fields())))
    fit = Fit(settings)
    assert len(fit.steps) == 1
    arrays = fit.finish(0, {}, fit.sum_statistics(Encoder(MLP(), worker.models, settings, {}), 0, examples))
    model = worker.models[0].requires_grad_(True)
    for row in (0, 2):
        expected = 0
        for record in records:
            log_p = model(torch.tensor([record["features"]], dtype=torch.float64)).log_softmax(-1)[0]
            for label in range(3):
                (g,) = torch.autograd.grad(-log_p[label], model[row].weight, retain_graph=True)
                expected = expected + log_p[label].exp().item() * g.square().flatten() / len(records)
        assert_close(arrays[f"blocks/{row}/eigenvalues"], expected, 1e-6)


def training_fields():
    from wherefrom.store.fields import Fields

    return Fields(form="vector")


def test_convolutions_side_by_side_keep_their_own_inputs(tmp_path):
    records = vectors(9, 50, 3)
    data = write_jsonl(tmp_path / "p.jsonl", records)
    options = ["--model", tmp_path, "--data", data, "--out", tmp_path / "p", "-o", "task=training:Parallel", "-o", "rank=1000"]
    result = run("build", *options, "-o", "curvature=identity")
    assert result.exit_code == 0, result.output
    client = Client(tmp_path / "p", task="training:Parallel")
    component, model = client.index.component("blocks"), client.encoder.model
    assert len({layer.input_group for layer in component.layers}) == 4
    weights = [model.get_submodule(layer.name).weight for layer in component.layers]
    for row, record in enumerate(records):
        batch = training.Batch(
            ("x",), torch.tensor([record["features"]]).double(), torch.tensor([[record["label"]]]), torch.tensor([[True]])
        )
        for weight in weights:
            weight.requires_grad_(True)
        gradients = torch.autograd.grad(client.recorded.task.loss(model, batch).sum(), weights)
        assert_close(client.index.vectors(row, component).values[0], torch.cat([g.flatten() for g in gradients]).numpy(), 1e-5)


def test_kfac_of_a_convolution_counts_its_places(tmp_path):
    records = vectors(30, 50, 3)
    data = write_jsonl(tmp_path / "p.jsonl", records)
    options = ["--model", tmp_path, "--data", data, "-o", "task=training:Parallel", "-o", "rank=1000", "--layers", "a"]
    assert run("build", *options, "--out", tmp_path / "k", "-o", "curvature=kfac").exit_code == 0
    client = Client(tmp_path / "k", task="training:Parallel")
    model, A, S = client.encoder.model, np.zeros((18, 18)), np.zeros((3, 3))
    for record in records:
        x, seen = torch.tensor([record["features"]]).double(), []
        hook = model.a.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.requires_grad_(True).clone()) or seen[0])
        loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([record["label"]]))
        hook.remove()
        (d,) = torch.autograd.grad(loss, seen)
        patches = torch.nn.functional.unfold(x.view(1, 2, 5, 5), 3, padding=1)[0].T.numpy()
        d = d[0].flatten(1).T.numpy()
        A, S = A + patches.T @ patches / 25, S + d.T @ d
    expected = np.sort(np.kron(np.linalg.eigvalsh(S / 30), np.linalg.eigvalsh(A / 30)))
    eigenvalues = np.sort(client.index.arrays["blocks/a/eigenvalues"])
    assert_close(eigenvalues, expected, 1e-7)


def test_a_model_that_begins_with_a_convolution_needs_a_probe(tmp_path):
    data = write_jsonl(tmp_path / "p.jsonl", vectors(3, 50, 3))
    result = run("build", "--model", tmp_path, "--data", data, "--out", tmp_path / "p", "-o", "task=training:Unprobed")
    assert (result.exit_code, "override Unprobed.probe" in result.stderr) == (2, True), result.output


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
def test_convolutions_are_whitened_by_every_strategy(pictures, tmp_path, curvature):
    model_file, data = pictures
    options = ["--model", model_file, "--data", data, "--out", tmp_path / "p", "-o", "task=training:Pictures", "-o", "rank=4"]
    assert run("build", *options, "-o", f"curvature={curvature}", "-o", "projection=pca").exit_code == 0
    index = Client(tmp_path / "p").index
    rows = np.concatenate([index.vectors(i, index.component("blocks")).values for i in range(20)])
    assert np.isfinite(rows).all()
    assert (np.linalg.norm(rows, axis=1) > 0).all()


def test_an_index_names_no_code_to_run(pictures, tmp_path):
    model_file, data = pictures
    assert run("build", "--model", model_file, "--data", data, "--out", tmp_path / "p", "-o", "task=training:Pictures").exit_code == 0
    assert run("query", tmp_path / "p", "--row", "1").exit_code == 0  # needs no task
    refused = run("query", tmp_path / "p", "--text", "w1 w2")
    assert (refused.exit_code, "runs only when you name it" in refused.stderr) == (2, True)
    with pytest.raises(UsageError, match="only when you name it"):
        _ = Client(tmp_path / "p", task="training:NotATask").encoder


@pytest.fixture
def perceptron(tmp_path):
    """A perceptron file and a command to index vectors with it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    save_file(model.state_dict(), tmp_path / "mlp.safetensors")

    def build(records, model="mlp.safetensors", task="mlp"):
        data = write_jsonl(tmp_path / "v.jsonl", records)
        return run("build", "--model", tmp_path / model, "--data", data, "--out", tmp_path / "v.wherefrom", "-o", f"task={task}")

    return build


def test_perceptrons_and_their_documents_are_checked(perceptron, tmp_path):
    good = vectors(6, 5, 3)
    cases = {
        "a label that the model lacks": ([good[0] | {"label": 3}], "has the label 3, the model knows 0 to 2"),
        "a label that is not a class": ([good[0] | {"label": "cat"}], "is 'cat', not a class"),
        "a vector of another size": ([good[0] | {"features": [1.0, 2.0]}], "does not take vectors of 2 numbers"),
        "vectors of two sizes": ([good[0], good[1] | {"features": [1.0]}], "vectors of 1 and 5 numbers"),
        "no number": ([good[0] | {"features": [1.0, "x", 2, 3, 4]}], "not a list of numbers"),
        "an infinite number": ([good[0] | {"features": [1.0, float("inf"), 2, 3, 4]}], "finite numbers"),
        "a text": ([{"id": "t", "text": "w1 w2"}], "there is no field 'features'"),
    }
    for name, (records, message) in cases.items():
        result = perceptron(records)
        assert result.exit_code == 1, name
        assert message in result.stderr, name
    assert perceptron(good).exit_code == 0
    info = json.loads(run("info", tmp_path / "v.wherefrom", "--json").stdout)
    assert (info["rows"], info["components"][0]["parameters"]) == (6, 5 * 4 + 4 * 3)
    assert run("verify", tmp_path / "v.wherefrom").exit_code == 0


def test_models_that_are_no_perceptrons_are_refused(perceptron, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file(
        {"0.weight": torch.zeros(4, 5), "0.bias": torch.zeros(4), "2.weight": torch.zeros(3, 7), "2.bias": torch.zeros(3)}, tmp_path / "gap"
    )
    (tmp_path / "text").write_text("not safetensors")
    cases = {
        "other.safetensors": "not the layers 0, 2, 4",
        "gap": "do not match",
        "text": "not a safetensors file",
        "no": "no file",
    }
    for model, message in cases.items():
        result = perceptron(vectors(3, 5, 3), model)
        assert (result.exit_code, message in result.stderr) == (3, True), result.output
    for task, message, code in (
        ("mlpp", "module:name", 2),
        ("training:NotATask", "not a subclass", 2),
        ("training:No", "cannot be imported", 3),
    ):
        result = perceptron(vectors(3, 5, 3), task=task)
        assert (result.exit_code, message in result.stderr) == (code, True), result.output


def test_layers_that_cannot_be_tracked_are_named(tmp_path):
    data = write_jsonl(tmp_path / "p.jsonl", vectors(3, 50, 3))
    result = run("build", "--model", tmp_path, "--data", data, "--out", tmp_path / "p", "-o", "task=training:Pooled")
    assert result.exit_code == 0, result.output
    assert "not pool," in result.stdout
