"""What digits.yaml names: networks, in torchdistill's registry, and long-tailed digits."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdistill.models.registry import register_model

from kd_balance.data import class_counts, long_tail_indices, split_balanced


@register_model
def convnet(width: int, num_classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, num_classes),
    )  # fmt: skip


def dataset(split: str) -> TensorDataset:
    """scikit-learn's digits: a long-tailed training set, balanced validation and test sets."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16).to(torch.get_default_dtype())
    images = images.unsqueeze(1)  # [1797, 1, 8, 8]
    labels = torch.tensor(bunch.target)
    test, rest = split_balanced(labels, per_class=60, seed=0)
    val, rest = (rest[i] for i in split_balanced(labels[rest], per_class=10, seed=0))
    train = rest[long_tail_indices(labels[rest], imbalance_factor=50, seed=0, head_count=100)]
    chosen = {"train": train, "val": val, "test": test}[split]
    return TensorDataset(images[chosen], labels[chosen])


def meta_loader(batch_size: int) -> DataLoader:
    return DataLoader(dataset("val"), batch_size=batch_size, shuffle=True)


def train_counts() -> torch.Tensor:
    return class_counts(dataset("train"))
