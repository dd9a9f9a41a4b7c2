"""The steps of SGD and Adam, transposed: products of their Jacobians and a cotangent, written out.

torch's differentiable mode, which every other optimizer goes through, comes to the same numbers in
several times as many operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def sgd_product(
    options: Mapping[str, Any],
    by_param: list[Tensor] | None,
    by_buffer: list[Tensor] | None,
    *,
    warm: bool,
    in_place: bool,
) -> dict[str, list[Tensor]]:
    """Cotangents of the old parameters, gradients and momentum buffers.

    With g̃ = ±g + decay θ, b' = μ b + (1 − dampening) g̃ (g̃ itself in the first step) and
    θ' = θ − lr b', or θ − lr (g̃ + μ b') with Nesterov's momentum.

    Args:
        options: of :class:`torch.optim.SGD`.
        by_param, by_buffer: the cotangents of θ' and b' of every parameter, None for zeros.
        warm: whether there was a momentum buffer before the step.
        in_place: only the gradients' are wanted, and may take the memory of those given.

    Returns:
        Lists by "grad" and, unless `in_place`, "param" and "momentum_buffer".
    """
    lr, decay = options["lr"], options.get("weight_decay", 0)
    sign = -1 if options.get("maximize", False) else 1
    momentum, nesterov = options.get("momentum", 0), options.get("nesterov", False)
    into_buffer = 1 - options.get("dampening", 0) if warm else 1
    if not momentum:
        of_param = -lr
    else:
        of_param = -lr * (into_buffer * momentum + 1 if nesterov else into_buffer)
    terms = [(by_param, sign * of_param), (by_buffer if momentum else None, sign * into_buffer)]
    of_grad = _sum(terms, in_place)
    if in_place:
        return {"grad": of_grad} if of_grad is not None else {}
    assert of_grad is not None
    result = {"grad": of_grad}
    old = _sum([(by_param, 1), (of_grad if decay else None, sign * decay)])
    if old is not None:
        result["param"] = old
    if warm and momentum:
        through = -lr * momentum if nesterov else -lr
        held = _sum([(by_param, momentum * through), (by_buffer, momentum)])
        assert held is not None
        result["momentum_buffer"] = held
    return result


def _sum(
    terms: list[tuple[list[Tensor] | None, Any]], in_place: bool = False
) -> list[Tensor] | None:
    """Tensor by tensor, the sum of those that are not None times their factors."""
    total: list[Tensor] | None = None
    for tensors, factor in terms:
        if tensors is None:
            continue
        if total is None:
            if in_place:
                torch._foreach_mul_(tensors, factor)
                total = tensors
            else:
                total = list(torch._foreach_mul(tensors, factor))
        else:
            torch._foreach_add_(total, tensors, alpha=factor)
    return total


def adam_product(
    options: Mapping[str, Any],
    decoupled: bool,
    step: float | Tensor,
    inputs: Mapping[str, Tensor],
    incoming: Mapping[str, Tensor],
    *,
    through: bool,
) -> dict[str, Tensor]:
    """Cotangents of the gradients and of the old parameters and moments, all of them flat.

    With g̃ = ±g + decay θ (without decay if it is decoupled), m' = β1 m + (1 − β1) g̃,
    v' = β2 v + (1 − β2) g̃², the bias corrections c1 = 1 − β1ᵗ and c2 = 1 − β2ᵗ, and
    θ' = (1 − lr decay if it is decoupled) θ − lr / c1 · m' / (√(v' / c2) + ε).

    Args:
        options: of :class:`torch.optim.Adam`, without amsgrad.
        decoupled: whether weight decay is, as in AdamW.
        step: t, the number of this step, or that of every element.
        inputs: "param", "grad" and, of a warm optimizer, "exp_avg" and "exp_avg_sq" before the
            step, in float64 where t is small: two nearly equal terms cancel then.
        incoming: the cotangents of "param", "exp_avg" and "exp_avg_sq" after the step; those
            missing are zero.
        through: whether more than the gradients' are wanted.

    Returns:
        Cotangents of the inputs by their names.
    """
    (beta1, beta2), lr, decay = options["betas"], options["lr"], options["weight_decay"]
    sign = -1 if options["maximize"] else 1
    param, grad, warm = inputs["param"], inputs["grad"], "exp_avg" in inputs
    if sign < 0:
        grad = -grad
    if decay and not decoupled:
        grad = grad.add(param, alpha=decay)
    square = grad.square().mul_(1 - beta2)
    if warm:
        moment = inputs["exp_avg"].lerp(grad, 1 - beta1)
        square.add_(inputs["exp_avg_sq"], alpha=beta2)
    else:
        moment = grad * (1 - beta1)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    root = square.sqrt_().mul_(correction2**-0.5)
    below = root + options["eps"]
    by_param = incoming.get("param")
    if by_param is None:
        by_moment, by_square = torch.zeros_like(grad), torch.zeros_like(grad)
    else:
        by_moment = (by_param * (-lr / correction1)).div_(below)
        by_square = (by_moment * moment).div_(below.mul_(root).mul_(-2 * correction2))
    if "exp_avg" in incoming:
        by_moment.add_(incoming["exp_avg"])
    if "exp_avg_sq" in incoming:
        by_square.add_(incoming["exp_avg_sq"])
    by_grad = (by_moment * (1 - beta1)).addcmul_(grad, by_square, value=2 * (1 - beta2))
    result = {"grad": -by_grad if sign < 0 else by_grad}
    if through:
        old = torch.zeros_like(grad) if by_param is None else by_param
        if decay:
            old = old * (1 - lr * decay) if decoupled else old.add(by_grad, alpha=decay)
        result["param"] = old
        if warm:
            result |= {"exp_avg": by_moment.mul_(beta1), "exp_avg_sq": by_square.mul_(beta2)}
    return result
