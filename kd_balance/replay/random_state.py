"""The random number generators of torch, Python and numpy, saved and set together."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
        numpy: Any = np.random.get_state(legacy=False)
        return cls(device, torch.get_rng_state(), accelerator, random.getstate(), numpy)

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            _device_module(self.device).set_rng_state(self.accelerator, self.device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

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
