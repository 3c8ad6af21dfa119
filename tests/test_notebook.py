"""The notebook runs from top to bottom, and is committed with what it showed."""

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "notebooks/explore.ipynb"


@pytest.mark.filterwarnings("ignore:Parsing dates:DeprecationWarning", "ignore::DeprecationWarning:zmq")
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # it runs in a folder of its own, as it writes a file
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]
    pictures = sum("image/png" in str(cell.get("outputs")) for cell in notebook.cells)
    assert pictures == 6
    assert "UserWarning" not in str(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert sum("image/png" in str(cell.get("outputs")) for cell in notebook.cells) == pictures
    assert [bool(cell.get("outputs")) for cell in notebook.cells] == [bool(types) for types in committed]
    assert (tmp_path / "explore.pkl").exists()
