"""What the calls of the student and the criterion leave behind for a step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from kd_balance.clipping import GradientWatch
from kd_balance.hooks import WeakHook
from kd_balance.loss import WeightedKDLoss
from kd_balance.replay import StudentCall, leaves_of, replayable
from kd_balance.replay.memory_format import ReplayFormat


@dataclass
class CriterionCall:
    """One call of the criterion on logits of a recorded student call."""

    student_call: StudentCall
    teacher_logits: Tensor
    targets: Tensor
    features: Tensor  # [N, F]
    weights: Tensor  # [N, 2]
    recorded_losses: Tensor  # [N, 2], detached
    result: Tensor  # what the criterion returned, detached
    upstream: Tensor | None = None
    """d(what backward was called on) / d(the criterion's result); None before backward."""

    def losses(self, criterion: WeightedKDLoss, params: Mapping[str, Tensor]) -> Tensor:
        """Per-sample losses [N, 2] of this call, replayed under other parameters."""
        logits = self.student_call.replay(params)
        return criterion.losses(logits, self.teacher_logits, self.targets)

    def check_replay(self, criterion: WeightedKDLoss, params: Mapping[str, Tensor]) -> None:
        """Repeats the call under the parameters that it was made with.

        Raises:
            ValueError: the losses are not those of the recorded call.
        """
        with torch.no_grad():
            losses = self.losses(criterion, params)
        recorded = self.recorded_losses
        error = ((losses - recorded).norm() / recorded.norm()).item()
        single = 1e-3 if losses.device.type == "cpu" else 1e-2  # for TF32
        tolerance = {torch.float64: 1e-6, torch.float32: single}
        if not error <= tolerance.get(self.student_call.precision, 5e-2):
            raise ValueError(
                f"the student's call was repeated and gave losses that differ by {error:.1g} "
                "(relative), expected the same ones: leave inputs, targets and parameters alone "
                "between the forward pass and step(), draw from no random generator of your own, "
                "and set torch._inductor.config.fallback_random = True before compiling dropout."
            )


class Recorder:
    """Watches the calls of student and criterion and keeps what a replay needs.

    A student call is kept only while its output lives, a criterion call until it is taken or the
    gradient that it contributed is cleared.
    """

    def __init__(
        self, student: nn.Module, criterion: WeightedKDLoss, gradients: GradientWatch
    ) -> None:
        self.active = False
        self._gradients = gradients
        self._student = replayable(student)
        self._criterion = criterion
        self._format = ReplayFormat(self._student)
        self._entered: StudentCall | None = None
        self._outputs: list[tuple[list[TensorWeakRef | None], StudentCall]] = []
        self._calls: list[CriterionCall] = []
        self._in_backward = False
        self._handles = [
            student.register_forward_pre_hook(WeakHook(self._before_student), with_kwargs=True),
            student.register_forward_hook(WeakHook(self._after_student), with_kwargs=True),
            criterion.register_forward_hook(WeakHook(self._after_criterion), with_kwargs=True),
        ]

    def take(self) -> list[CriterionCall]:
        """The calls whose results went through backward since the last time, forgetting all."""
        calls, self._calls, self._outputs = self._calls, [], []
        return [call for call in calls if call.upstream is not None]

    def gradients_cleared(self) -> None:
        """Forgets the calls whose gradients are gone."""
        self._calls = [call for call in self._calls if call.upstream is None]

    def close(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()

    def _before_student(
        self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if getattr(student, "_is_replica", False):
            raise ValueError(
                "the student is a replica that nn.DataParallel made for one of several devices, "
                "expected the student itself: train on one device, with device_ids of length 1."
            )
        self._criterion.follow(next(self._student.parameters()).device)
        self._entered = None
        if self.active and torch.is_grad_enabled():
            self._entered = StudentCall.about_to_happen(
                self._student, args, kwargs, self._format
            )

    def _after_student(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._entered is None:
            return
        call, self._entered = self._entered, None
        call.draws_random_numbers = not call.random_state.cpu.equal(torch.get_rng_state())
        leaves = [
            TensorWeakRef(leaf) if isinstance(leaf, Tensor) else None
            for leaf in leaves_of(output)
        ]
        living = [o for o in self._outputs if any(ref and ref() is not None for ref in o[0])]
        self._outputs = [*living, (leaves, call)]

    def _after_criterion(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor
    ) -> None:
        if not (self.active and loss.requires_grad):
            return
        self._gradients.follow()
        call = self._criterion_call(loss.detach(), *args, **kwargs)
        self._calls.append(call)
        held = weakref.ref(call)

        def remember(gradient: Tensor) -> None:
            if (call := held()) is not None:
                self._on_backward()
                gradient = gradient.detach().clone()
                call.upstream = gradient if call.upstream is None else call.upstream + gradient

        loss.register_hook(remember)

    def _criterion_call(
        self, result: Tensor, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor
    ) -> CriterionCall:
        features, losses = self._criterion.last_features, self._criterion.last_losses
        assert features is not None and losses is not None
        return CriterionCall(
            self._student_call_of(student_logits),
            teacher_logits.detach(),
            targets,
            features,
            self._criterion.weights,
            losses,
            result,
        )

    def _student_call_of(self, logits: Tensor) -> StudentCall:
        for leaves, call in reversed(self._outputs):
            for index, ref in enumerate(leaves):
                if ref is not None and ref() is logits:
                    return replace(call, leaf=index)
        raise ValueError(
            f"student_logits of shape {tuple(logits.shape)} are no tensor that the student "
            "returned since the last step, expected the student's own output: give the criterion "
            "the very tensor the wrapped student returned, and move casts, slices and reshapes "
            "into the student or into hard_loss and soft_loss."
        )

    def _on_backward(self) -> None:
        """Drops calls of a step that was skipped, whose gradients were cleared unseen."""
        if self._in_backward:
            return
        self._in_backward = True
        torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        if any(call.upstream is not None for call in self._calls) and self._gradients.cleared():
            self.gradients_cleared()

    def _after_backward(self) -> None:
        self._in_backward = False
