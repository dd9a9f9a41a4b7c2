"""Derivatives that pass over the activations less often than torch's own, or lose fewer digits.

Batch norm in training mode: with x̂ = (x − μ) r, r the inverse standard deviation, and dots for
tangents,

    ẏ = γ r (ẋ − mean ẋ) + x̂ (γ̇ − γ mean(x̂ ẋ)) + β̇,

which is affine in ẋ and x with coefficients for each channel: two reductions and two passes. The
gradients' tangents, for forward over reverse, are of the same kind. Sums are taken over a few
samples at a time where torch's CPU kernel adds up float32 numbers one by one (channels_last): over
a whole batch its variance is off by 3e-5, enough to move a few inputs of ReLUs across zero and the
hypergradient by 1e-4.

Linear layers, ẏ = x ẇᵀ + ḃ + ẋ wᵀ: the last product is added in place.

Convolution on a CPU: of ẏ = conv(x, ẇ) + conv(ẋ, w) the second term is added in slices of the
batch that stay in the cache, and no second activation is held.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


_SLICE = 2**21  # elements of an activation
_ADDED = 2**12  # float32 numbers that may be added up one by one


class FusedRules(TorchFunctionMode):
    """Within it, batch norms, linear layers and 2d convolutions take these rules.

    They leave running statistics alone: they are for replays.

    Args:
        tangents: take the rules for dual tensors too, whose tangents then have no derivative of
            their own.
    """

    def __init__(self, *, tangents: bool) -> None:
        super().__init__()
        self._tangents = tangents

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm:
            if self._tangents or not _any_dual((*args, *kwargs.values())):
                return _batch_norm(*args, **kwargs)
        if self._tangents and not torch.is_grad_enabled():
            if function is F.linear:
                return _linear(*args, **kwargs)
            if function is F.conv2d and args[0].device.type == "cpu":
                return _conv2d(*args, **kwargs)
        return function(*args, **kwargs)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    dual, parameters_dual = _any_dual((input,)), _any_dual((weight, bias))
    several = input.numel() > input.shape[1]  # values a channel; one is torch's to refuse
    if training and several and (dual or (_adds_up_one_by_one(input) and not parameters_dual)):
        return _BatchNorm.apply(input, weight, bias, eps)
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _any_dual(values: Iterable[Any]) -> bool:
    tensors = (value for value in values if isinstance(value, Tensor))
    return any(fwAD.unpack_dual(tensor).tangent is not None for tensor in tensors)


class _BatchNorm(torch.autograd.Function):
    """Batch norm in training mode; its backward pass is its tangent's formula, transposed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
    ) -> Tensor:
        y, mean, inverse_std = _normalised(x, scale, shift, eps)
        ctx.save_for_backward(x, scale, shift, mean, inverse_std)
        ctx.save_for_forward(x, scale, mean, inverse_std)
        ctx.eps = eps
        return y

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor, dscale: Tensor | None, dshift: Tensor | None, _: None
    ) -> Tensor:
        x, scale, mean, inverse_std = ctx.saved_tensors
        with torch.no_grad():
            dy = _projected(dx, x, scale, mean, inverse_std, dscale, dshift)[0]
        return dy.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, mean, inverse_std = ctx.saved_tensors
        if torch.is_grad_enabled():  # its derivative is wanted too: torch's own rule has one
            y = torch.batch_norm(x, scale, shift, None, None, True, 0.0, ctx.eps, False)
            inputs = [t for t, needs in zip((x, scale, shift), ctx.needs_input_grad) if needs]
            found = iter(torch.autograd.grad(y, inputs, gradient, create_graph=True))
            return tuple(next(found) if needs else None for needs in ctx.needs_input_grad)
        gradients = (*_gradients(gradient, x, scale, mean, inverse_std), None)
        return tuple(g if n else None for g, n in zip(gradients, ctx.needs_input_grad, strict=True))


def _normalised(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm in training mode, the mean and the inverse standard deviation."""
    if not _adds_up_one_by_one(x):
        return torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, eps)
    parts = x.split(_samples_added(x))
    shares = [len(part) / len(x) for part in parts]
    moments = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts]
    means, variances = zip(*moments)
    mean = sum(share * m for share, m in zip(shares, means))
    variance = sum(s * (v + (m - mean).square()) for s, m, v in zip(shares, means, variances))
    y = torch.native_batch_norm(x, scale, shift, mean, variance, False, 0.0, eps)[0]
    return y, mean, (variance + eps).rsqrt()


def _projected(
    dx: Tensor,
    x: Tensor,
    scale: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    dscale: Tensor | None = None,
    dshift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tangent ẏ, and Σ x̂ ẋ and Σ ẋ of every channel."""
    along, total = _sums(dx, x, mean, inverse_std)
    count = x.numel() // x.shape[1]
    slope = inverse_std if scale is None else scale * inverse_std
    of_x = -slope * inverse_std * along / count
    if dscale is not None:
        of_x = of_x + dscale * inverse_std
    constant = -slope * total / count - mean * of_x
    if dshift is not None:
        constant = constant + dshift
    return _combined(constant, (dx, slope), (x, of_x)), along, total


def _gradients(
    gradient: Tensor, x: Tensor, scale: Tensor | None, mean: Tensor, inverse_std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of input, scale and shift; dual tensors for dual arguments.

    With g the output's gradient, a = mean g and b = mean(x̂ g), that of the input is
    γ r (g − a − x̂ b). Its tangent is affine in g, ġ, ẋ and x, as is the tangent of x̂.
    """
    x, dx = fwAD.unpack_dual(x)
    g, dg = fwAD.unpack_dual(gradient)
    scale, dscale = fwAD.unpack_dual(scale) if scale is not None else (None, None)
    of_x, along, total = _projected(g, x, scale, mean, inverse_std)
    if dx is None or dg is None:
        return of_x, along, total
    count = x.numel() // x.shape[1]
    a, b = total / count, along / count
    dg_along, dg_total = _sums(dg, x, mean, inverse_std)
    dx_along, dx_total = _sums(dx, x, mean, inverse_std)
    samples = _samples(x)
    parts = zip(dx.split(samples), g.split(samples), strict=True)
    over = [0, *range(2, x.dim())]
    dx_g = torch.stack([(d * part).sum(over, dtype=mean.dtype) for d, part in parts]).sum(0)
    r, r_tangent = inverse_std, -inverse_std.square() * dx_along / count
    slope = r if scale is None else scale * r
    of_g = r_tangent if scale is None else scale * r_tangent
    if dscale is not None:
        of_g = of_g + dscale * r
    b_tangent = (r * (dx_g - dx_total * a - dx_along * b) + dg_along) / count
    of_dx = -slope * b * r
    of_normalised = -of_g * b - slope * b_tangent - of_dx * dx_along / count
    constant = -of_g * a - slope * dg_total / count - of_dx * dx_total / count
    of_input = of_normalised * r
    tangent = _combined(
        constant - of_input * mean, (g, of_g), (dg, slope), (dx, of_dx), (x, of_input)
    )
    return (
        fwAD.make_dual(of_x, tangent),
        fwAD.make_dual(along, count * b_tangent),
        fwAD.make_dual(total, dg_total),
    )


def _sums(u: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor) -> tuple[Tensor, Tensor]:
    """Σ x̂ u and Σ u of every channel."""
    one, samples = torch.ones_like(mean), _samples_added(x)
    sums = [  # batch norm's backward calls them gradients of scale and shift
        torch.ops.aten.native_batch_norm_backward(
            *parts, one, None, None, mean, inverse_std, True, 0.0, [False, True, True]
        )[1:]
        for parts in zip(u.split(samples), x.split(samples), strict=True)
    ]
    along, total = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    return along, total


def _combined(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """The constant of every channel and the activations times coefficients of every channel."""
    x = terms[0][0]
    out = torch.empty_like(x, dtype=torch.result_type(x, constant))
    samples = _samples(x)
    for i, part in enumerate(out.split(samples)):
        rows = slice(i * samples, (i + 1) * samples)
        total = _by_channel(constant, x)
        for activation, factor in terms:
            total = torch.addcmul(total, activation[rows], _by_channel(factor, x), out=part)
    return out


def _adds_up_one_by_one(x: Tensor) -> bool:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.device.type == "cpu" and x.dtype == torch.float32 and channels_last


def _samples_added(x: Tensor) -> int:
    """How many samples torch may add up at once for every channel."""
    if not _adds_up_one_by_one(x):
        return len(x)
    return max(1, _ADDED * x.shape[1] // x[0].numel())


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _samples(x: Tensor) -> int:
    """How many samples of an activation stay in the cache; all, where none is to be cared for."""
    one = x.numel() // max(1, len(x))
    return max(1, _SLICE // max(1, one) if x.device.type == "cpu" else len(x))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, dx = fwAD.unpack_dual(input)
    w, dw = fwAD.unpack_dual(weight)
    if dx is None or dw is None:
        return F.linear(input, weight, bias)
    b, db = fwAD.unpack_dual(bias) if bias is not None else (None, None)
    y, dy = F.linear(x, w, b), F.linear(x, dw, db)
    if dx.dtype == w.dtype == dy.dtype:
        dy.view(-1, dy.shape[-1]).addmm_(dx.reshape(-1, dx.shape[-1]), w.t())
    else:  # under autocast, which knows no addition in place
        dy = dy + F.linear(dx, w)
    return fwAD.make_dual(y, dy)


def _conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any) -> Tensor:
    x, dx = fwAD.unpack_dual(input)
    w, dw = fwAD.unpack_dual(weight)
    if x.dim() != 4 or dx is None or dw is None:
        return F.conv2d(input, weight, bias, *args)
    b, db = fwAD.unpack_dual(bias) if bias is not None else (None, None)
    y = F.conv2d(x, w, b, *args)
    dy = F.conv2d(x, dw, db, *args)
    samples = _samples(dy)
    for total, part in zip(dy.split(samples), dx.split(samples), strict=True):
        total.add_(F.conv2d(part, w, None, *args))
    return fwAD.make_dual(y, dy)
