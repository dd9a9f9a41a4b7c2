"""CIFAR networks whose parameters carry RepDistiller's names and shapes, and a plain MLP.

A checkpoint published for HobbitLong/RepDistiller (models/resnet.py and models/wrn.py there) loads
with ``model.load_state_dict(torch.load(path)["model"])``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """A CIFAR ResNet of depth 6n + 2.

    Args:
        depth: 8, 20, 32, 56, …
        widths: channels of the stem and of the three stages.
        classes: number of classes.
    """

    def __init__(self, depth: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = _conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = self._stage(widths[0], widths[1], blocks, 1)
        self.layer2 = self._stage(widths[1], widths[2], blocks, 2)
        self.layer3 = self._stage(widths[2], widths[3], blocks, 2)
        self.fc = nn.Linear(widths[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = ResidualBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(ResidualBlock(outputs, outputs, 1) for _ in range(1, blocks)))

    def features(self, x: Tensor) -> Tensor:
        """[N, widths[3]], what the classifier `fc` sees."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class WideBlock(nn.Module):
    """Pre-activation block of a wide ResNet (Zagoruyko and Komodakis 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.convShortcut: nn.Module | None = None
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))


class WideStage(nn.Module):
    """Blocks of one resolution, under the name `layer`."""

    def __init__(self, inputs: int, outputs: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = WideBlock(inputs, outputs, stride)
        rest = (WideBlock(outputs, outputs, 1) for _ in range(1, blocks))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """A wide ResNet of depth 6n + 4 and widening factor `widen`."""

    def __init__(self, depth: int, widen: int, classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = _conv3x3(3, widths[0])
        self.block1 = WideStage(widths[0], widths[1], blocks, 1)
        self.block2 = WideStage(widths[1], widths[2], blocks, 2)
        self.block3 = WideStage(widths[2], widths[3], blocks, 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def features(self, x: Tensor) -> Tensor:
        """[N, 64 · widen], what the classifier `fc` sees."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return F.relu(self.bn1(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class MLP(nn.Module):
    """Fully connected layers with ReLU between, for data that are no images."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths, widths[1:]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], classes)

    def features(self, x: Tensor) -> Tensor:
        """[N, widths[-1]], what the classifier `fc` sees."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


_NARROW = (16, 16, 32, 64)
_TIMES_FOUR = (32, 64, 128, 256)

MODELS = {
    "resnet8": lambda classes: ResNet(8, _NARROW, classes),
    "resnet20": lambda classes: ResNet(20, _NARROW, classes),
    "resnet32": lambda classes: ResNet(32, _NARROW, classes),
    "resnet56": lambda classes: ResNet(56, _NARROW, classes),
    "resnet8x4": lambda classes: ResNet(8, _TIMES_FOUR, classes),
    "resnet32x4": lambda classes: ResNet(32, _TIMES_FOUR, classes),
    "wrn_16_2": lambda classes: WideResNet(16, 2, classes),
    "wrn_40_2": lambda classes: WideResNet(40, 2, classes),
    "mlp_small": lambda classes: MLP((512, 24), classes),
    "mlp_large": lambda classes: MLP((512, 256, 256), classes),
    "mlp_digits": lambda classes: MLP((74, 32), classes),
    "mlp_digits_large": lambda classes: MLP((74, 128, 128), classes),
}
"""Constructors by name; each takes the number of classes."""


def build(name: str, classes: int, seed: int) -> nn.Module:
    """A model with initial values drawn from `seed`; the global random state is left as it was."""
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown, expected one of {', '.join(MODELS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](classes)
