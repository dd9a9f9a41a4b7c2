"""Functions of every row of large logits, computed a few rows at a time.

What a loss or a feature makes on its way, such as log probabilities, is as large as the logits, and
backward needs it again. Here it lives as long as its rows are looked at: backward, and the
derivative of backward, compute it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_balance.torch_private import tree_flatten, tree_unflatten

CPU_CHUNK = 2**18  # numbers, which stay in a cache
CHUNK = 2**23  # elsewhere, where every chunk costs its launches

Rows = Callable[..., Tensor]
"""Of [n, C] and others of n rows -> [n, …], each row from its own rows alone."""


def is_large(logits: Tensor) -> bool:
    """Whether logits are more than what is looked at together."""
    return logits.numel() > CPU_CHUNK and logits.numel() > _size(logits)


def by_chunks(function: Rows, logits: Tensor, *others: Any) -> Tensor:
    """``function(logits, *others)``, in chunks where the logits are large.

    Args:
        function: of rows, differentiable twice by the logits, which no graph is made to for the
            others.
        logits: [N, C].
        others: N rows each, or named tuples of such.
    """
    if not is_large(logits):
        return function(logits, *others)
    tensors, spec = tree_flatten(others)

    def of_rows(rows: Tensor, *parts: Tensor) -> Tensor:
        return function(rows, *tree_unflatten(parts, spec))

    if torch.is_grad_enabled() and logits.requires_grad:
        return _Value.apply(of_rows, logits, *tensors)
    return torch.cat([of_rows(*rows) for rows in _chunks(logits, *tensors)])


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    count = max(1, _size(logits) // logits.shape[1])
    return zip(*(tensor.split(count) for tensor in (logits, *others)), strict=True)


def _size(logits: Tensor) -> int:
    return CPU_CHUNK if logits.device.type == "cpu" else CHUNK


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Rows, logits: Tensor, *others: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(logits, *others)
        return torch.cat([function(*rows) for rows in _chunks(logits, *others)])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        logits, *others = ctx.saved_tensors
        pulled = _Pulled.apply(ctx.function, u, logits, *others)
        return None, pulled, *(None for _ in others)


class _Pulled(torch.autograd.Function):
    """The gradient by the logits, Jᵀ u, as a function of u and of the logits."""

    @staticmethod
    def forward(ctx: Any, function: Rows, u: Tensor, logits: Tensor, *others: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(u, logits, *others)
        result = torch.empty_like(logits)
        for into, along, rows, *more in _chunks(result, u, logits, *others):
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                value = function(leaf, *more)
            into.copy_(torch.autograd.grad(value, leaf, along)[0])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        u, logits, *others = ctx.saved_tensors
        by_u, by_logits = torch.empty_like(u), torch.empty_like(logits)
        for into_logits, into_u, cotangent, along, rows, *more in _chunks(
            by_logits, by_u, v, u, logits, *others
        ):
            with torch.enable_grad():
                along, leaf = along.detach().requires_grad_(), rows.detach().requires_grad_()
                value = ctx.function(leaf, *more)
                (pulled,) = torch.autograd.grad(value, leaf, along, create_graph=True)
            first, second = torch.autograd.grad(
                pulled, (along, leaf), cotangent, allow_unused=True, materialize_grads=True
            )
            into_u.copy_(first)
            into_logits.copy_(second)
        return None, by_u, by_logits, *(None for _ in others)
