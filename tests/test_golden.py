"""An index of format version 2, written once: later code must read it and answer alike.

`python tests/test_golden.py` writes it again, which only a new format version may do.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import assert_close, make_model, make_tokenizer, random_texts, write_jsonl
from wherefrom import BuildConfig, Client
from wherefrom.ray_jobs.build import build
from wherefrom.store.manifest import seal
from wherefrom.store.update import delete

GOLDEN = Path(__file__).parent / "golden"
QUERIES = {
    "row": {"row": 3, "k": 5},
    "filter": {"row": 7, "k": 4, "where": 'year >= 2005 and kind == "b"'},
    "cosine": {"row": 0, "mode": "cosine"},
}


def answers(client):
    actual = {name: client.query(**query) for name, query in QUERIES.items()}
    sides = "proponents", "opponents"
    products = {name: 1 if query.get("mode") == "cosine" else len(client.index) for name, query in QUERIES.items()}  # of nats
    return {
        name: {side: [[a.id, a.score * products[name]] for a in getattr(answer, side)] for side in sides} for name, answer in actual.items()
    }


@pytest.fixture
def golden(tmp_path):
    return shutil.copytree(GOLDEN / "index.wherefrom", tmp_path / "golden.wherefrom")


@pytest.mark.parametrize("cached", [True, False])
def test_the_golden_index_answers_as_it_did(golden, cached):
    if not cached:
        shutil.rmtree(golden / "search")
    client = Client(golden)
    recorded = json.loads((GOLDEN / "answers.json").read_text())
    largest = max(abs(score) for side in recorded["row"].values() for _, score in side)
    for name, sides in answers(client).items():
        for side, hits in sides.items():
            assert [row for row, _ in hits] == [row for row, _ in recorded[name][side]], (name, side)
            assert_close([score for _, score in hits], [score for _, score in recorded[name][side]], 1e-5, largest)
    assert not [problem for path, problem in client.index.verify() if problem and not path.startswith("search/")]
    assert client.index.example(4).text == random_texts(20)[4]
    assert (len(client.index), client.index.manifest.deleted, client.index.manifest.version) == (20, 1, 2)


def write():
    shutil.rmtree(GOLDEN, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_model("gpt2", "float32").save_pretrained(place / "model")
        make_tokenizer().save_pretrained(place / "model")
        records = [{"id": f"g{i}", "text": t, "year": 2000 + i, "kind": "ab"[i % 2]} for i, t in enumerate(random_texts(20))]
        data = write_jsonl(place / "corpus.jsonl", records)
        options = {"components": ("head", "embeddings", "blocks"), "head_bits": 32, "row_dtype": "int8", "rank": 2, "shard_rows": 12}
        build(BuildConfig(model=str(place / "model"), data=(str(data),), out=str(place / "index.wherefrom"), **options))
        delete(place / "index.wherefrom", ["g11"])
        shutil.copytree(place / "index.wherefrom", GOLDEN / "index.wherefrom", ignore=shutil.ignore_patterns(".lock"))
        for path in (GOLDEN / "index.wherefrom/manifests").glob("*.json"):  # without the folder's name
            content = json.loads(path.read_text().replace(str(place.resolve()) + "/", ""))
            path.write_bytes(seal({name: value for name, value in content.items() if name != "checksum"}))
    (GOLDEN / "answers.json").write_text(json.dumps(answers(Client(GOLDEN / "index.wherefrom")), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(write())
