"""Tiny models of many architectures, a word tokenizer, small corpora; nothing here needs a network."""

import json
import os
from pathlib import Path

SHARED = Path(os.environ.get("WHEREFROM_SHARED", Path(__file__).parents[2] / "shared"))
WORDS = 61

CONFIGS = {
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "llama": dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
    "gpt_neox": dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
    "qwen2": dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
    "qwen3": dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8),
    "gemma2": dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8),
    "mistral": dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, sliding_window=4
    ),
    "opt": dict(hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16),
    "bloom": dict(hidden_size=16, n_layer=2, n_head=2),
    "mamba": dict(hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4),
    "phi": dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
}


def make_model(architecture="gpt2", dtype="float64", seed=0):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    common = dict(vocab_size=WORDS + 1, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    if architecture not in ("gpt2", "bloom"):
        common["max_position_embeddings"] = 64
    config = AutoConfig.for_model(architecture, **common, **CONFIGS[architecture])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the usual initialisation, so that gradients differ clearly
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.requires_grad_(False).eval()


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0} | {f"w{i}": i for i in range(1, WORDS + 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>")


def build_kinds(directory, model, corpus, kinds, **common):
    """One index of `corpus` for each entry of `kinds` (its name and options) below `directory`; their paths by name."""
    from wherefrom import BuildConfig
    from wherefrom.ray_jobs.build import build

    made = {name: directory / name for name in kinds}
    for name, options in kinds.items():
        build(BuildConfig(model=str(model), data=(str(corpus),), out=str(made[name]), **common, **options))
    return made


def in_nats(index, products):
    """Products of rows as nats: over the number of training examples."""
    return products / len(index)


def record(answer):
    """The record of an answer, without the times that its search took."""
    actual = answer.to_dict()
    actual["search"].pop("seconds")
    if actual["search"]["rerank"] is not None:
        actual["search"]["rerank"].pop("seconds")
    return actual


def search(index, rows, k, metric=None, recall=1.0):
    """The hits of every query among all rows, in passes of the size that answers take."""
    from wherefrom.query.metric import Metric
    from wherefrom.query.parts import Search, WholeIndex
    from wherefrom.query.scoring import mixed_components
    from wherefrom.query.search import find, pass_size
    from wherefrom.store.vectors import count, slice_rows

    metric = metric or Metric()
    mixings = mixed_components(index, rows, metric)
    size = pass_size(recall)
    passes = [slice_rows(rows, first, first + size) for first in range(0, count(rows), size)]
    parts = WholeIndex(index)
    return [
        hit for rows_of_pass in passes for hit in find(parts, Search(rows_of_pass, metric, mixings), count(rows_of_pass), k, recall).hits
    ]


def assert_close(actual, expected, rtol, scale=None):
    """No number errs by more than `rtol` of `scale`: the size of what was summed to make it, by default the largest number expected.

    Sums whose terms cancel err by as much as others, however small they come out: never by a share of themselves.
    """
    import numpy as np

    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    assert actual.shape == expected.shape
    scale = np.abs(expected).max(initial=0) if scale is None else scale
    errors = np.abs(actual - expected)
    assert (errors <= rtol * scale).all(), f"{actual} is not {expected}: it errs by up to {errors.max()}, allowed are {rtol} of {scale}"


def assert_same_ranking(actual, expected, rtol):
    """Two lists of attributions name the same rows in the same order, but for rows whose scores differ by no more than `rtol` of the first.

    Such rows may change places with each other, and at the end of the list with one that is not in it.
    """
    assert len({a.row for a in actual}) == len(actual) == len(expected)
    if expected:
        largest, last = abs(expected[0].score), expected[-1].score
        assert_close([a.score for a in actual], [a.score for a in expected], rtol, largest)
        ours, theirs = ({a.row: a.score for a in answers} for answers in (actual, expected))
        rows = sorted(ours | theirs)
        assert_close([ours.get(row, last) for row in rows], [theirs.get(row, last) for row in rows], rtol, largest)


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def random_texts(count, seed=0, shortest=2, longest=20):
    import numpy as np

    generator = np.random.default_rng(seed)
    return [words(*generator.integers(1, WORDS + 1, generator.integers(shortest, longest + 1))) for _ in range(count)]


METRICS = {  # options of scores, one of each kind
    "plain": {},
    "cosine": {"mode": "cosine"},
    "loss-normalized": {"mode": "loss-normalized"},
    "damped": {"damping": 3.0},
    "uncurved": {"curvature": False},
    "weights": {"weights": {"head": 0.3}},
    "layers": {"layers": ("h.0.*", "lm_head")},
}


def example_queries():
    """A query of each form, by name."""
    from wherefrom import Query

    return {
        "text": Query(text=random_texts(1, seed=9, shortest=9)[0]),
        "completion": Query(prompt="w1 w2 w3", completion=" w4 w5"),
        "span": Query(text="w1 w2 w3 w4", span="w3"),
        "against": Query(prompt="w1 w2 w3", completion=" w4", against=" w9 w8"),
        "row": Query(row=11),
    }


def make_examples(count, seed=0, longest=20):
    import numpy as np
    from wherefrom.store.documents import Example

    examples = []
    for i, text in enumerate(random_texts(count, seed, longest=longest)):
        ids = np.array([int(w[1:]) for w in text.split()], np.int32)
        mask = np.ones(len(ids), bool)
        mask[0] = False
        if i % 3 == 0 and len(ids) > 4:
            mask[: len(ids) // 2] = False
        examples.append(Example(id=f"e{i}", text=text, source="random", token_ids=ids, loss_mask=mask))
    return examples


def make_plan(model, rank=4, curvature="fisher", projection="random", labels="data", damping=0.1, batch_tokens=64, patterns=()):
    from wherefrom.indexer.encoder import EncoderSettings
    from wherefrom.indexer.layers import describe_layers, find_layers
    from wherefrom.indexer.tasks import CausalLM
    from wherefrom.store.manifest import Curvature, DenseComponent, Projection

    layers = describe_layers(CausalLM(), model, find_layers(model, patterns), rank, curvature, 10**6, explicit=bool(patterns))
    component = DenseComponent(
        name="blocks",
        kind="dense",
        model=0,
        coordinates=None,
        weight=1.0,
        dtype="float32",
        layers=layers,
        projection=Projection(kind=projection, rank=rank, seed=7),
        curvature=Curvature(kind=curvature, labels=labels, examples=0, tokens=0, damping=damping),
    )
    return EncoderSettings((component,), batch_tokens)


def fit(model, settings, examples, parts=1):
    from wherefrom.indexer.curvature import add_sums
    from wherefrom.indexer.encoder import Encoder
    from wherefrom.indexer.fit import Fit
    from wherefrom.indexer.tasks import CausalLM

    fitting, arrays = Fit(settings), {}
    for step in range(len(fitting.steps)):
        totals = {}
        for part in range(parts):
            add_sums(totals, fitting.sum_statistics(Encoder(CausalLM(), (model,), settings, arrays), step, examples[part::parts]))
        arrays = fitting.finish(step, arrays, totals)
    return Encoder(CausalLM(), (model,), settings, arrays)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def write_rows(path, components):
    """A file of rows alone, as of a shard: by component its arrays."""
    from wherefrom.store.arrays import write_arrays
    from wherefrom.store.shard import rows_path

    write_arrays(rows_path(path, "0"), components)
    return rows_path(path, "0")


def array_bytes(index):
    """Bytes of all arrays of an index's rows, without the files' descriptions of them."""
    from wherefrom.store.arrays import ArrayFile

    entries = [entry for path in (index / "rows").iterdir() for entry in ArrayFile(path)._entries.items()]
    return sum(size for name, (_, size, _) in entries if "/c/" in name)


def open_zarr(path):
    """Arrays that plain zarr-python reads from a file of `write_rows`."""
    import zarr
    from wherefrom.store.shard import rows_path

    return zarr.open_group(zarr.storage.ZipStore(rows_path(path, "0"), mode="r"), mode="r")


def dense_component(dim, dtype="float32", name="blocks", seed=0, curvature="identity"):
    """A component of one layer, whose rows have so many coordinates."""
    from wherefrom.store.manifest import Curvature, DenseComponent, Layer, Projection

    sizes = dict(outputs=1, inputs=dim, output_rank=1, input_rank=dim, input_group="a", offset=0, curvature=curvature)
    return DenseComponent(
        name=name,
        kind="dense",
        model=0,
        weight=1.0,
        coordinates=None,
        dtype=dtype,
        layers=(Layer(name="a", **sizes),),
        projection=Projection(kind="random", rank=1, seed=seed),
        curvature=Curvature(kind=curvature, labels="data", examples=0, tokens=0, damping=0.1),
    )


def sparse_component(vocabulary, width, bits, seed=0, name="head"):
    """A component of a vocabulary layer."""
    from wherefrom.store.manifest import Curvature, SparseComponent

    return SparseComponent(
        name=name,
        kind="sparse",
        model=0,
        weight=1.0,
        role="head",
        layer="lm_head",
        vocabulary=vocabulary,
        width=width,
        bits=bits,
        extra_tokens=0,
        max_tokens=None,
        postprocessed=False,
        seed=seed,
        curvature=Curvature(kind="kfac", labels="sampled", examples=0, tokens=0, damping=1.0),
    )


def dense_rows(path, arrays, dim, dtype="float32", seed=0):
    """Dense rows written to a file and opened again."""
    from wherefrom.store.arrays import ArrayFile
    from wherefrom.store.dense import DenseRows, encode_dense

    file = write_rows(path, {"blocks": encode_dense(arrays, dtype)})
    component = dense_component(dim, dtype, seed=seed)
    if dtype == "1bit":
        component = component.model_copy(update={"coordinates": dim})
    return DenseRows(ArrayFile(file), component, len(arrays))


def sparse_rows(path, rows, vocabulary, bits, seed=0):
    """Sparse rows coded, written to a file and opened again."""
    from wherefrom.store.arrays import ArrayFile
    from wherefrom.store.sparse import SparseRows, code, encode_sparse

    file = write_rows(path, {"head": encode_sparse(code(rows, bits, seed), vocabulary, bits)})
    return SparseRows(ArrayFile(file), sparse_component(vocabulary, rows.vectors.shape[1], bits, seed), len(rows))


def dense_index(path, like, rows, dtype="float32", shard_rows=500, group_rows=1 << 16):
    """An index whose dense rows are given, with the model of `like` (an index directory)."""
    import uuid

    import numpy as np
    from wherefrom.store.bits import rotate
    from wherefrom.store.dense import encode_dense
    from wherefrom.store.documents import Example, write_documents
    from wherefrom.store.index import Index
    from wherefrom.store.shard import documents_path, publish_index, shard_entry, write_shard

    manifest = Index(like).manifest
    (component,) = manifest.components
    component = component.model_copy(update={"layers": dense_component(rows.shape[1]).layers, "dtype": dtype})
    shards = []
    for first in range(0, len(rows), shard_rows):
        part = rows[first : first + shard_rows].astype(np.float32)
        part = rotate(part, rows.shape[1], component.projection.seed) if dtype == "1bit" else part
        shard_id = str(uuid.UUID(int=first + 1))
        ids = range(first, first + len(part))
        tokens, mask = np.array([1, 2], np.int32), np.array([False, True])
        write_documents(documents_path(path, shard_id), [Example(f"r{i}", "", "s", tokens, mask, f"r{i}") for i in ids])
        write_shard(path, shard_id, {component.name: encode_dense(part, dtype)}, np.ones(len(part), np.float32))
        shards.append(shard_entry(path, shard_id, first, len(part), len(part), [component]))
    fields = {**dict(manifest), "components": (component,), "number": 1, "group_rows": group_rows}
    publish_index(path, shards, np.zeros(0, np.int64), fields)
    Index(path).reindex()
    return Index(path)
