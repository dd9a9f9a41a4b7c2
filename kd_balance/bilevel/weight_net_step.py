"""The step of the weight net, along the average of some hypergradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_balance.bilevel.settings import Settings
from kd_balance.bilevel.skipped import Skipped
from kd_balance.gradients import copies
from kd_balance.loss import WeightedKDLoss


class WeightNetStep:
    """Averages `accumulate` hypergradients, and lets φ's optimizer step along them.

    Args:
        optimizer: of φ.
        criterion: whose weight net φ are the parameters of.
        skipped: where steps that are not taken are counted.
    """

    def __init__(
        self, optimizer: Optimizer, criterion: WeightedKDLoss, settings: Settings, skipped: Skipped
    ) -> None:
        self.optimizer = optimizer
        self._criterion = criterion
        self._settings = settings
        self._skipped = skipped
        self.count = 0
        """Steps so far, those included that were not taken."""
        self._sum: list[Tensor] = []
        self._summed = 0
        self._holds_some = torch.tensor(False)  # whether one in the sum is not skipped

    @property
    def windows(self) -> int:
        """That are over: one for each hypergradient."""
        return self.count * self._settings.accumulate + self._summed

    @property
    def is_rare(self) -> bool:
        """Whether costly checks are due, as at the first window and ever more rarely after it."""
        return self.windows & (self.windows + 1) == 0

    def begin_anew(self) -> None:
        """Gives up the hypergradients of an average that has not come to an end."""
        self._sum, self._summed = [], 0

    def add(self, hypergradient: list[Tensor], used: Tensor) -> bool:
        """Adds a hypergradient to the average; moves φ when enough are in, and says so.

        Args:
            hypergradient: for each tensor of φ.
            used: a bool on their device, false for one that counts as zero.
        """
        accumulate = self._settings.accumulate
        if self._summed == 0:
            self.optimizer.zero_grad()
        share = [torch.where(used, gradient, 0) for gradient in hypergradient]
        if accumulate > 1:
            share = list(torch._foreach_div(share, accumulate))
        if self._sum:
            share = list(torch._foreach_add(self._sum, share))
        self._sum = share
        begun = self._summed > 0
        self._holds_some = self._holds_some.to(used.device) | used if begun else used
        self._summed += 1
        if self._summed < accumulate:
            return False
        for param, gradient in zip(self._criterion.phi, self._sum, strict=True):
            param.grad = gradient
        self._take(self._holds_some)
        self.begin_anew()
        self.count += 1
        return True

    def _take(self, taken: Tensor) -> None:
        """Takes the step, or none where nobody may wait to learn that it is not to be taken.

        Args:
            taken: a bool on φ's device.
        """
        self._skipped.note_step(taken)
        if taken.device.type == "cpu":
            if taken:
                self.optimizer.step()
            return
        states = self.optimizer.state.values()
        held = [p.detach() for p in self._criterion.phi]
        held += [x for state in states for x in state.values() if isinstance(x, Tensor)]
        held = [x for x in held if x.device == taken.device]
        before = copies(held)
        self.optimizer.step()
        for now, old in zip(held, before, strict=True):
            now.copy_(torch.where(taken, now, old))

    def state_dict(self) -> dict[str, Any]:
        return {
            "meta_optimizer": self.optimizer.state_dict(),
            "meta_updates": self.count,
            "accumulated": self._summed,
            "partial_average": self._sum,
            "holds_some": self._holds_some,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned; what an older version lacks stays or is empty."""
        if "meta_optimizer" in state:
            self.optimizer.load_state_dict(state["meta_optimizer"])
        self.count = state.get("meta_updates", self.count)
        self._holds_some = state.get("holds_some", self._holds_some)
        self._summed = state.get("accumulated", 0)
        like = zip(state.get("partial_average", []), self._criterion.phi)
        self._sum = [part.to(param) for part, param in like]
