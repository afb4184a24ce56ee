"""The project's own habits: import directions, a fast start, what the wheel ships, docs that match the code."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import wherefrom
from click.testing import CliRunner
from wherefrom.cli import main
from wherefrom.query.options import Options, Query, option_fields

ROOT = Path(__file__).parents[1]
ROOMS = {
    "store": set(),
    "indexer": {"store"},
    "query": {"store"},
    "ray_jobs": {"store", "indexer", "query"},
    "evaluation": {"store", "indexer", "query", "ray_jobs", "client"},
    "demo": {"store", "indexer", "query", "ray_jobs", "client", "terminal"},
    "server": {"store", "query", "client", "remote"},
}
FOREIGN = {
    "store": {"torch", "transformers", "ray", "faiss", "fastapi"},
    "indexer": {"ray", "faiss", "fastapi", "zarr", "pyarrow", "datasets"},
    "query": {"torch", "transformers", "ray"},
    "ray_jobs": {"faiss", "fastapi", "pyarrow", "zarr"},
    "evaluation": {"ray", "faiss", "fastapi", "zarr", "pyarrow"},
    "demo": {"ray", "faiss"},
    "server": {"torch", "transformers", "ray", "faiss", "zarr", "pyarrow"},
}
TREE = [p for p in ROOT.rglob("*.py") if not {".venv", "build", "dist"} & set(p.relative_to(ROOT).parts)]


def imports(path):
    """(the project's room or top-level module, or a foreign package) of every import, wherever it stands."""
    depth = len(path.relative_to(ROOT).parts) - 1
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (("foreign", a.name.split(".")[0]) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield "foreign", node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level > depth:
            yield "own", (node.module or node.names[0].name).split(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may_know(room):
    files = list((ROOT / room).glob("*.py"))
    assert files
    for path in files:
        for kind, name in imports(path):
            if kind == "own":
                assert name in ROOMS[room], f"{path.relative_to(ROOT)} imports {name}"
            else:
                assert name not in FOREIGN[room], f"{path.relative_to(ROOT)} imports {name}"
                assert name != "wherefrom", f"{path.relative_to(ROOT)} imports wherefrom absolutely"


def modules_after(code):
    script = f"import sys\n{code}\nprint(*sorted(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split())


HEAVY = {"torch", "ray", "faiss", "transformers", "zarr", "pyarrow", "numpy", "datasets", "pandas", "rich"}


def test_the_explorer_asks_with_fields_that_are_defined():
    """And a link shows no field that the page has no control for."""
    script = (ROOT / "server" / "static" / "app.js").read_text()
    page = (ROOT / "server" / "static" / "index.html").read_text()
    names = json.loads(re.search(r"const SHOWN = (\[.*?\]);", script)[1])
    assert set(names) <= {"index", "queries", *option_fields(Query), *option_fields(Options)}
    controls = {"group_by": "group", "recall": "certified", "queries": "lines"}
    assert all(f'id="{controls.get(name, name)}"' in page for name in names)
    written = re.findall(r"(?:query|options|search)\.(\w+) = ", script) + re.findall(r"[{,] (\w+): \$\(", script)
    assert set(written) <= set(names)
    assert len(written) >= len(names) - 2


@pytest.mark.parametrize("arguments", [["--help"], ["query", "--help"], ["build", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments):
    code = f"from wherefrom.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass"
    assert not HEAVY & modules_after(code)


def test_importing_the_package_loads_nothing_and_a_row_query_no_torch(index_dir):
    assert not (HEAVY | {"click", "pydantic"}) & modules_after("import wherefrom")
    command = f"main(['query', {str(index_dir)!r}, '--row', '1', '--json'])"
    code = f"from wherefrom.cli import main\ntry:\n    {command}\nexcept SystemExit:\n    pass"
    assert not {"torch", "ray", "faiss", "transformers", "zarr", "pandas"} & modules_after(code)


def test_the_public_names():
    answers = ["Answer", "ArrayTask", "Attribution", "BuildConfig", "Client", "Explanation", "Fields", "Index", "Query", "RemoteClient"]
    further = ["Replayed", "Task", "TrainingRecorder", "VectorTask", "WherefromError"]
    functions = ["build", "connect", "evaluate", "replay", "save_moments"]
    assert wherefrom.__all__ == [*answers, *further, *functions]
    assert all(getattr(wherefrom, name) for name in wherefrom.__all__)
    assert {"Client", "build"} <= set(dir(wherefrom))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        wherefrom.nonsense  # noqa: B018


@pytest.mark.slow
def test_the_wheel_ships_the_package_and_nothing_else(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=False, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    source = tmp_path / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(source)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    rooms = ("demo", "evaluation", "indexer", "query", "ray_jobs", "server", "store")
    expected = {f"wherefrom/{n}" for n in tracked if n.endswith(".py") and n.split("/")[0] in rooms}
    modules = (
        "__init__",
        "building",
        "callback",
        "cli",
        "client",
        "command_options",
        "evaluate",
        "query_rows",
        "recompute",
        "recording",
        "remote",
        "terminal",
    )
    expected |= {f"wherefrom/{name}.py" for name in modules}
    expected |= {
        "wherefrom/py.typed",
        "wherefrom/demo/corpus.jsonl",
        "wherefrom/evaluation/report.html.jinja",
    }
    expected |= {f"wherefrom/{n}" for n in tracked if n.startswith("server/static/")}
    assert shipped == expected


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy", "."]])
def test_the_code_is_clean(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_code_asks_for_the_kind_of_a_component():
    """A kind declares what it does (store/kinds.py and the other registries); only these look it up, by `component.kind`."""
    classes = r"(Dense|Sparse)(Component|Vectors|Rows|Part|Operand|Writer|Fit)"
    asks = re.compile(rf"isinstance\([^)]*{classes}|component\.kind\s*[!=]=|\bc\.kind\s*[!=]=|\bs\.kind\s*[!=]=")
    for path in TREE:
        if path.relative_to(ROOT).parts[0] in ROOMS or path.parent == ROOT:
            assert not asks.search(path.read_text()), path


def test_queries_and_options_are_defined_once():
    """Python's signature, the command line and the request bodies have the fields of query/options.py."""
    from wherefrom.query.asking import BaseClient
    from wherefrom.query.options import ScoreOptions
    from wherefrom.server.bodies import EncodeBody, ExplainBody, QueryBody, QueryFields, ScoresBody

    fields = option_fields(Query)
    options = option_fields(Options)
    assert list(fields) == [field.name for field in dataclasses.fields(Query)]
    assert set(option_fields(ScoreOptions)) < set(options)
    given = set(inspect.signature(BaseClient.query).parameters) - {"self", "query", "options"}
    assert given == set(fields) - {"id", "weight"}
    assert set(QueryFields.model_fields) == set(fields)
    assert set(QueryBody.model_fields) == {*fields, *options, "index", "queries"}
    for body, more in ((EncodeBody, set()), (ExplainBody, {"examples", "tokens"}), (ScoresBody, {"where", "format"})):
        assert set(body.model_fields) == {*fields, *option_fields(ScoreOptions), "index", *more}
    for name, owners in (("query", (Query, Options)), ("explain", (Query, ScoreOptions)), ("scores", (ScoreOptions,))):
        parameters = {parameter.name for parameter in main.commands[name].params}
        wanted = {field.name for owner in owners for field in option_fields(owner).values() if field.option.on_command_line}
        assert wanted <= parameters, (name, wanted - parameters)


HEADER = """# The command line

The options of `wherefrom build` and `wherefrom plan` are the fields of `BuildConfig`.
About a dozen of them have flags, which `--help` shows in panels.
All others are given as `-o name=value`, such as `-o seed=1`; `--help-all` lists them, and so does the end of this page.
A TOML file given with `--config` may hold any of them by their names, such as `fit_examples = 512` and `layers = ["h.0.*"]`.
An option comes from the command line, else from the environment, else from the TOML file; else it has its default.
In the environment, `wherefrom build -o seed=1` is written as `WHEREFROM_BUILD_SEED=1`.
`eval "$(_WHEREFROM_COMPLETE=bash_source wherefrom)"` completes commands, options and their values in bash (`zsh_source` in zsh).

Results go to standard output, progress and errors to standard error.
Exit codes: 0 done, 1 error, 2 usage, 3 not found or incompatible, 4 integrity, 130 interrupted.

"""
OTHERS = """
## Other options of a build

These are given as `-o name=value`, or in the `--config` file.

| option | what |
|---|---|
"""


def commands(command, words=()):
    """A command's words and those of everything below it."""
    yield words
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*words, name))


def help_page():
    parts = []
    for words in commands(main):
        result = CliRunner().invoke(main, [*words, "--help"], prog_name="wherefrom", terminal_width=100)
        parts.append(f"## {' '.join(['wherefrom', *words])}\n\n```\n{result.stdout.strip()}\n```\n")
    other_options = main.commands["build"].other_options()
    rows = [f"| `{name}` | {text.replace('|', chr(92) + '|')} |\n" for name, text in other_options.items()]
    return HEADER + "\n".join(parts) + OTHERS + "".join(rows)


def test_the_help_page_is_what_the_commands_print():
    assert (ROOT / "docs/cli.md").read_text() == help_page(), "run: python tests/test_layout.py"


def test_ci_runs_the_readmes_test_command():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    (command,) = re.findall(r"```sh\n(.*pytest.*)\n```", readme)
    assert command in ci


def test_scripts_import_what_the_package_has():
    """Benchmarks and the docs' scripts are not run by the tests; a name that is gone would go unnoticed."""
    for path in [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "docs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "wherefrom":
                module = importlib.import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, (path.name, node.module, missing)


def test_links_in_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_files_that_the_docs_name_exist():
    rooms = "|".join([*ROOMS, "benchmarks", "docs", "examples", "tests"])
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(rf"`((?:{rooms})/[\w./-]+\.\w+)`", page.read_text()):
            assert page.name == "CHANGELOG.md" or (ROOT / name).exists(), f"{page.name} names {name}"


def test_functions_that_the_architecture_names_exist():
    cells = [line.split("|") for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines() if line.startswith("| ")]
    steps = [row[2] for row in cells if len(row) == 5 and row[2].startswith(" `") and ".py`" in row[2]]
    assert len(steps) > 15
    for step in steps:
        quoted = re.findall(r"`([^`]+)`", step)
        source = "".join((ROOT / name).read_text() for name in quoted if name.endswith(".py"))
        for name in quoted:
            assert name.endswith(".py") or re.search(rf"(?:def|class) {name.split('.')[-1]}\b", source), (name, step)


def test_constraints_pin_what_pyproject_asks_for():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {re.split(r"[><=\[]", d)[0].lower() for d in wanted} - {"wherefrom"} <= pinned


def test_docstrings_are_statements():
    questions = {"What", "Which", "Whether", "How", "Where", "Who", "When", "Why"}
    for path in TREE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = re.match(r"\s*(\w+)", ast.get_docstring(node) or "")
                assert first is None or first[1] not in questions, f"{path}: {ast.get_docstring(node)}"


def test_public_functions_say_what_they_do():
    for path in TREE:
        if path.relative_to(ROOT).parts[0] in ROOMS or path.parent == ROOT:
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no header"


if __name__ == "__main__":
    (ROOT / "docs/cli.md").write_text(help_page())
