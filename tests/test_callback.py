"""The Trainer's callback, in real trainings of a tiny model."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, load_dataset
from helpers import make_model, make_tokenizer, random_texts, write_jsonl
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from wherefrom import Client
from wherefrom.callback import WherefromCallback
from wherefrom.indexer.models import ModelSource, load_causal_lm, model_fingerprint
from wherefrom.store.errors import DataError, NotFoundError, UsageError


class Listening(DataCollatorForLanguageModeling):
    """Remembers which texts it was given."""

    def __call__(self, examples, **options):
        self.seen.extend(tuple(e["input_ids"]) for e in examples)
        return super().__call__(examples, **options)


def train(path, callback, resume=None, tokenizer=True, more_callbacks=(), texts=None, **arguments):
    first_tokenizer = tokenizer
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    data = write_jsonl(path / "train.jsonl", [{"id": f"d{i}", "text": t} for i, t in enumerate(texts or random_texts(40, seed=2))])
    dataset = load_dataset("json", data_files=str(data), split="train", cache_dir=str(path / "cache"))
    dataset = dataset.map(lambda r: tokenizer(r["text"]), remove_columns=["id", "text"])
    model = make_model("gpt2", "float32").requires_grad_(True)
    given = dict(num_train_epochs=2, per_device_train_batch_size=4, save_steps=5, logging_steps=5, report_to=[])
    given |= dict(output_dir=str(path / "run"), use_cpu=True, learning_rate=1e-3) | arguments
    collator = Listening(tokenizer, mlm=False)
    collator.seen = []
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**given),
        train_dataset=dataset,
        processing_class=tokenizer if first_tokenizer else None,
        data_collator=collator,
        callbacks=[*more_callbacks, callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    positions = {tuple(dataset[i]["input_ids"]): i for i in range(len(dataset))}
    return data, [positions[text] for text in collator.seen]


def test_a_run_is_kept_and_indexed_at_its_end(tmp_path):
    out = str(tmp_path / "run.wherefrom")
    data, _ = train(tmp_path, WherefromCallback(data=(str(tmp_path / "train.jsonl"),), out=out, checkpoints=2, bytes_per_example=500))
    record = json.loads((tmp_path / "run/wherefrom.json").read_text())
    assert [c["step"] for c in record["checkpoints"]] == [5, 10, 15, 20]
    for c in record["checkpoints"]:
        assert model_fingerprint(load_causal_lm(ModelSource(str(tmp_path / "run" / c["path"])))) == c["fingerprint"]
    assert record["data"]["examples"] == 40
    assert record["data"]["fingerprint"]
    assert record["order"]["seed"] == 42
    assert [step for step, _ in record["rates"]] == [5, 10, 15, 20]
    client = Client(out)
    fingerprints = [m.fingerprint for m in client.index.manifest.models]
    assert fingerprints == [record["checkpoints"][0]["fingerprint"], record["checkpoints"][-1]["fingerprint"]]
    assert client.query(text=json.loads(data.read_text().splitlines()[7])["text"], mode="cosine", k=1).proponents[0].id == "d7"


def test_checkpoints_that_are_gone_are_left_out_and_none_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    train(
        tmp_path / "a",
        WherefromCallback(data=(str(tmp_path / "a/train.jsonl"),), out=str(tmp_path / "i"), checkpoints=3),
        save_total_limit=2,
    )
    assert [m.id.rsplit("-", 1)[1] for m in Client(tmp_path / "i").index.manifest.models] == ["15", "20"]


def test_what_could_not_be_built_is_said_before_training(tmp_path):
    def refused(match, kind=UsageError, data=None, options=None, **arguments):
        callback = WherefromCallback(data=data or str(tmp_path / "train.jsonl"), out=str(tmp_path / "j"), **(options or {}))
        with pytest.raises(kind, match=match):
            train(tmp_path, callback, **arguments)
        assert not (tmp_path / "run/wherefrom.json").exists()

    refused("no tracked layer|no layer", options={"layers": ("nothing.*",), "components": ("blocks",)})
    write_jsonl(tmp_path / "other.jsonl", [{"id": "a", "question": "w1 w2"}])
    refused("other.jsonl", DataError, data=(str(tmp_path / "other.jsonl"),))
    refused("there is no file or folder", NotFoundError, data=("nothere.jsonl",))
    refused("processing_class", tokenizer=False)
    (tmp_path / "j").mkdir()
    (tmp_path / "j/mine.txt").write_text("precious")
    refused("holds other things")
    shutil.rmtree(tmp_path / "j")
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = dict(vocab_size=62, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0)
    other = LlamaForSequenceClassification(LlamaConfig(**sizes))
    callback = WherefromCallback(data=str(tmp_path / "train.jsonl"), out=str(tmp_path / "j"))
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[])
    with pytest.raises(UsageError, match="a classifier or reward model"):
        callback.on_train_begin(arguments, TrainerState(), TrainerControl(), processing_class=make_tokenizer(), model=other)
    with pytest.raises(UsageError, match="data"):
        WherefromCallback(out="x")
    with pytest.raises(UsageError, match="at least 1"):
        WherefromCallback(checkpoints=0)
    with pytest.raises(UsageError, match="no option 'bytes'"):
        WherefromCallback(out="x", data="y", bytes=400)
    with pytest.raises(UsageError, match="`rank` is 0"):
        WherefromCallback(out="x", data="y", rank=0)


def test_a_training_that_saves_no_checkpoint_is_indexed_from_the_model_itself(tmp_path):
    out = tmp_path / "j"
    train(tmp_path, WherefromCallback(data=str(tmp_path / "train.jsonl"), out=str(out)), save_strategy="no")
    client = Client(out)
    assert [model.id for model in client.index.manifest.models] == [str(tmp_path / "run/wherefrom-model")]
    text = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[7])["text"]
    assert client.query(text=text, mode="cosine", k=1).proponents[0].id == "d7"


def test_a_build_that_fails_never_ends_a_training_that_is_over(tmp_path, monkeypatch):
    import wherefrom.ray_jobs.build as module
    from wherefrom.store.errors import StorageError

    def full(*_):
        raise StorageError("no space left on the disk of here")

    monkeypatch.setattr(module, "build", full)
    callback = WherefromCallback(data=str(tmp_path / "train.jsonl"), out=str(tmp_path / "j"))
    said = "the index was not built: no space left on the disk of here; build it with: wherefrom build --model .*checkpoint-20 --data"
    with pytest.warns(UserWarning, match=said):
        train(tmp_path, callback)
    assert len(json.loads((tmp_path / "run/wherefrom.json").read_text())["checkpoints"]) == 4


def test_a_second_run_into_the_same_index_is_refused_before_training(tmp_path):
    callback = WherefromCallback(data=str(tmp_path / "train.jsonl"), out=str(tmp_path / "j"))
    train(tmp_path, callback)
    with pytest.raises(UsageError, match="is already an index, of another run"):
        train(tmp_path, WherefromCallback(data=str(tmp_path / "train.jsonl"), out=str(tmp_path / "j")))


def test_the_order_of_the_data_is_kept_as_it_was_drawn(tmp_path):
    def recorded_orders():
        return [np.load(tmp_path / f"run/wherefrom-order-{epoch}.npy").tolist() for epoch in (0, 1)]

    _, seen = train(tmp_path, WherefromCallback())
    assert len(seen) == 80
    assert recorded_orders() == [seen[:40], seen[40:]]
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))
    assert seen[:40] != seen[40:]
    orders = recorded_orders()
    for path in (tmp_path / "run").glob("wherefrom-order-1.npy"):
        path.unlink()
    _, seen = train(tmp_path, WherefromCallback(), resume=str(tmp_path / "run/checkpoint-15"))
    assert seen[-20:] == orders[1][20:]
    assert recorded_orders() == orders
    plain = tmp_path / "plain"
    plain.mkdir()
    _, without = train(plain, TrainerCallback())
    assert without == orders[0] + orders[1]  # listening changes nothing


@pytest.mark.parametrize(
    "how",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "sequential"},
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"gradient_accumulation_steps": 3, "dataloader_num_workers": 1},
    ],
)
def test_any_samplers_order_is_kept_and_a_new_run_forgets_the_old(tmp_path, how):
    (tmp_path / "run").mkdir()
    np.save(tmp_path / "run/wherefrom-order-5.npy", np.arange(3))  # of a longer run, earlier
    _, seen = train(tmp_path, WherefromCallback(), num_train_epochs=1, **how)
    (order_file,) = (tmp_path / "run").glob("wherefrom-order-*.npy")
    order = np.load(order_file).tolist()
    assert sorted(order) == list(range(40))
    assert order == seen or how.get("dataloader_num_workers")  # whose collator is in another process


def test_the_order_of_two_processes_is_kept(tmp_path):
    """Batches are dealt out to the processes in turn; the sampler draws for both."""
    dataset = [{"x": torch.tensor([i])} for i in range(12)]
    loader = torch.utils.data.DataLoader(dataset, sampler=torch.utils.data.SequentialSampler(dataset), batch_size=2)
    shards = [prepare_data_loader(loader, num_processes=2, process_index=i, put_on_device=False) for i in range(2)]
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[])
    callback, state = WherefromCallback(), TrainerState(epoch=0.0)
    callback.on_train_begin(arguments, state, TrainerControl(), train_dataloader=shards[0])
    callback.on_epoch_begin(arguments, state, TrainerControl())
    mine = [int(x) for batch in shards[0] for x in batch["x"]]
    callback.on_epoch_end(arguments, state, TrainerControl())
    assert mine == [0, 1, 4, 5, 8, 9]
    assert np.load(tmp_path / "run/wherefrom-order-0.npy").tolist() == list(range(12))


def test_a_stream_has_no_order(tmp_path):
    tokenizer = make_tokenizer()
    stream = Dataset.from_list([{"input_ids": tokenizer(t)["input_ids"]} for t in random_texts(8, seed=2)]).to_iterable_dataset()
    stream = stream.map(lambda r: {**r, "labels": r["input_ids"]})
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=1, use_cpu=True, report_to=[])
    Trainer(make_model("gpt2", "float32").requires_grad_(True), arguments, train_dataset=stream, callbacks=[WherefromCallback()]).train()
    assert json.loads((tmp_path / "run/wherefrom.json").read_text())["data"]["examples"] is None
    assert not [*(tmp_path / "run").glob("*.npy")]
