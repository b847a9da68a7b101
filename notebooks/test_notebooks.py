"""Every notebook runs from top to bottom, and its .ipynb holds the same cells as its .py source, without outputs."""

from pathlib import Path

import jupytext
import nbclient
import pytest

SOURCES = sorted(Path(__file__).parent.glob("[0-9]*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_runs(source: Path) -> None:
    notebook = jupytext.read(source)
    here = {"metadata": {"path": str(source.parent)}}  # where Jupyter starts it, so that charts.py is found
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=here).execute()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_pair_is_in_sync(source: Path) -> None:
    paired = jupytext.read(source.with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in paired.cells] == [
        (c.cell_type, c.source) for c in jupytext.read(source).cells
    ], f"run: jupytext --to ipynb {source.name}"
    assert all(not cell.get("outputs") for cell in paired.cells)
