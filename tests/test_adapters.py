"""Adapters (PEFT): an index of one is that of its base with the change added to the weights."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from helpers import assert_close, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from wherefrom import BuildConfig, Client
from wherefrom.indexer.models import ModelSource, load_causal_lm, loaded, model_fingerprint
from wherefrom.ray_jobs.add import add
from wherefrom.ray_jobs.build import build
from wherefrom.store.errors import IncompatibleError, NotFoundError, UsageError


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base model, an adapter of it, and the two merged by hand."""
    here = tmp_path_factory.mktemp("adapters")
    base = make_model("llama", "float32")
    base.save_pretrained(here / "base")
    make_tokenizer().save_pretrained(here / "base")
    weights = {name: parameter.clone() for name, parameter in base.named_parameters()}
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"], base_model_name_or_path=str(here / "base"))
    adapted = get_peft_model(base, config)
    changes = {}
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            with torch.no_grad():
                b.normal_(0, 0.2)
            changes[name.removeprefix("base_model.model.") + ".weight"] = 4.0 * (b @ a).detach()
    adapted.peft_config["default"].base_model_name_or_path = str(here / "base")
    adapted.save_pretrained(here / "adapter")
    merged = make_model("llama", "float32")
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(weights[name] + changes.get(name, 0))
    assert len(changes) == 4
    merged.save_pretrained(here / "merged")
    make_tokenizer().save_pretrained(here / "merged")
    return here


def test_an_adapters_rows_are_the_gradients_of_its_matrices(places, corpus_file, tmp_path):
    from peft import PeftModel

    out = tmp_path / "i"
    build(BuildConfig(model=str(places / "adapter"), data=(str(corpus_file),), out=str(out), rank=64, curvature="identity"))
    client = Client(out)
    assert client.query(prompt="w1 w2", completion=" w3").proponents
    (component,) = client.index.manifest.components
    adapted = PeftModel.from_pretrained(load_causal_lm(ModelSource(str(places / "base"))), str(places / "adapter"))
    assert {layer.name.split(".")[-2] for layer in component.layers} == {"lora_A", "lora_B"}
    assert len(component.layers) == 8
    parameters = [dict(adapted.named_parameters())[f"base_model.model.{layer.name}.weight"].requires_grad_() for layer in component.layers]
    for row in (0, 5, 119):
        tokens = torch.tensor(client.index.example(row).token_ids[None].astype(np.int64))
        loss = torch.nn.functional.cross_entropy(adapted(input_ids=tokens[:, :-1]).logits[0], tokens[0, 1:], reduction="sum")
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).numpy()
        assert_close(client.index.vectors(row, component).values[0], expected, 1e-4)


def test_what_is_wrong_with_an_adapter_is_said(places, tmp_path, monkeypatch):
    def adapter(**changes):
        place = tmp_path / f"a{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        for path in (places / "adapter").iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        config = json.loads((place / "adapter_config.json").read_text()) | changes
        (place / "adapter_config.json").write_text(json.dumps(config))
        return place

    with pytest.raises(NotFoundError, match="no model"):
        load_causal_lm(ModelSource(str(adapter(base_model_name_or_path=str(tmp_path / "nothing")))))
    with pytest.raises(IncompatibleError, match="base model"):
        load_causal_lm(ModelSource(str(adapter(base_model_name_or_path=None))))
    pickled = adapter()
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(IncompatibleError, match="safetensors"):
        load_causal_lm(ModelSource(str(pickled)))
    broken = adapter()
    (broken / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(IncompatibleError, match="not a complete safetensors file"):
        load_causal_lm(ModelSource(str(broken)))
    for changes, sentence in (
        ({"peft_type": "NOTHING"}, "a kind that PEFT does not know"),
        ({"peft_type": "PROMPT_TUNING"}, "does not change the model's weights"),
        ({"r": "4"}, "a value in adapter_config.json"),
        ({"r": 7}, "its weights do not have the shapes in adapter_config.json"),
        ({"lora_alpha": "x"}, "a value in adapter_config.json"),
    ):
        with pytest.raises(IncompatibleError, match=sentence):
            load_causal_lm(ModelSource(str(adapter(**changes))))
    (note,) = loaded(load_causal_lm(ModelSource(str(adapter(lora_alpha=0))))).notes
    assert "does not change its base's predictions" in note
    assert not loaded(load_causal_lm(ModelSource(str(adapter())))).notes
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=re.escape("an adapter needs the extra adapters: pip install 'wherefrom[adapters]'")):
        load_causal_lm(ModelSource(str(adapter())))


PROBE = torch.tensor([[5, 17, 29, 41, 53, 60, 61, 1]])


def adapted_logits(base, out, resize=None, perturb=(), **lora):
    """Save an adapter of a base model, and return what the adapted, unmerged model says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    torch.manual_seed(2)
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **lora)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and any(part in name for part in perturb):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    with torch.no_grad():
        return adapted(input_ids=PROBE).logits


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM

    place = tmp_path_factory.mktemp("tied") / "base"
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    common = dict(vocab_size=62, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **common))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return place


ADAPTERS = {
    "attention": dict(target_modules=["q_proj", "v_proj"]),
    "the tied head": dict(target_modules=["q_proj", "lm_head"]),
    "the tied embeddings": dict(target_modules=["q_proj", "embed_tokens"]),
    "both": dict(target_modules=["lm_head", "embed_tokens"]),
    "saved modules": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], perturb=("modules_to_save",)),
    "saved embeddings": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], perturb=("modules_to_save",)),
    "DoRA": dict(target_modules=["q_proj", "down_proj"], use_dora=True),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[61], perturb=("trainable_tokens",)),
    "a larger vocabulary": dict(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], resize=70, perturb=("modules_to_save",)
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merged_adapter_says_what_the_adapted_model_says(tied, tmp_path, kind):
    expected = adapted_logits(tied, tmp_path / "adapter", **ADAPTERS[kind])
    model = load_causal_lm(ModelSource(str(tmp_path / "adapter")))
    with torch.no_grad():
        logits = model(input_ids=PROBE).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5
    with torch.no_grad():
        plain = load_causal_lm(ModelSource(str(tied)))(input_ids=PROBE).logits
    assert float((plain - expected[..., :62]).abs().max() / expected.abs().max()) > 1e-2
    trained = {name.split(".lora_")[0].rpartition(".")[2] for name in loaded(model).trained}
    assert any(".lora_" in name for name in loaded(model).trained) == (kind not in {"both", "DoRA"})  # these are merged
    wanted = {*ADAPTERS[kind]["target_modules"], *ADAPTERS[kind].get("modules_to_save", ())}
    assert wanted <= trained <= wanted | {"embed_tokens", "lm_head"}


def test_matrices_stay_beside_layers_that_were_trained_as_a_whole(tied, corpus_file, tmp_path):
    from wherefrom.ray_jobs.schema import known_training

    adapted_logits(tied, tmp_path / "adapter", **ADAPTERS["saved modules"])
    components = ("head", "embeddings", "blocks")
    manifest = build(BuildConfig(model=str(tmp_path / "adapter"), data=str(corpus_file), out=str(tmp_path / "i"), components=components))
    head, embeddings, blocks = manifest.components
    assert all(".lora_" in name for name in blocks.layer_names)
    assert set(manifest.models[0].trained) == {*head.layer_names, *embeddings.layer_names, *blocks.layer_names}
    assert manifest.build.tracked[0].share == 1.0
    assert known_training(manifest.components, manifest.models[0]) == "trained head"


def test_a_merge_that_changes_the_predictions_is_refused(tied, tmp_path, monkeypatch):
    import wherefrom.indexer.models as module

    adapted_logits(tied, tmp_path / "adapter", **ADAPTERS["the tied head"])
    monkeypatch.setattr(module, "_untie", lambda adapted: None)
    with pytest.raises(IncompatibleError, match="the merged model's predictions are not those of the adapted one"):
        load_causal_lm(ModelSource(str(tmp_path / "adapter")))


def test_a_merged_model_with_its_adapters_files_beside_it_is_taken_as_it_is(places, tmp_path):
    import shutil

    both = tmp_path / "both"
    shutil.copytree(places / "merged", both)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(places / "adapter" / name, both / name)
    assert model_fingerprint(load_causal_lm(ModelSource(str(both)))) == model_fingerprint(
        load_causal_lm(ModelSource(str(places / "merged")))
    )
    beside = tmp_path / "beside"
    shutil.copytree(places / "adapter", beside)
    shutil.copy(places / "base/config.json", beside / "config.json")
    again = load_causal_lm(ModelSource(str(beside)))
    assert model_fingerprint(again) == model_fingerprint(load_causal_lm(ModelSource(str(places / "adapter"))))


def test_adapter_layers_inside_of_a_whole_model_are_refused(places, tmp_path):
    import shutil

    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(places / "base"), str(places / "adapter"))
    inside = {name.removeprefix("base_model.model."): tensor.clone().contiguous() for name, tensor in adapted.state_dict().items()}
    shutil.copytree(places / "base", tmp_path / "inside")
    save_file(inside, tmp_path / "inside/model.safetensors", {"format": "pt"})
    with pytest.raises(IncompatibleError, match="adapter layers that are not merged"):
        load_causal_lm(ModelSource(str(tmp_path / "inside")))


def test_an_adapters_base_is_found_from_another_folder(places, corpus_file, tmp_path, monkeypatch):
    import shutil

    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(places / "base", tmp_path / "base")
    shutil.copytree(places / "adapter", tmp_path / "run")
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    (tmp_path / "run/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))
    monkeypatch.chdir(tmp_path)
    build(BuildConfig(model="run", data=(str(corpus_file),), out="i", rank=2))
    assert Client("i").index.manifest.models[0].base == str(tmp_path / "base")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Client("../i").query(text="w1 w2 w3", k=1).proponents
    more = tmp_path / "more.jsonl"
    more.write_text('{"id": "new", "text": "w1 w2", "year": 1}\n')
    assert add(tmp_path / "i", [str(more)]).rows == 121


def test_how_much_of_what_an_adapter_trained_is_measured_is_said(places, corpus_file, tmp_path):
    with pytest.warns(UserWarning, match=r"the rows measure 0.0% of the parameters that training changed; .* do not measure model.layers"):
        manifest = build(BuildConfig(model=str(places / "adapter"), data=str(corpus_file), out=str(tmp_path / "i"), components=("head",)))
    (tracked,) = manifest.build.tracked
    assert (tracked.parameters, tracked.of) == (0, 2 * 3 * (16 + 16 + 24 + 16))
    manifest = build(BuildConfig(model=str(places / "adapter"), data=(str(corpus_file),), out=str(tmp_path / "j"), rank=2))
    assert manifest.build.tracked[0].share == 1.0
    manifest = build(BuildConfig(model=str(places / "adapter"), data=(str(corpus_file),), out=str(tmp_path / "k"), bytes_per_example=2400))
    assert {component.name for component in manifest.components} == {"head", "embeddings", "blocks"}
    assert all(".lora_A." in name for name in manifest.components[2].layer_names)  # those with more inputs than outputs
    with pytest.warns(UserWarning, match="do not measure"):
        manifest = build(BuildConfig(model=str(places / "adapter"), data=str(corpus_file), out=str(tmp_path / "l"), bytes_per_example=400))
    assert [component.name for component in manifest.components] == ["head"]


def test_the_blocks_of_a_large_models_adapter_are_all_of_its_matrices(places, corpus_file, tmp_path, monkeypatch):
    manifest = build(BuildConfig(model=str(places / "adapter"), data=(str(corpus_file),), out=str(tmp_path / "a"), bytes_per_example=2400))
    monkeypatch.setattr("wherefrom.ray_jobs.schema.LARGE", 1)
    large = build(BuildConfig(model=str(places / "adapter"), data=(str(corpus_file),), out=str(tmp_path / "b"), bytes_per_example=2400))
    layers = [next(c for c in m.components if c.role == "blocks") for m in (manifest, large)]
    assert {name.split(".")[-2] for name in layers[0].layer_names} == {"lora_A"}
    assert {name.split(".")[-2] for name in layers[1].layer_names} == {"lora_A", "lora_B"}
    assert [component.curvature.damping for component in layers] == [1.0, 0.1]


def test_an_adapter_of_an_adapter_is_found_again(places, corpus_file, tmp_path):
    adapted_logits(places / "base", tmp_path / "second", target_modules=["v_proj"])
    config = json.loads((tmp_path / "second/adapter_config.json").read_text())
    (tmp_path / "second/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(places / "adapter")}))
    build(BuildConfig(model=str(tmp_path / "second"), data=(str(corpus_file),), out=str(tmp_path / "i"), rank=2))
    assert Client(tmp_path / "i").query(text="w1 w2 w3", k=1).proponents


def test_weights_that_the_adapters_configuration_does_not_name_are_refused(places, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(places / "adapter", tmp_path / "more")
    weights = load_file(tmp_path / "more/adapter_model.safetensors")
    name = next(n for n in weights if "q_proj" in n)
    save_file({**weights, name.replace("q_proj", "v_proj"): weights[name].clone()}, tmp_path / "more/adapter_model.safetensors")
    with pytest.raises(IncompatibleError, match=r"does not describe .*v_proj"):
        load_causal_lm(ModelSource(str(tmp_path / "more")))
