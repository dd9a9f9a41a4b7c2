"""One step of the student and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kd_balance.inner_step.update import Update
from kd_balance.loss import WeightedKDLoss
from kd_balance.record import CriterionCall
from kd_balance.replay import LoopBackward


@dataclass
class InnerStep:
    """One step of the student: the criterion calls behind its gradient, and the update."""

    calls: list[CriterionCall]
    update: Update
    gradients: dict[str, Tensor]
    """What the step's backward passes added to the gradients, by name, before clipping; this
    process's part."""
    alone: bool
    """Whether nothing but these calls reached them."""
    ids: dict[str, int]
    """The identities of the live parameters, by name."""
    is_rare: bool = False
    """Whether costly checks are due, such as to repeat the calls' backward passes."""

    def whole(self) -> InnerStep:
        """The same where every process has all of it."""
        gradients = self.update.put_together(self.gradients)
        return replace(self, update=self.update.whole(), gradients=gradients)

    def own_gradients(
        self, criterion: WeightedKDLoss, params: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """The calls' part of the gradients; None where it is not known without a replay.

        Args:
            criterion: of the calls.
            params: that the calls were made with.
        """
        if self.alone:
            return self.update.put_together(self.gradients)
        if not self.is_rare:
            return None
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        for call in self.calls:
            mapped = call.part_of(leaves, self.ids)
            with torch.enable_grad(), LoopBackward():
                losses = call.losses(criterion, call.replay({**params, **mapped}))
                result = criterion.combine(losses, call.weights, call.kept, call.targets)
                torch.autograd.backward(result, call.upstream, inputs=list(mapped.values()))
        return {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
