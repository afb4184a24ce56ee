"""Layers that training changed: by the base, the training run's record, and the parameters of a model in memory that require gradients."""

import json

import pytest
import torch
from helpers import make_model, make_tokenizer, random_texts, write_jsonl
from test_callback import train
from transformers import TrainerCallback
from wherefrom import Client, build
from wherefrom.callback import WherefromCallback
from wherefrom.evaluation.checks import _StepTrainer
from wherefrom.store.errors import IncompatibleError, UsageError

TRAINED = {"transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"}


def save(model, place):
    model.save_pretrained(place)
    make_tokenizer().save_pretrained(place)


@pytest.fixture
def places(tmp_path):
    """A base, and a model of which two layers were trained."""
    model = make_model("gpt2", "float32")
    save(model, tmp_path / "base")
    with torch.no_grad():
        for name in TRAINED:
            model.get_submodule(name).weight.add_(0.01)
    save(model, tmp_path / "model")
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": f"d{i}", "text": t} for i, t in enumerate(random_texts(12, seed=3))])
    return tmp_path


def test_layers_that_equal_the_base_are_neither_counted_nor_tracked(places):
    options = dict(components=("blocks",), rank=4)
    plain = build(places / "model", places / "corpus.jsonl", places / "plain", progress=False, **options).manifest
    compared = build(
        places / "model", places / "corpus.jsonl", places / "compared", base=places / "base", progress=False, **options
    ).manifest
    assert plain.models[0].trained is None
    assert set(compared.models[0].trained) == TRAINED
    assert set(compared.components[0].layer_names) == TRAINED < set(plain.components[0].layer_names)
    biases = sum(make_model("gpt2", "float32").get_submodule(name).bias.numel() for name in TRAINED)
    tracked = compared.build.tracked[0]
    assert tracked.of - tracked.parameters == biases
    assert tracked.of < plain.build.tracked[0].of


def test_a_step_on_an_example_changes_the_trained_layers_only(places):
    index = build(places / "model", places / "corpus.jsonl", places / "i", base=places / "base", components=("head",), progress=False)
    steps = _StepTrainer(Client(index), "sgd", 0.1)
    assert {name.rpartition(".")[0] for name in steps._parameters} == TRAINED


@pytest.mark.parametrize(("trained", "kind"), [((), "frozen head"), (("lm_head", "transformer.wte"), "trained head")])
def test_whether_the_head_was_trained_is_known_from_the_base(places, trained, kind):
    from wherefrom.ray_jobs.schema import known_training

    model = make_model("gpt2", "float32", seed=0)
    with torch.no_grad():
        model.get_submodule("transformer.h.0.mlp.c_fc").weight.add_(0.01)
        for name in trained:
            model.get_submodule(name).weight.add_(0.01)
    save(model, places / "other")
    roles = ("head", "embeddings", "blocks")
    manifest = build(
        places / "other", places / "corpus.jsonl", places / "i", base=places / "base", components=roles, rank=4, progress=False
    ).manifest
    assert known_training(manifest.components, manifest.models[0]) == kind
    guessed = build(places / "other", places / "corpus.jsonl", places / "j", components=roles, rank=4, progress=False).manifest
    assert known_training(guessed.components, guessed.models[0]) == "unknown"
    weights, guessed_weights = ({c.name: c.weight for c in m.components} for m in (manifest, guessed))
    ratio = weights["embeddings"] / guessed_weights["embeddings"]  # of the shares 0.7 and 0.25, where the guess is another
    assert min(abs(ratio - expected) for expected in ((1, 2.8) if kind == "frozen head" else (1, 1 / 2.8))) < 1e-6


def test_a_base_that_is_none_is_refused(places):
    def refused(kind, match, **options):
        with pytest.raises(kind, match=match):
            build(places / "model", places / "corpus.jsonl", places / "i", progress=False, **options)

    refused(IncompatibleError, "are equal: nothing was trained; give the trained model", base=places / "model")
    save(make_model("llama", "float32"), places / "llama")
    refused(
        IncompatibleError,
        "is not the base of .*: only one of them has .*; name the model that training started from",
        base=places / "llama",
    )


def test_an_adapter_needs_no_base(places):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(places / "base"), LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    )
    adapted.save_pretrained(places / "adapter")
    with pytest.raises(UsageError, match="is an adapter, which says what it trained; leave `base` out"):
        build(places / "adapter", places / "corpus.jsonl", places / "i", base=places / "base", progress=False)


def test_the_record_of_a_run_with_frozen_layers_is_read(tmp_path):
    class Freeze(TrainerCallback):
        def on_init_end(self, args, state, control, model, **kwargs):
            model.requires_grad_(False)
            for name in TRAINED:
                model.get_submodule(name).requires_grad_(True)

    out = tmp_path / "run.wherefrom"
    data, _ = train(tmp_path, WherefromCallback(data=(str(tmp_path / "train.jsonl"),), out=str(out)), more_callbacks=[Freeze()])
    assert set(json.loads((tmp_path / "run/wherefrom.json").read_text())["trained"]) == TRAINED
    assert set(Client(out).index.manifest.models[0].trained) == TRAINED
    (tmp_path / "run/wherefrom.json").write_text('{"checkpoints": 3, "trained": ["x"]}')
    with pytest.raises(IncompatibleError, match=r"wherefrom.json is not the record of a training run; restore it, or delete it"):
        build(tmp_path / "run/checkpoint-20", data, tmp_path / "other", progress=False)


def test_a_model_in_memory_says_what_was_trained(places):
    model = make_model("gpt2", "float32").requires_grad_(False)
    for name in TRAINED:
        model.get_submodule(name).requires_grad_(True)
    options = dict(tokenizer=make_tokenizer(), components=("blocks",), rank=4, progress=False)
    assert set(build(model, places / "corpus.jsonl", places / "i", **options).manifest.models[0].trained) == TRAINED
    assert build(model.requires_grad_(True), places / "corpus.jsonl", places / "j", **options).manifest.models[0].trained is None
