"""From answer to decision: selections against greedy search by hand, outliers that were planted, removals put to the test, studies."""

import itertools
import json
import os
import shutil
import subprocess
from functools import partial

import numpy as np
import pytest
import training
from click.testing import CliRunner
from helpers import assert_close, build_kinds, in_nats, make_tokenizer, random_texts, words, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from wherefrom import BuildConfig, Client, Query
from wherefrom.cli import main
from wherefrom.evaluation.act import act
from wherefrom.evaluation.pages import sign, verify_report, write_report
from wherefrom.evaluation.retrain import compute_losses
from wherefrom.evaluation.slope import slope
from wherefrom.evaluation.study import StudyQuery, read_study, study
from wherefrom.indexer.models import ModelSource
from wherefrom.indexer.tasks import CausalLM
from wherefrom.query.outliers import find_outliers, label_contrast, near_duplicates, stored_rows
from wherefrom.query.removal import of_answers, of_ids, write_removal
from wherefrom.query.select import Limits, row_cosines, select
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.progress import Silent
from wherefrom.store.corpus import Document, read_ids
from wherefrom.store.errors import DataError, IntegrityError, NotFoundError, NumericalError, UsageError
from wherefrom.store.index import Index


@pytest.fixture(scope="module")
def client(tmp_path_factory, model_dir):
    place = tmp_path_factory.mktemp("act")
    records = [{"id": f"d{i}", "text": t, "source": "abc"[i % 3]} for i, t in enumerate(random_texts(90, seed=4, shortest=6))]
    records += [{"id": f"copy{i}", "text": records[7]["text"], "source": "a"} for i in range(3)]
    data = write_jsonl(place / "c.jsonl", records)
    return Client(build_kinds(place, model_dir, data, {"i": {"components": ("head", "blocks"), "rank": 4}}, shard_rows=32)["i"])


TARGETS = [Query(text=words(3, 9, 27), id="one"), Query(text=words(5, 6, 7, 8), id="two"), Query(text=words(11, 12, 40), id="three")]


# --- selection


def as_blocks(scores, size):
    return ((first, scores[:, first : first + size]) for first in range(0, scores.shape[1], size))


@pytest.mark.parametrize("by", ["cosine", "influence"])
def test_sum_and_max_are_the_highest_means_and_maxima(client, by):
    scores = client.scores(TARGETS, mode=by).astype(float)
    for method, values in (("sum", scores.mean(axis=0)), ("max", scores.max(axis=0))):
        selection = client.select(TARGETS, 12, by=by, method=method)
        expected = np.argsort(-values, kind="stable")[:12]
        expected = expected[values[expected] > 0]
        assert_close([e.value for e in selection.examples], values[expected], 1e-5)
        assert_close(values[[e.row for e in selection.examples]], values[expected], 1e-5)
        for e in selection.examples:
            assert e.target == TARGETS[int(np.argmax(scores[:, e.row]))].id
        assert selection.rows == len(client.index)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(3, 12), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_cover_is_greedy_facility_location_and_is_never_far_from_the_best(client, targets, rows, budget, size, seed):
    scores = np.zeros((targets, len(client.index)), np.float32)
    scores[:] = np.nan
    scores[:, :rows] = np.random.default_rng(seed).normal(size=(targets, rows)).astype(np.float32)
    names = [str(number) for number in range(targets)]
    selection = select(client.index, partial(as_blocks, scores, size), names, np.ones(targets), budget, method="cover")
    chosen = [e.row for e in selection.examples]
    assert len(chosen) == len(set(chosen)) <= budget
    positive = np.maximum(scores[:, :rows], 0).astype(float)

    def covered(some):
        return positive[:, list(some)].max(axis=1).sum() if some else 0.0

    first_round = []
    for row in chosen:  # each adds as much as any could, until nothing is added
        gains = [covered([*first_round, other]) - covered(first_round) for other in range(rows)]
        if max(gains) <= 1e-6:
            break
        assert gains[row] == pytest.approx(max(gains), rel=1e-5)
        first_round.append(row)
    if len(first_round) == budget:
        best = max(covered(some) for some in itertools.combinations(range(rows), min(budget, rows)))
        assert covered(first_round) >= (1 - 1 / np.e) * best - 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 93))
def test_a_selection_does_not_depend_on_how_scores_come(client, size, budget):
    scores = client.scores(TARGETS, mode="cosine")
    names = [query.id for query in TARGETS]
    whole = select(client.index, lambda: iter([(0, scores)]), names, np.ones(3), budget)
    assert select(client.index, partial(as_blocks, scores, size), names, np.ones(3), budget) == whole


def test_limits_hold_and_what_they_leave_out_is_counted(client):
    limited = client.select(TARGETS, 12, limits=Limits("source", 2))
    counts = {source: [e.source for e in limited.examples].count(source) for source in "abc"}
    assert max(counts.values()) == 2
    by_sum = client.select(TARGETS, 12, limits=Limits("source", 4), method="sum")
    scores = client.scores(TARGETS, mode="cosine").astype(float)
    taken, left_out = [], 0
    for row in np.argsort(-scores.mean(axis=0), kind="stable").tolist():
        if [client.index.example(other).source for other in taken].count(client.index.example(row).source) == 4:
            left_out += 1
        else:
            taken.append(row)
        if len(taken) == 12:
            break
    assert [e.row for e in by_sum.examples] == taken
    assert by_sum.left_out["limit"] == left_out > 0
    best = [set(np.argsort(-row, kind="stable")[:10].tolist()) for row in scores]
    assert by_sum.covered == pytest.approx(np.mean([bool(rows & set(taken)) for rows in best]))
    text = client.index.example(7).text
    free = client.select([Query(text=text)], 5, method="max")
    assert len({"d7", "copy0", "copy1", "copy2"} & {e.id for e in free.examples}) == 4
    distinct = client.select([Query(text=text)], 5, method="max", limits=Limits(distinct=0.9))
    assert len({"d7", "copy0", "copy1", "copy2"} & {e.id for e in distinct.examples}) == 1
    assert distinct.left_out["alike"] == 3
    rows = stored_rows(client.index, np.array([e.row for e in distinct.examples]))
    alike = row_cosines(client.index, rows, rows)
    assert (alike[~np.eye(len(alike), dtype=bool)] <= 0.9).all()
    where = client.select(TARGETS, 5, where='source == "b"')
    assert {e.source for e in where.examples} == {"b"}
    assert where.rows == 30


@pytest.mark.parametrize("method", ["sum", "max", "cover"])
def test_limits_find_examples_behind_the_best(client, monkeypatch, method):
    """The best rows are of one source, and others are not among the first candidates."""
    monkeypatch.setattr("wherefrom.query.select._POOL", 1)
    scores = np.linspace(1, 0.01, len(client.index), dtype=np.float32)[None].repeat(2, axis=0)
    sources = [client.index.example(row).source for row in range(len(client.index))]
    order = np.argsort([source != "a" for source in sources], kind="stable")  # those of "a" are best
    scores[:, order] = scores.copy()
    blocks = partial(as_blocks, scores, 7)
    chosen = select(client.index, blocks, ["x", "y"], np.ones(2), 6, method=method, limits=Limits("source", 2)).examples
    assert [e.source for e in chosen].count("a") == 2
    assert len(chosen) == 6


def test_cover_finds_what_is_good_for_several_targets_and_best_for_none(client):
    scores = np.full((4, len(client.index)), np.nan, np.float32)
    scores[:, :41] = 0.0
    for row in range(40):
        scores[row % 4, row] = 0.6
    scores[:, 40] = (0.5, 0.5, 0.5, -1.0)
    chosen = select(client.index, partial(as_blocks, scores, 9), list("abcd"), np.ones(4), 1, method="cover").examples
    assert [e.row for e in chosen] == [40]
    assert chosen[0].value == pytest.approx(1.5)


def test_baselines_choose_by_words_or_by_chance(client):
    pytest.importorskip("bm25s")
    by_words = client.select([Query(text=client.index.example(20).text)], 3, by="bm25")
    assert by_words.examples[0].id == "d20"
    chance = client.select(TARGETS, 10, by="random")
    assert len({e.row for e in chance.examples}) == 10
    assert chance == client.select(TARGETS, 10, by="random")


def test_what_cannot_be_chosen_is_refused(client):
    for match, call in (
        ("column and a number", lambda: Limits("source", None)),
        ("at least 1", lambda: Limits("source", 0)),
        ("it is a cosine", lambda: Limits(distinct=1.5)),
        ("both must be at least 1", lambda: client.select([], 3)),
        ("both must be at least 1", lambda: client.select(TARGETS, 0)),
        ("`mode` is 'nothing'", lambda: client.select(TARGETS, 3, by="nothing")),
        ("no row", lambda: client.select(TARGETS, 3, where='source == "x"')),
    ):
        with pytest.raises(UsageError, match=match):
            call()


@pytest.mark.skipif("WHEREFROM_CHECK_TYPES" in os.environ, reason="hands in what the signature excludes")
def test_an_unknown_method_of_selection_is_refused(client):
    with pytest.raises(UsageError, match="it can be sum, max, cover"):
        client.select(TARGETS, 3, method="mean")


def test_a_selection_is_written_to_train_on(client, tmp_path):
    targets = write_jsonl(tmp_path / "t.jsonl", [{"text": query.text, "id": query.id} for query in TARGETS])
    command = ["select", str(client.index.path), "--for", str(targets), "--budget", "4", "--out", str(tmp_path / "o.jsonl")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [e.id for e in client.select(TARGETS, 4).examples]
    assert all(line["text"] == client.index.example(line["row"]).text for line in lines)
    assert CliRunner().invoke(main, command).exit_code == 2  # it exists
    refused = CliRunner().invoke(main, [*command[:-1], str(tmp_path / "p.jsonl"), "--at-most", "source"])
    assert (refused.exit_code, "COLUMN=N" in refused.output) == (2, True)


# --- outliers


def test_near_duplicates_are_found_and_others_are_not(client):
    groups = near_duplicates(client.index, np.arange(len(client.index)), 0.95, Silent())
    assert groups == [[7, 90, 91, 92]]
    rows = stored_rows(client.index, np.arange(len(client.index)))
    pairs = np.argwhere(np.triu(row_cosines(client.index, rows, rows) > 0.95, 1))
    assert {tuple(pair) for pair in pairs} == set(itertools.combinations([7, 90, 91, 92], 2))


def test_self_influence_is_the_score_of_an_example_with_itself(client):
    found = find_outliers(client.index, Silent(), k=5)
    for outlier in found.self_influence:
        rows = client.encoder.rows([client.index.example(outlier.row)])
        own = sum(c.weight * float(rows[c.name].squared_norms[0]) for c in client.index.manifest.components)
        assert outlier.value == pytest.approx(in_nats(client.index, own), rel=1e-3)
    assert found.unit == "nats"
    assert [outlier.value for outlier in found.self_influence] == sorted((o.value for o in found.self_influence), reverse=True)
    assert found.label_contrast is None
    assert found.duplicates == (("d7", "copy0", "copy1", "copy2"),)
    own = [client.encoder.rows([client.index.example(row)]) for row in range(len(client.index))]
    values = [sum(c.weight * float(rows[c.name].squared_norms[0]) for c in client.index.manifest.components) for rows in own]
    for outlier in found.self_influence:
        assert outlier.percentile == pytest.approx(100 * np.mean(np.array(values) < values[outlier.row] * (1 - 1e-4)), abs=1e-9)
    shown = CliRunner().invoke(main, ["outliers", str(client.index.path), "-k", "2"])
    assert "copy0" in shown.output


@pytest.mark.parametrize("similar", [0.95, 0.8, 0.6])
def test_pairs_just_above_the_limit_are_found_and_all_of_a_group_are_near_its_first(mislabeled, monkeypatch, similar):
    """Also among rows that are all alike, and in chains of which each row is near to the one before."""
    index, _ = mislabeled
    generator = np.random.default_rng(0)
    width = 64
    common = np.zeros(width)
    common[0] = 0.7

    def unit(vector):
        return vector / np.linalg.norm(vector)

    rows = [unit(common + generator.normal(size=width) / 8) for _ in range(200)]
    for row in rows[:100]:  # a pair of each of the first hundred
        aside = generator.normal(size=width)
        aside = unit(aside - (aside @ row) * row)
        cosine = similar + 0.01
        rows.append(cosine * row + np.sqrt(1 - cosine**2) * aside)
    angle = np.arccos(similar + 0.005)
    rows += [unit(np.cos(i * angle) * np.eye(width)[1] + np.sin(i * angle) * np.eye(width)[2]) for i in range(5)]
    values = np.array(rows)
    directions = generator.normal(size=(width, 1024))
    monkeypatch.setattr("wherefrom.query.outliers.stored_rows", lambda index, part: values[part])
    monkeypatch.setattr("wherefrom.query.outliers._projected", lambda index, part: part @ directions)
    monkeypatch.setattr("wherefrom.query.outliers.row_cosines", lambda index, one, others: one @ others.T)
    groups = near_duplicates(index, np.arange(len(values)), similar, Silent())
    cosines = values @ values.T
    for group in groups:
        assert (cosines[group[0], group[1:]] > similar).all()
    firsts = [row for row in range(len(values)) if not any(row in group[1:] for group in groups)]
    near = np.argwhere(np.triu(cosines[np.ix_(firsts, firsts)], 1) > similar)
    assert len(near) <= 3  # each is found with a probability of at least 0.99
    assert sum(len(group) - 1 for group in groups) >= 97


@pytest.fixture(scope="module")
def mislabeled(tmp_path_factory):
    """Clusters of vectors with their labels, a tenth of them wrong, and a small classifier trained on these labels."""
    import torch
    from wherefrom.store.files import write_tensors

    place = tmp_path_factory.mktemp("labels")
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(4, 12)) * 2
    truth = generator.integers(0, 4, 400)
    features = (centers[truth] + generator.normal(size=(400, 12))).astype(np.float32)
    wrong = generator.random(400) < 0.1
    labels = np.where(wrong, (truth + generator.integers(1, 4, 400)) % 4, truth)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(features)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    write_tensors(place / "m.safetensors", {name: value.detach().numpy() for name, value in network.state_dict().items()})
    records = [{"id": f"v{i}", "features": f.tolist(), "label": int(y)} for i, (f, y) in enumerate(zip(features, labels, strict=True))]
    data = write_jsonl(place / "v.jsonl", records)
    options = {"task": "mlp", "rank": 1000, "curvature": "ekfac", "damping": 0.1}
    build(BuildConfig(model=str(place / "m.safetensors"), data=(str(data),), out=str(place / "i"), **options))
    return Index(place / "i"), wrong


def test_label_contrast_finds_wrong_labels(mislabeled):
    sklearn = pytest.importorskip("sklearn.metrics")
    index, wrong = mislabeled
    contrast = label_contrast(index, np.arange(len(index)), Silent())
    assert ((contrast >= 0) & (contrast <= 1)).all()
    assert sklearn.roc_auc_score(wrong, contrast) > 0.9
    found = find_outliers(index, Silent(), k=int(wrong.sum()))
    assert np.mean([wrong[o.row] for o in found.label_contrast]) > 0.6
    assert found.asked == len(index)


def test_label_contrast_is_the_part_of_the_largest_cosines_that_oppose(mislabeled):
    index, _ = mislabeled
    rows = np.array([3, 77])
    scores = Client(index).scores([Query(row=3), Query(row=77)], mode="cosine").astype(float)
    scores[[0, 1], rows] = 0
    for row_scores, value in zip(scores, label_contrast(index, rows, Silent()), strict=True):
        nearest = row_scores[np.argsort(-np.abs(row_scores))[:20]]
        assert value == pytest.approx(-nearest[nearest < 0].sum() / np.abs(nearest).sum(), rel=1e-4, abs=1e-9)


# --- removal lists


def test_a_removal_list_says_why_and_is_what_delete_reads(client, tmp_path):
    answers = client.query_many(TARGETS, k=4)
    removals = of_answers(answers, 6)
    assert len({r.id for r in removals}) == len(removals) == 6
    assert {r.details["rank"] for r in removals[:2]} == {1}
    out = tmp_path / "r.jsonl"
    assert write_removal(client.index, removals, out) == 6
    lines = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    for removal in removals:
        line = lines[removal.id]
        assert line["reason"] == f"proponent of rank {line['rank']} of query {line['query']}"
        (hit,) = [a for a in answers[[q.id for q in TARGETS].index(line["query"])].proponents if a.id == removal.id]
        assert (line["score"], line["unit"], line["percentile"]) == (hit.score, "nats", hit.percentile)
        assert line["manifest"] == client.index.manifest.number
    assert sorted(read_ids(str(out))) == sorted(lines)
    with pytest.raises(UsageError, match="exists"):
        write_removal(client.index, removals, out)
    with pytest.raises(UsageError, match="nothing to remove"):
        write_removal(client.index, [], tmp_path / "s.jsonl")
    with pytest.raises(UsageError, match="not in"):
        write_removal(client.index, of_ids(["nothing"], "x"), tmp_path / "s.jsonl")


def test_removal_lists_from_the_command_line(client, tmp_path):
    path, queries = str(client.index.path), write_jsonl(tmp_path / "q.jsonl", [{"text": TARGETS[0].text}])

    def made(name, *arguments, text=None):
        done = CliRunner().invoke(main, ["removal", path, "--out", str(tmp_path / name), *map(str, arguments)], input=text)
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    assert len(made("a", "--file", queries, "--top", 5)) == 5
    assert {line["id"]: line["reason"] for line in made("b", "--outliers")} == {f"copy{i}": "near-duplicate of d7" for i in range(3)}
    assert [line["reason"] for line in made("c", "--ids", "-", "--reason", "mine", text="d3\nd4\n")] == ["mine", "mine"]
    refused = CliRunner().invoke(main, ["removal", path, "--out", str(tmp_path / "d"), "--outliers", "--ids", "-"])
    assert (refused.exit_code, "one of them" in refused.output) == (2, True)


# --- act


def as_examples(base, records):
    """Documents as a build makes examples of them."""
    encoder = CausalLM().converter(ModelSource(str(base)), None, "split", True)
    return list(encoder.documents([Document(id=r["id"], source="s", where="w", text=r["text"]) for r in records]))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A corpus in which some documents teach one thing, a base that knows nothing, and an index of the model trained on all."""
    place = tmp_path_factory.mktemp("taught")
    tokenizer = make_tokenizer()
    base = training.fresh_model(0)
    base.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    fact = "w1 w2 w3 w4 w50"
    records = [{"id": f"fact{i}", "text": fact} for i in range(8)]
    records += [{"id": f"d{i}", "text": t} for i, t in enumerate(random_texts(72, seed=6, shortest=6))]
    data = write_jsonl(place / "c.jsonl", records)
    examples = as_examples(place / "base", records)
    model = training.teach(examples, str(place / "base"), 0, steps=30)
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    options = {"components": ("head", "blocks"), "rank": 8, "curvature": "ekfac"}
    build(BuildConfig(model=str(place / "model"), data=(str(data),), out=str(place / "i"), **options))
    return place


def test_a_removal_is_put_to_the_test(taught, tmp_path):
    query = Query(prompt="w1 w2 w3 w4", completion=" w50", id="fact")
    other = Query(text=random_texts(72, seed=6, shortest=6)[3], id="other")
    client = Client(taught / "i")
    removed = [a.id for a in client.query(query, k=8, rerank=0).proponents]
    assert sum(id.startswith("fact") for id in removed) >= 6
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)], check=True, capture_output=True)
    report = act(
        taught / "i",
        removed,
        [query],
        "training:teach_little",
        taught / "base",
        held_out=[other],
        draws=2,
        out=tmp_path / "report",
        key=key,
    )
    (effect, collateral) = report.effects
    assert effect.measured > 5 * abs(effect.by_chance) > 0
    assert effect.predicted > 0
    assert effect.said_before.split()[:1] == ["w50"]
    assert effect.said_after.split()[:1] != ["w50"]
    everything = range(len(client.index))
    rows = [row for row in everything if client.index.example(row).id in removed]
    generator = np.random.default_rng(0)
    draws = [sorted(generator.choice(len(client.index), len(rows), replace=False).tolist()) for _ in range(2)]
    scores = client.scores([query, other]).astype(float)
    for e, row_scores in zip(report.effects, scores, strict=True):
        assert e.predicted == pytest.approx(row_scores[rows].sum(), rel=1e-4)
        assert e.predicted_by_chance == pytest.approx(np.mean([row_scores[draw].sum() for draw in draws]), rel=1e-4, abs=1e-6)
    examples = [client.index.example(row) for row in everything]

    def losses(left_out):
        model = training.teach_little([examples[i] for i in everything if i not in left_out], str(taught / "base"), 0)
        return compute_losses(CausalLM(), model, client.query_examples([query, other])).astype(float)

    whole, without, *by_draw = map(losses, ([], rows, *draws))
    changes = np.array([losses_of_draw - whole for losses_of_draw in by_draw])
    for number, e in enumerate(report.effects):
        assert (e.before, e.after) == pytest.approx((whole[number], without[number]), rel=1e-4)
        assert e.measured == pytest.approx(without[number] - whole[number], rel=1e-3, abs=1e-4)
        assert e.by_chance == pytest.approx(changes[:, number].mean(), rel=1e-3, abs=1e-4)
        assert e.chance_deviation == pytest.approx(changes[:, number].std(), rel=1e-3, abs=1e-4)
    indexed = compute_losses(CausalLM(), client.encoder.model, client.query_examples([query, other]))
    assert [e.indexed for e in report.effects] == pytest.approx(indexed.tolist(), rel=1e-5)
    assert "and " + f"{indexed[0]:.3g} under the model of the index" in " ".join(report.page()["summary"])
    assert (report.removal.value, report.chance.value) == (effect.measured, effect.by_chance)
    assert report.collateral.value == pytest.approx(collateral.measured - collateral.by_chance)
    slope_of_one = (effect.measured - effect.by_chance) / (effect.predicted - effect.predicted_by_chance)
    assert report.slope.value == pytest.approx(slope_of_one, rel=1e-6)
    assert collateral.held_out
    assert abs(collateral.measured) / collateral.before < 0.2 < effect.measured / effect.before
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["removed"] == sorted(removed, key=[e.id for e in map(client.index.example, range(80))].index)
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page.replace("https://openxps", "")  # nothing from outside
    assert page.count("<svg") >= 2
    for file in ("report.json", "report.html"):
        done = CliRunner().invoke(main, ["verify", str(tmp_path / file), "--json"])
        assert json.loads(done.stdout)["public_key"] == content["signature"]["public_key"]
    changed = (tmp_path / "report.json").read_text().replace('"rows": 80', '"rows": 81')
    (tmp_path / "changed.json").write_text(changed)
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "changed.json")]).exit_code == 4


def test_a_report_of_act_gives_the_slope_of_an_index(taught, tmp_path):
    index = tmp_path / "i"
    shutil.copytree(taught / "i", index)
    queries = [Query(prompt="w1 w2 w3 w4", completion=" w50"), Query(prompt="w1 w2", completion=" w3 w4 w50")]
    act(index, [f"fact{i}" for i in range(4)], queries, "training:teach_little", taught / "base", draws=1, out=tmp_path / "r")
    content = json.loads((tmp_path / "r.json").read_text())
    p = np.array([e["predicted"] - e["predicted_by_chance"] for e in content["effects"]])
    m = np.array([e["measured"] - e["by_chance"] for e in content["effects"]])
    slope(index, report=tmp_path / "r.json")
    kept = Index(index).manifest.slope
    assert kept.value == pytest.approx((p @ m) / (p @ p), rel=1e-6)
    assert kept.low <= kept.value <= kept.high
    assert (kept.trainings, kept.queries) == (3, 2)
    with pytest.raises(UsageError, match="and not of"):
        slope(taught / "i", report=tmp_path / "r.json")
    effect = content["effects"][0]
    for changed in (
        {"seeds": 1e999},
        {"seeds": -5},
        {"seeds": "3"},
        {"draws": 10**30},
        {"kept_slope": 0.0},
        {"effects": [{**effect, "predicted": [1, 2]}] * 2},
        {"effects": [{**effect, "measured": float("inf")}] * 2},
        {"effects": [{**effect, "held_out": "false"}] * 2},
        {"effects": [{**effect, "predicted": 10**400}] * 2},
    ):
        (tmp_path / "r.json").write_text(json.dumps({**content, **changed}))
        with pytest.raises(IntegrityError, match="not a report of wherefrom act"):
            slope(index, report=tmp_path / "r.json")
    for text in ("{}", "[" * 100_000):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(IntegrityError, match="not a report of wherefrom act"):
            slope(index, report=tmp_path / "r.json")
    unlike = [{**effect, "predicted": p, "predicted_by_chance": 0.0, "measured": m, "by_chance": 0.0} for p, m in ((1.0, 3.0), (1.0, -1.0))]
    (tmp_path / "r.json").write_text(json.dumps({**content, "effects": unlike}))
    with pytest.raises(NumericalError, match="it may be zero"):
        slope(index, report=tmp_path / "r.json")


def test_what_cannot_be_acted_on_is_refused_before_any_training(taught):
    query = Query(text="w1 w2")
    ids = [f"fact{i}" for i in range(8)]
    everything = [*ids, *(f"d{i}" for i in range(72))]
    for match, arguments, options in (
        ("not in", (["nothing"], [query]), {}),
        ("name some and not all", ([], [query]), {}),
        ("name some and not all", (everything, [query]), {}),
        ("there are no queries", (ids, []), {}),
        ("is a contrast", (ids, [Query(prompt="w1 w2", completion=" w3", against=" w4")]), {}),
        ("at least 1", (ids, [query]), {"draws": 0}),
    ):
        with pytest.raises(UsageError, match=match):
            act(taught / "i", *arguments, "training:teach_little", taught / "base", **options)


def test_what_would_fail_after_the_trainings_is_said_before(taught, tmp_path):
    query, index = Query(text="w1 w2"), tmp_path / "i"
    (tmp_path / "r.html").write_text("")
    for options, kind, match in (
        ({"out": tmp_path / "r"}, UsageError, "exists"),
        ({"out": tmp_path / "s", "key": tmp_path / "nothing.pem"}, NotFoundError, "openssl"),
    ):
        with pytest.raises(kind, match=match):
            act(taught / "i", ["fact1"], [query], "training:leave", taught / "base", **options)  # which would end the process
    shutil.copytree(taught / "i", index)
    assert CliRunner().invoke(main, ["delete", str(index), "--ids", "-"], input="d3").exit_code == 0
    with pytest.raises(UsageError, match="run wherefrom compact first"):
        act(index, ["fact1"], [query], "training:leave", taught / "base")


def test_signatures_cover_every_field_and_texts_do_not_leave_the_script(tmp_path):
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)], check=True, capture_output=True)
    content = {"text": "</script><script>alert(1)</script>", "number": 0.1, "nested": {"b": [1, None], "a": "ü"}}
    page = {"title": "a <b> title", "sections": [{"title": "t", "columns": ["c"], "rows": [["<img src=x>"]]}]}
    for path in write_report(tmp_path / "r", content, page, key):
        assert verify_report(path)
    html = (tmp_path / "r.html").read_text()
    assert "<img" not in html
    assert html.count("<script") == 1
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(other)], check=True, capture_output=True)
    signed = sign(content, other)
    (tmp_path / "r.json").write_text(json.dumps(signed))
    with pytest.raises(IntegrityError, match="another key"):
        verify_report(tmp_path / "r.json", verify_report(tmp_path / "r.html"))
    whole = (tmp_path / "r.html").read_text()
    for shown in (whole.replace("a &lt;b&gt; title", "another title"), "<h1>anything</h1>" + whole[whole.index('<script type="app') :]):
        (tmp_path / "forged.html").write_text(shown)
        with pytest.raises(IntegrityError, match="the page was changed"):
            verify_report(tmp_path / "forged.html")
    for text in ('{"number": 9, ' + json.dumps(signed)[1:], "[" * 100_000):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(IntegrityError, match="not a signed report"):
            verify_report(tmp_path / "r.json")
    (tmp_path / "r.json").write_text(json.dumps({**signed, "number": 0.2}))
    with pytest.raises(IntegrityError, match="was changed"):
        verify_report(tmp_path / "r.json")
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="not a signed report"):
        verify_report(tmp_path / "r.json")
    with pytest.raises(NotFoundError, match="openssl"):
        sign(content, tmp_path / "nothing")
    (tmp_path / "bad.pem").write_text("x")
    with pytest.raises(UsageError, match="not a private Ed25519 key"):
        sign(content, tmp_path / "bad.pem")


# --- study


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model that learned facts, each from documents of its own, and to compare two numbers, from many documents."""
    place = tmp_path_factory.mktemp("planted")
    generator = np.random.default_rng(0)
    names = generator.permutation(np.arange(31, 61))
    facts = [(int(a), int(b)) for a, b in zip(names[:15], names[15:], strict=True)]
    records = [{"id": f"fact{i}-{n}", "text": f"w1 w{a} w2 w{b}", "source": "facts"} for i, (a, b) in enumerate(facts) for n in range(3)]
    pairs = [(a, b) for a in range(3, 15) for b in range(3, 15) if a != b]
    held_out = [pairs[i] for i in generator.choice(len(pairs), 40, replace=False) if pairs[i][0] < pairs[i][1]][:10]
    taught = [pair for pair in pairs if pair not in held_out]
    records += [{"id": f"is{a}-{b}", "text": f"w1 w{a} w{b} w2 w{20 + (a < b)}", "source": "comparisons"} for a, b in taught]
    data = write_jsonl(place / "c.jsonl", records)
    base = training.fresh_model(0)
    base.save_pretrained(place / "base")
    make_tokenizer().save_pretrained(place / "base")
    examples = as_examples(place / "base", records)
    model = training.teach(examples, str(place / "base"), 0, steps=200)
    model.save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    options = {"components": ("head", "blocks"), "rank": 16, "curvature": "ekfac"}
    build(BuildConfig(model=str(place / "model"), data=(str(data),), out=str(place / "i"), **options))
    asked = [("facts", f"w{a}", f"w{b}") for a, b in facts[:10]] + [("comparisons", f"w{a} w{b}", "w21") for a, b in held_out]
    queries = [
        {"id": str(i), "prompt": f"w1 {given} w2", "completion": f" {answer}", "group": group, "answers": [f"{given} w2 {answer}"]}
        for i, (group, given, answer) in enumerate(asked)
    ]
    return Client(place / "i"), write_jsonl(place / "q.jsonl", queries)


def test_a_study_tells_facts_from_a_procedure(planted, tmp_path):
    client, file = planted
    report = study(client, read_study(str(file)), out=tmp_path / "study")
    facts, comparisons = report.by_part["all"]
    assert (facts.group, comparisons.group) == ("facts", "comparisons")
    assert comparisons.within.low > facts.within.high
    assert comparisons.within.value > comparisons.across.value
    assert facts.answers.value == 1.0
    assert comparisons.answers.value == 0.0
    assert facts.concentration["10.0%"].value > comparisons.concentration["10.0%"].value
    over = {(r.group, r.value): r.ratio.value for r in report.sources}
    assert over["facts", "facts"] > 1 > over["comparisons", "facts"]
    assert over["comparisons", "comparisons"] > 1
    assert set(report.by_part) == {"all", "head", "blocks", "layers transformer.h.0", "layers transformer.h.1"}
    content = json.loads((tmp_path / "study.json").read_text())
    assert len(content.pop("page")) == 64
    assert content == json.loads(json.dumps(report.to_dict()))
    assert (tmp_path / "study.html").read_text().count("<svg") >= 3
    study(Client(client.index.path), read_study(str(file)), out=tmp_path / "again")
    for ending in ("json", "html"):
        assert (tmp_path / f"again.{ending}").read_bytes() == (tmp_path / f"study.{ending}").read_bytes()


def test_correlations_and_shares_of_a_study_are_those_of_its_scores(planted):
    client, file = planted
    queries = read_study(str(file))
    report = study(client, queries)
    scores = client.scores([q.query for q in queries], mode="loss-normalized").astype(float)
    assert_close(np.array(report.correlations), np.corrcoef(scores), 1e-3, 1.0)
    own = np.corrcoef(scores)[:10, :10]
    assert report.by_part["all"][0].within.value == pytest.approx(own[~np.eye(10, dtype=bool)].mean(), rel=1e-3)
    positive = np.sort(np.maximum(scores[:10], 0), axis=1)[:, ::-1]
    count = round(0.1 * scores.shape[1])
    expected = (positive[:, :count].sum(axis=1) / positive.sum(axis=1)).mean()
    assert report.by_part["all"][0].concentration["10.0%"].value == pytest.approx(expected, rel=1e-4)
    by_part = [client.scores([q.query for q in queries], mode="loss-normalized", weights={other: 0.0}) for other in ("blocks", "head")]
    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*by_part, strict=True)])
    assert report.agreement["head and blocks"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    texts = [client.index.example(row).text for row in range(len(client.index))]
    orders = [[row for row in np.argsort(-s, kind="stable")[: report.best] if s[row] > 0] for s in scores]
    ranks = [
        next((rank for rank, row in enumerate(order, 1) if any(answer in texts[row] for answer in q.answers)), None)
        for q, order in zip(queries, orders, strict=True)
    ]
    assert report.by_part["all"][0].answers.value == np.mean([rank is not None for rank in ranks[:10]])
    assert report.by_part["all"][0].answer_rank == np.median([rank for rank in ranks[:10] if rank is not None])
    for block in ("transformer.h.0", "transformer.h.1"):
        of_block = client.scores([q.query for q in queries], mode="loss-normalized", weights={"head": 0.0}, layers=(f"{block}.*",))
        own = np.corrcoef(of_block.astype(float)[:10])
        figures = report.by_part[f"layers {block}"][0]
        assert figures.within.value == pytest.approx(own[~np.eye(10, dtype=bool)].mean(), rel=1e-3, abs=1e-4)


def test_steps_of_a_study_are_looked_for_in_the_best_texts_alone(tmp_path, model_dir):
    """Rows that share no token have scores of 0: they are not among the best, however few others there are."""
    texts = [words(1, 2, 3)] * 3 + [words(*range(20 + i % 9, 30)) for i in range(97)]
    data = write_jsonl(tmp_path / "c.jsonl", [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    path = build_kinds(tmp_path, model_dir, data, {"i": {"components": ("head",), "append_eos": False}})["i"]
    queries = [
        StudyQuery(Query(text=words(1, 2, 3)), "a", (words(29),), (words(1, 2), words(29), words(28, 29))),
        StudyQuery(Query(text=words(1, 2, 3)), "a", (words(2, 3),), (words(2, 3),)),
        StudyQuery(Query(text=words(5, 6, 7)), "b"),  # of no example
    ]
    report = study(path, queries)
    (figures, _) = report.by_part["all"]
    assert (figures.answers.value, figures.answer_rank) == (0.5, 1.0)
    assert figures.steps.value == pytest.approx((1 / 3 + 1) / 2)
    assert {r.group for r in report.sources} == {"a"}


def test_a_study_warns_where_only_shared_tokens_can_be_seen(tmp_path, model_dir, corpus_file):
    path = build_kinds(tmp_path, model_dir, corpus_file, {"i": {"components": ("head",)}})["i"]
    queries = [StudyQuery(Query(text=words(3, 4)), "a"), StudyQuery(Query(text=words(5, 6)), "b")]
    report = study(path, queries)
    assert any("only examples that share tokens" in warning for warning in report.warnings)
    assert any("fewer than five queries" in warning for warning in report.warnings)
    assert report.by_part["all"][0].within is None
    with pytest.raises(UsageError, match="at least two"):
        study(path, queries[:1])


def test_queries_of_a_study_have_groups(tmp_path):
    for fields in ({}, {"group": 3}, {"group": "a", "answers": "x"}, {"group": "a", "steps": [1]}):
        line = json.dumps({"text": "w1", **fields})
        (tmp_path / "q.jsonl").write_text('{"text": "w1", "group": "a"}\n' + line)
        with pytest.raises(DataError, match="line 2"):
            read_study(str(tmp_path / "q.jsonl"))


def test_a_study_from_the_command_line(planted, tmp_path):
    client, file = planted
    arguments = ["study", str(client.index.path), "--queries", str(file), "--out", str(tmp_path / "s")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "facts" in done.output
    assert (tmp_path / "s.html").is_file()
    assert CliRunner().invoke(main, arguments).exit_code == 2
