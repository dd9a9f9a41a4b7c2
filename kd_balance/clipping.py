"""Gradient clipping between backward() and step(), recognised and differentiated.

The loop clips with torch's own functions and tells nobody. The gradients that backward left and
those at the step tell which clipping took place: its result is computed and compared in full.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_EPSILON = 1e-6  # clip_grad_norm_ divides by the norm and this


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

    @property
    def is_to_norm(self) -> bool:
        """Whether only the gradients' direction was left, so that no derivative lies along it."""
        return self.factor is not None and not self.is_rescaling

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
            along = along / (self.total_norm**2 + self.total_norm * self.factor * _EPSILON)
            for name in own:
                product[name] = self.factor * (vectors[name] - along * clipped[name])
        return product


class ClippingHistory:
    """Recognises clipping, and compares that of one step with that of another."""

    def __init__(self) -> None:
        self._clipped_norm: float | None = None
        self._warned = False

    def clipping(
        self,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        names: Sequence[str | None],
        held: Sequence[bool],
    ) -> Clipping | None:
        """What turned the gradients `before` into those `after`; None if nothing did.

        Args:
            before, after: one gradient for each parameter.
            names: of the student's parameters, None for others.
            held: whether the optimizer holds the parameter.

        Raises:
            ValueError: something else than clipping.
        """
        tolerance = _TOLERANCE.get(after[0].dtype, 1e-2) if after else 0.0
        numbers = _numbers(before, after).tolist() if after else []
        touched = [
            i for i, (old, _, _, off) in enumerate(numbers)
            if math.isfinite(old) and not off <= tolerance * old
        ]
        if not touched:
            return None
        own = {name for i in touched if (name := names[i]) is not None}
        square = sum(numbers[i][0] ** 2 for i in touched)
        ratio = sum(numbers[i][2] for i in touched) / square if square > 0 else 0.0
        if ratio > 0:
            power = 2.0 ** round(math.log2(ratio))
            if power != 1 and all(torch.equal(after[i], before[i] * power) for i in touched):
                # to the last digit: no clipping but a loss scale taken out again
                return Clipping(own, factor=power, total_norm=math.inf)
        scaled = (self._is(after[i], before[i] * ratio, tolerance) for i in touched)
        if 0 < ratio < 1 and all(scaled):
            total_norm = sum(numbers[i][1] ** 2 for i in touched) ** 0.5
            self._check_norm(total_norm, tolerance)
            if not all(held[i] for i in touched if names[i] is not None):
                raise ValueError(
                    "the gradients were clipped by a norm over more parameters of the student than "
                    "the optimizer holds, expected only these: clip them alone, or set "
                    "requires_grad to False for the rest."
                )
            return Clipping(own, factor=ratio, total_norm=total_norm)
        limit = max(after[i].abs().max().item() for i in touched)
        cut = (self._is(after[i], before[i].clamp(-limit, limit), tolerance) for i in touched)
        if limit and all(cut):
            return Clipping(own, limit=limit * (1 - tolerance))
        raise ValueError(
            f"the gradients of {len(touched)} parameters were changed between backward() and "
            "step() by something else than torch's clip_grad_norm_ (L2) or clip_grad_value_, "
            "expected one of these or none: clip with them, or name the change by "
            "transform_gradients(function)."
        )

    @staticmethod
    def _is(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
        return bool((actual - expected).norm() <= tolerance * expected.norm())

    def _check_norm(self, total_norm: float, tolerance: float) -> None:
        """Clipping leaves the same norm every time; another uniform factor hardly would."""
        usual, self._clipped_norm = self._clipped_norm, total_norm
        # of a limit L and a norm n above it, clipping leaves L · n / (n + 1e-6)
        tolerance = min(1e-2, 10 * tolerance + 2 * _EPSILON / total_norm)
        if usual is not None and abs(total_norm - usual) > tolerance * usual and not self._warned:
            self._warned = True
            warnings.warn(
                f"The gradients were scaled between backward() and step() to a norm of "
                f"{usual:.6g} once and of {total_norm:.6g} now. This counts as clip_grad_norm_ "
                "with the L2 norm over gradients of the student and of this optimizer; if it is "
                "anything else, or these share their norm with other modules, the hypergradients "
                "are wrong.",
                stacklevel=2,
            )


def _numbers(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """[parameters, 4]: norms before and after, inner product, norm of the difference."""
    differences = torch._foreach_sub(list(after), list(before))
    products = torch._foreach_mul(list(after), list(before))
    return torch.stack(
        (
            torch.stack(torch._foreach_norm(list(before))),
            torch.stack(torch._foreach_norm(list(after))),
            torch.stack([product.sum() for product in products]),
            torch.stack(torch._foreach_norm(differences)),
        ),
        1,
    )
