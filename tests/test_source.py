"""SOURCE's filter and its product over checkpoints, against dense matrix exponentials; the training's length as the callback records it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close, example_queries, in_nats, make_model, make_tokenizer, random_texts, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import expm
from test_callback import train
from test_gradients import autograd_gradients
from wherefrom import BuildConfig, Client, Query
from wherefrom.callback import WherefromCallback, _LearningTimes
from wherefrom.indexer.curvature import lost_share
from wherefrom.query.source import added
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.rerank import fit_rerank
from wherefrom.store.errors import IncompatibleError, UsageError

TEXT = random_texts(1, seed=9, shortest=9)[0]
LAYERS = ("*.attn.c_proj",)
ROWS = [0, 7, 21]


def saved_checkpoints(path, count=3):
    """Checkpoints that drift away from one another."""
    model = make_model("gpt2", "float64")
    generator = torch.Generator().manual_seed(1)
    places = []
    for number in range(count):
        model.save_pretrained(path / str(number))
        make_tokenizer().save_pretrained(path / str(number))
        places.append(str(path / str(number)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return tuple(places)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return saved_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    texts = random_texts(40, seed=4, shortest=5)
    return write_jsonl(tmp_path_factory.mktemp("data") / "c.jsonl", [{"id": f"d{i}", "text": t} for i, t in enumerate(texts)])


def built(out, models, data, **options):
    build(BuildConfig(model=models, data=(str(data),), out=str(out), dtype="float64", **options))
    return Client(out)


def dense_curvature(client, component, layer):
    """A layer's curvature as one matrix over vec(G), [n, n]."""
    arrays = {name.removeprefix(f"{component.name}/"): a.astype(float) for name, a in client.index.arrays.items()}
    values = arrays[f"{layer.name}/eigenvalues"]
    sides = np.eye(layer.output_rank), np.eye(layer.input_rank)
    if f"{layer.name}/output_rotation" in arrays:
        sides = arrays[f"{layer.name}/output_rotation"], arrays[f"{layer.input_group}/input_rotation"]
    if f"{layer.name}/output_projection" in arrays:
        projections = arrays[f"{layer.name}/output_projection"], arrays[f"{layer.input_group}/input_projection"]
        sides = tuple(p.T @ s for p, s in zip(projections, sides, strict=True))
    basis = np.kron(*sides)  # columns are eigenvectors
    if f"{layer.name}/basis" in arrays:
        basis = basis @ arrays[f"{layer.name}/basis"]
    return (basis * values) @ basis.T, basis @ basis.T


def integral(matrix, time):
    """The integral of exp(-s H) over s from 0 to a time, by one exponential of a larger matrix."""
    n = len(matrix)
    return expm(np.block([[-time * matrix, time * np.eye(n)], [np.zeros((n, 2 * n))]]))[:n, n:]


def dense_matrices(client, component, layer, time):
    """The integral of a layer's filter over a segment, within the coordinates that rows have, and the filter at the segment's end."""
    matrix, kept = dense_curvature(client, component, layer)
    return kept @ integral(matrix, time), expm(-time * matrix)


def dense_scores(client, example, queries, time, matrices):
    """SOURCE's score of an example for queries, by dense matrices of each layer: the sum over segments, without weights."""
    components = client.index.manifest.components
    models = client.encoder.models
    scores = np.zeros(len(queries))
    for number in range(len(components[-1].layers)):
        carried = np.stack([autograd_gradients(models[-1], components[-1].layers, q)[0][number].ravel() for q in queries])
        for component in reversed(components):
            layer = component.layers[number]
            tokens = component.curvature.tokens / component.curvature.examples
            if (component.name, number) not in matrices:
                matrices[component.name, number] = dense_matrices(client, component, layer, time / tokens / len(models))
            integrated, filtered = matrices[component.name, number]
            gradient = autograd_gradients(models[component.model], component.layers, example)[0][number].ravel()
            scores += components[-1].weight * (carried @ (integrated @ gradient))
            carried = carried @ filtered
    return in_nats(client.index, scores)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "fisher", "diagonal"])
@pytest.mark.parametrize(("count", "projected"), [(1, False), (3, False), (3, True)])
def test_scores_of_dense_rows_equal_matrix_exponentials(tmp_path, checkpoints, data, curvature, count, projected):
    sizes = {"rank": 6, "projection": "pca"} if projected else {"rank": 10**6}
    client = built(tmp_path / "i", checkpoints[-count:], data, curvature=curvature, layers=LAYERS, **sizes)
    queries = [Query(text=TEXT), Query(row=3)]
    query_examples = client.query_examples(queries)
    (component, *_) = client.index.manifest.components
    mean = np.mean([client.index.arrays[f"{component.name}/{name}/eigenvalues"].mean() for name in component.layer_names])
    tokens = component.curvature.tokens / component.curvature.examples
    for relative in (0.03, 3.0):  # a training that hardly moved, and one that arrived along the largest eigenvalues
        time = relative / mean * tokens * count
        options = {"training": f"{time / 50},50"}
        actual = client.scores(queries, **options)[:, ROWS]
        matrices = {}
        expected = np.array([dense_scores(client, client.index.example(row), query_examples, time, matrices) for row in ROWS]).T
        assert_close(actual, expected, 1e-4)
        assert_close(client.recomputed_scores(queries, ROWS, **options), expected, 1e-4)
        answer = client.query(queries[0], k=40, **options)
        assert answer.query["training"] == options["training"]
        assert "damping" not in answer.query
        by_row = {a.row: a.score for a in (*answer.proponents, *answer.opponents)}
        assert_close([by_row[row] for row in ROWS], expected[0], 1e-4)


@pytest.mark.parametrize("role", ["head", "embeddings"])
def test_scores_of_sparse_rows_equal_matrix_exponentials_token_by_token(tmp_path, checkpoints, data, role):
    client = built(tmp_path / "i", checkpoints, data, components=(role,))
    time = 40.0
    (query_example,) = client.query_examples([Query(text=TEXT)])
    shared = (lambda e: set(e.token_ids[e.loss_mask].tolist())) if role == "head" else (lambda e: set(e.token_ids.tolist()))
    actual = client.recomputed_scores([Query(text=TEXT)], ROWS, training=f"{time / 8},8")[0]
    expected = []
    for row in ROWS:
        example = client.index.example(row)
        total = 0.0
        for token in shared(query_example) & shared(example):
            carried = token_gradient(client.encoder.models[-1], query_example, token, role)
            for component in reversed(client.index.manifest.components):
                arrays = {
                    name: client.index.arrays[f"{component.name}/{name}"].astype(float) for name in ("basis", "eigenvalues", "vocabulary")
                }
                matrix = arrays["vocabulary"][token] * (arrays["basis"] * arrays["eigenvalues"]) @ arrays["basis"].T
                time_per_token = time / 3 / (component.curvature.tokens / component.curvature.examples)
                gradient = token_gradient(client.encoder.models[component.model], example, token, role)
                total += client.index.manifest.components[-1].weight * carried @ integral(matrix, time_per_token) @ gradient
                carried = carried @ expm(-time_per_token * matrix)
        expected.append(in_nats(client.index, total))
    assert_close(actual, expected, 1e-4)


def token_gradient(model, example, token, role):
    """The gradient of an example's loss in one token's vector of the head or the embeddings alone, [width], by autograd."""
    weight = model.transformer.wte.weight
    ids = torch.tensor(example.token_ids.astype(np.int64))[None]
    read, written = (weight.detach().clone().requires_grad_(True) for _ in range(2))
    states = model.transformer(inputs_embeds=read[ids], use_cache=False).last_hidden_state
    log_p = torch.log_softmax((states @ written.T)[0], dim=-1)
    loss = sum(-log_p[t - 1, ids[0, t]] for t in range(1, ids.shape[1]) if example.loss_mask[t])
    return torch.autograd.grad(loss, written if role == "head" else read)[0][token].double().numpy()


def test_one_segment_lies_between_plain_gradients_and_no_damping(tmp_path, checkpoints, data):
    client = built(tmp_path / "i", checkpoints[-1:], data, curvature="ekfac", layers=LAYERS, rank=10**6)
    (component,) = client.index.manifest.components
    tokens = component.curvature.tokens / component.curvature.examples
    query = [Query(text=TEXT)]
    plain = client.scores(query, curvature=False)
    assert_close(client.scores(query, training="1e-9,1") * tokens / 1e-9, in_nats(client.index, plain), 1e-4)
    eigenvalues = client.index.arrays["blocks/transformer.h.0.attn.c_proj/eigenvalues"]
    assert eigenvalues.min() > 0
    assert_close(client.scores(query, training="1e12,1"), client.scores(query, damping=1e-6), 0.02)


@given(st.floats(0, 1e6), st.floats(1e-12, 1e6))
def test_the_filter_is_the_sum_of_a_segments_steps(eigenvalue, time):
    eigenvalues, times = np.array([eigenvalue]), np.array([time])
    (share,), (decayed,) = added(eigenvalues, times), lost_share(eigenvalues, times[0])
    assert 0 <= decayed <= 1
    assert 0 < share <= time * (1 + 1e-12)
    assert share * eigenvalue == pytest.approx(decayed, rel=1e-9, abs=1e-15)
    first, second = added(eigenvalues, times / 3), added(eigenvalues, 2 * times / 3)
    carried = first * (1 - lost_share(eigenvalues, 2 * times[0] / 3)) + second  # two segments are one
    assert carried[0] == pytest.approx(share, rel=1e-6)


def test_segments_of_one_curvature_are_one_segment(tmp_path, checkpoints, data):
    """The same model three times: the product over three segments is the filter of the whole."""
    (place,) = checkpoints[-1:]
    options = {"curvature": "ekfac", "layers": LAYERS, "rank": 10**6, "labels": "data"}
    one = built(tmp_path / "one", (place,), data, **options)
    copies = tuple(str(shutil.copytree(place, tmp_path / str(i))) for i in range(3))
    three = built(tmp_path / "three", copies, data, **options)
    weight = three.index.manifest.components[-1].weight / one.index.manifest.components[-1].weight
    query = [Query(text=TEXT)]
    expected = weight * one.scores(query, training="0.5,60")
    assert_close(three.scores(query, training="0.5,60"), expected, 1e-4)


def test_every_command_of_a_client_takes_it(tmp_path, checkpoints, data):
    client = built(tmp_path / "i", checkpoints[-2:], data, bytes_per_example=1200)
    queries = {name: query for name, query in example_queries().items() if name != "row"}
    for name, query in queries.items():
        scores = client.scores([query], training="0.01,100")[0]
        answer = client.query(query, training="0.01,100", k=5, rerank=0)
        assert_close([a.score for a in answer.proponents], np.sort(scores)[::-1][:5], 1e-4)
        if name != "against":
            (explanation,) = client.explain([2], query, training="0.01,100")
            assert_close([explanation.score], [scores[2]], 1e-3, np.abs(scores).max())
            assert explanation.query is None
            reranked = client.query(query, training="0.01,100", k=3, rerank=5)
            again = client.recomputed_scores([query], [a.row for a in reranked.proponents], training="0.01,100")[0]
            assert_close([a.score for a in reranked.proponents], again, 1e-4)
    assert_close(
        client.scores([queries["text"]], training="0.01,100"), Client(client.index.path).scores([queries["text"]], training="0.02,50"), 1e-6
    )


def test_whole_layers_are_filtered_too(tmp_path, checkpoints, data):
    client = built(tmp_path / "i", checkpoints[-1:], data, bytes_per_example=1200)
    fit_rerank(client.index.path, examples=40, runtime={"dtype": "float64"})
    client = Client(client.index.path)
    view = client._recomputer.view
    weights = {c.name: 0.0 for c in view.manifest.components if c.role != "blocks"}
    (blocks,) = (c for c in view.manifest.components if c.role == "blocks")
    (query_example,) = client.query_examples([Query(text=TEXT)])
    actual = client.recomputed_scores([Query(text=TEXT)], ROWS, training="1.5,20", weights=weights)[0]
    tokens = blocks.curvature.tokens / blocks.curvature.examples
    model = client.encoder.models[-1]
    gradients = autograd_gradients(model, blocks.layers, query_example)[0]
    expected = []
    for row in ROWS:
        total = 0.0
        for layer, a, b in zip(
            blocks.layers, gradients, autograd_gradients(model, blocks.layers, client.index.example(row))[0], strict=True
        ):
            outputs, inputs = view.arrays[f"blocks/{layer.name}/output_rotation"], view.arrays[f"blocks/{layer.input_group}/input_rotation"]
            values = view.arrays[f"blocks/{layer.name}/eigenvalues"].reshape(layer.outputs, layer.inputs).astype(float)
            total += float(((outputs.T @ a @ inputs) * (outputs.T @ b @ inputs) * added(values, 30.0 / tokens)).sum())
        expected.append(in_nats(client.index, blocks.weight * total))
    assert_close(actual, expected, 1e-3)


class Summed(WherefromCallback):
    """Adds up what the callback has to add up, from the optimizer itself."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.layer = kwargs["model"].transformer.h[0].mlp.c_fc
        self.expected = 0.0

    def on_optimizer_step(self, args, state, control, **kwargs):
        super().on_optimizer_step(args, state, control, **kwargs)
        optimizer = kwargs["optimizer"].optimizer
        weight = self.layer.weight
        (group,) = (g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
        if args.optim == "sgd":
            self.expected += group["lr"] / (1 - group["momentum"])
        else:
            moments = optimizer.state[weight]
            unbiased = moments["exp_avg_sq"] / (1 - group["betas"][1] ** moments["step"])
            self.expected += group["lr"] / (float(unbiased.mean()) ** 0.5 + group["eps"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_the_callback_records_the_length_of_training(tmp_path, optimizer):
    callback = Summed(data=(str(tmp_path / "train.jsonl"),), out=str(tmp_path / "i"), checkpoints=2, bytes_per_example=1200)
    arguments = {"optim_args": "momentum=0.5"} if optimizer == "sgd" else {}
    train(tmp_path, callback, optim=optimizer, **arguments)
    client = Client(tmp_path / "i")
    first, last = (model.learning_times for model in client.index.manifest.models)
    assert last["transformer.h.0.mlp.c_fc"] == pytest.approx(callback.expected, rel=1e-5)
    assert last["lm_head"] == last["transformer.wte"]
    assert all(0 < first[name] < last[name] for name in last)
    query = Query(text=TEXT)
    recorded = client.scores([query], training="recorded")
    assert np.isfinite(recorded).all()
    assert np.ptp(recorded) > 0
    if optimizer == "sgd":  # the same for all layers, but segments are not of one length: the rate decays
        assert len(set(last.values())) == 1
        total = last["lm_head"]
        assert np.abs(client.scores([query], training=f"{total},1") - recorded).max() > 0
        assert_close(client.scores([query], training=f"{total},1"), recorded, 0.7)
    resumed = _LearningTimes(make_model("gpt2", "float32").requires_grad_(True), last)
    assert resumed.sums == last


def test_an_adapters_matrices_are_recorded_under_the_names_that_an_index_has(tmp_path, data):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    make_model("llama", "float32").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    times = _LearningTimes(adapted, {})
    ids = torch.tensor([[1, 2, 3, 4]])
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    times.add(optimizer)
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    record = {"checkpoints": [], "learning_times": times.sums}
    (tmp_path / "adapter/wherefrom.json").write_text(json.dumps(record))
    build(BuildConfig(model=str(tmp_path / "adapter"), data=(str(data),), out=str(tmp_path / "i"), rank=10**6, curvature="ekfac"))
    client = Client(tmp_path / "i")
    (component,) = client.index.manifest.components
    assert set(component.layer_names) == set(times.sums)
    assert all(time > 0 for time in client.index.manifest.models[0].learning_times.values())
    assert np.ptp(client.scores([Query(text=TEXT)], training="recorded")) > 0
    build(BuildConfig(model=str(tmp_path / "adapter"), data=(str(data),), out=str(tmp_path / "h"), components=("head",)))
    with pytest.raises(UsageError, match="training moved no layer of head, whose scores would all be 0"):
        Client(tmp_path / "h").query(text=TEXT, training="recorded")


def test_another_optimizer_is_not_recorded(tmp_path):
    callback = WherefromCallback(data=(str(tmp_path / "train.jsonl"),), out=str(tmp_path / "i"), bytes_per_example=500)
    train(tmp_path, callback, optim="adafactor")
    client = Client(tmp_path / "i")
    assert client.index.manifest.models[0].learning_times is None
    with pytest.raises(UsageError, match=r"is not recorded in this index: .* give `training` as RATE,STEPS"):
        client.query(text=TEXT, training="recorded")


def test_what_cannot_be_is_refused_in_a_sentence(tmp_path, checkpoints, data):
    client = built(tmp_path / "i", checkpoints[-2:], data, rank=2)
    for training in ("fast", "0.1", "0.1,0", "-1,5", "nan,5", "1,2,3", "1e308,1e308"):
        with pytest.raises(UsageError, match="`training` is"):
            client.query(text=TEXT, training=training)
    with pytest.raises(UsageError, match="takes the place of damping"):
        client.query(text=TEXT, training="0.1,5", damping=1.0)
    with pytest.raises(UsageError, match="needs the curvature"):
        client.query(text=TEXT, training="0.1,5", curvature=False)
    with pytest.raises(UsageError, match="are a random projection, which has no inverse"):
        client.query(text=TEXT, training="0.1,5")
    one = built(tmp_path / "one", checkpoints[-1:], data, components=("head",))
    with pytest.raises(UsageError, match="lengths under the build's damping alone"):
        one.query(text=TEXT, training="0.1,5", mode="cosine")


def test_a_damaged_record_is_refused(tmp_path, checkpoints, data):
    for name, record in {"list": '{"learning_times": [1]}', "negative": '{"learning_times": {"a": -1}}'}.items():
        place = tmp_path / name
        make_model("gpt2", "float32").save_pretrained(place)
        make_tokenizer().save_pretrained(place)
        (Path(place) / "wherefrom.json").write_text(record)
        with pytest.raises(IncompatibleError, match="is not the record of a training run"):
            build(BuildConfig(model=str(place), data=(str(data),), out=str(tmp_path / f"{name}.i"), rank=2))
