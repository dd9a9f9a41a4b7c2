"""What the coming step of the student is made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_balance.bilevel.settings import Settings
from kd_balance.bilevel.window import Window
from kd_balance.clipping import Clipping
from kd_balance.distributed import Ranks
from kd_balance.gradients import Gradients
from kd_balance.inner_step import InnerStep, Update
from kd_balance.invariants import Invariants
from kd_balance.loop_warnings import LoopWarnings
from kd_balance.record import CriterionCall, Recording
from kd_balance.replay import Structure
from kd_balance.torch_private import has_gradient_hooks


class ComingStep:
    """Makes an :class:`InnerStep` of what was recorded, before the optimizer takes it.

    Args:
        optimizer: that will take it.
        structure: of the student.
        gradients: what the loop did to them since its backward passes.
        window: that the step is one of.
        grad_scaler: the loop's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        structure: Structure,
        gradients: Gradients,
        window: Window,
        invariants: Invariants,
        settings: Settings,
        grad_scaler: torch.amp.GradScaler | None,
        ranks: Ranks,
        warnings: LoopWarnings,
    ) -> None:
        self.grad_scaler = grad_scaler
        self._optimizer = optimizer
        self._structure = structure
        self._gradients = gradients
        self._window = window
        self._invariants = invariants
        self._settings = settings
        self._ranks = ranks
        self._warnings = warnings

    def of(self, recording: Recording, looks_at_factor: bool) -> InnerStep:
        """The step.

        Args:
            recording: of the calls behind its gradients.
            looks_at_factor: whether the weights' own size may be divided by.

        Raises:
            ValueError: it cannot be differentiated, or is not finite.
        """
        self._check(recording.calls)
        scale = self._undo_loss_scale(recording.calls)
        settings, names = self._settings, self._structure.parameters
        update = Update.of(
            self._optimizer,
            names,
            clipping=self._clipping(scale),
            transforms=self._gradients.transforms,
            plain_sgd=settings.step_derivative == "sgd"
            or (settings.method == "paper" and self._window.ends_next),
            finite_difference=settings.step_derivative == "finite_difference",
            ranks=self._ranks,
            shards=self._structure.shards,
        )
        accumulated = self._gradients.accumulated(names, scale)
        self._invariants.began(update.params, self._window.ended)
        if looks_at_factor:
            for call in recording.calls:
                assert call.upstream is not None
                self._invariants.factor(call.upstream, call.weights)
        self._warn_of_constants(recording)
        ids = {name: id(param) for param, name in names.items()}
        return InnerStep(recording.calls, update, accumulated or update.grads, recording.alone, ids)

    def _check(self, calls: list[CriterionCall]) -> None:
        if not calls:
            raise ValueError(
                "step() was called and no result of the criterion went through backward() since "
                "the last step, expected one: compute the loss with the criterion that this "
                "optimizer was given, on the output of the student that it was given, and step "
                "the wrapped optimizer itself in a warm-up without the criterion."
            )
        if self.grad_scaler is None:
            for call in calls:
                # on an accelerator the check would wait for the device: see metrics
                if call.result.device.type == "cpu":
                    _check_finite(call)

    def _undo_loss_scale(self, calls: list[CriterionCall]) -> float:
        """Takes the scaler's factor out of the recorded calls, and returns it."""
        if self.grad_scaler is None or not self.grad_scaler.is_enabled():
            return 1.0
        scale = self.grad_scaler.get_scale()
        for call in calls:
            assert call.upstream is not None
            call.upstream = call.upstream / scale
        return scale

    def _clipping(self, loss_scale: float) -> Clipping | None:
        clipping = self._gradients.clipping(self._structure.parameters, loss_scale)
        method = self._settings.method
        if clipping is not None and method != "online":
            if clipping.is_rescaling:
                raise ValueError(
                    f"the gradients were multiplied by {clipping.factor} between backward() and "
                    f"step() and method is {method!r}, expected to know of it: pass the loop's "
                    "GradScaler as grad_scaler=."
                )
            raise ValueError(
                f"the gradients were clipped and method is {method!r}, expected 'online': the "
                "gradients recomputed under the new weights could not be clipped the same way."
            )
        return clipping

    def _warn_of_constants(self, recording: Recording) -> None:
        """Tells what depends on the weights, and the hypergradient takes for constant."""
        if recording.factor_learns:
            self._warnings.once(
                "The criterion's result is multiplied by something made of the student's "
                "parameters: that factor counts as a constant, so hypergradients miss what the "
                "weights change through it."
            )
        if self._gradients.carried and self._window.steps:
            self._warnings.once(
                "Gradients of an earlier step were not cleared: they count as constants, so "
                "hypergradients through several steps miss what the weights change through them; "
                "call zero_grad() in every step, or set unroll=1."
            )
        hooked = [n for p, n in self._structure.parameters.items() if has_gradient_hooks(p)]
        if hooked and not recording.alone:
            self._warnings.once(
                f"{hooked[0]} has a gradient hook and another loss reached the gradients too: the "
                "hook counts as one that changes nothing, so hypergradients are wrong if it does."
            )


def _check_finite(call: CriterionCall) -> None:
    assert call.upstream is not None
    if not call.result.isfinite().all():
        of_net = call.recorded_losses.isfinite().all() and not call.weights.isfinite().all()
        where = (
            "the weight net's parameters"
            if of_net
            else "the inputs, and in the student's or teacher's logits, such as a class that is "
            "−inf in the student's alone"
        )
        raise ValueError(
            f"the criterion returned {_first_not_finite(call.result)}, expected a finite loss: "
            f"look for nan or inf in {where}."
        )
    if not call.upstream.isfinite().all():
        raise ValueError(
            f"the criterion's result was multiplied by {_first_not_finite(call.upstream)} before "
            "the backward pass, expected a finite number: look at the factors of the loss."
        )


def _first_not_finite(tensor: Tensor) -> float:
    return tensor[~tensor.isfinite()].flatten()[0].item()
