"""Columns of the corpus: their types when they are read, and filters and groups over them, held against plain Python."""

import csv
import json
import math
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from wherefrom.store.corpus import read_corpus
from wherefrom.store.documents import Documents, Example, write_documents
from wherefrom.store.errors import DataError, IntegrityError, UsageError
from wherefrom.store.fields import Fields
from wherefrom.store.filters import Column, kind_of
from wherefrom.store.index import Index

BERLIN = "Europe/Berlin"


class Columns(Index):
    """An index of documents alone: whatever concerns columns, over shards of given rows of metadata."""

    def __init__(self, path, shards):
        self._documents, entries, first = {}, [], 0
        for number, rows in enumerate(shards):
            examples = [
                Example(f"e{first + i}", "text", "s", np.array([1, 2], np.int32), np.array([False, True]), "", 0, metadata)
                for i, metadata in enumerate(rows)
            ]
            write_documents(path / f"{number}.arrow", examples)
            self._documents[str(number)] = Documents(path / f"{number}.arrow", len(rows))
            entries.append(SimpleNamespace(id=str(number), first=first, rows=len(rows)))
            first += len(rows)
        self.shards = entries
        self.manifest = SimpleNamespace(rows=first)

    def documents(self, shard):
        return self._documents[shard.id]

    def _columns_by_shard(self, names=(), groups=None):
        return ((shard, self.documents(shard).columns) for shard in self.shards)


def columns(path, *shards):
    return Columns(path, [[{"x": value} for value in shard] for shard in shards])


def matched(index, expression):
    return np.flatnonzero(index.matching(expression)).tolist()


# --- filters against Python

OPERATORS = {"==": "__eq__", "!=": "__ne__", "<": "__lt__", "<=": "__le__", ">": "__gt__", ">=": "__ge__"}


def truth(value, sign, constant):
    """Compare as Python does; a number, a text and True are never equal."""
    if value is None:
        return False
    same = (isinstance(value, bool) == isinstance(constant, bool)) and isinstance(value, str) == isinstance(constant, str)
    if not same:
        return sign == "!="
    return bool(eval(f"a {sign} b", {"a": value, "b": constant}))


_whole = st.one_of(
    st.integers(-4, 4), st.integers(2**53 - 2, 2**53 + 2), st.integers(2**63 - 2, 2**64 + 2), st.integers(-(2**63), -(2**62))
)
_float = st.one_of(st.sampled_from([0.5, -1.0, 2.0**53, 1e300, -1e300, 0.1]), st.floats(allow_nan=False, allow_infinity=False))
_word = st.sampled_from(["", "a", "b", "2", "True", "é", "\u2028"])
_scalar = st.one_of(_whole, _float, _word, st.booleans())
_one_kind = st.sampled_from([_whole, _float, st.one_of(_whole, _float), _word, st.booleans()])
_shard = st.one_of(st.lists(st.none(), min_size=1, max_size=3), st.lists(st.one_of(st.none(), _scalar), min_size=1, max_size=6))


def _literal(value):
    return repr(value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equality_and_membership_are_pythons_whatever_the_shards_hold(tmp_path_factory, data):
    shards = data.draw(st.lists(_shard, min_size=1, max_size=3))
    values = [value for shard in shards for value in shard]
    present = [value for value in values if value is not None]
    constant = data.draw(st.sampled_from(present) if present else _scalar)
    index = columns(tmp_path_factory.mktemp("c"), *shards)
    for sign in ("==", "!="):
        assert matched(index, f"x {sign} {_literal(constant)}") == [i for i, v in enumerate(values) if truth(v, sign, constant)]
    further_constants = data.draw(st.lists(st.sampled_from(present), max_size=3)) if present else []
    for sign, is_member in (("in", True), ("not in", False)):
        members = [
            i for i, v in enumerate(values) if v is not None and any(truth(v, "==", c) for c in [constant, *further_constants]) == is_member
        ]
        assert matched(index, f"x {sign} [{', '.join(map(_literal, [constant, *further_constants]))}]") == members
    assert matched(index, "x == None") == [i for i, v in enumerate(values) if v is None]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_order_of_one_kind_is_pythons_and_of_several_refused(tmp_path_factory, data):
    kind = data.draw(_one_kind)
    shards = data.draw(st.lists(st.lists(st.one_of(st.none(), kind), min_size=1, max_size=5), min_size=1, max_size=3))
    constant, values = data.draw(kind), [value for shard in shards for value in shard]
    assume(any(v is not None for v in values))
    index = columns(tmp_path_factory.mktemp("c"), *shards)
    for sign in OPERATORS:
        assert matched(index, f"x {sign} {_literal(constant)}") == [i for i, v in enumerate(values) if truth(v, sign, constant)]
    if isinstance(constant, str):
        return
    mixed = columns(tmp_path_factory.mktemp("m"), *shards, ["a word"])
    with pytest.raises(UsageError, match=r"the column 'x' holds values of (several kinds|the kind)"):
        mixed.matching(f"x < {_literal(constant)}")


DAY, MOMENT = date(2024, 5, 6), datetime(2024, 5, 6, 7, 8, 9, 123456)
TYPED = {
    "dates": ([DAY, None, date(1969, 12, 31), date(2024, 5, 7)], ["2024-05-06", "1969-12-31", "2024-05-06T12:00"]),
    "times": (
        [MOMENT, None, datetime(1969, 12, 31, 23), MOMENT + timedelta(days=1)],
        ["2024-05-06 07:08:09.123456", "2024-05-07", "1970-01-01"],
    ),
    "times of day": ([time(7, 8), None, time(0), time(23, 59, 59, 999999)], ["07:08", "00:00", "23:59:59.5"]),
    "durations": ([timedelta(0, 15), None, timedelta(-1), timedelta(0, 0, 100_000)], [15, 0.1, -86400, 1e400, 0.00000015]),
    "decimals": ([Decimal("1.10"), None, Decimal("-2.25"), Decimal("99999.99")], [1, 1.1, -2.25, 10**40, -1e400, 1.1000001]),
    "large": ([2**64 - 1, None, 0, 2**63], [2**63, 2**63 + 1, -1, 2**64, 1.5, 1e400]),
}


def _meant(constant, kind):
    if kind == "dates":
        return datetime.fromisoformat(constant)
    if kind == "times":
        return datetime.fromisoformat(constant)
    if kind == "times of day":
        return time.fromisoformat(constant)
    if isinstance(constant, float) and math.isinf(constant):
        return constant
    return Decimal(repr(constant)) if kind in ("durations", "decimals") else constant


def _comparable(value, kind):
    if kind == "dates":
        return datetime(value.year, value.month, value.day)
    return Decimal(value.days * 86400 + value.seconds) + Decimal(value.microseconds) / 10**6 if kind == "durations" else value


@pytest.mark.parametrize("kind", TYPED)
def test_typed_columns_compare_exactly(tmp_path, kind):
    values, constants = TYPED[kind]
    index = columns(tmp_path, values, [None])
    for constant in constants:
        for sign in OPERATORS:
            literal = repr(constant).replace("inf", "1e400")
            expected = [
                i
                for i, v in enumerate(values)
                if v is not None and eval(f"a {sign} b", {"a": _comparable(v, kind), "b": _meant(constant, kind)})
            ]
            assert matched(index, f"x {sign} {literal}") == expected, (sign, constant)
            if sign == "==":
                assert matched(index, f"x in [{literal}]") == expected
    codes, actual = index.distinct("x", 100)
    assert [actual[code] for code in codes] == [*values, None]


def test_times_with_a_zone_are_compared_as_moments(tmp_path):
    from zoneinfo import ZoneInfo

    for zone, shift in ((UTC, 0), (ZoneInfo(BERLIN), 2)):
        (tmp_path / str(shift)).mkdir()
        index = columns(tmp_path / str(shift), [datetime(2024, 6, 1, 0, 30, tzinfo=zone), datetime(2024, 6, 1, 3, tzinfo=zone)])
        assert matched(index, 'x < "2024-06-01T01:00"') == [0]  # in the column's zone
        assert matched(index, 'x == "2024-06-01T03:00Z"') == ([1] if shift == 0 else [])
        assert matched(index, f'x == "2024-06-01T03:00+0{shift}:00"') == [1]


REFUSED = [
    ([["a"], ["b", "c"]], 'x == "a"', "holds values of the kind list, which cannot be compared with 'a'; a list or an object"),
    ([{"a": 1}, {"a": 2}], "x > 3", "holds values of the kind object, which cannot be compared with 3"),
    ([MOMENT, MOMENT], "x > 3", "kind time, which cannot be compared with 3; write ISO times, such as '2024-05-06 07:08'"),
    ([MOMENT, MOMENT], 'x > "yesterday"', "'yesterday' is not one; write ISO times"),
    ([MOMENT, MOMENT], 'x > "2024-05-06T00:00Z"', "without a zone; write '2024-05-06T00:00Z' without one"),
    ([timedelta(1), timedelta(2)], 'x > "1 day"', "kind duration, which cannot be compared with '1 day'; write seconds, such as 1.5"),
    ([1, "a"], "x > 0", 'values of several kinds, among them "a", which has no order with 0'),
    ([1, 2], 'x.contains("1")', "the kind number; .contains is for text"),
    (["a", "b"], 'x == "\\ud800"', "half of a surrogate pair"),
    ([1, 2], "x in [1, None]", "None cannot be in a list"),
    ([1, 2], "x", "cannot be compared with True"),
    ([1, 2], f"x == 0x{'f' * 5000}", "larger than any that can be stored"),
]


@pytest.mark.parametrize(("values", "expression", "message"), REFUSED, ids=[expression for _, expression, _ in REFUSED])
def test_what_cannot_be_compared_names_the_column(tmp_path, values, expression, message):
    with pytest.raises(UsageError) as error:
        columns(tmp_path, values).matching(expression)
    assert message in str(error.value)
    assert "'x'" in str(error.value) or "surrogate" in message or "None" in message or "larger" in message


def test_shards_of_different_types_are_never_compared_as_text(tmp_path):
    index = columns(tmp_path, [2020, 2021], ["2020", "abc"], [None, None], [True, 2020.0])
    assert matched(index, "x == 2020") == [0, 7]
    assert matched(index, 'x == "2020"') == [2]
    assert matched(index, "x == True") == [6]
    assert matched(index, 'x.startswith("20")') == [2]
    codes, values = index.distinct("x", 100)
    assert [(values[c], type(values[c])) for c in codes] == [
        *[(2020, int), (2021, int), ("2020", str), ("abc", str), (None, type(None)), (None, type(None)), (True, bool), (2020, int)]
    ]
    with pytest.raises(UsageError, match="several types"):
        index.column("x")
    (tmp_path / "n").mkdir()
    numbers = columns(tmp_path / "n", [1, 2], [None], [2.5, 1.0], [2**63, 5], [1, 0.5])
    assert matched(numbers, "x > 1") == [1, 3, 5, 6]
    assert numbers.column("id").to_pylist() == [f"e{i}" for i in range(9)]
    with pytest.raises(UsageError, match="more than 2 values"):
        numbers.distinct("x", 2)


NAMES = [
    "id",
    "document",
    "chunk",
    "text",
    "source",
    "label",
    "features",
    "token_ids",
    "loss_mask",
    "metadata",
    "\0row",
    "column",
    ".x",
    "a.b",
    "",
]


def test_columns_may_have_any_name_and_those_of_examples_win(tmp_path):
    rows = [{name: (i, f"{name}{i}")[i % 2] if name == "label" else 10 * i for name in NAMES} for i in range(3)]
    index = Columns(tmp_path, [rows])
    for name in NAMES:
        is_of_example = name in ("id", "document", "chunk", "text", "source")
        column = f"metadata.{name}" if is_of_example else name
        if name != "label":
            assert matched(index, f"column({column!r}) == 10") == [1], name
            assert index.distinct(column, 10)[1] == [0, 10, 20, None]
        assert index.documents(index.shards[0])[1].metadata[name] == rows[1][name]
    assert matched(index, 'label == "label1"') == [1]
    assert matched(index, "metadata.chunk >= 10 and chunk == 0 and id != 'e2' and document == id") == [1]
    assert matched(index, "metadata == 20") == [2]


def test_columns_are_compared_with_one_another(tmp_path):
    shard = [{"a": 1, "b": 1.0, "c": "x"}, {"a": 2**53 + 1, "b": 2.0**53, "c": None}, {"a": None, "b": 3.5, "c": "y"}]
    index = Columns(tmp_path, [shard, [{"a": 5, "b": "x", "c": "x"}]])
    assert matched(index, "a == b") == [0]
    assert matched(index, "a != b") == [1, 3]
    assert matched(index, "b == c") == [3]
    with pytest.raises(UsageError, match="'a' and 'b' hold values of"):
        index.matching("a < b")


def test_values_that_no_build_writes_are_an_integrity_error(tmp_path):
    index = columns(tmp_path, [1, "a"])
    index._column_types  # noqa: B018
    forged = Column(pa.chunked_array([["{", None]]), encoded=True)

    class Forged(dict):
        fields = ("x",)

    index._documents["0"] = SimpleNamespace(columns=Forged(x=forged))
    for call in (lambda: index.matching("x == 1"), lambda: index.distinct("x", 10)):
        with pytest.raises(IntegrityError, match="invalid values"):
            call()


def test_groups_need_single_values(tmp_path):
    for number, values in enumerate(([["a"]], [{"a": 1}], [["a"], 1])):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(UsageError, match=r"the column 'x' holds .*; group by one of single values"):
            columns(tmp_path / str(number), values).distinct("x", 10)


def test_ten_thousand_ids_are_found_in_a_moment(tmp_path):
    import time as clock

    count, shard = 1_000_000, 8192
    index = Index.__new__(Index)
    parts, entries = {}, []
    for first in range(0, count, shard):
        rows = min(shard, count - first)
        ids = pa.chunked_array([pa.array([f"document-{i}" for i in range(first, first + rows)])])
        parts[str(first)] = {"id": Column(ids), "document": Column(ids)}
        entries.append(SimpleNamespace(id=str(first), first=first, rows=rows))
    index._columns_by_shard = lambda: ((entry, parts[entry.id]) for entry in entries)
    started = clock.perf_counter()
    actual, unknown = index.rows_of([f"document-{i}" for i in range(0, count, 100)] + ["nobody", "nobody"])
    assert clock.perf_counter() - started < 20
    assert unknown == ["nobody"]
    assert np.flatnonzero(actual).tolist() == list(range(0, count, 100))


# --- what is read

_TYPES = {
    "truth": (st.booleans(), str),
    "whole": (st.integers(-(2**63), 2**63 - 1), str),
    "number": (st.floats(allow_nan=False, allow_infinity=False), repr),
    "date": (st.dates(), date.isoformat),
    "time": (st.datetimes(), lambda v: v.isoformat(" ")),
    "moment": (st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC)), datetime.isoformat),
    "word": (st.sampled_from(["007", "+1", " 5", "NaN", "1,5", "x\ny", '"', "1e999", "12345678901234567890", "2024-13-01", "-"]), str),
}


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_csv_columns_come_back_with_their_types(tmp_path_factory, data):
    kinds = data.draw(st.lists(st.sampled_from(sorted(_TYPES)), min_size=1, max_size=4))
    rows = data.draw(st.lists(st.tuples(*(st.one_of(st.none(), _TYPES[kind][0]) for kind in kinds)), min_size=1, max_size=8))
    path = tmp_path_factory.mktemp("csv") / "c.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", *(f"c{i}" for i in range(len(kinds)))])
        writer.writerows(["7", *("" if v is None else _TYPES[k][1](v) for k, v in zip(kinds, row, strict=True))] for row in rows)
    actual = list(read_corpus([str(path)]))
    assert [d.text for d in actual] == ["7"] * len(rows)
    for i, kind in enumerate(kinds):
        given = [row[i] for row in rows]
        if kind == "number" and all(v is None or (v.is_integer() and "." not in repr(v) and "e" not in repr(v)) for v in given):
            continue
        read = [d.metadata.get(f"c{i}") for d in actual]
        assert read == given
        assert {type(v) for v in read} == {type(v) for v in given}


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "2.5", ""], [1.0, 2.5, None]),
        (["1", "9007199254740993.0", "9007199254740993"], ["1", "9007199254740993.0", "9007199254740993"]),
        (["true", "False", "TRUE"], [True, False, True]),
        (["true", "1"], ["true", "1"]),
        (["9223372036854775807", "9223372036854775808"], ["9223372036854775807", "9223372036854775808"]),
        (["2024-05-06", "2024-05-06T01:00"], ["2024-05-06", "2024-05-06T01:00"]),
        (["2024-05-06T01:00Z", "2024-05-06 01:00+02:00"], [datetime(2024, 5, 6, 1, tzinfo=UTC), datetime(2024, 5, 5, 23, tzinfo=UTC)]),
        (["1", "x"], ["1", "x"]),
        (["02139", "10115"], ["02139", "10115"]),
    ],
)
def test_a_csv_column_has_the_type_that_fits_all_its_cells(tmp_path, cells, expected):
    (tmp_path / "c.csv").write_text("text,x\n" + "".join(f"t,{cell}\n" for cell in cells))
    assert [d.metadata.get("x") for d in read_corpus([str(tmp_path / "c.csv")])] == expected


def test_content_of_csv_stays_text_and_blanks_are_none(tmp_path):
    (tmp_path / "c.csv").write_text("id,source,prompt,completion,text,label,n\n007,1,,5,,3,1\n,,2,,0010,,\n")
    first, second = read_corpus([str(tmp_path / "c.csv")])
    assert (first.id, first.source, first.prompt, first.completion, first.metadata) == ("007", "1", "", "5", {"label": 3, "n": 1})
    assert (second.id, second.source, second.text, second.metadata) == ("c.csv:2", "c.csv", "0010", {"prompt": "2"})
    (tmp_path / "v.csv").write_text("features,label\n1,2\n")
    (vector,) = read_corpus([str(tmp_path / "v.csv")], Fields(form="vector"))
    assert "features" in str(vector)  # a list is not written in CSV


_arrow = st.sampled_from(
    [
        (pa.int8(), st.integers(-128, 127)),
        (pa.uint64(), st.integers(0, 2**64 - 1)),
        (pa.float32(), st.floats(width=32, allow_nan=False, allow_infinity=False)),
        (pa.string(), st.text(st.characters(exclude_categories=["Cs"]), max_size=5)),
        (pa.dictionary(pa.int8(), pa.string()), st.sampled_from(["a", "b"])),
        (pa.bool_(), st.booleans()),
        (pa.date32(), st.dates()),
        (
            pa.timestamp("ms", BERLIN),
            st.datetimes(datetime(1980, 1, 1), datetime(2030, 1, 1)).map(lambda v: v.replace(microsecond=0, tzinfo=UTC)),
        ),
        (pa.decimal128(12, 3), st.decimals(-(10**6), 10**6, places=3)),
        (pa.list_(pa.int32()), st.lists(st.integers(0, 9), max_size=3)),
        (pa.struct({"a": pa.int64()}), st.fixed_dictionaries({"a": st.integers(0, 9)})),
        (pa.duration("s"), st.timedeltas(timedelta(0), timedelta(10**4)).map(lambda v: timedelta(v.days, v.seconds))),
    ]
)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_parquet_of_any_types_is_read_stored_and_filtered_as_python_would(tmp_path_factory, data):
    here = tmp_path_factory.mktemp("p")
    kind, values = data.draw(_arrow)
    column = data.draw(st.lists(st.one_of(st.none(), values), min_size=2, max_size=8))
    table = pa.table({"text": ["t"] * len(column), "x": pa.array(column, kind)})
    pq.write_table(table, here / "c.parquet", row_group_size=data.draw(st.integers(1, 8)))
    read = [d.metadata for d in read_corpus([str(here / "c.parquet")])]
    assert [m.get("x") for m in read] == column
    cut = data.draw(st.integers(1, len(column) - 1))
    index = Columns(here, [read[:cut], read[cut:]])
    stored = [index.documents(s)[i].metadata.get("x") for s in index.shards for i in range(s.rows)]
    assert stored == column
    present = [v for v in column if v is not None]
    if not present or pa.types.is_nested(kind):
        assert matched(index, "x == None") == [i for i, v in enumerate(column) if v is None] if present else True
        return
    threshold = data.draw(st.sampled_from(present))
    literal = {date: str, datetime: datetime.isoformat}.get(type(threshold))
    constant = repr(
        literal(threshold)
        if literal
        else float(threshold.total_seconds())
        if isinstance(threshold, timedelta)
        else float(threshold)
        if isinstance(threshold, Decimal)
        else threshold
    )
    for sign in OPERATORS:
        expected = [i for i, v in enumerate(column) if v is not None and eval(f"a {sign} b", {"a": v, "b": threshold})]
        assert matched(index, f"x {sign} {constant}") == expected


def test_kinds_are_words():
    assert [kind_of(t) for t in (pa.int64(), pa.null(), pa.string(), pa.list_(pa.int8()), pa.binary())] == [
        "number",
        None,
        "text",
        "list",
        "binary",
    ]


def test_metadata_that_cannot_be_kept_names_its_column(tmp_path):
    cases = {
        '"a": 1, "loss": -Infinity': "the column 'loss' holds a number that is not finite (NaN or Infinity); write null instead",
        '"stats": {"ppl": [NaN]}': "the column 'stats' holds a number that is not finite",
        '"note": ["\\ud800"]': "the column 'note' holds half of a surrogate pair",
        f'"big": {"1" * 5000}': "a number has more than 4,300 digits; write it as text",
        f'"deep": {"[" * 10**5}': "it is nested too deeply",
        '"a": 1, "a": 2': "duplicate key 'a' in an object",
        f'"long": "{"x" * (1 << 24)}"': "metadata of 16 MiB, at most 16 are stored; leave out the column 'long'",
    }
    (tmp_path / "c.jsonl").write_text("".join(f'{{"text": "t", {columns}}}\n' for columns in cases) + '{"text": "t", "top": NaN}\n')
    *bad, good = read_corpus([str(tmp_path / "c.jsonl")])
    assert good.metadata == {}
    for error, message in zip(bad, cases.values(), strict=True):
        assert isinstance(error, DataError)
        assert message in str(error)


def test_more_columns_than_are_read(tmp_path):
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": "t", f"c{i}": 1}) + "\n" for i in range(5000)))
    (tmp_path / "c.csv").write_text(",".join(["text", *(f"c{i}" for i in range(5000))]) + "\n")
    pq.write_table(pa.table({"text": ["t"]} | {f"c{i}": [1] for i in range(5000)}), tmp_path / "c.parquet")
    for name, message in (("c.jsonl", "more than 4,096 columns"), ("c.csv", "5,001 columns"), ("c.parquet", "columns, and at most 4,096")):
        with pytest.raises(DataError, match=message):
            list(read_corpus([str(tmp_path / name)]))


def test_bytes_are_left_out_and_named(tmp_path):
    from wherefrom.store.corpus import Corpus

    images = [{"bytes": b"\x89PNG", "path": None}, None]
    table = pa.table(
        {"text": ["a", "b"], "image": images, "raw": pa.array([b"x", b"y"], pa.binary(1)), "n": [1, 2], "list": [[b"x"], None]}
    )
    pq.write_table(table, tmp_path / "c.parquet")
    corpus = Corpus([str(tmp_path / "c.parquet")])
    assert [d.metadata for d in corpus] == [{"n": 1}, {"n": 2}]
    assert corpus.left_out == {"image": "binary", "raw": "binary", "list": "binary"}
    pq.write_table(pa.table({"text": pa.array([b"x"])}), tmp_path / "b.parquet")
    (refused,) = read_corpus([str(tmp_path / "b.parquet")])
    assert "the field 'text' holds bytes, not text" in str(refused)


def test_a_small_parquet_file_of_large_values_is_read_in_little_memory(tmp_path):
    import subprocess
    import sys

    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 150, pa.int32()), pa.array(["x" * 2**22]))
    flat = pa.table({"text": ["t"] * 150, "x": shared})
    pq.write_table(flat, tmp_path / "flat.parquet", compression="zstd", store_schema=False)
    tags = pa.ListArray.from_arrays(pa.array([0, 1, 150], pa.int32()), shared)
    pq.write_table(pa.table({"text": ["t", "u"], "x": tags}), tmp_path / "nested.parquet", compression="zstd", store_schema=False)
    code = (
        "import sys, pyarrow; from wherefrom.store.corpus import read_corpus\n"
        "print([str(d)[:90] for d in read_corpus([sys.argv[1]])][-1])\n"
        "print(pyarrow.default_memory_pool().max_memory() >> 20)"
    )
    for name, last in (
        ("flat", "Document(id='flat.parquet:150'"),
        ("nested", "nested.parquet record 2: 596 MiB, and at most 256 are read of one"),
    ):
        assert (tmp_path / f"{name}.parquet").stat().st_size < 10_000
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / f"{name}.parquet")], check=True, capture_output=True, text=True)
        shown, megabytes = done.stdout.splitlines()
        assert shown.startswith(last)
        assert int(megabytes) < 400  # what Arrow held at most, the same with every allocator; read_table holds 1,032
    many = pa.ListArray.from_arrays(pa.array([0, 40_000_000], pa.int32()), pa.array(np.zeros(40_000_000, np.int8)))
    pq.write_table(pa.table({"text": ["t"], "x": many}), tmp_path / "many.parquet")
    assert (tmp_path / "many.parquet").stat().st_size < 100_000
    with pytest.raises(DataError, match=r"40,000,000 values in x.list.element, more than can be read at once; write the file with smaller"):
        list(read_corpus([str(tmp_path / "many.parquet")]))


MUTATE = """
import random, sys
from pathlib import Path
from wherefrom.store.corpus import read_corpus
from wherefrom.store.errors import WherefromError
folder, generator, outcomes = Path(sys.argv[1]), random.Random(7), set()
files = sorted(folder.iterdir())
for _ in range(1500):
    source = generator.choice(files)
    content = bytearray(source.read_bytes())
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(content))
        content[at] ^= 1 << generator.randrange(8)
        content = content[: max(1, at)] if generator.random() < 0.1 else content
    path = folder.parent / f"changed.{source.name.split('.', 1)[1]}"
    path.write_bytes(content)
    try:
        outcomes |= {type(document).__name__ for document in read_corpus([str(path)])}
    except WherefromError as error:
        outcomes.add(type(error).__name__)
print(*sorted(outcomes))
"""


def test_damaged_files_are_said_to_be_damaged(tmp_path):
    import gzip
    import subprocess
    import sys

    folder = tmp_path / "whole"
    folder.mkdir()
    columns = {"text": ["a b", "c", "d"] * 5, "n": list(range(15)), "tags": [["x", "y"]] * 15, "m": [{"role": "u", "content": "c"}] * 15}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    delta = {"use_dictionary": False, "data_page_version": "2.0", "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    pq.write_table(pa.table({"text": columns["text"]}), folder / "b.parquet", compression="none", **delta)
    (folder / "c.csv").write_text('id,text,n\n1,"a\nb",5\n2,c,\n3,d,7\n')
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": "t", "n": i, "x": {"a": [i]}}) + "\n" for i in range(9)))
    (folder / "e.jsonl.gz").write_bytes(gzip.compress((folder / "d.jsonl").read_bytes()))
    done = subprocess.run([sys.executable, "-c", MUTATE, str(folder)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "DataError Document\n"), done.stderr


def test_text_of_parquet_that_is_not_utf_8_is_one_bad_record(tmp_path):
    names = pa.array([b"a", b"\xff", b"c"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": ["x", "y", "z"], "name": names}), tmp_path / "c.parquet")
    first, bad, last = read_corpus([str(tmp_path / "c.parquet")])
    assert (first.metadata, last.metadata) == ({"name": "a"}, {"name": "c"})
    assert "record 2: the column 'name' holds text that is not UTF-8" in str(bad)


def test_a_date_that_python_has_not_is_one_bad_record(tmp_path):
    days = pa.array([0, 10**7, 1], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"text": ["a", "b", "c"], "day": days}), tmp_path / "c.parquet")
    first, bad, last = read_corpus([str(tmp_path / "c.parquet")])
    assert (first.metadata, last.metadata) == ({"day": date(1970, 1, 1)}, {"day": date(1970, 1, 2)})
    assert "record 2: the column 'day' holds a date32[day] beyond what Python can hold" in str(bad)


def test_csv_rows_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("wherefrom.store.tables.LONGEST_BYTES", 100)
    (tmp_path / "c.csv").write_text("text\n" + "x" * 200 + "\n")
    with pytest.raises(DataError, match="a line is longer than"):
        list(read_corpus([str(tmp_path / "c.csv")]))
