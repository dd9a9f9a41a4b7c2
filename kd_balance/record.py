"""What one call of the student, and one of the criterion, leave behind for a replay."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.stateless import _reparametrize_module
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from kd_balance.checkpointing import recomputed_under
from kd_balance.clipping import GradientWatch
from kd_balance.hooks import WeakHook
from kd_balance.loss import WeightedKDLoss
from kd_balance.random_state import RandomState, preserved_random_state
from kd_balance.memory_format import ReplayFormat


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
class StudentCall:
    """One forward call of the student, held so that it can be repeated with other parameters."""

    student: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: RandomState
    autocast: Autocast
    buffers: dict[str, Tensor]
    training: list[bool]
    format: ReplayFormat
    draws_random_numbers: bool = False
    leaf: int = 0  # which leaf of the output's pytree are the logits

    @classmethod
    def about_to_happen(
        cls,
        student: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        format: ReplayFormat,
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
            format,
        )

    @property
    def device(self) -> torch.device:
        return self.random_state.device

    @property
    def precision(self) -> torch.dtype:
        """The coarsest number format that the call computed in."""
        if self.autocast.enabled:
            return self.autocast.dtype
        dtypes = {p.dtype for p in self.student.parameters() if p.is_floating_point()}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

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
        return _leaves(output)[self.leaf]

    def through(
        self,
        module: nn.Module,
        prefix: str,
        params: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Calls `module`, which holds the student under `prefix`; the student stays untouched."""
        if self.format.channels_last and not self.draws_random_numbers:
            try:
                return self._through(module, prefix, *self.format.convert([params, args, kwargs]))
            except RuntimeError:  # a view that only contiguous activations allow, most likely
                self.format.channels_last = False
        return self._through(module, prefix, params, args, kwargs)

    def _through(
        self,
        module: nn.Module,
        prefix: str,
        params: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        given = {prefix + name: param for name, param in params.items()}
        buffers = {prefix + name: buffer for name, buffer in self.buffers.items()}

        @contextmanager
        def as_recorded() -> Iterator[None]:
            state = {**{name: buffer.clone() for name, buffer in buffers.items()}, **given}
            with ExitStack() as stack:
                stack.enter_context(self.autocast.restored())
                stack.enter_context(_training_flags(self.student, self.training))
                stack.enter_context(_preserved_attributes(self.student))
                stack.enter_context(_differentiable_operators(self.student))
                stack.enter_context(_reparametrize_module(module, state, tie_weights=True))
                yield

        with recomputed_under(as_recorded), as_recorded():
            return module(*args, **kwargs)


def _leaves(output: Any) -> list[Any]:
    """What a student's output is made of, dataclasses taken apart too."""
    leaves = []
    for leaf in tree_leaves(output):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            leaves += _leaves([getattr(leaf, field.name) for field in fields(leaf)])
        else:
            leaves.append(leaf)
    return leaves


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
    """Restores what calls leave in attributes: norm weights of old-style hooks, counters."""
    before = [(attributes, dict(attributes)) for attributes in (vars(m) for m in module.modules())]
    try:
        yield
    finally:
        for attributes, values in before:
            for key in attributes.keys() - values.keys():
                del attributes[key]
            attributes.update(values)


@contextmanager
def _differentiable_operators(module: nn.Module) -> Iterator[None]:
    """Plain operators in place of fused and compiled ones, which lack derivatives."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    cudnn, mkldnn = torch.backends.cudnn.enabled, torch._C._get_mkldnn_enabled()
    cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
    torch.backends.mha.set_fastpath_enabled(False)
    if any(isinstance(m, nn.RNNBase) for m in module.modules()):
        torch.backends.cudnn.enabled = False
        torch._C._set_mkldnn_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if _has_weight_norm(module):
                stack.enter_context(_PlainWeightNorm())
            yield
    finally:
        parametrize._cache_enabled = cached
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.backends.cudnn.enabled = cudnn
        torch._C._set_mkldnn_enabled(mkldnn)


def _has_weight_norm(module: nn.Module) -> bool:
    return any(
        isinstance(part, (_WeightNorm, WeightNorm))
        for m in module.modules()
        for part in (m, *m._forward_pre_hooks.values())
    )


class _PlainWeightNorm(TorchFunctionMode):
    """Weight norm by its definition: torch's operator has a wrong second derivative (2.13)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            direction, magnitude, dim = args
            return direction * (magnitude / torch.norm_except_dim(direction, 2, dim))
        return func(*args, **(kwargs or {}))


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
            for leaf in _leaves(output)
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


def replayable(student: nn.Module) -> nn.Module:
    """The module itself, without what compiles or distributes its calls."""
    while isinstance(student, (torch._dynamo.OptimizedModule, nn.DataParallel)):
        student = getattr(student, "_orig_mod", None) or student.module
    return student
