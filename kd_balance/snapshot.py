"""The state of everything that a function reaches, to be put back into the same objects."""

from __future__ import annotations

import builtins
import functools
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_balance.replay import RandomState

_ENDS = (type, types.ModuleType, torch.utils.data.Dataset, torch.utils.data.DataLoader)
_OTHERS = sys.stdlib_module_names | {"torch", "numpy", "kd_balance", "higher"}


class Snapshot:
    """Remembers objects, and all that they hold, by the values inside them.

    Attributes, lists, dicts, sets, tensors with their gradients, arrays, random generators,
    closures and the global variables that functions name are followed. Data sets, loaders,
    iterators, and what lies outside Python, are not.

    Args:
        roots: objects and functions to begin with.
    """

    def __init__(self, *roots: Any) -> None:
        self._roots = roots
        self.retake()

    def retake(self) -> None:
        """Remembers the state of now in place of the one before."""
        self._put_back: dict[int, Callable[[], None]] = {}
        self._kept: list[Any] = []  # so that no address is used twice
        self._random_states = [RandomState.current(device) for device in _devices()]
        waiting = list(self._roots)
        while waiting:
            value = waiting.pop()
            if id(value) not in self._put_back and not isinstance(value, _ENDS):
                self._kept.append(value)
                self._put_back[id(value)] = _restorer(value)
                waiting.extend(_parts(value))

    def restore(self) -> None:
        """Puts every value back where it was; what was remembered stays so."""
        for put_back in self._put_back.values():
            put_back()
        for state in self._random_states:
            state.set()


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return devices


def _nothing() -> None:
    pass


def _restorer(value: Any) -> Callable[[], None]:
    """What brings a value back to its state of now; not the parts of it."""
    if isinstance(value, Tensor):
        return _tensor_restorer(value)
    if isinstance(value, np.ndarray):
        array = value.copy()
        return lambda: value.__setitem__(..., array) if value.flags.writeable else None
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return functools.partial(_call, value.set_state, state)
    if isinstance(value, random.Random):
        internal = value.getstate()
        return lambda: value.setstate(internal)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", bits)
    if isinstance(value, types.CellType):
        content = _content(value)
        return _nothing if content is _EMPTY else lambda: setattr(value, "cell_contents", content)
    if isinstance(value, types.FunctionType):
        named = {k: value.__globals__[k] for k in _names(value.__code__) & value.__globals__.keys()}
        return lambda: _renew(value.__globals__, named)
    return _container_restorer(value)


def _container_restorer(value: Any) -> Callable[[], None]:
    own = vars(value) if _is_followed(value) else None
    before = dict(own) if own is not None else {}
    items: Any = None
    if isinstance(value, dict):
        items = dict(value)
    elif isinstance(value, (list, deque, set)):
        items = list(value)
    if own is None and items is None:
        return _nothing

    def put_back() -> None:
        if own is not None:
            own.clear()
            own.update(before)
        if items is None:
            return
        if isinstance(value, dict):  # whose own methods a subclass may have changed
            kind = OrderedDict if isinstance(value, OrderedDict) else dict
            kind.clear(value)
            kind.update(value, items)
        else:
            value.clear()
            (value.update if isinstance(value, set) else value.extend)(items)

    return put_back


def _tensor_restorer(tensor: Tensor) -> Callable[[], None]:
    # .data: a mark on the version would break graphs that the loop holds
    data, copy, gradient = tensor.data, tensor.detach().clone(), _gradient(tensor)
    requires_grad = tensor.requires_grad

    def put_back() -> None:
        if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
            tensor.data = data
        data.copy_(copy)
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)
            tensor.grad = gradient

    return put_back


def _gradient(tensor: Tensor) -> Tensor | None:
    return tensor.grad if tensor.is_leaf else None


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield _gradient(value)
    elif isinstance(value, types.FunctionType):
        if _is_foreign(value.__module__):
            return
        yield from value.__closure__ or ()
        yield from value.__defaults__ or ()
        names = _names(value.__code__) & value.__globals__.keys()
        yield from (value.__globals__[name] for name in names - vars(builtins).keys())
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.CellType):
        yield _content(value)
    elif isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    if _is_followed(value):
        yield from vars(value).values()


def _is_followed(value: Any) -> bool:
    """Whether its attributes are part of the state."""
    if isinstance(value, (Tensor, types.FunctionType, *_ENDS)):
        return False
    if not isinstance(getattr(value, "__dict__", None), dict):  # a protocol buffer's is a proxy
        return False
    return type(value).__module__.partition(".")[0] not in sys.stdlib_module_names


def _is_foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _OTHERS


def _names(code: types.CodeType) -> set[str]:
    """The global names in a function and in those within it."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _renew(names: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        if names.get(name) is not value:
            names[name] = value


def _call(function: Callable[[Any], Any], argument: Any) -> None:
    function(argument)


_EMPTY = object()


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY
