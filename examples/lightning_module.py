"""A LightningModule under automatic optimization, on long-tailed handwritten digits.

Scheduler, clipping, accumulation, precision and checkpoints are the Trainer's business as ever.
Where kd-balance changed the plain program, the line ends with its name in a comment;
docs/drop_in.md shows the lines against those they replace.

    pip install 'kd-balance[examples,lightning]'
    python examples/lightning_module.py            # about ten seconds
    python examples/lightning_module.py --check    # is the hypergradient right in this loop?
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts  # kd-balance
from kd_balance.check import check_hypergradient
from kd_balance.data import long_tail_indices, split_balanced


class Classifier(L.LightningModule):
    """The teacher, trained by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = convnet(width)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=3e-3)


class Distillation(L.LightningModule):
    def __init__(self, student, teacher, counts, meta_loader) -> None:  # kd-balance
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.criterion = WeightedKDLoss.long_tailed(counts, temperature=4.0)  # kd-balance
        self.meta = meta_loader  # kd-balance

    def on_train_start(self) -> None:
        self.teacher.eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        teacher_logits = self.teacher(inputs)
        loss = self.criterion(self.student(inputs), teacher_logits, targets)  # kd-balance
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy over all classes, and over frequent, middle and rare ones."""
        inputs, targets = batch
        correct = (self.student(inputs).argmax(1) == targets).float()
        parts = {"all": (0, 10), "0-3": (0, 4), "4-6": (4, 7), "7-9": (7, 10)}
        for name, (low, high) in parts.items():
            part = (targets >= low) & (targets < high)
            self.log(name, correct[part].mean(), batch_size=int(part.sum()))

    def configure_optimizers(self) -> dict:
        opt = torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9)
        parts = self.student, self.criterion, self.meta  # kd-balance
        opt = BilevelOptimizer(opt, *parts, teacher=self.teacher)  # kd-balance
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=steps)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(argv: Sequence[str] | None = None) -> Distillation:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.check:
        torch.set_default_dtype(torch.float64)
    epochs = options.epochs
    train_loader, val_loader, test_loader = digits()

    def trainer(max_steps: int = -1) -> L.Trainer:
        return L.Trainer(
            max_epochs=epochs,
            max_steps=max_steps,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )

    L.seed_everything(0)
    teacher = Classifier(width=32)
    trainer().fit(teacher, train_loader)

    L.seed_everything(1)
    counts = class_counts(train_loader)  # kd-balance
    distillation = Distillation(convnet(8), teacher.network, counts, val_loader)  # kd-balance
    if options.check:
        check(distillation, trainer(max_steps=1), train_loader)
        return distillation
    trainer().fit(distillation, train_loader)
    trainer().test(distillation, test_loader)
    return distillation


def check(module: Distillation, trainer: L.Trainer, train_loader: DataLoader) -> None:
    """After one step, which sets all up; the Trainer's own loop cannot be called batch by batch."""
    trainer.fit(module, train_loader)
    optimizer = trainer.optimizers[0]

    def step(batch: list[Tensor]) -> None:
        inputs, targets = batch
        optimizer.zero_grad()
        module.criterion(module.student(inputs), module.teacher(inputs), targets).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    print(check_hypergradient(optimizer, step, train_loader))


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
