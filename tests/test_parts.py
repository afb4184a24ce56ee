"""An index that is searched in parts answers as one: the same bits, whatever the parts."""

from itertools import pairwise

import numpy as np
import pytest
from helpers import build_kinds, dense_index, random_texts, record
from hypothesis import given, settings
from hypothesis import strategies as st
from wherefrom import Client, Query
from wherefrom.query.groups import Sums, SumTree
from wherefrom.query.parts import Part
from wherefrom.ray_jobs.fleet import split_groups
from wherefrom.store.errors import BusyError, UsageError
from wherefrom.store.index import Index, ShardGroup


class Apart:
    """An index in parts of this process; some of them may be away."""

    def __init__(self, index, groups, away=()):
        self.index, self.away, self.methods = index, set(away), []
        self.parts = [Part(index, group_range, threads=1) for group_range in groups]
        self.firsts = tuple(index.groups[group_range.start].first for group_range in groups)

    def call(self, method, search, arguments, partial=False):
        assert partial or not self.away
        self.methods.append((method, tuple(arguments)))
        shared = () if search is None else (search,)
        present = {number: part_arguments for number, part_arguments in arguments.items() if number not in self.away}
        return {number: getattr(self.parts[number], method)(*shared, *part_arguments) for number, part_arguments in present.items()}

    def scorer(self, search):
        return self.parts[0].scorer(search)

    def stream(self, search):
        for part in self.parts:
            yield from part.scores(search)

    def up(self):
        return [int(number not in self.away) for number in range(len(self.parts))]

    def moved_to(self, index):
        return Apart(index, [range(len(index.groups))])


@pytest.fixture(scope="module")
def indexes(tmp_path_factory, model_dir, corpus_file):
    kinds = {
        "float32": {},
        "int8": {"row_dtype": "int8"},
        "mixed": {"components": ("head", "blocks"), "row_dtype": "1bit"},
        "sparse": {"components": ("head", "embeddings"), "hidden": True},
    }
    return build_kinds(tmp_path_factory.mktemp("parts"), model_dir, corpus_file, kinds, rank=4, shard_rows=16, group_rows=32)


OPTIONS = [
    {"k": 7},
    {"k": 5, "mode": "cosine", "group_by": "year"},
    {"k": 400, "mode": "loss-normalized", "where": "year >= 1960", "group_by": "source"},
    {"k": 5, "recall": 0.99999},
    {"k": 3, "recall": 0.9, "where": "year < 2000", "opponents": False},
    {"k": 4, "baselines": True, "where": "year > 1910"},
]


@pytest.mark.parametrize("name", ["float32", "int8", "mixed", "sparse"])
def test_answers_in_parts_are_those_of_the_whole_to_the_bit(indexes, name):
    index = Index(indexes[name])
    assert len(index.groups) >= 3
    queries = [Query(row=3), *(Query(text=text) for text in random_texts(9, seed=8))]
    client = Client(index)
    rows = client.encode(queries)
    everywhere = [split_groups(index.groups, count) for count in (1, 2, len(index.groups))]
    uneven = [range(1), range(1, len(index.groups))]
    for groups in (*everywhere, uneven):
        apart = Client(index, parts=Apart(index, groups))
        apart.__dict__["recorded"] = client.recorded
        for options in OPTIONS:
            assert list(map(record, apart.answer(queries, rows, **options))) == list(map(record, client.answer(queries, rows, **options)))
        np.testing.assert_array_equal(apart.scores(queries, "year > 1920"), client.scores(queries, "year > 1920"))
        assert apart.histogram(queries[0], 20) == client.histogram(queries[0], 20)


@pytest.mark.parametrize("rule", ["short rows", "a hopeless first group"])
def test_parts_scan_where_the_whole_does(indexes, monkeypatch, rule):
    index = Index(indexes["int8"])
    if rule == "short rows":
        monkeypatch.setattr("wherefrom.query.operands._MANY", len(index))  # no part has so many rows
        monkeypatch.setattr("wherefrom.query.operands._LEAST_RATIO", 10**6)
    else:
        monkeypatch.setattr("wherefrom.query.search._MOST_READ_OF_FEW", 1)
        monkeypatch.setattr("wherefrom.query.search._READ_FIRST", 1)
    whole = Client(index)
    for options in ({"k": 3, "recall": 0.9}, {"k": 3, "recall": 0.9, "where": "year >= 1960"}):
        expected = [record(whole.query(row=row, **options)) for row in range(12)]
        for count in (2, len(index.groups)):
            apart = Client(index, parts=Apart(index, split_groups(index.groups, count)))
            assert [record(apart.query(row=row, **options)) for row in range(12)] == expected
        if rule == "short rows":
            assert all("scanned faster than estimated" in answer["search"]["note"] for answer in expected)


def test_a_histogram_counts_the_scores(indexes):
    client = Client(indexes["float32"])
    scores = client.scores([Query(row=3)], "year > 1920")[0]
    scores = scores[np.isfinite(scores)].astype(float)
    counts, edges = np.histogram(scores, 25)
    assert client.histogram(Query(row=3), 25, "year > 1920") == {"edges": edges.tolist(), "counts": counts.tolist(), "rows": len(scores)}
    assert client.histogram(Query(row=3), 25, "year > 3000") == {"edges": [], "counts": [], "rows": 0}


@pytest.mark.parametrize("name", ["float32", "sparse"])
def test_an_answer_without_a_part_is_that_of_the_others_and_says_so(indexes, name):
    index = Index(indexes[name])
    groups = split_groups(index.groups, 3)
    away = index.groups[groups[1].start].first, index.groups[groups[1].stop - 1]
    lost = range(away[0], away[1].first + away[1].rows)
    client = Client(index, parts=Apart(index, groups, away={1}))
    expected = Client(index).scores([Query(row=0)])[0]
    expected[lost.start : lost.stop] = -np.inf
    for recall in (1.0, 0.99999):
        answer = client.query(row=0, k=5, partial=True, recall=recall)
        assert [p.row for p in answer.proponents] == np.argsort(-expected, kind="stable")[:5].tolist()
        assert (answer.search.missing, answer.search.rows) == (len(lost), len(index) - len(lost))
    nothing = Client(index, parts=Apart(index, groups, away={0, 1, 2}))
    for recall in (1.0, 0.9):
        with pytest.raises(BusyError, match="no part of the index that has rows to search is there"):
            nothing.query(row=0, partial=True, recall=recall)


def test_later_parts_read_only_what_can_be_among_the_best(tmp_path, index_dir):
    """Thresholds travel: the parts' candidates are few, and each side is read by the parts that have them."""
    rows = np.random.default_rng(0).normal(size=(4000, 64)) * np.append(20.0, np.ones(63))
    index = dense_index(tmp_path / "i", index_dir, rows, group_rows=1000)
    parts = Apart(index, split_groups(index.groups, 4))
    answer = Client(index, parts=parts).query(row=17, k=5, recall=0.9)
    assert answer.search.method == "by quantized scan and rescore"
    assert answer.search.candidates < 4000 / 4
    assert [method for method, _ in parts.methods[:4]] == ["refusal", "count", "first_candidates", "candidates"]
    assert parts.methods[2] == ("first_candidates", (0,))
    assert {method for method, _ in parts.methods[4:]} == {"read"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 40))
def test_parts_are_consecutive_none_is_empty_and_all_are_alike(sizes, count):
    firsts = np.cumsum([0, *sizes])
    groups = [ShardGroup((), int(first), rows) for first, rows in zip(firsts, sizes, strict=False)]
    parts = split_groups(groups, count)
    assert [number for part in parts for number in part] == list(range(len(sizes)))
    assert len(parts) == min(count, len(sizes))
    assert all(len(part) for part in parts)
    rows = [sum(sizes[part.start : part.stop]) for part in parts]
    assert max(rows) <= sum(sizes) / len(parts) + 2 * max(sizes)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sums_by_group_do_not_depend_on_the_parts(data):
    """Floating-point sums, added up by parts in any order, to the bit; and the totals are those of numpy."""
    count = data.draw(st.integers(1, 12))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    values = ["a", 1, True, None, "b"]
    blocks = []
    for number in range(count):
        rows = int(generator.integers(1, 30))
        codes, scores = generator.integers(0, 5, rows), generator.standard_cauchy((2, rows)).astype(np.float32)
        searched = generator.random(rows) < 0.8
        blocks.append((codes, scores, searched, Sums.of(codes, values, scores, searched, number * 30)))
    tree_of_all = SumTree("x")
    for number, (*_, sums) in enumerate(blocks):
        tree_of_all.add(0, number, sums)
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=4))})
    trees = []
    for first, last in pairwise(cuts):
        trees.append(SumTree("x"))
        for number in range(first, last):
            trees[-1].add(0, number, blocks[number][-1])
    joined = SumTree("x")
    for tree in data.draw(st.permutations(trees)):
        joined.update(tree)
    one, other = tree_of_all.total(), joined.total()
    assert one.values == other.values
    for name in ("rows", "signs", "totals", "draws"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    for place, value in enumerate(one.values):
        code = next(i for i, v in enumerate(values) if v is value or (type(v) is type(value) and v == value))
        scores_of_value = np.concatenate([scores[:, searched & (codes == code)] for codes, scores, searched, _ in blocks], axis=1).astype(
            float
        )
        assert one.rows[place] == scores_of_value.shape[1]
        np.testing.assert_allclose(one.totals[:, 0, place], scores_of_value.sum(1), atol=1e-9 * np.abs(scores_of_value).sum())
        assert (one.signs[:, :, place] == np.stack([(scores_of_value > 0).sum(1), (scores_of_value < 0).sum(1)], 1)).all()


def test_too_many_values_over_all_parts_are_refused(monkeypatch):
    monkeypatch.setattr("wherefrom.query.groups.MOST_VALUES", 3)
    tree = SumTree("x")
    for number, values in enumerate((["a", "b"], ["c"], ["d"])):
        codes = np.arange(len(values))
        tree.add(0, number, Sums.of(codes, values, np.ones((1, len(values)), np.float32), np.ones(len(values), bool), 0))
    with pytest.raises(UsageError, match="the column 'x' has more than 3 values"):
        tree.total()
