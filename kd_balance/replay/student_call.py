"""One forward call of the student, held so that it can be repeated with other parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves

from kd_balance.replay.checkpointing import recomputed_under
from kd_balance.replay.memory_format import ReplayFormat
from kd_balance.replay.operators import differentiable_operators
from kd_balance.replay.random_state import RandomState, preserved_random_state


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
        return leaves_of(output)[self.leaf]

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

        modes = _get_current_function_mode_stack()

        @contextmanager
        def as_recorded() -> Iterator[None]:
            state = {**{name: buffer.clone() for name, buffer in buffers.items()}, **given}
            everywhere = _wherever_tied(module, state)
            with ExitStack() as stack:
                active = _get_current_function_mode_stack()
                for mode in modes:  # gone where a checkpoint computes again
                    if mode not in active:
                        stack.enter_context(mode)
                stack.enter_context(self.autocast.restored())
                stack.enter_context(_training_flags(self.student, self.training))
                stack.enter_context(_preserved_attributes(self.student))
                stack.enter_context(differentiable_operators(self.student))
                stack.enter_context(_reparametrize_module(module, everywhere))
                yield

        with recomputed_under(as_recorded), as_recorded():
            return module(*args, **kwargs)


def leaves_of(output: Any) -> list[Any]:
    """What a student's output is made of, dataclasses taken apart too."""
    leaves = []
    for leaf in tree_leaves(output):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            leaves += leaves_of([getattr(leaf, field.name) for field in fields(leaf)])
        else:
            leaves.append(leaf)
    return leaves


def _wherever_tied(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under all names of tied tensors, but under one name of a module that has several.

    torch's own way of tying swaps such a module's tensors twice, and leaves it with the new ones.
    """
    places: dict[str, Tensor] = {}
    for prefix, part in module.named_modules():
        places.update(part.named_parameters(prefix, recurse=False, remove_duplicate=False))
        places.update(part.named_buffers(prefix, recurse=False, remove_duplicate=False))
    new = {places[name]: value for name, value in state.items() if name in places}
    return {**state, **{name: new[old] for name, old in places.items() if old in new}}


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


def replayable(student: nn.Module) -> nn.Module:
    """The module itself, without what compiles or distributes its calls."""
    distributed = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(student, (torch._dynamo.OptimizedModule, *distributed)):
        student = getattr(student, "_orig_mod", None) or student.module
    return student
