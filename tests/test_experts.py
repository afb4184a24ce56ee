"""Mixtures of experts: the rows of fused experts and routers against autograd of the models as `transformers` has them."""

import copy

import numpy as np
import pytest
import torch
from helpers import assert_close, make_tokenizer
from wherefrom import Client, Query, build
from wherefrom.indexer.experts import is_fused, unfuse
from wherefrom.indexer.tasks import CausalLM

_SIZES = dict(vocab_size=62, max_position_embeddings=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
_SPECIAL = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
_KINDS = {
    "mixtral": dict(num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8),
    "gpt_oss": dict(num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "deepseek_v3": dict(
        **dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=12, first_k_dense_replace=1),
        **dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=2),
    ),
}


def make(kind, dtype=torch.float64):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(_SIZES | _SPECIAL | _KINDS[kind]))).to(dtype).eval()
    model.set_experts_implementation("eager")  # the default knows no float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # experts begin as zeros or unset memory in some of them
            if parameter.dim() > 1 or "bias" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


def fused_gradients(model, example):
    """By name, the gradients of all parameters, from autograd of one example."""
    batch = CausalLM().collate([example], torch.device("cpu"))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        logits = model(input_ids=batch.inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0], batch.targets[0], ignore_index=-100, reduction="sum")
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return {name: g for (name, _), g in zip(model.named_parameters(), gradients, strict=True)}


def matrix_of(gradients, layer, transposed):
    """The gradient of a tracked layer's matrix, from those of the fused parameters."""
    if ".linears." in layer:
        experts, _, rest = layer.partition(".linears.")
        number, parameter = rest.split(".")
        gradient = gradients[f"{experts}.{parameter}"][int(number)]
        return gradient.T if transposed else gradient
    return gradients[f"{layer.removesuffix('.linear')}.weight"]


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_rows_of_experts_and_routers_equal_autograd(kind, tmp_path, corpus_file):
    model = make(kind)
    expected_model = copy.deepcopy(model)
    index = build(
        model, corpus_file, tmp_path / "i", tokenizer=make_tokenizer(), dtype="float64", rank=1000, curvature="identity", batch_tokens=40
    )
    component = index.component("blocks")
    names = set(component.layer_names)
    routers = {n for n in names if n.endswith(".linear")}
    layers = 2 - (kind == "deepseek_v3")
    assert (len({n for n in names if ".linears." in n}), len(routers)) == (layers * 4 * 2, layers)
    for row in range(6):
        gradients = fused_gradients(expected_model, index.example(row))
        values = index.vectors(row, component).values[0]
        for layer in component.layers:
            expected = matrix_of(gradients, layer.name, kind == "gpt_oss").numpy()
            actual = values[layer.offset : layer.offset + layer.size].reshape(expected.shape)
            assert_close(actual, expected, 1e-5, scale=max(np.abs(expected).max(), 1e-6))


def test_experts_share_the_memory_of_the_model_and_can_be_turned_back():
    model = make("mixtral")
    names = [name for name, _ in model.named_parameters()]
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        restore = unfuse(model)
        assert not is_fused(model)
        pointer = model.model.layers[0].mlp.experts.linears[1]["down_proj"].weight.data_ptr()
        assert_close(model(input_ids=tokens).logits.numpy(), before.numpy(), 1e-12)
        restore()
        assert pointer == model.model.layers[0].mlp.experts.down_proj[1].data_ptr()
        assert torch.equal(model(input_ids=tokens).logits, before)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "fisher"])
def test_experts_are_whitened_and_asked(curvature, tmp_path, corpus_file):
    make("mixtral", torch.float32).save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    index = build(tmp_path / "m", corpus_file, tmp_path / "i", rank=3, curvature=curvature, projection="pca")
    client = Client(tmp_path / "i")
    assert index.manifest.build.tracked[0].share > 0.5
    scores = client.scores([Query(text=index.example(row).text) for row in range(4)], mode="cosine")
    assert (scores.argmax(1) == np.arange(4)).all()


def test_experts_alone_are_tracked_if_they_alone_were_trained(corpus_file, tmp_path):
    model = make("mixtral", torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts.down_proj" in name)
    index = build(model, corpus_file, tmp_path / "i", tokenizer=make_tokenizer(), rank=2)
    assert all(".experts.linears." in name for name in index.component("blocks").layer_names)
    assert index.manifest.models[0].trained


def test_an_expert_to_which_nothing_is_routed_has_rows_of_zeros(tmp_path, corpus_file):
    model = make("mixtral", torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # the same two experts get all tokens
    for curvature in ("kfac", "ekfac"):
        index = build(model, corpus_file, tmp_path / curvature, tokenizer=make_tokenizer(), rank=2, curvature=curvature)
        rows = np.stack([index.vectors(row, index.component("blocks")).values[0] for row in range(6)])
        assert np.isfinite(rows).all()
        experts = [layer for layer in index.component("blocks").layers if ".linears." in layer.name]
        is_used = [bool(rows[:, layer.offset : layer.offset + layer.size].any()) for layer in experts]
        assert (len(experts), sum(is_used)) == (16, 8)
