"""betty-ml: the student's own step, then a finite-difference hypergradient after it."""

from __future__ import annotations

import logging
from typing import Any

from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.logging import get_logger
from betty.problems import ImplicitProblem
from torch import Tensor

from stepcost.case import Batch, Case
from stepcost.losses import meta_loss, sample_losses, weight_features
from stepcost.rows.base import Row


class _Level(ImplicitProblem):
    """A problem that is handed its batches, and keeps the optimizer that it was given."""

    given: Batch
    case: Case

    def get_batch(self) -> Batch:
        return self.given

    def patch_optimizer(self) -> None:
        """betty builds the optimizer anew from its defaults, which torch's AdamW refuses."""

    def predict(self, inputs: Tensor) -> Tensor:
        with self.case.autocast():
            return self(inputs)


class _Student(_Level):
    weight_net: _WeightNet

    def training_step(self, batch: Batch) -> Tensor:
        losses = sample_losses(self.predict(batch.inputs), batch.teacher_logits, batch.targets)
        features = weight_features(losses, batch.teacher_logits, batch.targets)
        weights = self.weight_net(features.detach())
        return (losses * weights).sum() / len(losses)


class _WeightNet(_Level):
    student: _Student
    last: list[Tensor]

    def training_step(self, batch: Batch) -> Tensor:
        return meta_loss(self.student.predict(batch.inputs), batch.targets)

    def grad_callback(self) -> None:
        self.last = [p.grad for p in self.module.parameters()]


class Betty(Row):
    """Config(type="darts") with betty's own step size, one student step for a meta update."""

    definition = "darts"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        config: dict[str, Any] = {"config": Config(type="darts", unroll_steps=1)}
        meta_optimizer = case.meta_optimizer(self.weight_net)
        self.lower = _Student("student", module=self.student, optimizer=self.optimizer, **config)
        self.upper = _WeightNet(
            "weight_net", module=self.weight_net, optimizer=meta_optimizer, **config
        )
        self.lower.case = self.upper.case = case
        get_logger().setLevel(logging.WARNING)
        self.engine = Engine(
            config=EngineConfig(strategy="gpu" if case.device.startswith("cuda") else "cpu"),
            problems=[self.upper, self.lower],
            dependencies={
                "l2u": {self.lower: [self.upper]},
                "u2l": {self.upper: [self.lower]},
            },
        )
        self.engine.train()

    def step(self, train: Batch, meta: Batch) -> None:
        self.lower.given, self.upper.given = train, meta
        self.engine.train_step()

    def hypergradient(self) -> list[Tensor]:
        return [g.detach().clone() for g in self.upper.last]
