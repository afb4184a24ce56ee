"""The notebooks in examples/ run from the first cell to the last, and show what they say they show."""

import os
import re
from pathlib import Path

import pytest
import wherefrom

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def run(path, folder):
    """Run a notebook in a folder, with this environment's Python and this checkout; returns the HTML and the text of its outputs."""
    from nbclient import NotebookClient

    notebook = read(path)
    places = [str(Path(wherefrom.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)  # raises where a cell fails
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    html = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    text = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    return html, text


def test_committed_notebooks_hold_no_outputs():
    assert [path.name for path in NOTEBOOKS] == ["evaluate.ipynb", "quickstart.ipynb"]
    for path in NOTEBOOKS:
        for cell in read(path).cells:
            assert not cell.get("outputs"), path.name
            assert cell.get("execution_count") is None, path.name


@pytest.mark.slow
@pytest.mark.processes
def test_the_quickstart_runs_and_shows_answers(tmp_path):
    pytest.importorskip("pandas")
    html, text = run(ROOT / "examples/quickstart.ipynb", tmp_path)
    answers = [output for output in html if "<h4>Proponents</h4>" in output and "<h4>Opponents</h4>" in output]
    assert len(answers) == 2
    assert "lighthouses-012" in answers[0]
    assert any("<h4>component</h4>" in output and "<span style" in output for output in html)
    assert any("done" in output for output in text)
    assert not any("Traceback" in output for output in text)


@pytest.mark.slow
@pytest.mark.processes
def test_the_evaluation_runs_and_shows_figures(tmp_path):
    for library in ("pandas", "scipy", "sklearn", "bm25s"):
        pytest.importorskip(library)
    html, text = run(ROOT / "examples/evaluate.ipynb", tmp_path)
    assert any("this index" in output and "bm25" in output for output in html)
    assert any("proponents: loss falls by" in output for output in html)
    assert any("<h4>Proponents</h4>" in output for output in html)
    assert any(re.search("over 12 retrained subsets", output) for output in text)
