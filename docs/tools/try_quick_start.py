"""Run the code of quick_start.md, beside this file, on made-up data with the installed package."""

import re
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kd_balance

HERE = Path(__file__).parent


def main() -> None:
    assert kd_balance.__version__ == version("kd-balance")
    assert not Path(kd_balance.__file__).is_relative_to(Path.cwd() / "kd_balance")
    assert (Path(kd_balance.__file__).parent / "py.typed").exists()
    torch.manual_seed(0)
    labels = torch.arange(6).repeat_interleave(torch.tensor([120, 70, 40, 30, 25, 22]))
    inputs = torch.randn(len(labels), 8) + 2 * torch.eye(8)[labels]
    train_set = TensorDataset(inputs, labels)
    names = dict(
        train_set=train_set,
        student=nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6)),
        teacher=nn.Linear(8, 6),
        loader=DataLoader(train_set, batch_size=4, shuffle=True),  # 77 steps: one window
    )
    for block in re.findall(r"```python\n(.*?)```", (HERE / "quick_start.md").read_text(), re.S):
        exec(block, names)
    assert names["optimizer"].metrics["meta_updates"] == 1
    assert Path("run.html").stat().st_size and Path("weights.png").stat().st_size


if __name__ == "__main__":
    main()
