"""Corpora in every form, the loss mask of every kind of document, and long documents cut without losing a token."""

import dataclasses
import gzip
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import make_tokenizer, words, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from wherefrom.indexer.examples import TextConverter
from wherefrom.query.files import read_chat, read_queries
from wherefrom.query.options import Query
from wherefrom.store.corpus import Corpus, Document, describe_sources, read_corpus, read_ids
from wherefrom.store.documents import Example
from wherefrom.store.errors import DataError, NotFoundError, UsageError
from wherefrom.store.fields import Fields

RECORDS = [{"id": "a", "text": "w1 w2", "year": 7}, {"id": "b", "text": "w3 w4 é", "year": None}]


def documents(*sources, fields=Fields()):
    return list(read_corpus([str(s) for s in sources], fields))


def write_csv(path):
    path.write_text('id,text,year\na,"w1\n w2",7\nb,w3,\n')
    return path


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(RECORDS), path)
    return path


def test_jsonl_with_ids_sources_and_metadata(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{"id": 5, "text": "x", "source": "web", "n": {"deep": [1]}}, {"text": "y", "empty": None}])
    first, second = documents(path)
    assert (first.id, first.source, first.metadata) == ("5", "web", {"n": {"deep": [1]}})
    assert (second.id, second.source, second.metadata) == ("c.jsonl:2", "c.jsonl", {})
    assert second.where == "c.jsonl line 2"


def test_gzip_blank_lines_and_byte_order_mark(tmp_path):
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}'))
    assert [(d.text, d.id) for d in documents(path)] == [("a", "c.jsonl.gz:1"), ("b", "c.jsonl.gz:3")]


def test_csv_and_tsv(tmp_path):
    assert [(d.id, d.text, d.metadata) for d in documents(write_csv(tmp_path / "c.csv"))] == [
        ("a", "w1\n w2", {"year": 7}),
        ("b", "w3", {}),
    ]
    (tmp_path / "c.tsv").write_text("text\tk\nw1\t1\n")
    assert documents(tmp_path / "c.tsv")[0].metadata == {"k": 1}


def test_parquet(tmp_path):
    assert [(d.id, d.text, d.metadata) for d in documents(write_parquet(tmp_path / "c.parquet"))] == [
        ("a", "w1 w2", {"year": 7}),
        ("b", "w3 w4 é", {}),
    ]


def test_a_text_file_is_a_document_or_one_for_what_stands_between_blank_lines(tmp_path):
    content = "One \r\n\tline. \r\n\n\n  \n Two.\u2028\u2029\n\nThree"
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [(d.id, d.text) for d in documents(tmp_path / "book.txt")] == [("book.txt", content)]
    assert [(d.id, d.text) for d in documents(tmp_path / "book.txt", fields=Fields(split_text="blank-lines"))] == [
        ("book.txt:1", "One \r\n\tline. "),
        ("book.txt:6", " Two.\u2028\u2029"),
        ("book.txt:8", "Three"),
    ]
    (document,) = documents(tmp_path / "book.txt", fields=Fields(form="text", text="body"))
    assert document.text == content


def test_a_folder_and_several_files_keep_their_names_apart(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "part.jsonl", [{"text": name}])
    (tmp_path / "x/notes.unknown").write_text("ignored")
    found = documents(tmp_path)
    assert [d.text for d in found] == ["x", "y"]
    assert len({d.id for d in found}) == 2


def test_saved_datasets_and_the_hub_path_on_local_files(tmp_path):
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    assert [d.text for d in documents(tmp_path / "saved")] == ["w1 w2", "w3 w4 é"]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS[:1])}).save_to_disk(tmp_path / "splits")
    assert [d.id for d in documents(tmp_path / "splits")] == ["a"]
    (tmp_path / "repo").mkdir()
    write_jsonl(tmp_path / "repo/train.jsonl", RECORDS)
    # The hub's loader takes a folder for a repository.
    assert [d.id for d in documents(f"{tmp_path / 'repo'}:train")] == ["a", "b"]
    with pytest.raises(NotFoundError, match="cannot be loaded"):
        documents("no-such/dataset:train")


def test_splits_of_a_saved_dataset_are_told_apart(tmp_path):
    import datasets

    rows = [{"text": "a", "source": None}, {"text": "b", "source": "own"}]
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list([{"text": "c", "source": None}])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    found = documents(tmp_path / "d")
    assert [(d.text, d.source, d.id) for d in found] == [
        ("a", "d:train", "d:train:1"),
        ("b", "own", "d:train:2"),
        ("c", "d:test", "d:test:1"),
    ]
    assert [(d.text, d.source, d.id) for d in documents(f"{tmp_path / 'd'}:test")] == [("c", "d:test", "d:test:1")]
    described = {Path(file["path"]).parent.name for file in describe_sources([f"{tmp_path / 'd'}:test"])}
    assert described == {"test"}
    with pytest.raises(NotFoundError, match=r"d has no split 'dev'; it has train, test"):
        documents(f"{tmp_path / 'd'}:dev")
    with pytest.raises(UsageError, match="train is one dataset, without splits; name it without :test"):
        documents(f"{tmp_path / 'd/train'}:test")
    for file in (tmp_path / "d/test").glob("*.arrow"):
        file.write_bytes(b"no Arrow")
    with pytest.raises(DataError, match=r"the saved dataset at .* cannot be read"):
        documents(tmp_path / "d")
    (tmp_path / "d/dataset_dict.json").write_text("[]")
    with pytest.raises(DataError, match="does not list a dataset's splits"):
        documents(tmp_path / "d")


def test_pictures_of_a_saved_dataset_are_not_decoded(tmp_path):
    import datasets

    rows = [{"text": "a", "image": {"bytes": b"no picture", "path": None}}]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "d")
    corpus = Corpus([str(tmp_path / "d")])
    assert [d.metadata for d in corpus] == [{}]
    assert corpus.left_out == {"image": "binary"}


def _compressed(name, content):
    import bz2
    import lzma

    if name.endswith("zst"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return {"GZ": gzip.compress, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[name.rsplit(".")[-1]](content)


@pytest.mark.parametrize("ending", ["gz", "GZ", "bz2", "xz", "zst"])
def test_compressed_files_are_read_and_broken_ones_named(tmp_path, ending):
    content, kind = b'{"text": "a"}\n{"text": "b"}\n', {"zst": "zstd", "bz2": "bzip2", "xz": "xz"}.get(ending, "gzip")
    path = tmp_path / f"c.JSONL.{ending}"
    path.write_bytes(_compressed(path.name, content) + _compressed(path.name, b'{"text": "c"}\n'))
    assert [(d.text, d.id) for d in documents(path)] == [(t, f"{path.name}:{i}") for i, t in enumerate("abc", 1)]
    for name, text in ((f"t.Txt.{ending}", b"whole\n\ntext"), (f"t.csv.{ending}", b"text,n\nwhole,1\n")):
        (tmp_path / name).write_bytes(_compressed(name, text))
        assert len(documents(tmp_path / name)) == 1
    whole = _compressed(path.name, content * 1000)
    for broken in (whole[: len(whole) // 2], b"nothing of the kind", whole[:20] + b"x" * 40 + whole[60:]):
        for name in (path.name, f"t.csv.{ending}", f"t.txt.{ending}"):
            (tmp_path / name).write_bytes(broken)
            with pytest.raises(DataError, match=f"the {kind} data is damaged, or ends too early"):
                documents(tmp_path / name)


def test_a_folders_files_are_read_in_order_and_all_others_named(tmp_path):
    write_jsonl(tmp_path / "b.JSONL", [{"text": "b"}])
    (tmp_path / "a").mkdir()
    write_csv(tmp_path / "a/z.csv")
    for hidden in (".git/config.json", ".cache.jsonl", "a/.ipynb_checkpoints/x.txt"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / hidden, [{"text": "hidden"}])
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json", "notes.pdf", "data.arrow", "c.parquet.gz"):
        (tmp_path / name).write_text("x")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.jsonl")
    corpus = Corpus([str(tmp_path)])
    assert [d.text for d in corpus] == ["w1\n w2", "w3", "b"]
    reasons = {
        "LICENSE.txt": "a dataset card or license",
        "README.md": "a dataset card or license",
        "c.parquet.gz": "compressed Parquet, which must be unpacked",
        "data.arrow": "a part of a saved dataset, which is named by its folder",
        "dataset_infos.json": "a description of a dataset",
        "gone.txt": "no ordinary file",
        "linked": "a link to a folder",
        "notes.pdf": "no kind of document",
        "pipe.jsonl": "no ordinary file",
    }
    assert {file.path.name: file.reason for file in corpus.unread} == reasons
    known = describe_sources([str(tmp_path)])
    assert [Path(file["path"]).name for file in known] == ["z.csv", "b.JSONL"]
    (tmp_path / "notes.pdf").write_text("changed")
    (tmp_path / ".cache.jsonl").write_text("changed")
    assert describe_sources([str(tmp_path)]) == known
    assert [d.text for d in documents(tmp_path / "README.md")] == ["x"]  # by its name it is read
    (tmp_path / "only").mkdir()
    (tmp_path / "only/a.pdf").write_text("x")
    with pytest.raises(NotFoundError, match=r"nor a saved dataset; it has a.pdf \(no kind of document\)"):
        documents(tmp_path / "only")


def test_columns_that_are_null_are_absent(tmp_path):
    chat, nothing = [{"role": "assistant", "content": "yo"}], {"text": None, "prompt": None, "completion": None, "messages": None}
    records = [{"text": "t"}, {"prompt": "p", "completion": "c"}, {"messages": chat}, {}, {"completion": "c"}]
    path = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_pylist([nothing | r for r in records]), path)
    *good, empty, alone = documents(path)
    assert [(d.text, d.prompt, d.completion, d.messages, d.metadata) for d in good] == [
        ("t", "", None, None, {}),
        (None, "p", "c", None, {}),
        (None, "", None, chat, {}),
    ]
    assert "record 4: there is no document in it: 'text', 'messages', 'prompt', 'completion' are null" in str(empty)
    assert "record 5: the field 'prompt' is null although there is a completion; write an empty prompt as an empty text" in str(alone)
    (named, *_) = documents(path, fields=Fields(form="completion"))
    assert "the field 'prompt' is null" in str(named)


def test_ids_that_would_break_a_list_are_refused(tmp_path):
    ids = ["a\nb", "a\x85", "\u2028", "\x00", "\ufeffa", 'fine "{', " fine "]
    found = documents(write_jsonl(tmp_path / "c.jsonl", [{"id": id, "text": "t"} for id in ids]))
    assert [isinstance(d, DataError) for d in found] == [True] * 5 + [False] * 2
    assert "line 1: the id 'a\\nb' holds a control character" in str(found[0])


_id = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="\ufeff"), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.lists(_id, max_size=6), st.booleans(), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["plain", "json", "object"]))
def test_lists_of_ids_come_back(tmp_path_factory, ids, mark, end, form):
    lines = [
        id if form == "plain" and id[0] not in '"{' else json.dumps({"n": 1, "id": id} if form == "object" else id, ensure_ascii=False)
        for id in ids
    ]
    path = tmp_path_factory.mktemp("ids") / "ids.txt"
    path.write_bytes(("\ufeff" * mark + "".join(f"{line}{end}{end if i % 2 else ''}" for i, line in enumerate(lines))).encode())
    assert read_ids(str(path)) == ids


def test_lists_of_ids_end_lines_at_newlines_alone(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_bytes('a\u2028b\n c \nd\x0be\x85f\n"g\\u0068"\n{"id": 5}\nlast'.encode())
    assert read_ids(str(path)) == ["a\u2028b", " c ", "d\x0be\x85f", "gh", "5", "last"]
    for content, message in (('{"no": 1}', "line 1: a JSON object without an id"), ('a\n"b', "line 2: not valid JSON")):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_ids(str(path))
    with pytest.raises(NotFoundError, match="there is no file"):
        read_ids(str(tmp_path / "none"))


def test_forms_of_documents(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = write_jsonl(tmp_path / "c.jsonl", [{"messages": chat}, {"prompt": "p", "completion": "c"}, {"text": "t", "prompt": "p"}])
    found = documents(path)
    assert (found[0].messages, found[1].prompt, found[1].completion, found[2].text) == (chat, "p", "c", "t")
    assert found[2].metadata == {"prompt": "p"}
    named = write_jsonl(tmp_path / "n.jsonl", [{"q": "p", "a": "c", "text": "t"}])
    (document,) = documents(named, fields=Fields(form="completion", prompt="q", completion="a"))
    assert (document.prompt, document.completion, document.metadata) == ("p", "c", {"text": "t"})


BAD_LINES = {
    "not json": ('{"text": "a"', r"bad.jsonl line 2: not valid JSON"),
    "not an object": ("[1]", r"line 2: a JSON list"),
    "no field": ('{"body": "x"}', r"line 2: there is no field 'text'.*only 'body'"),
    "not text": ('{"text": ["x"]}', r"line 2: the field 'text' holds list"),
    "surrogate": ('{"text": "\\ud800"}', r"line 2: .*surrogate"),
    "bad messages": ('{"messages": "hi"}', r"line 2: the field 'messages' must be a list"),
    "deep": ("[" * 100_000, r"line 2: not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_and_the_others_survive(tmp_path, name):
    line, message = BAD_LINES[name]
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "first"}\n' + line + '\n{"text": "last"}\n')
    first, bad, last = documents(path)
    assert (first.text, last.text) == ("first", "last")
    assert isinstance(bad, DataError)
    with pytest.raises(DataError, match=message):
        raise bad


def test_files_that_cannot_be_read_at_all(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    assert "not UTF-8" in str(documents(tmp_path / "latin.jsonl")[0])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "wide.csv").write_text("text,text\na,b\n")
    for name, message in [("cut.jsonl.gz", "gzip"), ("bad.parquet", "Parquet"), ("wide.csv", "same name")]:
        with pytest.raises(DataError, match=message):
            documents(tmp_path / name)
    (empty,) = documents(tmp_path / "empty.jsonl")
    assert isinstance(empty, DataError)
    (tmp_path / "x.exe").write_bytes(b"x")
    with pytest.raises(UsageError, match="no kind"):
        documents(tmp_path / "x.exe")
    with pytest.raises(NotFoundError, match="no file or folder"):
        documents(tmp_path / "missing.jsonl")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(NotFoundError, match="no file that can be read"):
        documents(tmp_path / "hollow")


def test_queries_and_their_errors(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a", "completion": "b", "id": 1}, {"row": 3}, {"text": "t"}])
    assert list(read_queries(str(path))) == [
        Query(prompt="a", completion="b", id="1"),
        Query(row=3, id="q.jsonl line 2"),
        Query(text="t", id="q.jsonl line 3"),
    ]
    for record in (
        {"text": "t", "weigth": 2},
        {"completion": "t", "Agianst": "u"},
        {"row": "3"},
        {"row": True},
        {"text": 4},
        {"prompt": "only"},
        {"text": "t", "row": 1},
        {},
    ):
        bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "fine"}, record])
        with pytest.raises(DataError, match=r"bad.jsonl line 2"):
            list(read_queries(str(bad)))


def test_file_names_that_are_not_utf8_are_named_and_not_read(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / os.fsdecode(b"caf\xe9.jsonl")).write_text('{"text": "a b"}\n')
    with pytest.raises(NotFoundError, match="named in bytes that are not UTF-8"):
        documents(tmp_path / "c")
    write_jsonl(tmp_path / "c/good.jsonl", [{"text": "a b"}])
    corpus = Corpus([str(tmp_path / "c")])
    assert [document.text for document in corpus] == ["a b"]
    assert any("not UTF-8" in str(unread) for unread in corpus.unread)


def test_messages_of_a_file_and_their_errors(tmp_path):
    path, chat = tmp_path / "m.json", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for content, tools in ((chat, None), ({"messages": chat}, None), ({"messages": chat, "tools": [{"name": "f"}]}, [{"name": "f"}])):
        path.write_text("\ufeff" + json.dumps(content))
        assert read_chat(str(path)) == {"messages": chat, "tools": tools}
    wrong = {
        "": "empty or not a regular file",
        "{": "not valid JSON",
        "\ufeff\ufeff[]": "a byte order mark",
        "[]": "neither a list of messages",
        json.dumps({"messages": chat, "more": 1}): "neither a list of messages",
        json.dumps({"messages": chat, "tools": 5}): "'tools' must be a list",
        f"[{'1' * 5000}]": "more than 4,300 digits",
        "[5]": "must be a list of messages",
    }
    for content, sentence in wrong.items():
        path.write_text(content)
        with pytest.raises(DataError, match=sentence):
            read_chat(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_chat(str(path))
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(DataError, match="regular file"):
            read_chat(str(place))
    with pytest.raises(NotFoundError):
        read_chat(str(tmp_path / "nothing"))


def encode(document, **options):
    defaults = {"max_tokens": 64, "append_eos": False}
    return list(TextConverter(make_tokenizer(), **(defaults | options)).documents([document]))


def text_document(*numbers):
    return Document(id="d", source="s", where="line 1", text=words(*numbers), metadata={"k": 1})


def test_text_loses_only_its_first_token_and_gets_its_end():
    (example,) = encode(text_document(5, 6, 7), append_eos=True)
    assert example.token_ids.tolist() == [5, 6, 7, 0]
    assert example.loss_mask.tolist() == [False, True, True, True]
    assert (example.id, example.document, example.chunk, example.metadata, example.truncated) == ("d", "d", 0, {"k": 1}, False)


def test_the_loss_of_a_completion_is_on_it_alone():
    (example,) = encode(Document(id="d", source="s", where="l", prompt="w1 w2", completion=" w3 w4"))
    assert example.loss_mask.tolist() == [False, False, True, True]
    (alone,) = encode(Document(id="d", source="s", where="l", prompt="", completion="w3 w4"))
    assert alone.loss_mask.tolist() == [False, True]


def test_a_token_that_straddles_the_end_of_a_prompt_belongs_to_the_completion():
    (example,) = encode(Document(id="d", source="s", where="l", prompt="w9 w1", completion="2 w3"))
    assert example.token_ids.tolist() == [9, 12, 3]
    assert example.loss_mask.tolist() == [False, True, True]


TEMPLATE = (
    "{% for m in messages %}{{ 'w40 ' if m.role == 'user' else 'w41 ' }}{{ m.content }} w42 {% endfor %}"
    "{% if add_generation_prompt %}w41 {% endif %}"
)


def test_the_loss_of_a_chat_is_on_the_assistants_turns():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6")]
    chat = Document(id="d", source="s", where="l", messages=[{"role": r, "content": c} for r, c in turns])
    (example,) = TextConverter(tokenizer, 64).documents([chat])
    assert example.token_ids.tolist() == [40, 1, 2, 42, 41, 3, 42, 40, 4, 42, 41, 5, 6, 42]
    assert np.flatnonzero(example.loss_mask).tolist() == [5, 6, 11, 12, 13]


@pytest.mark.parametrize(
    ("template", "messages", "error"),
    [
        (None, [{"role": "assistant", "content": "w1"}], "no chat template"),
        (TEMPLATE, [{"role": "user", "content": "w1"}], "no assistant turn"),
        ("{{ raise_exception('no') }}", [{"role": "assistant", "content": "w1"}], "rejects"),
        (
            "{{ messages | length }} w1 {{ messages[-1].content }}",
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "changes other messages",
        ),
    ],
)
def test_chats_that_cannot_be_used(template, messages, error):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    (found,) = TextConverter(tokenizer, 64).documents([Document(id="d", source="s", where="line 9", messages=messages)])
    assert isinstance(found, DataError)
    assert error in str(found)
    assert "line 9" in str(found)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=40), st.integers(2, 12), st.booleans())
def test_split_chunks_hold_every_loss_token_once(numbers, max_tokens, append_eos):
    chunks = encode(text_document(*numbers), max_tokens=max_tokens, append_eos=append_eos)
    predicted = [int(t) for c in chunks for t in c.token_ids[c.loss_mask]]
    assert predicted == numbers[1:] + ([0] if append_eos else [])
    assert all(2 <= len(c.token_ids) <= max_tokens for c in chunks)
    assert [c.chunk for c in chunks] == list(range(len(chunks)))
    assert {c.document for c in chunks} == {"d"}
    assert len({c.id for c in chunks}) == len(chunks)
    for chunk in chunks:
        assert chunk.text.split() == [f"w{t}" for t in chunk.token_ids if t]


def test_truncation_is_counted_and_bad_documents_say_where():
    (example,) = encode(text_document(*range(1, 20)), max_tokens=5, long="truncate")
    assert (example.token_ids.tolist(), example.text, example.truncated) == ([1, 2, 3, 4, 5], "w1 w2 w3 w4 w5", True)
    prompt = Document(id="d", source="s", where="line 3", prompt=words(*range(1, 20)), completion=" w20")
    (full,) = encode(prompt, max_tokens=5, long="truncate")
    (empty,) = encode(Document(id="d", source="s", where="line 4", text="  "))
    (single,) = encode(text_document(5))
    (nothing,) = encode(Document(id="d", source="s", where="line 5", prompt="w1", completion=""))
    for error, message in [
        (full, "line 3: no token"),
        (empty, "line 4: the text is empty"),
        (single, "line 1: no token"),
        (nothing, "line 5: the comp"),
    ]:
        assert isinstance(error, DataError)
        assert message in str(error)
    chunks = encode(prompt, max_tokens=5)
    assert [c.token_ids[c.loss_mask].tolist() for c in chunks] == [[20]]


def test_queries_are_never_cut():
    encoder = TextConverter(make_tokenizer(), max_tokens=4, append_eos=False)
    assert isinstance(encoder.query(Document("query", "query", "the query", text=words(*range(1, 30)))), Example)
    for bad, message in [
        ({"text": words(1, 2, 3, 4)}, "4 tokens long"),
        ({"text": ""}, "empty"),
        ({"text": "w1"}, "no token to predict"),
        ({"completion": ""}, "empty"),
    ]:
        with pytest.raises(UsageError, match=message):
            encoder.query(Document("query", "query", "the query", **bad), context=2)


def test_batches_of_the_tokenizer_keep_the_order(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join((json.dumps({"text": words(1 + i % 60, 2)}) if i % 7 else "oops") + "\n" for i in range(600)))
    found = list(TextConverter(make_tokenizer(), 64).documents(read_corpus([str(path)])))
    assert [isinstance(f, DataError) for f in found] == [i % 7 == 0 for i in range(600)]
    assert [f.id for f in found if isinstance(f, Example)] == [f"c.jsonl:{i + 1}" for i in range(600) if i % 7]


def _post_processed(template):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<eos>", 0)])
    return tokenizer


def test_a_tokenizer_that_ends_texts_by_itself_ends_them_once_and_in_the_loss():
    document = Document(id="d", source="s", where="line 1", text=words(5, 6, 7))
    for encoder in (TextConverter(_post_processed("$A <eos>"), 64), TextConverter(make_tokenizer(), 64)):
        (example,) = encoder.documents([document])
        assert example.token_ids.tolist() == [5, 6, 7, 0]
        assert example.loss_mask.tolist() == [False, True, True, True]
    (started,) = TextConverter(_post_processed("<eos> $A"), 64, append_eos=False).documents([document])
    assert started.token_ids.tolist() == [0, 5, 6, 7]
    assert started.loss_mask.tolist() == [False, True, True, True]


def test_whitespace_whose_offsets_are_trimmed_stays_in_the_loss_and_the_prompts_stays_out():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"<eos>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    encoder = TextConverter(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>"), 64, append_eos=False)
    (whole,) = encoder.documents([Document(id="d", source="s", where="", text="a b  ")])
    assert whole.loss_mask.tolist() == [False, True, True, True, True]
    (asked,) = encoder.documents([Document(id="d", source="s", where="", prompt="ab ", completion=" c ")])
    assert asked.loss_mask.tolist() == [False, False, False, True, True, True]


def test_a_saved_dataset_whose_offsets_lead_out_of_it_is_refused(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"text": f"text number {i}"} for i in range(20)]).save_to_disk(tmp_path / "d")
    (path,) = (tmp_path / "d").glob("*.arrow")
    data, offsets = path.read_bytes(), np.cumsum([0, *(len(f"text number {i}") for i in range(20))]).astype("<i4").tobytes()
    assert data.count(offsets) == 1
    at = data.index(offsets) + len(offsets) - 4
    path.write_bytes(data[:at] + (2**30).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(DataError, match="cannot be read"):
        list(read_corpus([str(tmp_path / "d")]))


# --- parts of a corpus


def parts_of(size, *sources, fields=Fields()):
    """The documents of all parts of about so many bytes, read one after the other, and the number of parts."""
    read = []
    lines_before = {}
    parts = Corpus([str(s) for s in sources], fields).divide(size)
    for part in parts:
        numbered = []
        for slice in part:
            first = lines_before.get(slice.name, 0)
            if slice.range is None or not slice.source.has_lines:
                numbered.append(slice)
            else:
                numbered.append(dataclasses.replace(slice, range=slice.range._replace(first=first)))
                lines_before[slice.name] = first + slice.count_lines()
        read += Corpus.of(numbered, fields)
    return read, len(parts)


def shown(documents):
    return [str(d) if isinstance(d, DataError) else dataclasses.asdict(d) for d in documents]


LINES = st.sampled_from(
    [
        b'{"text": "a"}',
        b"",
        b"  ",
        b'{"text": "%s"}' % (b"long " * 30),
        b"{",
        b"\xff\xfe",
        b'{"id": "x", "text": "y"}',
        b"[1]",
        '{"text": "é€😀"}'.encode(),
    ]
)


@given(
    content=st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    end=st.sampled_from([b"", b"\n", b'{"text": "end"}']),
    start=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    size=st.integers(1, 200),
)
@settings(max_examples=300, deadline=None)
def test_ranges_of_lines_hold_each_line_once(tmp_path_factory, content, end, start, size):
    path = tmp_path_factory.mktemp("lines") / "c.jsonl"
    path.write_bytes(start + b"".join(line + newline for line, newline in content) + end)
    read, count = parts_of(size, path)
    assert shown(read) == shown(documents(path))
    assert count >= max(1, path.stat().st_size // size)


def test_large_tables_and_datasets_are_read_in_parts(tmp_path):
    datasets = pytest.importorskip("datasets")
    records = [{"text": f"w{i}", "year": i} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "c.parquet", row_group_size=7)
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "c.parquet", tmp_path / "saved"):
        read, count = parts_of(400, source)
        assert shown(read) == shown(documents(source))
        assert count > 3


def test_small_files_share_a_part_and_what_cannot_be_cut_is_read_whole(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"w{number} w1")
    (tmp_path / "c.csv").write_text("text,k\n" + "w1 w2,1\n" * 40)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "w1"}\n' * 400))
    parts = Corpus([str(tmp_path)]).divide(30)
    assert [[slice.name for slice in part] for part in parts] == [
        ["0.txt", "1.txt", "2.txt", "3.txt", "4.txt", "5.txt"],
        ["6.txt", "7.txt", "8.txt"],
        ["c.csv"],
        ["d.jsonl.gz"],
    ]
    assert shown(parts_of(30, tmp_path)[0]) == shown(documents(tmp_path))


def test_files_of_another_machine_are_compared_by_their_bytes(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": f"w{i}"} for i in range(50)])
    slices = [slice.with_checksum() for part in Corpus([str(path)]).divide(200) for slice in part]
    assert all(pickle.loads(pickle.dumps(slice)).is_here for slice in slices)
    content = path.read_bytes()
    other = tmp_path / "other" / "c.jsonl"  # a copy elsewhere that differs in one letter of the second range
    other.parent.mkdir()
    other.write_bytes(content.replace(b"w20", b"w2x"))
    changed = [dataclasses.replace(slice, source=dataclasses.replace(slice.source, place=other)) for slice in slices]
    assert [slice.is_here for slice in changed] == [b"w20" not in content[s.range.start : s.range.stop] for s in slices]
    assert not all(slice.is_here for slice in changed)
    missing = [dataclasses.replace(slice, source=dataclasses.replace(slice.source, place=tmp_path / "gone")) for slice in slices]
    assert not any(slice.is_here for slice in missing)
