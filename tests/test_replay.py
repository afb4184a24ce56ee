"""Replay of recorded trainings: against retraining with other weights, PyTorch's optimizers, and real runs of transformers' Trainer."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import make_model, make_tokenizer, random_texts, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from test_callback import train
from transformers import AutoModelForCausalLM
from wherefrom import Client, Index, Query, TrainingRecorder, build
from wherefrom.callback import WherefromCallback
from wherefrom.cli import main
from wherefrom.evaluation import replay as replay_module
from wherefrom.evaluation.agreement import agreement
from wherefrom.evaluation.judge import judge_scores
from wherefrom.evaluation.replay import match_rows, replay, replay_examples, retrain
from wherefrom.evaluation.retrain import PackConfig, compute_losses, make_pack
from wherefrom.indexer.replay import Replay, State, _Range, adam_adjoint, adam_step, sgd_adjoint, sgd_step
from wherefrom.indexer.tasks import CausalLM
from wherefrom.query.matrix import read_matrix
from wherefrom.store.errors import DataError, IncompatibleError, IntegrityError, NotFoundError, UsageError
from wherefrom.store.files import sha256
from wherefrom.store.training import ParameterGroup, read_training

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, eps=1e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=0.01, eps=1e-4),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
}
TEXTS = random_texts(20, seed=1, shortest=4, longest=12)


def plain_model(architecture="gpt2", dtype="float64", dropout=0.0):
    model = make_model(architecture, dtype).requires_grad_(True).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, dropout)
    for name, value in model.config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(model.config, name, dropout)
    return model


def batch_of(texts, tokenizer, left=False):
    rows = [tokenizer(t).input_ids for t in texts]
    width = max(map(len, rows))
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if left else slice(0, len(row))
        inputs[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return inputs, torch.where(mask == 1, inputs, -100), mask


def record(
    directory,
    optimizer="adamw",
    model=None,
    accumulate=1,
    steps=9,
    clip=0.5,
    left=False,
    groups=False,
    ids=False,
    texts=TEXTS,
    pad=0,
    between=None,
):
    """A run of a tiny model by a loop of one's own; `between` is called before each step."""
    model = model or plain_model()
    tokenizer = make_tokenizer()
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained = [{"params": parameters[:5], "weight_decay": 0.3}, {"params": parameters[5:], "lr": 2e-3}] if groups else parameters
    optimizer = OPTIMIZERS[optimizer](trained) if isinstance(optimizer, str) else optimizer(trained)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - 0.5 * s / steps)
    order = random.Random(0)
    torch.manual_seed(3)
    with TrainingRecorder(directory, model, optimizer, tokenizer=tokenizer, clip_norm=clip) as recorder:
        for step in range(steps):
            for _ in range(accumulate):
                numbers = order.sample(range(len(texts)), 4)
                inputs, labels, mask = batch_of([texts[i] for i in numbers], tokenizer, left)
                inputs = inputs.masked_fill(mask == 0, pad)
                count = float((labels[:, 1:] != -100).sum() * accumulate)
                recorder.batch(inputs, labels, mask, denominator=count, ids=[f"d{i}" for i in numbers] if ids else None)
                (model(input_ids=inputs, labels=labels, attention_mask=mask).loss / accumulate).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            if between:
                between(step, model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return directory


def derivative(replay, queries):
    end = replay.train(replay.weights)
    adjoint, _ = replay.query_adjoint(end, queries)
    total = torch.zeros(len(queries), len(replay.weights), dtype=torch.float64)
    for number, state in replay.states(len(replay.run.steps)):
        adjoint, more = replay.adjoint(state, number, adjoint)
        total += more
    return total


def losses_with(replay, weights, queries):
    model = replay.load(replay.train(weights))
    with torch.no_grad():
        return torch.stack([CausalLM().loss(model, CausalLM().collate([query], torch.device("cpu")))[0] for query in queries])


def slope(replay, step, queries):
    """The central difference of the queries' losses along a step of the weights."""
    return (losses_with(replay, replay.weights + step, queries) - losses_with(replay, replay.weights - step, queries)) / 2


def assert_slope(replay, exact, example, size, queries):
    """Compare an example's derivative with retraining under two other weights of it."""
    step = torch.zeros_like(replay.weights)
    step[example] = size
    torch.testing.assert_close(exact[:, example], slope(replay, step, queries) / size, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adamw", {}),
        ("adamw", {"groups": True, "accumulate": 2}),
        ("adam", {}),
        ("sgd", {}),
        ("sgd", {"clip": None, "left": True}),
        ("momentum", {"accumulate": 3}),
        ("nesterov", {}),
    ],
)
def test_derivatives_are_those_of_retraining_with_other_weights(tmp_path, optimizer, options):
    run = read_training(record(tmp_path / "run", optimizer, **options))
    replay = Replay(run, "cpu", "float64")
    assert replay.difference(replay.train(replay.weights)) < 1e-3
    queries = [run.examples[0], run.examples[5]]
    exact = derivative(replay, queries)
    for example in (0, 3, 7):
        assert_slope(replay, exact, example, 1e-5, queries)


def test_dropout_is_repeated_as_it_was_drawn(tmp_path):
    run = read_training(record(tmp_path / "run", "sgd", plain_model(dropout=0.2)))
    assert run.steps[0].batches[0].generator is not None
    replay = Replay(run, "cpu", "float64")
    assert replay.difference(replay.train(replay.weights)) < 1e-6
    exact = derivative(replay, run.examples[:1])
    assert_slope(replay, exact, 4, 1e-5, run.examples[:1])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_training_of_an_adapter_is_repeated_and_differentiated(tmp_path, dropout):
    plain_model("gpt2").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    torch.manual_seed(0)
    options = LoraConfig(r=2, lora_alpha=8, lora_dropout=dropout, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, options).double().train()
    run = read_training(record(tmp_path / "run", "sgd", model, steps=5))
    assert all(".lora_" in name for name in run.initial)
    replay = Replay(run, "cpu", "float64")
    assert replay.difference(replay.train(replay.weights)) < 1e-5
    exact = derivative(replay, run.examples[:1])
    assert_slope(replay, exact, 3, 1e-4, run.examples[:1])


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "gemma2", "opt"])
def test_architectures_are_repeated_and_differentiated(tmp_path, architecture):
    """Normalizations of these compute in float32, which bounds what a finite difference can show."""
    run = read_training(record(tmp_path / "run", "sgd", plain_model(architecture), steps=4))
    replay = Replay(run, "cpu", "float64")
    assert replay.difference(replay.train(replay.weights)) < 1e-4
    exact = derivative(replay, run.examples[:1])
    step = 1e-2 * torch.sign(exact[0])  # all weights at once: the largest difference there is
    assert float(slope(replay, step, run.examples[:1])) == pytest.approx(float((exact[0] * step).sum()), rel=0.01)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_optimizers_are_those_of_pytorch_and_their_adjoints_those_of_autograd(data):
    kind = data.draw(st.sampled_from(["adamw", "adam", "sgd"]))
    momentum = data.draw(st.sampled_from([0.0, 0.9])) if kind == "sgd" else 0.0
    number = data.draw(st.integers(0, 5))
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    group = ParameterGroup(
        names=("p",),
        weight_decay=data.draw(st.sampled_from([0.0, 0.1])),
        eps=data.draw(st.sampled_from([1e-8, 1e-3])),
        beta1=0.8,
        beta2=0.95,
        momentum=momentum,
        dampening=data.draw(st.sampled_from([0.0, 0.3])) if kind == "sgd" else 0.0,
    )
    if momentum and not group.dampening:
        group = group.model_copy(update={"nesterov": data.draw(st.booleans())})
    ranges = [_Range(group, 0, 4)]
    parameter = torch.nn.Parameter(torch.from_numpy(draw.normal(size=4)))
    common = {"lr": 0.03, "weight_decay": group.weight_decay}
    if kind == "sgd":
        optimizer = torch.optim.SGD([parameter], momentum=momentum, dampening=group.dampening, nesterov=group.nesterov, **common)
    else:
        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]([parameter], betas=(0.8, 0.95), eps=group.eps, **common)
    state = State(parameter.detach().clone(), torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    if kind == "sgd":
        state = state._replace(second=state.second[:0])

    def step(state, gradient, number):
        if kind == "sgd":
            return sgd_step(state, gradient, ranges, [0.03], number)
        return adam_step(state, gradient, ranges, [0.03], number, kind == "adamw")

    gradients = [torch.from_numpy(draw.normal(size=4)) for _ in range(number + 1)]
    for i, gradient in enumerate(gradients):
        before = state
        state = step(state, gradient, i)
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(state.parameters, parameter.detach(), rtol=1e-12, atol=1e-12)

    inputs = [part.clone().requires_grad_(True) for part in before]
    last = gradients[-1].clone().requires_grad_(True)

    def differentiable(state, g):
        if kind == "sgd":
            g = g + group.weight_decay * state.parameters
            buffer = momentum * state.first + (1 - (group.dampening if number and momentum else 0.0)) * g
            return [state.parameters - 0.03 * (g + momentum * buffer if group.nesterov else buffer), buffer, state.second * 1]
        if kind == "adam":
            g = g + group.weight_decay * state.parameters
        first, second = 0.8 * state.first + 0.2 * g, 0.95 * state.second + 0.05 * g * g
        decayed = state.parameters * (1 - 0.03 * group.weight_decay) if kind == "adamw" else state.parameters
        divisor = (second / (1 - 0.95 ** (number + 1))).sqrt() + group.eps
        return [decayed - 0.03 * first / (1 - 0.8 ** (number + 1)) / divisor, first, second]

    adjoint = State(*(torch.from_numpy(draw.normal(size=(1, part.numel()))) for part in before))
    outputs = differentiable(State(*inputs), last)
    expected = torch.autograd.grad(outputs, [*inputs, last], [part[0] for part in adjoint], allow_unused=True)
    if kind == "sgd":
        derivatives, of_gradient = sgd_adjoint(before, gradients[-1], adjoint, ranges, [0.03], number)
    else:
        derivatives, of_gradient = adam_adjoint(before, gradients[-1], adjoint, ranges, [0.03], number, kind == "adamw")
    for actual, true in zip((*derivatives, of_gradient), expected, strict=True):
        torch.testing.assert_close(actual[0], torch.zeros_like(actual[0]) if true is None else true, rtol=1e-9, atol=1e-12)


def test_a_parameter_that_never_had_a_gradient_has_a_finite_derivative():
    """The square root of its second moment, 0, has no derivative."""
    zero = torch.zeros(2, dtype=torch.float64)
    ranges = [_Range(ParameterGroup(names=("p",)), 0, 2)]
    adjoint = State(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2))
    before, of_gradient = adam_adjoint(State(zero, zero, zero), zero, adjoint, ranges, [0.1], 3, True)
    assert torch.isfinite(of_gradient).all()
    assert all(torch.isfinite(part).all() for part in before)


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("steps", [1, 2, 7, 9, 70])
def test_states_come_in_reverse_order_and_few_are_kept(steps, parts, monkeypatch):
    """Of a stand-in for the run's steps, whose states are their numbers."""

    def state(number):
        return State(*[torch.tensor([float(number)])] * 3)

    replay = object.__new__(Replay)
    replay.weights = None
    counted = []
    monkeypatch.setattr(Replay, "initial", lambda self: state(0))
    monkeypatch.setattr(Replay, "_parts", lambda self, steps: parts)
    monkeypatch.setattr(Replay, "step", lambda self, before, number, weights: counted.append(number) or state(before.parameters + 1))
    assert [(number, int(before.parameters)) for number, before in Replay.states(replay, steps)] == [(i, i) for i in reversed(range(steps))]
    levels = int(np.ceil(np.log(max(steps, 2)) / np.log(parts)))
    assert len(counted) <= steps * levels


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return record(tmp_path_factory.mktemp("recorded") / "run", model=plain_model(dtype="float32"), ids=True)


def test_groups_of_queries_and_resumption_change_no_bit(run_dir, tmp_path, monkeypatch):
    queries = [Query(text=text, id=f"q{i}") for i, text in enumerate(TEXTS[:5])]
    expected = replay(run_dir, queries)
    monkeypatch.setattr(replay_module, "_LARGEST_PASS", 2)
    monkeypatch.setattr(replay_module, "_SAVE_SECONDS", -1.0)
    calls = []
    original = Replay.adjoint

    def dying(self, *arguments):
        calls.append(1)
        if len(calls) == 13:  # in the second group
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Replay, "adjoint", dying)
    out = tmp_path / "scores.zarr"
    with pytest.raises(KeyboardInterrupt):
        replay(run_dir, queries, out)
    assert not out.exists()
    with pytest.raises(UsageError, match="other queries or another run"):
        replay(run_dir, queries[:4], out)
    before = len(calls)
    resumed = replay(run_dir, queries, out)
    assert len(calls) - before == 3 * 9 - 12
    np.testing.assert_array_equal(resumed.scores, expected.scores)
    assert not (tmp_path / "scores.zarr.work").exists()
    scores, rows, names = read_matrix(out)
    np.testing.assert_array_equal(scores, expected.scores)
    assert rows == [example.id for example in expected.examples]
    assert names == [f"q{i}" for i in range(5)]


@pytest.mark.slow
def test_workers_on_ray_give_the_same(run_dir):
    queries = [Query(text=text) for text in TEXTS[:3]]
    np.testing.assert_array_equal(replay(run_dir, queries, workers=2).scores, replay(run_dir, queries).scores)


def test_a_contrast_is_the_difference_of_its_completions(run_dir):
    ask = {"prompt": "w1 w2", "completion": " w3"}
    both = replay(run_dir, [Query(**ask), Query(prompt="w1 w2", completion=" w9"), Query(**ask, against=" w9")])
    np.testing.assert_allclose(both.scores[2], both.scores[0] - both.scores[1], atol=1e-5 * np.abs(both.scores).max())
    assert both.losses[2] == pytest.approx(both.losses[0] - both.losses[1], abs=1e-5)


def test_a_run_of_the_trainer_is_recorded_replayed_and_compared_with_an_index(tmp_path, monkeypatch):
    data, _ = train(tmp_path, WherefromCallback(record=True), gradient_accumulation_steps=2, weight_decay=0.1, bf16=False)
    directory = tmp_path / "run/wherefrom-run"
    run = read_training(directory)
    assert run.settings.optimizer == "adamw"
    assert [group.weight_decay for group in run.settings.groups] == [0.1, 0.0]
    assert run.settings.clip_norm == 1.0
    assert len(run.steps) == 10
    assert {len(step.batches) for step in run.steps} == {2}
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    assert sorted(example.text for example in run.examples) == sorted(texts)
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"id": "q", "text": texts[3]}, {"id": "r", "text": texts[5]}])
    out = tmp_path / "scores.zarr"
    result = CliRunner().invoke(main, ["replay", str(directory), "--file", str(queries), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed["difference"] < 0.02
    assert [query["proponents"][0]["text"] for query in printed["queries"]] == [texts[3], texts[5]]  # it learned most from the text itself
    index = build(directory, data, tmp_path / "index.wherefrom", append_eos=False, components=["head", "blocks"])
    command = ["evaluate", "replay", str(index.path), "--run", str(directory), "--file", str(queries)]
    result = CliRunner().invoke(main, [*command, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["examples_compared"] == 40
    agreed = {name: figure["value"] for name, figure in report["figures"].items()}
    assert agreed["the index: rank correlation over examples"] > agreed["random: rank correlation over examples"] + 0.2
    assert "rank correlation" in CliRunner().invoke(main, command).output
    plain = Client(index.path).scores([Query(text=texts[3]), Query(text=texts[5])])
    command = ["evaluate", "slope", str(index.path), "--run", str(directory), "--file", str(queries), "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    kept = Index(index.path).manifest.slope
    assert (kept.queries, kept.measured_by) == (2, "a replay of the training (2 queries)")
    np.testing.assert_allclose(Client(index.path).scores([Query(text=texts[3]), Query(text=texts[5])]), kept.value * plain, rtol=1e-4)
    exact, _, ids = read_matrix(out)
    assert ids == ["q", "r"]
    by_text = {example.text: number for number, example in enumerate(run.examples)}
    order = [by_text[Index(index.path).example(row).text] for row in range(40)]
    p, m = (scores.T.astype(float) for scores in (plain, exact[:, order]))
    assert kept.low < kept.value < kept.high
    assert kept.trainings == 1
    assert kept.value == pytest.approx((p * m).sum() / (p * p).sum(), rel=1e-3)
    shown = CliRunner().invoke(main, ["replay", str(directory), "--file", str(queries)])
    assert "through 10 recorded steps" in " ".join(shown.output.split())
    other = build(directory, data, tmp_path / "other.wherefrom", append_eos=True, bytes_per_example=400)
    with pytest.raises(DataError, match="only 0 of the index's 40 examples are in the recorded run"):
        agreement(other.path, directory, [Query(text=texts[3])])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"optim": "adafactor"}, "Adafactor cannot be replayed"),
    ],
)
def test_a_training_that_cannot_be_repeated_is_refused_before_it_starts(tmp_path, arguments, match):
    with pytest.raises(UsageError, match=match):
        train(tmp_path, WherefromCallback(record=True), **arguments)


def test_ground_truth_of_the_run_itself_is_predicted_by_its_replay(tmp_path):
    directory = record(tmp_path / "run", model=plain_model(dtype="float32"), ids=True, steps=15)
    run = read_training(directory)
    documents = write_jsonl(tmp_path / "train.jsonl", [{"id": e.id, "text": e.text} for e in run.examples])
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"id": f"q{i}", "text": TEXTS[i]} for i in range(4)])
    config = PackConfig(
        train="wherefrom.evaluation.replay:retrain",
        model=str(directory),
        data=(str(documents),),
        queries=str(queries),
        out=str(tmp_path / "pack"),
        subsets=12,
        fraction=0.8,
        append_eos=False,
        max_tokens=64,
    )
    pack = make_pack(config)
    out = tmp_path / "scores.zarr"
    replay(directory, [Query(text=TEXTS[i], id=f"q{i}") for i in range(4)], out)
    judgement = judge_scores(pack, out)
    assert judgement.estimate.value > 0.9
    shuffled = tmp_path / "other.zarr"
    replay(directory, [Query(text=TEXTS[i], id=f"q{i + 1}") for i in range(4)], shuffled)
    with pytest.raises(UsageError, match="other queries"):
        judge_scores(pack, shuffled)


def test_retraining_with_all_examples_ends_where_training_did(run_dir):
    run = read_training(run_dir)
    model = retrain(run.examples, str(run_dir), 0)
    replay = Replay(run, "cpu")
    losses = compute_losses(CausalLM(), model, run.examples[:4])
    np.testing.assert_allclose(losses, compute_losses(CausalLM(), replay.model.eval(), run.examples[:4]), rtol=1e-3)
    with pytest.raises(DataError, match="'stranger' is not in the recorded run"):
        retrain(
            [*run.examples, run.examples[0].__class__("stranger", "", "x", np.array([1, 2, 3], np.int32), np.array([0, 1, 1], bool))],
            str(run_dir),
            0,
        )


def test_a_model_that_is_not_the_end_of_its_record_is_refused(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    model = plain_model(dtype="float32")
    model.save_pretrained(copy)
    with pytest.raises(IncompatibleError, match="of its way from where the recorded run ended"):
        replay_examples(copy, read_training(copy).examples[:1])


def test_damaged_records_are_refused(run_dir, tmp_path):
    def damaged(change, error, match):
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(run_dir, copy)
        change(copy)
        with pytest.raises(error, match=match):
            read_training(copy)

    def edit(**values):
        def change(copy):
            path = copy / "training.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | values))

        return change

    damaged(lambda copy: (copy / "training.json").unlink(), NotFoundError, "not a recorded training run")
    damaged(lambda copy: (copy / "training.arrow").unlink(), NotFoundError, "is missing")
    damaged(lambda copy: (copy / "training.safetensors").write_bytes(b"x" * 100), IntegrityError, "SHA-256 differs")
    damaged(lambda copy: (copy / "training.json").write_text("{"), IntegrityError, "is damaged")
    damaged(edit(format="wherefrom training 9"), IncompatibleError, "not of this version")
    damaged(edit(steps=3), IntegrityError, "not \\[3\\] numbers")
    damaged(edit(examples=3), IntegrityError, "out of range")
    damaged(edit(clip_norm=-1), IntegrityError, "clip_norm")
    damaged(edit(surprise=1), IntegrityError, "surprise")


def test_what_cannot_be_recorded_or_asked_is_refused_in_a_sentence(run_dir, tmp_path):
    model = plain_model()
    tokenizer = make_tokenizer()

    def recorder(name, optimizer=None, **options):
        return TrainingRecorder(tmp_path / name, model, optimizer or OPTIMIZERS["sgd"](model.parameters()), **options)

    with pytest.raises(UsageError, match="RMSprop cannot be replayed"):
        recorder("a", torch.optim.RMSprop(model.parameters()))
    with pytest.raises(UsageError, match="amsgrad"):
        recorder("a", torch.optim.AdamW(model.parameters(), amsgrad=True))
    with pytest.raises(UsageError, match="not the model's"):
        recorder("a", torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    used = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
    used.step()
    with pytest.raises(UsageError, match="made steps already"):
        recorder("a", used)
    with pytest.raises(UsageError, match="not a transformers model"):
        TrainingRecorder(tmp_path / "a", torch.nn.Linear(2, 2), OPTIMIZERS["sgd"](model.parameters()))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        recorder("full")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(UsageError, match="without a recorded batch"), recorder("b", optimizer):
        optimizer.step()
    with pytest.raises(DataError, match="2 examples has 1 ids"), recorder("d") as r:
        r.batch(*batch_of(TEXTS[:2], tokenizer), ids=["a"])
    with pytest.raises(DataError, match="denominator"), recorder("d") as r:
        r.batch(*batch_of(TEXTS[:2], tokenizer), denominator=float("inf"))
    with pytest.raises(UsageError, match="no step"), recorder("c"):
        pass
    inputs, labels, mask = batch_of(TEXTS[:2], tokenizer)
    with pytest.raises(DataError, match="must fit"), recorder("d") as r:
        r.batch(inputs, labels[:1])
    with pytest.raises(DataError, match="not its own tokens"), recorder("d") as r:
        r.batch(inputs, labels.roll(1, 1), mask)
    with pytest.raises(DataError, match="padded in other places"), recorder("d") as r:
        r.batch(inputs, torch.full_like(labels, -100), 1 - mask)
    assert not (tmp_path / "d").exists()
    with pytest.raises(UsageError, match="not with rows"):
        replay(run_dir, [Query(row=1)])
    with pytest.raises(UsageError, match="no queries"):
        replay(run_dir, [])
    (tmp_path / "s.zarr").mkdir()
    with pytest.raises(UsageError, match="exists"):
        replay(run_dir, [Query(text=TEXTS[0])], tmp_path / "s.zarr")
    (tmp_path / "t.zarr.work").mkdir()
    (tmp_path / "t.zarr.work/x").write_text("x")
    with pytest.raises(UsageError, match="other content"):
        replay(run_dir, [Query(text=TEXTS[0])], tmp_path / "t.zarr")
    with pytest.raises(NotFoundError, match="not a recorded training run"):
        replay(tmp_path / "full", [Query(text=TEXTS[0])])


def test_equal_documents_share_one_example(run_dir):
    run = read_training(run_dir)
    assert match_rows([run.examples[2], run.examples[0], run.examples[2]], run.examples) == [(0, 2), (1, 0), (2, 2)]


def test_padding_before_texts_is_repeated_with_its_own_token(tmp_path):
    """The first token of a text is predicted from the padding before it, where it is in the loss."""
    run = read_training(record(tmp_path / "run", "sgd", left=True, pad=7))
    assert {batch.padding for step in run.steps for batch in step.batches} <= {0, 7}  # 0 where all texts are as long
    assert any(batch.predicts_first for step in run.steps for batch in step.batches)
    replay = Replay(run, "cpu", "float64")
    assert replay.difference(replay.train(replay.weights)) < 1e-5


def test_a_token_whose_embedding_is_not_trained_stays_so(tmp_path):
    model = plain_model("llama")
    model.model.embed_tokens.padding_idx = None
    model.config.pad_token_id = 3  # the reloaded model's embedding would drop the gradient of token 3
    texts = [f"w3 {text}" for text in TEXTS]
    run = read_training(record(tmp_path / "run", "sgd", model, texts=texts))
    replay = Replay(run, "cpu", "float64")
    assert replay.difference(replay.train(replay.weights)) < 1e-4


def test_a_model_trained_in_evaluation_mode_is_repeated_in_it(tmp_path):
    model = plain_model(dropout=0.3).eval()
    run = read_training(record(tmp_path / "run", "sgd", model))
    assert not run.settings.training
    replay = Replay(run, "cpu", "float64")
    assert replay.difference(replay.train(replay.weights)) < 1e-6


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=0.1, eps=1e-4, decoupled_weight_decay=True),
        lambda p: torch.optim.SGD(p, lr=0.05, dampening=0.5),
    ],
)
def test_settings_that_pytorch_reads_in_another_way_are_repeated(tmp_path, optimizer):
    replay = Replay(read_training(record(tmp_path / "run", optimizer)), "cpu", "float64")
    assert replay.difference(replay.train(replay.weights)) < 1e-3


def freeze(step, model, optimizer):
    if step == 4:
        model.transformer.wpe.weight.requires_grad_(False)


def forget(step, model, optimizer):
    model.transformer.wpe.weight.grad = None


def slow_down(step, model, optimizer):
    optimizer.param_groups[0]["betas"] = (0.8, 0.99)


@pytest.mark.parametrize(("between", "match"), [(freeze, "frozen"), (forget, "had no gradient"), (slow_down, "settings of the optimizer")])
def test_what_a_record_does_not_hold_is_said_at_the_end_of_training(tmp_path, between, match):
    with pytest.raises(UsageError, match=match):
        record(tmp_path / "run", between=between)
    assert not (tmp_path / "run").exists()


def test_gradients_that_are_clipped_but_not_trained_and_weights_in_bfloat16_are_refused(tmp_path):
    model = plain_model()
    optimizer = torch.optim.AdamW(list(model.parameters())[2:])
    with pytest.raises(UsageError, match=r"transformer.wte.weight requires a gradient"):
        TrainingRecorder(tmp_path / "run", model, optimizer, clip_norm=1.0)
    half = plain_model(dtype="bfloat16")
    with pytest.raises(UsageError, match="is trained in bfloat16"):
        TrainingRecorder(tmp_path / "run", half, torch.optim.SGD(half.parameters(), lr=0.1))


def test_mixed_precision_of_the_trainer_is_recorded(tmp_path):
    train(tmp_path, WherefromCallback(record=True), bf16=True, optim="sgd", max_steps=3)
    assert read_training(tmp_path / "run/wherefrom-run").settings.autocast == "bfloat16"


def test_a_trainer_that_cannot_be_recorded_trains_on_and_warns(tmp_path):
    with pytest.warns(UserWarning, match="not recorded for a replay: .*single token"):
        train(tmp_path, WherefromCallback(record=True), texts=["w3", *TEXTS])
    assert not (tmp_path / "run/wherefrom-run").exists()


def test_equal_documents_are_told_apart_by_ids_and_share_a_weight_without(tmp_path):
    texts = [*TEXTS[:6], TEXTS[0], TEXTS[0]]
    named = read_training(record(tmp_path / "named", model=plain_model(dtype="float32"), ids=True, texts=texts, steps=16))
    assert sorted(e.id for e in named.examples) == [f"d{i}" for i in range(8)]
    assert match_rows(named.examples, named.examples) == [(i, i) for i in range(8)]
    model = retrain(named.examples, str(tmp_path / "named"), 0)
    end = Replay(named, "cpu")
    np.testing.assert_allclose(
        compute_losses(CausalLM(), model, named.examples), compute_losses(CausalLM(), end.model.eval(), named.examples), rtol=1e-3
    )
    assert replay_module._copies(named).tolist() == [1.0] * 8


def test_equal_documents_without_ids_share_a_weight(tmp_path):
    """The Trainer's epochs are whole, so how often an example was in a batch tells for how many documents it stands."""
    texts = [*TEXTS[:6], TEXTS[0], TEXTS[0]]
    train(tmp_path, WherefromCallback(record=True), texts=texts)
    run = read_training(tmp_path / "run/wherefrom-run")
    assert len(run.examples) == 6
    assert replay_module._copies(run).tolist() == [3.0 if e.text == TEXTS[0] else 1.0 for e in run.examples]


def test_queries_longer_than_the_context_and_indexes_of_other_models_are_refused(run_dir, tmp_path, index_dir):
    with pytest.raises(UsageError, match="query 1 is 101 tokens long, the model's context is 64"):
        replay(run_dir, [Query(text=TEXTS[0]), Query(text=" ".join(["w1"] * 101))])
    with pytest.raises(IncompatibleError, match="not an index of the model that the recorded run"):
        agreement(index_dir, run_dir, [Query(text=TEXTS[0])])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("widths", lambda a: -a),
        ("widths", lambda a: a.astype(np.float32) * np.nan),
        ("widths", lambda a: a * 10**9),
        ("examples", lambda a: a[:, None]),
        ("examples", lambda a: a + 10**6),
        ("denominators", lambda a: a * np.inf),
        ("paddings", lambda a: a - 5),
        ("batches_of_step", lambda a: a * 2),
        ("rates", lambda a: a[:-1]),
    ],
)
def test_arrays_of_a_hostile_record_are_refused(run_dir, tmp_path, name, change):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    arrays = load_file(copy / "training.safetensors")
    arrays[name] = change(arrays[name])
    save_file(arrays, copy / "training.safetensors")
    path = copy / "training.json"
    content = json.loads(path.read_text())
    content["checksums"]["training.safetensors"] = sha256(copy / "training.safetensors")
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="is damaged"):
        read_training(copy)
