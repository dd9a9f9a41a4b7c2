"""The notebook runs from top to bottom, with fewer epochs."""

import json
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).parent.parent / "examples/quick_start.ipynb"

pytest.importorskip("sklearn", reason="the notebook's data are scikit-learn's")


def test_it_runs(windows_of_four, capsys):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    first, *codes = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert first.startswith("EPOCHS = ")
    names = {"EPOCHS": 1}
    with torch.random.fork_rng():
        for code in codes:
            exec(code, names)
    assert "relative error" in capsys.readouterr().out
    assert names["history"]._repr_html_().startswith("<iframe")
    assert not any(cell.get("outputs") for cell in cells)  # they would grow the repository
