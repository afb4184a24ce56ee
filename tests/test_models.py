"""The measured model is the one that was trained: what checkpoints hold besides it, batches that change a row, what is not measured."""

import json
import os

import numpy as np
import pytest
import torch
from helpers import CONFIGS, assert_close, make_model, make_tokenizer, random_texts, write_jsonl
from safetensors.torch import load_file, save_file
from wherefrom import BuildConfig, Client
from wherefrom.indexer.models import ModelSource, configure_memory, context_length, first_sentence, load_causal_lm, load_tokenizer, loaded
from wherefrom.indexer.tasks import CausalLM
from wherefrom.ray_jobs.build import build
from wherefrom.store.errors import IncompatibleError, NotFoundError


def saved(path, architecture="gpt2", change=None):
    make_model(architecture, "float32").save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    if change:
        weights = load_file(path / "model.safetensors")
        save_file(change(weights), path / "model.safetensors", {"format": "pt"})
    return str(path)


def test_tensors_that_the_model_does_not_use_are_named_and_missing_ones_refused(tmp_path, corpus_file):
    more = {"v_head.summary.weight": torch.zeros(1, 16), "transformer.h.0.attn.odd": torch.zeros(2), "mtp.layers.0.weight": torch.zeros(2)}
    place = saved(tmp_path / "more", change=lambda w: {**w, **more})
    (note,) = loaded(load_causal_lm(ModelSource(place))).notes
    assert "has 3 tensors that the model does not use: mtp.layers.0.weight, transformer.h.0.attn.odd, v_head.summary.weight" in note
    with pytest.warns(UserWarning, match="has 3 tensors"):
        build(BuildConfig(model=place, data=(str(corpus_file),), out=str(tmp_path / "i"), rank=2))
    assert Client(tmp_path / "i").index.summary()["notes"][0] == note
    name = "transformer.h.0.mlp.c_fc.weight"
    with pytest.raises(IncompatibleError, match=f"{name} is missing"):
        load_causal_lm(ModelSource(saved(tmp_path / "less", change=lambda w: {k: v for k, v in w.items() if k != name})))
    with pytest.raises(IncompatibleError, match=f"{name} has another shape"):
        load_causal_lm(ModelSource(saved(tmp_path / "other", change=lambda w: {**w, name: torch.zeros(3, 3)})))
    with pytest.raises(IncompatibleError, match="compiled"):
        load_causal_lm(ModelSource(saved(tmp_path / "compiled", change=lambda w: {f"_orig_mod.{k}": v for k, v in w.items()})))


def longrope(tmp_path, original=8):
    """A Phi-3 whose positions are encoded another way in batches that are longer than 8 tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    rope = {"rope_type": "longrope", "long_factor": [3.0, 5.0, 8.0, 9.0], "short_factor": [1.0, 1.0, 1.0, 1.0]}
    config = AutoConfig.for_model(
        "phi3",
        vocab_size=62,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        max_position_embeddings=64,
        original_max_position_embeddings=original,
        rope_parameters={**rope, "rope_theta": 100.0, "original_max_position_embeddings": original, "factor": 8.0},
        **sizes,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    model.save_pretrained(tmp_path / "phi")
    make_tokenizer().save_pretrained(tmp_path / "phi")
    return tmp_path / "phi"


def test_rows_of_a_model_that_computes_long_batches_otherwise_are_those_of_each_text_alone(tmp_path):
    place = longrope(tmp_path)
    model = load_causal_lm(ModelSource(str(place)))
    task = CausalLM()
    assert list(task.splits(model, 40)) == [8]
    assert list(task.splits(model, 8)) == []
    texts = random_texts(12, seed=1, shortest=3, longest=6) + random_texts(12, seed=2, shortest=20, longest=40)
    path = write_jsonl(tmp_path / "d.jsonl", [{"id": f"d{i}", "text": t} for i, t in enumerate(texts)])
    build(BuildConfig(model=str(place), data=(str(path),), out=str(tmp_path / "i"), rank=10**6, curvature="identity"))
    client = Client(tmp_path / "i")
    (component,) = client.index.manifest.components
    weights = [model.get_submodule(layer.name).weight.requires_grad_(True) for layer in component.layers]
    for row in range(24):
        ids = torch.tensor(client.index.example(row).token_ids[None]).long()
        losses = torch.nn.functional.cross_entropy(model(input_ids=ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum")
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(losses, weights)]).numpy()
        assert_close(client.index.vectors(row, component).values[0], expected, 1e-4)


def test_most_models_may_share_batches():
    for architecture in CONFIGS:
        assert list(CausalLM().splits(make_model(architecture), 60)) == [], architecture


class Averages(torch.nn.Module):
    """A model that is as causal as it should be, but for a number that the whole batch shares."""

    def __init__(self, change=0.01):
        super().__init__()
        self.inner = make_model("gpt2")
        self.change = change

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, use_cache=False):
        actual = self.inner(input_ids=input_ids)
        actual.logits = actual.logits * (1 + self.change * input_ids.shape[1])
        return actual


def test_a_model_that_sees_the_padding_gets_batches_of_one_length():
    for dtype, change in ((torch.float32, 1e-4), (torch.bfloat16, 0.01)):
        groups = CausalLM().group((Averages(change).to(dtype),), [5, 3, 5, 3, 9], 10**6)
        assert sorted(map(sorted, groups)) == [[0, 2], [1, 3], [4]]


def test_the_configuration_of_memory_leaves_the_environment_of_others_alone(monkeypatch):
    """Kernels of 32 shapes are kept, so that a gigabyte of them does not pile up where texts have many lengths."""
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    configure_memory()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "32"


def test_a_model_of_which_little_is_measured_says_so_everywhere(tmp_path, corpus_file):
    from click.testing import CliRunner
    from transformers import AutoConfig, AutoModelForCausalLM
    from wherefrom.cli import main

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    experts = dict(num_local_experts=4, num_experts_per_tok=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", vocab_size=62, max_position_embeddings=64, **sizes, **experts))
    model.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    done = CliRunner().invoke(
        main, ["build", "--model", str(tmp_path / "m"), "--data", str(corpus_file), "--out", str(tmp_path / "i"), "--layers", "self_attn.*"]
    )
    assert done.exit_code == 0, done.output
    assert "Note: the rows measure" in done.stderr
    assert "they do not measure model.layers.*.mlp.experts.linears.*.gate_up_proj" in done.stderr
    client = Client(tmp_path / "i")
    (tracked,) = client.index.manifest.build.tracked
    parameter_count = sum(p.numel() for p in model.parameters())
    measured = sum(layer.outputs * layer.inputs for layer in client.index.manifest.components[0].layers)
    assert (tracked.parameters, tracked.of) == (measured, parameter_count)
    assert tracked.share < 0.5
    answer = client.query(row=1, k=1)
    assert answer.index["measured"] == [round(tracked.share, 4)]
    assert f"the rows measure {tracked.share:.1%}" in CliRunner().invoke(main, ["query", str(tmp_path / "i"), "--row", "1"]).stdout
    assert "experts.linears.*.gate_up_proj" in CliRunner().invoke(main, ["info", str(tmp_path / "i")]).stdout


def test_a_component_without_gradients_is_zeros_and_said(tmp_path, corpus_file):
    """A head of zeros sends nothing back to the embeddings and the blocks."""

    def zero_head(weights):
        return {**weights, "lm_head.weight": torch.zeros_like(weights["lm_head.weight"])}

    for name, change in {"zeros": zero_head, "tiny": lambda w: {**w, "lm_head.weight": w["lm_head.weight"] * 1e-30}}.items():
        place = saved(tmp_path / name, "llama", change)
        options = dict(components=("head", "embeddings", "blocks"), rank=2, out=str(tmp_path / f"{name}.wherefrom"))
        with pytest.warns(UserWarning, match="the gradients of embeddings are zero .or too small for float32. for every example"):
            build(BuildConfig(model=place, data=(str(corpus_file),), **options))
        client = Client(tmp_path / f"{name}.wherefrom")
        assert not client.index.norms(client.index.component("embeddings")).any()
        answer = client.query(text="w1 w2 w3", k=3)
        assert all(np.isfinite(a.score) for a in answer.proponents)


def test_weights_of_zeros_are_said_to_be_that(tmp_path, corpus_file):
    for name, factor in (("zeros", 0.0), ("tiny", 1e-30)):
        place = saved(tmp_path / name, change=lambda w, factor=factor: {k: v * factor for k, v in w.items()})
        with pytest.raises(IncompatibleError, match=r"the weights of .* are all zero \(or below 1e-20\)"):
            build(BuildConfig(model=place, data=(str(corpus_file),), out=str(tmp_path / "i")))
        assert not (tmp_path / "i").exists()


def test_the_context_of_roberta_leaves_out_the_positions_of_padding(tmp_path):
    from transformers import RobertaConfig, RobertaForCausalLM

    sizes = dict(vocab_size=62, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = RobertaForCausalLM(RobertaConfig(**sizes, max_position_embeddings=20, pad_token_id=1, is_decoder=True)).eval()
    assert context_length(model) == 18
    with torch.no_grad():
        model(input_ids=torch.full((1, 18), 5))


def test_a_model_without_a_cache_option_is_read(tmp_path):
    from wherefrom.indexer.models import logits_of

    class Plain(torch.nn.Module):
        def forward(self, input_ids):
            return type("Output", (), {"logits": input_ids})

    assert logits_of(Plain(), torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (lambda p: (p / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS"),
        (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:5000]), r"\(cut off\?\)"),
        (lambda p: (p / "model.safetensors").unlink(), "there are no weights at"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "are not safetensors"),
        (
            lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
            "model-1.safetensors is missing",
        ),
        (lambda p: (p / "model.safetensors.index.json").write_text("[]"), "is not the list of the weights' files"),
    ],
)
def test_weights_that_are_no_weights_are_said_in_a_sentence_of_our_own(tmp_path, what, sentence):
    place = saved(tmp_path / "m")
    what(tmp_path / "m")
    with pytest.raises((IncompatibleError, NotFoundError), match=sentence):
        load_causal_lm(ModelSource(place))


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("config.json", {"n_layer": 10**9}, "has 1,000,000,000 layers"),
        ("config.json", {"vocab_size": 10**12}, "takes more memory than there is"),
        ("config.json", {"activation_function": "nonsense"}, "'nonsense' is not known, or missing in config.json"),
        ("config.json", {"n_head": 0}, "a value in config.json is missing or invalid"),
        ("config.json", {"n_embd": "16"}, "the configuration of"),
        ("config.json", {"model_type": "zzz"}, "the configuration of .* does not recognize this architecture"),
        ("config.json", [], "the configuration of"),
        ("config.json", "{", "the configuration of .* not a valid JSON file"),
        ("tokenizer.json", {}, "the tokenizer of"),
        ("tokenizer.json", "{", "the tokenizer of .* tokenizer.json or tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", [], "the tokenizer of"),
    ],
)
def test_settings_that_cannot_be_are_said_of_the_file_that_holds_them(tmp_path, corpus_file, file, change, sentence):
    place = tmp_path / "m"
    saved(place)
    if isinstance(change, dict) and change:
        change = json.loads((place / file).read_text()) | change
    (place / file).write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(IncompatibleError, match=sentence):
        build(BuildConfig(model=str(place), data=(str(corpus_file),), out=str(tmp_path / "i"), rank=2))
    assert not (tmp_path / "i").exists()


def test_a_model_that_is_set_to_return_tuples_is_read(tmp_path, corpus_file):
    place = tmp_path / "m"
    saved(place)
    rows = []
    for change in ({}, {"return_dict": False, "output_hidden_states": True, "output_attentions": True}):
        config = json.loads((place / "config.json").read_text()) | change
        (place / "config.json").write_text(json.dumps(config))
        out = tmp_path / f"i{len(rows)}"
        build(BuildConfig(model=str(place), data=(str(corpus_file),), out=str(out), rank=2, components=("blocks",)))
        index = Client(out).index
        rows.append(np.concatenate([index.vectors(row, index.manifest.components[0]).values for row in range(len(index))]))
    assert_close(rows[1], rows[0], 1e-5)


def test_pipes_in_the_place_of_a_models_files_end_in_a_sentence(tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        place = tmp_path / name
        saved(place)
        (place / name).unlink()
        os.mkfifo(place / name)
        load = load_tokenizer if name == "tokenizer.json" else load_causal_lm
        with pytest.raises((IncompatibleError, NotFoundError)):
            load(ModelSource(str(place)))


def test_weights_of_whole_numbers_are_refused(tmp_path):
    name = "transformer.h.0.mlp.c_fc.weight"
    place = saved(tmp_path / "m", change=lambda w: {**w, name: (w[name] * 100).to(torch.int8)})
    with pytest.raises(IncompatibleError, match=f"has integers in {name}"):
        load_causal_lm(ModelSource(place))


def test_other_libraries_sentences_are_never_cut_in_their_middle():
    assert first_sentence(ValueError("One thing.\nAnother thing is this.")) == "One thing"
    long = first_sentence(ValueError("word " * 200))
    assert long.endswith("word ...")
    assert len(long) <= 250
    assert first_sentence(KeyError()) == "KeyError"
