"""A change that the loop makes to its gradients, by a function that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

GradientFunction = Callable[[list[Tensor]], Sequence[Tensor]]
"""All gradients of an optimizer's parameters -> what shall take their place."""


def transformed(function: GradientFunction, gradients: list[Tensor]) -> list[Tensor]:
    """What a function makes of gradients.

    Raises:
        ValueError: not one for each, of its shape.
    """
    result = list(function(list(gradients)))
    shapes, expected = [tuple(g.shape) for g in result], [tuple(g.shape) for g in gradients]
    if shapes != expected:
        raise ValueError(
            f"transform_gradients' function returned shapes {shapes}, expected {expected}: return "
            "one gradient for each that it is given."
        )
    return result


class GradientTransform:
    """The function's derivative at the gradients of one step, from the graph of its call.

    Args:
        function: is called once.
        params: hold the gradients.
        names: of the student's parameters; others' gradients count as constants.
    """

    def __init__(
        self,
        function: GradientFunction,
        params: Sequence[Tensor],
        names: Mapping[Tensor, str],
    ) -> None:
        self._names = [names.get(param) for param in params]
        with torch.inference_mode(False), torch.enable_grad():
            self._before = [
                param.grad.detach().clone().requires_grad_()
                for param in params if param.grad is not None
            ]
            self._after = transformed(function, [gradient * 1 for gradient in self._before])
        self.values = [gradient.detach() for gradient in self._after]
        """The gradients after it."""

    def pull(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The transposed Jacobian times vectors by name, of which those missing are zero."""
        pairs = [(g, vectors[n]) for n, g in zip(self._names, self._after)
                 if n is not None and n in vectors and g.requires_grad]
        if not pairs:
            return {}
        ends, cotangents = zip(*pairs)
        products = torch.autograd.grad(
            ends, self._before, cotangents,
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )
        return {n: p for n, p in zip(self._names, products, strict=True) if n is not None}

    def push(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The Jacobian times vectors by name, with their graphs."""
        starts = [torch.zeros_like(g, requires_grad=True) for g in self._after]
        moving = [(g, s) for g, s in zip(self._after, starts) if g.requires_grad]
        if not moving:
            return {}
        ends, cotangents = zip(*moving)
        pulled = torch.autograd.grad(
            ends, self._before, cotangents,
            create_graph=True, allow_unused=True, materialize_grads=True,
        )
        pairs = [(p, vectors[n]) for n, p in zip(self._names, pulled)
                 if n is not None and n in vectors and p.requires_grad]
        if not pairs:
            return {}
        products = torch.autograd.grad(
            [p for p, _ in pairs], starts, [v for _, v in pairs],
            create_graph=True, allow_unused=True, materialize_grads=True,
        )
        return {n: p for n, p in zip(self._names, products, strict=True) if n is not None}
