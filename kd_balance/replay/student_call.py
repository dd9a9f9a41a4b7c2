"""One forward call of the student, held so that it can be repeated with other parameters."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_balance.replay.checkpointing import recomputed_under
from kd_balance.replay.fused_rules import FusedRules
from kd_balance.replay.memory_format import ReplayFormat
from kd_balance.replay.operators import differentiable_operators
from kd_balance.replay.random_state import RandomState, preserved_random_state
from kd_balance.replay.structure import Structure
from kd_balance.torch_private import (
    AnyBatchNorm,
    buffers_within,
    compiled_from,
    function_modes,
    has_forward_hooks,
    tree_leaves,
    tree_map,
)


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

    def restored(self) -> AbstractContextManager[Any]:
        if not self.enabled and not torch.is_autocast_enabled(self.device_type):
            return nullcontext()
        return torch.autocast(
            self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False
        )


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class StudentCall:
    """One forward call of the student, held so that it can be repeated with other parameters."""

    structure: Structure
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: RandomState
    autocast: Autocast
    buffers: dict[str, Tensor | None]
    training: list[bool]
    format: ReplayFormat
    draws_random_numbers: bool = False

    @classmethod
    def about_to_happen(
        cls,
        structure: Structure,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        format: ReplayFormat,
    ) -> StudentCall:
        structure.refresh()
        device = next(iter(structure.parameters)).device
        args, kwargs = _own_containers((args, kwargs))  # the call may write into a dict of inputs
        return cls(
            structure,
            args,
            kwargs,
            RandomState.current(device),
            Autocast.current(device.type),
            _buffers_before(structure),
            [module.training for module in structure.modules],
            format,
        )

    @property
    def student(self) -> nn.Module:
        return self.structure.student

    @property
    def device(self) -> torch.device:
        return self.random_state.device

    @property
    def normalises(self) -> bool:
        """Whether batch norms compute the batch's own statistics."""
        pairs = zip(self.structure.modules, self.training, strict=True)
        return any(training and isinstance(module, AnyBatchNorm) for module, training in pairs)

    def replay(self, params: Mapping[str, Tensor]) -> Any:
        """The output of this very call, dropout masks included, under other parameters.

        Args:
            params: parameters by name; those missing are the student's own.
        """
        with preserved_random_state(self.device):
            self.random_state.set()
            return self.call(params, self.args, self.kwargs)

    def call(
        self, params: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output for other arguments, the student called as it was in this call."""
        return self.through(self.student, params, args, kwargs)

    def through(
        self,
        function: Callable[..., Any],
        params: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Calls a function that may call the student; the student stays untouched."""
        if not self.draws_random_numbers and self.format.pays([args, kwargs]):
            try:
                return self._through(function, *self.format.convert(params, (args, kwargs)))
            except RuntimeError:  # a view that only contiguous activations allow, most likely
                self.format.channels_last = False
        return self._through(function, params, (args, kwargs))

    def _through(
        self,
        function: Callable[..., Any],
        params: Mapping[str, Tensor],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> Any:
        params = dict(params)  # as they are now, when a checkpoint computes again
        modes, rules = function_modes(), FusedRules.active()

        @contextmanager
        def as_recorded() -> Iterator[None]:
            copies = {n: None if b is None else b.clone() for n, b in self.buffers.items()}
            with ExitStack() as stack:
                # what surrounds the replay is gone where a checkpoint computes again
                active = function_modes()
                for mode in modes:
                    if mode not in active:
                        stack.enter_context(mode)
                if rules is not None and FusedRules.active() is not rules:
                    stack.enter_context(rules)
                stack.enter_context(self.autocast.restored())
                stack.enter_context(self.structure.holding({**copies, **params}, self.training))
                stack.enter_context(
                    differentiable_operators(self.structure.modules, self.structure.ranks)
                )
                yield

        args, kwargs = _own_containers(arguments)
        with recomputed_under(as_recorded), as_recorded():
            return function(*args, **kwargs)


def _buffers_before(structure: Structure) -> dict[str, Tensor | None]:
    """Copies of the buffers by name, None for those that the call writes and nothing reads."""
    unread = {
        id(buffer)
        for module in structure.modules
        if type(module) in _NORMS and module.training
        if not has_forward_hooks(module)
        for buffer in buffers_within(module).values()
    }
    copies = {n: None if id(b) in unread else b.clone() for b, n in structure.buffers.items()}
    if structure.written:  # a momentum encoder is a buffer by another name
        frozen = {n: p.detach().clone() for p, n in structure.parameters.items()
                  if n in structure.written and not p.requires_grad}
        copies.update(frozen)
    return copies


def _own_containers(arguments: Any) -> Any:
    """The same tensors in tuples, lists and dicts that nobody else holds."""
    return tree_map(lambda x: copy.copy(x) if isinstance(x, UserDict) else x, arguments)


def leaves_of(output: Any) -> list[Any]:
    """What a student's output is made of; dataclasses and mappings are taken apart too."""
    if isinstance(output, Tensor):
        return [output]
    leaves = []
    for leaf in tree_leaves(output):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            leaves += leaves_of([getattr(leaf, field.name) for field in fields(leaf)])
        elif isinstance(leaf, UserDict):
            leaves += leaves_of(dict(leaf))
        else:
            leaves.append(leaf)
    return leaves


def replayable(student: nn.Module) -> nn.Module:
    """The module itself, without what compiles or distributes its calls."""
    distributed = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if (original := compiled_from(student)) is not None:
            student = original
        elif isinstance(student, distributed):
            student = student.module
        else:
            return student
