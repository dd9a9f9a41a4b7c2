"""The logits as a function of the student's outputs, by what autograd knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge


class Recorded:
    """z = f(y₁, y₂, …) at the outputs of the training batch: its value and its derivatives.

    With J the Jacobian of f, the products J v, Jᵀ u and H(u) v = d(Jᵀ u)/dy · v are linear in u and
    in v. A linear function's derivative does not depend on the point, so one graph of each, made
    at zeros while the loop's own graph still stands, gives the products with any u and v later on.
    Nothing is assumed of f but that autograd can differentiate it: three times if it is curved and
    hypergradients pass through several steps, else twice.

    Args:
        logits: z, with the loop's graph, which may be freed afterwards.
        edges: where the outputs stand in this graph.

    Raises:
        RuntimeError: autograd cannot differentiate an operation twice.
    """

    def __init__(self, logits: Tensor, edges: Sequence[GradientEdge]) -> None:
        self._value = logits.detach()
        with torch.enable_grad():
            self._u = torch.zeros_like(logits, requires_grad=True)
            self._pulled = torch.autograd.grad(logits, edges, self._u, create_graph=True)
            self._c = [torch.zeros_like(p, requires_grad=True) for p in self._pulled]
            (self._pushed,) = torch.autograd.grad(
                self._pulled, self._u, self._c, create_graph=True
            )
            self._v = [torch.zeros_like(p, requires_grad=True) for p in self._pulled]
            self._bent = self._lay_down_curvature(edges)

    def _lay_down_curvature(self, edges: Sequence[GradientEdge]) -> Tensor | None:
        """Σ c · H(u) v by u, linear in c and in v; None where H is zero."""
        bent = torch.autograd.grad(
            self._pulled, edges, self._v, create_graph=True, allow_unused=True
        )
        pairs = [(b, c) for b, c in zip(bent, self._c) if b is not None and b.requires_grad]
        if not pairs:
            return None
        outputs, cotangents = zip(*pairs)
        (by_u,) = torch.autograd.grad(
            outputs, self._u, cotangents, create_graph=True, allow_unused=True
        )
        return by_u if by_u is not None and by_u.requires_grad else None

    def __call__(self, *outputs: Tensor) -> Tensor:
        """The logits, differentiable twice by the outputs, which must be the recorded ones."""
        return _Value.apply(self, *outputs)

    def push(self, v: Sequence[Tensor]) -> Tensor:
        """J v."""
        (product,) = torch.autograd.grad(self._pulled, self._u, v, retain_graph=True)
        return product

    def pull(self, u: Tensor) -> tuple[Tensor, ...]:
        """Jᵀ u."""
        return torch.autograd.grad(self._pushed, self._c, u, retain_graph=True)

    def bend(self, u: Tensor, v: Sequence[Tensor]) -> list[Tensor]:
        """H(u) v."""
        zeros = [torch.zeros_like(w) for w in self._v]
        if self._bent is None:
            return zeros
        by_c = torch.autograd.grad(self._bent, self._c, u, create_graph=True, allow_unused=True)
        pairs = [(b, w) for b, w in zip(by_c, v) if b is not None and b.requires_grad]
        if not pairs:
            return zeros
        outputs, cotangents = zip(*pairs)
        return list(
            torch.autograd.grad(
                outputs, self._v, cotangents,
                retain_graph=True, allow_unused=True, materialize_grads=True,
            )
        )


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: Recorded, *outputs: Tensor) -> Tensor:
        ctx.recorded, ctx.outputs = recorded, outputs
        return recorded._value.clone()

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        return None, *_Pulled.apply(ctx.recorded, u, *ctx.outputs)


class _Pulled(torch.autograd.Function):
    """Jᵀ u, as a function of u and of the outputs that J is taken at."""

    @staticmethod
    def forward(ctx: Any, recorded: Recorded, u: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.recorded = recorded
        ctx.save_for_backward(u)
        return recorded.pull(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *v: Tensor) -> tuple[Any, ...]:
        (u,) = ctx.saved_tensors
        by_u = ctx.recorded.push(v) if ctx.needs_input_grad[1] else None
        bends = any(ctx.needs_input_grad[2:])
        by_outputs = ctx.recorded.bend(u, v) if bends else [None] * len(v)
        return None, by_u, *by_outputs
