"""Extras: what is left out is named, with the command that installs it. test_adapters.py and test_spread.py test two more."""

import sys

import pytest
from click.testing import CliRunner
from helpers import random_texts, write_jsonl
from wherefrom import BuildConfig, Client
from wherefrom.cli import main
from wherefrom.ray_jobs.build import build
from wherefrom.store.errors import UsageError


@pytest.fixture
def hide(monkeypatch):
    """Makes a library one that is not installed, also for modules that have imported it."""

    def hidden(library):
        for name in [library, *sys.modules]:
            if name == library or name.startswith(f"{library}."):
                monkeypatch.setitem(sys.modules, name, None)
            if name.startswith(("wherefrom.server", "wherefrom.evaluation")):
                monkeypatch.delitem(sys.modules, name)

    return hidden


@pytest.fixture
def saved(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["w1 w2 w3"] * 4}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(scope="module")
def labeled(tmp_path_factory, model_dir):
    here = tmp_path_factory.mktemp("labeled")
    corpus = write_jsonl(here / "c.jsonl", [{"text": text, "wrong": i < 3} for i, text in enumerate(random_texts(8))])
    build(BuildConfig(model=str(model_dir), data=(str(corpus),), out=str(here / "i.wherefrom"), rank=4))
    return here / "i.wherefrom"


HUB = "a saved or a hub dataset needs the extra hub: pip install 'wherefrom[hub]'"
EVALUATION = "a comparison of rankings needs the extra evaluation: pip install 'wherefrom[evaluation]'"
SERVER = "serving needs the extra server: pip install 'wherefrom[server]'"


@pytest.mark.parametrize(
    ("library", "command", "sentence"),
    [
        ("fastapi", "serve {index}", SERVER),
        ("uvicorn", "serve {index}", SERVER),
        ("prometheus_client", "serve {index}", SERVER),
        ("datasets", "build --model {model} --data {saved} --out {out}", HUB),
        ("datasets", "build --model {model} --data somebody/something:train --out {out}", HUB),
        ("bm25s", "query {index} --row 1 --baselines", EVALUATION),
        ("scipy", "query {index} --row 1 --baselines", EVALUATION),
        ("sklearn", "evaluate labels {labeled} --column wrong", EVALUATION),
        ("scipy", "evaluate recall {index} {index}", EVALUATION),
        ("sklearn", "evaluate lds {saved}", EVALUATION),
    ],
)
def test_a_command_without_its_extra_says_so(hide, saved, index_dir, labeled, model_dir, tmp_path, library, command, sentence):
    hide(library)
    places = {"index": index_dir, "labeled": labeled, "model": model_dir, "saved": saved, "out": tmp_path / "out.wherefrom"}
    result = CliRunner().invoke(main, [word.format(**places) for word in command.split()])
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"Error: {sentence}"), result.output


def test_a_table_of_an_answer_without_pandas(hide, index_dir):
    answer = Client(index_dir).query(row=1)
    hide("pandas")
    with pytest.raises(UsageError, match=r"^a data frame needs the extra pandas: pip install 'wherefrom\[pandas\]'$"):
        answer.to_pandas()


def test_a_replay_needs_no_extra(hide, tmp_path):
    for library in ("scipy", "sklearn", "bm25s"):
        hide(library)
    result = CliRunner().invoke(main, ["replay", str(tmp_path), "--file", str(write_jsonl(tmp_path / "q.jsonl", [{"text": "w1 w2"}]))])
    assert result.exit_code == 3
    assert "not a recorded training run" in result.output
