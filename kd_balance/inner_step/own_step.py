"""The optimizer's own step, taken on copies: nothing of the real one moves."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_balance.gradients import copies
from kd_balance.inner_step.differentiable import (
    differentiable_step,
    exact_dtype,
    hyperparameters,
)
from kd_balance.inner_step.rules import State, update_rule
from kd_balance.joint import parts
from kd_balance.shards import own, own_state
from kd_balance.torch_private import STEP_HOOKS, has_step_hooks

_NUDGE = {torch.float64: 1e-5, torch.float32: 1e-2}  # of gradients or parameters, relative


def runs_unhooked(optimizer: Optimizer) -> bool:
    """Whether a step runs nothing but the optimizers' own code, without hooks and patches."""
    return not any(
        has_step_hooks(part)
        or _is_patched(part)
        or hasattr(part, "grad_scale")  # of a GradScaler, for a fused step
        for part in {*parts(optimizer), optimizer}
    )


def _is_patched(optimizer: Optimizer) -> bool:
    patch = vars(optimizer).get("step")  # schedulers wrap it
    return patch is not None and getattr(patch, "__wrapped__", None) is not type(optimizer).step


def predicted(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """What the coming step makes of every parameter by the optimizers' formulas, hooks aside.

    Of shards, what it makes of this process's.
    """
    moved: dict[Tensor, Tensor] = {}
    for part in parts(optimizer):
        held = _held(part)
        if held and update_rule(type(part)) is not None:
            moved.update(_by_rule(part))
        elif held:
            moved.update(zip(held, _by_itself(part, held), strict=True))
    return moved


def _by_itself(optimizer: Optimizer, held: Sequence[Tensor]) -> list[Tensor]:
    moved = copies([own(p) for p in held])
    gradients = copies([own(p.grad) for p in held if p.grad is not None])
    # torch adds Nesterov's momentum in place, so gradients are copied too
    states = copied([own_state(optimizer.state.get(p, {})) for p in held])
    _take(optimizer, optimizer.param_groups, held, moved, gradients, states)
    return moved


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@torch.no_grad()
def _by_rule(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    moved: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        if params:
            new, _ = differentiable_step(
                type(optimizer),
                hyperparameters(type(optimizer), group),
                [p.detach() for p in params],
                [p.grad.detach() for p in params if p.grad is not None],
                [dict(optimizer.state.get(p, {})) for p in params],
            )
            moved.update(zip(params, new, strict=True))
    return moved


def _take(
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    held: Sequence[Tensor],
    moved: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
) -> None:
    """Takes a step on `moved`, which stand for `held` in the groups, in place."""
    standing_for = dict(zip(held, moved, strict=True))
    shadow = object.__new__(type(optimizer))
    vars(shadow).update(vars(optimizer))
    shadow.param_groups = [
        {
            **group,
            "params": [standing_for[p] for p in group["params"] if p in standing_for],
            **({"foreach": _foreach(group)} if "foreach" in group else {}),
        }
        for group in groups
    ]
    shadow.state = defaultdict(dict, zip(moved, states, strict=True))
    vars(shadow).update({hooks: OrderedDict() for hooks in STEP_HOOKS})
    for param, gradient in zip(moved, gradients, strict=True):
        param.grad = gradient
    type(optimizer).step(shadow)
    for param in moved:
        param.grad = None


def _foreach(group: Mapping[str, Any]) -> bool:
    """Whether torch's step takes all of a group's tensors at once, for which some have no code."""
    of_tensors = isinstance(group.get("lr"), Tensor) and not group.get("capturable")
    return not (group.get("fused") or group.get("differentiable") or of_tensors)


class StepCopy:
    """A step held as it was before it was taken, differentiated by finite differences of itself.

    For optimizers whose formula nobody wrote down. The Jacobian of a parameter's new value by its
    gradient is taken for symmetric, as it is where every element moves by itself, and for zero
    between different parameters. What the optimizer's state carries from step to step counts as
    constant.

    Args:
        optimizer: its parameters hold their gradients.
        names: the name in the student of every parameter of interest.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
        self._optimizer = optimizer
        self._held = _held(optimizer)
        self._groups = [dict(group) for group in optimizer.param_groups]
        self._names = [names.get(p) for p in self._held]
        self._params = copies([p.detach() for p in self._held])
        self._gradients = copies([p.grad.detach() for p in self._held if p.grad is not None])
        self._states = copy.deepcopy([dict(optimizer.state.get(p, {})) for p in self._held])
        self._exact = exact_dtype(self._held[0].device)

    def by_gradient(self, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Products of the Jacobians by the gradients and the parameters' cotangents, by name."""
        return self._products(cotangents, self._gradients, of_gradients=True)

    def by_param(self, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Products of the Jacobians by the old parameters and the cotangents, by name."""
        return self._products(cotangents, self._params, of_gradients=False)

    def asymmetry(self) -> float:
        """How far ⟨a, J b⟩ is from ⟨b, J a⟩ for random a and b, relative; 0 for symmetric J."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            one, other = (
                {n: torch.randn(p.shape).to(p) for n, p in zip(self._names, self._params) if n}
                for _ in range(2)
            )
        sums = [
            torch.stack([(a[n] * product[n]).sum() for n in product]).double()
            for a, product in (
                (one, self.by_gradient(other)), (other, self.by_gradient(one)),
            )
        ]
        return ((sums[0] - sums[1]).norm() / (sums[0] + sums[1]).norm().clamp(min=1e-30)).item()

    def _products(
        self, cotangents: Mapping[str, Tensor], around: Sequence[Tensor], *, of_gradients: bool
    ) -> dict[str, Tensor]:
        nudges: list[Tensor | None] = []
        lengths = []
        for name, value in zip(self._names, around, strict=True):
            cotangent = None if name is None else cotangents.get(name)
            nudges.append(cotangent)
            if cotangent is not None:
                size = value.norm().to(self._exact).clamp(min=1e-12)
                relative = _NUDGE[self._exact] * size
                lengths.append(relative / cotangent.norm().to(self._exact).clamp(min=1e-30))
        try:
            pair = [self._stepped(nudges, lengths, sign, of_gradients) for sign in (1, -1)]
        except (RuntimeError, TypeError, ValueError):
            if self._exact is torch.float32:
                raise
            self._exact = torch.float32  # a kernel that knows no float64, most likely
            return self._products(cotangents, around, of_gradients=of_gradients)
        products, length = {}, iter(lengths)
        for name, nudge, ahead, behind in zip(self._names, nudges, *pair, strict=True):
            if name is not None and nudge is not None:
                products[name] = ((ahead - behind) / (2 * next(length))).to(nudge.dtype)
        return products

    @torch.no_grad()
    def _stepped(
        self,
        nudges: Sequence[Tensor | None],
        lengths: Sequence[Tensor],
        sign: int,
        of_gradients: bool,
    ) -> list[Tensor]:
        def nudged(values: Sequence[Tensor], here: bool) -> list[Tensor]:
            length = iter(lengths)
            fresh = []
            for value, nudge in zip(values, nudges, strict=True):
                value = value.to(self._exact, copy=True)
                if nudge is not None and here:
                    value += sign * next(length) * nudge
                fresh.append(value)
            return fresh

        moved = nudged(self._params, not of_gradients)
        states = [_in_format(state, self._exact) for state in copy.deepcopy(self._states)]
        _take(
            self._optimizer, self._groups, self._held, moved,
            nudged(self._gradients, of_gradients), states,
        )
        return moved


def _in_format(state: State, dtype: torch.dtype) -> State:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {key: cast(value) for key, value in state.items()}


def copied(states: Sequence[State]) -> list[State]:
    """Copies of optimizers' states, in one call for each key."""
    by_key: dict[str, list[Tensor]] = defaultdict(list)
    for state in states:
        for key, value in state.items():
            if isinstance(value, Tensor):
                by_key[key].append(value)
    held = {key: iter(copies(tensors)) for key, tensors in by_key.items()}
    return [
        {k: next(held[k]) if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}
        for state in states
    ]
