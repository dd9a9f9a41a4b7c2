"""PyTorch-Ignite: an Engine whose update function distils, with learned weights.

    pip install kd-balance pytorch-ignite==0.5.5
    python examples/codebases/ignite_engine.py
    python examples/codebases/ignite_engine.py --check    # is the hypergradient right in this loop?

Ignite's Engine runs the loop, its schedulers move the learning rate, and its Checkpoint saves the
weight net within the optimizer's state. Made-up clouds of points stand for the data.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import (
    Checkpoint,
    CosineAnnealingScheduler,
    DiskSaver,
    create_lr_scheduler_with_warmup,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clouds import BALANCED, LONG_TAIL, Mlp, clouds
from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts, meta_loader  # kd-balance
from kd_balance.check import check_hypergradient

EPOCHS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    if check:
        torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    train = clouds(LONG_TAIL, seed=0)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    teacher = trained_teacher(loader)
    student = Mlp(12)

    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    criterion = WeightedKDLoss.long_tailed(class_counts(train))  # kd-balance
    meta = meta_loader(clouds(BALANCED, seed=1))  # kd-balance
    optimizer = BilevelOptimizer(  # kd-balance
        optimizer, student, criterion, meta, teacher=teacher, unroll=4, every=5  # kd-balance
    )  # kd-balance

    update = distillation_update(student, teacher, optimizer, criterion)
    trainer = Engine(update)
    cosine = CosineAnnealingScheduler(optimizer, "lr", 0.1, 0.001, EPOCHS * len(loader))
    scheduler = create_lr_scheduler_with_warmup(cosine, 0.01, warmup_duration=5)
    trainer.add_event_handler(Events.ITERATION_STARTED, scheduler)
    if check:
        trainer.run(loader, max_epochs=1)
        batches = list(loader)
        print(check_hypergradient(
            optimizer, lambda batch: update(trainer, batch), batches, raise_exception=False
        ))
        return

    with tempfile.TemporaryDirectory() as folder:
        objects = {"trainer": trainer, "student": student, "optimizer": optimizer,
                   "scheduler": scheduler}
        checkpoint = Checkpoint(objects, DiskSaver(folder), n_saved=1)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
        trainer.run(loader, max_epochs=EPOCHS)
        saved = torch.load(checkpoint.last_checkpoint, weights_only=True)
        print("in the checkpoint:", ", ".join(saved["optimizer"]["kd_balance"]))
    print(f"loss: {trainer.state.output:.3f}")
    print(f"meta updates: {optimizer.metrics['meta_updates']:.0f}")


def distillation_update(
    student: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
) -> Callable[[Engine, list[Tensor]], float]:
    """The function that the Engine calls with every batch."""

    def update(engine: Engine, batch: list[Tensor]) -> float:
        student.train()
        inputs, targets = batch
        with torch.no_grad():
            teacher_logits = teacher(inputs)
        loss = criterion(student(inputs), teacher_logits, targets)  # kd-balance
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 2.0)
        optimizer.step()
        return loss.item()

    return update


def trained_teacher(loader: DataLoader) -> nn.Module:
    """By Ignite's own supervised trainer."""
    teacher = Mlp(64)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    create_supervised_trainer(teacher, optimizer, F.cross_entropy).run(loader, max_epochs=5)
    return teacher.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
