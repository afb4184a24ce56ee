"""Demonstration: train a tokenizer and a small GPT-2 on the included corpus, build an index, and run three queries.

The corpus is the gazette of a fictional archipelago, so its facts are in no other text. Each query is about a fact that three documents
state, in different words; these should rank highest.
"""

from importlib.resources import files
from pathlib import Path

import click

from ..client import Client
from ..ray_jobs.build import build
from ..ray_jobs.config import BuildConfig
from ..ray_jobs.progress import Console, Reporter
from ..store.corpus import read_corpus, usable
from ..store.errors import UsageError
from ..store.files import publish
from ..terminal import show_answer

QUERIES = (
    ("The lighthouse at Marrow Point was built by", " Ines Calloway"),
    ("The song of the grey petrel was first written down by", " Tobias Fenn"),
    ("The bridge over the River Aldous is made of", " blue granite"),
)
_VOCABULARY = 2048
_WIDTH = 128
_LAYERS = 4
_HEADS = 4
_CONTEXT = 128
_EPOCHS = 10
_BATCH = 16
_RATE = 2e-3
_BYTES = 2400


def run(out: Path, workers: int) -> None:
    """Write corpus, model and index to `out`, and print the answer to each query.

    Raises:
        UsageError: `out` contains other files.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "corpus.jsonl").is_file())):
        raise UsageError(f"`out` {out} holds other things; choose a directory that does not exist yet")
    out.mkdir(parents=True, exist_ok=True)
    corpus = out / "corpus.jsonl"
    model = out / "model"
    index = out / "index.wherefrom"
    if not corpus.exists():
        corpus.write_bytes(files(__package__).joinpath("corpus.jsonl").read_bytes())
    with Console() as reporter:
        if not model.exists():
            train(corpus, model, reporter)
        build(BuildConfig(model=str(model), data=(str(corpus),), out=str(index), workers=workers, bytes_per_example=_BYTES), reporter)
    client = Client(index)
    for prompt, completion in QUERIES:
        show_answer(client.query(prompt=prompt, completion=completion, k=3))
    click.echo(f"""
{out}/ has the corpus, the model and the index, whose rows take at most {_BYTES:,} bytes. Try next:

  wherefrom query {index} --prompt "The River Kell is known for" --completion " sudden spring floods" -k 3
  wherefrom query {index} --row 0 --no-opponents
  wherefrom info {index}
  wherefrom build --model MODEL_DIR --data YOUR.jsonl --out your.wherefrom --bytes-per-example {_BYTES}""")


def train(corpus: Path, directory: Path, reporter: Reporter, epochs: int = _EPOCHS) -> None:
    """Train a byte-level BPE tokenizer and a GPT-2 of 1.1 million parameters on the corpus; save both."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from ..indexer.examples import TextConverter
    from ..indexer.models import configure_memory
    from ..indexer.tasks import CausalLM

    documents = list(usable(read_corpus([str(corpus)])))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((d.text or "" for d in documents), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")
    examples = list(usable(TextConverter(fast, _CONTEXT).documents(documents)))
    configure_memory()
    task = CausalLM()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=_VOCABULARY,
        n_embd=_WIDTH,
        n_layer=_LAYERS,
        n_head=_HEADS,
        n_positions=_CONTEXT,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # in one kernel, the default in several
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    steps = epochs * -(-len(examples) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
    reporter.stage("training a small model", epochs * len(examples))
    examples_seen = tokens_seen = 0
    for _ in range(epochs):
        order = torch.randperm(len(examples)).tolist()
        for first in range(0, len(order), _BATCH):
            batch = task.collate([examples[i] for i in order[first : first + _BATCH]], torch.device("cpu"))
            loss = task.loss(model, batch).sum() / batch.valid.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            examples_seen += len(batch.ids)
            tokens_seen += int(batch.valid.sum())
            reporter.update(examples_seen, tokens_seen)
    staged = directory.with_name(directory.name + ".new")
    model.save_pretrained(staged)
    fast.save_pretrained(staged)
    publish(staged, directory)
