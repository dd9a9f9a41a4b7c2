"""Three things that hold whenever the record of a student's steps is true.

1. A replay gives what was recorded: the same losses under the same weights.
2. A step moves the parameters as the optimizer's formula says, and the next one begins there.
3. The gradient stepped along is the recorded one. With λ the derivative of the meta loss by it,
   ⟨gradient, λ⟩ = Σ weights · dL_meta/dweights, where the criterion alone reached the gradient.

And a fourth of several processes: student and weight net are the same on all of them.

Each costs a few sums over numbers that are there anyway. On a CPU a failure raises at once. On an
accelerator it must not wait: the hypergradient becomes nan, which skips it, and the failure is
counted by its cause and raised where waiting is allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd_balance.terms import of_terms

REPLAY, WEIGHTS, FACTOR = "replay", "weights", "factor"
STEP, WINDOW, GRADIENT, RANKS = "step", "window", "gradient", "ranks"

_BROKEN = {
    REPLAY: (
        "the student's call was repeated and gave losses that differ by {error:.1g} (relative), "
        "expected the same ones: leave inputs, targets, parameters, the student's attributes and "
        "the criterion's settings alone between the forward pass and step(), and draw from no "
        "random generator of your own."
    ),
    WEIGHTS: (
        "the weight net gave weights that differ by {error:.1g} (relative) for the same features, "
        "expected the same ones: use no dropout in it, and let the meta_optimizer alone move it."
    ),
    FACTOR: (
        "the factor on the criterion's result is the mean or the sum of its own weights, or one "
        "over it, expected one that does not move with them: use MetaWeightNet(mean=…), which "
        "keeps their average."
    ),
    STEP: (
        "the optimizer's step left parameters that differ by {error:.1g} of its length from its "
        "own formula's, expected these: move or project them before the forward pass, and clip "
        "gradients before step() instead of in a hook of the optimizer."
    ),
    WINDOW: (
        "the parameters moved by {error:.1g} (relative) between two steps that one hypergradient "
        "passes through, expected each to begin where the last one ended: let nothing but "
        "step() move them, or set unroll=1."
    ),
    GRADIENT: (
        "the gradients differ from the criterion's own by {error:.1g} (relative) along the "
        "hypergradient's direction, expected the same: remove hooks that change gradients, "
        "torch.no_grad() around parameters within the student's forward, and changes of gradients "
        "or of parameters between the forward pass and step()."
    ),
    RANKS: (
        "this rank's student or weight net differs by {error:.1g} (relative) from the mean of all "
        "ranks', expected the same everywhere: load checkpoints on every rank, and let nothing but "
        "step() move them."
    ),
}
CAUSES = tuple(_BROKEN)
_TOLERANCE = {
    REPLAY: (1e-6, 1e-3, 5e-2),
    WEIGHTS: (1e-9, 1e-4, 1e-2),
    FACTOR: (0.5, 0.5, 0.5),
    STEP: (1e-6, 1e-3, 5e-2),
    WINDOW: (1e-12, 1e-6, 1e-2),
    GRADIENT: (1e-6, 1e-3, 5e-2),
    RANKS: (1e-9, 1e-9, 1e-9),
}  # in float64, float32 and less; ten times the second on accelerators, for TF32
_WIDE = {torch.float32, torch.float64}


class Broken(ValueError):
    """Something does not hold."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class Invariants:
    """Collects what should hold of a meta update, and settles it at once or where it may wait."""

    def __init__(self) -> None:
        self.precision = torch.float64
        """The coarsest number format that the student computes in."""
        self._products: Tensor | None = None
        self._found: list[tuple[str, Tensor, float]] = []
        self.failures: dict[str, Tensor] = {}
        """Counts by their cause, on the accelerator."""
        self._told: dict[str, float] = {}

    def replayed(self, actual: Sequence[Tensor], recorded: Sequence[Tensor]) -> None:
        """Compares the losses of a repeated call, and more, with what was recorded."""
        self._compare(REPLAY, actual, recorded, self.precision)

    def weighed(self, weights: Tensor, recorded: Tensor, kept: Tensor | None) -> None:
        """Compares the weights, where they count, with those that were recorded."""
        if kept is not None:
            weights = weights * of_terms(kept)
        if _surely_equal([weights], [recorded]):
            return
        self._compare(WEIGHTS, [weights], [recorded], weights.dtype)

    def factor(self, upstream: Tensor, weights: Tensor) -> None:
        """Looks for a division by the weights' own size, which the loss's graph does not show.

        The factor moves from call to call, and its product with that size stands still.
        """
        if upstream.numel() != 1:
            return
        means = torch.cat([weights.mean(0), weights.mean().view(1)])
        sizes = torch.cat([means, means * len(weights)])
        now = torch.cat([upstream.view(1), sizes * upstream, sizes / upstream])
        before, self._products = self._products, now
        if before is None:
            return
        off, eps = (now / before.to(now) - 1).abs(), torch.finfo(weights.dtype).eps
        same = (off[0] > 1e3 * eps) & (off[1:] < 32 * eps).any()
        self._note(FACTOR, same.to(weights.dtype), weights.dtype)

    def moved(
        self, predicted: Sequence[Tensor], real: Sequence[Tensor], length: Tensor
    ) -> None:
        """Compares what a step of some length made of the parameters with what its formula does."""
        if _surely_equal(real, predicted):
            return
        rounding = torch.finfo(real[0].dtype).eps * _norm(real)
        error = distance(real, predicted) / (length + 1e3 * rounding).clamp(min=1e-30)
        self._note(STEP, error, real[0].dtype)

    def began(self, before: Mapping[str, Tensor], ended: Mapping[str, Tensor]) -> None:
        """Compares the parameters that a step began with and those that the last one left."""
        names = [name for name in before if name in ended]
        pair = [before[n] for n in names], [ended[n] for n in names]
        if names and not _surely_equal(*pair):
            self._compare(WINDOW, *pair, pair[0][0].dtype)

    def along(
        self,
        gradients: Mapping[str, Tensor],
        direction: Mapping[str, Tensor],
        total: Tensor,
        size: Tensor,
    ) -> None:
        """Compares ⟨gradient, λ⟩ with the products weights · dL_meta/dweights of all samples.

        Args:
            gradients: of the parameters, by name.
            direction: λ, by name.
            total, size: the sum of the products, and of their absolute values.
        """
        names = [n for n in direction if n in gradients]
        own, λ = [gradients[n] for n in names], [direction[n] for n in names]
        if not names:
            return
        difference = (_inner(own, λ) - total).abs()
        limit = _tolerance(GRADIENT, size.device, self.precision)
        if size.device.type == "cpu" and difference <= limit * size:
            return
        # each rounding error is as large as that of the longer sum
        size = size + 0.1 * _norm(own) * _norm(λ)
        self._note(GRADIENT, difference / size.clamp(min=1e-30), self.precision)

    def equal(self, gradients: Mapping[str, Tensor], replayed: Mapping[str, Tensor]) -> None:
        """Compares the gradients themselves, where a replay has them all."""
        names = [name for name in gradients if name in replayed]
        if names:
            pair = [replayed[n] for n in names], [gradients[n] for n in names]
            self._compare(GRADIENT, *pair, self.precision)

    def shared(self, numbers: Tensor, mean: Tensor) -> None:
        """Compares numbers that tell student and weight net with their mean over the ranks."""
        self._compare(RANKS, [numbers], [mean], numbers.dtype)

    def forget(self) -> None:
        """Gives up what was collected."""
        self._found = []

    def settle(self) -> Tensor | None:
        """Ends a meta update.

        Returns:
            None on a CPU. On an accelerator whether all holds, a bool that nobody has waited for.

        Raises:
            ValueError: something does not hold, on a CPU.
        """
        found, self._found = self._found, []
        holds = None
        for cause, error, tolerance in found:  # nan fails nowhere: it is skipped and counted
            if error.device.type == "cpu":
                if (value := error.item()) > tolerance:
                    raise Broken(cause, _BROKEN[cause].format(error=value))
                continue
            fails = error > tolerance
            before = self.failures.get(cause)
            self.failures[cause] = fails.long() if before is None else before + fails.long()
            holds = ~fails if holds is None else holds & ~fails
        return holds

    def counts(self) -> dict[str, float]:
        """Failures by their cause; reading waits for the device."""
        return {cause: float(count) for cause, count in self.failures.items()}

    def check(self) -> None:
        """Raises what failed since the last time; waits for the device.

        Raises:
            ValueError: in one sentence for the first cause.
        """
        told, self._told = self._told, self.counts()
        for cause, count in self._told.items():
            if new := count - told.get(cause, 0):
                text = _BROKEN[cause].replace(" by {error:.1g} (relative)", "")
                text = text.replace(" by {error:.1g} of its length", "")
                raise Broken(cause, f"in {new:.0f} meta updates, which were skipped, {text}")

    def _compare(
        self, cause: str, actual: Sequence[Tensor], expected: Sequence[Tensor],
        precision: torch.dtype,
    ) -> None:
        error = distance(actual, expected) / (_norm(expected) + 1e-30)
        self._note(cause, error, precision)

    def _note(self, cause: str, error: Tensor, precision: torch.dtype) -> None:
        self._found.append((cause, error.detach(), _tolerance(cause, error.device, precision)))


def _tolerance(cause: str, device: torch.device, precision: torch.dtype) -> float:
    exact, single, coarse = _TOLERANCE[cause]
    if device.type != "cpu":
        single *= 10
    return {torch.float64: exact, torch.float32: single}.get(precision, coarse)


def _surely_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether they are known to be the same bit for bit; an accelerator would have to wait."""
    pairs = zip(one, other, strict=True)
    return all(a.device.type == "cpu" and torch.equal(a, b) for a, b in pairs)


def _inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The inner product: without a copy on a CPU, in few launches elsewhere."""
    formats = {t.dtype for t in (*one, *other)}
    if one[0].device.type == "cpu" and len(formats) == 1 and formats <= _WIDE:
        return torch.stack([a.flatten().dot(b.flatten()) for a, b in zip(one, other)]).sum()
    return torch.cat([p.flatten() for p in torch._foreach_mul(list(one), list(other))]).sum()


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1 and tensors[0].dtype in _WIDE:
        return tensors[0].detach().norm()
    norms = list(torch._foreach_norm([t.detach() for t in tensors]))
    formats = {norm.dtype for norm in norms}
    if len(formats) > 1 or not formats <= _WIDE:
        widest = functools.reduce(torch.promote_types, formats, torch.float32)
        norms = [norm.to(widest) for norm in norms]
    return torch.stack(norms).norm()


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return _norm(torch._foreach_sub([t.detach() for t in one], [t.detach() for t in other]))
