"""Models that several processes compute together: the same rows, answers and explanations as in one, and plain words where that fails.

The processes exchange values by gloo here, and by NCCL on GPUs.
"""

import copy
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from helpers import assert_close, make_model, make_tokenizer
from wherefrom import BuildConfig, Client, Query
from wherefrom.cli import main
from wherefrom.indexer import tensor_parallel
from wherefrom.indexer.capture import with_gradient
from wherefrom.indexer.devices import cooperating
from wherefrom.indexer.models import LoadedModel, ModelSource, frozen_copy, load_causal_lm, logits_of, model_fingerprint
from wherefrom.indexer.tensor_parallel import is_split, own_slice, process_count, split_plan, whole
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.executor import Resources, gpus_of_each
from wherefrom.store.errors import UsageError, WorkerError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the figures compared are those of a CPU; benchmarks/gpu.py has --device tp"),
]

ROWS = {
    "whole": {"components": ("head", "embeddings", "blocks"), "rank": 4, "curvature": "ekfac", "head_extra_tokens": 2, "labels": "sampled"},
    "hidden": {"components": ("blocks",), "rank": 3, "curvature": "fisher", "projection": "pca", "hidden": True},
    "one block": {"components": ("blocks",), "rank": 4, "layers": ("model.layers.1.*",)},
    "head": {"components": ("head",)},
}


def saved(model, directory):
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A saved model."""
    return saved(make_model("llama", "float32"), tmp_path_factory.mktemp("split") / "model")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A model with norms in its attention, whose head and embeddings are one weight."""
    model = make_model("qwen3", "float32")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return saved(model, tmp_path_factory.mktemp("tied") / "model")


@pytest.fixture(autouse=True, scope="module")
def _ended():
    """End the other processes with the last test."""
    yield
    if tensor_parallel._ProcessGroup.current is not None:
        tensor_parallel._ProcessGroup.current.close()


def indexed(place, corpus_file, out, rows, device):
    """Rows of an index, and answers and an explanation."""
    config = BuildConfig(model=str(place), data=(str(corpus_file),), out=str(out), dtype="float64", device=device, **ROWS[rows])
    build(config)
    client = Client(out, device=device)
    assert is_split(client.encoder.model) == (device != "cpu")
    dense = [s for s in client.index.manifest.components if s.kind == "dense"]
    stored = [np.concatenate([client.index.vectors(i, s).values for i in range(0, 120, 7)]) for s in dense]
    answers = [client.query(k=5, **fields) for fields in ({"text": "w1 w2 w3 w4"}, {"prompt": "w5 w6", "completion": " w7 w8"})]
    scores = np.concatenate([[a.score for a in (*answer.proponents, *answer.opponents)] for answer in answers])
    (explained,) = client.explain([answers[0].proponents[0].row], Query(text="w1 w2 w3 w4"))
    shares = np.concatenate([explained.example.scores, explained.query.scores])
    return client, stored, scores, shares


@pytest.mark.parametrize(("model", "rows"), [("tied", "whole"), *(("place", rows) for rows in ROWS)])
def test_an_index_of_a_split_model_is_that_of_the_model(model, corpus_file, tmp_path, rows, request):
    place = request.getfixturevalue(model)
    one, stored, scores, shares = indexed(place, corpus_file, tmp_path / "one", rows, "cpu")
    two, same, other_scores, other_shares = indexed(place, corpus_file, tmp_path / "two", rows, "tp:2")
    assert two.index.manifest.models[0].fingerprint == one.index.manifest.models[0].fingerprint
    for a, b in zip(stored, same, strict=True):
        assert_close(b, a, 1e-5)
    assert_close(other_scores, scores, 1e-4)
    assert_close(other_shares, shares, 1e-4)
    assert two.complete("w1 w2 w3", tokens=4) == one.complete("w1 w2 w3", tokens=4)


def test_calls_whose_gradients_are_not_asked_for_are_forgotten(place):
    model = load_causal_lm(ModelSource(str(place), dtype="float64", device="tp:2"))
    layers = ["model.layers.0.self_attn.q_proj"]
    tokens = torch.arange(1, 21).view(2, 10)
    group = tensor_parallel._ProcessGroup.current
    model.get_submodule(layers[0]).register_forward_hook(lambda module, args, output: with_gradient(output))
    with tensor_parallel.shared_pass(model, layers):
        states = [model.base_model(input_ids=tokens, use_cache=False)[0] for _ in range(3)]
        assert all(state.requires_grad for state in states)
        states[2].sum().backward()
        states[0].sum().backward()  # in another order
    assert not group._forgotten
    del states
    assert sorted(kind for kind, _ in group._forgotten) == ["call"] * 3
    logits_of(model, tokens)
    assert len(group._forgotten) <= 1  # told to the others; the call itself ended


def test_other_values_are_refused_before_anything_is_sent(place):
    model = load_causal_lm(ModelSource(str(place), device="tp:2"))
    with pytest.raises(UsageError, match=r"takes no DynamicCache \(past_key_values\); use another device"):
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, pad_token_id=0)
    assert logits_of(model, torch.ones(1, 3, dtype=torch.long)).shape[1] == 3


def test_what_needs_the_model_in_one_process_is_refused(place, corpus_file, tmp_path):
    out = tmp_path / "i"
    build(BuildConfig(model=str(place), data=(str(corpus_file),), out=str(out), components=("blocks",), rank=3))
    (tmp_path / "q.jsonl").write_text('{"text": "w1 w2"}\n')
    options = ["--device", "tp:2"]
    for command in (
        ["query", str(out), "--text", "w1 w2", "--refine", "2"],
        ["evaluate", "tailpatch", str(out), "--file", str(tmp_path / "q.jsonl")],
    ):
        result = CliRunner().invoke(main, [*command, *options])
        assert result.exit_code == 2, result.output
        assert re.search(r"needs the model in one process; use a --device other than tp", result.output), result.output


@pytest.mark.parametrize(
    ("architecture", "problem"), [("gpt2", "transformers has no plan to split a GPT2LMHeadModel"), ("mixtral", "the experts of a Mixtral")]
)
def test_models_that_cannot_be_split_are_refused(architecture, problem, tmp_path, corpus_file):
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    if architecture == "gpt2":
        model = make_model("gpt2", "float32")
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, vocab_size=62, num_local_experts=2, **small))
    saved(model, tmp_path / "m")
    before = tensor_parallel._ProcessGroup.current
    options = ["--model", str(tmp_path / "m"), "--data", str(corpus_file), "--out", str(tmp_path / "i"), "--device", "tp:2"]
    result = CliRunner().invoke(main, ["build", *options])
    assert result.exit_code == 3, result.output
    assert problem in result.output
    assert "use the device map" in " ".join(result.output.split())
    assert tensor_parallel._ProcessGroup.current is before


def test_plans_split_the_layers_of_the_body_alone():
    from transformers import AutoConfig, AutoModelForCausalLM

    plan = split_plan(AutoModelForCausalLM, AutoConfig.for_model("gemma3_text"), False)
    split = {name.rpartition(".")[2]: style for name, style in plan.items() if style != "replicate"}
    columns = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "colwise_gather_output")
    assert split == columns | dict.fromkeys(("o_proj", "down_proj"), "rowwise_split_input")
    assert {"lm_head", "model.embed_tokens"} <= plan.keys() - {name for name, style in plan.items() if style != "replicate"}


@pytest.mark.parametrize("device", ["tp:0", "tp:x", "tp:-1", "tp:65", "tp:"])
def test_bad_numbers_of_processes_are_refused(device):
    with pytest.raises(UsageError, match=re.escape(f"{device!r} is not a device")):
        process_count(device)


def test_adapters_and_models_in_memory_are_not_split(place, tmp_path):
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{place}", "peft_type": "LORA"}}')
    with pytest.raises(UsageError, match=r"an adapter is not split over processes; merge .* \(merge_and_unload\)"):
        load_causal_lm(ModelSource(str(tmp_path), device="tp:2"))
    with pytest.raises(UsageError, match="'tp:2' is not a device of this machine"):
        frozen_copy(ModelSource("m", device="tp:2"), LoadedModel(make_model("llama", "float32")))


def test_a_process_that_dies_is_a_sentence_and_another_load_goes_on(place, corpus_file, tmp_path):
    out = tmp_path / "i"
    build(BuildConfig(model=str(place), data=(str(corpus_file),), out=str(out), rank=2))
    client = Client(out, device="tp:2")
    answer = client.query(text="w1 w2 w3")
    model = client.encoder.model
    (process,) = tensor_parallel._ProcessGroup.current._processes
    assert os.getsid(process.pid) != os.getsid(0)  # the terminal's interrupts come to the leader alone
    process.kill()
    with pytest.raises(WorkerError, match=r"process 1 of the 2 that compute the model together ended \(.*\); try again"):
        client.query(text="w1 w2 w4")
    with pytest.raises(WorkerError, match="have ended; load it again"):
        logits_of(model, torch.ones(1, 4, dtype=torch.long))
    again = client.query(text="w1 w2 w3")  # loads the model again
    assert [a.row for a in again.proponents] == [a.row for a in answer.proponents]
    assert client.encoder.model is not model


class OddError(BaseException):
    """An interrupt, or an error that is nobody's in particular."""


def test_an_error_of_the_leader_in_a_pass_ends_the_group_and_another_load_goes_on(place, corpus_file, tmp_path):
    def raise_odd(*_):
        raise OddError

    def raise_later(module, args, output):
        if output.requires_grad:
            output.register_hook(raise_odd)

    out = tmp_path / "i"
    build(BuildConfig(model=str(place), data=(str(corpus_file),), out=str(out), components=("blocks",), rank=2))
    client = Client(out, device="tp:2")
    expected = client.query(text="w1 w2 w3", rerank=0)
    for hook in (raise_odd, raise_later):
        client.encoder.model.get_submodule("model.layers.1.mlp.up_proj").register_forward_hook(hook)
        with pytest.raises(OddError):
            client.query(text="w4 w5", rerank=0)
        assert tensor_parallel._ProcessGroup.current is None
        again = client.query(text="w1 w2 w3", rerank=0)
        assert_close([a.score for a in again.proponents], [a.score for a in expected.proponents], 1e-5)


def test_an_error_between_passes_ends_nothing(place):
    model = load_causal_lm(ModelSource(str(place), device="tp:2"))

    def fail():
        with tensor_parallel.shared_pass(model, []):
            logits_of(model, torch.ones(1, 4, dtype=torch.long))
            raise OddError

    with pytest.raises(OddError):
        fail()
    assert logits_of(model, torch.ones(1, 4, dtype=torch.long)).shape == (1, 4, 62)


def test_threads_that_ask_and_load_do_not_disturb_each_other(place):
    first = load_causal_lm(ModelSource(str(place), dtype="float64", device="tp:2"))
    tokens = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        expected = logits_of(first, tokens)

    def ask(_):
        with torch.no_grad():
            return logits_of(first, tokens)

    def load(_):
        model = load_causal_lm(ModelSource(str(place), dtype="float64", device="tp:2"))
        with torch.no_grad():
            return logits_of(model, tokens)

    with ThreadPoolExecutor(4) as pool:
        results = [*pool.map(ask, range(40)), *pool.map(load, range(3)), *pool.map(ask, range(40))]
    assert all(torch.equal(result, expected) for result in results)


def test_a_process_that_does_not_start_is_told_and_none_imports_from_the_working_directory(place, tmp_path, monkeypatch):
    if tensor_parallel._ProcessGroup.current is not None:
        tensor_parallel._ProcessGroup.current.close()
    with monkeypatch.context() as patch:
        patch.setattr(tensor_parallel, "_FOLLOW", "raise SystemExit('the GPU is busy')")
        with pytest.raises(WorkerError, match=r"process 1 of the 2 that compute the model together ended \(the GPU is busy\)"):
            load_causal_lm(ModelSource(str(place), device="tp:2"))
    for name in ("inspect", "queue", "tokenize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\nraise ImportError")
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    assert is_split(load_causal_lm(ModelSource(str(place), device="tp:2")))
    assert not (tmp_path / "imported").exists()
    assert dict(os.environ) == before


def test_copies_are_refused(place):
    model = load_causal_lm(ModelSource(str(place), device="tp:2"))
    for copied in (copy.deepcopy, lambda m: frozen_copy(ModelSource("m"), LoadedModel(m))):
        with pytest.raises(UsageError, match="cannot be copied; load it again"):
            copied(model)


def test_what_the_leader_forgot_is_forgotten_by_the_others(place):
    model = load_causal_lm(ModelSource(str(place), dtype="float64", device="tp:2"))
    group = tensor_parallel._ProcessGroup.current
    layer = "model.layers.0.self_attn.q_proj"
    model.get_submodule(layer).register_forward_hook(lambda module, args, output: with_gradient(output))
    with tensor_parallel.shared_pass(model, [layer]):
        states = model.base_model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)[0]
    del states
    (forgotten,) = [number for kind, number in group._forgotten if kind == "call"]
    group.tell("backward", call=forgotten, form=["float64", [1, 4, 16]])
    with pytest.raises(WorkerError, match=rf"ended \(KeyError: {forgotten}\)"):
        logits_of(model, torch.ones(1, 4, dtype=torch.long))


def test_the_other_processes_end_with_a_leader_that_is_killed(place):
    script = (
        "import os, signal, sys\nfrom wherefrom.indexer import tensor_parallel\nfrom wherefrom.indexer.models import *\n"
        "model = load_causal_lm(ModelSource(sys.argv[1], device='tp:2'))\n"
        "print(tensor_parallel._ProcessGroup.current._processes[0].pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(place)], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_processes_hold_slices_of_unequal_size(place, dtype):
    """24 columns of the MLP in three, 16 of the model's width too."""
    source = ModelSource(str(place), dtype=dtype)
    model = load_causal_lm(ModelSource(str(place), dtype=dtype, device="tp:3"))
    parameters = dict(model.named_parameters())
    slices = {name: own_slice(p).numel() / p.numel() for name, p in parameters.items()}
    assert {round(share, 3) for name, share in slices.items() if "mlp" in name} == {0.333}
    assert {round(share, 3) for name, share in slices.items() if "q_proj.weight" in name} == {0.375}  # 6, 6 and 4 rows
    assert {share for name, share in slices.items() if "norm" in name or "embed" in name or "head" in name} == {1.0}
    plain = load_causal_lm(source)
    for name, p in plain.named_parameters():
        assert torch.equal(whole(model, name, parameters[name]), p)
    assert model_fingerprint(model) == model_fingerprint(plain)
    tokens = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        assert_close(logits_of(model, tokens).float(), logits_of(plain, tokens).float(), 5e-2 if dtype == "bfloat16" else 1e-5)


def test_one_process_is_an_ordinary_model(place):
    assert process_count("tp") == 1
    with nullcontext() if tensor_parallel._ProcessGroup.current else pytest.raises(AttributeError):
        tensor_parallel._ProcessGroup.current.close()
    model = load_causal_lm(ModelSource(str(place), device="tp"))
    assert not is_split(model)
    assert tensor_parallel._ProcessGroup.current is None


@pytest.mark.parametrize(
    ("nodes", "workers", "device", "each"), [([8], 1, "tp", 8), ([8], 3, "tp", 2), ([8, 8], 4, "tp:4", 4), ([], 2, "tp:2", 0)]
)
def test_workers_get_the_gpus_of_their_model(nodes, workers, device, each):
    assert gpus_of_each(nodes, Resources(workers=workers, device=device)) == each
    assert cooperating(device) == (1 if device == "tp" else int(device[-1]))
