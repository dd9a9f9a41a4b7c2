"""Hard losses for long-tailed labels, to take cross entropy's place in ``WeightedKDLoss``.

Each maps (student_logits [N, C], targets) to one loss a sample, [N].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BalancedSoftmax(nn.Module):
    """Cross entropy of logits shifted by the log frequency of their class.

    A student trained with it predicts as if all classes were equally frequent; its own logits are
    used unshifted afterwards.

    Args:
        class_counts: training samples of each class [C], each above 0.
        strength: factor of the shift: 1 is the paper's loss, 0 plain cross entropy. Other values
            are the training-time logit adjustment of Menon et al. 2021, eq. 10.

    Calling it with student_logits [N, C] and targets (class indices [N] or probabilities [N, C])
    gives [N].

    Raises:
        ValueError: a class without samples.

    Example::

        >>> hard_loss = BalancedSoftmax([90, 10])
        >>> hard_loss(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.1054, 2.3026])

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", 2020, eq. 4.
    """

    log_prior: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength
        self.register_buffer("log_prior", log_prior(class_counts))

    def forward(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        shift = self.strength * self.log_prior.to(student_logits)
        return F.cross_entropy(student_logits + shift, targets, reduction="none")


class ClassBalancedCrossEntropy(nn.Module):
    """Cross entropy weighted by the inverse effective number of samples of the label's class.

    Args:
        class_counts: training samples of each class [C], each above 0.
        beta: in [0, 1): 0 is plain cross entropy, near 1 is weighting by inverse frequency.

    Calling it with student_logits [N, C] and targets (class indices [N] or probabilities [N, C])
    gives [N].

    Raises:
        ValueError: a class without samples, or beta out of its range.

    Example::

        >>> hard_loss = ClassBalancedCrossEntropy([90, 10], beta=0.999)
        >>> hard_loss(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.1437, 1.2426])

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019, eq. 4.
    """

    weight: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], beta: float = 0.9999) -> None:
        super().__init__()
        self.register_buffer("weight", effective_number_weights(class_counts, beta))

    def forward(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        weight = self.weight.to(student_logits)
        return F.cross_entropy(student_logits, targets, weight=weight, reduction="none")


def effective_number_weights(class_counts: Tensor | Sequence[int], beta: float) -> Tensor:
    """Class weights (1 − beta) / (1 − beta^n), scaled to mean one.

    Args:
        class_counts: training samples n of each class [C], each above 0.
        beta: in [0, 1).

    Returns:
        float [C].

    Raises:
        ValueError: a class without samples, or beta out of its range.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019, eq. 2.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}, expected a number from 0 to below 1.")
    weights = (1 - beta) / (1 - beta ** _counts(class_counts))
    return (weights / weights.mean()).float()


def log_prior(class_counts: Tensor | Sequence[int]) -> Tensor:
    """The log frequency of every class.

    Args:
        class_counts: training samples of each class [C], each above 0.

    Returns:
        float [C], in nats, below 0.

    Raises:
        ValueError: a class without samples.
    """
    counts = _counts(class_counts)
    return (counts / counts.sum()).log().float()


def _counts(class_counts: Tensor | Sequence[int]) -> Tensor:
    counts = torch.as_tensor(class_counts).detach().cpu().double()
    if counts.dim() != 1 or not bool((counts > 0).all()):
        raise ValueError(
            f"class_counts is {counts.tolist()}, expected one number above 0 for each class: leave "
            "out classes that never occur."
        )
    return counts
