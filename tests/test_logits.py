"""Logits in pieces: the same rows, statistics, losses and hidden states as with all logits at once, for every architecture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CONFIGS, assert_close, make_examples, make_model, make_plan
from test_sparse import fitted, head_plan
from wherefrom.indexer import logits
from wherefrom.indexer.encoder import Encoder, EncoderSettings
from wherefrom.indexer.fit import Fit
from wherefrom.indexer.shares import token_shares
from wherefrom.indexer.tasks import CausalLM
from wherefrom.store.vectors import slice_rows

TASK = CausalLM()


def plan(model):
    """Settings with head, embeddings and blocks."""
    (blocks,) = make_plan(model, rank=4, curvature="ekfac", labels="sampled").components
    blocks = blocks.model_copy(update={"projection": blocks.projection.model_copy(update={"seed": 3})})  # that of the others
    embeddings = head_plan(model, role="embeddings", blocks=EncoderSettings((blocks,), 64))
    return replace(head_plan(model, blocks=embeddings), hidden=True)


def small_pieces(patched, tokens):
    patched.setattr(logits, "_PIECE", 1)
    patched.setattr(logits, "_LEAST_TOKENS", tokens)


def all_at_once(patched):
    patched.setattr(logits.Head, "of", lambda model, probe: None)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 11])
def test_pieces_give_what_all_logits_give(architecture, tokens, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double() if self.dtype == torch.float64 else self.to(torch.float32))
    model, examples = make_model(architecture), make_examples(9)
    examples[2].loss_mask[3:5] = False
    results = {}
    for way in ("whole", "pieces"):
        with monkeypatch.context() as patched:
            all_at_once(patched) if way == "whole" else small_pieces(patched, tokens)
            encoder = fitted(model, plan(model), examples)
            batches = list(encoder.batches(examples))
            shares = token_shares(encoder, examples[0], [slice_rows(batches[0].exact, 0, 1)])
            results[way] = encoder.arrays, batches, shares
    assert logits.Head.of(model, TASK.probe) == logits.Head(None if architecture == "gemma2" else TASK.sparse_head(model).name)
    for (name, array), piece in zip(results["whole"][0].items(), results["pieces"][0].values(), strict=True):
        if not name.endswith(("basis", "rotation", "projection")):  # eigenvectors of one eigenvalue are not determined
            assert_close(piece, array, 1e-8)
    for batch, piece in zip(results["whole"][1], results["pieces"][1], strict=True):
        assert_close(piece.losses, batch.losses, 1e-6)
        assert_close(piece.hidden, batch.hidden, 1e-6)
        for name in batch.exact:
            products = [b.exact[name].as_float32().inner_products(b.exact[name].as_float32()) for b in (piece, batch)]
            assert_close(products[0], products[1], 1e-5)
    assert_close(results["pieces"][2], results["whole"][2], 1e-5)


def test_extra_tokens_are_selected_over_all_positions(monkeypatch):
    model, examples = make_model(), make_examples(7)
    settings = head_plan(model, extra_tokens=4)
    encoder = fitted(model, settings, examples)
    expected = encoder.rows(examples)["head"]
    small_pieces(monkeypatch, 1)
    actual = encoder.rows(examples)["head"]
    assert np.array_equal(actual.keys, expected.keys)
    assert_close(actual.vectors, expected.vectors, 1e-6)


def test_a_subclass_with_another_measurement_is_differentiated_as_it_says():
    class Halved(CausalLM):
        def measurement(self, model, batch):
            return self.loss(model, batch) / 2

    model, examples = make_model(), make_examples(5)
    settings = make_plan(model, curvature="identity")
    plain, halved = (Encoder(task, (model,), settings, {}).rows(examples, queries=True)["blocks"].values for task in (TASK, Halved()))
    assert_close(halved * 2, plain, 1e-10)


@pytest.mark.parametrize("seed", [0, 1])
def test_components_with_sampled_labels_and_a_closed_form_share_one_pass(seed):
    model = make_model()
    settings = plan(model)
    names = [[component.name for component, _ in step] for step in Fit(settings).steps]
    assert sorted(names[0]) == ["blocks", "embeddings", "head"]
    assert names[1:] == [["blocks"]]
    examples = make_examples(12, seed=seed)
    together = fitted(model, settings, examples).arrays
    alone = fitted(model, head_plan(model), examples).arrays
    for name in ("head/vocabulary", "head/eigenvalues"):
        assert_close(together[name], alone[name], 1e-10)


@pytest.mark.parametrize("rank", [3, 100])
def test_principal_components_and_kronecker_factors_come_from_one_pass(rank):
    model, examples = make_model("llama"), make_examples(20)
    settings = make_plan(model, rank=rank, curvature="ekfac", projection="pca")
    assert len(Fit(settings).steps) == 2
    arrays = fitted(model, settings, examples).arrays
    plain = make_plan(model, rank=10_000, curvature="kfac")
    for layer, plain_layer in zip(settings.components[0].layers, plain.components[0].layers, strict=True):
        values = (
            fitted(model, plain, examples).arrays[f"blocks/{plain_layer.name}/eigenvalues"].reshape(plain_layer.outputs, plain_layer.inputs)
        )
        projection = arrays.get(f"blocks/{layer.input_group}/input_projection", np.eye(layer.inputs))
        rotation = arrays[f"blocks/{layer.input_group}/input_rotation"]
        cosines = np.sort(np.abs(np.diag(rotation.T @ projection @ projection.T @ rotation)))
        assert_close(cosines, np.ones(layer.input_rank), 1e-6)
        assert values.max() > 0


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
@pytest.mark.parametrize("seed", [None, 5])
def test_losses_without_gradients_are_computed_in_pieces(architecture, seed, monkeypatch):
    model, batch = make_model(architecture), TASK.collate(make_examples(5), torch.device("cpu"))
    all_losses = TASK.loss(model, batch, seed).detach()
    small_pieces(monkeypatch, 2)
    sizes = []
    softmax = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, **options: (sizes.append(x.shape[1]), softmax(x, **options))[1])
    with torch.no_grad():
        assert_close(TASK.loss(model, batch, seed), all_losses, 1e-6)
    assert sizes == [1] * batch.inputs.shape[1]
