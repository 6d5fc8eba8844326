"""The notebook runs from its first cell to its last, and the executed one is that of the script beside it."""

import re
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def texts(notebook: Any, kind: str = "stream") -> list[str]:
    """What its code cells have printed, or another kind of output as it is."""
    return [str(o.get("text", o)) for c in notebook.cells for o in c.get("outputs", []) if o.output_type == kind]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The script as a notebook, run by a kernel of its own in the fast setting."""
    home = tmp_path_factory.mktemp("tour")
    notebook = jupytext.read(EXAMPLES / "tour.py")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("TOUR_FAST", "1"), ("IPYTHONDIR", str(home)), ("JUPYTER_RUNTIME_DIR", str(home))):
            environment.setenv(name, value)
        resources = {"metadata": {"path": str(home)}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return notebook


def test_every_cell_runs_without_a_warning(executed):
    assert not [o for c in executed.cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
    pictures = [o for c in executed.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 13


def test_products_find_the_eigenvalue_and_the_trace_of_the_whole_matrix(executed):
    rows = re.findall(r"whole matrix (\S+) +products only (\S+)", "".join(texts(executed)))
    assert len(rows) == 2
    for whole, products in rows:
        assert float(products) == pytest.approx(float(whole), rel=1e-3)


def test_the_executed_notebook_is_that_of_the_script():
    script, notebook = jupytext.read(EXAMPLES / "tour.py"), nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in script.cells]
    counts = [c.execution_count for c in notebook.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not texts(notebook, "error")


def test_the_notebook_is_small_and_says_nothing_of_the_machine_it_ran_on():
    text = (EXAMPLES / "tour.ipynb").read_text("utf-8")
    assert len(text) < 1.5e6
    assert not re.search(r"/(tmp|home|root)/|file://", text)
    top = EXAMPLES.resolve().relative_to("/").parts[0]
    assert f"/{top}/" not in text
    assert not re.search(r"(?<![\w.:/<+])/\w+/\w", text)  # an absolute path of any machine
