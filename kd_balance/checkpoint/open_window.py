"""The steps of a window that is open, as lists, numbers and tensors that a checkpoint can hold.

What a step keeps is a tree of this package's own dataclasses. Each becomes a list that begins with
the name of its kind, and nothing but the kinds named here is made of such a list: reading one calls
no code that a checkpoint could choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_balance.clipping import Clipping
from kd_balance.gradient_transform import GradientTransform
from kd_balance.inner_step import GroupUpdate, InnerStep, StepCopy, Update, full_name
from kd_balance.logits import Recorded, Retraced
from kd_balance.record import Cast, CriterionCall, Leaf, Made, Output
from kd_balance.replay import RandomState, Structure, StudentCall
from kd_balance.replay.student_call import Autocast
from kd_balance.top_k import TopK

_DATA: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        Autocast, Cast, Clipping, CriterionCall, GroupUpdate, InnerStep, Leaf, Made, Output,
        StudentCall, TopK, Update,
    )
}
_CONTAINERS: dict[str, Any] = {
    kind.__name__: kind for kind in (dict, frozenset, list, set, torch.Size, tuple)
}
_WHY_NOT: dict[type, str] = {
    Recorded: "what the loop makes of the student's output is known by its graph alone (pass it as "
    "to_logits=)",
    Retraced: "what the loop makes of the student's output is read off its graph (pass it as "
    "to_logits=)",
    GradientTransform: "a transform_gradients function is known by its graph alone",
    StepCopy: "step_derivative is 'finite_difference'",
}


class NotPlain(Exception):
    """Something that tensors and numbers do not tell."""


class Around(NamedTuple):
    """What the steps refer to and a checkpoint does not hold: it is there when one is loaded."""

    structure: Structure
    objects: Mapping[str, Any]
    """Further objects by name; None for those that this run lacks."""
    optimizers: Sequence[Optimizer]

    @property
    def live(self) -> dict[str, Tensor]:
        """The student's parameters by name."""
        return {name: param for param, name in self.structure.parameters.items()}


def packed(steps: Sequence[InnerStep], ended: Mapping[str, Tensor], around: Around) -> list[Any]:
    """The steps, and the parameters that the last one left, as :func:`unpacked` reads them.

    Raises:
        NotPlain: they hold something else than tensors, numbers and words.
    """
    written = set(around.structure.written)
    return _Packer(around).pack([len(steps), list(steps), dict(ended), written])


def unpacked(
    window: list[Any], around: Around
) -> tuple[list[InnerStep], dict[str, Tensor], set[str]]:
    """The steps, the parameters that the last one left, and those that calls write in place.

    Raises:
        ValueError: it does not belong to this student and its optimizer.
    """
    try:
        count, steps, ended, written = _Unpacker(around).unpack(window)
        if count != len(steps):
            raise ValueError(f"it holds {len(steps)} of {count} steps")
        _check(steps, ended, around)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "the checkpoint's open window cannot be read "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'}), "
            "expected one of this student and optimizer: load another checkpoint, or delete the "
            "key 'window' from its 'kd_balance'."
        ) from error
    return steps, ended, written


def _check(steps: Any, ended: Any, around: Around) -> None:
    live = around.live
    for step in steps:
        for name, param in (*step.update.params.items(), *step.gradients.items(), *ended.items()):
            if param.shape != live[name].shape:
                raise ValueError(f"{name} has another shape")
        for call in step.calls:
            for output in call.outputs:
                if len(output.call.training) != len(around.structure.modules):
                    raise ValueError("the student has other modules")
                names = {*live, *around.structure.buffers.values()}
                if lost := output.call.buffers.keys() - names:
                    raise ValueError(f"the student holds no {min(lost)}")


class _Packer:
    def __init__(self, around: Around) -> None:
        self._objects = {id(x): name for name, x in _objects(around).items() if x is not None}
        self._seen: dict[int, int] = {}
        self._names: dict[int, str] = {}

    def pack(self, value: Any) -> Any:
        if id(value) in self._objects:
            return ["live", self._objects[id(value)]]
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in self._seen:
            return ["again", self._seen[id(value)]]
        kind = type(value)
        if kind in (Tensor, nn.Parameter):
            return self._first(value, ["tensor", value.detach(), value.device.type == "cpu"])
        if isinstance(value, (torch.dtype, torch.device)):
            return [kind.__name__, str(value).removeprefix("torch.")]
        if kind is RandomState:
            on_host = value.state_dict()
            return self._first(value, ["RandomState", on_host, value.accelerator])
        if _CONTAINERS.get(kind.__name__) is kind:
            parts = value.items() if kind is dict else value
            return [kind.__name__, *map(self.pack, parts)]
        if _DATA.get(kind.__name__) is kind:
            return self._first(value, self._data(value))
        if isinstance(value, type) and issubclass(value, Optimizer):
            return ["optimizer", full_name(value)]
        raise NotPlain(_WHY_NOT.get(kind) or f"a call was given a {full_name(kind)}")

    def _first(self, value: Any, packed: list[Any]) -> list[Any]:
        self._seen[id(value)] = len(self._seen)
        return packed

    def _data(self, value: Any) -> list[Any]:
        if isinstance(value, InnerStep):
            self._names = {i: name for name, i in value.ids.items()}
        if isinstance(value, CriterionCall):
            try:
                value.check_versions()
            except ValueError as error:
                raise NotPlain(str(error).partition(",")[0]) from error
        return [type(value).__name__, *(self._field(value, name) for name in _fields(type(value)))]

    def _field(self, value: Any, name: str) -> Any:
        held = getattr(value, name)
        if name == "ids":
            held = list(held)
        elif name == "reached" and held is not None:
            held = [self._names[i] for i in held if i in self._names]
        return self.pack(held)


class _Unpacker:
    def __init__(self, around: Around) -> None:
        self._objects = _objects(around)
        self._device = next(iter(around.structure.parameters)).device
        self._live = around.live
        kinds = {torch.optim.SGD, *map(type, around.optimizers)}
        self._optimizers = {full_name(kind): kind for kind in kinds}
        self._seen: list[Any] = []

    def unpack(self, value: Any) -> Any:
        if not isinstance(value, list):
            if value is None or type(value) in (bool, int, float, str):
                return value
            raise TypeError(f"a {type(value).__name__} by itself")
        kind, *parts = value
        if kind == "live":
            if (found := self._objects[parts[0]]) is None:
                raise ValueError(f"it was saved with {parts[0]}=, and there is none")
            return found
        if kind == "again":
            return self._seen[parts[0]]
        if kind == "tensor":
            return self._first(parts[0].to("cpu" if parts[1] else self._device))
        if kind == "dtype":
            dtype = getattr(torch, parts[0])
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"{parts[0]} is no dtype")
            return dtype
        if kind == "device":
            return torch.device("cpu") if parts[0] == "cpu" else self._device
        if kind == "optimizer":
            return self._optimizers[parts[0]]
        if kind == "RandomState":
            state, accelerator = RandomState.from_state_dict(parts[0]), parts[1]
            state.device = self._device
            if self._device.type != "cpu":
                state.accelerator = accelerator.cpu()
            return self._first(state)
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](map(self.unpack, parts))
        return self._first(self._data(_DATA[kind], parts))

    def _first(self, value: Any) -> Any:
        self._seen.append(value)
        return value

    def _data(self, kind: Any, parts: list[Any]) -> Any:
        pairs = zip(_fields(kind), map(self.unpack, parts), strict=True)
        by_name = {name: self._held(name, value) for name, value in pairs}
        made = kind(**by_name)
        if isinstance(made, CriterionCall):
            made.note_versions()
        return made

    def _held(self, name: str, value: Any) -> Any:
        if name == "ids":
            return {name: id(self._live[name]) for name in value}
        if name == "reached" and value is not None:
            return frozenset(id(self._live[name]) for name in value)
        return value


def _objects(around: Around) -> dict[str, Any]:
    return {"structure": around.structure, **around.objects}


def _fields(kind: Any) -> Sequence[str]:
    if hasattr(kind, "_fields"):
        return kind._fields
    return [f.name for f in fields(kind) if f.name != "versions"]  # of tensors of this process
