"""fastai: a Learner whose callback distils, with learned weights.

    pip install kd-balance fastai==2.8.12
    python examples/codebases/fastai_learner.py
    python examples/codebases/fastai_learner.py --check    # is the hypergradient right?

One-cycle schedule, gradient clipping, OptimWrapper and loop are fastai's. Only its parts that need
no images are imported. Made-up clouds of points stand for the data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import BalancedAccuracy
from fastai.optimizer import OptimWrapper
from torch import Tensor, nn

from clouds import BALANCED, LONG_TAIL, Mlp, clouds
from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts, meta_loader  # kd-balance
from kd_balance.check import check_hypergradient

EPOCHS = 5


class Distillation(Callback):
    """The loss is that between student, teacher and labels."""

    order = -20

    def __init__(self, teacher: nn.Module, criterion: nn.Module) -> None:
        self.teacher, self.criterion = teacher, criterion

    def after_loss(self) -> None:
        with torch.no_grad():
            teacher_logits = self.teacher(*self.xb)
        self.learn.loss_grad = self.criterion(self.pred, teacher_logits, self.y)  # kd-balance
        self.learn.loss = self.loss_grad.detach().float()  # to be shown, in fastai's own precision


def wrapped(make: Callable, *parts, **options) -> Callable:  # kd-balance
    """fastai's opt_func, whose inner optimizer is wrapped."""

    def opt_func(groups: list, **settings) -> OptimWrapper:  # kd-balance
        found = make(groups, **settings)  # kd-balance
        found.opt = BilevelOptimizer(found.opt, *parts, **options)  # kd-balance
        return found  # kd-balance

    return opt_func  # kd-balance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    if check:
        torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    train, valid = clouds(LONG_TAIL, seed=0), clouds(BALANCED, seed=2)
    data = DataLoaders.from_dsets(train, valid, bs=32, device=torch.device("cpu"), num_workers=0)
    loss = CrossEntropyLossFlat()
    teacher = Mlp(64)
    with Learner(data, teacher, loss_func=loss).no_bar() as learner:
        learner.fit_one_cycle(3, 1e-2)
    teacher.eval().requires_grad_(False)

    student = Mlp(12)
    sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9)
    criterion = WeightedKDLoss.long_tailed(class_counts(train))  # kd-balance
    meta = meta_loader(clouds(BALANCED, seed=1))  # kd-balance
    sgd = wrapped(sgd, student, criterion, meta, teacher=teacher, unroll=4, every=5)  # kd-balance
    learner = Learner(
        data, student, loss_func=loss, opt_func=sgd, metrics=BalancedAccuracy(),
        cbs=[Distillation(teacher, criterion), GradientClip(2.0)],
    )
    with learner.no_bar():
        learner.fit_one_cycle(1 if check else EPOCHS, 0.1)
        optimizer = learner.opt.opt  # kd-balance
        if check:
            check_step(learner, optimizer, list(data.train))
            return
    print(f"meta updates: {optimizer.metrics['meta_updates']:.0f}")


def check_step(learner: Learner, optimizer: BilevelOptimizer, batches: list[tuple]) -> None:
    """Calls the Learner's own one_batch, in training again and at a rate that moves the student."""
    learner.opt.set_hypers(lr=0.1)
    learner.model.train()
    learner.training = True

    def step(batch: tuple[Tensor, Tensor]) -> None:
        learner.one_batch(0, batch)

    print(check_hypergradient(optimizer, step, batches, raise_exception=False))


if __name__ == "__main__":
    main()
