"""The labels of a meta batch, cut as the loop cuts those of its training batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kd_balance.logits.retraced import Retraced
from kd_balance.torch_private import viewed_by


class Unlike(ValueError):
    """A meta batch that cannot be treated as the loop treats its own; in a whole sentence."""


class Alignment:
    """Which label belongs to which sample of the logits, where there are more labels than samples.

    A causal language model's loop gives ``logits[:, :-1]`` and ``labels[:, 1:]``, and its batches
    hold all labels. How far labels and logits are apart is looked up once, on a training batch:
    its targets are held against the tensors that they may have been cut from.

    Args:
        ignore_index: targets that may differ from what they were cut from.
    """

    def __init__(self, ignore_index: int) -> None:
        self._ignore_index = ignore_index
        self.shift: int | None = None
        """How many positions targets are behind their logits; None while unknown."""

    def look(
        self,
        function: Retraced,
        shape: torch.Size,
        targets: Tensor,
        candidates: Iterable[Tensor],
    ) -> None:
        """Finds how far training targets are from the outputs' positions.

        Args:
            function: from the student's output to the logits.
            shape: of the student's output.
            targets: that the criterion was given.
            candidates: what the targets may have been cut from.
        """
        if self.shift is not None:
            return
        places = function.positions(shape).to(targets.device)
        grid = _grid(function, shape)
        cut = grid[-1] - len(places.unique()) * grid[-1] // max(1, grid.numel())
        kept = targets != self._ignore_index
        base = viewed_by(targets)
        for whole in (*([] if base is None else [base]), *candidates):
            if whole.shape != grid or whole.is_floating_point():
                continue
            whole = whole.flatten().to(targets.device)
            found = [
                shift
                for shift in {0, cut, -cut}
                if places.min() + shift >= 0
                and places.max() + shift < len(whole)
                and torch.equal(whole[places + shift][kept], targets[kept])
            ]
            if len(found) == 1:
                (self.shift,) = found
                return
        if cut == 0:
            self.shift = 0

    def of(self, targets: Tensor, function: Retraced, shape: torch.Size) -> Tensor:
        """The labels of the samples that the logits have.

        Args:
            targets: of a meta batch, as many as the output has positions.
            function: from the student's output to the logits.
            shape: of the student's output.

        Raises:
            Unlike: it is not known which ones.
        """
        if targets.shape != _grid(function, shape):
            raise Unlike(
                f"labels of shape {tuple(targets.shape)} for an output of shape {tuple(shape)}, "
                "expected one for each position: pass meta_forward=."
            )
        if self.shift is None:
            raise Unlike(
                "the loop cut the logits, and its targets are no part of the labels or inputs that "
                "the student was called with, expected to see how labels are cut: pass "
                "meta_forward=."
            )
        places = function.positions(shape).to(targets.device)
        return targets.flatten()[places + self.shift]


def places_behind(targets: Tensor, inputs: Iterable[Any], ignore_index: int) -> int | None:
    """How many places behind the inputs targets are that are made of them: 0, 1, −1.

    Args:
        targets: class indices, as many as one of the inputs has numbers.
        inputs: what the student was called with.
        ignore_index: targets that may be anything.

    Returns:
        None for targets that are made of something else.
    """
    if targets.is_floating_point():
        return None
    targets = targets.flatten()
    kept = targets != ignore_index
    for whole in inputs:
        if not isinstance(whole, Tensor) or whole.is_floating_point() or whole.dim() < 2:
            continue
        for places in (0, 1, -1) if whole.numel() == len(targets) else ():
            moved = whole.roll(-places, -1).flatten().to(targets)
            if kept.any() and torch.equal(moved[kept], targets[kept]):
                return places
    return None


def _grid(function: Retraced, shape: torch.Size) -> torch.Size:
    """The shape without classes."""
    (axis,) = function.class_axes
    return torch.Size(size for i, size in enumerate(shape) if i != axis)
