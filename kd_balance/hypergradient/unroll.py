"""The reference engine: the whole inner run as one graph, through `higher`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_balance.distributed import Ranks
from kd_balance.inner_step import DifferentiableTorchOptimizer, InnerStep, State
from kd_balance.invariants import Invariants
from kd_balance.loss import WeightedKDLoss
from kd_balance.replay import LoopBackward


class Unroll:
    """dL_meta/dφ by building every inner step into one graph and differentiating it.

    Slow and hungry for memory, and so plain that the other engine is held against it. Where the
    user's gradient holds more than the criterion's part (other loss terms, what clipping made of
    it), the recorded value is used and only the criterion's part is differentiated.

    Args:
        ranks: L_meta is the mean of theirs, and so are the gradients.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def try_without_forward_mode(self) -> bool:
        """It knows no other way."""
        return False

    def __call__(
        self,
        criterion: WeightedKDLoss,
        steps: list[InnerStep],
        meta_loss: Callable[[Mapping[str, Tensor]], Tensor],
        after: Mapping[str, Tensor],
        invariants: Invariants,
    ) -> tuple[Tensor, list[Tensor]]:
        """The meta loss and its gradients for the weight net's parameters.

        Args:
            criterion: the weight net is its own.
            steps: the inner steps, oldest first; φ is the same in all of them.
            meta_loss: of the student's parameters by name.
            after: not needed here, the parameters after the last step being computed anew.
            invariants: are told what should agree.
        """
        steps = [step.whole() for step in steps]
        params: dict[str, Tensor] = {}
        states: dict[str, State] = {}
        with torch.enable_grad():
            for step in steps:  # a layer may begin to train, or to rest, within the window
                for name, param in step.update.params.items():
                    params.setdefault(name, param.detach().requires_grad_())
            for step in steps:
                # a gradient that a backward pass did not reach is not what an earlier step left
                resting = params
                params = {name: param.view_as(param) for name, param in params.items()}
                with LoopBackward():
                    loss = _training_loss(criterion, step, params, resting, invariants)
                    _take(step, loss, params, states, invariants, self._ranks)
            loss = meta_loss(params)
        parts = torch.autograd.grad(
            loss, criterion.phi, allow_unused=True, materialize_grads=True
        )
        loss, *hypergradient = self._ranks.mean([loss.detach(), *parts])
        return loss, hypergradient


def _training_loss(
    criterion: WeightedKDLoss,
    step: InnerStep,
    params: Mapping[str, Tensor],
    resting: Mapping[str, Tensor],
    invariants: Invariants,
) -> Tensor:
    """The criterion's part of what the user called backward on, as a function of θ and φ.

    Args:
        params: whose gradients the step is made of.
        resting: their values, in the place of those that backward did not reach.
    """
    total = torch.zeros((), device=step.calls[0].result.device)
    for call in step.calls:
        assert call.upstream is not None
        own = call.part_of(params, step.ids)
        mapped = {**resting, **own}
        outputs = call.replay(mapped)
        losses = call.losses(criterion, outputs)
        invariants.replayed(*call.replayed(outputs, losses))
        weights = criterion.weigh(call.features, losses, call.kept)
        invariants.weighed(weights, call.weights, call.kept)
        result = criterion.combine(losses, weights, call.kept, call.targets)
        total = total.to(result) + (result * call.upstream).sum()
    return total


def _take(
    step: InnerStep,
    loss: Tensor,
    params: dict[str, Tensor],
    states: dict[str, State],
    invariants: Invariants,
    ranks: Ranks,
) -> None:
    """Moves `params` and `states` by the recorded update, their graphs included."""
    update = step.update
    gradients = _as_recorded(step, loss, params, invariants, ranks)
    for kind in {group.kind: None for group in update.groups}:
        groups = [group for group in update.groups if group.kind is kind]
        names = [name for group in groups for name in group.names]
        copies = [[p.clone().requires_grad_() for p in group.params] for group in groups]
        optimizer = Optimizer(
            [{"params": ps, **g.options} for ps, g in zip(copies, groups, strict=True)], {}
        )
        differentiable = DifferentiableTorchOptimizer(
            optimizer, [p for ps in copies for p in ps], kind=kind
        )
        for slots, group in zip(differentiable.state, groups, strict=True):
            for i, (name, state) in enumerate(zip(group.names, group.states, strict=True)):
                slots[i] = states.get(name, state) if state else {}
        old, own = [params[n] for n in names], [gradients[n] for n in names]
        unused = torch.stack([param.sum() for param in old]).sum()  # higher derives something
        moved = differentiable.step(unused, old, grad_callback=lambda _, own=own: own)
        params.update(zip(names, moved, strict=True))
        for slots, group in zip(differentiable.state, groups, strict=True):
            states.update((name, slots[i]) for i, name in enumerate(group.names))


def _as_recorded(
    step: InnerStep,
    loss: Tensor,
    params: Mapping[str, Tensor],
    invariants: Invariants,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """The recorded gradients, differentiable as the criterion's part of them."""
    update = step.update
    own = torch.autograd.grad(
        loss, [params[n] for n in update.grads], create_graph=True, allow_unused=True
    )
    found = {n: g for n, g in zip(update.grads, own, strict=True) if g is not None}
    if step.alone:
        replayed = {n: g.detach() for n, g in found.items()}
        invariants.equal(step.gradients, ranks.mean_by_name(replayed, update.grads))
    changes = {n: g - g.detach() for n, g in found.items()}
    if ranks.size > 1:
        whole = [changes[n] if n in changes else torch.zeros_like(g)
                 for n, g in update.grads.items()]
        changes = dict(zip(update.grads, _MeanOfChanges.apply(ranks, *whole)))
    for transform in update.transforms:
        changes = transform.push(changes)
    if update.clipping is not None:
        changes = update.clipping.product(changes, update.grads)
    return {name: value + changes.get(name, 0) for name, value in update.grads.items()}


class _MeanOfChanges(torch.autograd.Function):
    """The mean over the ranks of what is zero on each; its derivative is the same mean."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *changes: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        return tuple(change.clone() for change in changes)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return None, *ctx.ranks.mean(cotangents)
