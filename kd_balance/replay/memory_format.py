"""The memory format of replays: on a CPU, convolutions in channels_last take about a third less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_balance.torch_private import tree_leaves, tree_map

_PIXELS = 2**13  # of a batch: with fewer, bringing the weights into the format costs what it gains


class ReplayFormat:
    """Whether replays of a student run in channels_last; decided anew when that fails.

    Values are the same up to rounding. Random masks are not, being drawn in the order of memory,
    so calls that draw random numbers keep the format that they had.
    """

    def __init__(self, student: nn.Module) -> None:
        devices = {param.device.type for param in student.parameters()}
        convolves = any(isinstance(module, nn.Conv2d) for module in student.modules())
        self.channels_last = devices == {"cpu"} and convolves

    def pays(self, arguments: Any) -> bool:
        """Whether a call with a pytree of these arguments gains by the format."""
        return self.channels_last and _pixels(arguments) >= _PIXELS

    def convert(
        self, params: Mapping[str, Tensor], arguments: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """Parameters and arguments with images and convolution weights in channels_last."""
        converted = {name: _channels_last(param) for name, param in params.items()}
        return converted, tree_map(_channels_last, arguments)


def _pixels(arguments: Any) -> int:
    images = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.dim() == 4]
    return sum(image.numel() // max(1, image.shape[1]) for image in images)


def _channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value
