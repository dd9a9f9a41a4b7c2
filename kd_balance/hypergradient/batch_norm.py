"""A fused forward-mode rule for batch norm in training mode.

torch's own rule falls apart into many passes over the activations. With x̂ = (x − μ) r, r the
inverse standard deviation, and dots for tangents,

    ẏ = γ r (ẋ − mean ẋ) + x̂ (γ̇ − γ mean(x̂ ẋ)) + β̇,

which is affine in ẋ and x − μ with coefficients for each channel: two reductions and two passes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FusedBatchNorm(TorchFunctionMode):
    """Within it, F.batch_norm takes this module's rule where it holds dual tensors.

    The rule has no second derivative and leaves running statistics alone: it is for replays whose
    gradients nobody asks for.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm:
            return _batch_norm(*args, **kwargs)
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
    by_channel = (1, -1, *[1] * (x.dim() - 2))
    samples = [0, *range(2, x.dim())]
    centered = x - mean.view(by_channel)
    slope = inverse_std if scale is None else scale * inverse_std
    along = (centered * dx).mean(samples) * inverse_std  # mean(x̂ ẋ)
    of_centered = -slope * inverse_std * along
    if dscale is not None:
        of_centered = of_centered + dscale * inverse_std
    constant = -slope * dx.mean(samples)
    if dshift is not None:
        constant = constant + dshift
    dy = torch.addcmul(constant.view(by_channel), dx, slope.view(by_channel))
    dy.addcmul_(centered, of_centered.view(by_channel))
    return fwAD.make_dual(y, dy.to(y.dtype))
