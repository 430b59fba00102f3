"""The tutorials run from top to bottom, and their saved outputs are whole."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[2] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
# A minute each, on methods that have many tests of their own: `make slow` runs them
LONG = ("03_label_sensitive_gate", "04_path_decoupler", "05_adversarial_detection")
RUN = [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG), id=path.stem) for path in NOTEBOOKS]


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS][:2] == ["00_tour.ipynb", "01_influential_features.ipynb"]


@pytest.mark.parametrize("path", RUN)
# what the notebook's own server warns of is not ours
@pytest.mark.filterwarnings("default")
def test_notebook_runs(path, monkeypatch):
    # pictures go into the notebook, as they do for its reader
    monkeypatch.delenv("MPLBACKEND")
    # notebooks run side by side, one thread each
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    # the limit of each cell only catches hangs; a cell that fails raises CellExecutionError with its traceback
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": TUTORIALS}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not [output for output in shown if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_outputs_are_there_in_order_and_without_errors(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
