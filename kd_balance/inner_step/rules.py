"""Updates of optimizers that torch cannot differentiate, written as functions of the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

State = dict[str, Any]
UpdateRule = Callable[
    [Mapping[str, Any], Tensor, Tensor, State], tuple[Tensor, State]
]
"""(options of the group, parameter, gradient, state before) -> (new parameter, new state)."""

_RULES: dict[type[Optimizer], UpdateRule] = {}


def register_update_rule(kind: type[Optimizer], rule: UpdateRule) -> None:
    """Teaches :class:`~kd_balance.BilevelOptimizer` the update of another optimizer.

    Every meta update at the first window, and at ever rarer ones, holds the rule against the
    optimizer's own step.

    Args:
        kind: the class of the optimizer; its subclasses are not meant.
        rule: one parameter's update, ``(options, param, grad, state) -> (new_param, new_state)``,
            out of operations that autograd differentiates, none of them in place. ``options`` are
            those of the parameter group, and ``state`` is that of ``optimizer.state[param]`` before
            the step, {} before the first.

    Raises:
        TypeError: `kind` is no class of optimizers.

    Example::

        >>> from kd_balance.inner_step import register_update_rule
        >>> class SignMomentum(torch.optim.Optimizer):
        ...     "Moves against the hyperbolic tangent of the gradient."
        ...     def __init__(self, params, lr):
        ...         super().__init__(params, {"lr": lr})
        ...     @torch.no_grad()
        ...     def step(self, closure=None):
        ...         for group in self.param_groups:
        ...             for p in group["params"]:
        ...                 p -= group["lr"] * p.grad.tanh()
        >>> def rule(options, param, grad, state):
        ...     return param - options["lr"] * grad.tanh(), {}
        >>> register_update_rule(SignMomentum, rule)
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise TypeError(f"kind is {kind!r}, expected a class derived from torch.optim.Optimizer.")
    _RULES[kind] = rule


def update_rule(kind: type[Optimizer]) -> UpdateRule | None:
    """The rule of a class of optimizers; None if there is none."""
    return _RULES.get(kind) or _OF_OTHERS.get(full_name(kind))


def full_name(kind: type[Optimizer]) -> str:
    """Of a class, whose bare name may be that of another optimizer too."""
    return f"{kind.__module__}.{kind.__qualname__}"


def known_optimizers() -> list[str]:
    """The full names of the classes that have a rule."""
    return [*map(full_name, _RULES), *_OF_OTHERS]


def _adafactor(
    options: Mapping[str, Any], param: Tensor, grad: Tensor, state: State
) -> tuple[Tensor, State]:
    """:class:`torch.optim.Adafactor`.

    Source: Shazeer and Stern, "Adafactor", 2018.
    """
    eps1, eps2 = options["eps"]
    eps1 = torch.finfo(options["dtype"]).eps if eps1 is None else eps1
    lr, decay = float(options["lr"]), options["weight_decay"]
    grad = -grad if options["maximize"] else grad
    step = float(state["step"]) + 1 if state else 1.0
    new: State = {"step": torch.tensor(step)}
    fresh = step ** options["beta2_decay"]
    size = param.norm() / math.sqrt(param.numel())
    alpha = size.clamp(min=eps2) * min(lr, step**-0.5)
    decayed = param * (1 - lr * decay)
    square = grad.square()
    if grad.dim() > 1:
        row, col = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)
        new["row_var"] = torch.lerp(state.get("row_var", torch.zeros_like(row)), row, fresh)
        new["col_var"] = torch.lerp(state.get("col_var", torch.zeros_like(col)), col, fresh)
        scale = new["row_var"].mean(-2, keepdim=True).clamp(min=eps1)
        variance = new["row_var"] @ new["col_var"] / scale
    else:
        variance = torch.lerp(state.get("variance", torch.zeros_like(grad)), square, fresh)
        new["variance"] = variance
    update = variance.clamp(min=eps1 * eps1).rsqrt() * grad
    length = update.norm() / (math.sqrt(update.numel()) * options["d"])
    return decayed - alpha / length.clamp(min=1.0) * update, new


def _transformers_adafactor(
    options: Mapping[str, Any], param: Tensor, grad: Tensor, state: State
) -> tuple[Tensor, State]:
    """``transformers.optimization.Adafactor``.

    Source: Shazeer and Stern, "Adafactor", 2018.
    """
    step = int(state["step"]) + 1 if state else 1
    rate: Any = options["lr"]
    if options["relative_step"]:
        rate = min(1e-6 * step if options["warmup_init"] else 1e-2, step**-0.5)
    if options["scale_parameter"]:
        size = param.norm() / math.sqrt(param.numel())
        rate = rate * size.clamp(min=options["eps"][1])
    new: State = {"step": step}
    fresh = step ** options["decay_rate"]

    def average(key: str, now: Tensor, share: float) -> Tensor:
        new[key] = torch.lerp(state.get(key, torch.zeros_like(now)), now, share)
        return new[key]

    square = grad.square() + options["eps"][0]
    if grad.dim() > 1:
        row = average("exp_avg_sq_row", square.mean(-1), fresh)
        col = average("exp_avg_sq_col", square.mean(-2), fresh)
        row = row / row.mean(-1, keepdim=True)
        update = row.rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2) * grad
    else:
        update = average("exp_avg_sq", square, fresh).rsqrt() * grad
    length = update.norm() / math.sqrt(update.numel())
    update = update / (length / options["clip_threshold"]).clamp(min=1.0) * rate
    if options["beta1"] is not None:
        update = average("exp_avg", update, 1 - options["beta1"])
    return param - options["weight_decay"] * rate * param - update, new


def _muon(
    options: Mapping[str, Any], param: Tensor, grad: Tensor, state: State
) -> tuple[Tensor, State]:
    """``torch.optim.Muon``, whose iteration rounds to bfloat16: the values here, not the slopes.

    Source: Jordan et al., "Muon: An Optimizer for Hidden Layers in Neural Networks", 2024.
    """
    momentum, lr = options["momentum"], float(options["lr"])
    buffer = torch.lerp(state.get("momentum_buffer", torch.zeros_like(grad)), grad, 1 - momentum)
    update = torch.lerp(grad, buffer, momentum) if options["nesterov"] else buffer
    smooth = _orthogonalised(update, options)
    with torch.no_grad():
        rounded = _orthogonalised(update.to(options["dtype"]).bfloat16(), options)
    ratio = {"match_rms_adamw": 0.2 * math.sqrt(max(param.shape))}.get(
        options["adjust_lr_fn"], math.sqrt(max(1, param.shape[0] / param.shape[1]))
    )
    step = smooth + (rounded.to(smooth) - smooth).detach()
    return param * (1 - lr * options["weight_decay"]) - lr * ratio * step, {
        "momentum_buffer": buffer
    }


def _orthogonalised(matrix: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Singular values brought near to one by an odd polynomial, some times over."""
    a, b, c = options["ns_coefficients"]
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=options["eps"])
    for _ in range(options["ns_steps"]):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


_OF_OTHERS: dict[str, UpdateRule] = {
    "transformers.optimization.Adafactor": _transformers_adafactor,
}
"""By the full names of classes that are not imported for it."""

register_update_rule(torch.optim.Adafactor, _adafactor)
if hasattr(torch.optim, "Muon"):
    register_update_rule(torch.optim.Muon, _muon)
