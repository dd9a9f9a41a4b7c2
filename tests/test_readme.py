"""The code blocks of the README run as they are printed."""

import re
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

README = Path(__file__).parent.parent / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_printed_code_runs(tmp_path, windows_of_four, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, labels = torch.randn(120, 8), torch.arange(120) % 4
    student, teacher = nn.Linear(8, 4), nn.Linear(8, 4)
    names = dict(
        train_set=TensorDataset(images, labels),
        student=student,
        teacher=teacher,
        loader=list(zip(images.split(30), labels.split(30), strict=True)),
    )
    before = student.weight.detach().clone()
    loop, history = blocks()
    exec(loop, names)
    assert names["optimizer"].metrics["meta_updates"] == 1
    assert names["optimizer"].param_groups[0]["lr"] < 0.1
    assert (student.weight != before).any()
    attach, use = history.split("history.plot")
    exec(attach, names)
    exec(loop.split("\n\n")[-1], names)  # the training loop once more, now watched
    exec("history.plot" + use, names)
    assert (tmp_path / "weights.png").stat().st_size > 0
