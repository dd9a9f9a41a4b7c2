"""The random number generators of torch, Python and numpy, saved and set together."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MT19937_BYTES = 4 * 624 + 4  # the numbers and the position among them


@dataclass
class RandomState:
    """The states of the generators that a student on `device`, or a loader, draws from."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None
    python: tuple[Any, ...]
    numpy: dict[str, Any]

    @classmethod
    def current(cls, device: torch.device) -> RandomState:
        accelerator = None if device.type == "cpu" else _device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), accelerator, random.getstate(), _numpy.state())

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            _device_module(self.device).set_rng_state(self.accelerator, self.device)
        random.setstate(self.python)
        _numpy.set(self.numpy)

    def state_dict(self) -> dict[str, Any]:
        """Those of the CPU, as tensors and numbers."""
        state = self.numpy["state"]
        key = torch.from_numpy(state["key"].astype(np.int64))
        gauss = self.numpy["has_gauss"], self.numpy["gauss"]
        return {"torch": self.cpu, "python": self.python, "numpy": (key, state["pos"], *gauss)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RandomState:
        key, position, has_gauss, gauss = state["numpy"]
        numpy = {
            "bit_generator": "MT19937",
            "state": {"key": key.cpu().numpy().astype(np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": gauss,
        }
        return cls(torch.device("cpu"), state["torch"].cpu(), None, state["python"], numpy)


class _NumpyState:
    """numpy's global generator, whose state takes numpy 35 microseconds to read or to set.

    It is seldom drawn from. As long as its memory is what it was at the last reading, that state
    is still its own, unless it holds back a second normal number, which leaves the memory alone.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._memory: bytes | None = None  # None where it does not tell the state

    def state(self) -> dict[str, Any]:
        if not self._unchanged():
            self._remember(np.random.get_state(legacy=False))
        return self._state

    def set(self, state: dict[str, Any]) -> None:
        if state is not self._state or not self._unchanged():
            np.random.set_state(state)
            self._remember(state)

    def _unchanged(self) -> bool:
        return self._memory is not None and self._memory == _memory_of_numpys_generator()

    def _remember(self, state: dict[str, Any]) -> None:
        self._state = state
        self._memory = None if state["has_gauss"] else _memory_of_numpys_generator()


def _memory_of_numpys_generator() -> bytes | None:
    generator = np.random.mtrand._rand._bit_generator
    if not isinstance(generator, np.random.MT19937):
        return None
    return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)


_numpy = _NumpyState()


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Leaves the random number generators as they were."""
    before = RandomState.current(device)
    try:
        yield
    finally:
        before.set()


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device.type)
