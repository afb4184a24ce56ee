"""Tasks other than language models: rows and queries against autograd of one example at a time, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from helpers import assert_close, make_tokenizer, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wherefrom import Client, Query, build
from wherefrom.cli import main
from wherefrom.indexer.models import ModelSource
from wherefrom.store.documents import Documents, Example, write_documents
from wherefrom.store.errors import DataError, IncompatibleError, IntegrityError, UsageError

_SIZES = dict(vocab_size=70, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def tokenizer(**special):
    made = make_tokenizer()
    made.add_special_tokens({"pad_token": "[PAD]", "mask_token": "[MASK]", **special})
    return made


def random_(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.double().eval()


def words(generator, count):
    return " ".join(f"w{i}" for i in generator.integers(1, 50, count))


def gradients(model, value, layers):
    """By layer, the gradient of a value in its weight."""
    modules = dict(model.named_modules())
    parameters = [modules[name].weight for name in layers]
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        found = torch.autograd.grad(value(), parameters, allow_unused=True)
    for parameter in parameters:
        parameter.requires_grad_(False)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return {name: g.T if type(modules[name]).__name__ == "Conv1D" else g for name, g in zip(layers, whole, strict=True)}


def check_rows(model, index, losses, rows=range(6)):
    """The rows of an index without whitening are the gradients of losses, functions of a row."""
    component = index.component("blocks")
    for row in rows:
        found = gradients(model, lambda row=row: losses(row), component.layer_names)
        values = index.vectors(row, component).values[0]
        largest = max(float(g.abs().max()) for g in found.values())
        assert largest > 1e-6
        for layer in component.layers:
            gradient = found[layer.name].reshape(layer.outputs, -1).numpy()
            part = values[layer.offset : layer.offset + layer.size].reshape(layer.output_rank, layer.input_rank)
            assert_close(part, gradient, 1e-5, scale=largest)


WHOLE = dict(dtype="float64", rank=4000, curvature="identity", components=("blocks",))


def labelled(count=12, classes=3):
    generator = np.random.default_rng(0)
    return [
        {"id": f"d{i}", "text": words(generator, int(generator.integers(2, 9))), "label": int(generator.integers(classes)), "year": i}
        for i in range(count)
    ]


def make_classifier(kind="bert", **options):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = _SIZES | {"pad_token_id": tokenizer().pad_token_id, "num_labels": 3} | options
    sizes |= dict(intermediate_size=24) if kind == "bert" else dict(n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return random_(AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **sizes)))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_rows_of_a_classifier_equal_autograd(kind, tmp_path):
    model = make_classifier(kind)
    records = labelled()
    made = tokenizer()
    index = build(model, records, tmp_path / "i", tokenizer=made, task="classification", batch_tokens=30, **WHOLE)
    assert {"classifier" if kind == "bert" else "score"} <= set(index.component("blocks").layer_names)
    assert index.manifest.build.tracked[0].share > 0.5

    def loss(row):
        logits = model(**made(records[row]["text"], return_tensors="pt")).logits
        return F.cross_entropy(logits, torch.tensor([records[row]["label"]]))

    check_rows(model, index, loss)
    assert index.example(3).label == records[3]["label"]
    assert index.example(3).metadata == {"year": 3}


def test_a_classifier_is_asked_with_a_text_and_a_label(tmp_path):
    make_classifier().float().save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    records = labelled()
    data = write_jsonl(tmp_path / "d.jsonl", records)
    options = "--model", tmp_path / "m", "--data", data, "--out", tmp_path / "i", "-o", "task=classification"
    done = run("build", *options)
    assert (done.exit_code, '--text "..." --label 0' in done.stdout) == (0, True), done.output
    result = run("query", tmp_path / "i", "--text", records[4]["text"], "--label", records[4]["label"], "--mode", "cosine", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["proponents"][0]["id"] == "d4"
    assert run("query", tmp_path / "i", "--text", "w1 w2", "--label", 1, "--where", "label == 1 and year > 3").exit_code == 0
    for options, message in (
        (("--text", "w1 w2"), "there is no label"),
        (("--text", "w1 w2", "--label", "7"), "the label 7, the model knows 0 to 2"),
        (("--prompt", "w1", "--completion", "w2"), "there is no label"),
        (("--completion", "w2", "--label", "1"), "a label is the class of"),
        (("--text", " ".join(["w1"] * 40), "--label", "1"), "longer than the model's context of 32 tokens"),
    ):
        result = run("query", tmp_path / "i", *options)
        assert (result.exit_code, message in result.stderr) == (2, True), result.output
    assert run("verify", tmp_path / "i").exit_code == 0


def test_a_long_text_of_a_classifier_is_cut_and_counted(tmp_path):
    records = [{"id": "long", "text": " ".join(["w1"] * 50), "label": 1}, *labelled(4)]
    index = build(make_classifier(), records, tmp_path / "i", tokenizer=tokenizer(), task="classification", **WHOLE)
    assert (len(index), index.manifest.build.truncated, len(index.example(0).token_ids)) == (5, 1, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_labels=1), "for a reward model, give task reward"),
        (dict(problem_type="multi_label_classification"), "one label an example"),
    ],
)
def test_classifiers_of_other_kinds_are_refused(options, message, tmp_path):
    with pytest.raises(IncompatibleError, match=message):
        build(make_classifier(**options), labelled(), tmp_path / "i", tokenizer=tokenizer(), task="classification", **WHOLE)


def pairs(count=8):
    generator = np.random.default_rng(1)
    return [
        {"id": f"p{i}", **{name: words(generator, int(generator.integers(2, 6))) + " " for name in ("prompt", "chosen", "rejected")}}
        for i in range(count)
    ]


def make_lm(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=70, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0))


def log_probability(model, made, prompt, completion):
    """The log probability of a completion's tokens, and of the end of the text, after its prompt."""
    before = len(made(prompt).input_ids)
    ids = torch.tensor([[*made(prompt + completion).input_ids, made.eos_token_id]])
    log_p = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    return log_p.gather(1, ids[0, 1:, None])[before - 1 :].sum()


def test_rows_of_preference_pairs_equal_autograd_of_dpo(tmp_path):
    model, reference = make_lm().double().eval(), make_lm(1)
    reference.save_pretrained(tmp_path / "reference")
    reference = reference.double().eval()
    made, records = tokenizer(), pairs()
    task = f"dpo(beta=0.3, reference={tmp_path / 'reference'})"
    index = build(model, records, tmp_path / "i", tokenizer=made, task=task, batch_tokens=60, **WHOLE)

    def loss(row):
        values = []
        for side in ("chosen", "rejected"):
            sides = made, records[row]["prompt"], records[row][side]
            with torch.no_grad():
                expected = log_probability(reference, *sides)
            values.append(log_probability(model, *sides) - expected)
        return -F.logsigmoid(0.3 * (values[0] - values[1]))

    check_rows(model, index, loss)
    assert index.example(2).text == f"{records[2]['prompt']}{records[2]['chosen']}\n\n[rejected] {records[2]['rejected']}"


def test_pairs_are_asked_as_pairs_and_as_completions_with_head_and_embeddings(tmp_path, monkeypatch):
    for seed, name in enumerate(("m", "reference")):
        make_lm(seed).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    records = pairs()
    data = write_jsonl(tmp_path / "d.jsonl", records)
    task = f"task=dpo(reference={tmp_path / 'reference'})"
    assert run("build", "--model", tmp_path / "m", "--data", data, "--out", tmp_path / "i", "-o", task).exit_code == 0
    client = Client(tmp_path / "i")
    assert {component.role for component in client.index.manifest.components} >= {"head", "embeddings"}
    pair = {name: records[5][name] for name in ("prompt", "chosen", "rejected")}
    assert client.query(**pair, mode="cosine").proponents[0].id == "p5"
    plain = client.query(prompt=records[5]["prompt"], completion=records[5]["chosen"])
    assert plain.proponents
    result = run("query", tmp_path / "i", *(x for name, text in pair.items() for x in (f"--{name}", text)), "--json")
    assert result.exit_code == 0, result.output
    together = [Query(**pair), Query(prompt=pair["prompt"], completion=pair["chosen"]), Query(text="w1 w2")]  # as a server may batch them
    assert_close(client.scores(together), np.concatenate([client.scores([query]) for query in together]), 1e-4)
    refused = run("query", tmp_path / "i", "--chosen", "w1 w2")
    assert (refused.exit_code, "give both" in refused.stderr) == (2, True)
    monkeypatch.chdir(tmp_path)  # a relative reference is found from elsewhere
    relative = "task=dpo(reference=reference)"
    assert run("build", "--model", "m", "--data", data, "--out", "r", "-o", relative).exit_code == 0
    monkeypatch.chdir("/")
    assert run("query", tmp_path / "r", "--prompt", "w1", "--completion", " w2").exit_code == 0
    without = run("build", "--model", tmp_path / "m", "--data", data, "--out", tmp_path / "j", "-o", "task=dpo")
    assert (without.exit_code, "dpo(reference=DIRECTORY)" in without.stderr) == (2, True), without.output


def test_pairs_whose_completions_are_cut_away_are_refused(tmp_path):
    long = pairs()[0] | {"prompt": "w1 " * 50}
    sizes = dict(tokenizer=tokenizer(), task="reward")
    with pytest.raises(DataError, match="no token of a completion is within 32 tokens"):
        build(make_classifier(num_labels=1), [*pairs(), long | {"id": "long"}], tmp_path / "i", **sizes)
    same = long | {"id": "same", "prompt": "w1", "chosen": " w2" * 40, "rejected": " w2" * 50}
    with pytest.raises(DataError, match="the two sides have the same 32 tokens"):
        build(make_classifier(num_labels=1), [*pairs(), same], tmp_path / "j", **sizes)


def test_pairs_of_conversations_share_their_beginning():
    from wherefrom.store.corpus import Corpus
    from wherefrom.store.fields import Fields

    user, good, bad = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "yes"), ("assistant", "no")))

    def read(tmp, record):
        return next(iter(Corpus([str(write_jsonl(tmp, [record]))], Fields(form="pair"))))

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.jsonl"
        document = read(path, {"chosen": [user, good], "rejected": [user, bad]})
        assert (document.prompt_messages, document.messages[1], document.rejected.messages[1]) == (1, good, bad)
        document = read(path, {"prompt": [user], "chosen": [good], "rejected": [bad]})
        assert (document.prompt_messages, len(document.messages), document.rejected.prompt_messages) == (1, 2, 1)
        assert "the same" in str(read(path, {"prompt": "a", "chosen": "b", "rejected": "b"}))
        assert "there is no field 'rejected'" in str(read(path, {"prompt": "a", "chosen": "b"}))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_rows_of_a_reward_model_equal_autograd(kind, tmp_path):
    model, made, records = make_classifier(kind, num_labels=1), tokenizer(), pairs()
    index = build(model, records, tmp_path / "i", tokenizer=made, task="reward", batch_tokens=50, append_eos=False, **WHOLE)

    def reward(row, side):
        return model(**made(records[row]["prompt"] + records[row][side], return_tensors="pt")).logits[0, 0]

    check_rows(model, index, lambda row: -F.logsigmoid(reward(row, "chosen") - reward(row, "rejected")))


def make_masked():
    from transformers import BertConfig, BertForMaskedLM

    return random_(BertForMaskedLM(BertConfig(**_SIZES, intermediate_size=24, pad_token_id=tokenizer().pad_token_id)))


def test_rows_of_a_masked_language_model_equal_autograd(tmp_path):
    from wherefrom.indexer.text_tasks import MaskedLM

    model, made, records = make_masked(), tokenizer(), labelled()
    records = [{"id": r["id"], "text": r["text"]} for r in records]
    task = "masked-lm(draws=3, probability=0.3)"
    index = build(model, records, tmp_path / "i", tokenizer=made, task=task, batch_tokens=60, **WHOLE)

    def loss(row):
        example = index.example(row)
        total = 0
        for draw in range(3):
            mask = torch.from_numpy(MaskedLM(0.3, 3)._mask(example, draw)).bool()
            assert mask.any()
            ids = torch.from_numpy(example.token_ids).long()
            logits = model(input_ids=ids.masked_fill(mask, made.mask_token_id)[None]).logits[0]
            total = total + F.cross_entropy(logits[mask], ids[mask], reduction="sum")
        return total / 3

    check_rows(model, index, loss)
    shares = [MaskedLM(0.3, 1)._mask(index.example(row), draw).mean() for row in range(12) for draw in range(50)]
    assert 0.2 < np.mean(shares) < 0.45  # at least one token of a short text


def test_a_masked_language_model_is_asked_by_text_completion_and_span_with_its_head(tmp_path):
    make_masked().float().save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    data = write_jsonl(tmp_path / "d.jsonl", [{"id": r["id"], "text": r["text"]} for r in labelled(20)])
    options = "--model", tmp_path / "m", "--data", data, "--out", tmp_path / "i", "-o", "task=masked-lm"
    done = run("build", *options)
    assert done.exit_code == 0, done.output
    client = Client(tmp_path / "i")
    assert "head" in {component.role for component in client.index.manifest.components}
    assert client.query(text=client.index.example(3).text, mode="cosine").proponents[0].row == 3
    first, second = ["w5", "w6"]
    spanned, completed = client.scores([Query(text=f"{first} {second}", span=second), Query(prompt=f"{first} ", completion=second)])
    assert_close(spanned, completed, 1e-5)


def test_long_texts_of_a_masked_language_model_are_split(tmp_path):
    records = [{"id": "long", "text": " ".join(f"w{i % 50 + 1}" for i in range(80))}]
    index = build(make_masked(), records, tmp_path / "i", tokenizer=tokenizer(), task="masked-lm", **WHOLE)
    assert [len(index.example(row).token_ids) for row in range(len(index))] == [32, 32, 16]
    assert " ".join(index.example(row).text for row in range(3)) == records[0]["text"]


def test_rows_of_an_encoder_decoder_equal_autograd(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    made = tokenizer()
    config = T5Config(
        **dict(vocab_size=70, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=made.pad_token_id, eos_token_id=0),
        **dict(decoder_start_token_id=made.pad_token_id, tie_word_embeddings=False),
    )
    model = random_(T5ForConditionalGeneration(config))
    records = [{name: text.strip() for name, text in r.items() if name in ("id", "prompt")} | {"completion": r["chosen"]} for r in pairs()]
    index = build(model, records, tmp_path / "i", tokenizer=made, task="seq2seq", batch_tokens=40, **WHOLE)
    names = index.component("blocks").layer_names
    assert {"encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.k"} <= set(names)

    def loss(row):
        read = made(records[row]["prompt"], return_tensors="pt").input_ids
        labels = made(records[row]["completion"], return_tensors="pt").input_ids
        return F.cross_entropy(model(input_ids=read, labels=labels).logits[0], labels[0], reduction="sum")

    check_rows(model, index, loss)
    kfac = build(model, records, tmp_path / "k", tokenizer=made, task="seq2seq", **(WHOLE | {"curvature": "kfac", "rank": 4}))
    assert np.isfinite(kfac.vectors(0, kfac.component("blocks")).values).all()
    headed = build(model, records, tmp_path / "h", tokenizer=made, task="seq2seq", dtype="float64", components=("head",))
    client = Client(headed.path, model=model, tokenizer=made)
    assert client.query(prompt=records[4]["prompt"], completion=records[4]["completion"], mode="cosine").proponents[0].row == 4


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_rows_of_sentence_embeddings_equal_autograd(pooling, tmp_path):
    from transformers import BertConfig, BertModel

    made = tokenizer()
    model = random_(BertModel(BertConfig(**_SIZES, intermediate_size=24, pad_token_id=made.pad_token_id)))
    generator = np.random.default_rng(2)
    records = [
        {
            **{"id": f"e{i}", "anchor": words(generator, 3), "positive": words(generator, 4)},
            "negatives": [words(generator, int(generator.integers(1, 6))) for _ in range(1 + i % 3)],
        }
        for i in range(8)
    ]
    task = f"embedding(scale=5, pooling={pooling})"
    index = build(model, records, tmp_path / "i", tokenizer=made, task=task, batch_tokens=1000, **WHOLE)

    def vector(text):
        states = model(**made(text, return_tensors="pt")).last_hidden_state[0]
        return F.normalize({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling], dim=0)

    def loss(row):
        record = records[row]
        anchor, others = vector(record["anchor"]), [record["positive"], *record["negatives"]]
        return F.cross_entropy(5 * torch.stack([anchor @ vector(text) for text in others])[None], torch.tensor([0]))

    check_rows(model, index, loss)
    assert "pooler.dense" not in index.component("blocks").layer_names  # which this loss does not read
    with pytest.raises(UsageError, match=r"no gradient of the loss reaches the layer pooler\.dense"):
        build(model, records, tmp_path / "j", tokenizer=made, task=task, layers=("pooler.dense",))
    client = Client(index.path, model=model, tokenizer=made)
    texts = [records[2]["anchor"], records[2]["positive"], *records[2]["negatives"]]
    assert client.query(texts=texts, mode="cosine").proponents[0].id == "e2"
    with pytest.raises(UsageError, match="there are 0 texts"):
        client.query(text="w1 w2")
    with pytest.raises(UsageError, match="there are 2 texts; give an anchor, a positive text and at least one negative"):
        client.query(texts=texts[:2])  # whose loss would be 0


def test_texts_are_asked_from_a_file_on_the_command_line(tmp_path):
    from transformers import BertConfig, BertModel

    made = tokenizer()
    BertModel(BertConfig(**_SIZES, intermediate_size=24, pad_token_id=made.pad_token_id)).save_pretrained(tmp_path / "m")
    made.save_pretrained(tmp_path / "m")
    generator = np.random.default_rng(2)
    records = [{"id": f"e{i}", **{name: words(generator, 4) for name in ("anchor", "positive", "negative")}} for i in range(8)]
    data = write_jsonl(tmp_path / "d.jsonl", records)
    assert run("build", "--model", tmp_path / "m", "--data", data, "--out", tmp_path / "i", "-o", "task=embedding").exit_code == 0
    file = write_jsonl(tmp_path / "q.jsonl", [{"texts": [r["anchor"], r["positive"], r["negative"]]} for r in records[:3]])
    result = run("query", tmp_path / "i", "--file", file, "--mode", "cosine", "--json")
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["proponents"][0]["id"] for line in result.stdout.splitlines()] == ["e0", "e1", "e2"]
    assert " is like " in run("query", tmp_path / "i", "--file", file).stdout


def test_anchors_without_negatives_are_refused(tmp_path):
    from wherefrom.store.corpus import Corpus
    from wherefrom.store.fields import Fields

    def read(record):
        return next(iter(Corpus([str(write_jsonl(tmp_path / "p.jsonl", [record]))], Fields(form="texts"))))

    assert "there are no negatives" in str(read({"anchor": "a", "positive": "b"}))
    assert read({"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d", "negative": "e"}).texts[2:] == ("c", "d", "e")


def pictures(folder, count=10):
    """PNG files of random pixels, and records that name them."""
    from PIL import Image

    generator = np.random.default_rng(3)
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (20 + i, 24, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    return [{"id": f"i{i}", "image": f"pictures/{i}.png", "label": i % 3} for i in range(count)]


def make_vision(kind):
    from transformers import AutoConfig, AutoModelForImageClassification

    sizes = {
        "vit": dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4),
        "resnet": dict(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic"),
        "swin": dict(embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=2, image_size=16, patch_size=2),
    }[kind]
    return random_(AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, num_labels=3, **sizes)))


def make_processor():
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 16, "width": 16})


@pytest.mark.parametrize("kind", ["vit", "resnet", "swin"])
def test_rows_of_image_classifiers_equal_autograd(kind, tmp_path):
    from PIL import Image

    records = pictures(tmp_path / "pictures")
    data = write_jsonl(tmp_path / "d.jsonl", records)
    model, processor = make_vision(kind), make_processor()
    if kind == "resnet":
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2.0)
    index = build(model, data, tmp_path / "i", tokenizer=processor, task="image-classification", **WHOLE)
    assert index.manifest.build.tracked[0].share > 0.8

    def loss(row):
        image = Image.open(tmp_path / records[row]["image"]).convert("RGB")
        pixels = processor([image], return_tensors="pt")["pixel_values"].double()
        return F.cross_entropy(model(pixel_values=pixels).logits, torch.tensor([records[row]["label"]]))

    check_rows(model, index, loss)
    client = Client(index.path, model=model, tokenizer=processor)
    image = tmp_path / records[4]["image"]
    assert client.query(image=image, label=1, mode="cosine").proponents[0].id == "i4"
    assert client.query(image=image.read_bytes(), label=1, mode="cosine").proponents[0].id == "i4"


def test_images_are_built_and_asked_on_the_command_line(tmp_path):
    make_vision("vit").float().save_pretrained(tmp_path / "m")
    make_processor().save_pretrained(tmp_path / "m")
    records = pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "no.png").write_text("no image")
    data = write_jsonl(tmp_path / "d.jsonl", records)
    task = "-o", "task=image-classification"
    options = "--model", tmp_path / "m", "--data", data, "--out", tmp_path / "i", *task
    done = run("build", *options)
    assert done.exit_code == 0, done.output
    result = run("query", tmp_path / "i", "--image", tmp_path / "pictures" / "5.png", "--label", "2", "--mode", "cosine", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["proponents"][0]["id"] == "i5"
    assert answer["proponents"][0]["text"] == "24 x 25 pixels, label 2"
    assert "an image" in run("query", tmp_path / "i", "--image", tmp_path / "pictures" / "5.png", "--label", "2").stdout
    assert run("verify", tmp_path / "i").exit_code == 0
    for arguments, message in (
        (("--image", tmp_path / "none.png", "--label", "1"), "cannot be read"),
        (("--image", tmp_path / "pictures" / "no.png", "--label", "1"), "give a PNG, JPEG or another file"),
        (("--image", tmp_path / "pictures" / "5.png"), "this task needs the fields image and label"),
        (("--text", "w1"), "the index holds images"),
    ):
        refused = run("query", tmp_path / "i", *arguments)
        assert (refused.exit_code in (1, 2), message in refused.stderr) == (True, True), refused.output
    outside = write_jsonl(tmp_path / "o.jsonl", [records[0] | {"image": "../../etc/passwd"}])
    refused = run("build", "--model", tmp_path / "m", "--data", outside, "--out", tmp_path / "j", *task)
    assert (refused.exit_code, "there is no image" in refused.stderr) == (1, True), refused.output


def test_the_names_and_options_of_tasks():
    from wherefrom.indexer.models import TASK_NAMES
    from wherefrom.indexer.tasks import _TASKS, find_task

    assert tuple(_TASKS) == TASK_NAMES
    assert find_task("dpo(beta=0.5, reference=a/b)").reference == "a/b"
    for name, message in (
        ("dpo(gamma=1)", "its options are beta, reference"),
        ("dpo(beta=x)", "not a number"),
        ("dpo(beta=0)", "beta is above 0"),
        ("causal-lm(a=1)", "it has no options"),
        ("dpo(beta=1", "name(option=value"),
        ("embedding(pooling=max)", "pooling is mean, cls or last"),
    ):
        with pytest.raises(UsageError, match=message.replace("(", r"\(")):
            find_task(name)


class Denoiser(torch.nn.Module):
    """A denoiser with convolutions, a linear layer of the timestep, and attention's kind of linear layer over places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1)
        self.time, self.mix = torch.nn.Linear(2, 4), torch.nn.Linear(4, 4)

    def forward(self, x, t):
        angles = t.to(x.dtype)[:, None] / 20
        h = torch.tanh(self.first(x) + self.time(torch.cat([angles.sin(), angles.cos()], 1))[:, :, None, None])
        return self.second(h + torch.tanh(self.mix(h.flatten(2).transpose(1, 2))).transpose(1, 2).reshape(h.shape))


def diffusion_records(count=6, size=16):
    generator = np.random.default_rng(5)
    return [{"id": f"x{i}", "features": generator.uniform(-1, 1, size).round(3).tolist()} for i in range(count)]


def draws_of(task, values, draws):
    """The timesteps, and the noise, of an example."""
    from wherefrom.indexer.batches import Batch

    inputs = torch.tensor([values], dtype=torch.float32)
    mask = torch.ones((1, 1), dtype=torch.bool)
    return task._draw(Batch(("x",), inputs, torch.zeros((1, 1), dtype=torch.long), mask), draws)


@pytest.mark.parametrize(("objective", "schedule"), [("loss", "linear"), ("square", "cosine")])
def test_rows_of_a_denoiser_equal_autograd(objective, schedule, tmp_path):
    from wherefrom.indexer.tasks import find_task

    model, records = random_(Denoiser()), diffusion_records()
    name = f"diffusion(shape=1x4x4, timesteps=50, draws=5, objective={objective}, schedule={schedule})"
    index = build(model, records, tmp_path / "i", task=name, batch_tokens=4, **WHOLE)
    assert set(index.component("blocks").layer_names) == {"first", "second", "time", "mix"}
    task = find_task(name)
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 50)) if schedule == "linear" else task.signal

    def loss(row):
        steps, noise = draws_of(task, records[row]["features"], 5)
        x, total = torch.tensor(records[row]["features"], dtype=torch.float32).double().view(1, 1, 4, 4), 0
        assert [int(s * 5 / 50) for s in steps] == [0, 1, 2, 3, 4]  # spread evenly
        for t, drawn in zip(steps, noise, strict=True):
            e = torch.from_numpy(drawn).view(1, 1, 4, 4)
            noisy = signal[t] ** 0.5 * x + (1 - signal[t]) ** 0.5 * e
            target = e if objective == "loss" else torch.zeros_like(e)
            total = total + (target - model(noisy, torch.tensor([t]))).square().sum() / 2 / 5
        return total

    check_rows(model, index, loss)


def test_measurements_of_a_denoiser_are_their_formulas(tmp_path):
    from wherefrom.indexer.tasks import find_task

    model = random_(Denoiser())
    betas = np.linspace(1e-4, 0.02, 30)
    alphas = np.cumprod(1 - betas)

    def value(measurement, features):
        task = find_task(f"diffusion(shape=1x4x4, timesteps=30, query_draws=30, measurement_of_queries={measurement})")
        client_examples = list(task.converter(ModelSource("none")).documents([_document(features)]))
        with torch.no_grad():
            return task, float(task.measurement(model, task.collate(client_examples, torch.device("cpu")))[0])

    (record,) = diffusion_records(1)
    task, elbo = value("elbo", record["features"])
    steps, noise = draws_of(task, record["features"], 30)
    assert sorted(steps) == list(range(30))
    x, expected = torch.tensor(record["features"], dtype=torch.float32).double().view(1, 1, 4, 4), 0.0
    with torch.no_grad():
        for t, drawn in zip(steps, noise, strict=True):
            e = torch.from_numpy(drawn).view(1, 1, 4, 4)
            predicted = model(alphas[t] ** 0.5 * x + (1 - alphas[t]) ** 0.5 * e, torch.tensor([t]))
            variance = betas[t]  # of a step backwards
            weight = betas[t] ** 2 / (2 * variance * (1 - betas[t]) * (1 - alphas[t]))
            expected += weight * float((e - predicted).square().sum())
    assert_close(elbo, expected, 1e-6)

    generator = np.random.default_rng(0)
    states = generator.standard_normal((31, 16)).astype(np.float32)
    _, trajectory = value("trajectory", states.ravel().tolist())
    expected = 0.0
    with torch.no_grad():
        for t in range(30):  # from x_(t+1) to x_t
            before, after = (torch.from_numpy(states[30 - i]).double().view(1, 1, 4, 4) for i in (t + 1, t))
            mean = (before - betas[t] / (1 - alphas[t]) ** 0.5 * model(before, torch.tensor([t]))) / (1 - betas[t]) ** 0.5
            normal = torch.distributions.Normal(mean, betas[t] ** 0.5)
            constant = 16 * (np.log(betas[t]) / 2 + np.log(2 * np.pi) / 2)
            expected -= float(normal.log_prob(after).sum()) + constant
    assert_close(trajectory, expected, 1e-5)


def _document(features):
    from wherefrom.store.corpus import Document

    return Document(id="x", source="s", where="here", features=np.array(features, np.float32))


def test_labels_that_are_drawn_give_the_gauss_newton_matrix(tmp_path):
    """The mean of the gradients' second moments, times the number of draws, is J^T J, averaged over draws (Mlodozeniec et al., eq. 7)."""
    from wherefrom.indexer.tasks import find_task

    model = random_(Denoiser())
    records = diffusion_records(1)
    task = find_task("diffusion(shape=1x4x4, timesteps=50, draws=4)")
    batch = task.collate(list(task.converter(ModelSource("none")).documents([_document(records[0]["features"])])), torch.device("cpu"))
    weight = model.time.weight.requires_grad_(True)
    total, seeds = 0, 4000
    for seed in range(seeds):
        (g,) = torch.autograd.grad(task.loss(model, batch, seed).sum(), weight)
        total = total + torch.outer(g.flatten(), g.flatten()) / seeds
    steps, noise = draws_of(task, records[0]["features"], 4)
    x, expected = batch.inputs.double().view(1, 1, 4, 4), 0
    for t, e in zip(steps, noise, strict=True):
        noisy = task.signal[t] ** 0.5 * x + (1 - task.signal[t]) ** 0.5 * torch.from_numpy(e).view(1, 1, 4, 4)
        output = model(noisy, torch.tensor([t])).flatten()
        jacobian = torch.stack([torch.autograd.grad(o, weight, retain_graph=True)[0].flatten() for o in output])
        expected = expected + jacobian.T @ jacobian / 4
    weight.requires_grad_(False)
    assert_close(4 * total.numpy(), expected.numpy(), 0.1)


def test_rows_of_a_unet_with_attention_equal_autograd(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from wherefrom.indexer.tasks import find_task

    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4)
    unet = diffusers.UNet2DModel(sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, **blocks)
    model, records = random_(unet), diffusion_records(3)
    name = "diffusion(shape=1x4x4, timesteps=50, draws=3)"
    index = build(model, records, tmp_path / "i", task=name, batch_tokens=3, **WHOLE)
    assert any("attentions" in layer and "to_q" in layer for layer in index.component("blocks").layer_names)
    task = find_task(name)

    def loss(row):
        steps, noise = draws_of(task, records[row]["features"], 3)
        x, total = torch.tensor(records[row]["features"], dtype=torch.float32).double().view(1, 1, 4, 4), 0
        for t, drawn in zip(steps, noise, strict=True):
            e = torch.from_numpy(drawn).view(1, 1, 4, 4)
            noisy = task.signal[t] ** 0.5 * x + (1 - task.signal[t]) ** 0.5 * e
            total = total + (e - model(noisy, torch.tensor([t])).sample).square().sum() / 2 / 3
        return total

    check_rows(model, index, loss, rows=range(3))
    client = Client(index.path, model=model)
    for size in (32, 5):  # no whole input, and two
        with pytest.raises(UsageError, match=f"vectors of {size} numbers, and the shape 1x4x4 takes 16"):
            client.query(features=[0.1] * size)


def test_a_unet_is_built_from_images_and_asked_on_the_command_line(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4)
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, **blocks)
    unet.save_pretrained(tmp_path / "unet")
    records = [{k: v for k, v in r.items() if k != "label"} for r in pictures(tmp_path / "pictures")]
    data = write_jsonl(tmp_path / "d.jsonl", records)
    task = "task=diffusion(shape=1x8x8, source=image, draws=4, query_draws=8)"
    done = run("build", "--model", tmp_path / "unet", "--data", data, "--out", tmp_path / "i", "-o", task, "-o", "labels=sampled")
    assert done.exit_code == 0, done.output
    info = json.loads(run("info", tmp_path / "i", "--json").stdout)
    assert info["rows"] == 10
    result = run("query", tmp_path / "i", "--image", tmp_path / "pictures" / "3.png", "--mode", "cosine", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["proponents"][0]["id"] == "i3"
    refused = run("query", tmp_path / "i", "--text", "w1")
    assert (refused.exit_code, "an image or features" in refused.stderr) == (2, True)
    nothing = run("build", "--model", tmp_path / "none", "--data", data, "--out", tmp_path / "j", "-o", task)
    assert (nothing.exit_code, "there is no UNet2DModel" in nothing.stderr) == (2, True), nothing.output


def test_a_task_of_ones_own_is_two_functions(tmp_path):
    """A loss and a measurement, over a model in memory; nothing else is said."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 3, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(12, 16)
    model = random_(torch.nn.Sequential(*layers))
    records = diffusion_records(8)
    task = "training:Autoencoder(shape=1x4x4)"
    index = build(model, records, tmp_path / "i", task=task, **WHOLE)

    def loss(row):
        x = torch.tensor(records[row]["features"], dtype=torch.float32).double()
        return (model(x.view(1, 1, 4, 4))[0] - x).square().sum() / 2

    check_rows(model, index, loss)
    client = Client(index.path, model=model, task=task)
    query = client.encode([Query(features=records[3]["features"])])["blocks"].values[0]
    found = gradients(model, lambda: (model(torch.tensor([records[3]["features"]]).double().view(1, 1, 4, 4)) ** 2).sum(), ["0", "3"])
    assert_close(query, np.concatenate([found[name].reshape(-1).numpy() for name in ("0", "3")]), 1e-5)
    for features, message in (([0.0, 0.5], "vectors of 2 numbers, and the shape 1x4x4 takes 16"), ([[0.0, 0.5]], "not a flat list")):
        with pytest.raises(UsageError, match=message):
            client.query(Query(features=features))
    with pytest.raises(UsageError, match="takes no seed"):
        build(model, records, tmp_path / "j", task=task, labels="sampled", **WHOLE)
    assert build(model, records, tmp_path / "k", task=task).manifest.components[0].curvature.labels == "data"


def _sequences(lengths):
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    return Example(f"e{len(lengths)}-{sum(lengths)}", "text", "s", ids, ids % 3 == 0, lengths=tuple(lengths))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lists=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=5), label=st.none() | st.integers(0, 99))
def test_sequences_labels_and_images_are_stored_and_read(lists, label, tmp_path):
    from dataclasses import replace

    examples = [replace(_sequences(lengths), label=label, id=str(i)) for i, lengths in enumerate(lists)]
    write_documents(tmp_path / "d.arrow", examples)
    for written, read in zip(examples, Documents(tmp_path / "d.arrow", len(examples)), strict=True):
        assert (read.lengths, read.label) == (written.lengths, label)
        parts = read.sequences()
        assert [len(ids) for ids, _ in parts] == list(written.lengths)
        assert np.array_equal(np.concatenate([ids for ids, _ in parts]), written.token_ids)
    none = np.zeros(0, np.int32)
    image = Example("i", "text", "s", none, none.astype(bool), image=bytes(range(256)), label=label)
    write_documents(tmp_path / "i.arrow", [image])
    assert Documents(tmp_path / "i.arrow", 1)[0].image == image.image


def test_sequences_that_do_not_fit_their_tokens_are_refused(tmp_path):
    import pyarrow as pa
    from wherefrom.store.documents import _FIXED, _OPTIONAL

    for lengths in ([3, 4], [8, 0], [9, -1], []):
        record = {"id": ["a"], "document": ["a"], "chunk": [0], "text": ["t"], "source": ["s"]}
        record |= {"token_ids": [list(range(1, 9))], "loss_mask": [[False] * 8], "lengths": [lengths]}
        schema = pa.schema([*_FIXED, _OPTIONAL["lengths"]])
        with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(pa.table(record, schema=schema))
        with pytest.raises(IntegrityError, match="the lengths of sequences"):
            Documents(tmp_path / "d.arrow", 1)[0]


def test_a_label_that_some_examples_lack_is_refused(tmp_path):
    examples = [
        Example(str(i), "t", "s", np.array([1, 2], np.int32), np.array([False, True]), label=label) for i, label in enumerate((1, None))
    ]
    with pytest.raises(DataError, match="has no label, which others have"):
        write_documents(tmp_path / "d.arrow", examples)
