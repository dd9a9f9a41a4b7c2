"""The coarsest number format that a student's outputs and their gradients go through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_balance.torch_private import TorchDispatchMode, tree_leaves


def coarsest_format(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> torch.dtype:
    """The coarsest format on the way back from the outputs to the leaves they are made of.

    A backward pass shows casts and autocast within forward, what a checkpoint computes again, and
    nothing that the outputs do not depend on, such as a loss of the student's own.
    """
    trained = [output for output in outputs if output.requires_grad]
    with _Formats() as formats:
        torch.autograd.grad(trained, leaves, list(map(torch.ones_like, trained)), allow_unused=True)
    return max(formats.seen, key=lambda dtype: torch.finfo(dtype).eps)


class _Formats(TorchDispatchMode):
    """Sees the formats of all numbers that operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.seen |= {x.dtype for x in tensors if x.is_floating_point()}
        return result
