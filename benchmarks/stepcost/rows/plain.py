"""Plain knowledge distillation, which every ratio is taken to."""

from __future__ import annotations

from stepcost.case import Batch
from stepcost.losses import sample_losses
from stepcost.rows.base import Row


class PlainKD(Row):
    def step(self, train: Batch, meta: Batch) -> None:
        with self.case.autocast():
            logits = self.student(train.inputs)
        loss = 0.5 * sample_losses(logits, train.teacher_logits, train.targets).sum(1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
