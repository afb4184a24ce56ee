"""Adapters (PEFT): an index of one is that of its base with the change added to the weights."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers import assert_close, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from whence import BuildConfig, Client, build
from whence.indexer.models import ModelSource, load_causal_lm
from whence.store.errors import IncompatibleError, NotFoundError, UsageError


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


def test_an_adapters_index_is_that_of_the_merged_model(places, corpus_file, tmp_path):
    rows = []
    for name in ("adapter", "merged", "base"):
        out = tmp_path / name
        build(BuildConfig(model=str(places / name), data=(str(corpus_file),), out=str(out), rank=4))
        client = Client(out)
        (segment,) = client.index.manifest.segments
        rows.append(np.stack([client.index.row(i, segment) for i in range(40)]))
        assert client.query(prompt="w1 w2", completion=" w3").proponents
    assert_close(rows[0], rows[1], 1e-4)
    assert np.abs(rows[0] - rows[2]).max() > 0.05 * np.abs(rows[2]).max()


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
    with pytest.raises(IncompatibleError, match="which model"):
        load_causal_lm(ModelSource(str(adapter(base_model_name_or_path=None))))
    pickled = adapter()
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(IncompatibleError, match="safetensors"):
        load_causal_lm(ModelSource(str(pickled)))
    broken = adapter()
    (broken / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(IncompatibleError, match="cannot be merged"):
        load_causal_lm(ModelSource(str(broken)))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="pip install peft"):
        load_causal_lm(ModelSource(str(adapter())))
