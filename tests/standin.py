"""A stand-in for an accelerator: a device of its own whose tensors are kept on the CPU.

It computes what the CPU computes, refuses operators whose tensors lie on two devices, as CUDA does,
has random numbers of its own, and can refuse whatever would make the host wait for the device.
What it does not stand in for: CUDA's kernels, autocast and memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from unittest import mock

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "standin"
aten = torch.ops.aten

WAITING = {  # their results' values or sizes are read on the host
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.bincount.default,
    aten._unique2.default,
}
FILLED = (  # torch would make these empty and fill them in C++, behind our back
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.eye.default,
    aten.linspace.default,
    aten.randperm.default,
    aten.randperm.generator,
)


class _Module:
    """What torch expects of ``torch.<device>``."""

    def __init__(self) -> None:
        self.generator = torch.Generator()
        self.refuses_waiting = False
        self.has_float64 = True

    def is_initialized(self):
        return True

    def is_available(self):
        return False  # or DataParallel and others would take it for what they run on

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        self.generator.manual_seed(seed)

    def get_rng_state(self, device=None):
        return self.generator.get_state()

    def set_rng_state(self, state, device=None):
        self.generator.set_state(state)

    def get_amp_supported_dtype(self):
        return []


_module = _Module()


def never_waits() -> AbstractContextManager:
    """Raises RuntimeError where the host would wait for the device."""
    return mock.patch.object(_module, "refuses_waiting", True)


def without_float64() -> AbstractContextManager:
    """Raises TypeError where a float64 tensor would come to be on the device, as MPS does."""
    return mock.patch.object(_module, "has_float64", False)


class _Held(torch.Tensor):
    """A tensor of the device, its values in `held`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        if held.dtype == torch.float64 and not _module.has_float64:
            raise TypeError("float64 on the stand-in, expected float32")
        if held._is_zerotensor():  # forward mode's, without memory
            held = torch.zeros_like(held)
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE, 0),
        )
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, *args, **(kwargs or {}))

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.held = other.held

    def data_ptr(self):
        return self.held.data_ptr()

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        return memo.setdefault(id(self), copy)

    def tolist(self):
        return self.detach().cpu().tolist()

    def numpy(self, **_):
        raise TypeError("numpy() of a tensor on the stand-in, expected one on the CPU")


def _run(operator, *args, **kwargs):
    if copy := COPIES.get(operator):
        return copy(*args, **kwargs)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, _Held)]
    if strangers := [x for x in tensors if not isinstance(x, _Held) and x.dim()]:
        raise RuntimeError(f"{operator} of tensors on two devices, shape {strangers[0].shape}")
    if operator in WAITING or any(x.dtype == torch.bool for x in _indices(operator, args)):
        _wait(operator)
    if kwargs.get("device") is not None:
        kwargs["device"] = "cpu"
    if any(argument.name == "generator" for argument in operator._schema.arguments):
        kwargs["generator"] = kwargs.get("generator") or _module.generator
    result = operator(*tree_map(_taken_off, args), **tree_map(_taken_off, kwargs))
    if resized := [x for x in ours if x.shape != x.held.shape]:
        raise NotImplementedError(f"{operator} changed the shape {tuple(resized[0].shape)}")
    written = {id(x.held): x for x in ours}
    return tree_map(lambda x: written[id(x)] if id(x) in written else _put(x), result)


def _copy_into(target, source, non_blocking=False):
    _cross(source.device, target.device, non_blocking)
    _taken_off(target).copy_(_taken_off(source))
    return target


def _copied(source, *, device=None, non_blocking=False, **kwargs):
    to = torch.device(device or source.device)
    _cross(source.device, to, non_blocking)
    result = aten._to_copy.default(_taken_off(source), **kwargs)
    return _put(result) if to.type == DEVICE else result


COPIES = {aten.copy_.default: _copy_into, aten._to_copy.default: _copied}


def _cross(here, there, non_blocking):
    if here.type != there.type and (there.type == "cpu" or not non_blocking):
        _wait(f"a copy from {here.type} to {there.type}")


def _indices(operator, args):
    of_indexing = operator in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
    return [x for x in args[1] if x is not None] if of_indexing else []


def _wait(what):
    if _module.refuses_waiting:
        raise RuntimeError(f"{what} waits for the device")


def _taken_off(x):
    return x.held if isinstance(x, _Held) else x


def _put(x):
    return _Held(x) if isinstance(x, torch.Tensor) else x


def available() -> bool:
    """Whether this torch takes devices written in Python; beside them, autograd on CUDA breaks."""
    takes_devices = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
    return takes_devices and not torch.cuda.is_available()


if available():
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=_module)
    _rest = torch.library.Library("_", "IMPL")
    _rest.fallback(_run, "PrivateUse1")
    _aten = torch.library.Library("aten", "IMPL")
    for _operator in (*COPIES, *FILLED):
        _name = _operator._schema.name, _operator._schema.overload_name
        _run_it = partial(_run, _operator)
        _aten.impl(".".join(filter(None, _name)), _run_it, "PrivateUse1")
