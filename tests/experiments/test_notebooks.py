"""The notebooks: what is stored is clean, and running them again gives the same numbers."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments/notebooks/fast_mid_slow.ipynb"


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def table(notebook):
    """Of the last table: the mean error with A back and with C, by row."""
    row = r"^([a-z ]+?) +(\d\.\d+) ± \d\.\d+ +(\d\.\d+) ± \d\.\d+$"
    return {name: (float(a), float(c)) for name, a, c in re.findall(row, printed(notebook), re.MULTILINE)}


def test_stored():
    """Executed, short, without errors, warnings or paths; its text says the numbers of its table."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) < 12 and all(cell.execution_count for cell in code)
    assert {output.get("name", "picture") for output in outputs(notebook)} == {"stdout", "picture"}
    assert not any(str(folder) in NOTEBOOK.read_text() for folder in (ROOT, Path.home(), Path("/tmp")))
    rows = table(notebook)
    said = {float(number) for number in re.findall(r"0\.\d\d", notebook.cells[-1].source)}
    assert len(rows) == 5 and said <= {number for pair in rows.values() for number in pair}


@pytest.mark.slow
def test_runs_again(monkeypatch):
    """A fresh kernel gives the stored numbers: the slow level is what is left of A, and of nothing else."""
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = table(notebook)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()  # raises if a cell fails
    rows = table(notebook)
    assert rows.keys() == stored.keys()
    np.testing.assert_allclose(list(rows.values()), list(stored.values()), atol=0.011)  # two printed decimals
    assert rows["all levels"][0] < rows["slow emptied"][0] - 0.2  # the standard deviations are 0.03 and 0.02
    assert rows["slow emptied"][1] < rows["all levels"][1]
