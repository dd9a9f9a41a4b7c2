"""Batch norm over the batches of all processes, by operators that have every derivative.

torch's SyncBatchNorm has no forward mode and no second derivative. In replays its statistics are
sums over the ranks, whose derivatives, of either mode, are such sums again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Summing(Protocol):
    """The processes that a student runs in."""

    size: int

    def sum(self, tensor: Tensor) -> Tensor: ...


@contextmanager
def plain_sync_batch_norm(ranks: Summing) -> Iterator[None]:
    """Within it, SyncBatchNorm is the same by plain operators, and leaves its buffers alone."""
    forward = nn.SyncBatchNorm.forward

    def plain(module: nn.SyncBatchNorm, input: Tensor) -> Tensor:
        if not module.training:
            return forward(module, input)
        group = module.process_group or torch.distributed.group.WORLD
        if (size := torch.distributed.get_world_size(group)) != ranks.size:
            raise ValueError(
                f"a SyncBatchNorm has a process group of {size} ranks and the student runs in "
                f"{ranks.size}, expected all of them: leave its process_group out."
            )
        return _normalised(input, module.weight, module.bias, module.eps, ranks)

    nn.SyncBatchNorm.forward = plain  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.SyncBatchNorm.forward = forward  # type: ignore[method-assign]


def _normalised(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Summing
) -> Tensor:
    x = input.float() if input.dtype in (torch.half, torch.bfloat16) else input
    over, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    count = x.new_full((1,), x.numel() // x.shape[1])  # a copy from the host would wait
    total, count = _Sum.apply(ranks, torch.cat([x.sum(over), count])).split([x.shape[1], 1])
    centred = x - (total / count).view(shape)
    variance = _Sum.apply(ranks, centred.square().sum(over)) / count
    y = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the ranks. Each rank's loss depends on it, so its derivative is a sum too."""

    @staticmethod
    def forward(ctx: Any, ranks: Summing, tensor: Tensor) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, _Sum.apply(ctx.ranks, gradient)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return _Sum.apply(ctx.ranks, tangent)
