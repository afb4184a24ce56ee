"""Evaluation: the statistic against a plain one and known answers; packs good and bad; checks against autograd and planted truths."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import wherefrom
from click.testing import CliRunner
from helpers import assert_close, make_examples, make_model, random_texts, words, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from wherefrom import BuildConfig, Client, Query
from wherefrom.cli import main
from wherefrom.evaluation.baselines import content_baselines, gradient_baselines, hidden_baseline
from wherefrom.evaluation.checks import brittleness, labels, recall, tailpatch
from wherefrom.evaluation.judge import judge_index, judge_scores
from wherefrom.evaluation.lds import ceiling, difference, estimate, interval, lds, split_half
from wherefrom.evaluation.packs import read_pack
from wherefrom.evaluation.retrain import compute_losses, draw_masks
from wherefrom.indexer.tasks import CausalLM
from wherefrom.query.scoring import score_matrix
from wherefrom.ray_jobs.build import build
from wherefrom.store.documents import Example
from wherefrom.store.errors import UsageError, WherefromError

HERE = Path(__file__).parent


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def some_truth(subsets=30, examples=40, queries=6, seeds=1, noise=0.0, seed=0):
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal((examples, queries))
    masks = draw_masks(examples, subsets, 0.5, seed)
    losses = -(masks @ scores)[:, None] + noise * generator.standard_normal((subsets, seeds, queries)) + 50
    return scores, masks, losses


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 20), st.integers(4, 15), st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6), st.booleans())
def test_lds_is_the_mean_of_scipys_spearman(subsets, examples, queries, seeds, seed, ties):
    scores, masks, losses = some_truth(subsets, examples, queries, seeds, 3.0, seed)
    if ties:
        scores, losses = scores.round(), losses.round()
    correlation = lds(scores, masks, losses)
    for q in range(queries):
        predicted = [-sum(scores[i, q] for i in range(examples) if masks[s, i]) for s in range(subsets)]
        actual = [losses[s, :, q].mean() for s in range(subsets)]
        if len(set(actual)) == 1:
            assert np.isnan(correlation[q])
        elif len({round(p, 9) for p in predicted}) == len(predicted) or len({round(p, 12) for p in predicted}) == len(set(predicted)):
            assert correlation[q] == pytest.approx(0.0 if len(set(predicted)) == 1 else spearmanr(predicted, actual).statistic, abs=1e-12)


def test_true_sums_score_one_and_shuffled_masks_nothing():
    scores, masks, losses = some_truth(subsets=60, queries=20)
    assert estimate(scores, masks, losses).value == pytest.approx(1.0)
    assert estimate(-scores, masks, losses).value == pytest.approx(-1.0)
    shuffled = estimate(scores, np.random.default_rng(5).permutation(masks), losses)
    assert shuffled.low < 0 < shuffled.high
    assert -0.3 < shuffled.value < 0.3


def test_a_query_that_never_changes_is_left_out_and_scores_that_never_change_are_worth_nothing():
    scores, masks, losses = some_truth(queries=3)
    losses[:, :, 1] = 7.0
    actual = lds(scores, masks, losses)
    assert np.isnan(actual[1])
    assert estimate(scores, masks, losses).value == pytest.approx(1.0)
    assert lds(np.zeros_like(scores), masks, losses)[0] == 0.0


@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: s[:, :-1], lambda s: s.T])
def test_scores_of_another_shape_are_refused(change):
    scores, masks, losses = some_truth()
    with pytest.raises(UsageError, match="this pack needs"):
        lds(change(scores), masks, losses)
    scores[3, 2] = np.nan
    with pytest.raises(UsageError, match="example 3 for query 2 is not a finite number"):
        lds(scores, masks, losses)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # The mean of a table with independent row and column effects; its bootstrap draws rows and columns.
    hits = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        table = generator.standard_normal((40, 1)) + generator.standard_normal((1, 40))
        low, high = interval(lambda r, c, table=table: float(table[np.ix_(r, c)].mean()), table.shape, seed)
        hits += low < 0 < high
    assert 50 <= hits <= 60


def test_the_ceiling_is_what_one_half_of_the_seeds_says_of_the_other():
    _, _, losses = some_truth(subsets=50, seeds=4, noise=4.0)
    splits = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    expected = [spearmanr(losses[:, a, q].mean(1), losses[:, b, q].mean(1)).statistic for a, b in splits for q in range(losses.shape[2])]
    assert split_half(losses) == pytest.approx(np.mean(expected))
    assert split_half(losses[:, :1]) is None
    assert ceiling(losses[:, :1]) is None


def test_the_ceiling_of_seeds_that_contradict_each_other_is_0():
    losses = np.random.default_rng(0).standard_normal((12, 1, 5))
    assert ceiling(np.concatenate([losses, -losses], axis=1)) == 0.0


@pytest.mark.parametrize("seeds", [2, 5])
def test_the_ceiling_is_what_the_truth_itself_scores(seeds):
    scores, masks, losses = some_truth(subsets=200, queries=60, seeds=seeds, noise=4.0)
    assert ceiling(losses) == pytest.approx(estimate(scores, masks, losses).value, abs=0.03)
    assert split_half(losses) < ceiling(losses) - 0.05


def test_a_difference_is_narrower_than_its_parts_and_queries_are_drawn_too():
    scores, masks, losses = some_truth(subsets=60, queries=15, noise=3.0)
    noisy = scores + 0.5 * np.random.default_rng(1).standard_normal(scores.shape)
    lead = difference(scores, noisy, masks, losses)
    assert lead.value == pytest.approx(estimate(scores, masks, losses).value - estimate(noisy, masks, losses).value)
    assert lead.low < lead.value < lead.high
    alone = estimate(noisy, masks, losses)
    assert lead.high - lead.low < alone.high - alone.low
    uneven = np.concatenate([scores[:, :7], -scores[:, 7:]], axis=1)  # queries differ: their draw must widen the interval
    wide = estimate(uneven, masks, losses)
    assert wide.high - wide.low > 0.4
    same = estimate(np.full_like(scores, 0.1), masks, losses)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)  # not the round-off of its sums


def test_intervals_hold_as_much_as_they_say():
    low, high = interval(lambda rows, columns: float(rows.sum()), (1000, 1), 0)
    spread = 1000 * np.sqrt(1000 * 1000**2 / 12) / 1000
    assert (high - low) / spread == pytest.approx(2 * 1.96, rel=0.1)


def test_subsets_depend_on_the_seed_and_nothing_else():
    assert np.array_equal(draw_masks(30, 4, 0.5, 1), draw_masks(30, 6, 0.5, 1)[:4])
    assert not np.array_equal(draw_masks(30, 4, 0.5, 1), draw_masks(30, 4, 0.5, 2))


# --- packs


@pytest.fixture(scope="module")
def pack(tmp_path_factory, model_dir):
    """A small pack, made end to end by the command, with a training function of one's own."""
    here = tmp_path_factory.mktemp("pack")
    train = write_jsonl(here / "t.jsonl", [{"id": f"t{i}", "text": t} for i, t in enumerate(random_texts(24, seed=1, shortest=5))])
    queries = write_jsonl(here / "q.jsonl", [{"id": f"q{i}", "text": t} for i, t in enumerate(random_texts(5, seed=2, shortest=5))])
    result = run(*pack_command(model_dir, train, queries, here / "pack", "--json"))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"pack": str(here / "pack")}
    assert "wherefrom evaluate lds" in run(*pack_command(model_dir, train, queries, here / "pack")).stdout  # finished already
    return here / "pack"


def pack_command(model_dir, train, queries, out, *more, function="training:train"):
    base = ["pack", "--train", function, "--model", model_dir, "--data", train, "--queries", queries, "--out", out]
    return [str(a) for a in [*base, "--subsets", "6", "--seeds", "2", "--max-tokens", "12", *more]]


def rebuilt(pack, out, **changes):
    """A copy of a pack with some of its parts changed; None takes a part away."""
    out.mkdir()
    for path in pack.iterdir():
        if path.name in ("meta.json", "train.jsonl", "query.jsonl"):
            (out / path.name).write_bytes(path.read_bytes())
    (out / "model-epoch1").symlink_to(pack / "model-epoch1")
    with np.load(pack / "ground_truth.npz") as arrays:
        parts = {name: arrays[name] for name in arrays} | changes
    np.savez(out / "ground_truth.npz", **{name: a for name, a in parts.items() if a is not None})
    return out


def test_a_pack_holds_what_the_models_trained_on_its_subsets_lose(pack, model_dir):
    import training

    truth, read = np.load(pack / "ground_truth.npz"), read_pack(pack)
    assert read.masks.shape == (6, 24)
    assert (read.masks.sum(axis=1) == 12).all()
    assert read.losses.shape == (6, 2, 5)
    tokenizer = CausalLM().converter(_source(model_dir), 12, "truncate")
    examples, query_examples = (list(tokenizer.documents(documents)) for documents in (read.train, read.queries))
    assert max(len(e.token_ids) for e in examples) == 12
    for subset, seed in ((0, 0), (3, 1)):
        subset_examples = [e for e, inside in zip(examples, read.masks[subset], strict=True) if inside]
        trained = training.train(subset_examples, str(model_dir), 1 + subset * 2 + seed).eval()
        for query, loss in zip(query_examples, read.losses[subset, seed], strict=True):
            log_p = trained(torch.tensor(query.token_ids[None].astype(int))).logits[0].log_softmax(-1)
            expected = -sum(log_p[t - 1, query.token_ids[t]].detach() for t in range(1, len(query.token_ids)))
            assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    full_model = training.train(examples, str(model_dir), 0).eval()
    np.testing.assert_allclose(truth["full_losses"], compute_losses(CausalLM(), full_model, query_examples), rtol=1e-4)


def _source(model_dir):
    from wherefrom.indexer.models import ModelSource

    return ModelSource(str(model_dir), device="cpu")


@pytest.mark.processes
def test_a_killed_pack_goes_on_and_ends_the_same(pack, model_dir, tmp_path):
    train, queries = pack.parent / "t.jsonl", pack.parent / "q.jsonl"
    script = "from wherefrom.cli import main; main()"
    command = [sys.executable, "-c", script, *pack_command(model_dir, train, queries, tmp_path / "pack")]
    killed = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pieces = tmp_path / "pack/pieces"
    while not (pieces.is_dir() and len(list(pieces.iterdir())) > 3):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "pack/ground_truth.npz").exists()
    written = {p.name: p.stat().st_mtime_ns for p in pieces.glob("[0-9]*.npy")}
    subprocess.run([*command, "--workers", "2"], cwd=HERE, check=True, capture_output=True)
    assert {name: (pieces / name).stat().st_mtime_ns for name in written} == written
    a, b = (np.load(p / "ground_truth.npz") for p in (pack, tmp_path / "pack"))
    assert np.array_equal(a["masks"], b["masks"])
    for name in ("losses", "full_losses"):
        assert_close(b[name], a[name], 1e-5)


def test_judging_a_pack_prints_a_table_and_an_object(pack):
    options = ["-o", "rank=4", "-o", "shard_rows=16"]
    shown = run("evaluate", "lds", pack, *options)
    assert shown.exit_code == 0, shown.output
    shown_text = " ".join(shown.stdout.split())  # lines are wrapped
    assert all(name in shown_text for name in ("this index", "baseline: bm25", "baseline: hidden", "ceiling", "95 % intervals"))
    content = json.loads(run("evaluate", "lds", pack, *options, "--json").stdout)
    assert {
        "pack",
        "lds",
        "low",
        "high",
        "bytes_per_example",
        "encoder_bytes",
        "queries",
        "subsets",
        "ceiling",
        "baselines",
    } <= content.keys()
    assert (content["queries"], content["subsets"], content["seeds"]) == (5, 6, 2)
    assert set(content["baselines"]) == {"random", "tfidf", "chars", "bm25", "norm", "dot", "cosine", "hidden"}
    assert all({"lds", "low", "high", "lead", "lead_low", "lead_high"} == set(c) for c in content["baselines"].values())
    index_path = pack.parent / "kept.wherefrom"
    assert run("evaluate", "lds", pack, *options, "--out", index_path, "--json").exit_code == 0
    assert json.loads(run("evaluate", "lds", pack, "--index", index_path, "--json").stdout)["lds"] == content["lds"]
    odd = json.loads(run("evaluate", "lds", pack, *options, "--queries", "odd", "--json").stdout)
    assert odd["queries"] == 2


def test_the_judged_scores_are_those_of_an_ordinary_index(pack, tmp_path):
    judgement = judge_index(pack, {"rank": 4}, out=tmp_path / "kept.wherefrom")
    read, client = read_pack(pack), Client(tmp_path / "kept.wherefrom")
    scores = np.zeros((24, 5))
    for q, document in enumerate(client.to_examples(read.queries)):
        rows = client.encode_examples([document])["blocks"].values
        for i in range(24):
            scores[i, q] = rows[0] @ client.index.vectors(i, client.index.component("blocks")).values[0]
    assert judgement.estimate.value == pytest.approx(np.nanmean(lds(scores, read.masks, read.losses)), abs=1e-3)
    np.save(tmp_path / "theirs.npy", scores)
    content = json.loads(run("evaluate", "lds", pack, "--scores", tmp_path / "theirs.npy", "--json").stdout)
    assert content["lds"] == pytest.approx(judgement.estimate.value, abs=1e-3)
    assert content["bytes_per_example"] is None
    cosine = judge_index(pack, {"rank": 4}, scoring={"mode": "cosine"})
    lengths = np.array([np.linalg.norm(client.index.vectors(i, client.index.component("blocks")).values[0]) for i in range(24)])
    assert cosine.estimate.value == pytest.approx(np.nanmean(lds(scores / lengths[:, None], read.masks, read.losses)), abs=1e-3)
    half = judge_scores(pack, tmp_path / "theirs.npy", half="even")
    assert half.estimate.value == pytest.approx(np.nanmean(lds(scores[:, ::2], read.masks, read.losses[:, :, ::2])))


def test_options_of_scores_reach_the_judgement_and_those_without_effect_are_refused(pack, tmp_path):
    kept = tmp_path / "kept.wherefrom"
    options = ["-o", "preset=trak", "-o", "rank=4", "--out", kept, "--json"]
    content = json.loads(run("evaluate", "lds", pack, *options, "--mix", "0.5", "--mode", "loss-normalized").stdout)
    assert {name: content["method"][name] for name in ("preset", "mix", "mode")} == {
        "preset": "trak",
        "mix": "0.5",
        "mode": "loss-normalized",
    }
    plain = json.loads(run("evaluate", "lds", pack, "--index", kept, "--json").stdout)  # the preset of the index counts
    assert (plain["method"]["preset"], plain["method"]["mode"]) == ("trak", "influence")
    assert plain["lds"] != content["lds"]
    np.save(tmp_path / "theirs.npy", np.zeros((24, 5)))
    for idle in (["--mix", "auto"], ["--refine", "2"], ["--mode", "cosine"]):
        refused = run("evaluate", "lds", pack, "--scores", tmp_path / "theirs.npy", *idle)
        assert (refused.exit_code, f"{idle[0]} means nothing beside --scores" in refused.stderr) == (2, True)
    with pytest.raises(UsageError, match="mean nothing beside"):
        wherefrom.evaluate.lds(pack, scores=tmp_path / "theirs.npy", scoring={"mode": "cosine"})
    with pytest.raises(UsageError, match="nothing is not an option"):
        wherefrom.evaluate.lds(pack, kept, scoring={"nothing": 1})


def test_judgements_and_reports_are_frames_and_html(pack, index_dir):
    pandas = pytest.importorskip("pandas")
    judgement = judge_index(pack, {"rank": 4})
    frame = judgement.to_pandas().set_index("name")
    assert frame.loc["this index", "lds"] == judgement.estimate.value
    assert frame.loc["bm25", "lead_low"] == judgement.leads["bm25"].low
    assert pandas.isna(frame.loc["this index", "lead"])
    assert f"<td>{judgement.baselines['bm25'].value:.4g}</td>" in judgement._repr_html_()
    report = wherefrom.evaluate.tailpatch(index_dir, [Query(row=3)], k=2)
    assert dict(zip(report.to_pandas()["name"], report.to_pandas()["value"], strict=True)) == {
        n: f.value for n, f in report.figures.items()
    }
    assert report.check in report._repr_html_()


def _masks(pack, change):
    with np.load(pack / "ground_truth.npz") as arrays:
        masks = np.unpackbits(arrays["masks"], axis=1)
    return np.packbits(change(masks), axis=1)


def _losses(pack, change):
    with np.load(pack / "ground_truth.npz") as arrays:
        return change(arrays["losses"].copy())


def _set(array, position, value):
    array[position] = value
    return array


BAD_PARTS = {
    "no masks": (lambda p: {"masks": None}, 4, "has no masks"),
    "no losses": (lambda p: {"losses": None}, 4, "has no losses"),
    "NaN loss": (lambda p: {"losses": _losses(p, lambda x: _set(x, (2, 1, 3), np.nan))}, 4, "query 3 on subset 2, seed 1"),
    "constant losses": (lambda p: {"losses": _losses(p, np.zeros_like)}, 4, "nothing to rank"),
    "losses without seeds": (lambda p: {"losses": _losses(p, lambda x: x[:, 0])}, 4, "floats \\[subsets, seeds, queries\\]"),
    "too few queries": (lambda p: {"losses": _losses(p, lambda x: x[:, :, :3])}, 4, "losses of 3 queries, but 5"),
    "too few subsets": (lambda p: {"losses": _losses(p, lambda x: x[:4])}, 4, "masks of 6 subsets, but losses of 4"),
    "one subset": (lambda p: {"losses": _losses(p, lambda x: x[:1]), "masks": _masks(p, lambda m: m[:1])}, 4, "two subsets"),
    "masks of other examples": (lambda p: {"masks": _masks(p, lambda m: m[:, :16])}, 4, "masks are not of its 24"),
    "masks of more examples": (lambda p: {"masks": _masks(p, lambda m: np.hstack([m, m]))}, 4, "masks are not of its 24"),
    "an empty subset": (lambda p: {"masks": _masks(p, lambda m: _set(m, 1, 0))}, 4, "subset 1 holds none or all"),
    "the same subsets": (lambda p: {"masks": _masks(p, lambda m: _set(m, slice(None), m[0]))}, 4, "all subsets are the same"),
    "losses of another model": (lambda p: {"full_losses": np.full(5, 3.0, np.float32)}, 3, "is not the pack's model"),
    "full losses of other queries": (lambda p: {"full_losses": np.zeros(4, np.float32)}, 4, "full_losses are not"),
    "masks as floats": (lambda p: {"masks": np.zeros((6, 3))}, 4, "bit-packed bytes"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_bad_packs_get_one_clear_error(name, pack, tmp_path):
    make, code, message = BAD_PARTS[name]
    result = run("evaluate", "lds", rebuilt(pack, tmp_path / "bad", **make(pack)))
    assert result.exit_code == code, result.output
    assert re.search(message, result.stderr)
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert result.stderr.count("Error") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"bad"}


def test_packs_with_missing_or_foreign_files(pack, tmp_path, model_dir):
    assert "there is no pack at" in run("evaluate", "lds", tmp_path / "nowhere").stderr
    (tmp_path / "empty").mkdir()
    assert "no meta.json" in run("evaluate", "lds", tmp_path / "empty").stderr
    bad = rebuilt(pack, tmp_path / "a")
    (bad / "query.jsonl").unlink()
    result = run("evaluate", "lds", bad)
    assert (result.exit_code, "query.jsonl" in result.stderr) == (3, True)
    bad = rebuilt(pack, tmp_path / "b")
    (bad / "ground_truth.npz").write_bytes(b"PK nonsense")
    result = run("evaluate", "lds", bad)
    assert (result.exit_code, "ground_truth.npz cannot be read" in result.stderr) == (4, True)
    bad = rebuilt(pack, tmp_path / "c")
    (bad / "model-epoch1").unlink()
    assert run("evaluate", "lds", bad).exit_code == 3
    bad = rebuilt(pack, tmp_path / "d")
    meta = json.loads((bad / "meta.json").read_text())
    (bad / "meta.json").write_text(json.dumps(meta | {"encoding": {"append_token": 7, "max_tokens": 12}}))
    result = run("evaluate", "lds", bad)
    assert (result.exit_code, "documents end with token 7" in result.stderr) == (3, True)
    result = run("evaluate", "lds", pack, "--model", tmp_path)
    assert (result.exit_code, "there is no model" in result.stderr) == (3, True)
    (tmp_path / "scores.npy").write_bytes(b"nonsense")
    assert "is not a matrix" in run("evaluate", "lds", pack, "--scores", tmp_path / "scores.npy").stderr
    np.save(tmp_path / "scores.npy", np.zeros((5, 24)))
    assert "this pack needs (24, 5)" in run("evaluate", "lds", pack, "--scores", tmp_path / "scores.npy").stderr
    assert "'all', 'even', 'odd'" in run("evaluate", "lds", pack, "--queries", "some").stderr


def test_packs_that_cannot_be_made(pack, model_dir, tmp_path):
    train, queries = pack.parent / "t.jsonl", pack.parent / "q.jsonl"
    cases = {
        "training:diverge": "not finite after training",
        "training:forget": "returned NoneType",
        "training:nothing": "cannot be imported",
        "training:meddle": "read-only",
        "training:leave": "failed with SystemExit",
        "nonsense": "module:name",
    }
    for function, message in cases.items():
        result = run(*pack_command(model_dir, train, queries, tmp_path / function.replace(":", "-"), function=function))
        assert result.exit_code != 0
        assert message in result.stderr
    assert {p.name for p in (tmp_path / "training-diverge").glob("pieces/*")} == set()
    done = run(
        *pack_command(model_dir, train, queries, tmp_path / "training-diverge", "--seeds", "1")
    )  # nothing was trained, so it may change
    assert done.exit_code == 0, done.output
    assert "differs from this one (subsets)" in run(*pack_command(model_dir, train, queries, pack, "--subsets", "7")).stderr
    assert "between 0 and 1" in run(*pack_command(model_dir, train, queries, tmp_path / "x", "--fraction", "1")).stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full/other").touch()
    assert "has other content" in run(*pack_command(model_dir, train, queries, tmp_path / "full")).stderr


# --- packs of images


@pytest.fixture
def image_pack(tmp_path):
    """A pack of tiny images in both IDX files and npz, with a perceptron that nobody trained."""
    generator, place = np.random.default_rng(0), tmp_path / "images"
    place.mkdir()
    images = generator.integers(0, 256, (40, 3, 3)).astype(np.uint8)
    classes = generator.integers(0, 4, 40).astype(np.uint8)
    for name, array in (("t10k-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", classes)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(header + array.tobytes())
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    save_file(model.state_dict(), place / "model-0.safetensors")
    (place / "meta.json").write_text(json.dumps({"arch": [9, 6, 4]}))
    truth = {"train_rows": np.arange(30), "test_rows": np.arange(30, 40), "losses": generator.random((8, 2, 10)).astype(np.float32)}
    np.savez(place / "ground_truth.npz", masks=np.packbits(draw_masks(30, 8, 0.5, 0), axis=1), **truth)
    return place, model, images, classes


def test_an_image_pack_is_judged_by_the_ordinary_build(image_pack, tmp_path):
    place, model, images, classes = image_pack
    missing = run("evaluate", "lds", place)
    assert (missing.exit_code, "set data" in missing.stderr) == (3, True)
    judgement = judge_index(place, {"rank": 100, "curvature": "identity"}, data=tmp_path / "data", out=tmp_path / "kept")
    assert set(judgement.baselines) == {"random", "pixels", "norm", "dot", "cosine", "hidden"}
    client = Client(tmp_path / "kept")
    assert client.index.manifest.task == "mlp"
    row = client.index.vectors(3, client.index.component("blocks")).values[0]
    x = torch.tensor((images[3].reshape(1, -1) / 255 - 0.1307) / 0.3081, dtype=torch.float32)
    loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([int(classes[3])]))
    gradients = torch.autograd.grad(loss, [model[0].weight, model[2].weight])
    assert_close(row, torch.cat([g.flatten() for g in gradients]).numpy(), 1e-5)
    # the plain product of gradients is the baseline of that name
    scores = (
        client.index.vectors(3, client.index.component("blocks")).values[0]
        @ client.encode_examples(client.to_examples(read_pack(place, tmp_path / "data").queries))["blocks"].values.T
    )
    baselines = gradient_baselines(
        client, [client.index.example(i) for i in range(30)], client.to_examples(read_pack(place, tmp_path / "data").queries)
    )
    norms = [np.linalg.norm(client.index.vectors(3, client.index.component("blocks")).values[0])]
    lengths = np.linalg.norm(
        client.encode_examples(client.to_examples(read_pack(place, tmp_path / "data").queries))["blocks"].values, axis=1
    )
    assert_close(baselines["norm"][3], norms * 10, 1e-5)
    assert_close(baselines["dot"][3], scores, 1e-5, norms[0] * lengths)
    assert_close(baselines["cosine"][3], scores / norms[0] / lengths, 1e-5, 1.0)
    answer = Client(tmp_path / "kept").query(row=2, k=3)
    assert answer.proponents[0].row == 2
    with pytest.raises(UsageError, match="holds vectors, not texts"):
        client.query(text="w1 w2")


def test_image_packs_with_rows_or_files_that_do_not_fit(image_pack, tmp_path):
    place, *_ = image_pack
    with np.load(place / "ground_truth.npz") as arrays:
        parts = {name: arrays[name] for name in arrays}
    np.savez(place / "ground_truth.npz", **parts | {"test_rows": np.arange(31, 41)})
    assert "outside the 40" in run("evaluate", "lds", place, "--data", tmp_path / "data").stderr
    (tmp_path / "data/t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    result = run("evaluate", "lds", place, "--data", tmp_path / "data")
    assert (result.exit_code, "not a complete IDX file" in result.stderr) == (4, True)


# --- baselines


def _text_examples(*texts):
    return [Example(str(i), t, "", np.zeros(2, np.int32), np.zeros(2, bool)) for i, t in enumerate(texts)]


def test_word_baselines_find_shared_rare_words():
    train = _text_examples("the cat sat on the mat", "the dog lay on the rug", "the zyzzyva ate the mat of the cat")
    baselines = content_baselines(train, _text_examples("a zyzzyva", "dogs lay"))
    for name in ("tfidf", "chars", "bm25"):
        assert baselines[name].shape == (3, 2)
        assert baselines[name][:, 0].argmax() == 2
        assert baselines[name][:, 1].argmax() == 1
    assert baselines["tfidf"].max() <= 1 + 1e-9
    assert np.array_equal(baselines["random"], content_baselines(train, _text_examples("x", "y"))["random"])


def test_the_hidden_baseline_is_the_cosine_of_mean_last_states():
    model, examples = make_model(), make_examples(6)
    actual = hidden_baseline(CausalLM(), model, examples[:4], examples[4:], 64)
    states = []
    for e in examples:
        out = model(torch.tensor(e.token_ids[None, :-1].astype(int)), output_hidden_states=True)
        states.append(out.hidden_states[-1][0].mean(0).numpy())
    for i in range(4):
        for j in range(2):
            a, b = states[i], states[4 + j]
            assert actual[i, j] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)


# --- checks


@pytest.fixture(scope="module")
def planted(tmp_path_factory, model_dir):
    """A corpus where six documents say the same sentence, a model trained on it, and its index."""
    import training
    from wherefrom.indexer.models import ModelSource

    here = tmp_path_factory.mktemp("planted")
    sentence = words(*range(3, 15))
    texts = [sentence] * 6 + random_texts(54, seed=8, shortest=8, longest=14)
    corpus = write_jsonl(here / "c.jsonl", [{"id": f"d{i}", "text": t, "odd": i < 6} for i, t in enumerate(texts)])
    source = ModelSource(str(model_dir), device="cpu")
    encoder = CausalLM().converter(source, 64)
    from wherefrom.store.corpus import read_corpus

    model = training.train(list(encoder.documents(read_corpus([str(corpus)]))), str(model_dir), 0)
    model.save_pretrained(here / "model")
    encoder.tokenizer.save_pretrained(here / "model")
    for name, dtype in (("full", "float32"), ("small", "int8")):
        config = BuildConfig(
            model=str(here / "model"), data=(str(corpus),), out=str(here / name), rank=8, row_dtype=dtype, curvature="ekfac"
        )
        build(config)
    queries = write_jsonl(here / "q.jsonl", [{"prompt": words(3, 4, 5, 6), "completion": " " + words(*range(7, 15))}])
    return here, queries


def test_a_step_on_a_proponent_lowers_the_loss_by_what_its_gradient_says(planted):
    here, _ = planted
    client = Client(here / "full")
    query = Query(prompt=words(3, 4, 5, 6), completion=" " + words(7, 8, 9))
    report = tailpatch(client, [query], k=5, rate=1e-5)
    model, task = client.encoder.model, client.recorded.task
    model.requires_grad_(True)

    def gradient(example, mean):
        batch = task.collate([example], torch.device("cpu"))
        loss = task.loss(model, batch).sum() / ((batch.targets >= 0).sum() if mean else 1)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()

    (query_example,) = client.query_examples([query])
    model.requires_grad_(False)
    answer = client.query(prompt=query.prompt, completion=query.completion, k=5)
    model.requires_grad_(True)
    expected = np.mean(
        [1e-5 * float(gradient(query_example, False) @ gradient(client.index.example(a.row), True)) for a in answer.proponents]
    )
    model.requires_grad_(False)
    fall = report.figures["proponents: loss falls by (nats)"].value
    assert fall == pytest.approx(expected, rel=0.05)
    assert fall > 3 * abs(report.figures["random: loss falls by (nats)"].value)
    assert all(p.grad is None for p in model.parameters())


def test_tailpatch_from_the_command_line(planted):
    here, queries = planted
    content = json.loads(
        run("evaluate", "tailpatch", here / "full", "--file", queries, "-k", 4, "--optimizer", "adam", "--rate", "1e-3", "--json").stdout
    )
    assert content["figures"]["proponents: share of steps after which it fell"]["value"] > 0.9
    assert (content["queries"], content["k"], content["optimizer"]) == (1, 4, "adam")
    assert "proponents: loss falls by" in run("evaluate", "tailpatch", here / "full", "--file", queries, "-k", 2).stdout
    assert "'sgd', 'adam'" in run("evaluate", "tailpatch", here / "full", "--file", queries, "--optimizer", "lion").stderr
    assert "above 0" in run("evaluate", "tailpatch", here / "full", "--file", queries, "--rate", "0").stderr


def test_training_again_without_the_planted_documents_hurts_more_than_chance(planted, model_dir):
    here, queries = planted
    report = brittleness(
        str(here / "full"),
        [Query(prompt=words(3, 4, 5, 6), completion=" " + words(*range(7, 15)))],
        "training:train_from_scratch",
        str(model_dir),
        k=6,
        draws=3,
    )
    figures = {name.split(",")[0]: e.value for name, e in report.figures.items()}
    assert figures["without the proponents"] > 1.0
    assert figures["without the proponents"] > figures["without random examples"] + 1.0
    result = run("evaluate", "brittleness", here / "full", "--train", "training:train", "--base", model_dir, "--file", queries, "-k", 60)
    assert "must leave some of the index's 60 rows" in result.stderr


def test_the_auc_of_labels_is_sklearns(planted):
    here, _ = planted
    index = Client(here / "full").index
    truth = [index.example(i).metadata["odd"] for i in range(60)]
    norms = np.concatenate([index.rows(s, index.component("blocks")).norms for s in index.shards])
    report = labels(str(here / "full"), "odd")
    assert report.figures["AUC of self-influence"].value == pytest.approx(roc_auc_score(truth, norms))
    largest = np.argsort(-norms)[: sum(truth)]
    share = report.figures["share found when as many as are wrong are inspected"].value
    assert share == pytest.approx(np.mean([truth[i] for i in largest]))
    assert "AUC" in run("evaluate", "labels", here / "full", "--column", "odd").stdout
    assert "no metadata column 'nope'" in run("evaluate", "labels", here / "full", "--column", "nope").stderr


def test_recall_of_an_index_in_itself_is_whole_and_of_int8_nearly(planted, index_dir):
    here, queries = planted
    same = recall(str(here / "full"), str(here / "full"), k=5)
    assert {e.value for e in same.figures.values()} == {1.0}
    ours, rows = Client(here / "small").index, [3, 20, 41]
    actual = recall(str(here / "small"), str(here / "full"), [Query(row=r) for r in rows], k=3)
    scores = [score_matrix(Client(here / n).index, Client(here / n).encode([Query(row=r) for r in rows])).T for n in ("small", "full")]
    for kind, sign in (("proponents", -1), ("opponents", 1)):
        shares = []
        for q, row in enumerate(rows):
            tops = [set(sorted((i for i in range(len(ours)) if i != row), key=lambda i, s=s, q=q: sign * s[i, q])[:3]) for s in scores]
            shares.append(len(tops[0] & tops[1]) / 3)
        assert actual.figures[f"top 3 {kind} found again"].value == pytest.approx(np.mean(shares))
    small = recall(str(here / "small"), str(here / "full"), k=5)
    assert 0.9 < small.figures["top 5 proponents found again"].value <= 1.0
    assert small.figures["rank correlation of all scores"].value > 0.99
    report = json.loads(run("evaluate", "recall", here / "small", here / "full", "--file", queries, "--json").stdout)
    assert report["queries"] == 1
    assert report["bytes_per_example"] < report["reference_bytes_per_example"] / 2
    assert "do not hold the same examples" in run("evaluate", "recall", here / "small", index_dir).stderr
    with pytest.raises(WherefromError, match="below the indexes' 60 rows"):
        recall(str(here / "small"), str(here / "full"), k=61)
