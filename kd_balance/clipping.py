"""Gradient clipping between backward() and step(), recognised and differentiated.

The loop clips with torch's own functions and tells nobody. What backward left in ``.grad`` is
remembered by a few numbers for each parameter; at the step they tell which clipping took place.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_balance.hooks import WeakHook

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass
class Clipping:
    """The derivative of clipping at the gradients of one step."""

    names: set[str]
    """The parameters whose gradients were clipped."""
    factor: float | None = None
    """What clip_grad_norm_ multiplied by."""
    total_norm: float = 0.0
    """L2 norm of all gradients that clip_grad_norm_ multiplied, afterwards; inf for a constant."""
    limit: float | None = None
    """What clip_grad_value_ clamped to."""

    @property
    def is_rescaling(self) -> bool:
        """Whether it is no clipping, but a constant factor such as that of a GradScaler."""
        return self.total_norm == math.inf

    def product(
        self, vectors: Mapping[str, Tensor], clipped: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The Jacobian of clipping, which is symmetric, times a vector.

        Args:
            vectors: by parameter name; those missing are zero.
            clipped: the gradients after clipping.
        """
        own = [name for name in vectors if name in self.names]
        product = dict(vectors)
        if self.limit is not None:
            for name in own:
                product[name] = vectors[name] * (clipped[name].abs() < self.limit)
        elif self.factor is not None and own:
            along = torch.stack([(vectors[n] * clipped[n]).sum() for n in own]).sum()
            along = along / self.total_norm**2
            for name in own:
                product[name] = self.factor * (vectors[name] - along * clipped[name])
        return product


class GradientWatch:
    """Remembers what backward left in the gradients, to recognise clipping at the step.

    Args:
        student: its parameters are watched, and
        optimizer: all that this one holds.
    """

    def __init__(self, student: nn.Module, optimizer: Optimizer) -> None:
        self.active = False
        self._student = student
        self._optimizer = optimizer
        self._params: list[Tensor] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._in_backward = False
        self._seen: dict[Tensor, tuple[int, int]] = {}
        self._statistics: Tensor | None = None
        # A write through .grad.data or by a GradScaler leaves no mark on the version, so values
        # are compared. On an accelerator that waits for the device: one clean step is enough.
        self._trusts_versions = False
        self._clipped_norm: float | None = None
        self._warned = False

    def follow(self) -> None:
        """Watches the parameters that there are and train now."""
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        params = [p for p in dict.fromkeys([*self._student.parameters(), *held]) if p.requires_grad]
        if list(map(id, params)) != list(map(id, self._params)):
            self.close()
            self._params = params
            hook = WeakHook(self._on_gradient)
            self._handles = [p.register_post_accumulate_grad_hook(hook) for p in params]

    def close(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()
        self._params = []

    def cleared(self) -> bool:
        """Whether the student's gradients were cleared since the last backward."""
        return all(
            p.grad is None or (self._seen.get(p) != _identity(p) and not p.grad.any())
            for p in self._student.parameters()
        )

    def clipping(self, names: Mapping[Tensor, str], loss_scale: float) -> Clipping | None:
        """What was done to the gradients since the last backward.

        Args:
            names: of the student's parameters.
            loss_scale: what a GradScaler multiplied the loss by, and the gradients no longer hold.

        Returns:
            None if nothing was.

        Raises:
            ValueError: something else than clipping.
        """
        params = [p for p in self._seen if p.grad is not None]
        if self._statistics is None or not params:
            return None
        unwritten = all(self._seen[p] == _identity(p) for p in params)
        if unwritten and self._trusts_versions:
            return None
        found = _statistics(params)
        if loss_scale == 1 and found.shape == self._statistics.shape:
            if found.equal(self._statistics):  # the same numbers, summed up the same way
                self._trusts_versions = params[0].device.type != "cpu"
                return None
        order = {p: i for i, p in enumerate(self._seen)}
        before = (self._statistics / loss_scale)[[order[p] for p in params]].tolist()
        after = found.tolist()
        tolerance = _TOLERANCE.get(params[0].dtype, 1e-2)

        def equal(a: float, b: float) -> bool:
            if not (math.isfinite(a) and math.isfinite(b)):
                return a == b or math.isnan(a) and math.isnan(b)
            return abs(a - b) <= tolerance * max(abs(a), abs(b))

        touched = [
            i
            for i, (old, new) in enumerate(zip(before, after, strict=True))
            if not (equal(old[0], new[0]) and equal(old[1], new[1]))
        ]
        if not touched:
            self._trusts_versions = params[0].device.type != "cpu"
            return None
        if unwritten:
            self._trusts_versions = False
        own = {names[params[i]] for i in touched if params[i] in names}
        ratios = [new / old for i in touched for old, new in zip(before[i], after[i]) if old > 0]
        if ratios and min(ratios) == max(ratios) and math.frexp(ratios[0])[0] == 0.5:
            # a power of two to the last digit: no clipping but a loss scale taken out again
            return Clipping(own, factor=ratios[0], total_norm=math.inf)
        if ratios and max(ratios) < 1 and equal(min(ratios), max(ratios)):
            total_norm = sum(after[i][0] ** 2 for i in touched) ** 0.5
            self._check_norm(total_norm)
            held = {p for group in self._optimizer.param_groups for p in group["params"]}
            if any(params[i] not in held for i in touched):
                raise ValueError(
                    "the gradients were clipped by a norm over more parameters of the student than "
                    "the optimizer holds, expected only these: clip them alone, or set "
                    "requires_grad to False for the rest."
                )
            return Clipping(own, factor=sum(ratios) / len(ratios), total_norm=total_norm)
        limit = max(after[i][1] for i in touched)
        if all(equal(after[i][1], limit) and before[i][1] > limit for i in touched):
            return Clipping(own, limit=limit * (1 - tolerance))
        raise ValueError(
            f"the gradients of {len(touched)} parameters were changed between backward() and "
            "step() by something else than torch's clip_grad_norm_ (L2) or clip_grad_value_, "
            "expected one of these or none: clip with them, or change the loss instead."
        )

    def _check_norm(self, total_norm: float) -> None:
        """Clipping leaves the same norm every time; another uniform factor hardly would."""
        usual, self._clipped_norm = self._clipped_norm, total_norm
        if usual is not None and abs(total_norm - usual) > 1e-2 * usual and not self._warned:
            self._warned = True
            warnings.warn(
                f"The gradients were scaled between backward() and step() to a norm of "
                f"{usual:.3g} once and of {total_norm:.3g} now. This counts as clip_grad_norm_ "
                "with the L2 norm over gradients of the student and of this optimizer; if it is "
                "anything else, or these share their norm with other modules, the hypergradients "
                "are wrong.",
                stacklevel=2,
            )

    def _on_gradient(self, param: Tensor) -> None:
        if self.active and not self._in_backward:
            self._in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        self._in_backward = False
        params = [p for p in self._params if p.grad is not None]
        self._seen = {p: _identity(p) for p in params}
        self._statistics = _statistics(params)


def _identity(param: Tensor) -> tuple[int, int]:
    assert param.grad is not None
    return param.grad.data_ptr(), param.grad._version


def _statistics(params: list[Tensor]) -> Tensor:
    """[len(params), 2], the L2 norm and the largest magnitude of every gradient."""
    gradients = [p.grad.detach() for p in params if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if gradients[0].device.type == "cpu":  # where the norm below is slow
        extremes = [e for g in gradients for e in (g if g.numel() else g.new_zeros(1)).aminmax()]
        largest = torch.stack(extremes).view(-1, 2).abs().amax(1)
    else:
        largest = torch.stack(torch._foreach_norm(gradients, float("inf")))
    return torch.stack((norms, largest), 1)
