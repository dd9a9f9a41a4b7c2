"""Class-balanced meta batches of augmented views, and the teacher's logits for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kd_balance.data import BalancedBatches
from longtail.data import Task


class MetaBatches:
    """Endless (inputs, targets), for :class:`kd_balance.BilevelOptimizer`.

    Args:
        task: whose views are drawn.
        samples: pool indices to draw from, evenly over their classes.
        teacher_logits: [views, pool, C] of the pool's views; None without a teacher.
        views: how many views of a sample there are.
        batch_size: samples in a batch.
        seed: of the draws.
    """

    def __init__(
        self,
        task: Task,
        samples: Tensor,
        teacher_logits: Tensor | None,
        views: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self._task = task
        self._logits = teacher_logits
        self._views = views
        self._batches = BalancedBatches(samples.cpu(), task.targets[samples], batch_size, seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._last: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> MetaBatches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        samples, _ = next(self._batches)
        view = torch.randint(self._views, samples.shape, generator=self._generator)
        samples, view = samples.to(self._task.device), view.to(self._task.device)
        self._last = (view, samples)
        return self._task.views(samples, view), self._task.targets[samples]

    def teacher(self, inputs: Tensor) -> Tensor:
        """The teacher's logits [B, C] for the inputs drawn last."""
        if self._last is None or self._logits is None:
            raise RuntimeError("There are no teacher logits before the first meta batch.")
        return self._logits[self._last]

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches.state_dict(), "views": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches.load_state_dict(state["batches"])
        self._generator.set_state(state["views"])
