"""What one call of the student, and one of the criterion, leave behind for a replay."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from kd_balance.hooks import WeakHook
from kd_balance.loss import WeightedKDLoss


@dataclass(frozen=True)
class Autocast:
    """The autocast state of a device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device_type: str) -> Autocast:
        return cls(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
        )

    def restored(self) -> torch.autocast:
        return torch.autocast(
            self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False
        )


@dataclass
class RandomState:
    """The states of the random number generators that a student on `device` draws from."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @classmethod
    def current(cls, device: torch.device) -> RandomState:
        accelerator = None if device.type == "cpu" else _device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), accelerator)

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            _device_module(self.device).set_rng_state(self.accelerator, self.device)


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device.type)


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Leaves the random number generators as they were."""
    before = RandomState.current(device)
    try:
        yield
    finally:
        before.set()


@dataclass
class StudentCall:
    """One forward call of the student, held so that it can be repeated with other parameters."""

    student: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: RandomState
    autocast: Autocast
    buffers: dict[str, Tensor]
    training: list[bool]
    leaf: int = 0  # which leaf of the output's pytree are the logits

    @classmethod
    def about_to_happen(
        cls, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StudentCall:
        device = next(student.parameters()).device
        return cls(
            student,
            args,
            kwargs,
            RandomState.current(device),
            Autocast.current(device.type),
            {name: buffer.clone() for name, buffer in student.named_buffers()},
            [module.training for module in student.modules()],
        )

    @property
    def device(self) -> torch.device:
        return self.random_state.device

    def replay(self, params: Mapping[str, Tensor]) -> Tensor:
        """The logits of this very call, dropout masks included, under other parameters.

        Args:
            params: parameters by name; those missing are the student's own.
        """
        with preserved_random_state(self.device):
            self.random_state.set()
            return self.call(params, self.args, self.kwargs)

    def call(
        self, params: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The logits for other arguments, the student called as it was in this call."""
        output = self.through(self.student, "", params, args, kwargs)
        return tree_leaves(output)[self.leaf]

    def through(
        self,
        module: nn.Module,
        prefix: str,
        params: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Calls `module`, which holds the student under `prefix`; the student stays untouched."""
        state = {**self.buffers, **params}
        state = {prefix + n: t if n in params else t.clone() for n, t in state.items()}
        with ExitStack() as stack:
            stack.enter_context(self.autocast.restored())
            stack.enter_context(_training_flags(self.student, self.training))
            stack.enter_context(_preserved_attributes(self.student))
            stack.enter_context(_differentiable_attention())
            return torch.func.functional_call(module, state, args, kwargs)


@contextmanager
def _training_flags(module: nn.Module, flags: list[bool]) -> Iterator[None]:
    modules = list(module.modules())
    before = [m.training for m in modules]
    if before == flags:
        yield
        return
    try:
        for m, flag in zip(modules, flags, strict=True):
            m.training = flag
        yield
    finally:
        for m, flag in zip(modules, before, strict=True):
            m.training = flag


@contextmanager
def _preserved_attributes(module: nn.Module) -> Iterator[None]:
    """Restores tensors kept as plain attributes: norm weights of old-style hooks, features."""
    before = [
        (attributes, {k: v for k, v in attributes.items() if isinstance(v, Tensor)})
        for attributes in (vars(m) for m in module.modules())
    ]
    try:
        yield
    finally:
        for attributes, tensors in before:
            for key in [k for k, v in attributes.items() if isinstance(v, Tensor)]:
                del attributes[key]
            attributes.update(tensors)


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Attention by plain operators: the fused ones have no forward-mode or second derivative."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@dataclass
class CriterionCall:
    """One call of the criterion on logits of a recorded student call."""

    student_call: StudentCall
    teacher_logits: Tensor
    targets: Tensor
    features: Tensor  # [N, F]
    weights: Tensor  # [N, 2]
    result: Tensor  # what the criterion returned, detached
    upstream: Tensor | None = None
    """d(what backward was called on) / d(the criterion's result); None before backward."""

    def losses(self, criterion: WeightedKDLoss, params: Mapping[str, Tensor]) -> Tensor:
        """Per-sample losses [N, 2] of this call, replayed under other parameters."""
        logits = self.student_call.replay(params)
        return criterion.losses(logits, self.teacher_logits, self.targets)


class Recorder:
    """Watches the calls of student and criterion and keeps what a replay needs.

    A student call is kept only while its output lives, a criterion call until it is taken or the
    gradient that it contributed is cleared.
    """

    def __init__(self, student: nn.Module, criterion: WeightedKDLoss) -> None:
        self.active = False
        self._student = replayable(student)
        self._criterion = criterion
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

    def _before_student(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered = None
        if self.active and torch.is_grad_enabled():
            self._entered = StudentCall.about_to_happen(self._student, args, kwargs)

    def _after_student(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._entered is None:
            return
        call, self._entered = self._entered, None
        leaves = [
            TensorWeakRef(leaf) if isinstance(leaf, Tensor) else None
            for leaf in tree_leaves(output)
        ]
        living = [o for o in self._outputs if any(ref and ref() is not None for ref in o[0])]
        self._outputs = [*living, (leaves, call)]

    def _after_criterion(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor
    ) -> None:
        if not (self.active and loss.requires_grad):
            return
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
        features = self._criterion.last_features
        assert features is not None
        return CriterionCall(
            self._student_call_of(student_logits),
            teacher_logits.detach(),
            targets,
            features,
            self._criterion.weights,
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
        if all(p.grad is None for p in self._student.parameters()):
            self.gradients_cleared()

    def _after_backward(self) -> None:
        self._in_backward = False


def replayable(student: nn.Module) -> nn.Module:
    """The module itself, without what compiles or distributes its calls."""
    while isinstance(student, (torch._dynamo.OptimizedModule, nn.DataParallel)):
        student = getattr(student, "_orig_mod", None) or student.module
    return student
