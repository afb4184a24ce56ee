"""Explanations: parts add up to scores, and are what leaving the part out takes away."""

import json
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import METRICS, assert_close, example_queries, in_nats, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from wherefrom import BuildConfig, Client, Query
from wherefrom.cli import main
from wherefrom.indexer.examples import token_name, token_texts
from wherefrom.indexer.shares import token_shares
from wherefrom.query.answers import Answer, Attribution, Explanation, Reliability, ScorePart, SearchReport, TokenShares
from wherefrom.query.metric import Metric
from wherefrom.query.scoring import all_scores
from wherefrom.ray_jobs.build import build
from wherefrom.store.errors import UsageError
from wherefrom.store.vectors import DenseVectors
from wherefrom.terminal import heat, shortened, show_answer, show_explanation

QUERIES = example_queries()


@pytest.fixture(scope="module")
def paths(tmp_path_factory, model_dir, corpus_file):
    """All components, uncoded blocks; a dense component alone; one of which only some coordinates are kept; and one bit a coordinate."""
    made = {}
    for name, options in {
        "all": {"components": ("head", "embeddings", "blocks"), "head_extra_tokens": 3},
        "blocks": {"components": ("blocks",)},
        "kept": {"components": ("blocks",), "coordinates": 40, "curvature": "ekfac"},
        "budget": {"bytes_per_example": 600},
    }.items():
        made[name] = tmp_path_factory.mktemp("explain") / name
        rank = {} if name == "budget" else {"rank": 4}
        build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(made[name]), shard_rows=50, **rank, **options))
    return made


def scores(client, query, options):
    metric = Metric(**{k: v for k, v in options.items() if k in ("mode", "damping", "curvature", "weights", "layers")})
    return np.concatenate([s for _, s in all_scores(client.index, client.encode([query]), metric)], axis=1)[0]


def assert_adds_up(parts, expected, rtol):
    assert_close(sum(parts), expected, rtol, sum(map(abs, parts)))


@pytest.mark.parametrize(
    ("name", "metric"),
    [(name, metric) for name in ("all", "blocks", "kept", "budget") for metric in METRICS if metric != "weights" or name == "all"],
)
def test_parts_add_up_to_the_score(paths, name, metric):
    options = METRICS[metric]
    client = Client(paths[name])
    components = client.index.manifest.components
    for query in QUERIES.values():
        try:
            expected = scores(client, query, options)[[3, 70]]
        except UsageError:  # cosines under another damping, of rows that cannot give them
            with pytest.raises(UsageError):
                client.explain([3], query, **options)
            continue
        explanations = client.explain([3, 70], query, tokens=False, **options)
        for e, expected_score in zip(explanations, expected, strict=True):
            summed = sum(abs(p.score) for p in (*e.layers, *e.components))
            assert_close(e.score, expected_score, 1e-4, summed)
            assert_close(sum(p.score for p in e.components), e.score, 1e-5, summed)
            dense = {s.name for s in components if s.kind == "dense" and not client.index.reduction(s).mixes}
            for component in e.components:
                layers = [p.score for p in e.layers if p.component == component.name]
                assert bool(layers) == (component.name in dense or component.name in ("head", "embeddings"))
                if layers:
                    assert_close(sum(layers), component.score, 1e-5, sum(map(abs, layers)))
                shared = [p.score for p in e.vocabulary if p.component == component.name]
                if component.name in ("head", "embeddings"):
                    assert_close(sum(shared), component.score, 1e-5, sum(map(abs, shared)))
            assert [abs(p.score) for p in e.layers] == sorted((abs(p.score) for p in e.layers), reverse=True)
            assert (e.recomputed, e.example, e.query) == (None, None, None)


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "weights"])
@pytest.mark.parametrize("kind", QUERIES)
def test_token_shares_add_up_to_the_score_that_a_rerank_gives(paths, metric, kind):
    for name in ("blocks", "kept"):
        client = Client(paths[name])
        options = METRICS[metric] | ({"layers": ("h.0.*",)} if metric == "layers" else {})
        for e in client.explain([3, 70], QUERIES[kind], **options):
            summed = sum(map(abs, e.example.scores))
            if name == "blocks":  # rows as they were computed
                assert_close(e.recomputed, e.score, 1e-4, summed)
            ((exact,),) = client.recomputed_scores([QUERIES[kind]], [e.row], **options)
            assert_close(e.recomputed, exact, 1e-4, summed)
            assert_close(sum(e.example.scores), e.recomputed, 1e-5, summed)
            assert (e.query is None) == (kind == "against")
            if e.query:
                assert_close(sum(e.query.scores), e.recomputed, 1e-4, sum(map(abs, e.query.scores)))


@pytest.mark.parametrize("name", ["all", "budget"])
@pytest.mark.parametrize("kind", QUERIES)
def test_token_shares_of_coded_rows_add_up_to_the_score_of_whole_rows(paths, name, kind):
    client = Client(paths[name])
    query = QUERIES[kind]
    (asking,) = client.query_examples([query if kind != "against" else Query(prompt="w1 w2 w3", completion=" w4")])
    query_rows = client.encoder.rows([asking], exact=True) if kind == "row" else client.encode([query])
    for e in client.explain([3, 70], query):
        example_rows, total = client.encoder.rows([client.index.example(e.row)], exact=True), 0.0
        for component in client.index.manifest.components:
            a, b = query_rows[component.name], example_rows[component.name]
            if component.kind == "dense":
                total += component.weight * float((a.values[0] * b.values[0]).sum())
            else:
                products = a.vectors.astype(float) @ b.vectors.T.astype(float)
                total += component.weight * products[a.keys[:, None] == b.keys[None]].sum()
        total = in_nats(client.index, total)
        assert_adds_up(e.example.scores, e.recomputed, 1e-6)
        assert_adds_up(e.example.scores, total, 1e-4)
        if e.query:
            assert_adds_up(e.query.scores, total, 1e-4)
            assert len(e.query.tokens) == len(e.query.scores) == len(asking.token_ids)
        assert len(e.example.tokens) == len(e.example.scores) == len(client.index.example(e.row).token_ids)


def test_a_tokens_share_is_what_its_position_adds_to_the_row(paths):
    """Held against plain autograd: the head's gradient of single positions' losses."""
    client = Client(paths["blocks"])
    encoder, example = client.encoder, client.index.example(5)
    vector = client.encode([QUERIES["text"]])["blocks"].values[0]
    shares, opposite = token_shares(encoder, example, [{"blocks": DenseVectors(vector[None])}, {"blocks": DenseVectors(-vector[None])}])
    assert_close(opposite, -shares, 1e-6)
    component = client.index.manifest.components[0]
    model, part = encoder.model, encoder.component_encoders["blocks"]
    batch = encoder.task.collate([example], torch.device("cpu"))
    seen = {}
    modules = dict(model.named_modules())
    handles = []
    for layer in component.layers:

        def keep(module, args, output, name=layer.name):
            output = output.requires_grad_(True) if not output.requires_grad else output
            output.retain_grad()
            seen[name] = (args[0].detach(), output)
            return output

        handles.append(modules[layer.name].register_forward_hook(keep))
    encoder.task.loss(model, batch).sum().backward()
    for handle in handles:
        handle.remove()
    expected = np.zeros(len(example.token_ids))
    for t in range(batch.inputs.shape[1]):
        row = np.zeros(component.dim)
        for layer in component.layers:
            x, output = seen[layer.name]
            inward, outward = part.maps[layer.name]
            d = output.grad[0, t] if outward is None else outward @ output.grad[0, t]
            x = x[0, t] if inward is None else inward @ x[0, t]
            row[layer.offset : layer.offset + layer.size] = part.whiten(layer, torch.outer(d, x).flatten()[None])[0]
        expected[t] = row @ vector
    assert_close(shares, expected, 1e-5)
    assert np.count_nonzero(np.abs(shares) > 1e-3 * np.abs(shares).max()) > 3


def test_explain_on_the_command_line(paths):
    def run(*arguments):
        done = CliRunner().invoke(main, ["explain", str(paths["all"]), *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    shown = run("--prompt", "w1 w2", "--completion", " w3")
    for part in ("training example", "query", "components", "layers", "tokens add up to"):
        assert part in shown
    lines = [json.loads(line) for line in run("--text", "w1 w2 w3", "--example", "5", "--example", "6", "--json").splitlines()]
    assert [e["row"] for e in lines] == [5, 6]
    assert lines[0]["example"]["tokens"][0].startswith("w")
    plain = json.loads(run("--row", "7", "--example", "5", "--no-tokens", "--json"))
    assert plain["example"] is None
    assert plain["vocabulary"] == [] or plain["vocabulary"][0]["name"].isdigit()
    wrong = CliRunner().invoke(main, ["explain", str(paths["all"]), "--text", "w1 w2", "--example", "999"])
    assert (wrong.exit_code, "row 999 is not in the index" in wrong.output) == (2, True)
    both = CliRunner().invoke(main, ["explain", str(paths["all"]), "--text", "w1 w2", "--row", "9"])
    assert both.exit_code == 2


@pytest.mark.parametrize("name", ["all", "blocks", "kept"])
def test_a_row_asked_of_itself_recomputes_to_a_cosine_of_one(paths, name):
    client = Client(paths[name])
    for row in (3, 40):
        (e,) = client.explain([row], Query(row=row), mode="cosine")
        assert e.recomputed == pytest.approx(1.0, rel=1e-3)
        assert_adds_up(e.query.scores, e.recomputed, 1e-4)


# --- texts of tokens


def tokenizers():
    """Bytes with a few merges (GPT-2's kind), words with a mark before them and bytes for the unknown (Llama's kind), and plain words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    texts = ["the cat sat on the mat", "naïve café", "日本語の文", "a\n\nb  c"]
    of_bytes = Tokenizer(models.BPE())
    of_bytes.pre_tokenizer, of_bytes.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    of_bytes.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    marked = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, **{c: 257 + i for i, c in enumerate("▁abcdeghimnostuvxyz")}}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "t")]
    for a, b in merges:
        marked[a + b] = len(marked)
    with_bytes = Tokenizer(models.BPE(vocab=marked, merges=merges, unk_token="<unk>", byte_fallback=True))
    with_bytes.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    with_bytes.decoder = decoders.Sequence(steps)
    for made in (of_bytes, with_bytes):
        made.add_special_tokens([AddedToken("<eos>", special=True)])
    return [PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>") for made in (of_bytes, with_bytes)] + [make_tokenizer()]


KINDS = dict(zip(("bytes", "words with bytes", "words"), tokenizers(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.one_of(st.text(max_size=30), st.text("the cat é日😀\ufffd\n", max_size=30), st.just("w1 w2 w3")))
def test_tokens_joined_are_the_text(kind, text):
    tokenizer = KINDS[kind]
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    if kind == "bytes":
        assert "".join(pieces) == text + "<eos>"


def test_what_is_no_character_is_not_gathered_without_end():
    tokenizer = KINDS["bytes"]
    ids = tokenizer("\ufffd" * 3000)["input_ids"]
    began = time.perf_counter()
    texts = token_texts(tokenizer, ids)
    assert time.perf_counter() - began < 2
    assert 3000 <= len("".join(texts)) < 3300
    assert max(map(len, texts)) <= 48


def test_a_character_of_several_tokens_stands_at_its_last_and_alone_a_token_has_its_name():
    tokenizer = KINDS["bytes"]
    ids = tokenizer("xü😀y")["input_ids"]
    assert [tokenizer.backend_tokenizer.id_to_token(i) for i in ids] == ["x", "Ã", "¼", "ð", "Ł", "ĺ", "Ģ", "y"]
    assert token_texts(tokenizer, ids) == ("x", "", "ü", "", "", "", "😀", "y")
    assert [token_name(tokenizer, i) for i in ids[:2]] == ["x", "<0xC3>"]
    spaced = KINDS["words with bytes"]
    assert token_texts(spaced, spaced("the cat")["input_ids"]) == ("the", " ", "c", "at")
    shown = heat(TokenShares(("x", "", "é", "y"), (1.0, 2.0, -1.0, -0.2)))
    assert shown.plain == "xéy"
    assert shown.spans[0].style == shown.spans[1].style  # what a character's tokens add, together


def test_answers_are_printed_with_rows_and_texts_of_any_script(capsys):
    attribution = Attribution(1, 4711, "a", 1528.0, "山上有一座庙" * 60, "s", "a", {}, 310.4, 99.0, 0.5, False)
    report = SearchReport("exact", 9, 9, 1.0, True, None, 0.1, unit="nats")
    reliability = Reliability(("one thing",), 1.0, None, None, None, None, {}, 0, 0, None)
    show_answer(Answer({"row": 3, "mode": "influence", "damping": 1.0}, (attribution,), (), report, reliability, {}))
    shown = capsys.readouterr().out
    assert "4711" in shown
    assert "1528 ± 310" in shown
    assert "50.0%" in shown
    assert "! one thing" in shown
    assert sum(shown.count(c) for c in "山上有一座庙") == 238
    assert shortened("a  b\nc") == "a b c"
    assert len(shortened("庙" * 999)) == 240


def test_bars_and_names_tell_parts_apart(capsys):
    parts = (ScorePart("lm_head", 3.0, "head"), ScorePart("lm_head", -2.0, "head-2"), ScorePart("wte", 0.0, "embeddings"))
    show_explanation(Explanation(1, "a", "text", 1.0, (ScorePart("head", 1.0), ScorePart("embeddings", 0.0)), parts, ()))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("lm_head (head)") and "█" in line for line in lines)
    assert any(line.startswith("lm_head (head-2)") for line in lines)
    assert [line for line in lines if line.startswith("embeddings")] == ["embeddings      0"]


def test_blocks_are_the_sums_of_their_layers(paths):
    client = Client(paths["all"])
    query = QUERIES["completion"]
    (explanation,) = client.explain([7], query, tokens=False)
    assert_adds_up([p.score for p in explanation.blocks], explanation.score, 1e-5)
    block_scores = {p.name: p.score for p in explanation.blocks}
    assert block_scores.keys() == {"transformer.h.0", "transformer.h.1", "lm_head", "transformer.wte"}
    for number in "01":
        alone = scores(client, query, {"layers": (f"*.h.{number}.*",)})
        assert_close(block_scores[f"transformer.h.{number}"], alone[7], 1e-5, np.abs(alone).max())
    assert Explanation.from_dict(json.loads(json.dumps(explanation.to_dict()))) == explanation
