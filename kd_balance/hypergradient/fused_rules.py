"""Forward-mode rules that pass over the activations less often than torch's own.

Batch norm in training mode: with x̂ = (x − μ) r, r the inverse standard deviation, and dots for
tangents,

    ẏ = γ r (ẋ − mean ẋ) + x̂ (γ̇ − γ mean(x̂ ẋ)) + β̇,

which is affine in ẋ and x with coefficients for each channel: two reductions and two passes.

Linear layers, ẏ = x ẇᵀ + ḃ + ẋ wᵀ: the last product is added in place.

Convolution on a CPU: of ẏ = conv(x, ẇ) + conv(ẋ, w) the second term is added in slices of the
batch that stay in the cache, and no second activation is held.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


_SLICE = 2**21  # elements of an activation


class FusedRules(TorchFunctionMode):
    """Within it, batch norms, linear layers and 2d convolutions of dual tensors take these rules.

    They have no second derivative and leave running statistics alone: they are for replays whose
    gradients nobody asks for.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm:
            return _batch_norm(*args, **kwargs)
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
    x, dx = fwAD.unpack_dual(input)
    if not training or dx is None:
        return F.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    scale, dscale = fwAD.unpack_dual(weight) if weight is not None else (None, None)
    shift, dshift = fwAD.unpack_dual(bias) if bias is not None else (None, None)
    y, mean, inverse_std = torch.native_batch_norm(
        x, scale, shift, None, None, True, momentum, eps
    )
    # both reductions in one kernel: batch norm's backward calls them gradients of scale and shift
    _, along, total = torch.ops.aten.native_batch_norm_backward(
        dx, x, torch.ones_like(mean), None, None, mean, inverse_std, True, eps, [False, True, True]
    )
    count = x.numel() // x.shape[1]
    slope = inverse_std if scale is None else scale * inverse_std
    of_x = -slope * inverse_std * along / count
    if dscale is not None:
        of_x = of_x + dscale * inverse_std
    constant = -slope * total / count - mean * of_x
    if dshift is not None:
        constant = constant + dshift
    by_channel = (1, -1, *[1] * (x.dim() - 2))
    dy = torch.addcmul(constant.view(by_channel), dx, slope.view(by_channel))
    dy.addcmul_(x, of_x.view(by_channel))
    return fwAD.make_dual(y, dy.to(y.dtype))


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
    samples = max(1, _SLICE // max(1, dy[0].numel()))
    for total, part in zip(dy.split(samples), dx.split(samples), strict=True):
        total.add_(F.conv2d(part, w, None, *args))
    return fwAD.make_dual(y, dy)
