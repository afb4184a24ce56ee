"""Models spread over several devices: the same rows, queries and explanations as on one, and nothing that meets across devices."""

import re
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from devices import FIRST, SECOND, Devices
from helpers import assert_close, make_model, make_tokenizer
from wherefrom import BuildConfig, Client, Query
from wherefrom.cli import main
from wherefrom.indexer.devices import SPREAD
from wherefrom.indexer.models import ModelSource, load_causal_lm, refuse_offloaded
from wherefrom.indexer.tasks import CausalLM
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.executor import Resources, gpus_of_each
from wherefrom.store.errors import UsageError

ROWS = {
    "whole": {"components": ("head", "embeddings", "blocks"), "rank": 4, "curvature": "ekfac", "head_extra_tokens": 2, "labels": "sampled"},
    "dense Fisher": {"components": ("blocks",), "rank": 3, "curvature": "fisher", "projection": "pca", "hidden": True},
    "by bytes": {"bytes_per_example": 900},
}
ASKED = {"text": "w1 w2 w3 w4"}, {"prompt": "w5 w6", "completion": " w7 w8"}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def place(request, tmp_path_factory):
    """A saved model; qwen3's head and embeddings are one weight."""
    directory = tmp_path_factory.mktemp("spread")
    model = make_model(request.param, "float32")
    if request.param == "qwen3":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def indexed(place, corpus_file, out, rows, **options):
    """An index of the first documents: its rows, and answers with their explanation."""
    config = BuildConfig(model=str(place), data=(str(corpus_file),), out=str(out), dtype="float64", shard_rows=50, **ROWS[rows], **options)
    build(config)
    client = Client(out, task=options.get("task"))
    dense = [s for s in client.index.manifest.components if s.kind == "dense"]
    stored = [np.concatenate([client.index.vectors(i, s).values for i in range(0, 120, 7)]) for s in dense]
    answers = [client.query(k=5, rerank=0, **fields) for fields in ASKED]
    scores = np.concatenate([[a.score for a in (*answer.proponents, *answer.opponents)] for answer in answers])
    (explained,) = client.explain([answers[0].proponents[0].row], Query(**ASKED[0]))
    shares = np.concatenate([explained.example.scores, explained.query.scores])
    return client, stored, scores, shares


@pytest.mark.parametrize("rows", ROWS)
def test_an_index_of_a_spread_model_is_that_of_the_model(place, corpus_file, tmp_path, rows):
    plain, stored, scores, shares = indexed(place, corpus_file, tmp_path / "plain", rows)
    with Devices():
        spread, same, other_answers, parts = indexed(place, corpus_file, tmp_path / "spread", rows, task="devices:Spread")
        assert {p.device for p in spread.encoder.model.parameters()} == {FIRST, SECOND}
    assert spread.index.manifest.models[0].fingerprint == plain.index.manifest.models[0].fingerprint
    for a, b in zip(stored, same, strict=True):
        assert_close(b, a, 1e-5)
    assert_close(scores, other_answers, 1e-4)
    assert_close(parts, shares, 1e-4)


@pytest.mark.parametrize("spread", [False, True])
def test_on_accelerators_a_batch_is_copied_while_the_next_is_computed(place, corpus_file, tmp_path, spread, monkeypatch):
    task = "devices:Spread" if spread else "causal-lm"
    with Devices() if spread else nullcontext():
        build(BuildConfig(model=str(place), data=(str(corpus_file),), out=str(tmp_path), dtype="float64", bytes_per_example=900, task=task))
        client = Client(tmp_path, task=task)
        encoder = replace(client.encoder, settings=replace(client.encoder.settings, batch_tokens=64))
        computed = []
        differentiate = type(encoder.task).differentiate
        monkeypatch.setattr(type(encoder.task), "differentiate", lambda *args: computed.append(1) or differentiate(*args))
        examples = [client.index.example(i) for i in range(12)]
        done = [len(computed) for _ in encoder.batches(examples)]
    batches = len(done)
    assert batches > 2
    assert done == ([*range(2, batches + 1), batches] if spread else [*range(1, batches + 1)])


def test_the_two_devices_do_not_mix():
    with Devices():
        a, b = torch.ones(3).to(FIRST), torch.ones(3).to(SECOND)
        with pytest.raises(RuntimeError, match="lazy:0 and lazy:1"):
            a + b
        both = a + b.to(FIRST)
        assert both.device == FIRST
        assert float(both.sum()) == 6


def test_without_gpus_a_map_is_the_cpu(place, corpus_file, tmp_path):
    files = []
    for device in ("map", "cpu"):
        out = tmp_path / device
        options = ["--model", str(place), "--data", str(corpus_file), "--out", str(out), "-o", "rank=3", "--device", device]
        result = CliRunner().invoke(main, ["build", *options])
        assert result.exit_code == 0, result.output
        files.append([shard.sha256 for shard in Client(out).index.shards])
    assert files[0] == files[1] or torch.cuda.is_available()
    answers = [Client(tmp_path / "cpu", device=device).query(text="w1 w2 w3").proponents[0] for device in ("map", "cpu")]
    assert answers[0].id == answers[1].id
    assert_close(answers[0].score, answers[1].score, 1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_rows_of_one(place, corpus_file, tmp_path):
    rows = []
    for device in ("map", "cuda:0"):
        build(BuildConfig(model=str(place), data=(str(corpus_file),), out=str(tmp_path / device), rank=4, device=device))
        client = Client(tmp_path / device, device=device)
        rows.append(np.concatenate([client.index.vectors(i, client.index.manifest.components[0]).values for i in range(120)]))
        if device == SPREAD:
            assert len({p.device for p in client.encoder.model.parameters()}) == 2
    assert_close(rows[0], rows[1], 1e-4)


def test_the_loader_spreads_and_looks_for_what_found_no_room(place, monkeypatch):
    from transformers import AutoModelForCausalLM

    def loaded(*arguments, **options):
        device_maps.append(options.get("device_map"))
        model = make_model("llama", "float32")
        model.hf_device_map = {"model": 0, "lm_head": "cpu"}
        return model, {}

    device_maps = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    with pytest.raises(UsageError, match="lm_head is offloaded to the cpu"):
        load_causal_lm(ModelSource(str(place), device="map"))
    assert device_maps == ["auto"]
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UsageError, match=re.escape("device map needs the extra training: pip install 'wherefrom[training]'")):
        load_causal_lm(ModelSource(str(place), device="map"))


def test_a_build_says_what_a_spread_model_costs(place, corpus_file, tmp_path, monkeypatch):
    def spread(task, source):
        model = load(task, source)
        model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}
        return model

    load = CausalLM.load
    monkeypatch.setattr(CausalLM, "load", spread)
    with pytest.warns(UserWarning, match="on 2 GPUs and run one after the other, no faster than on one GPU; use `device` tp"):
        build(BuildConfig(model=str(place), data=(str(corpus_file),), out=str(tmp_path / "i"), rank=2))
    assert not [note for note in Client(tmp_path / "i").index.manifest.build.notes if "GPUs" in note]


def test_layers_without_maps_see_both_sides_on_their_own_device(place, corpus_file, tmp_path):
    rows = {}
    for task in ("causal-lm", "devices:Spread"):
        with Devices():
            build(
                BuildConfig(
                    model=str(place),
                    data=(str(corpus_file),),
                    out=str(tmp_path / task[:3]),
                    task=task,
                    rank=10_000,
                    curvature="diagonal",
                    layers=("*.0.*", "*_proj"),
                )
            )
        client = Client(tmp_path / task[:3], task=task)
        rows[task] = np.concatenate([client.index.vectors(i, client.index.manifest.components[0]).values for i in range(0, 120, 9)])
    assert_close(rows["devices:Spread"], rows["causal-lm"], 1e-5)


def test_a_model_without_room_on_the_gpus_is_refused(place, tmp_path):
    from accelerate import dispatch_model

    model = load_causal_lm(ModelSource(str(place), device="cpu"))
    names = [f"model.{name}" for name, _ in model.model.named_children()] + ["lm_head"]
    offloaded = dispatch_model(model, {name: "disk" if name == "model.layers" else "cpu" for name in names}, offload_dir=str(tmp_path))
    assert {p.device.type for p in offloaded.parameters()} == {"cpu", "meta"}
    with pytest.raises(UsageError, match=r"model\.layers is offloaded to the disk; use more or larger GPUs"):
        refuse_offloaded(offloaded, "m")
    offloaded.hf_device_map = {"": "cpu"}
    refuse_offloaded(offloaded, "m")  # a machine without GPUs
    offloaded.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(UsageError, match="lm_head is offloaded to the cpu"):
        refuse_offloaded(offloaded, "m")


@pytest.mark.parametrize(
    ("nodes", "workers", "device", "each"),
    [
        ([], 3, "auto", 0),
        ([0, 4], 3, "cpu", 0),
        ([2], 1, "auto", 1),
        ([2], 2, "cuda", 1),
        ([2], 3, "auto", 1 / 2),
        ([1], 3, "auto", 1 / 3),
        ([8], 1, "map", 8),
        ([8], 3, "map", 2),
        ([8, 8], 2, "map", 8),
        ([8, 4], 2, "map", 4),
        ([8, 3], 3, "map", 3),
        ([0, 0], 2, "map", 0),
    ],
)
def test_workers_share_the_gpus(nodes, workers, device, each):
    assert gpus_of_each(nodes, Resources(workers=workers, device=device)) == pytest.approx(each)


def test_more_spread_models_than_gpus_are_refused():
    with pytest.raises(UsageError, match="3 workers of `device` map need a GPU each at least, the cluster has 2; use fewer `workers`"):
        gpus_of_each([1, 1], Resources(workers=3, device="map"))


def test_other_models_are_not_spread(tmp_path):
    from wherefrom.indexer.models import load_mlp

    with pytest.raises(UsageError, match="'map' is not a device of this machine"):
        load_mlp(ModelSource(str(tmp_path / "m.safetensors"), device="map"))
