"""The code blocks of the README and of the quick start run as they are printed."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parent.parent


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.fixture
def names():
    """What the printed code takes for given."""
    torch.manual_seed(0)
    images, labels = torch.randn(120, 8), torch.arange(120) % 4
    return dict(
        train_set=TensorDataset(images, labels),
        student=nn.Linear(8, 4),
        teacher=nn.Linear(8, 4),
        loader=list(zip(images.split(30), labels.split(30), strict=True)),
    )


def test_the_readme_runs(names, windows_of_four):
    before = names["student"].weight.detach().clone()
    (loop,) = blocks("README.md")
    exec(loop, names)
    assert names["optimizer"].metrics["meta_updates"] == 1
    assert names["optimizer"].param_groups[0]["lr"] < 0.1
    assert (names["student"].weight != before).any()


def test_the_quick_start_runs(names, windows_of_four, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks("docs/quick_start.md"):
        exec(block, names)
    assert (tmp_path / "weights.png").stat().st_size > 0
    assert "Meta loss" in (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "predicts the meta loss" in capsys.readouterr().out


def test_it_fits_on_one_screen_and_names_the_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140
    assert "make test" in text and "make demo" in text
