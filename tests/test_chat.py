"""Indexed parts of a chat: the tokens and loss mask that TRL's SFTTrainer makes of the same record, and turns under many templates."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from wherefrom.indexer.chat import Conversation
from wherefrom.indexer.examples import TextConverter
from wherefrom.store.corpus import Document, read_corpus
from wherefrom.store.errors import DataError, UsageError
from wherefrom.store.fields import Fields

trl = pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[test]'")
TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
FAMILIES = sorted(p.name.removesuffix("_training.jinja") for p in TEMPLATES.glob("*_training.jinja"))

USER, SAID = {"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello you"}
CHATS = {
    "single": [USER, SAID],
    "multi": [USER, SAID, {"role": "user", "content": "and now?"}, {"role": "assistant", "content": "so long"}],
    "system": [{"role": "system", "content": "be brief"}, USER, SAID, USER, {"role": "assistant", "content": "so long"}],
    "thinking": [
        USER,
        {**SAID, "content": "<think>\nhm\n</think>\n\nhello you"},
        USER,
        {**SAID, "content": "<think>\nso\n</think>\n\nso long"},
    ],
    "tools": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"city": "X"}}}]},
        {"role": "tool", "name": "w", "content": "12 C"},
        {"role": "assistant", "content": "It is 12."},
    ],
}


class Templated:
    """A tokenizer as far as its chat template goes."""

    def __init__(self, template):
        self._template = template
        self.special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

    def get_chat_template(self, tools=None):
        return self._template


def turns(template, messages):
    chat = Conversation(Templated(template), messages, {})
    return chat.text, [chat.text[start:end] for start, end in chat.assistant_spans()]


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_under_the_templates_of_the_field(family):
    """Templates as models ship them, without marks: each turn ends where TRL's marked variant of the template ends it, and begins behind
    the generation prompt (some variants mark that, too).
    """
    plain, marked = ((TEMPLATES / f"{family}{end}.jinja").read_text() for end in ("", "_training"))
    compared, refused = 0, []
    for name, messages in CHATS.items():
        try:
            text, ours = turns(plain, messages)
        except DataError as error:
            refused += [name] if "rejects these messages" in str(error) else [str(error)]
            continue
        answers = [m["content"].rpartition("</think>")[2].strip() for m in messages if m["role"] == "assistant"]
        assert len(ours) == len(answers), (name, ours)
        for said, answer in zip(ours, answers, strict=True):
            assert answer in said, (name, ours)
            assert "hi there" not in said, (name, ours)
            assert "12 C" not in said, (name, ours)
        try:
            other, theirs = turns(marked, messages)
        except DataError:
            continue
        if text == other and len(theirs) == len(ours):
            compared += 1
            if name != "tools":
                assert all(a.rstrip().endswith(b.rstrip()) for a, b in zip(theirs, ours, strict=True)), (name, theirs, ours)
    assert set(refused) <= {"system", "tools"}
    assert compared or family in ("glm4moe", "llava_next", "diffusion_gemma", "phi3", "phi3_5"), family


def byte_tokenizer(template=None, bos=None):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(bytes_to_unicode().values())}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *([bos] if bos else [])]
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in named])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 259)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


MARKED = """{% if tools %}<|im_start|>system
{% for t in tools %}{{ t | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' %}{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}\
{% generation %}{{ m['content'] }}{% for c in m['tool_calls'] or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}\
<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""
TOOL = {"type": "function", "function": {"name": "w", "description": "looks up w", "parameters": {"type": "object", "properties": {}}}}
RECORDS = {
    "marked": (MARKED, {"messages": [USER, {**SAID, "reasoning_content": "hm"}, USER, SAID]}),
    "tools": (MARKED, {"messages": CHATS["tools"], "tools": [TOOL]}),
    "tools as text": (MARKED, {"messages": [USER, SAID], "tools": '[{"type": "function", "function": {"name": "w"}}]'}),
    "prompt and completion": (MARKED, {"prompt": [USER], "completion": [SAID], "tools": [TOOL]}),
    "template options": (MARKED, {"prompt": [USER], "completion": [SAID], "chat_template_kwargs": {"enable_thinking": True}}),
    "qwen3": ((TEMPLATES / "qwen3_training.jinja").read_text(), {"messages": CHATS["thinking"], "tools": [TOOL]}),
    "qwen3, prompt and completion": (
        (TEMPLATES / "qwen3.jinja").read_text(),
        {"prompt": CHATS["thinking"][:3], "completion": CHATS["thinking"][3:]},
    ),
    "words": (None, {"prompt": "The capital of France is", "completion": " Paris"}),
    "a text": (None, {"text": "Once upon a time."}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_tokens_and_mask_are_those_that_trl_trains_on(tmp_path, name):
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    template, record = RECORDS[name]
    tokenizer = byte_tokenizer(template)
    config = AutoConfig.for_model("llama", vocab_size=264, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    torch.manual_seed(0)
    options = dict(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], max_length=None, bf16=False)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=SFTConfig(assistant_only_loss="messages" in record, **options),
        train_dataset=Dataset.from_list([record]),
        processing_class=tokenizer,
    )
    trained = trainer.train_dataset[0]
    path = tmp_path / "d.jsonl"
    Dataset.from_list([record]).to_json(path)
    (example,) = TextConverter(tokenizer, 4096).documents(read_corpus([str(path)]))
    labels = np.array(trained["labels"])
    labels[0] = -100  # nothing predicts the first token
    last = int(np.flatnonzero(labels != -100)[-1]) + 1  # what follows the last token of the loss is not stored: it cannot change it
    assert example.token_ids.tolist() == trained["input_ids"][:last]
    assert np.where(example.loss_mask, example.token_ids, -100).tolist() == labels[:last].tolist()


def encoded(tmp_path, record, template, bos=None, fields=Fields()):
    import json

    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (example,) = TextConverter(byte_tokenizer(template, bos), 4096).documents(read_corpus([str(path)], fields))
    return example


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_shared_conversations_and_nulls_of_tables_are_read(tmp_path):
    record = {"conversations": [{"from": "human", "value": "hi there"}, {"from": "gpt", "value": "hello you"}]}
    shared = encoded(tmp_path, record, CHATML, fields=Fields(form="chat", messages="conversations"))
    chat = encoded(tmp_path, {"messages": [{**USER, "tool_calls": None}, {**SAID, "name": None}], "tools": None}, CHATML)
    assert shared.token_ids.tolist() == chat.token_ids.tolist()
    assert "<|im_start|>assistant\nhello you<|im_end|>" in chat.text


def test_a_template_that_asks_every_message_for_content_gets_it(tmp_path):
    strict = "{% for m in messages %}[{{ m.role + ':' + m['content'] }}]{% endfor %}"
    chat = [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "w"}}]}, {"role": "tool", "content": "12"}, SAID]
    assert encoded(tmp_path, {"messages": chat}, strict).text == "[user:hi there][assistant:][tool:12][assistant:hello you]"


def ask(encoder, span=None, tools=None, **fields):
    return encoder.query(Document("query", "query", "the query", template={"tools": tools} if tools else {}, **fields), span)


def test_a_text_that_has_its_first_token_already_gets_no_second(tmp_path):
    tokenizer = byte_tokenizer(bos="<s>")
    for text in ("<s>hi there", "hi there"):
        example = encoded(tmp_path, {"text": text}, None, bos="<s>")
        assert example.token_ids.tolist() == [259, *b"hi there", 256][: len(example.token_ids)] or example.token_ids[0] == 259
        assert (example.token_ids == 259).sum() == 1
        encoded_text = ask(TextConverter(tokenizer, 4096), text=text)
        assert encoded_text.token_ids.tolist() == example.token_ids.tolist()
        assert (ask(TextConverter(tokenizer, 4096), prompt=text, completion=" you").token_ids == 259).sum() == 1


def test_a_query_of_messages_is_what_the_document_is(tmp_path):
    encoder = TextConverter(byte_tokenizer(MARKED), 4096)
    document = encoded(tmp_path, {"messages": CHATS["tools"], "tools": [TOOL]}, MARKED)
    example = ask(encoder, messages=CHATS["tools"], tools=[TOOL])
    length = len(document.token_ids)
    assert example.token_ids[:length].tolist() == document.token_ids.tolist()
    assert example.loss_mask[:length].tolist() == document.loss_mask.tolist()
    assert not example.loss_mask[length:].any()
    span = ask(encoder, messages=CHATS["multi"], span="so long")
    assert bytes(span.token_ids[span.loss_mask].tolist()) == bytes(byte_tokenizer()("so long").input_ids)
    with pytest.raises(UsageError, match="occurs 0 times"):
        ask(encoder, messages=CHATS["multi"], span="hi there")
    with pytest.raises(UsageError, match="rejects these messages"):
        ask(TextConverter(byte_tokenizer("{{ raise_exception('no system role') }}"), 64), messages=[USER, SAID])


def test_templates_that_are_none_or_take_text_alone(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = 5
    with pytest.raises(UsageError, match="no chat template"):
        ask(TextConverter(tokenizer, 64), messages=[USER, SAID])
    parts = {"role": "user", "content": [{"type": "text", "text": "hi there"}]}
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    with pytest.raises(UsageError, match="accepts text, and these contents are lists of parts"):
        ask(TextConverter(byte_tokenizer(plain), 64), messages=[parts, SAID])


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"messages": [{"role": "user"}]}, "must be a list of messages"),
        ({"messages": "hi"}, "must be a list of messages"),
        ({"messages": [USER, SAID], "tools": "{"}, "'tools' is text that is not valid JSON"),
        ({"messages": [USER, SAID], "tools": {"a": 1}}, "'tools' must be a list"),
        ({"messages": [USER, SAID], "chat_template_kwargs": {"messages": []}}, "'chat_template_kwargs' must be"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "for preference pairs"),
    ],
)
def test_chats_that_cannot_be_used_are_said(tmp_path, record, sentence):
    actual = encoded(tmp_path, record, CHATML)
    assert isinstance(actual, DataError)
    assert sentence in str(actual)


def test_a_first_message_of_the_assistants_and_options_that_move_the_text(tmp_path):
    example = encoded(tmp_path, {"messages": [SAID]}, CHATML)
    said = byte_tokenizer().decode(example.token_ids[example.loss_mask])
    assert said == "hello you<|im_end|>\n"
    for option in ("continue_final_message", "add_generation_prompt", "tokenize"):
        assert isinstance(encoded(tmp_path, {"messages": [USER, SAID], "chat_template_kwargs": {option: True}}, CHATML), DataError)
    assert isinstance(encoded(tmp_path, {"messages": [USER, {"role": "assistant", "content": {"a": 1}}]}, CHATML), DataError)
    from wherefrom import Query

    with pytest.raises(UsageError, match="messages must be a list"):
        Query(messages=[{"role": "user", "content": b"x"}])
