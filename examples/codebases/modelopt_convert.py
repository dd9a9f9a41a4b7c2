"""NVIDIA Model-Optimizer: a student converted for distillation, with learned weights.

    pip install kd-balance nvidia-modelopt==0.47.0 requests
    python examples/codebases/modelopt_convert.py
    python examples/codebases/modelopt_convert.py --check    # is the hypergradient right?

mtd.convert, its loss balancer with a loss of features beside, and mtd.export are Model-Optimizer's.
Made-up clouds of points stand for the data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import modelopt.torch.distill as mtd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.utils.data import DataLoader

from clouds import BALANCED, CLASSES, FEATURES, LONG_TAIL, Mlp, clouds
from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts, meta_loader  # kd-balance
from kd_balance.check import check_hypergradient

EPOCHS, WIDTH = 5, 12


class Student(nn.Module):
    """Model-Optimizer adds modules to its student, which an nn.Sequential would call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Mlp(WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class BalancedLoss(_Loss):  # kd-balance
    """In the place of LogitsDistillationLoss; the weight net is no part of the model."""

    def __init__(self, criterion: Callable[..., Tensor]) -> None:  # kd-balance
        super().__init__()  # kd-balance
        self.criterion = criterion  # kd-balance

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:  # kd-balance
        return self.criterion(student, teacher, targets)  # kd-balance


class Features(nn.MSELoss):  # kd-balance
    """Of the hidden layer; labels are given to every loss."""

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:  # kd-balance
        return super().forward(student, teacher)  # kd-balance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    if check:
        torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    train = clouds(LONG_TAIL, seed=0)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    teacher, student = trained_teacher(loader), Student()

    criterion = WeightedKDLoss.long_tailed(class_counts(train))  # kd-balance
    model = mtd.convert(student, mode=[("kd_loss", {
        "teacher_model": teacher,
        "criterion": {
            ("", ""): BalancedLoss(criterion.__call__),  # kd-balance
            ("layers.2", "2"): Features(),  # kd-balance
        },
        "loss_balancer": mtd.StaticLossBalancer([0.9, 0.1]),
    })])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    optimizer = BilevelOptimizer(  # kd-balance
        optimizer, model, criterion, meta_loader(clouds(BALANCED, seed=1)),  # kd-balance
        teacher=teacher, every=5, unroll=1,  # kd-balance
    )  # kd-balance

    def step(batch: list[Tensor]) -> float:
        inputs, targets = batch
        optimizer.zero_grad()
        model(inputs)
        loss = model.compute_kd_loss(targets=targets)  # kd-balance
        loss.backward()
        optimizer.step()
        return loss.item()

    model.train()
    for _ in range(1 if check else EPOCHS):
        losses = [step(batch) for batch in loader]
    if check:
        print(check_hypergradient(optimizer, step, list(loader), raise_exception=False))
        return
    print(f"loss: {losses[-1]:.3f}")
    print(f"meta updates: {optimizer.metrics['meta_updates']:.0f}")
    print(f"exported: {type(mtd.export(model)).__name__}")


def trained_teacher(loader: DataLoader) -> nn.Module:
    """As wide as the student in its first layer, and deeper."""
    norm = nn.BatchNorm1d(WIDTH)
    teacher = nn.Sequential(
        nn.Linear(FEATURES, WIDTH), norm, nn.ReLU(), nn.Linear(WIDTH, 64), nn.ReLU(),
        nn.Linear(64, CLASSES),
    )
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(5):
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(teacher(inputs), targets).backward()
            optimizer.step()
    return teacher.eval()


if __name__ == "__main__":
    main()
