"""Refined queries: products of the Gauss-Newton matrix against explicit Jacobians, and solutions against a dense solve."""

import numpy as np
import pytest
import torch
from helpers import CONFIGS, assert_close, in_nats, make_examples, make_model, make_plan, make_tokenizer, random_texts, write_jsonl
from test_gradients import HUGE, autograd_gradients
from test_source import LAYERS, TEXT, built, saved_checkpoints
from torch.func import functional_call
from wherefrom import BuildConfig, Client, Query
from wherefrom.indexer.gauss_newton import GaussNewton
from wherefrom.indexer.tasks import MLP, CausalLM
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.rerank import fit_rerank
from wherefrom.store.errors import UsageError
from wherefrom.store.update import delete

ROWS = [0, 7, 11]
QUERIES = [Query(text=TEXT), Query(row=3), Query(prompt="w1 w2 w3", completion=" w4 w5")]
CONVERGED = 20  # iterations


def dense_gauss_newton(model, names, batches, logits_of):
    """The matrix over all weights of some layers together, from a Jacobian of every logit; the sum over batches."""
    weights = {f"{name}.weight": model.get_submodule(name).weight.detach() for name in names}
    transposed = {n: type(model.get_submodule(n.removesuffix(".weight"))).__name__ == "Conv1D" for n in weights}
    total = 0.0
    for batch in batches:
        jacobians = torch.autograd.functional.jacobian(
            lambda *values, batch=batch: logits_of(functional_call, model, dict(zip(weights, values, strict=True)), batch),
            tuple(weights.values()),
            vectorize=True,
        )
        parts = []
        for name, j in zip(weights, jacobians, strict=True):
            parts.append((j.transpose(-1, -2) if transposed[name] else j).flatten(-2))
        jacobian = torch.cat(parts, dim=-1)  # [batch, targets, classes, parameters]
        logits = logits_of(functional_call, model, weights, batch)
        p = torch.softmax(logits, -1)
        hessian = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
        counted = (batch.targets != -100).to(p.dtype)
        total = total + torch.einsum("btcn,btcd,btdm,bt->nm", jacobian, hessian, jacobian, counted).numpy()
    return total


def text_logits(call, model, weights, batch):
    return call(model, weights, kwargs={"input_ids": batch.inputs, "use_cache": False}).logits


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "gemma2", "gpt_neox", "opt", "phi"])
def test_products_equal_an_explicit_matrix(architecture):
    model = make_model(architecture)
    names = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and m.weight.numel() <= 256][:2]
    assert len(names) == 2
    plan = make_plan(model, rank=HUGE, curvature="identity", patterns=tuple(names))
    layers = plan.components[0].layers
    examples = make_examples(5, longest=7)
    batches = [batch for _, batch in CausalLM().batches((model,), examples, 16)]
    matrix = dense_gauss_newton(model, [layer.name for layer in layers], batches, text_logits) / len(examples)
    vectors = torch.from_numpy(np.random.default_rng(0).standard_normal((3, len(matrix))))
    product = GaussNewton(CausalLM(), model, layers, examples).product(vectors)
    assert_close(product.numpy(), vectors.numpy() @ matrix, 1e-6 if architecture == "gpt2" else 1e-5)  # some round to float32 in norms


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    texts = random_texts(12, seed=4, shortest=5, longest=10)
    return write_jsonl(tmp_path_factory.mktemp("data") / "c.jsonl", [{"id": f"d{i}", "text": t} for i, t in enumerate(texts)])


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    return saved_checkpoints(tmp_path_factory.mktemp("checkpoints"), 2)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory, model_dirs, data):
    """The Gauss-Newton matrix of two layers on the corpus."""
    client = built(tmp_path_factory.mktemp("matrix") / "i", model_dirs[-1:], data, curvature="kfac", layers=LAYERS, rank=HUGE)
    (component,) = client.index.manifest.components
    model = client.encoder.model
    corpus = [client.index.example(row) for row in range(len(client.index))]
    batches = [batch for _, batch in CausalLM().batches((model,), corpus, 64)]
    return dense_gauss_newton(model, component.layer_names, batches, text_logits) / len(corpus)


def expected_scores(client, matrix, damping):
    """g^T (G + a)^-1 g over the index's layers, by a dense solve; `damping` is a function of layers and the mean eigenvalue of each."""
    (component,) = client.index.manifest.components
    model = client.encoder.model
    corpus = [client.index.example(row) for row in range(len(client.index))]
    means = client.encoder.component_encoders[component.name].mean_eigenvalues()
    sizes = [layer.outputs * layer.inputs for layer in component.layers]
    matrix = matrix + np.diag(np.repeat(damping(means), sizes))

    def gradient(example):
        return np.concatenate([g.ravel() for g in autograd_gradients(model, component.layers, example)[0]])

    query_gradients = np.stack([gradient(example) for example in client.query_examples(QUERIES)])
    solved = np.linalg.solve(matrix, query_gradients.T).T
    return in_nats(client.index, component.weight * solved @ np.stack([gradient(corpus[row]) for row in ROWS]).T)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "fisher", "diagonal"])
def test_converged_scores_equal_a_dense_solve(tmp_path, model_dirs, data, matrix, curvature):
    iterations = 2 * CONVERGED if curvature == "fisher" else CONVERGED
    client = built(tmp_path / "i", model_dirs[-1:], data, curvature=curvature, layers=LAYERS, rank=HUGE)
    for options, damping in (
        ({}, lambda means: 10 * means),
        ({"damping": 3.0}, lambda means: 3 * means),
        ({"training": "0.02,50"}, lambda means: np.full(len(means), tokens(client))),
    ):
        expected = expected_scores(client, matrix, damping)
        actual = client.scores(QUERIES, refine=iterations, **options)[:, ROWS]
        assert_close(actual, expected, 1e-4)
        if curvature != "ekfac":
            continue
        assert_close(client.recomputed_scores(QUERIES, ROWS, refine=iterations, **options), expected, 1e-4)
        answer = client.query(QUERIES[0], k=40, refine=iterations, **options)
        by_row = {a.row: a.score for a in (*answer.proponents, *answer.opponents)}
        assert_close([by_row[row] for row in ROWS], expected[0], 1e-4)
        assert answer.query["refine"] == iterations
        assert answer.search.refine.residual < 1e-4
        assert answer.search.refine.damping == (None if "training" in options else {"blocks": options.get("damping", 10.0)})
    if curvature != "ekfac":
        return
    client.query(QUERIES[1], refine=2)
    assert client.query(QUERIES[0], refine=iterations, training="0.02,50").search.refine == answer.search.refine  # kept with its rows
    few = client.query(QUERIES[2], refine=1).search.refine
    assert (few.iterations, few.products) == (1, 24)
    assert few.residual > 1e-4


def tokens(client):
    (component,) = client.index.manifest.components
    return component.curvature.tokens / component.curvature.examples


def test_a_projected_index_holds_the_part_of_the_solution_that_its_rows_see(tmp_path, model_dirs, data, matrix):
    client = built(tmp_path / "i", model_dirs[-1:], data, curvature="ekfac", layers=LAYERS, rank=6, projection="pca")
    (component,) = client.index.manifest.components
    means = client.encoder.component_encoders[component.name].mean_eigenvalues()
    model = client.encoder.model
    corpus = [client.index.example(row) for row in range(len(client.index))]
    sizes = np.array([layer.outputs * layer.inputs for layer in component.layers])
    matrix = matrix + np.diag(np.repeat(10 * means, sizes))
    gradients = [autograd_gradients(model, component.layers, e)[0] for e in [*client.query_examples(QUERIES), *(corpus[r] for r in ROWS)]]
    solved = np.linalg.solve(matrix, np.stack([np.concatenate([g.ravel() for g in q]) for q in gradients[: len(QUERIES)]]).T).T
    expected = np.zeros((len(QUERIES), len(ROWS)))
    first = 0
    for number, layer in enumerate(component.layers):
        outputs = client.index.arrays[f"blocks/{layer.name}/output_projection"].astype(float)
        inputs = client.index.arrays[f"blocks/{layer.input_group}/input_projection"].astype(float)
        size = layer.outputs * layer.inputs
        projected = [outputs @ v[first : first + size].reshape(layer.outputs, layer.inputs) @ inputs.T for v in solved]
        seen = [outputs @ g[number] @ inputs.T for g in gradients[len(QUERIES) :]]
        expected += np.array([[float((a * b).sum()) for b in seen] for a in projected])
        first += size
    assert_close(client.scores(QUERIES, refine=CONVERGED)[:, ROWS], in_nats(client.index, component.weight * expected), 1e-4)


def untied_gradients(model, names, example):
    """An example's gradient in each weight, one example at a time; head and embeddings that are one weight have one each."""
    weights = {f"{name}.weight": model.get_submodule(name).weight.detach().clone().requires_grad_(True) for name in names}
    ids = torch.tensor(example.token_ids.astype(np.int64))[None]
    arguments = {"input_ids": ids[:, :-1], "use_cache": False}
    log_p = functional_call(model, weights, kwargs=arguments, tie_weights=False).logits[0].log_softmax(-1)
    loss = -sum(log_p[t - 1, ids[0, t]] for t in range(1, ids.shape[1]) if example.loss_mask[t])
    gradients = torch.autograd.grad(loss, list(weights.values()))
    transposed = [type(model.get_submodule(name)).__name__ == "Conv1D" for name in names]
    return {n: (g.T if t else g).numpy() for n, g, t in zip(names, gradients, transposed, strict=True)}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_head_embeddings_and_blocks_are_refined_together(tmp_path, data, architecture):
    """GPT-2's head and embeddings are one weight, Llama's are two."""
    saved = make_model(architecture)
    saved.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    layers = ("*attn.c_proj",) if architecture == "gpt2" else ("*self_attn.o_proj",)
    roles = ("blocks", "head", "embeddings")
    client = built(tmp_path / "i", str(tmp_path / "m"), data, components=roles, layers=layers, rank=HUGE, curvature="ekfac", head_bits=16)
    model = client.encoder.model
    parts = {c.role: client.encoder.component_encoders[c.name] for c in client.index.manifest.components}
    names = {role: [layer.name for layer in part.layers] for role, part in parts.items()}
    tied = architecture == "gpt2"
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    weights = [*names["blocks"], *([] if tied else names["head"]), *names["embeddings"]]
    corpus = [client.index.example(row) for row in range(len(client.index))]
    batches = [batch for _, batch in CausalLM().batches((model,), corpus, 64)]
    matrix = dense_gauss_newton(model, weights, batches, text_logits) / len(corpus)
    means = [m for role in ("blocks", *([] if tied else ["head"]), "embeddings") for m in parts[role].mean_eigenvalues()]
    if tied:
        means[-1] = parts["head"].mean_eigenvalues()[0]
    sizes = [model.get_submodule(name).weight.numel() for name in weights]
    matrix += np.diag(np.repeat(30.0 * np.array(means), sizes))
    every = [name for role in roles for name in names[role]]
    query_gradients = [untied_gradients(model, every, example) for example in client.query_examples(QUERIES)]
    seen = [untied_gradients(model, every, corpus[row]) for row in ROWS]

    def gradient_of(gradients, name):
        both = tied and name in names["embeddings"]
        return gradients[name] + (gradients[names["head"][0]] if both else 0)

    flat = np.stack([np.concatenate([gradient_of(q, name).ravel() for name in weights]) for q in query_gradients])
    pieces = np.split(np.linalg.solve(matrix, flat.T).T, np.cumsum(sizes)[:-1], axis=1)
    solved = dict(zip(weights, pieces, strict=True))
    if tied:
        solved[names["head"][0]] = solved[names["embeddings"][0]]
    expected = {role: np.zeros((len(QUERIES), len(ROWS))) for role in roles}
    for role in roles:
        for name in names[role]:
            for number, gradients in enumerate(seen):
                gradient = gradients[name].copy()
                if role == "head":  # of the tokens that the example predicts, as rows have it
                    example = corpus[ROWS[number]]
                    tokens = np.unique(example.token_ids[1:][example.loss_mask[1:]])
                    gradient[np.setdiff1d(np.arange(len(gradient)), tokens)] = 0
                expected[role][:, number] += in_nats(client.index, solved[name] @ gradient.ravel())
    actual = client.recomputed_scores(QUERIES, ROWS, refine=12, damping=30.0)
    rtol = 1e-4 if tied else 2e-3  # RMS norms round to float32
    assert_close(actual, sum(expected.values()), rtol)
    doubled = client.recomputed_scores(QUERIES, ROWS, refine=12, damping=30.0, weights={"head": 2.0})
    assert_close(doubled, sum(expected.values()) + expected["head"], rtol)
    report = client.query(QUERIES[0], k=3, refine=2).search.refine
    assert report.damping == {"blocks": 10.0, "head": 1.0, "embeddings": 1.0}
    assert report.products == 3 * len(corpus)
    alone = client.query(QUERIES[0], k=3, refine=2, weights={"head": 0.0, "embeddings": 0.0}).search.refine
    assert alone.damping == {"blocks": 10.0}


def test_what_training_did_not_change_stays_as_it_is(tmp_path, data):
    base, tuned = make_model("llama"), make_model("llama")
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.self_attn.o_proj.weight.mul_(1.1)
    for name, model in (("base", base), ("m", tuned)):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    options = {"components": ("blocks", "head"), "rank": HUGE, "curvature": "ekfac", "base": str(tmp_path / "base")}
    client = built(tmp_path / "i", str(tmp_path / "m"), data, **options)
    assert client.query(QUERIES[0], refine=2).search.refine.damping == {"blocks": 10.0}
    head = {"weights": {"blocks": 0.0}}
    plain = client.scores(QUERIES[:1], **head)
    with pytest.raises(UsageError, match="training changed no layer"):
        client.scores(QUERIES[:1], refine=2, **head)
    blocks = {"weights": {"head": 0.0}}
    refined = client.recomputed_scores([Query(row=3)], range(12), refine=2)
    (self_score,) = client.recomputed_scores([Query(row=3)], [3])
    assert_close(refined[0, 3], self_score[0], 1e-4)  # its score with itself stays
    alone = client.recomputed_scores([Query(row=3)], range(12), refine=2, **blocks)[0]
    head_scores = refined[0] - client.recomputed_scores([Query(row=3)], range(12), **head)[0]
    assert_close(head_scores / head_scores[3], alone / alone[3], 1e-4)
    assert np.abs(plain).max() > 0


def test_stored_rows_are_estimates_of_refined_scores(tmp_path, data):
    make_model("llama").save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    client = built(tmp_path / "i", str(tmp_path / "m"), data, components=("head", "embeddings"), head_bits=2048, embedding_bits=2048)
    queries = QUERIES[::2]
    exact = client.recomputed_scores(queries, range(12), refine=3)
    assert_close(client.scores(queries, refine=3), exact, 0.1)
    plain = client.recomputed_scores(queries, range(12))
    assert np.abs(exact / np.abs(exact).max() - plain / np.abs(plain).max()).max() > 0.05


def test_whole_layers_are_refined_for_candidates_by_plain_rows(tmp_path, model_dirs, data):
    client = built(tmp_path / "i", model_dirs[-1:], data, bytes_per_example=1200)
    fit_rerank(client.index.path, examples=12, runtime={"dtype": "float64"})
    client = Client(client.index.path)
    (blocks,) = (c for c in client._recomputer.view.manifest.components if c.role == "blocks")
    answer = client.query(QUERIES[0], k=5, rerank=10, refine=3)
    again = client.recomputed_scores(QUERIES[:1], [a.row for a in answer.proponents], refine=3)[0]
    assert_close([a.score for a in answer.proponents], again, 1e-4)
    assert answer.search.refine.iterations == 3
    plain_candidates = client.query(QUERIES[0], k=5, rerank=10)
    scores, plain_scores = ({a.row: a.stored_score for a in each.proponents} for each in (answer, plain_candidates))
    assert_close(
        [scores[row] for row in sorted(scores.keys() & plain_scores)],
        [plain_scores[row] for row in sorted(scores.keys() & plain_scores)],
        1e-6,
    )
    plainly = client.recomputed_scores(QUERIES[:1], ROWS)
    assert np.abs(client.recomputed_scores(QUERIES[:1], ROWS, refine=3) - plainly).max() > 0
    assert len(blocks.layers) == 8


def test_kept_rows_are_those_of_the_layers_and_the_corpus_that_are_asked(tmp_path, model_dirs, data):
    client = built(tmp_path / "i", model_dirs[-1:], data, curvature="ekfac", layers=LAYERS, rank=HUGE)
    first = ("*h.0.*",)
    expected = [Client(client.index.path).scores(QUERIES[:1], refine=2, **options) for options in ({"layers": first}, {})]
    for _ in range(2):
        for options, scores in zip(({"layers": first}, {}), expected, strict=True):
            assert_close(client.scores(QUERIES[:1], refine=2, **options), scores, 1e-6)
    assert len(client._encoded) == 2
    client.encode(QUERIES[:1])
    delete(client.index.path, ids=["d4"])
    refreshed = client.refreshed()
    assert [key for _, key in refreshed._encoded] == [()]
    actual = refreshed.scores(QUERIES[:1], refine=2)
    assert_close(np.nan_to_num(actual), np.nan_to_num(Client(client.index.path).scores(QUERIES[:1], refine=2)), 1e-6)


def test_a_classifier_is_refined(tmp_path):
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).double()
    records = [{"id": f"x{i}", "features": generator.standard_normal(6).tolist(), "label": int(generator.integers(3))} for i in range(30)]
    path = write_jsonl(tmp_path / "v.jsonl", records)
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "m.safetensors")
    build(
        BuildConfig(
            model=str(tmp_path / "m.safetensors"), data=(str(path),), out=str(tmp_path / "i"), task="mlp", dtype="float64", rank=HUGE,
            curvature="ekfac", labels="expected",
        )
    )  # fmt: skip
    client = Client(tmp_path / "i")
    (component,) = client.index.manifest.components
    network = client.encoder.model
    corpus = [client.index.example(row) for row in range(30)]
    batches = [batch for _, batch in MLP().batches((network,), corpus, 64)]
    matrix = (
        dense_gauss_newton(network, component.layer_names, batches, lambda call, m, w, b: call(m, w, (b.inputs.double(),))[:, None]) / 30
    )
    matrix += np.diag(np.repeat(30 * client.encoder.component_encoders[component.name].mean_eigenvalues(), [30, 15]))

    def gradient(example):
        weights = [network[0].weight.requires_grad_(True), network[2].weight.requires_grad_(True)]
        logits = network(torch.from_numpy(np.asarray(example.features, np.float64)))
        loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([example.label]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).numpy()

    gradients = np.stack([gradient(example) for example in corpus])
    network.requires_grad_(False)
    expected = in_nats(client.index, component.weight * gradients[:2] @ np.linalg.solve(matrix, gradients.T))
    actual = client.scores([Query(row=0), Query(row=1)], refine=2 * CONVERGED)
    assert_close(actual, expected, 1e-4)


def test_what_cannot_be_refined_is_refused(tmp_path, model_dirs, data):
    several = built(tmp_path / "several", model_dirs, data, curvature="ekfac", layers=LAYERS, rank=HUGE)
    with pytest.raises(UsageError, match="this index has several"):
        several.query(QUERIES[0], refine=1)
    head = built(tmp_path / "head", model_dirs[-1:], data, components=("head",))
    random = built(tmp_path / "random", model_dirs[-1:], data, rank=2)
    with pytest.raises(UsageError, match="are a random projection, which has no inverse"):
        random.query(QUERIES[0], refine=1)
    identity = built(tmp_path / "identity", model_dirs[-1:], data, rank=HUGE, curvature="identity", layers=LAYERS)
    with pytest.raises(UsageError, match="identity"):
        identity.query(QUERIES[0], refine=1)
    for options in ({"mode": "cosine"}, {"curvature": False}):
        with pytest.raises(UsageError, match="a refined query has no length"):
            head.query(QUERIES[0], refine=1, **options)
    with pytest.raises(UsageError, match="`refine` is 101"):
        head.query(QUERIES[0], refine=101)


def test_every_architecture_says_whether_it_can_be_refined():
    """Mamba's scan and others: a product, or a sentence."""
    for architecture in CONFIGS:
        model = make_model(architecture)
        plan = make_plan(model, rank=HUGE, curvature="identity")
        layers = plan.components[0].layers
        vectors = torch.ones(1, plan.components[0].dim, dtype=torch.float64)
        try:
            product = GaussNewton(CausalLM(), model, layers, make_examples(2, longest=5)).product(vectors)
        except UsageError as error:
            message = str(error)
            assert "the model's logits cannot be differentiated forward" in message
        else:
            assert torch.isfinite(product).all()
            assert product.abs().max() > 0
