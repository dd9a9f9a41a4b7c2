"""What the calls of the student and the criterion leave behind for a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from kd_balance.clipping import GradientWatch
from kd_balance.hooks import WeakHook
from kd_balance.loss import WeightedKDLoss
from kd_balance.replay import StudentCall, Structure, leaves_of
from kd_balance.replay.dropout import draw_as_usual, draw_plainly
from kd_balance.replay.memory_format import ReplayFormat


@dataclass
class CriterionCall:
    """One call of the criterion on logits of a recorded student call."""

    student_call: StudentCall
    logits_dtype: torch.dtype  # the loop may have cast what the student returned
    teacher_logits: Tensor
    targets: Tensor
    features: Tensor  # [N, F]
    weights: Tensor  # [N, 2]
    recorded_losses: Tensor  # [N, 2], detached
    result: Tensor  # what the criterion returned, detached
    upstream: Tensor | None = None
    """d(what backward was called on) / d(the criterion's result); None before backward."""

    def logits(self, params: Mapping[str, Tensor]) -> Tensor:
        """What the criterion would have been given under other parameters."""
        return self.student_call.replay(params).to(self.logits_dtype)

    def losses(self, criterion: WeightedKDLoss, logits: Tensor) -> Tensor:
        """Per-sample losses [N, 2] of this call, had it been given these logits."""
        return criterion.losses(logits, self.teacher_logits, self.targets)

    def check_replay(self, criterion: WeightedKDLoss, params: Mapping[str, Tensor]) -> None:
        """Repeats the call under the parameters that it was made with.

        Raises:
            ValueError: the losses are not those of the recorded call.
        """
        with torch.no_grad():
            losses = self.losses(criterion, self.logits(params))
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


@dataclass(eq=False)
class _Kept:
    """What an autograd graph keeps of a call, until a step empties it."""

    call: Any


class Recorder:
    """Watches the calls of student and criterion and keeps what a replay needs.

    A student call is kept by the graph of its output, a criterion call by that of its result, so
    what the loop drops is gone. From its backward pass until it is taken, or its gradient is
    cleared, a criterion call is held here.
    """

    def __init__(
        self,
        student: nn.Module,
        structure: Structure,
        criterion: WeightedKDLoss,
        gradients: GradientWatch,
    ) -> None:
        self._active = False
        self._gradients = gradients
        self._structure = structure
        self._criterion = criterion
        self._format = ReplayFormat(structure.student)
        self._entered: StudentCall | None = None
        self._kept: WeakSet[_Kept] = WeakSet()
        self._calls: list[CriterionCall] = []
        self._in_backward = False
        self._handles = [
            student.register_forward_pre_hook(WeakHook(self._before_student), with_kwargs=True),
            student.register_forward_hook(WeakHook(self._after_student), with_kwargs=True),
            criterion.register_forward_hook(WeakHook(self._after_criterion), with_kwargs=True),
        ]

    @property
    def active(self) -> bool:
        """Whether the coming step is watched."""
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        self._active = active
        if active:
            draw_plainly(self)
        else:
            draw_as_usual(self)

    def take(self) -> list[CriterionCall]:
        """The calls whose results went through backward since the last time, forgetting all."""
        for kept in self._kept:
            kept.call = None
        calls, self._calls = self._calls, []
        return calls

    def gradients_cleared(self) -> None:
        """Forgets the calls whose gradients are gone."""
        for call in self._calls:
            call.upstream = None
        self._calls = []

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
        self._criterion.follow(next(self._structure.student.parameters()).device)
        self._entered = None
        if self.active and torch.is_grad_enabled():
            self._entered = StudentCall.about_to_happen(
                self._structure, args, kwargs, self._format
            )

    def _after_student(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._entered is None:
            return
        call, self._entered = self._entered, None
        call.draws_random_numbers = not call.random_state.cpu.equal(torch.get_rng_state())
        for index, leaf in enumerate(leaves_of(output)):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                node: Any = leaf.grad_fn
                calls = node.metadata.setdefault(self, {})
                calls[leaf.output_nr] = self._keep(replace(call, leaf=index))

    def _after_criterion(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor
    ) -> None:
        if not (self.active and loss.requires_grad):
            return
        self._gradients.follow()
        kept = self._keep(self._criterion_call(loss.detach(), *args, **kwargs))

        def remember(gradient: Tensor) -> None:
            if (call := kept.call) is None:
                return  # a step has passed since the criterion was called
            self._on_backward()
            gradient = gradient.detach().clone()
            if call.upstream is None:
                call.upstream = gradient
                self._calls.append(call)
            else:
                call.upstream = call.upstream + gradient

        loss.register_hook(remember)

    def _keep(self, call: StudentCall | CriterionCall) -> _Kept:
        kept = _Kept(call)
        self._kept.add(kept)
        return kept

    def _criterion_call(
        self, result: Tensor, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor
    ) -> CriterionCall:
        features, losses = self._criterion.last_features, self._criterion.last_losses
        assert features is not None and losses is not None
        return CriterionCall(
            self._student_call_of(student_logits),
            student_logits.dtype,
            teacher_logits.detach(),
            targets,
            features,
            self._criterion.weights,
            losses,
            result,
        )

    def _student_call_of(self, logits: Tensor) -> StudentCall:
        """The call that returned these logits, cast to another dtype at most."""
        node: Any = logits.grad_fn
        output_nr = logits.output_nr
        while node is not None:
            kept = node.metadata.get(self, {}).get(output_nr)
            if kept is not None and kept.call is not None and kept.call.device == logits.device:
                return kept.call
            if node.name() != "ToCopyBackward0":
                break
            node, output_nr = node.next_functions[0]
        raise ValueError(
            f"student_logits of shape {tuple(logits.shape)} are no tensor that the student "
            "returned since the last step, expected the student's own output: give the criterion "
            "the very tensor the wrapped student returned, and move slices and reshapes into the "
            "student or into hard_loss and soft_loss, or shift the labels instead."
        )

    def _on_backward(self) -> None:
        """Drops calls of a step that was skipped, whose gradients were cleared unseen."""
        if self._in_backward:
            return
        self._in_backward = True
        torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        if self._calls and self._gradients.cleared():
            self.gradients_cleared()

    def _after_backward(self) -> None:
        self._in_backward = False
