"""The step of the student's own optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from kd_balance.bilevel.settings import Settings
from kd_balance.gradients import copies
from kd_balance.inner_step import is_differentiable, predicted, runs_unhooked
from kd_balance.invariants import Invariants, distance
from kd_balance.replay import Structure
from kd_balance.shards import own


class StudentStep:
    """Lets the wrapped optimizer step, and holds it against its formula."""

    def __init__(
        self,
        optimizer: Optimizer,
        structure: Structure,
        invariants: Invariants,
        settings: Settings,
    ) -> None:
        self.optimizer = optimizer
        self._structure = structure
        self._invariants = invariants
        self._settings = settings
        self.moved = False
        """Whether it was taken; whoever wants to know clears it before."""
        self.runs_closure = False
        """Whether the optimizer is in the middle of its step, and the loop's closure in it."""

    def take(self, closure: Callable[[], Any] | None = None) -> None:
        """Takes it.

        Args:
            closure: of the loop, which has run unless the optimizer calls it by itself.
        """
        if closure is not None and needs_closure(self.optimizer):
            self.runs_closure = True
            try:
                self.optimizer.step(closure)
            finally:
                self.runs_closure = False
        else:
            self.optimizer.step()
        self.moved = True

    def take_checked(self, closure: Callable[[], Any] | None, is_rare: bool) -> None:
        """Takes it, and compares where anything but its formula may move the parameters.

        Args:
            closure: as for :meth:`take`.
            is_rare: whether costly checks are due.
        """
        known = self._settings.step_derivative == "finite_difference"
        known = known or is_differentiable(self.optimizer)
        looks = known and (is_rare or not runs_unhooked(self.optimizer))
        moved = predicted(self.optimizer) if looks else {}
        length = distance(list(moved.values()), list(map(own, moved))) if moved else None
        self.take(closure)
        if length is not None:
            self._invariants.moved(list(moved.values()), list(map(own, moved)), length)

    def left(self) -> dict[str, Tensor]:
        """Copies of the parameters that it moved, by name; of shards, this process's."""
        params = self._structure.parameters
        held = {n: own(p) for p, n in params.items() if p.grad is not None}
        return dict(zip(held, copies(list(held.values()))))


def needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
