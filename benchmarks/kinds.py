"""Kinds of model and training: what share is tracked, what a row costs, and how well scores predict retraining, beside a baseline.

    python benchmarks/kinds.py ../shared [--only classification dpo] [--subsets 30]

For each task a small model is trained from fixed first weights on some hundred documents, and again on random halves of them; the LDS of an
index's scores (rank correlation of their sums over a half with the losses of held-out queries, averaged over queries) is printed with its
95 % interval by bootstrap over queries, for influence and for the task's own way to rank, beside that of a baseline: TF-IDF of words, or
pixels. `passes` is the CPU time of building rows over that of one plain forward and backward pass over the same batches, interleaved.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from backdoor import digits
from scipy.stats import spearmanr
from transformers import AutoTokenizer
from wherefrom import Client, Query, build
from wherefrom.indexer.models import LoadedModel, ModelSource
from wherefrom.indexer.tasks import find_task
from wherefrom.store.corpus import Corpus, usable
from wherefrom.store.fields import Fields

_TRAIN, _QUERIES, _TOKENS, _REPEATS = 240, 40, 100, 3
_BATCH = 8


def texts(shared, source):
    """Texts of a source of the corpus, in order."""
    records = map(json.loads, (shared / "data" / "corpus.jsonl").read_text().strip().split("\n"))
    return [r["text"] for r in records if r["source"] == source]


def cut(text, words=30):
    """The first words of a text."""
    return " ".join(text.split()[:words])


def problems(shared):
    """School problems with the beginnings of their answers."""
    halves = (text.partition("\nAnswer:")[::2] for text in texts(shared, "gsm8k"))
    return [(cut(question.removeprefix("Question: "), 20), " " + cut(answer, 12)) for question, answer in halves]


def labelled(shared):
    """Texts of three sources, with the source as the label."""
    sources = [texts(shared, name) for name in ("wikitext", "gsm8k", "shakespeare")]
    return [{"text": cut(sources[i % 3][i // 3].removeprefix("Question: ")), "label": i % 3} for i in range(_TRAIN + _QUERIES)]


def pairs(shared):
    """School problems with their own answers, and rejected ones of others."""
    known = problems(shared)
    return [{"prompt": q, "chosen": a, "rejected": known[(i + 7) % 3000][1]} for i, (q, a) in enumerate(known[: _TRAIN + _QUERIES])]


def completions(shared):
    """School problems with their answers."""
    return [{"prompt": q, "completion": a} for q, a in problems(shared)[: _TRAIN + _QUERIES]]


def sentences(shared):
    """Beginnings of texts."""
    return [{"text": cut(text, 25)} for text in texts(shared, "wikitext")[: _TRAIN + _QUERIES]]


def triplets(shared):
    """Halves of texts, and halves of others."""
    known = [cut(text, 40).split() for text in texts(shared, "wikitext")[:2000]]
    halves = [(" ".join(words[:20]), " ".join(words[20:])) for words in known if len(words) == 40]
    return [
        {"anchor": a, "positive": b, "negatives": [halves[(i + j) % len(halves)][1] for j in (5, 9, 13)]}
        for i, (a, b) in enumerate(halves[: _TRAIN + _QUERIES])
    ]


def images(shared):
    """Digits with labels, whose files `write` makes."""
    pixels, labels = digits(shared / "data")
    return [{"pixels": p, "label": int(n)} for p, n in zip(pixels[: _TRAIN + _QUERIES], labels, strict=False)]


def vectors(shared):
    """Digits as vectors."""
    pixels, labels = digits(shared / "data")
    return [
        {"features": p.ravel().tolist(), "label": int(n), "pixels": p} for p, n in zip(pixels[: _TRAIN + _QUERIES], labels, strict=False)
    ]


def network():
    """A small convolutional network of digits."""
    nn = torch.nn
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 49, 32), nn.ReLU(), nn.Linear(32, 10))


def pretrained(name, kind, **options):
    """A maker of a small model of transformers, with fresh weights."""

    def make(tokenizer):
        sizes = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=0, eos_token_id=0)
        config = transformers.AutoConfig.for_model(kind, **(sizes if kind not in ("vit",) else {}) | options)
        return getattr(transformers, name).from_config(config)

    return make


_BERT = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, max_position_embeddings=128)
_MOE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=96, num_local_experts=4)
_T5 = dict(d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, decoder_start_token_id=0, tie_word_embeddings=False)
_VIT = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=28, patch_size=7, num_labels=10)
_GPT = dict(n_embd=64, n_layer=2, n_head=2, n_positions=128)

# By kind: the task, the maker of the model, its documents, epochs and learning rate.
KINDS = {
    "causal-lm, experts": ("causal-lm", pretrained("AutoModelForCausalLM", "mixtral", **_MOE), completions, 6, 2e-3),
    "classification": (
        "classification",
        pretrained("AutoModelForSequenceClassification", "bert", num_labels=3, **_BERT),
        labelled,
        4,
        5e-4,
    ),
    "reward": ("reward", pretrained("AutoModelForSequenceClassification", "gpt2", num_labels=1, **_GPT), pairs, 4, 1e-3),
    "dpo": ("dpo(beta=0.5, reference={reference})", pretrained("AutoModelForCausalLM", "gpt2", **_GPT), pairs, 4, 1e-3),
    "masked-lm": ("masked-lm", pretrained("AutoModelForMaskedLM", "bert", **_BERT), sentences, 6, 2e-3),
    "seq2seq": ("seq2seq", pretrained("AutoModelForSeq2SeqLM", "t5", **_T5), completions, 6, 2e-3),
    "embedding": ("embedding(scale=10)", pretrained("AutoModel", "bert", **_BERT), triplets, 4, 1e-3),
    "image-classification": ("image-classification", pretrained("AutoModelForImageClassification", "vit", **_VIT), images, 12, 1e-3),
    "vectors": ("vectors(shape=1x28x28)", lambda tokenizer: network(), vectors, 8, 2e-3),
}


def processor():
    """An image processor of digits."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 28, "width": 28})


def train(task, start, examples, epochs, rate, source):
    """A model trained on examples, from the weights of `start`, in a fixed order."""
    import copy

    model = copy.deepcopy(start).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    task.attach(model, source)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for part in torch.randperm(len(examples), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            task.loss(model, task.collate([examples[i] for i in part], torch.device("cpu"))).mean().backward()
            optimizer.step()
    return model.eval()


def losses(task, model, examples):
    """Each example's measurement."""
    with torch.no_grad():
        return torch.cat([task.measurement(model, task.collate([e], torch.device("cpu"))) for e in examples]).numpy()


def lds(scores, truth, masks):
    """LDS by query, from scores [queries, examples] and losses [subsets, queries]."""
    predicted = scores @ masks.T
    return np.array([spearmanr(p, -t).statistic for p, t in zip(predicted, truth.T, strict=True)])


def interval(values):
    """Mean and 95 % interval, by bootstrap."""
    generator = np.random.default_rng(0)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(2000)]
    return [round(float(x), 3) for x in (values.mean(), *np.quantile(means, (0.025, 0.975)))]


def baseline(records):
    """Cosines of queries with examples: of TF-IDF vectors of words, or of pixels."""
    if "pixels" in records[0]:
        rows = np.stack([r["pixels"].ravel() for r in records])
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    else:
        from sklearn.feature_extraction.text import TfidfVectorizer

        names = ("text", "prompt", "completion", "chosen", "anchor", "positive")
        rows = TfidfVectorizer().fit_transform(" ".join(str(r[name]) for name in names if name in r) for r in records).toarray()
    return rows[_TRAIN:] @ rows[:_TRAIN].T


def write(records, form, folder):
    """Write records as JSON lines, and images beside them; returns the records as they are written."""
    from PIL import Image

    written = []
    for number, record in enumerate(records):
        plain = {key: value for key, value in record.items() if key != "pixels"}
        if form == "image":
            plain["image"] = f"{number}.png"
            Image.fromarray((record["pixels"] * 255).astype(np.uint8)).save(folder / plain["image"])
        written.append(plain)
    for name, part in (("train.jsonl", written[:_TRAIN]), ("query.jsonl", written[_TRAIN:])):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in part))
    return written


def query(record, folder):
    """A query that is a record."""
    if "anchor" in record:
        return Query(texts=[record["anchor"], record["positive"], *record["negatives"]])
    return Query(**(record | {"image": folder / record["image"]} if "image" in record else record))


def passes(client, task, examples):
    """CPU time of rows over that of a plain forward and backward pass: the median and the range of some repeats."""
    model = client.encoder.model
    ratios = []
    for _ in range(_REPEATS):
        started = time.process_time()
        for batch in client.encoder.batches(examples):
            del batch
        rows = time.process_time() - started
        started = time.process_time()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        for _, batch in task.batches((model,), examples, client.encoder.settings.batch_tokens):
            task.loss(model, batch).sum().backward()
            model.zero_grad()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        ratios.append(rows / (time.process_time() - started))
    return [round(float(x), 2) for x in (np.median(ratios), min(ratios), max(ratios))]


def judge(name, shared, subsets):
    """Lines of the table for one kind."""
    task_name, make, documents, epochs, rate = KINDS[name]
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "mini-lm")
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "mask_token": "[MASK]"})
    torch.manual_seed(0)
    start = make(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if "reference" in task_name:
            start.save_pretrained(place / "reference")
        task_name = task_name.format(reference=place / "reference")
        task = find_task(task_name)
        helper = processor() if name == "image-classification" else tokenizer
        source = ModelSource.of(LoadedModel(start, helper), "float32", "cpu", False)
        records = documents(shared)
        written = write(records, task.form, place)
        files = [str(place / name) for name in ("train.jsonl", "query.jsonl")]
        known, asked = (
            list(task.converter(source, _TOKENS, "truncate").documents(usable(Corpus([file], Fields(form=task.form))))) for file in files
        )
        model = train(task, start, known, epochs, rate, source)
        masks = np.random.default_rng(1).permuted(np.tile(np.arange(_TRAIN) < _TRAIN // 2, (subsets, 1)), axis=1)
        halves = [[known[i] for i in np.flatnonzero(mask)] for mask in masks]
        truth = np.stack([losses(task, train(task, start, half, epochs, rate, source), asked) for half in halves])
        queries = [query(record, place) for record in written[_TRAIN:]]
        for label, options in (("800 bytes", {}), ("EK-FAC, rank 32", {"rank": 32, "curvature": "ekfac"})):
            out = place / label
            index = build(model, files[0], out, tokenizer=helper, task=task_name, max_tokens=_TOKENS, long="truncate", **options)
            client = Client(out, model=model, tokenizer=helper)
            found = {}
            for mode in dict.fromkeys(("influence", index.manifest.mode)):
                found[mode] = interval(lds(client.scores(queries, mode=mode), truth, masks))
            tracked = round(index.manifest.build.tracked[0].share, 3)
            print(json.dumps({"kind": name, "rows": label, "tracked": tracked, **found, "passes": passes(client, task, known)}), flush=True)
    print(json.dumps({"kind": name, "rows": "baseline", "influence": interval(lds(baseline(records), truth, masks))}), flush=True)


def main():
    """Judge each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--only", nargs="*", default=list(KINDS))
    parser.add_argument("--subsets", type=int, default=30)
    args = parser.parse_args()
    for name in args.only:
        judge(name, args.shared, args.subsets)


if __name__ == "__main__":
    main()
