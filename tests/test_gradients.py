"""Rows against oracles: one-at-a-time autograd, dense inverses, explicit Kronecker products; invariance to batching and splits."""

import gc
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONFIGS, WORDS, assert_close, fit, make_examples, make_model, make_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wherefrom.indexer import projection
from wherefrom.indexer.batches import batches_by_length
from wherefrom.indexer.capture import GradientSum, OutputGradient, product_precision
from wherefrom.indexer.curvature import whitening_scale
from wherefrom.indexer.encoder import Encoder, backward
from wherefrom.indexer.fit import Fit
from wherefrom.indexer.logits import draw_uniform, sample_targets
from wherefrom.indexer.projection import principal_components, principal_projection, random_projection
from wherefrom.indexer.tasks import CausalLM
from wherefrom.store.documents import Example
from wherefrom.store.errors import IncompatibleError, NumericalError, UsageError

TASK = CausalLM()
ARCHITECTURES = list(CONFIGS)
HUGE = 10_000  # a rank above every layer's size: no projection at all


def autograd_gradients(model, layers, example, targets=None):
    """One example's gradient of the summed cross-entropy for each layer, out x in, by plain autograd, without padding or batching."""
    modules = dict(model.named_modules())
    weights = [modules[layer.name].weight for layer in layers]
    for weight in weights:
        weight.requires_grad_(True)
    ids = torch.tensor(example.token_ids.astype(np.int64))[None]
    log_p = F.log_softmax(model(input_ids=ids, use_cache=False).logits[0], dim=-1)
    loss = sum(-log_p[t - 1, ids[0, t]] for t in range(1, ids.shape[1]) if example.loss_mask[t])
    gradients = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    transposed = [g if isinstance(modules[layer.name], torch.nn.Linear) else g.T for g, layer in zip(gradients, layers, strict=True)]
    return [g.detach().double().numpy() for g in transposed], float(loss.detach())


class Visit:
    """A function visited in a pass."""

    sums_examples = True

    def __init__(self, layers, maps, function):
        self.layers, self.maps, self.function = layers, maps, function

    def __call__(self, layer, x, d, part):
        self.function(layer, x, d.values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_captured_gradients_equal_one_at_a_time_autograd(architecture, dtype, tolerance, monkeypatch):
    if dtype == "float64":  # some architectures round to float32 inside their norms and softmax; lift that to see our own error
        monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
        softmax = F.softmax
        monkeypatch.setattr(F, "softmax", lambda x, dim=None, dtype=None, **_: softmax(x, dim=dim))
    model = make_model(architecture, dtype)
    settings = make_plan(model, rank=HUGE, curvature="identity", batch_tokens=48)
    examples = make_examples(7)
    rows = Encoder(TASK, (model,), settings, {}).rows(examples)["blocks"].values
    assert rows.dtype == (np.float64 if dtype == "float64" else np.float32)
    for row, example in zip(rows, examples, strict=True):
        gradients, _ = autograd_gradients(model, settings.components[0].layers, example)
        assert_close(row, np.concatenate([g.ravel() for g in gradients]), tolerance)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_projected_rows_equal_projected_autograd(architecture):
    model = make_model(architecture)
    settings = make_plan(model, rank=5, curvature="identity")
    examples = make_examples(4)
    rows = Encoder(TASK, (model,), settings, {}).rows(examples)["blocks"].values
    for row, example in zip(rows, examples, strict=True):
        gradients, _ = autograd_gradients(model, settings.components[0].layers, example)
        parts = []
        for gradient, layer in zip(gradients, settings.components[0].layers, strict=True):
            left = random_projection(layer.name, "output", layer.output_rank, layer.outputs, 7).astype(float)
            right = random_projection(layer.input_group, "input", layer.input_rank, layer.inputs, 7).astype(float)
            parts.append((left @ gradient @ right.T).ravel())
        assert_close(row, np.concatenate(parts), 1e-10)


def test_losses_are_sums_of_nats_over_loss_tokens():
    model = make_model()
    examples = make_examples(5)
    losses = TASK.loss(model, TASK.collate(examples, torch.device("cpu")))
    for loss, example in zip(losses, examples, strict=True):
        _, expected = autograd_gradients(model, make_plan(model).components[0].layers[:1], example)
        assert float(loss) == pytest.approx(expected, rel=1e-12)


def whole_gradients(model, settings, examples):
    """Projected gradients by layer, from an encoder without curvature."""
    plain = make_plan(model, rank=settings.components[0].projection.rank, curvature="identity")
    rows = Encoder(TASK, (model,), plain, {}).rows(examples)["blocks"].values
    return {layer.name: rows[:, layer.offset : layer.offset + layer.size] for layer in plain.components[0].layers}


@pytest.mark.parametrize("damping", [0.01, 0.1, 3.0])
def test_fisher_influence_equals_the_dense_inverse(damping):
    model = make_model()
    settings = make_plan(model, rank=4, curvature="fisher", damping=damping)
    examples, queries = make_examples(40), make_examples(3, seed=1)
    encoder = fit(model, settings, examples)
    influence = encoder.rows(queries)["blocks"].values @ encoder.rows(examples)["blocks"].values.T
    train, query_gradients = whole_gradients(model, settings, examples), whole_gradients(model, settings, queries)
    expected = 0
    for layer in settings.components[0].layers:
        g = train[layer.name]
        H = g.T @ g / len(examples)
        a = damping * np.trace(H) / len(H)
        expected = expected + query_gradients[layer.name] @ np.linalg.solve(H + a * np.eye(len(H)), g.T)
    assert_close(influence, expected, 1e-6)


def token_pairs(model, settings, examples, maps=None):
    """For each layer and example the inputs [tokens, in] and output gradients [tokens, out] of the real tokens."""
    statistics = {layer.name: [] for layer in settings.components[0].layers}
    for example in examples:
        for _, batch in TASK.batches((model,), [example], 64):
            maps = maps or {layer.name: (None, None) for layer in settings.components[0].layers}
            pair = Visit(
                settings.components[0].layers, maps, lambda layer, x, d: statistics[layer.name].append((x[0].numpy(), d[0].numpy()))
            )
            backward(TASK, model, batch, [pair])
    return statistics


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("rank", [4, HUGE])
def test_kronecker_influence_equals_explicit_kronecker_products(curvature, rank):
    model = make_model("llama")
    patterns = ("layers.0.self_attn.*", "layers.1.mlp.down_proj")
    settings = make_plan(model, rank=rank, curvature=curvature, patterns=patterns)
    examples, queries = make_examples(30), make_examples(3, seed=1)
    encoder = fit(model, settings, examples)
    influence = encoder.rows(queries)["blocks"].values @ encoder.rows(examples)["blocks"].values.T
    plain = Encoder(TASK, (model,), make_plan(model, rank=rank, curvature="identity", patterns=patterns), {})
    pairs = token_pairs(model, settings, examples, plain.component_encoders["blocks"].maps)
    train, query_rows = plain.rows(examples)["blocks"].values, plain.rows(queries)["blocks"].values
    expected = 0
    for layer in settings.components[0].layers:
        block = slice(layer.offset, layer.offset + layer.size)
        tokens = sum(len(x) for x, _ in pairs[layer.name])
        A = sum(x.T @ x for x, _ in pairs[layer.name]) / tokens
        S = sum(d.T @ d for _, d in pairs[layer.name]) / len(examples)
        if curvature == "kfac":
            H = np.kron(S, A)
        else:
            basis = np.kron(np.linalg.eigh(S)[1], np.linalg.eigh(A)[1])
            H = basis @ np.diag(((train[:, block] @ basis) ** 2).mean(axis=0)) @ basis.T
        a = 0.1 * np.trace(H) / len(H)
        expected = expected + query_rows[:, block] @ np.linalg.solve(H + a * np.eye(len(H)), train[:, block].T)
    assert_close(influence, expected, 1e-6)


def test_diagonal_and_identity_influence():
    model = make_model()
    examples, queries = make_examples(30), make_examples(3, seed=1)
    plain = Encoder(TASK, (model,), make_plan(model, curvature="identity"), {})
    train, query_rows = plain.rows(examples)["blocks"].values, plain.rows(queries)["blocks"].values
    encoder = fit(model, make_plan(model, curvature="diagonal"), examples)
    expected = 0
    for layer in encoder.settings.components[0].layers:
        block = slice(layer.offset, layer.offset + layer.size)
        square = (train[:, block] ** 2).mean(axis=0)
        expected = expected + (query_rows[:, block] / (square + 0.1 * square.mean())) @ train[:, block].T
    assert_close(encoder.rows(queries)["blocks"].values @ encoder.rows(examples)["blocks"].values.T, expected, 1e-6)
    assert fit(model, make_plan(model, curvature="identity"), examples).arrays == {}


@pytest.mark.parametrize("curvature", ["fisher", "kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("projection", ["random", "pca"])
def test_a_fit_merged_over_any_split_is_the_fit_of_the_whole(curvature, projection):
    model = make_model("llama")
    settings = make_plan(model, curvature=curvature, projection=projection)
    examples = make_examples(24)
    all_rows = fit(model, settings, examples).rows(examples)["blocks"].values
    for parts in (2, 3, 7):
        merged = fit(model, settings, examples, parts).rows(examples)["blocks"].values
        assert_close(merged @ merged.T, all_rows @ all_rows.T, 1e-8)


def test_strategies_side_by_side_in_one_input_group_do_not_touch_each_other():
    model = make_model("llama")
    examples = make_examples(24)
    fisher, ekfac = (make_plan(model, curvature=kind) for kind in ("fisher", "ekfac"))
    kinds = ["ekfac" if i % 2 else "fisher" for i in range(len(fisher.components[0].layers))]
    layers = tuple(layer.model_copy(update={"curvature": kind}) for layer, kind in zip(fisher.components[0].layers, kinds, strict=True))
    settings = replace(fisher, components=(fisher.components[0].model_copy(update={"layers": layers}),))
    mixed, *apart = (fit(model, one, examples).rows(examples)["blocks"].values for one in (settings, fisher, ekfac))
    alone = dict(zip(("fisher", "ekfac"), apart, strict=True))
    for layer in layers:
        block = slice(layer.offset, layer.offset + layer.size)
        assert_close(mixed[:, block], alone[layer.curvature][:, block], 1e-8)


def test_pca_is_fitted_on_the_layers_own_inputs_and_output_gradients():
    model = make_model("llama")
    examples = make_examples(24)
    settings = make_plan(model, rank=3, curvature="identity", projection="pca")
    encoder = fit(model, settings, examples)
    pairs = token_pairs(model, settings, examples)
    for layer in settings.components[0].layers:
        inputs = principal_projection(sum(x.T @ x for x, _ in pairs[layer.name]), 3)
        outputs = principal_projection(sum(d.T @ d for _, d in pairs[layer.name]), 3)
        assert_close(encoder.arrays[f"blocks/{layer.input_group}/input_projection"], inputs, 1e-7, 1)
        assert_close(encoder.arrays[f"blocks/{layer.name}/output_projection"], outputs, 1e-7, 1)


@pytest.mark.parametrize("spectrum", ["of low rank", "decaying"])
def test_principal_components_of_a_sketch_are_those_of_the_second_moments(spectrum):
    generator, size, rank = np.random.default_rng(0), 300, 12
    values = np.where(np.arange(size) < 20, 1.0 + np.arange(size)[::-1], 0.0) if spectrum == "of low rank" else 0.7 ** np.arange(size)
    basis = np.linalg.qr(generator.normal(size=(size, size)))[0]
    covariance = basis * values @ basis.T
    matrix = random_projection("layer", "input sketch", 2 * rank, size, 0)
    eigenvalues, components = principal_components(covariance @ matrix.T.astype(np.float64), matrix, rank)
    largest = np.linalg.eigvalsh(covariance)[::-1][:rank]
    assert_close(components @ components.T, np.eye(rank), 1e-9, 1)
    if spectrum == "of low rank":
        assert_close(eigenvalues, largest, 1e-6)
        assert_close(components, principal_projection(covariance, rank), 1e-5, 1)
    else:
        assert np.trace(components @ covariance @ components.T) > 0.999 * largest.sum()
        assert (eigenvalues <= largest * (1 + 1e-6)).all()


def test_sketched_second_moments_give_the_fit_of_whole_ones(monkeypatch):
    model, examples = make_model("qwen2"), make_examples(2)
    examples = [replace(e, token_ids=e.token_ids[:5], loss_mask=e.loss_mask[:5]) for e in examples]  # 8 inputs: the sketch has as many
    settings = make_plan(model, rank=4, curvature="kfac", projection="pca", patterns=("*.down_proj",))
    in_parts = fit(model, settings, examples, parts=2)
    monkeypatch.setattr(projection, "_SUMMED_WHOLE", 8)
    sketched = fit(model, settings, examples, parts=2)
    layer = settings.components[0].layers[0]
    assert projection.sketch_matrix(layer.name, "input", layer.input_rank, layer.inputs, 7) is not None
    rows, expected = (encoder.rows(examples)["blocks"].values for encoder in (sketched, in_parts))
    assert_close(rows @ rows.T, expected @ expected.T, 1e-5)


def test_no_more_components_than_second_moments_have_rank():
    matrix = random_projection("layer", "input sketch", 8, 40, 0)
    vector = np.random.default_rng(0).normal(size=40)
    eigenvalues, components = principal_components(np.outer(vector, matrix @ vector), matrix, 4)
    assert_close(eigenvalues, [vector @ vector, 0, 0, 0], 1e-9, 1)
    assert (components[1:] == 0).all()


def test_a_visitor_is_freed_after_its_pass_without_a_search_for_cycles():
    model = make_model()
    encoder = Encoder(TASK, (model,), make_plan(model), {})
    _, batch = next(TASK.batches((model,), make_examples(3), 64))
    visitor = GradientSum()
    visitor.layers, visitor.maps, visitor.sums_examples = (
        encoder.settings.components[0].layers,
        encoder.component_encoders["blocks"].maps,
        False,
    )
    freed = weakref.ref(visitor)
    gc.disable()
    try:
        backward(TASK, model, batch, [visitor])
        assert visitor.by_layer
        del visitor
        assert freed() is None
    finally:
        gc.enable()


def test_sums_of_any_split_add_up():
    model = make_model("qwen2")
    settings = make_plan(model, curvature="fisher")
    examples = make_examples(15)
    encoder = Encoder(TASK, (model,), settings, {})
    all_sums = Fit(settings).sum_statistics(encoder, 0, examples)
    halves = [Fit(settings).sum_statistics(encoder, 0, part) for part in (examples[:4], examples[4:])]
    assert all_sums.keys() == halves[0].keys()
    for name, value in all_sums.items():
        assert_close(halves[0][name] + halves[1][name], value, 1e-11)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(9)), budget=st.integers(1, 200), longest=st.integers(3, 30))
def test_rows_do_not_depend_on_batch_order_or_padding(order, budget, longest):
    model, examples = _MODEL_AND_EXAMPLES
    encoder = Encoder(TASK, (model,), make_plan(model, batch_tokens=10_000), _ARRAYS)
    alone = np.concatenate([encoder.rows([e])["blocks"].values for e in examples])
    other = Encoder(TASK, (model,), make_plan(model, batch_tokens=budget), _ARRAYS)
    padding = make_examples(1, seed=5, longest=longest)
    rows = other.rows([examples[i] for i in order] + padding)["blocks"].values[: len(order)]
    assert_close(rows, alone[list(order)], 1e-10)


_MODEL_AND_EXAMPLES = make_model(), make_examples(9)
_ARRAYS = fit(_MODEL_AND_EXAMPLES[0], make_plan(_MODEL_AND_EXAMPLES[0]), _MODEL_AND_EXAMPLES[1]).arrays


def test_float32_rows_agree_across_batchings_to_1e_5():
    model = make_model(dtype="float32")
    examples = make_examples(30)
    encoder = fit(model, make_plan(model), examples)
    alone = np.concatenate([encoder.rows([e])["blocks"].values for e in examples])
    together = Encoder(TASK, (model,), make_plan(model, batch_tokens=500), encoder.arrays).rows(examples)["blocks"].values
    np.testing.assert_array_less(np.linalg.norm(together - alone, axis=1), 1e-5 * np.linalg.norm(alone, axis=1))


def test_bfloat16_rows_stay_close_to_float32_and_are_summed_in_float32():
    exact = Encoder(TASK, (make_model(dtype="float32"),), make_plan(make_model(dtype="float32"), curvature="identity"), {})
    rough = Encoder(TASK, (make_model(dtype="bfloat16"),), exact.settings, {})
    examples = make_examples(10)
    a, b = exact.rows(examples)["blocks"].values, rough.rows(examples)["blocks"].values
    assert b.dtype == np.float32
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > 0.98
    sums = GradientSum()
    for _, batch in TASK.batches((rough.model,), examples, 64):
        maps = rough.component_encoders["blocks"].maps
        maps = rough.component_encoders["blocks"].maps
        visit = partial(lambda part, layer, x, d: sums(layer, x, OutputGradient(d), part), batch)
        backward(TASK, rough.model, batch, [Visit(rough.settings.components[0].layers, maps, visit)])
        break
    assert {g.dtype for g in sums.by_layer.values()} == {torch.float32}


def test_no_weight_gradient_and_nothing_below_the_first_tracked_layer():
    model = make_model()
    settings = make_plan(model, patterns=("h.1.*",))
    seen = []
    model.transformer.h[0].register_full_backward_hook(lambda *_: seen.append("block 0"))
    Encoder(TASK, (model,), make_plan(model, curvature="identity", patterns=("h.1.*",)), {}).rows(make_examples(3))
    assert {layer.name.split(".")[2] for layer in settings.components[0].layers} == {"1"}
    assert seen == []
    assert all(p.grad is None for p in model.parameters())


def test_layers_that_share_an_input_project_it_once(monkeypatch):
    model = make_model("llama")
    settings = make_plan(model, curvature="identity")
    groups = {layer.name.split(".", 2)[2]: layer.input_group.split(".", 2)[2] for layer in settings.components[0].layers}
    assert groups["0.self_attn.k_proj"] == groups["0.self_attn.v_proj"] == "0.self_attn.q_proj"
    assert groups["0.mlp.up_proj"] == "0.mlp.gate_proj"
    encoder = Encoder(TASK, (model,), settings, {})
    assert len({id(encoder.component_encoders["blocks"].maps[layer.name][0]) for layer in settings.components[0].layers}) == len(
        {layer.input_group for layer in settings.components[0].layers}
    )
    encoder.rows(make_examples(1))  # also tries the model's structure
    products = []
    original = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (products.append(b.shape), original(a, b))[1])
    encoder.rows(make_examples(1))
    inputs = [s for s in products if s[1] == 4]
    assert len(inputs) == len({layer.input_group for layer in settings.components[0].layers}) + len(
        settings.components[0].layers
    )  # each input once, each output once


def test_a_layer_that_runs_twice_sums_its_calls():
    model = make_model()
    model.transformer.h[1] = model.transformer.h[0]
    settings = make_plan(model, rank=HUGE, curvature="identity")
    example = make_examples(1)[0]
    gradients, _ = autograd_gradients(model, settings.components[0].layers, example)
    (row,) = Encoder(TASK, (model,), settings, {}).rows([example])["blocks"].values
    assert_close(row, np.concatenate([g.ravel() for g in gradients]), 1e-10)


class Odd(torch.nn.Module):
    """A causal language model of two layers, with the habit that a test is about."""

    def __init__(self, habit="", dtype=torch.float64):
        super().__init__()
        self.habit = habit
        self.wte, self.head = torch.nn.Embedding(WORDS + 1, 8, dtype=dtype), torch.nn.Linear(8, WORDS + 1, dtype=dtype)
        self.h = torch.nn.ModuleList([torch.nn.Linear(8, 8, dtype=dtype), torch.nn.Linear(8, 8, dtype=dtype)])
        torch.manual_seed(1)
        for parameter in self.requires_grad_(False).parameters():
            parameter.normal_(0, 0.5)

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids, use_cache=False):
        x = self.wte(input_ids)
        if self.habit == "twice":
            x = self.h[0](torch.tanh(self.h[0](x)))
        elif self.habit == "tokens first":
            x = self.h[0](x.transpose(0, 1)).transpose(0, 1)
        elif self.habit == "tokens first, flat":
            x = self.h[0](x.transpose(0, 1).reshape(-1, 8)).view(*input_ids.T.shape, 8).transpose(0, 1)
        elif self.habit == "flat":
            x = self.h[0](x.reshape(-1, 8)).view(*input_ids.shape, 8)
        elif self.habit == "pools":
            x = x + self.h[0](x.mean(dim=(0, 1))[None])
        elif self.habit == "writes into an output":
            x = self.h[0](x).mul_(0.5)
        else:
            x = self.h[0](x)
        if self.habit == "writes into an input":
            x = self.wte(input_ids)
            first = self.h[0](x)
            x = first + self.h[1](x.mul_(0.3))
        if self.habit == "the same without writing":
            x = self.wte(input_ids)
            x = self.h[0](x) + self.h[1](x * 0.3)
        return SimpleNamespace(logits=self.head(torch.tanh(x)))


@pytest.mark.parametrize("rank", [5, HUGE])
@pytest.mark.parametrize("habit", ["", "twice", "flat", "writes into an output", "writes into an input"])
def test_odd_habits_of_a_model_do_not_change_its_gradients(habit, rank):
    model = Odd(habit)
    settings = make_plan(model, rank=rank, curvature="identity", patterns=("h.0", "h.1") if "input" in habit else ("h.0",))
    rows = Encoder(TASK, (model,), settings, {}).rows(make_examples(5))["blocks"].values
    if habit == "writes into an input":  # which autograd of the weights does not survive
        model.habit = "the same without writing"
    for row, example in zip(rows, make_examples(5), strict=True):
        expected = []
        for gradient, layer in zip(
            autograd_gradients(model, settings.components[0].layers, example)[0], settings.components[0].layers, strict=True
        ):
            sides = (layer.name, "output"), (layer.input_group, "input")
            left, right = (np.eye(8) if rank == HUGE else random_projection(*side, 5, 8, 7).astype(float) for side in sides)
            expected.append((left @ gradient @ right.T).ravel())
        assert_close(row, np.concatenate(expected), 1e-10)


@pytest.mark.parametrize("habit", ["tokens first", "tokens first, flat", "pools"])
def test_a_layer_that_does_not_see_one_example_after_the_other_is_refused(habit):
    with pytest.raises(UsageError, match=r"layer h\.0 does not run, or does not see one example after the other"):
        make_plan(Odd(habit), patterns=("h.0",))
    model = Odd("")
    encoder = Encoder(TASK, (model,), make_plan(model, curvature="identity", patterns=("h.0",)), {})
    model.habit = "pools"  # after it was planned
    with pytest.raises(UsageError, match=r"h\.0 sees a tensor of shape"):
        encoder.rows(make_examples(1) * 2)


def test_kfac_of_a_layer_that_runs_twice_counts_its_tokens_twice():
    model = Odd("twice")
    examples = make_examples(20)
    settings = make_plan(model, rank=HUGE, curvature="kfac", patterns=("h.0",))
    encoder = fit(model, settings, examples)
    A, S, tokens = np.zeros((8, 8)), np.zeros((8, 8)), 0
    for _, batch in TASK.batches((model,), examples, 1):

        def visit(layer, x, d):
            nonlocal A, S, tokens
            x, d = x[0].numpy(), d[0].numpy()
            A, S, tokens = A + x.T @ x, S + d.T @ d, tokens + len(x)

        backward(TASK, model, batch, [Visit(settings.components[0].layers, {"h.0": (None, None)}, visit)])
    expected = np.kron(np.linalg.eigvalsh(S / len(examples)), np.linalg.eigvalsh(A / tokens))
    assert_close(np.sort(encoder.arrays["blocks/h.0/eigenvalues"]), np.sort(expected), 1e-8)


def test_ekfac_with_sampled_labels_samples_in_both_passes():
    model = make_model("llama")
    examples, patterns = make_examples(12), ("layers.1.mlp.down_proj",)
    settings = make_plan(model, rank=3, curvature="ekfac", labels="sampled", patterns=patterns)
    encoder = fit(model, settings, examples)
    # The same labels, written into the examples: the data's own labels then are the model's.
    relabelled = []
    for example in examples:
        batch = TASK.collate([example], torch.device("cpu"))
        uniform = draw_uniform(batch, settings.components[0].projection.seed)
        drawn = sample_targets(model(input_ids=batch.inputs).logits.log_softmax(-1), batch.targets, uniform)[0].numpy()
        relabelled.append((example, drawn))
    (layer,) = settings.components[0].layers
    basis = {side: encoder.arrays[f"blocks/{layer.name}/{side}_rotation"] for side in ("input", "output")}
    plain = Encoder(TASK, (model,), make_plan(model, rank=3, curvature="identity", patterns=patterns), {})
    A, S, squares, tokens = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros(9), 0
    for example, drawn in relabelled:
        batch = replace(TASK.collate([example], torch.device("cpu")), targets=torch.tensor(drawn)[None])
        pairs = []
        visit = Visit(
            settings.components[0].layers,
            plain.component_encoders["blocks"].maps,
            lambda layer, x, d, pairs=pairs: pairs.append((x[0].numpy(), d[0].numpy())),
        )
        backward(TASK, model, batch, [visit])
        x, d = pairs[0]
        A, S, tokens = A + x.T @ x, S + d.T @ d, tokens + len(x)
        squares += (basis["output"].T @ d.T @ x @ basis["input"]).ravel() ** 2
    for side, moment in (("input", A / tokens), ("output", S / len(examples))):
        rotated = basis[side].T @ moment @ basis[side]
        assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 1e-10 * rotated.max()
    assert_close(encoder.arrays[f"blocks/{layer.name}/eigenvalues"], squares / len(examples), 1e-8)


def test_losses_of_a_bfloat16_model_are_float32_sums():
    model, batch = make_model(dtype="bfloat16"), TASK.collate(make_examples(4), torch.device("cpu"))
    log_p = model(input_ids=batch.inputs).logits.float().log_softmax(-1)
    has_target = batch.targets != -100
    expected = -(log_p.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0] * has_target).sum(1)
    losses = TASK.loss(model, batch)
    assert losses.dtype == torch.float32
    assert_close(losses, expected, 1e-5)


def test_a_model_that_looks_ahead_is_refused():
    from transformers import BertConfig, BertLMHeadModel

    size = dict(vocab_size=62, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    bert = BertLMHeadModel(BertConfig(**size)).eval()
    with pytest.raises(IncompatibleError, match="BertLMHeadModel is not causal"):
        make_plan(bert)
    assert make_plan(BertLMHeadModel(BertConfig(**size, is_decoder=True)).eval()).components[0].layers


def test_nan_weights_are_named_not_hidden():
    model = make_model(dtype="float32")
    settings = make_plan(model, curvature="identity")
    model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="of example 'e"):
        Encoder(TASK, (model,), settings, {}).rows(make_examples(3))


@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_batches_hold_each_example_once_within_the_budget(lengths, budget):
    planned = batches_by_length(lengths, budget)
    assert sorted(i for batch in planned for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in planned)


def test_random_projections_are_fixed_bits_and_preserve_products():
    a = random_projection("h.0.mlp", "input", 4, 6, 0)
    expected = np.array([[-1, -1, -1, 1, -1, 1], [1, 1, -1, -1, 1, 1], [1, -1, 1, -1, 1, 1], [1, 1, 1, 1, -1, -1]]) * 0.5
    assert np.array_equal(a, expected)
    assert np.array_equal(a, random_projection("h.0.mlp", "input", 4, 6, 0))
    for other in (("h.1.mlp", "input", 4, 6, 0), ("h.0.mlp", "output", 4, 6, 0), ("h.0.mlp", "input", 4, 6, 1)):
        assert not np.array_equal(a, random_projection(*other))
    many = np.stack([random_projection("x", "input", 16, 32, seed) for seed in range(2000)])
    assert_close(np.einsum("nki,nkj->ij", many, many) / 2000, np.eye(32), 0.03)
    assert random_projection("x", "input", 6, 6, 0) is None


def test_pca_projects_onto_the_leading_subspace():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(500, 10)) * np.arange(10, 0, -1)
    covariance = x.T @ x
    projection = principal_projection(covariance, 3)
    assert_close(projection @ projection.T, np.eye(3), 1e-12)
    values = np.linalg.eigvalsh(covariance)[::-1]
    np.testing.assert_allclose(np.diag(projection @ covariance @ projection.T), values[:3], rtol=1e-10)


def test_sampled_labels_follow_the_model_and_not_the_batch():
    model = make_model()
    example = Example(id="x", text="", source="", token_ids=np.array([3, 4], np.int32), loss_mask=np.array([False, True]))
    copies = [Example(**{**example.__dict__, "id": f"x{i}"}) for i in range(4000)]
    batch = TASK.collate(copies, torch.device("cpu"))
    log_p = model(input_ids=batch.inputs[:1]).logits.log_softmax(-1).expand(len(copies), -1, -1)
    drawn = sample_targets(log_p, batch.targets, draw_uniform(batch, 0))[:, 0].numpy()
    p = log_p[0, 0].exp().numpy()
    observed = np.bincount(drawn, minlength=len(p)) / len(copies)
    assert np.abs(observed - p).max() < 4 * np.sqrt(p.max() / len(copies))
    later = TASK.collate(copies[5:10], torch.device("cpu"))
    again = sample_targets(log_p[:5], later.targets, draw_uniform(later, 0))[:, 0].numpy()
    assert np.array_equal(again, drawn[5:10])
    assert not np.array_equal(sample_targets(log_p, batch.targets, draw_uniform(batch, 1))[:, 0].numpy(), drawn)


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000])
def test_labels_are_where_the_cumulative_sum_reaches_a_uniform_number(vocabulary):
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn((3, 50, vocabulary), generator=generator, dtype=torch.float64).mul(3).log_softmax(-1)
    uniform = torch.rand((3, 50), generator=generator, dtype=torch.float64)
    uniform[0, :2] = torch.tensor([0.0, 1.0 - 1e-16])
    targets = torch.zeros((3, 50), dtype=torch.long)
    targets[1, :5] = -100
    drawn = sample_targets(log_p, targets, uniform)
    sums = log_p.exp().cumsum(-1)
    expected = torch.searchsorted(sums, (uniform * sums[..., -1])[..., None])[..., 0].clamp(max=vocabulary - 1)
    assert torch.equal(drawn, torch.where(targets == -100, -100, expected))


def test_sampled_labels_make_the_true_fisher():
    model = make_model()
    examples = [Example(**{**e.__dict__, "id": f"{e.id}-{i}"}) for i in range(150) for e in make_examples(2, longest=3)]
    settings = make_plan(model, rank=2, curvature="diagonal", labels="sampled", patterns=("h.1.mlp.c_fc",))
    (layer,) = settings.components[0].layers
    estimated = fit(model, settings, examples).arrays[f"blocks/{layer.name}/eigenvalues"]
    expected = []
    for example in make_examples(2, longest=3):  # enumerate every label of every position
        ids = torch.tensor(example.token_ids.astype(np.int64))
        positions = [t for t in range(1, len(ids)) if example.loss_mask[t]]
        p = model(input_ids=ids[None, :-1]).logits[0].softmax(-1).numpy()
        square = np.zeros(layer.size)
        for t in positions:
            plain = make_plan(model, rank=2, curvature="identity", patterns=("h.1.mlp.c_fc",))
            mask = np.zeros(len(ids), bool)
            mask[t] = True
            for label in range(p.shape[1]):
                token_ids = np.append(example.token_ids[:t], label).astype(np.int32)
                row = Encoder(TASK, (model,), plain, {}).rows([Example("", "", "", token_ids, mask[: t + 1])])["blocks"].values[0]
                square += p[t - 1, label] * row**2  # positions are independent and the score has mean zero
        expected.append(square)
    assert np.abs(estimated - np.mean(expected, axis=0)).max() < 0.25 * np.mean(expected, axis=0).max()


def test_the_precision_of_products_is_set_for_a_gpu_and_set_back():
    def fail():
        with product_precision(torch.device("cuda"), "high"):
            assert torch.get_float32_matmul_precision() == "high"
            with product_precision(torch.device("cuda"), "highest"):
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "high"
            raise ZeroDivisionError

    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_float32_matmul_precision() == before
    with product_precision(torch.device("cpu"), "high"):
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_rows_of_a_gpu_are_those_of_the_cpu(architecture):
    examples = make_examples(12)
    rows = []
    for device in ("cpu", "cuda"):
        model = make_model(architecture, "float32").to(device)
        rows.append(fit(model, make_plan(model), examples).rows(examples)["blocks"].values)
    assert np.abs(rows[0] - rows[1]).max() < 0.02 * np.abs(rows[0]).max()


def test_whitening_of_a_layer_without_gradient_is_zero():
    assert np.array_equal(whitening_scale(np.zeros(3), 0.1), np.zeros(3))
    np.testing.assert_allclose(whitening_scale(np.array([1.0, 3.0]), 0.5), [2**-0.5, 0.5])
