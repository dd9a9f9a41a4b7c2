"""BiKD: the weights of hard and soft loss are learned, sample by sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.hard_losses import BalancedSoftmax
from kd_balance.soft_losses import DecoupledKD
from kd_balance.weight_net import LogFrequency
from longtail.data import Task
from longtail.meta_batches import MetaBatches
from longtail.methods.base import Method
from longtail.protocol import Protocol


class TwoLines(Method):
    """The README's two lines for a long tail, without an option; the meta set trains too."""

    meta_copies = 1
    derived = ("tuned-adjustment",)

    def __init__(self, task: Task, protocol: Protocol, seed: int) -> None:
        super().__init__(task, protocol, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.criterion = self._criterion()

    def _criterion(self) -> WeightedKDLoss:
        return WeightedKDLoss.long_tailed(self.counts, temperature=self.protocol.temperature)

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        return self.criterion(student_logits, teacher_logits, targets)

    def wrap(self, optimizer: Optimizer, student: nn.Module, meta: MetaBatches) -> Optimizer:
        return BilevelOptimizer(optimizer, student, self.criterion, meta, teacher=meta.teacher)


class PlainTwoLines(TwoLines):
    """The same where the class counts are not given.

    Args:
        mean: of MetaWeightNet; 0 for free weights, as published.
    """

    def __init__(self, task: Task, protocol: Protocol, seed: int, *, mean: float = 0.0) -> None:
        self._mean = mean or None
        super().__init__(task, protocol, seed)

    def _criterion(self) -> WeightedKDLoss:
        weight_net = MetaWeightNet(mean=self._mean)
        return WeightedKDLoss(weight_net, temperature=self.protocol.temperature)


class BiKD(Method):
    """Nguyen, Phan, Ta, "Balancing Knowledge Distillation for Imbalance Learning with Bilevel
    Optimization", arXiv 2605.17839, by this package's optimizer.

    Args:
        method: of BilevelOptimizer; "paper" also takes the authors' meta loss ("mix" for 10
            classes, "hard" for more), their `accumulate` (1 for 10 classes, 5 for more) and their
            decay of the weight net's rate.
        hard: "ce" or "bs", balanced softmax.
        soft: "kl" or "dkd".
        meta: "held-out" for the meta set, "resampled" for class-balanced batches of the training
            set, which needs no extra data.
        every, unroll, meta_loss: of BilevelOptimizer.
        meta_lr: rate of the weight net's Adam.
        scale: the weights' upper bound; they begin near the middle.
        mean, ratio: of MetaWeightNet, in place of the bound; 0 for weights without a fixed mean.
        features: of MetaWeightNet, joined by "+"; "frequency" is the log frequency of the label.
        with_meta: how often the meta set is in the training set too.
        debias: 1 for a teacher without its ``prior_bias``.
    """

    derived = ("tuned-adjustment",)

    def __init__(
        self,
        task: Task,
        protocol: Protocol,
        seed: int,
        *,
        method: str = "online",
        hard: str = "ce",
        soft: str = "kl",
        meta: str = "held-out",
        every: int = 1,
        unroll: int = 1,
        meta_loss: str | None = None,
        meta_lr: float = 1e-3,
        scale: float = 1.0,
        mean: float = 0.0,
        ratio: float = math.inf,
        features: str = "student_ce+teacher_ce",
        with_meta: int = 0,
        debias: int = 0,
    ) -> None:
        super().__init__(task, protocol, seed, debias=debias)
        self.meta_copies = with_meta
        few_classes = task.num_classes <= 10
        as_authors = method == "paper" and soft == "kl"
        self.meta_source = meta
        self.options = {
            "method": method,
            "every": every,
            "unroll": unroll,
            "accumulate": 5 if method == "paper" and not few_classes else 1,
            "meta_loss": meta_loss or ("mix" if as_authors and few_classes else "hard"),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            own = {"frequency": LogFrequency(self.counts)}
            seen = tuple(own.get(name, name) for name in features.split("+"))
            hidden = (64,) if few_classes else (64, 64)
            if mean:
                weight_net = MetaWeightNet(seen, hidden, mean=mean, ratio=ratio)
            else:
                weight_net = _Scaled(scale, seen, hidden)
        self._meta_optimizer = torch.optim.Adam(
            weight_net.parameters(), lr=meta_lr, weight_decay=1e-4
        )
        self.criterion = WeightedKDLoss(
            weight_net,
            temperature=protocol.temperature,
            hard_loss=BalancedSoftmax(self.counts) if hard == "bs" else None,
            soft_loss=DecoupledKD(temperature=protocol.temperature) if soft == "dkd" else None,
        )

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        return self.criterion(student_logits, teacher_logits, targets)

    def wrap(self, optimizer: Optimizer, student: nn.Module, meta: MetaBatches) -> Optimizer:
        return BilevelOptimizer(
            optimizer,
            student,
            self.criterion,
            meta,
            teacher=meta.teacher,
            meta_optimizer=self._meta_optimizer,
            **self.options,
        )

    def rate_decayed(self) -> None:
        if self.options["method"] == "paper":
            for group in self._meta_optimizer.param_groups:
                group["lr"] *= 0.8


class _Scaled(MetaWeightNet):
    """A weight net whose weights lie between 0 and `scale`."""

    def __init__(self, scale: float, *args: Any) -> None:
        super().__init__(*args)
        self._scale = scale

    def forward(self, features: Tensor, kept: Tensor | None = None) -> Tensor:
        return self._scale * super().forward(features, kept)
