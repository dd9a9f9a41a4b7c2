"""Accuracy by class frequency, and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def evaluate(logits: Tensor, targets: Tensor, groups: Mapping[str, Sequence[int]]) -> dict:
    """Accuracies in percent on a held-out set.

    Args:
        logits: [N, C].
        targets: class indices [N]; every class occurs.
        groups: classes by name, each group's accuracy being the mean over its classes.

    Returns:
        "overall", one entry for each group, "worst" (class), "ece" (percent) and "per_class".
    """
    hit = (logits.argmax(1) == targets).double()
    sizes = torch.bincount(targets, minlength=logits.shape[1])
    per_class = 100 * torch.bincount(targets, hit, minlength=logits.shape[1]) / sizes
    values: dict = {"overall": 100 * hit.mean().item()}
    values |= {name: per_class[list(classes)].mean().item() for name, classes in groups.items()}
    values["worst"] = per_class.min().item()
    values["ece"] = 100 * expected_calibration_error(logits, targets)
    values = {name: round(value, 3) for name, value in values.items()}
    return values | {"per_class": [round(value, 2) for value in per_class.tolist()]}


def expected_calibration_error(logits: Tensor, targets: Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of confidence, by samples in the bin.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017, eq. 3.
    """
    confidence, prediction = logits.double().softmax(1).max(1)
    hit = (prediction == targets).double()
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.bincount(bin_of, confidence - hit, minlength=bins).abs()
    return (gap.sum() / len(targets)).item()
