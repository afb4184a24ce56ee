"""FAISS indexes next to the rows, and rows and queries that are exported: against exact scans and plain FAISS."""

import json
import shutil
from itertools import pairwise

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from helpers import assert_close, dense_index, random_texts, write_jsonl
from wherefrom import BuildConfig, Client, Query
from wherefrom.cli import main
from wherefrom.query import faiss_index as module
from wherefrom.query.faiss_index import faiss_problems, make_faiss, read_record, row_blocks
from wherefrom.ray_jobs.add import add
from wherefrom.ray_jobs.build import build
from wherefrom.ray_jobs.progress import Silent
from wherefrom.store.errors import IncompatibleError, IntegrityError, NotFoundError, UsageError
from wherefrom.store.index import Index
from wherefrom.store.update import delete


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def best(answer):
    return [(a.row, a.score) for a in answer.proponents], [(a.row, a.score) for a in answer.opponents]


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory, index_dir):
    """3,000 rows in clusters, of which 20 are deleted."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(60, 32))[generator.integers(0, 60, 3000)] + 0.3 * generator.normal(size=(3000, 32))
    path = tmp_path_factory.mktemp("faiss") / "i"
    dense_index(path, index_dir, rows, group_rows=1000)
    delete(path, [f"r{i}" for i in range(100, 120)])
    return path


@pytest.fixture
def copy(gaussian, tmp_path):
    shutil.copytree(gaussian, tmp_path / "i")
    return tmp_path / "i"


FACTORIES = [
    ("Flat", "", 1.0),
    ("HNSW16", "efSearch=200", 0.97),
    ("IVF16,Flat", "nprobe=16", 1.0),
    ("IVF16_HNSW8,SQ8", "nprobe=16", 1.0),
    ("PCA32,IVF8,Flat", "nprobe=8", 1.0),
    ("IVF8,RaBitQ", "nprobe=8", 0.6),
    ("SQ4,Refine(SQ8)", "k_factor_rf=10", 1.0),
]


@pytest.mark.parametrize(("factory", "parameters", "least"), FACTORIES)
def test_a_faiss_index_finds_what_a_scan_finds_and_says_how_much_it_misses(copy, factory, parameters, least):
    record = make_faiss(Index(copy), factory, parameters, None, Silent())
    assert min(record.proponents, record.opponents) >= least
    client = Client(copy)
    rows = client.index.manifest.rows
    generator = np.random.default_rng(1)
    queries = [Query(row=int(row)) for row in generator.choice(np.arange(200, rows), 10, replace=False)]
    scanned, actual = client.query_many(queries, k=5), client.query_many(queries, k=5, engine="faiss")
    shared = []
    for a, b in zip(scanned, actual, strict=True):
        assert b.search.method == "by FAISS"
        assert b.search.recall is None
        assert (b.search.faiss.factory, b.search.faiss.proponents) == (factory, record.proponents)
        assert b.search.rows == rows - 20
        scores = client.scores([Query(**{"row": a.query["row"]})])[0]
        for hit in (*b.proponents, *b.opponents):
            assert_close(hit.score, scores[hit.row], 1e-5, np.nanmax(np.abs(scores)))  # scored again from the rows
        shared += [len({x[0] for x in mine} & {x[0] for x in theirs}) / 5 for mine, theirs in zip(best(a), best(b), strict=True)]
        assert not {x[0] for side in best(b) for x in side} & set(range(100, 120))  # the deleted ones
    assert np.mean(shared) >= least - 0.05
    if factory == "Flat":
        assert np.mean(shared) == 1.0


def test_candidates_are_read_without_search_caches_too(copy):
    make_faiss(Index(copy), "Flat", "", None, Silent())
    queries = [Query(row=row) for row in (3, 500, 2900)]
    expected = [best(answer) for answer in Client(copy).query_many(queries, k=10, engine="faiss")]
    shutil.rmtree(copy / "search")
    assert [best(answer) for answer in Client(copy).query_many(queries, k=10, engine="faiss")] == expected


def test_filters_damping_and_opponents_work_as_in_a_scan(tmp_path, model_dir, corpus_file):
    out = tmp_path / "i"
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(out), rank=4, shard_rows=32))
    done = run("reindex", out, "--faiss", "HNSW8", "--faiss-parameters", "efSearch=200")
    assert done.exit_code == 0
    assert "it finds 100.0% of the best" in done.stdout
    printed = json.loads(run("reindex", out, "--faiss", "HNSW8", "--faiss-parameters", "efSearch=200", "--json").stdout)
    assert (printed["written"], printed["faiss"]["factory"], printed["faiss"]["proponents"]) == (0, "HNSW8", 1.0)
    client = Client(out)
    queries = [Query(text=text) for text in random_texts(4, seed=3)]
    for options in ({}, {"damping": 2.0}, {"layers": ("h.0.*",)}, {"where": "year >= 1960"}, {"opponents": False}, {"curvature": False}):
        scanned, actual = client.query_many(queries, k=5, **options), client.query_many(queries, k=5, engine="faiss", **options)
        for a, b in zip(scanned, actual, strict=True):
            assert [[x[0] for x in side] for side in best(a)] == [[x[0] for x in side] for side in best(b)]
            for mine, theirs in zip(best(a), best(b), strict=True):
                assert_close(np.array([x[1] for x in theirs]), np.array([x[1] for x in mine]), 1e-5)
    shown = run("query", out, "--row", 3, "--engine", "faiss")
    assert "by FAISS (HNSW8, efSearch=200)" in shown.stdout.replace("\n", " ")
    assert "measured, not certified" in " ".join(shown.stdout.split())
    assert json.loads(run("query", out, "--row", 3, "--engine", "faiss", "--json").stdout)["search"]["recall"] is None


def test_the_recall_that_is_stated_is_that_of_rows_which_were_not_trained_on(tmp_path, index_dir, monkeypatch):
    """A coarse index, measured again by brute force with other code."""
    trained, copy = [], tmp_path / "i"
    dense_index(copy, index_dir, np.random.default_rng(0).normal(size=(3000, 32)))
    delete(copy, [f"r{i}" for i in range(100, 120)])
    monkeypatch.setattr(module, "_gather", lambda *a, gather=module._gather: trained.append(a[2]) or gather(*a))
    record = make_faiss(Index(copy), "PQ2x4", "", None, Silent())
    held_out, sample = trained
    assert not set(held_out) & set(sample)
    assert not set(range(100, 120)) & (set(held_out) | set(sample))
    assert (record.queries, record.trained_on) == (len(held_out), len(sample)) == (200, 2780)
    index = Index(copy)
    (component,) = index.manifest.components
    rows = np.concatenate([block for _, block in row_blocks(index, component)])
    engine = faiss.read_index(str(copy / record.file.path))
    shares = []
    for sign in (1, -1):
        row_shares = []
        for row in held_out:
            scores = sign * rows @ rows[row]
            scores[list(range(100, 120))] = -np.inf
            right = [r for r in np.argsort(-scores, kind="stable")[:12] if r != row][:10]
            ids = engine.search(sign * rows[row][None], 400)[1][0]  # of which those that are deleted are removed
            rows_of_engine = [r for r in ids if not 100 <= r < 120]
            row_shares.append(len(set(right) & set(rows_of_engine)) / 10)
        shares.append(np.mean(row_shares))
    assert [record.proponents, record.opponents] == pytest.approx(shares, abs=0.02)  # equal codes may change places
    assert record.proponents < 0.95
    assert Client(copy).query(row=200, engine="faiss").search.faiss.proponents == record.proponents
    delete(copy, [f"r{i}" for i in range(200, 1800)])
    with pytest.raises(UsageError, match=r"FAISS selects no rows in an index of this kind \(IndexPQ\), and most do not match"):
        Client(copy).query(row=2000, engine="faiss")


def test_what_faiss_cannot_do_is_refused(copy, tmp_path, model_dir, corpus_file):
    index = Index(copy)
    with pytest.raises(NotFoundError, match=r'blocks of .* has no FAISS index; make one, such as with wherefrom reindex --faiss "HNSW32"'):
        Client(index).query(row=0, engine="faiss")
    for factory, parameters, sentence in (
        ("Nonsense", "", "FAISS knows no index 'Nonsense' of 32 coordinates"),
        ("IVF100000,Flat", "", "FAISS cannot train 'IVF100000,Flat' on"),
        ("Flat", "nprobe=3", "FAISS does not know the parameters 'nprobe=3' of this index"),
    ):
        with pytest.raises(UsageError, match=sentence):
            make_faiss(index, factory, parameters, None, Silent())
    assert not list(copy.glob("faiss/*"))
    with pytest.raises(UsageError, match="there is no dense component 'head'; choose among blocks"):
        make_faiss(index, "Flat", "", "head", Silent())
    make_faiss(index, "Flat", "", None, Silent())
    client = Client(copy)
    for options, sentence in (
        ({"mode": "cosine"}, "rank influence and not cosine"),
        ({"group_by": "source"}, "groups, baselines and a certified recall need a scan"),
        ({"recall": 0.9}, "need a scan"),
        ({"engine": "other"}, "it can be scan, faiss"),
    ):
        with pytest.raises(UsageError, match=sentence):
            client.query(row=0, **{"engine": "faiss", **options})
    done = run("reindex", copy, "--faiss-parameters", "nprobe=3")
    assert done.exit_code == 2
    assert "give them with --faiss" in done.stderr
    mixed = tmp_path / "mixed"
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(mixed), rank=4, components=("head", "blocks")))
    make_faiss(Index(mixed), "Flat", "", None, Silent())
    with pytest.raises(UsageError, match="FAISS searches the rows of one dense component, and head, blocks count here"):
        Client(mixed).query(row=0, engine="faiss")
    alone = Client(mixed).query(row=0, engine="faiss", weights={"head": 0})
    assert [p.row for p in alone.proponents] == [p.row for p in Client(mixed).query(row=0, weights={"head": 0}).proponents]
    sparse = tmp_path / "sparse"
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(sparse), components=("head",)))
    with pytest.raises(UsageError, match="has no dense rows"):
        make_faiss(Index(sparse), "Flat", "", None, Silent())


def test_an_index_of_other_rows_or_damaged_is_not_used(copy, tmp_path, model_dir, corpus_file):
    make_faiss(Index(copy), "Flat", "", None, Silent())
    assert [problem for _, problem in faiss_problems(Index(copy))] == [None]
    (file,) = copy.glob("faiss/*.faiss")
    record, raw = copy / "faiss/blocks.json", file.read_bytes()
    content = json.loads(record.read_text())
    before = best(Client(copy).query(row=0, engine="faiss"))
    delete(copy, ["r7"])  # deletions select rows
    assert best(Client(copy).query(row=0, engine="faiss")) == before

    def refused(error, sentence):
        with pytest.raises(error, match=sentence):
            Client(copy).query(row=0, engine="faiss")
        assert "reindex --faiss" in next(faiss_problems(Index(copy)))[1] or run("verify", copy).exit_code == 4

    for damaged in (raw[:-1], raw[:1000] + bytes([raw[1000] ^ 1]) + raw[1001:]):
        module._engine.cache_clear()
        file.write_bytes(damaged)
        refused(IntegrityError, "run wherefrom reindex --faiss")
    file.write_bytes(raw)
    for change in ({"file": {**content["file"], "path": "../x.faiss"}}, {"file": {**content["file"], "path": "rows/x"}}, {"rows": "x"}):
        record.write_text(json.dumps({**content, **change}))
        refused(IntegrityError, "is damaged")
    record.write_text(json.dumps({**content, "format": "wherefrom faiss 2"}))
    refused(IncompatibleError, "not of this version")
    record.write_text(json.dumps({**content, "source": "0" * 64}))
    refused(IncompatibleError, "is of other rows")
    small = tmp_path / "small"
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(small), rank=4))
    make_faiss(Index(small), "Flat", "", None, Silent())
    more = tmp_path / "more.jsonl"
    write_jsonl(more, [{"id": "new", "text": "w1 w2 w3"}])
    add(small, (str(more),), {}, (), Silent())
    with pytest.raises(IncompatibleError, match="is of other rows than the index has now; run wherefrom reindex"):
        Client(small).query(row=0, engine="faiss")
    make_faiss(Index(small), "Flat", "", None, Silent())
    assert len(list(small.glob("faiss/*.faiss"))) == 1
    assert read_record(Index(small), "blocks").rows == len(Index(small))


# --- exported rows and queries


@pytest.fixture(scope="module")
def both(tmp_path_factory, model_dir, corpus_file):
    """Head and blocks; some rows are deleted."""
    out = tmp_path_factory.mktemp("export") / "i"
    options = {"rank": 4, "shard_rows": 32, "components": ("head", "blocks"), "row_dtype": "int8"}
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(out), **options))
    index = Index(out)
    delete(out, [index.example(row).id for row in (3, 4, 40)])
    return out


@pytest.fixture
def queries(tmp_path, both):
    records = [{"id": f"q{i}", "text": text} for i, text in enumerate(random_texts(5, seed=4))]
    write_jsonl(tmp_path / "queries.jsonl", records)
    return tmp_path / "queries.jsonl", [Query(**record) for record in records]


def test_exported_rows_and_queries_give_the_same_answers_in_plain_faiss(both, queries, tmp_path):
    file, query_list = queries
    options = ["--damping", "0.5", "--weights", "head=0"]
    assert run("encode", both, "--file", file, "--out", tmp_path / "q.npz", *options).exit_code == 0
    client = Client(both)
    arrays = np.load(tmp_path / "q.npz")
    assert arrays["ids"].tolist() == [query.id for query in query_list]
    expected = client.query_many(query_list, k=6, damping=0.5, weights={"head": 0}, rerank=0)
    for kind in ("faiss", "numpy", "parquet"):
        out = tmp_path / kind
        assert run("export", both, kind, "--component", "blocks", "--out", out).exit_code == 0
        rows = np.load(out / "rows.npy")
        assert (out / "ids.txt").read_text().splitlines() == [client.index.example(int(row)).id for row in rows]
        assert not {3, 4, 40} & set(rows.tolist())
        about = json.loads((out / "about.json").read_text())
        assert (about["rows"], about["component"], about["format"]) == (len(client.index) - 3, "blocks", kind)
        if kind == "faiss":
            engine = faiss.read_index(str(out / "index.faiss"))
        else:
            if kind == "numpy":
                vectors = np.load(out / "vectors.npy")
            else:
                table = pq.read_table(out / "vectors.parquet")
                assert table["row"].to_pylist() == rows.tolist()
                assert table["id"].to_pylist() == (out / "ids.txt").read_text().splitlines()
                vectors = np.array(table["vector"].to_pylist(), np.float32)
            engine = faiss.IndexFlatIP(vectors.shape[1])
            engine.add(vectors)
        for sign, side in ((1, "proponents"), (-1, "opponents")):
            scores, numbers = engine.search(sign * arrays["blocks/vectors"], 6)
            for answer, own_scores, own_numbers in zip(expected, scores, numbers, strict=True):
                assert [hit.row for hit in getattr(answer, side)] == rows[own_numbers].tolist()
                assert_close(sign * own_scores, np.array([hit.score for hit in getattr(answer, side)]), 1e-5)


@pytest.mark.parametrize("kind", ["numpy", "parquet"])
def test_exported_sparse_rows_give_the_scores_by_their_formula(both, queries, tmp_path, kind):
    file, query_list = queries
    assert run("encode", both, "--file", file, "--out", tmp_path / "q.npz", "--weights", "blocks=0").exit_code == 0
    assert run("export", both, kind, "--component", "head", "--out", tmp_path / "rows").exit_code == 0
    arrays, rows = np.load(tmp_path / "q.npz"), np.load(tmp_path / "rows/rows.npy")
    if kind == "numpy":
        indptr, tokens, codes, factors = (np.load(tmp_path / f"rows/{n}.npy") for n in ("indptr", "tokens", "codes", "factors"))
        entries = [(tokens[a:b], codes[a:b], factors[a:b]) for a, b in pairwise(indptr)]
    else:
        table = pq.read_table(tmp_path / "rows/vectors.parquet")
        assert table["row"].to_pylist() == rows.tolist()
        entries = [
            (np.array(t), np.frombuffer(b"".join(c), np.uint8).reshape(len(c), -1), np.array(f, np.float32))
            for t, c, f in zip(table["tokens"].to_pylist(), table["codes"].to_pylist(), table["factors"].to_pylist(), strict=True)
        ]
    expected = Client(both).scores(query_list, weights={"blocks": 0})[:, rows]
    bits = arrays["head/vectors"].shape[1]
    for query in range(len(query_list)):
        is_of_query = arrays["head/queries"] == query
        vectors = dict(zip(arrays["head/tokens"][is_of_query].tolist(), arrays["head/vectors"][is_of_query].astype(float), strict=True))
        scores = [
            sum(f * float((np.unpackbits(c, count=bits) * 2.0 - 1) @ vectors[t]) for t, c, f in zip(*entry, strict=True) if t in vectors)
            for entry in entries
        ]
        assert_close(np.array(scores), expected[query], 1e-4, np.abs(expected[query]).max())


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(both, queries, tmp_path):
    file, _ = queries
    (tmp_path / "there").mkdir()
    for arguments, sentence in (
        (("export", both, "numpy", "--out", tmp_path / "x"), "name one of the components head, blocks"),
        (
            ("export", both, "numpy", "--component", "tail", "--out", tmp_path / "x"),
            "there is no component 'tail'; choose among head, blocks",
        ),
        (("export", both, "faiss", "--component", "head", "--out", tmp_path / "x"), "sparse, which FAISS does not take"),
        (("export", both, "faiss", "--component", "blocks", "--factory", "No", "--out", tmp_path / "x"), "FAISS makes no index 'No'"),
        (("export", both, "numpy", "--component", "head", "--out", tmp_path / "there"), "exists; choose another name"),
        (("encode", both, "--file", file, "--out", tmp_path / "q.npy"), "must end in .npz"),
    ):
        done = run(*arguments)
        assert (done.exit_code, sentence in done.stderr) == (2, True), done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["queries.jsonl", "there"]
