"""What is made of a trained student without training it again."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_balance.hard_losses import log_prior
from longtail.data import Task
from longtail.protocol import Protocol

Predict = Callable[[Tensor], Tensor]
"""Network inputs [N, …] to logits [N, C]."""


def predict_with(student: nn.Module) -> Predict:
    """The student's own logits, its batch norm in eval mode."""

    @torch.no_grad()
    def predict(inputs: Tensor) -> Tensor:
        student.eval()
        return torch.cat([student(part).float() for part in inputs.split(500)])

    return predict


def adjust_logits(student: nn.Module, task: Task, protocol: Protocol, seed: int) -> Predict:
    """Subtracts the log frequency of each class: Menon et al. 2021, eq. 9, with tau one."""
    shift = log_prior(task.counts).to(task.device)
    predict = predict_with(student)
    return lambda inputs: predict(inputs) - shift


def tune_adjustment(student: nn.Module, task: Task, protocol: Protocol, seed: int) -> Predict:
    """As :func:`adjust_logits` with the tau, 0 to 1.5, that does best on the validation set.

    Without a validation set the meta set decides.
    """
    shift = log_prior(task.counts).to(task.device)
    predict = predict_with(student)
    split = task.validation if len(task.validation.targets) else task.meta_set
    logits = predict(split.inputs)

    def right(tau: float) -> int:
        return int(((logits - tau * shift).argmax(dim=1) == split.targets).sum())

    best = max((step / 20 for step in range(31)), key=right)
    return lambda inputs: predict(inputs) - best * shift


def retrain_classifier(student: nn.Module, task: Task, protocol: Protocol, seed: int) -> Predict:
    """A fresh last layer trained on the meta set, all other layers fixed: Kang et al. 2020.

    Every view of the meta set is a batch, seen five times: cross entropy, SGD, a cosine schedule.
    """
    student.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(student.fc.in_features, task.num_classes).to(task.device)
    views = torch.arange(protocol.views, device=task.device)
    with torch.no_grad():
        batches = [student.features(task.views(task.meta, view)).float() for view in views]
    optimizer = torch.optim.SGD(layer.parameters(), protocol.lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5 * len(batches))
    for features in 5 * batches:
        optimizer.zero_grad()
        F.cross_entropy(layer(features), task.targets[task.meta]).backward()
        optimizer.step()
        scheduler.step()

    @torch.no_grad()
    def predict(inputs: Tensor) -> Tensor:
        return torch.cat([layer(student.features(part)) for part in inputs.split(500)])

    return predict


AFTERWARDS = {
    "logit-adjustment": adjust_logits,
    "tuned-adjustment": tune_adjustment,
    "retrain": retrain_classifier,
}
"""By the name that a row carries behind its method's."""
