"""A meta update: the hypergradient of a window, handed to the weight net's step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kd_balance.bilevel.metrics import Metrics
from kd_balance.bilevel.settings import Settings
from kd_balance.bilevel.weight_net_step import WeightNetStep
from kd_balance.distributed import Ranks, is_shard
from kd_balance.hypergradient import ENGINES
from kd_balance.inner_step import InnerStep, exact_dtype
from kd_balance.invariants import Invariants
from kd_balance.loss import WeightedKDLoss
from kd_balance.record import CriterionCall
from kd_balance.replay import LoopBackward, Structure

MetaLossOfParams = Callable[[Mapping[str, Tensor]], Tensor]


class MetaUpdate:
    """Takes the derivative of the meta loss through a window's steps, and moves φ by it."""

    def __init__(
        self,
        criterion: WeightedKDLoss,
        structure: Structure,
        weight_net_step: WeightNetStep,
        metrics: Metrics,
        invariants: Invariants,
        settings: Settings,
        ranks: Ranks,
    ) -> None:
        self.engine = ENGINES[settings.engine](ranks)
        self.criterion = criterion
        self.invariants = invariants
        self._structure = structure
        self._weight_net_step = weight_net_step
        self._metrics = metrics
        self._settings = settings
        self._ranks = ranks

    def make(self, steps: list[InnerStep], meta_loss: MetaLossOfParams) -> bool:
        """Makes it; says whether φ moved, as it does when enough of an average are in.

        Args:
            steps: of the window; with method "online" the last one is taken, with others not yet.
            meta_loss: of the student's parameters.
        """
        after = self.live(steps)
        if self._settings.method != "online":
            after.update(steps[-1].update.apply())
        loss, hypergradient = self.engine(
            self.criterion, steps, meta_loss, after, self.invariants
        )
        self._compare_ranks()
        holds = self.invariants.settle()
        flat = torch.cat([part.flatten() for part in hypergradient])
        flat = flat.to(exact_dtype(flat.device))  # whose squares fit
        finite = flat.isfinite().all() & loss.isfinite().to(flat.device)
        finite = finite if holds is None else finite & holds
        used, mean_weights = self._agreed(finite, steps[-1].calls)
        self._metrics.note(loss, flat, used, mean_weights)
        moves = self._weight_net_step.add(hypergradient, used)
        if used.device.type == "cpu":
            self._metrics.tell_if_all_skipped()
        return moves

    def live(self, steps: list[InnerStep]) -> dict[str, Tensor]:
        """The parameters that the steps moved, those that rest by now included, as they are."""
        return self._structure.live({name for step in steps for name in step.update.params})

    def _compare_ranks(self) -> None:
        """Looks whether student and weight net are the same on all ranks."""
        if self._ranks.size == 1:
            return
        params = [p.detach() for p in self._structure.parameters if not is_shard(p)]
        norms = torch._foreach_norm(params) if params else []
        told = torch.cat([t.detach().double().flatten() for t in (*norms, *self.criterion.phi)])
        self.invariants.shared(told, *self._ranks.mean([told]))

    def _agreed(self, finite: Tensor, calls: list[CriterionCall]) -> tuple[Tensor, Tensor]:
        """Over all ranks, whether it can be used, and the mean weights [K] of the calls."""
        weights = torch.cat([call.weights for call in calls])
        broken, total, count = self._ranks.mean(
            [n.to(weights.dtype) for n in (~finite, weights.sum(0), weights.any(1).sum())]
        )
        return broken == 0, total / count.clamp(min=1 / self._ranks.size)  # 0 where ignored

    def reweigh_gradients(self, inner: InnerStep) -> None:
        """Turns the student's gradients into those under the new φ, in place."""
        params = inner.update.put_together(inner.update.params)
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        changes: dict[str, Tensor] = {}
        for call in inner.calls:
            for name, gradient in self._change(call, leaves).items():
                changes[name] = changes[name] + gradient if name in changes else gradient
        mean = self._ranks.mean_by_name(changes, params)
        grads = inner.update.grads
        for name, change in inner.update.own(mean).items():
            grads[name].add_(change)
        self.criterion.reweigh()

    def _change(self, call: CriterionCall, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the new weights of a call's samples change in the gradients."""
        with torch.no_grad():
            weights = self.criterion.weigh(call.features, call.weights, call.kept)
        with torch.enable_grad(), LoopBackward():
            losses = call.losses(self.criterion, call.replay(leaves))
            change = self.criterion.combine(
                losses, weights - call.weights, call.kept, call.targets
            )
            gradients = torch.autograd.grad(
                change, list(leaves.values()), call.upstream, allow_unused=True
            )
        pairs = zip(leaves, gradients, strict=True)
        return {name: gradient for name, gradient in pairs if gradient is not None}
