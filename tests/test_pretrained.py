"""SmolLM2-135M-Instruct, a pretrained model with tied vocabulary layers and a chat template: rows against autograd, and what they find.

The model is not part of the repository. `benchmarks/pretrained_pack.py convert` saves it from its GGUF file; WHEREFROM_SMOLLM2 names the
directory. Without it, these tests are skipped.
"""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_jsonl
from test_gradients import autograd_gradients
from wherefrom import BuildConfig, Client, Query
from wherefrom.indexer.models import ModelSource
from wherefrom.indexer.tasks import CausalLM
from wherefrom.ray_jobs.build import build

pytestmark = [pytest.mark.pretrained, pytest.mark.slow]

TEXTS = [
    "The capital of Mongolia is Ulaanbaatar, on the river Tuul.",
    "To poach an egg, slide it into water that simmers, and wait for three minutes.",
    "A binary search halves the interval that holds the answer at every step.",
    "Sodium reacts with water to sodium hydroxide and hydrogen.",
    "Wolves live in packs that a breeding pair leads.",
    "The treaty of Westphalia ended the Thirty Years' War in 1648.",
    "Knead the dough for ten minutes, then let it rest until it has doubled.",
    "The derivative of the sine is the cosine.",
]
MESSAGES = [
    {"role": "user", "content": "What does a barometer measure?"},
    {"role": "assistant", "content": "The pressure of the air."},
    {"role": "user", "content": "And a hygrometer?"},
    {"role": "assistant", "content": "Its moisture."},
]


@pytest.fixture(scope="module")
def smollm2():
    directory = Path(os.environ.get("WHEREFROM_SMOLLM2", ""))
    if not (directory / "model.safetensors").is_file():
        pytest.skip("WHEREFROM_SMOLLM2 names no directory of SmolLM2-135M-Instruct")
    return directory


@pytest.fixture(scope="module")
def client(smollm2, tmp_path_factory):
    here = tmp_path_factory.mktemp("pretrained")
    corpus = write_jsonl(here / "corpus.jsonl", [{"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)])
    chat = write_jsonl(here / "chat.jsonl", [{"id": "chat", "messages": MESSAGES}])
    build(BuildConfig(model=str(smollm2), data=(str(corpus), str(chat)), out=str(here / "a.wherefrom")))
    return Client(here / "a.wherefrom")


def test_a_default_row_of_a_large_model_is_head_and_blocks(client):
    assert [component.role for component in client.index.manifest.components] == ["head", "blocks"]
    assert {component.curvature.kind for component in client.index.manifest.components} == {"kfac"}
    assert client.index.manifest.build.batch_tokens == 256


def test_texts_of_several_lengths_share_batches(smollm2):
    """Round-off of 30 layers is not taken for predictions that depend on the padding."""
    for dtype in ("float32", "bfloat16"):
        model = CausalLM().load(ModelSource(str(smollm2), dtype=dtype))
        assert list(CausalLM().splits(model, 2000)) == [], dtype


def test_rows_of_the_head_are_autograds(client):
    encoder = client.encoder.component_encoders["head"]
    model = copy.deepcopy(client.encoder.model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # whose gradient is the head's alone
    examples = [client.index.example(row) for row in range(len(TEXTS))]
    rows = client.encoder.rows(examples, exact=True)["head"]
    for i, example in enumerate(examples):
        [gradient], _ = autograd_gradients(model, (encoder.layer,), example)
        keys = rows.keys[rows.indptr[i] : rows.indptr[i + 1]]
        assert keys.tolist() == sorted(set(example.token_ids[1:][example.loss_mask[1:]].tolist()))
        expected = gradient[keys] @ encoder.basis.double().numpy() * encoder.scale(torch.from_numpy(keys)).double().numpy()
        difference = rows.vectors[rows.indptr[i] : rows.indptr[i + 1]] - expected
        assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(expected)


def test_rows_of_the_blocks_are_autograds(client):
    encoder = client.encoder.component_encoders["blocks"]
    examples = [client.index.example(row) for row in range(3)]
    rows = client.encoder.rows(examples, exact=True)["blocks"].values
    layers = [layer for layer in encoder.layers if layer.name.split(".")[2] in ("0", "17", "29")]
    assert {layer.name.rpartition(".")[2] for layer in layers} == {"k_proj", "v_proj", "down_proj"}
    for row, example in zip(rows, examples, strict=True):
        gradients, _ = autograd_gradients(client.encoder.model, layers, example)
        for layer, gradient in zip(layers, gradients, strict=True):
            right, left = (map_.double().numpy() for map_ in encoder.maps[layer.name])
            expected = (left @ gradient @ right.T).ravel() * encoder._whiteners[layer.name].double().numpy()
            difference = row[layer.offset : layer.offset + layer.size] - expected
            assert np.linalg.norm(difference) < 2e-3 * np.linalg.norm(expected), layer.name


def test_every_text_asked_back_is_the_first(client):
    for row, text in enumerate(TEXTS):
        assert client.query(text=text, k=1).proponents[0].row == row


def test_the_loss_of_a_chat_is_on_the_assistants_turns(client, smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = client.index.example(len(TEXTS))
    predicted = tokenizer.decode(chat.token_ids[chat.loss_mask])
    assert predicted.count("<|im_end|>") == 2
    assert predicted.replace("<|im_end|>", "").replace("\n", "") == "The pressure of the air.Its moisture."
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert tokenizer.decode(chat.token_ids).strip() == rendered.strip()
    example = client.query_examples([Query(messages=MESSAGES)])[0]
    assert example.token_ids.tolist() == chat.token_ids.tolist()
    assert client.query(messages=MESSAGES, k=1).proponents[0].id == "chat"
