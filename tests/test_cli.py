"""The command line: what it prints, how it exits, and one clear sentence for everything that can be wrong."""

import gzip
import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from helpers import make_model, make_tokenizer, random_texts, words, write_jsonl
from wherefrom import Client
from wherefrom.cli import main
from wherefrom.query.options import Options, ScoreOptions, option_fields
from wherefrom.store.arrays import ArrayFile
from wherefrom.store.manifest import latest_manifest, seal


def wherefrom(*arguments, env=None, stdin=None):
    return CliRunner().invoke(main, [str(a) for a in arguments], env=env, input=stdin, prog_name="wherefrom")


@pytest.fixture(scope="module")
def index(index_dir):
    return index_dir


def test_query_prints_one_json_object(index):
    done = wherefrom("query", index, "--prompt", words(1, 2), "--completion", " w3", "-k", 3, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["query"]["completion"] == " w3"
    assert [p["rank"] for p in answer["proponents"]] == [1, 2, 3]
    scores = [p["score"] for p in answer["proponents"]]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) > 0
    assert all(o["score"] < 0 for o in answer["opponents"])
    assert answer["search"]["recall"] == 1.0
    assert answer["search"]["rows"] == 120
    assert answer["index"]["rows"] == 120


def test_query_by_text_row_and_without_opponents(index):
    by_row = json.loads(wherefrom("query", index, "--row", 7, "--no-opponents", "--mode", "cosine", "--json").stdout)
    assert by_row["opponents"] == []
    assert by_row["proponents"][0]["row"] == 7
    assert len(by_row["proponents"]) == 10
    text = by_row["proponents"][0]["text"]
    assert json.loads(wherefrom("query", index, "--text", text, "--mode", "cosine", "--json", "-k", 1).stdout)["proponents"][0]["row"] == 7


def test_query_prints_tables_for_people(index):
    done = wherefrom("query", index, "--row", 7, "-k", 2)
    assert done.exit_code == 0
    assert "proponents" in done.stdout
    assert "opponents" in done.stdout
    assert "d7" in done.stdout
    assert "exact search of" in done.stdout


def test_queries_from_a_file_give_one_line_each(index, tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"id": "a", "text": words(1, 2)}, {"row": 3}, {"prompt": "w1", "completion": " w2"}])
    lines = wherefrom("query", index, "--file", path, "--json", "-k", 2).stdout.splitlines()
    assert [json.loads(line)["query"].get("id") for line in lines] == ["a", "q.jsonl line 2", "q.jsonl line 3"]
    done = wherefrom("query", index, "--file", "-", "--json", stdin='{"row": 3}\n')
    assert json.loads(done.stdout)["query"]["row"] == 3, done.output


def test_info_and_verify(index):
    info = json.loads(wherefrom("info", index, "--json").stdout)
    assert (info["rows"], info["models"][0]["architecture"], info["components"][0]["stored_as"]) == (120, "GPT2LMHeadModel", "float32")
    assert info["components"][0]["coordinates"] == 8 * 16
    assert "GPT2LMHeadModel" in wherefrom("info", index).stdout
    verified = wherefrom("verify", index, "--json")
    assert verified.exit_code == 0
    assert json.loads(verified.stdout)["whole"]
    assert "none damaged" in wherefrom("verify", index).stdout


def test_build_prints_what_to_type_next_and_takes_options_from_everywhere(tmp_path, model_dir, corpus_file):
    config = tmp_path / "build.toml"
    config.write_text('rank = 3\ndamping = 0.5\nlayers = ["h.1.*"]\n')
    env = {"WHEREFROM_BUILD_DAMPING": "0.25", "WHEREFROM_BUILD_SEED": "4"}
    done = wherefrom(
        "build", "--config", config, "--model", model_dir, "--data", corpus_file, "--out", tmp_path / "i", "-o", "seed=5", env=env
    )
    assert done.exit_code == 0, done.output
    assert "wherefrom query" in done.stdout
    options = json.loads(latest_manifest(tmp_path / "i").read_text())["build"]["inputs"]["options"]
    assert (options["rank"], options["damping"], options["seed"], options["layers"]) == (3, 0.25, 5, ["h.1.*"])
    again = wherefrom(
        "build", "--config", config, "--model", model_dir, "--data", corpus_file, "--out", tmp_path / "i", "-o", "seed=5", "--json", env=env
    )
    assert json.loads(again.stdout)["rows"] == 120


def test_options_of_a_build_are_said_once_and_refused_in_words(tmp_path, model_dir, corpus_file):
    from wherefrom.command_options import BUILD_FLAGS
    from wherefrom.ray_jobs.config import BuildConfig

    help_all = wherefrom("build", "--help-all").stdout
    for name in BuildConfig.model_fields:
        shown = f"--{name.replace('_', '-')}" if name in BUILD_FLAGS else f"\n  {name}"
        assert shown in help_all, name
        assert shown not in wherefrom("build", "--help").stdout or name in BUILD_FLAGS
    build = ("build", "--model", model_dir, "--data", corpus_file, "--out", tmp_path / "i")
    for option, message in (
        ("rank=four", "-o rank is 'four'"),
        ("rank=0", "rank is 0; it must be at least 1"),
        ("rnak=4", "-o rnak=4 is not an option of a build; write -o name=value with one of task"),
        ("model=x", "-o model=x: this option has a flag; write --model"),
        ("rank", "-o rank: write it with a value, as -o rank=value"),
        ("curvature=hessian", "curvature is 'hessian'; it can be auto, fisher, ekfac, kfac, diagonal or identity"),
        ("components=head,head", "components names head,head; name each once"),
        ("hidden=perhaps", "hidden is 'perhaps'"),
        ("threads=9999", "threads is 9999; it can be at most 1024"),
    ):
        done = wherefrom(*build, "-o", option)
        assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert message in done.stderr, done.stderr
    done = wherefrom(*build, "-o", "rank=1", "-o", "rank=2")
    assert (done.exit_code, done.stderr) == (2, "Error: -o rank is given twice; give it once\n")
    done = wherefrom(*build, "--rank", "4")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, "Error: the option rank has no flag; write -o rank=value")
    done = wherefrom("build", "--model", model_dir, "--out", tmp_path / "i")
    assert (done.exit_code, done.stderr) == (2, "Error: no --data given; name it\n")
    done = wherefrom("plan", "--model", model_dir, "--data", corpus_file, "-o", "rank=2", "-o", "damping=none", "--json")
    assert json.loads(done.stdout)["components"][0]["coordinates"] > 0, done.output


def test_a_command_without_arguments_shows_its_help_once():
    done = wherefrom()
    assert (done.exit_code, done.stdout, done.stderr.count("Usage:")) == (2, "", 1)
    assert done.stderr.strip() == wherefrom("--help").stdout.strip()


def test_help_of_every_command_teaches_by_example():
    for command in main.commands:
        done = wherefrom(command, "--help")
        assert done.exit_code == 0
        assert command == "demo" or f"wherefrom {command} " in done.stdout
        assert len(done.stdout.splitlines()[2]) < 120
    assert wherefrom("--version").stdout.startswith("wherefrom, version 0.")


@pytest.fixture(scope="module")
def bad(tmp_path_factory, model_dir, corpus_file, index_dir):
    """A folder with everything that can be wrong."""
    here = tmp_path_factory.mktemp("bad")
    (here / "empty.jsonl").write_bytes(b"")
    (here / "blank.jsonl").write_text("\n\n")
    (here / "broken.jsonl").write_text('{"text": "w1 w2"}\n{"text": \n')
    (here / "silent.jsonl").write_text('{"text": "w1 w2"}\n{"text": "w9"}\n')
    (here / "nofield.jsonl").write_text('{"body": "w1 w2"}\n')
    (here / "queries.jsonl").write_text('{"text": "w1 w2"}\n{"prompt": 3}\n')
    (here / "occupied").mkdir()
    (here / "occupied/thesis.tex").write_text("precious")
    (here / "file").write_text("precious")
    (here / "hollow").mkdir()
    (here / "options.toml").write_text("rnak = 3")
    (here / "types.toml").write_text("rank = [2]")
    (here / "long.toml").write_text("a." * 10_000 + "a = 1")
    (here / "deep.toml").write_text("a = " + "[" * 4000)
    (here / "splits").mkdir()
    (here / "splits/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (here / "pictures").mkdir()
    (here / "pictures/a.png").write_bytes(b"x")
    (here / "pictures/README.md").write_text("# Pictures")
    (here / "ids.txt").write_text('d1\n"d2\n')
    (here / "latin.txt").write_bytes(b"caf\xe9\n")
    (here / "surrogate.jsonl").write_text('{"text": "w1 w2", "note": "\\ud800"}\n')
    (here / "cut.csv.gz").write_bytes(gzip.compress(b"text\nw1 w2\n")[:22])
    lacking = make_model("gpt2", "float32")
    weights = {k: v for k, v in lacking.state_dict().items() if "h.1.mlp.c_fc" not in k and k != "lm_head.weight"}
    lacking.save_pretrained(here / "lacking", state_dict=weights)
    make_tokenizer().save_pretrained(here / "lacking")
    make_model("gpt2", "float32").save_pretrained(here / "mute")
    (here / "notmodel").mkdir()
    (here / "notmodel/config.json").write_text("{}")
    retrained, retokenized = here / "retrained", here / "retokenized"
    for directory, seed in ((retrained, 1), (retokenized, 0)):
        make_model("gpt2", "float32", seed=seed).save_pretrained(directory)
        make_tokenizer().save_pretrained(directory)
    tokenizer = (retokenized / "tokenizer.json").read_text()
    (retokenized / "tokenizer.json").write_text(tokenizer.replace('"w7": 7', '"w7": 8').replace('"w8": 8', '"w8": 7'))
    pickled = shutil.copytree(model_dir, here / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cut = shutil.copytree(model_dir, here / "cut")
    (cut / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes()[:5000])
    nan = make_model("gpt2", "float32")
    nan.transformer.h[1].attn.c_attn.weight[0, 0] = float("nan")
    nan.save_pretrained(here / "nan")
    make_tokenizer().save_pretrained(here / "nan")
    for name in ("flipped", "truncated", "future", "feature", "moved"):
        shutil.copytree(index_dir, here / name)
    rows = next((here / "flipped/rows").iterdir())
    raw = bytearray(rows.read_bytes())
    raw[ArrayFile(rows)._entries["blocks/codes/c/0/0"][0] + 100] ^= 1
    rows.write_bytes(raw)
    rows = next((here / "truncated/rows").iterdir())
    rows.write_bytes(rows.read_bytes()[:-100])
    for name, change in (("future", {"version": 99}), ("feature", {"features": ["dense", "holograms"]})):
        path = latest_manifest(here / name)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    manifest = latest_manifest(here / "moved")
    content = json.loads(manifest.read_text())
    content["models"][0]["id"] = str(here / "gone")
    del content["checksum"]
    manifest.write_bytes(seal(content))
    return here


BUILD = ("build", "--model", "{model}", "--out", "{out}")
ON_CORPUS = (*BUILD, "--data", "{corpus}")
QUERY = ("query", "{index}")
BAD_INPUTS = {
    "no such corpus": ((*BUILD, "--data", "{bad}/none.jsonl"), 3, "there is no file or folder"),
    "empty corpus": ((*BUILD, "--data", "{bad}/empty.jsonl"), 1, "is empty"),
    "blank corpus": ((*BUILD, "--data", "{bad}/blank.jsonl"), 1, "no usable document"),
    "hollow folder": ((*BUILD, "--data", "{bad}/hollow"), 3, "no file that can be read"),
    "bad JSON line": ((*BUILD, "--data", "{bad}/broken.jsonl"), 1, "broken.jsonl line 2: not valid JSON"),
    "no loss token": ((*BUILD, "--data", "{bad}/silent.jsonl", "-o", "append_eos=false"), 1, "silent.jsonl line 2: no token to predict"),
    "no text field": ((*BUILD, "--data", "{bad}/nofield.jsonl"), 1, "only 'body'"),
    "corpus from a pipe": ((*BUILD, "--data", "-"), 2, "standard input"),
    "two forms": ((*ON_CORPUS, "--fields", "text=a,prompt=b"), 2, "several forms of document"),
    "no such model": (("build", "--model", "{bad}/none", "--data", "{corpus}", "--out", "{out}"), 3, "there is no model at"),
    "not a model": (("build", "--model", "{bad}/notmodel", "--data", "{corpus}", "--out", "{out}"), 3, "there is no tokenizer at"),
    "pickled weights": (("build", "--model", "{bad}/pickled", "--data", "{corpus}", "--out", "{out}"), 3, "are not safetensors"),
    "truncated weights": (("build", "--model", "{bad}/cut", "--data", "{corpus}", "--out", "{out}"), 3, "(cut off?)"),
    "missing weights": (("build", "--model", "{bad}/lacking", "--data", "{corpus}", "--out", "{out}"), 3, "is missing; restore"),
    "no tokenizer": (("build", "--model", "{bad}/mute", "--data", "{corpus}", "--out", "{out}"), 3, "tokenizer"),
    "empty variable": ((*BUILD, "--data", ""), 2, "is empty"),
    "truncated gzip": ((*BUILD, "--data", "{bad}/cut.csv.gz"), 1, "the gzip data is damaged, or ends too early"),
    "surrogate in metadata": ((*BUILD, "--data", "{bad}/surrogate.jsonl"), 1, "line 1: the column 'note' holds half of a surrogate pair"),
    "absurd threads": ((*ON_CORPUS, "-o", "threads=1000000"), 2, "at most 1024"),
    "wrong type in a file": ((*ON_CORPUS, "--config", "{bad}/types.toml"), 2, "rank is [2]"),
    "text that is not UTF-8": ((*QUERY, "--text", "w1 \udcff"), 2, "not UTF-8"),
    "NaN weights": (("build", "--model", "{bad}/nan", "--data", "{corpus}", "--out", "{out}"), 1, "are finite under this model"),
    "no layer matches": ((*ON_CORPUS, "--layers", "*.experts.*"), 2, "no layer matches '*.experts.*'"),
    "rank 0": ((*ON_CORPUS, "-o", "rank=0"), 2, "rank is 0; it must be at least 1"),
    "negative damping": ((*ON_CORPUS, "-o", "damping=-1"), 2, "damping is -1; it must be at least 1e-06"),
    "NaN damping": ((*ON_CORPUS, "-o", "damping=nan"), 2, "damping is"),
    "unknown curvature": ((*ON_CORPUS, "-o", "curvature=hessian"), 2, "it can be auto, fisher"),
    "unknown device": ((*ON_CORPUS, "--device", "abacus"), 2, "not a device"),
    "no such GPU": ((*ON_CORPUS, "--device", "cuda:7"), 2, "cannot be moved to cuda:7"),
    "too long examples": ((*ON_CORPUS, "--max-tokens", "9999"), 2, "the model's context is 64"),
    "one-token examples": ((*ON_CORPUS, "--max-tokens", "1"), 2, "--max-tokens is 1; it must be at least 2"),
    "out is a file": (("build", "--model", "{model}", "--data", "{corpus}", "--out", "{bad}/file"), 2, "is a file"),
    "out is occupied": (("build", "--model", "{model}", "--data", "{corpus}", "--out", "{bad}/occupied"), 2, "holds other things"),
    "out is another index": (("build", "--model", "{model}", "--data", "{corpus}", "--out", "{index}"), 2, "differs from this one"),
    "unknown option in a file": ((*ON_CORPUS, "--config", "{bad}/options.toml"), 2, "'rnak'"),
    "no config file": ((*ON_CORPUS, "--config", "{bad}/none.toml"), 2, "there is no file"),
    "long config file": ((*ON_CORPUS, "--config", "{bad}/long.toml"), 2, "long.toml is longer than 16 KiB"),
    "deep config file": ((*ON_CORPUS, "--config", "{bad}/deep.toml"), 2, "deep.toml cannot be read as TOML: it is nested too deeply"),
    "unknown split of texts": ((*ON_CORPUS, "--fields", "split_text=pages"), 2, "split_text is 'pages'; it can be file or blank-lines"),
    "unknown form of documents": ((*ON_CORPUS, "--fields", "form=pages"), 2, "form is 'pages'; it can be auto or text or completion"),
    "unknown field beside a form": ((*ON_CORPUS, "--fields", "form=text,page=p"), 2, "there is no 'page'"),
    "unknown split": ((*BUILD, "--data", "{bad}/splits:dev"), 3, "splits has no split 'dev'; it has train, test"),
    "nothing readable": (
        (*BUILD, "--data", "{bad}/pictures"),
        3,
        "nor a saved dataset; it has README.md (a dataset card or license), a.png",
    ),
    "list of ids": (("delete", "{index}", "--ids", "{bad}/ids.txt"), 1, "ids.txt line 2: not valid JSON"),
    "list that is not UTF-8": (("delete", "{index}", "--ids", "{bad}/latin.txt"), 1, "latin.txt line 1: not UTF-8"),
    "demo over other things": (("demo", "--out", "{bad}/occupied"), 2, "holds other things"),
    "no index": (("query", "{bad}/none", "--row", "1"), 3, "there is no index at"),
    "not an index": (("query", "{bad}/occupied", "--row", "1"), 3, "not a Wherefrom index"),
    "index is a file": (("info", "{bad}/file"), 3, "there is no index at"),
    "unknown format version": (("info", "{bad}/future"), 3, "format version 99"),
    "unknown feature": (("info", "{bad}/feature"), 3, "holograms"),
    "flipped byte": (("query", "{bad}/flipped", "--row", "1"), 4, "fails its checksum"),
    "verify flipped byte": (("verify", "{bad}/flipped", "--json"), 4, ""),
    "truncated shard": (("query", "{bad}/truncated", "--row", "1"), 4, "truncated?"),
    "model is gone": (("query", "{bad}/moved", "--text", "w1 w2"), 3, "there is no model at"),
    "changed weights": ((*QUERY, "--text", "w1 w2", "--model", "{bad}/retrained"), 3, "not those that"),
    "changed tokenizer": ((*QUERY, "--text", "w1 w2", "--model", "{bad}/retokenized"), 3, "the tokenizer of"),
    "empty text": ((*QUERY, "--text", ""), 2, "is empty"),
    "empty completion": ((*QUERY, "--prompt", "w1", "--completion", ""), 2, "is empty"),
    "no query": (QUERY, 2, "exactly one"),
    "two queries": ((*QUERY, "--text", "w1 w2", "--row", "1"), 2, "exactly one"),
    "nothing to predict": ((*QUERY, "--completion", "w1"), 2, "no token to predict"),
    "query too long": ((*QUERY, "--text", words(*[1] * 65)), 2, "66 tokens long, the model's context is 64"),
    "row beyond": ((*QUERY, "--row", "120"), 2, "the rows 0 to 119"),
    "k 0": ((*QUERY, "--row", "1", "-k", "0"), 2, "-k is 0"),
    "unknown mode": ((*QUERY, "--row", "1", "--mode", "dot"), 2, "'influence', 'cosine'"),
    "query damping 0": ((*QUERY, "--row", "1", "--damping", "0"), 2, "between 1e-06"),
    "no query file": ((*QUERY, "--file", "{bad}/none.jsonl"), 3, "there is no file"),
    "bad query": ((*QUERY, "--file", "{bad}/queries.jsonl"), 1, "queries.jsonl line 2"),
    "file and text": ((*QUERY, "--file", "{bad}/queries.jsonl", "--text", "w1 w2"), 2, "has its own queries"),
    "not a number": ((*QUERY, "--row", "one"), 2, "not a valid integer"),
    "no such command": (("brew",), 2, "No such command"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_clear_sentence(name, bad, tmp_path, model_dir, corpus_file, index_dir):
    arguments, code, message = BAD_INPUTS[name]
    out = tmp_path / "out.wherefrom"
    done = wherefrom(*(a.format(bad=bad, out=out, model=model_dir, corpus=corpus_file, index=index_dir) for a in arguments))
    assert done.exit_code == code, done.output
    assert message in " ".join(done.stderr.split()), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == (1 if message else 0), done.stderr
    assert "Traceback" not in done.output
    assert not isinstance(done.exception, Exception), done.exception
    assert not (out / "manifests").exists()
    assert (bad / "occupied/thesis.tex").read_text() == (bad / "file").read_text() == "precious"
    if arguments[:1] == ("query",):
        assert done.stdout == ""


def test_there_are_enough_bad_inputs():
    assert len(BAD_INPUTS) >= 50


def test_verify_lists_what_is_damaged(bad):
    actual = json.loads(wherefrom("verify", bad / "flipped", "--json").stdout)
    assert not actual["whole"]
    assert [p["path"].startswith("rows/") for p in actual["problems"]] == [True]


def test_an_early_failure_leaves_nothing_behind(tmp_path, model_dir, corpus_file):
    out = tmp_path / "new.wherefrom"
    assert wherefrom("build", "--model", model_dir, "--data", corpus_file, "--out", out, "--layers", "nothing").exit_code == 2
    assert not out.exists()


def test_a_reader_that_goes_away_is_no_error(index, tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"row": i % 120} for i in range(400)])
    command = f"{sys.executable} -c 'from wherefrom.cli import main; main()' query {index} --file {path} --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert json.loads(done.stdout)["query"]["row"] == 0
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_demo_puts_the_facts_documents_on_top(tmp_path):
    from wherefrom import Client
    from wherefrom.demo.run import QUERIES

    done = wherefrom("demo", "--out", tmp_path / "demo")
    assert done.exit_code == 0, done.output
    assert "Try next" in done.stdout
    client = Client(tmp_path / "demo/index.wherefrom")
    for prompt, completion in QUERIES:
        actual = client.query(prompt=prompt, completion=completion, k=3).proponents
        assert all(prompt + completion in a.text for a in actual), [a.id for a in actual]
        assert prompt in done.stdout
    again = wherefrom("demo", "--out", tmp_path / "demo")
    assert again.exit_code == 0
    assert "training a small model" not in again.stderr


def test_texts_with_markup_are_shown_as_they_are(tmp_path, model_dir):
    corpus = write_jsonl(
        tmp_path / "c.jsonl", [{"id": f"[bold]{i}", "text": "[red] w1 [/nonsense] " + t} for i, t in enumerate(random_texts(4))]
    )
    assert wherefrom("build", "--model", model_dir, "--data", corpus, "--out", tmp_path / "i", "-o", "rank=2").exit_code == 0
    done = wherefrom("query", tmp_path / "i", "--row", 0, "-k", 1)
    assert done.exit_code == 0, done.output
    assert "[bold]0" in done.stdout
    assert "[/nonsense]" in done.stdout


SAMPLES = {
    "training": "0.1,5",
    "mix": "auto",
    "weights": "blocks=0.5",
    "layers": "h.0.*",
    "where": "year > 1950",
    "group_by": "year",
}


class _ReachedError(Exception):
    """A method of the client was called; its options."""


@pytest.mark.parametrize(
    ("command", "method", "extra", "definition"),
    [
        ("query", "query_many", (), Options),
        ("explain", "explain", ("--example", "1", "--no-tokens"), ScoreOptions),
        ("scores", "score_blocks", ("--out", "s.zarr"), ScoreOptions),
        ("encode", "scorer", ("--out", "q.npz"), ScoreOptions),
    ],
)
def test_every_option_of_a_query_reaches_the_client(command, method, extra, definition, index_dir, tmp_path, monkeypatch):
    """Each flag that a definition has, with a value that is not the default, alone."""
    monkeypatch.chdir(tmp_path)
    queries = write_jsonl(tmp_path / "q.jsonl", [{"row": 3}])

    def reach(self, *arguments, **options):
        raise _ReachedError([*arguments, options])

    monkeypatch.setattr(Client, method, reach)
    asking = ["--row", "3"] if command == "explain" else ["--file", str(queries)]
    flags = {parameter.name: parameter for parameter in main.commands[command].params}
    for name, field in option_fields(definition).items():
        if name not in flags or name == "preset":  # a preset must be that of the index
            continue
        option = field.option
        if field.kind is bool:
            value, arguments = not option.default, [field.flags[0].split("/")[1 if option.default else 0]]
        else:
            text = SAMPLES.get(name) or (field.choices[-1] if field.choices else "7" if field.kind is int else "0.75")
            value, arguments = field.kind(text) if field.kind in (int, float) else text, [field.flags[0], text]
        done = CliRunner().invoke(main, [command, str(index_dir), *asking, *extra, *arguments])
        assert isinstance(done.exception, _ReachedError), (name, done.output)
        actual = done.exception.args[0][-1][name]
        expected = {"weights": {"blocks": 0.5}, "layers": ("h.0.*",)}.get(name, value)
        assert (tuple(actual) if name == "layers" else actual) == expected, name
