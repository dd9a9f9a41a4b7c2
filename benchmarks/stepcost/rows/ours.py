"""kd-balance, the loop as its README writes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from kd_balance import BilevelOptimizer, WeightedKDLoss
from stepcost.case import TEMPERATURE, Batch, Case
from stepcost.rows.base import Row

NEVER = 10**9


class KDBalance(Row):
    """Settings of BilevelOptimizer are class attributes of the rows derived from this one."""

    settings: dict[str, Any] = {}
    definition = "optimizer"
    optimizer: BilevelOptimizer

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.criterion = WeightedKDLoss(self.weight_net, temperature=TEMPERATURE)
        self._meta: Batch | None = None
        self.optimizer = BilevelOptimizer(
            case.optimizer(self.student),
            self.student,
            self.criterion,
            self._meta_batches(),
            **self._settings(case),
        )
        if self.optimizer.every < NEVER:
            self.period = self.optimizer.every

    def _settings(self, case: Case) -> dict[str, Any]:
        settings = {"unroll": case.unroll, "every": case.unroll, **self.settings}
        settings["every"] = max(settings["every"], settings["unroll"])
        return {"meta_optimizer": case.meta_optimizer(self.weight_net), **settings}

    def _meta_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            assert self._meta is not None
            yield self._meta.inputs, self._meta.targets

    def step(self, train: Batch, meta: Batch) -> None:
        self._meta = meta
        with self.case.autocast():
            logits = self.student(train.inputs)
        loss = self.criterion(logits, train.teacher_logits, train.targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Online(KDBalance):
    settings = {"method": "online"}


class OnlineUnchecked(KDBalance):
    """Without the invariants, whose cost it shows."""

    settings = {"method": "online"}

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        for name in ("replayed", "weighed", "factor", "moved", "began", "along", "equal"):
            setattr(self.optimizer._steps.invariants, name, lambda *_: None)


class OnlineEvery4(KDBalance):
    settings = {"every": 4}


class OnlineEvery5(KDBalance):
    settings = {"every": 5}


class OnlineEvery10(KDBalance):
    settings = {"every": 10}


class OnlineEvery16(KDBalance):
    settings = {"every": 16}


class Unroll4Every16(KDBalance):
    definition = None  # type: ignore[assignment]
    settings = {"unroll": 4, "every": 16}


class Default(KDBalance):
    """As the README's two lines leave it, with no option set."""

    definition = None  # type: ignore[assignment]

    def _settings(self, case: Case) -> dict[str, Any]:
        return {}


class WithoutMeta(KDBalance):
    definition = None  # type: ignore[assignment]
    settings = {"every": NEVER}


class Lookahead(KDBalance):
    settings = {"method": "lookahead"}


class Paper(KDBalance):
    definition = "sgd"
    settings = {"method": "paper"}


class Unroll(KDBalance):
    settings = {"engine": "unroll"}
