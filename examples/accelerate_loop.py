"""A loop in accelerate's words, on long-tailed handwritten digits.

The optimizer is wrapped first and goes through prepare() like any other. Where kd-balance changed
the plain program, the line ends with its name in a comment; docs/drop_in.md shows the lines against
those they replace.

    pip install 'kd-balance[examples,accelerate]'
    python examples/accelerate_loop.py            # about ten seconds
    python examples/accelerate_loop.py --check    # is the hypergradient right in this loop?
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts  # kd-balance
from kd_balance.check import check_hypergradient
from kd_balance.data import long_tail_indices, split_balanced


def main(argv: Sequence[str] | None = None) -> torch.optim.Optimizer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    if args.check:
        torch.set_default_dtype(torch.float64)

    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
    )
    train_loader, val_loader, test_loader = digits()
    set_seed(0)
    teacher = train_teacher(train_loader, args.epochs).eval().to(accelerator.device)
    accelerator.print("teacher, test:", test(teacher, test_loader, accelerator))

    set_seed(1)
    student = convnet(8).to(accelerator.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    criterion = WeightedKDLoss.long_tailed(class_counts(train_loader))  # kd-balance
    parts = student, criterion, val_loader  # kd-balance
    optimizer = BilevelOptimizer(optimizer, *parts, teacher=teacher)  # kd-balance
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=args.epochs * len(train_loader) // args.gradient_accumulation_steps
    )
    student, optimizer, train_loader, scheduler = accelerator.prepare(
        student, optimizer, train_loader, scheduler
    )

    def step(batch):
        inputs, targets = batch
        with accelerator.accumulate(student):
            with torch.no_grad():
                teacher_logits = teacher(inputs)
            loss = criterion(student(inputs), teacher_logits, targets)  # kd-balance
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return loss

    if args.check:
        accelerator.print(check_hypergradient(optimizer.optimizer, step, train_loader))
        return optimizer
    for epoch in range(1, args.epochs + 1):
        student.train()
        for batch in train_loader:
            loss = step(batch)
        if epoch % 10 == 0 or epoch == args.epochs:
            accelerator.print(f"epoch {epoch}, loss {loss.item():.4f}")
    accelerator.print("student, test:", test(student, test_loader, accelerator))
    return optimizer


def train_teacher(train_loader: DataLoader, epochs: int) -> nn.Module:
    teacher = convnet(32)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(epochs):
        for inputs, targets in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(teacher(inputs), targets).backward()
            optimizer.step()
    return teacher


def test(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> str:
    """Accuracy over all classes, and over frequent, middle and rare ones."""
    model.eval()
    inputs, targets = next(iter(loader))
    with torch.no_grad():
        correct = (model(inputs.to(accelerator.device)).argmax(1).cpu() == targets).float()
    parts = {"all": (0, 10), "0-3": (0, 4), "4-6": (4, 7), "7-9": (7, 10)}
    return "  ".join(
        f"{name} {100 * correct[(targets >= low) & (targets < high)].mean():.1f}%"
        for name, (low, high) in parts.items()
    )


def convnet(width: int, num_classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, num_classes),
    )  # fmt: skip


def digits() -> list[DataLoader]:
    """scikit-learn's digits: a long-tailed training set, balanced validation and test sets."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16).to(torch.get_default_dtype())
    images = images.unsqueeze(1)  # [1797, 1, 8, 8]
    labels = torch.tensor(bunch.target)
    test, rest = split_balanced(labels, per_class=60, seed=0)
    val, rest = (rest[i] for i in split_balanced(labels[rest], per_class=10, seed=0))
    train = rest[long_tail_indices(labels[rest], imbalance_factor=50, seed=0, head_count=100)]
    return [
        DataLoader(TensorDataset(images[i], labels[i]), batch_size=size, shuffle=shuffle)
        for i, size, shuffle in ((train, 32, True), (val, 50, True), (test, 600, False))
    ]


if __name__ == "__main__":
    main()
