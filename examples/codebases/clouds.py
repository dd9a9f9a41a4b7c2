"""Made-up data and a small student, for scripts that show a library and not a task."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

CLASSES, FEATURES = 6, 12
LONG_TAIL, BALANCED = [256, 120, 60, 30, 16, 8], [20] * CLASSES


def clouds(sizes: list[int], seed: int) -> TensorDataset:
    """So many points of each class around a center of its own."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(sizes))
    noise = torch.randn(len(labels), FEATURES, generator=generator)
    return TensorDataset(centers[labels] + 1.5 * noise, labels)


class Mlp(nn.Sequential):
    def __init__(self, width: int) -> None:
        norm = nn.BatchNorm1d(width)
        super().__init__(nn.Linear(FEATURES, width), norm, nn.ReLU(), nn.Linear(width, CLASSES))
