"""The output head's sparse rows: vectors against a dense gradient, codes against their theory, search against sums."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import assert_close, in_nats, make_examples, make_model, make_plan, open_zarr, sparse_component, sparse_rows, words
from wherefrom import BuildConfig, Client
from wherefrom.cli import main
from wherefrom.indexer import sparse
from wherefrom.indexer.curvature import add_sums
from wherefrom.indexer.encoder import Encoder, EncoderSettings
from wherefrom.indexer.fit import Fit
from wherefrom.indexer.tasks import CausalLM
from wherefrom.ray_jobs.build import build
from wherefrom.store.arrays import ArrayFile
from wherefrom.store.bits import padded_width, rotate
from wherefrom.store.errors import IntegrityError, UsageError
from wherefrom.store.manifest import Curvature, SparseComponent
from wherefrom.store.postings import Postings, byte_tables
from wherefrom.store.shard import rows_path
from wherefrom.store.sparse import SparseRows, code, concatenate
from wherefrom.store.vectors import SparseVectors

TASK = CausalLM()


def head_plan(model, bits=64, max_tokens=None, labels="sampled", damping=1.0, batch_tokens=64, blocks=None, role="head", extra_tokens=0):
    layer = TASK.sparse_head(model) if role == "head" else TASK.sparse_embeddings(model)
    head = SparseComponent(
        name=role,
        kind="sparse",
        model=0,
        weight=1.0,
        role=role,
        layer=layer.name,
        vocabulary=layer.vocabulary,
        width=layer.width,
        bits=bits,
        extra_tokens=extra_tokens,
        max_tokens=max_tokens,
        postprocessed=layer.postprocessed,
        seed=3,
        curvature=Curvature(kind="kfac", labels=labels, examples=0, tokens=0, damping=damping),
    )
    return EncoderSettings((*(blocks.components if blocks else ()), head), batch_tokens)


def fitted(model, settings, examples, parts=1):
    fitting, arrays = Fit(settings), {}
    for step in range(len(fitting.steps)):
        totals = {}
        for part in range(parts):
            add_sums(totals, fitting.sum_statistics(Encoder(TASK, (model,), settings, arrays), step, examples[part::parts]))
        arrays = fitting.finish(step, arrays, totals)
    return Encoder(TASK, (model,), settings, arrays)


def dense_head_gradient(model, example):
    """The whole head gradient [vocabulary, width] by autograd, one example alone; also hidden states and probabilities at loss tokens."""
    head = model.get_output_embeddings()
    weight = torch.nn.Parameter(head.weight.detach().clone())
    tied, head.weight = head.weight, weight  # a weight of its own, so that a tied embedding's gradient is not in it
    seen = []
    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = torch.tensor(example.token_ids.astype(np.int64))[None]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
    hook.remove()
    log_p = logits.log_softmax(-1)
    positions = [t for t in range(1, ids.shape[1]) if example.loss_mask[t]]
    (gradient,) = torch.autograd.grad(-sum(log_p[t - 1, ids[0, t]] for t in positions), weight)
    head.weight = tied
    rows = [t - 1 for t in positions]
    return gradient.numpy(), seen[0][0, rows].detach().numpy(), log_p[rows].exp().detach().numpy()


MODELS = {
    "tied": lambda: make_model("gpt2"),
    "untied": lambda: make_model("gpt_neox"),
    "with a bias": lambda: make_model("phi"),
    "with a soft-cap": lambda: make_model("gemma2"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("labels", ["sampled", "data"])
def test_vectors_equal_the_whitened_dense_head_gradient(name, labels, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double() if self.dtype == torch.float64 else self.to(torch.float32))
    model, examples = MODELS[name](), make_examples(9)
    settings = head_plan(model, labels=labels, damping=0.7)
    encoder = fitted(model, settings, examples)
    truth = [dense_head_gradient(model, e) for e in examples]
    tokens = np.mean([len(h) for _, h, _ in truth])
    e, U = np.linalg.eigh(sum(h.T @ h for _, h, _ in truth) / len(truth))
    q = encoder.arrays["head/vocabulary"]
    postprocessed = settings.components[0].postprocessed
    assert postprocessed == (name == "with a soft-cap")
    if labels == "sampled" and not postprocessed:
        np.testing.assert_allclose(q, sum((p * (1 - p)).sum(0) for _, _, p in truth) / len(truth), rtol=1e-8)
    assert_close(encoder.arrays["head/eigenvalues"], np.maximum(e, 0) / tokens, 1e-6)
    eigenvalues = q[:, None] * np.maximum(e, 0)[None] / tokens
    rows = encoder.rows(examples)["head"]
    for i, (gradient, _, _) in enumerate(truth):
        part = slice(rows.indptr[i], rows.indptr[i + 1])
        keys = sorted({int(t) for t, m in zip(examples[i].token_ids, examples[i].loss_mask, strict=True) if m})
        assert rows.keys[part].tolist() == keys
        whitened = (gradient @ U) / np.sqrt(eigenvalues + 0.7 * eigenvalues.mean())
        # eigenvectors may differ in sign: compare what does not depend on it
        ours, expected = rows.vectors[part].astype(float), whitened[keys]
        assert_close(ours @ ours.T, expected @ expected.T, 1e-5)
        assert_close(np.abs(ours), np.abs(expected), 1e-4)


def dense_embedding_gradients(model, example, labels):
    """The whole gradient of the embeddings [vocabulary, width] by autograd, one example alone, and that of each position."""
    embeddings = model.get_input_embeddings()
    tied = embeddings.weight
    embeddings.weight = torch.nn.Parameter(tied.detach().clone())  # of its own, so that a tied head's gradient is not in it
    seen = []
    hook = embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
    batch = TASK.collate([example], torch.device("cpu"))
    loss = TASK.loss(model, batch, sample_seed=3 if labels == "sampled" else None).sum()
    hook.remove()
    gradient_of_all, positions = torch.autograd.grad(loss, [embeddings.weight, seen[0]])
    embeddings.weight = tied
    # Some models multiply what they read with a constant; whitening takes any constant out, so the gradient is that of the product.
    return gradient_of_all.numpy() / float(getattr(embeddings, "embed_scale", 1.0)), positions[0].numpy()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("labels", ["sampled", "data"])
def test_embeddings_equal_the_whitened_dense_gradient(name, labels, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double() if self.dtype == torch.float64 else self.to(torch.float32))
    model, examples = MODELS[name](), make_examples(9)
    settings = head_plan(model, labels=labels, damping=0.7, role="embeddings")
    encoder = fitted(model, settings, examples)
    moments = [dense_embedding_gradients(model, e, labels)[1] for e in examples]
    tokens = sum(len(m) for m in moments)
    e, U = np.linalg.eigh(sum(m.T @ m for m in moments) / tokens)
    q = np.bincount(np.concatenate([x.token_ids[:-1] for x in examples]), minlength=settings.components[0].vocabulary) / len(examples)
    np.testing.assert_allclose(encoder.arrays["embeddings/vocabulary"], q)
    eigenvalues = q[:, None] * np.maximum(e, 0)[None]
    rows = encoder.rows(examples)["embeddings"]
    for i, example in enumerate(examples):
        part = slice(rows.indptr[i], rows.indptr[i + 1])
        assert rows.keys[part].tolist() == sorted(set(example.token_ids[:-1].tolist()))
        gradient, _ = dense_embedding_gradients(model, example, "data")
        unread = np.setdiff1d(np.arange(len(gradient)), rows.keys[part])
        assert not gradient[unread].any()  # what is not stored was zero
        expected = ((gradient @ U) / np.sqrt(eigenvalues + 0.7 * eigenvalues.mean()))[rows.keys[part]]
        ours = rows.vectors[part].astype(float)
        assert_close(ours @ ours.T, expected @ expected.T, 1e-5)


def test_embeddings_do_not_depend_on_the_batch_or_on_other_components():
    model, examples = make_model(), make_examples(14)
    alone = fitted(model, head_plan(model, role="embeddings"), examples)
    every = EncoderSettings(
        (*head_plan(model, blocks=make_plan(model, curvature="ekfac")).components, *head_plan(model, role="embeddings").components), 23
    )
    together = fitted(model, every, examples, parts=3)
    assert_close(together.arrays["embeddings/eigenvalues"], alone.arrays["embeddings/eigenvalues"], 1e-5)
    a, b = alone.rows(examples)["embeddings"], Encoder(TASK, (model,), every, together.arrays | alone.arrays).rows(examples)["embeddings"]
    assert np.array_equal(a.keys, b.keys)
    assert_close(b.vectors, a.vectors, 1e-6)


def test_a_head_alone_asks_for_no_backward_pass_and_with_blocks_it_is_the_same(monkeypatch):
    model, examples = make_model(), make_examples(12)
    alone = fitted(model, head_plan(model), examples)
    both = fitted(model, head_plan(model, blocks=make_plan(model, curvature="ekfac")), examples)
    a, b = alone.rows(examples)["head"], both.rows(examples)["head"]
    assert np.array_equal(a.keys, b.keys)
    assert_close(b.vectors @ b.vectors.T, a.vectors @ a.vectors.T, 1e-6)  # eigenvectors of two fits may differ in sign
    assert set(both.rows(examples)) == {"blocks", "head"}
    seen = []
    for block in model.transformer.h:
        block.register_full_backward_hook(lambda *_: seen.append("backward"))
    alone.rows(examples)
    assert seen == []


@pytest.mark.parametrize("role", ["head", "embeddings"])
def test_nothing_of_the_size_of_vocabulary_times_width_is_ever_formed(role):
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import AutoConfig, AutoModelForCausalLM

    vocabulary, width = 3000, 256
    config = AutoConfig.for_model("gpt2", vocab_size=vocabulary, n_embd=width, n_layer=1, n_head=2, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    examples, settings = make_examples(6), head_plan(model, role=role, batch_tokens=32)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != model.lm_head.weight.data_ptr():
                    sizes.append(tensor.numel())
            return made

    with Sizes():
        fitted(model, settings, examples).rows(examples)
    assert len(sizes) > 100
    assert max(sizes) < vocabulary * width / 2  # the logits of a batch of 32 tokens; the weight itself is not counted


def test_fits_of_any_split_and_any_batching_agree():
    model, examples = make_model(), make_examples(14)
    encoder = fitted(model, head_plan(model), examples)
    split = fitted(model, head_plan(model, batch_tokens=17), examples, parts=3)
    for name in ("head/vocabulary", "head/eigenvalues"):
        assert_close(split.arrays[name], encoder.arrays[name], 1e-9)
    other = Encoder(TASK, (model,), head_plan(model, batch_tokens=5), encoder.arrays)
    order = np.random.default_rng(0).permutation(14).tolist()
    a, b = encoder.rows(examples)["head"], other.rows([examples[i] for i in order])["head"]
    for position, i in enumerate(order):
        assert_close(b.slice(position, position + 1).vectors, a.slice(i, i + 1).vectors, 1e-4)


def test_only_the_largest_keys_are_kept_when_asked():
    model, examples = make_model(), make_examples(6)
    encoder = fitted(model, head_plan(model), examples)
    few = Encoder(TASK, (model,), head_plan(model, max_tokens=2), encoder.arrays).rows(examples)["head"]
    every = encoder.rows(examples)["head"]
    for i in range(6):
        every_row = every.slice(i, i + 1)
        largest = np.sort(every_row.keys[np.argsort(-np.linalg.norm(every_row.vectors, axis=1))[:2]])
        assert few.slice(i, i + 1).keys.tolist() == largest.tolist()


@pytest.mark.parametrize("role", ["head", "embeddings"])
@pytest.mark.parametrize(("bits", "max_tokens"), [(16, None), (8, 3), (512, 3)])
def test_rows_that_are_rotated_before_they_are_copied_have_the_codes_of_whole_ones(role, bits, max_tokens, monkeypatch):
    """Only a code's coordinates and lengths are copied to the host."""
    model, examples = make_model(), make_examples(9)
    plan = head_plan(model, bits=bits, role=role, max_tokens=max_tokens)
    encoder = fitted(model, plan, examples)
    widths = []
    copy = sparse.start_copy
    monkeypatch.setattr(sparse, "start_copy", lambda tensor: widths.append(tuple(tensor.shape[1:])) or copy(tensor))
    whole = {tuple(batch.positions): batch.rows[role] for batch in encoder.batches(examples)}
    widths.clear()
    rotated = {tuple(batch.positions): batch.rows[role] for batch in encoder.batches(examples, coded=True)}
    assert {width for (width,) in filter(None, widths)} == {bits if bits <= 256 else plan.components[0].width}
    assert whole.keys() == rotated.keys()
    for positions, vectors in whole.items():
        broken = np.arange(len(vectors)) == 1
        vectors.clear(broken)
        rotated[positions].clear(broken)
        expected, coded = code(vectors, bits, 3), code(rotated[positions], bits, 3)
        assert np.array_equal(coded.counts, expected.counts)
        assert np.array_equal(coded.keys, expected.keys)
        for name in ("factors", "norms", "squared_lengths"):
            assert_close(getattr(coded, name), getattr(expected, name), 1e-5)
        sizes = np.abs(rotate(vectors.vectors, bits, 3))
        differ = np.unpackbits(coded.codes ^ expected.codes, axis=1, count=bits).astype(bool)
        assert not (differ & (sizes > 1e-5 * sizes.max())).any()


def test_the_most_probable_other_tokens_are_added_when_asked(monkeypatch):
    model, examples = make_model(), make_examples(6)
    encoder = fitted(model, head_plan(model), examples)
    more = Encoder(TASK, (model,), head_plan(model, extra_tokens=3), encoder.arrays).rows(examples)["head"]
    every = Encoder(TASK, (model,), head_plan(model, extra_tokens=1000), encoder.arrays).rows(examples)["head"]
    for i, example in enumerate(examples):
        gradient, _, p = dense_head_gradient(model, example)
        targets = {int(t) for t, m in zip(example.token_ids, example.loss_mask, strict=True) if m}
        probable = [int(v) for v in np.argsort(-p.sum(0)) if int(v) not in targets][:3]
        assert more.slice(i, i + 1).keys.tolist() == sorted(targets | set(probable))
        every_row = every.slice(i, i + 1)
        assert every_row.keys.tolist() == list(range(len(gradient)))
        assert set(more.slice(i, i + 1).keys) <= set(every_row.keys)
        row_of_more = more.slice(i, i + 1)
        assert_close(row_of_more.vectors, every_row.vectors[row_of_more.keys], 1e-6)


# --- codes


@pytest.mark.parametrize(("width", "bits"), [(64, 64), (256, 256), (256, 64), (96, 128), (256, 32)])
def test_the_estimator_is_unbiased_with_the_variance_of_theory(width, bits):
    generator = np.random.default_rng(1)
    v, q = generator.standard_normal((2, width)).astype(np.float32)
    v, q = v / np.linalg.norm(v), q / np.linalg.norm(q)
    estimates, itself = [], []
    for seed in range(1500):
        coded = code(SparseVectors(np.array([0, 1]), np.array([0]), v[None]), bits, seed)
        signs = np.unpackbits(coded.codes, axis=1, count=bits).astype(float)[0] * 2 - 1
        estimates.append(coded.factors[0] * (signs @ rotate(q[None], bits, seed)[0]))
        itself.append(coded.factors[0] * (signs @ rotate(v[None], bits, seed)[0]))
    np.testing.assert_allclose(itself, 1.0, rtol=1e-5)  # with itself exact
    cosine = float(v @ q)
    # Var = (1 - cos^2) (pi / 2 * padded / bits - 1) / padded; at bits = padded = D it is RaBitQ's (pi / 2 - 1) / D
    padded = padded_width(width, bits)
    expected = np.sqrt((1 - cosine**2) * (np.pi / 2 * padded / bits - 1) / padded)
    error = np.array(estimates) - cosine
    assert abs(error.mean()) < 4 * expected / np.sqrt(len(error))
    assert np.std(error) == pytest.approx(expected, rel=0.12)


def random_rows(rows, vocabulary, width, seed=0):
    generator = np.random.default_rng(seed)
    keys = [np.sort(generator.choice(vocabulary, generator.integers(1, 9), replace=False)) for _ in range(rows)]
    indptr = np.concatenate([[0], np.cumsum([len(k) for k in keys])])
    return SparseVectors(indptr, np.concatenate(keys), generator.standard_normal((indptr[-1], width)).astype(np.float32))


@pytest.mark.parametrize("vocabulary", [40, 100_000])
def test_shards_are_what_zarr_reads_and_their_scores_are_plain_sums(tmp_path, vocabulary):
    rows, bits = random_rows(30, vocabulary, 12), 20
    read = sparse_rows(tmp_path, rows, vocabulary, bits, 5)
    group = open_zarr(tmp_path)["head"]
    assert group["keys"].dtype == (np.uint16 if vocabulary == 40 else np.uint32)
    assert np.array_equal(group["keys"][:], rows.keys)
    assert np.array_equal(group["indptr"][:], rows.indptr)
    assert np.array_equal(group["codes"][:], np.packbits(rotate(rows.vectors, bits, 5) > 0, axis=1))
    factors = group["factors"][:].astype(float) * group.attrs["factor_scale"]
    np.testing.assert_allclose(read.norms, np.sqrt(rows.squared_norms), rtol=1e-6)
    query_rows = random_rows(4, vocabulary if vocabulary == 40 else 40, 12, seed=9)
    query_rows = SparseVectors(
        query_rows.indptr, np.where(np.isin(query_rows.keys, rows.keys), query_rows.keys, rows.keys[query_rows.keys]), query_rows.vectors
    )
    rotated, owners = rotate(query_rows.vectors, bits, 5), np.repeat(np.arange(4), np.diff(query_rows.indptr))
    expected = np.zeros((4, 30))
    for i in range(30):
        for e in range(rows.indptr[i], rows.indptr[i + 1]):
            signs = np.where(rotate(rows.vectors[e : e + 1], bits, 5)[0] > 0, 1.0, -1.0)
            for j in np.flatnonzero(query_rows.keys == rows.keys[e]):
                expected[owners[j], i] += factors[e] * (signs @ rotated[j])
    actual = np.zeros((4, 30), np.float32)
    Postings.of([read], sparse_component(vocabulary, 12, bits, 5)).add_scores(query_rows.keys, owners, byte_tables(rotated), actual)
    assert_close(actual, expected, 1e-5, np.sqrt(np.outer(query_rows.squared_norms, rows.squared_norms)))


def test_a_row_read_back_scores_its_own_squared_length(tmp_path):
    for width, bits in ((16, 16), (32, 8), (12, 20)):
        rows = random_rows(20, 30, width)
        read = sparse_rows(tmp_path / str(bits), rows, 30, bits, 5)
        row_keys = []
        for i in range(20):
            row = read.vectors(i, {})
            tables = byte_tables(rotate(row.vectors, bits, 5))
            scores = np.zeros((1, 20), np.float32)
            Postings.of([read], sparse_component(30, width, bits, 5)).add_scores(row.keys, row.owners, tables, scores)
            row_keys.append(scores[0, i] / read.norms[i] ** 2)
        if padded_width(width, bits) == width:  # else what the padding held is lost
            assert np.mean(row_keys) == pytest.approx(1.0, abs=0.4 if bits < width else 0.1)


def test_batches_are_joined_in_the_rows_order():
    rows = random_rows(9, 20, 8)
    parts = [[5, 0, 7], [1], [2, 8, 3, 4, 6]]
    blocks = []
    for part in parts:
        pieces = [rows.slice(i, i + 1) for i in part]
        indptr = np.concatenate([[0], np.cumsum([len(p.keys) for p in pieces])])
        merged = SparseVectors(indptr, np.concatenate([p.keys for p in pieces]), np.concatenate([p.vectors for p in pieces]))
        blocks.append((part, code(merged, 8, 1)))
    joined, coded = concatenate(blocks), code(rows, 8, 1)
    for name in ("counts", "keys", "codes", "factors", "norms"):
        assert np.array_equal(getattr(joined, name), getattr(coded, name)), name


@pytest.mark.parametrize("array", ["indptr", "keys", "codes", "factors", "norms"])
def test_a_flipped_byte_or_a_missing_end_is_an_error(tmp_path, array):
    sparse_rows(tmp_path, random_rows(12, 40, 8), 40, 8)
    path = rows_path(tmp_path, "0")
    (start,) = [start for name, (start, _, _) in ArrayFile(path)._entries.items() if name.startswith(f"head/{array}/c/")]
    content = path.read_bytes()
    path.write_bytes(content[:start] + bytes([content[start] ^ 4]) + content[start + 1 :])
    with pytest.raises(IntegrityError):
        SparseRows(ArrayFile(path), sparse_component(40, 8, 8), 12).check()
    path.write_bytes(content[:-1])
    with pytest.raises(IntegrityError):
        SparseRows(ArrayFile(path), sparse_component(40, 8, 8), 12)


# --- indexes


@pytest.fixture(scope="module")
def head_index(tmp_path_factory, model_dir, corpus_file):
    out = tmp_path_factory.mktemp("heads") / "both.wherefrom"
    config = dict(model=str(model_dir), data=(str(corpus_file),), rank=4, shard_rows=50, components=("blocks", "head"), head_bits=32)
    build(BuildConfig(out=str(out), **config))
    return out


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_scores_of_an_index_are_weighted_sums_over_components_and_shared_tokens(head_index):
    client = Client(head_index)
    blocks, head = client.index.manifest.components
    assert head.weight == 1.0
    assert blocks.weight > 0
    (example,) = client.to_examples(_documents(words(3, 9, 9, 30, 41)))
    rows = client.encode_examples([example])
    from wherefrom.query.scoring import score_matrix

    actual = score_matrix(client.index, rows)[0]
    query_rows = rows["head"]
    rotated = rotate(query_rows.vectors, head.bits, head.seed)
    for i in (0, 7, 60, 119):
        shard, offset = client.index.locate(i)
        sparse = client.index.rows(shard, head)
        score = blocks.weight * float(rows["blocks"].inner_products(client.index.vectors(i, blocks))[0, 0])
        for key, code_, factor in zip(*sparse.entries(offset, offset + 1), strict=True):
            signs = np.unpackbits(code_, count=head.bits).astype(float) * 2 - 1
            score += sum(factor * (signs @ rotated[j]) for j in np.flatnonzero(query_rows.keys == key))
        assert_close(actual[i], in_nats(client.index, score), 1e-4, np.abs(actual).max())


def test_weights_of_a_query_multiply_those_of_the_index(head_index):
    from wherefrom.query.metric import Metric
    from wherefrom.query.scoring import score_matrix

    client = Client(head_index)
    rows = client.encode_examples(client.to_examples(_documents(words(3, 9, 9, 30, 41))))

    def scores(**weights):
        return score_matrix(client.index, rows, Metric(weights=weights))[0]

    summed = np.abs(scores(head=0)).max() + np.abs(scores(blocks=0)).max()
    assert_close(scores(head=0) + scores(blocks=0), scores(), 1e-5, summed)
    assert_close(3 * scores(head=0) + scores(blocks=0), scores(blocks=3), 1e-5, 3 * summed)
    answer = json.loads(run("query", head_index, "--row", "3", "--weights", "head=2, blocks=0", "--json").stdout)
    assert answer["query"]["weights"] == {"head": 2.0, "blocks": 0.0}
    for weights, message in (
        ("tail=1", "no component 'tail'"),
        ("head", "is written as"),
        ("head=-1", "between 1e-6 and 1e6"),
        ("head=0,blocks=0", "every component"),
    ):
        refused = run("query", head_index, "--row", "3", "--weights", weights)
        assert (refused.exit_code, message in refused.stderr) == (2, True), refused.output


def _documents(*texts):
    from wherefrom.store.corpus import Document

    return [Document(id=f"q{i}", source="q", where="", text=t) for i, t in enumerate(texts)]


def test_a_text_asked_back_finds_itself_and_rows_need_no_model(head_index, corpus_file):
    client = Client(head_index)
    text = client.index.example(17).text
    assert client.query(text=text, mode="cosine", k=1).proponents[0].row == 17
    assert client.query(row=17, mode="cosine", k=1).proponents[0].row == 17
    answer = json.loads(run("query", head_index, "--row", "17", "--json").stdout)
    assert answer["query"]["damping"] == {"blocks": 0.1, "head": 1.0}
    assert answer["search"]["method"] == "exact"
    assert answer["search"]["estimates"] is True
    shown = " ".join(run("query", head_index, "--row", "17").stdout.split())
    assert "head 1" in shown
    assert "scores are estimates" in shown
    info = json.loads(run("info", head_index, "--json").stdout)
    assert [s["kind"] for s in info["components"]] == ["dense", "sparse"]
    assert run("verify", head_index).exit_code == 0


def test_query_time_damping_of_the_head_equals_an_index_built_with_it(tmp_path, model_dir, corpus_file):
    config = dict(
        model=str(model_dir), data=(str(corpus_file),), components=("head",), head_bits=4096
    )  # so many bits that codes hardly err
    for name, damping in (("low", 0.3), ("high", 4.0)):
        build(BuildConfig(out=str(tmp_path / name), damping=damping, **config))
    low, high = Client(tmp_path / "low"), Client(tmp_path / "high")
    from wherefrom.query.metric import Metric
    from wherefrom.query.scoring import score_matrix

    examples = low.to_examples(_documents(words(3, 9, 9, 30, 41, 8), words(5, 6, 7, 8)))
    changed = score_matrix(low.index, low.encode_examples(examples), Metric(damping=4.0))
    built = score_matrix(high.index, high.encode_examples(examples))
    assert np.corrcoef(changed.ravel(), built.ravel())[0, 1] > 0.999
    assert np.abs(changed - built).max() < 0.05 * np.abs(built).max()
    with pytest.raises(UsageError, match="under the build's damping alone"):
        low.query(row=1, mode="cosine", damping=2.0)


def test_a_resumed_head_build_and_the_command_line(tmp_path, model_dir, corpus_file):
    options = [
        "--model",
        model_dir,
        "--data",
        corpus_file,
        "--out",
        tmp_path / "h",
        "-o",
        "components=head",
        "-o",
        "head_bits=16",
        "-o",
        "head_max_tokens=4",
    ]
    assert run("build", *options).exit_code == 0
    info = json.loads(run("info", tmp_path / "h", "--json").stdout)
    assert info["bytes_per_example"] < 200
    assert info["components"][0]["tokens"] == "4 of largest norm"
    assert "is already complete" in run("build", *options).stdout
    refused = run("build", *options[:6], "-o", "components=head,tail")
    assert (refused.exit_code, "can be blocks, head" in refused.stderr) == (2, True)
    assert run("build", *options[:4], "--out", tmp_path / "x", "-o", "components=head", "-o", "head_bits=0").exit_code == 2
