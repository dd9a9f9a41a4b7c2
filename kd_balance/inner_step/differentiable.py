"""One optimizer step as a differentiable function of parameters, gradients and state.

torch's own optimizers carry the formulas (their ``differentiable=True`` mode), so flags such as
``maximize``, ``amsgrad`` or decoupled weight decay mean here what they mean in the real step.
:class:`DifferentiableTorchOptimizer` offers them to `higher`, and is registered for the optimizers
that `higher` lacks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import higher
import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_balance.inner_step.rules import State, UpdateRule, update_rule
from kd_balance.joint import parts

DIFFERENTIABLE: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.ASGD,
    torch.optim.Rprop,
)
"""The classes that torch has a differentiable mode for."""

COUNTERS = {"step", "mu_product", "eta", "mu"}  # state that is one number a parameter
_IMPLEMENTATIONS = {"foreach", "fused", "capturable", "differentiable"}
_WITHOUT_FLOAT64 = {"mps"}  # types of devices


def is_differentiable(optimizer: Optimizer) -> bool:
    """Whether the update of `optimizer` can be differentiated; a subclass may have another one."""
    kinds = {type(part) for part in parts(optimizer)}
    return all(kind in DIFFERENTIABLE or update_rule(kind) is not None for kind in kinds)


def differentiable_step(
    kind: type[Optimizer],
    options: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
) -> tuple[list[Tensor], list[State]]:
    """One optimizer step as a differentiable function of parameters, gradients and state.

    Adaptive optimizers are computed in float64 where the device has it: in the derivative of their
    first steps two nearly equal terms cancel, which leaves three digits of float32.

    Args:
        kind: one of :data:`DIFFERENTIABLE`, or one with a registered rule.
        options: the hyperparameters of a parameter group, as `kind` takes them.
        params: the parameters before the step.
        grads: their gradients, same shapes.
        states: the optimizer's state of each parameter before the step, {} where it is cold.

    Returns:
        The new parameters and the new states. No argument is modified.
    """
    if (rule := update_rule(kind)) is not None:
        return _by_rule(rule, options, params, grads, states)
    exact = exact_dtype(params[0].device) if kind is not torch.optim.SGD else None
    fresh = [p.to(exact, copy=True) for p in params]
    options = {**options, "lr": _apart_from_zero(options["lr"])} if exact else options
    with _float64_counters():
        optimizer = kind(fresh, **options, foreach=False, differentiable=True)  # type: ignore
        for new, param, grad, state in zip(fresh, params, grads, states, strict=True):
            state = {k: v.to(exact, copy=True) for k, v in state.items()}
            if kind is not torch.optim.SGD:
                grad = off_the_kink(grad.to(exact))
            elif options.get("momentum") and not state:
                state["momentum_buffer"] = _first_momentum_buffer(options, param, grad)
            if state:
                optimizer.state[new] = state
            new.grad = grad
        optimizer.step()
    for new in fresh:
        new.grad = None
    moved = [new.to(p.dtype) for new, p in zip(fresh, params, strict=True)]
    return moved, [
        {k: v if k in COUNTERS else v.to(p.dtype) for k, v in optimizer.state[new].items()}
        for new, p in zip(fresh, params, strict=True)
    ]


def _by_rule(
    rule: UpdateRule,
    options: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
) -> tuple[list[Tensor], list[State]]:
    moved, new_states = [], []
    for param, grad, state in zip(params, grads, states, strict=True):
        exact = exact_dtype(param.device)
        old = {k: v.to(exact) if _is_real(v) else v for k, v in state.items()}
        new, new_state = rule(
            {**options, "dtype": param.dtype}, param.to(exact), off_the_kink(grad.to(exact)), old
        )
        moved.append(new.to(param.dtype))
        new_states.append(
            {k: v.to(param.dtype) if _is_real(v) and k not in COUNTERS else v
             for k, v in new_state.items()}
        )
    return moved, new_states


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def exact_dtype(device: torch.device) -> torch.dtype:
    """The format that derivatives of adaptive steps are computed in."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


@contextmanager
def _float64_counters() -> Iterator[None]:
    """Lets torch create its step counters in float64: in float32, 1 - 0.999**1 has 4 digits."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def off_the_kink(grad: Tensor) -> Tensor:
    """Moves exact zeros, where sqrt(grad²) has no derivative and autograd gives nan."""
    return grad + (grad == 0).to(grad.dtype) * (1e3 * torch.finfo(grad.dtype).tiny ** 0.5)


def _apart_from_zero(rate: Any) -> Any:
    """Moves a rate of exactly 0, as a warm-up begins with, by which Adam divides."""
    return 1e-30 if isinstance(rate, (int, float)) and rate == 0 else rate


def _first_momentum_buffer(options: Mapping[str, Any], param: Tensor, grad: Tensor) -> Tensor:
    """The buffer for which a warm step equals torch's first one, which detaches its gradient."""
    if not options["dampening"]:
        return torch.zeros_like(param)
    direction = (-grad if options["maximize"] else grad) + options["weight_decay"] * param
    return direction * (options["dampening"] / options["momentum"])


class DifferentiableTorchOptimizer(higher.optim.DifferentiableOptimizer):
    """A torch optimizer for `higher`, computed by torch's own differentiable mode.

    Importing this module registers it for AdamW, NAdam and RAdam, so ``higher.innerloop_ctx``
    takes them. For the optimizers that `higher` brings itself, its own class stays registered.
    """

    def __init__(
        self, other: Optimizer, *args: Any, kind: type[Optimizer] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(other, *args, **kwargs)
        self._kind = kind or type(other)

    def _update(self, grouped_grads: list[list[Tensor]], **kwargs: Any) -> None:
        for group, states, grads in zip(self.param_groups, self.state, grouped_grads, strict=True):
            moved = [i for i, grad in enumerate(grads) if grad is not None]
            params, new_states = differentiable_step(
                self._kind,
                hyperparameters(self._kind, group),
                [group["params"][i] for i in moved],
                [grads[i] for i in moved],
                [states[i] for i in moved],
            )
            for i, param, state in zip(moved, params, new_states, strict=True):
                group["params"][i], states[i] = param, state


for _kind in (torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam):
    higher.register_optim(_kind, DifferentiableTorchOptimizer)


def hyperparameters(kind: type[Optimizer], group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group that the update depends on."""
    if update_rule(kind) is not None:
        return {k: v for k, v in group.items() if k != "params"}
    accepted = set(inspect.signature(kind.__init__).parameters) - {"self", "params"}
    return {k: v for k, v in group.items() if k in accepted - _IMPLEMENTATIONS}
