"""What the backward passes of a step left in the gradients, and what was made of it until then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_balance.clipping import Clipping, ClippingHistory
from kd_balance.gradient_transform import GradientFunction, GradientTransform
from kd_balance.replay import Structure
from kd_balance.shards import own
from kd_balance.torch_private import writes_to


class Gradients:
    """Copies what each backward pass leaves, so that every change after it is known.

    Args:
        student: its parameters are looked at, and
        optimizer: all that this one holds.
    """

    def __init__(self, student: Structure, optimizer: Optimizer) -> None:
        self._student = student
        self._optimizer = optimizer
        self._left: dict[Tensor, Tensor] = {}
        self._expected = self._left  # what they hold now, if the loop has done nothing unseen
        self.transforms: list[GradientTransform] = []
        """What the loop named, in its order."""
        self._identities: dict[Tensor, tuple[int, int]] = {}
        self._before: dict[Tensor, Tensor] = {}
        self.carried = False
        """Whether a step began with gradients that an earlier one left."""
        self._changed = False
        # A write through .grad.data or by a GradScaler leaves no mark on the version, so values
        # are compared. On an accelerator that waits for the device: one clean step is enough.
        self._trusts_versions = False
        self._history = ClippingHistory()

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return self._optimizer.param_groups

    def forget(self) -> None:
        """Of a step that is over, or whose gradients were cleared."""
        self._left, self._before, self._changed, self.carried = {}, {}, False, False
        self._expected, self.transforms = self._left, []

    @property
    def untouched(self) -> bool:
        """Whether no backward pass has reached them in this step."""
        return not self._left

    def cleared(self) -> bool:
        """Whether they were cleared since the last backward pass."""
        held = [p for p in self._held() if p in self._expected]
        return bool(held) and all(
            p.grad is None or (not self._unwritten(p) and not _gradient(p).any()) for p in held
        )

    def begin(self) -> None:
        """A backward pass begins."""
        if self._left:
            self._changed |= bool(self.transforms) or not self._as_expected()
        else:
            there = [p for p in self._params() if p.grad is not None]
            self._before = dict(zip(there, copies([_gradient(p) for p in there])))
            self.carried = any(map(self._carries, there))

    def end(self) -> None:
        """A backward pass ends."""
        params = [p for p in self._params() if p.grad is not None]
        self._left = dict(zip(params, copies([_gradient(p) for p in params])))
        self._expected = self._left
        self._identities = {p: _identity(p) for p in params}

    def transform(self, function: GradientFunction, names: Mapping[Tensor, str]) -> None:
        """Lets a function change the gradients that the optimizer holds, and keeps its derivative.

        Args:
            function: of all of them.
            names: of the student's parameters.

        Raises:
            ValueError: something else has changed them before, or each process has a part of them.
        """
        if self._student.shards is not None:
            raise ValueError(
                "transform_gradients was called and the student's parameters are shards, expected "
                "whole ones, which the function may look at: train in DistributedDataParallel."
            )
        if not self._as_expected():
            raise ValueError(
                "the gradients were changed between backward() and transform_gradients(), expected "
                "clipping after it: do what comes before it within its function."
            )
        params = [p for p in self._held() if p.grad is not None]
        transform = GradientTransform(function, params, names)
        self._expected = dict(self._expected)
        for param, value in zip(params, transform.values, strict=True):
            _gradient(param).copy_(value)
            self._expected[param] = value
            self._identities[param] = _identity(param)
        self.transforms.append(transform)

    def accumulated(self, names: Mapping[Tensor, str], loss_scale: float) -> dict[str, Tensor]:
        """This process's part of the gradients that backward passes added, before any change.

        Args:
            names: of the student's parameters.
            loss_scale: what a GradScaler multiplied the loss by, and the gradients no longer hold.
        """
        added = {}
        for param, left in self._left.items():
            if param in names:
                before = self._before.get(param)
                part = left if before is None else left - before
                added[names[param]] = part if loss_scale == 1 else part / loss_scale
        return added

    def clipping(self, names: Mapping[Tensor, str], loss_scale: float) -> Clipping | None:
        """What was done to the gradients since backward and transforms; None if nothing was.

        Args:
            names, loss_scale: as for :meth:`accumulated`.

        Raises:
            ValueError: something else than clipping, or between two backward passes.
        """
        if self._changed:
            raise ValueError(
                "the gradients were changed between two backward passes of one step, expected them "
                "to add up: clip or scale them once, after the last backward pass."
            )
        left = self._expected
        params = [p for p in left if p.grad is not None]
        unwritten = all(self._unwritten(p) for p in params) and len(params) == len(left)
        on_cpu = all(p.device.type == "cpu" for p in params)
        untouched = unwritten and loss_scale == 1 and (
            self._trusts_versions
            or not params
            or (on_cpu and all(self._as_left(p) for p in params))
        )
        shards = self._student.shards
        if untouched if shards is None else shards.everywhere(untouched):
            return None
        before = [left[p] if loss_scale == 1 else left[p] / loss_scale for p in params]
        after = [_gradient(p) for p in params]
        if shards is not None:
            before, after = (shards.gather(parts, params) for parts in (before, after))
        held = set(self._held())
        clipping = self._history.clipping(
            before, after, [names.get(p) for p in params], [p in held for p in params]
        )
        self._trusts_versions = clipping is None and not on_cpu
        return clipping

    def _held(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _params(self) -> list[Tensor]:
        return list(dict.fromkeys([*self._student.parameters, *self._held()]))

    def _unwritten(self, param: Tensor) -> bool:
        return param.grad is not None and self._identities.get(param) == _identity(param)

    def _carries(self, param: Tensor) -> bool:
        """Whether a gradient holds something; on an accelerator, whether nobody wrote to it."""
        gradient = _gradient(param)
        return bool(gradient.any()) if gradient.device.type == "cpu" else self._unwritten(param)

    def _as_left(self, param: Tensor) -> bool:
        if self._unwritten(param) and (self._trusts_versions or param.device.type != "cpu"):
            return True
        if param.grad is None:
            return False
        return _alike(_gradient(param), self._expected[param])

    def _as_expected(self) -> bool:
        return all(map(self._as_left, self._expected))


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool(torch.isclose(one, other, 0, 0, equal_nan=True).all())


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return own(param.grad)


def _identity(param: Tensor) -> tuple[int, int]:
    assert param.grad is not None
    return own(param.grad).data_ptr(), writes_to(param.grad)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In one call: there are many, and on an accelerator each would be a launch."""
    return list(torch._foreach_mul(list(tensors), 1)) if tensors else []
