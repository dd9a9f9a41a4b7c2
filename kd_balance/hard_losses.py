"""Hard losses for long-tailed labels, to take cross entropy's place in ``WeightedKDLoss``.

Each maps (student_logits [N, C], targets) to one loss a sample, [N]. A true attribute ``by_rows``
says that a sample's loss is of its own logits alone: large logits are then looked at in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every sample; a class of −∞ that no target asks for has no part in it.

    Args:
        logits: [N, C].
        targets: class indices [N] or probabilities [N, C].

    Returns:
        [N], in nats.
    """
    if targets.dim() == 1:
        return F.cross_entropy(logits, targets, reduction="none")
    terms = targets * logits.log_softmax(1)
    return -torch.where(targets > 0, terms, 0.0).sum(1)  # 0 · ∞ would not be a number


class BalancedSoftmax(nn.Module):
    """Cross entropy of logits shifted by the log frequency of their class.

    A student trained with it predicts as if all classes were equally frequent; its own logits are
    used unshifted afterwards.

    Args:
        class_counts: training samples of each class [C]. A class without any takes no part in the
            softmax, and as a label its loss is infinite.
        strength: factor of the shift: 1 is the paper's loss, 0 plain cross entropy. Other values
            are the training-time logit adjustment of Menon et al. 2021, eq. 10.

    Calling it with student_logits [N, C] and targets (class indices [N] or probabilities [N, C])
    gives [N].

    Raises:
        ValueError: no class with samples; when called, logits of another number of classes.

    Example::

        >>> hard_loss = BalancedSoftmax([90, 10])
        >>> hard_loss(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.1054, 2.3026])

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", 2020, eq. 4.
    """

    by_rows = True
    log_prior: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength
        unseen = torch.as_tensor(class_counts).detach().cpu() == 0
        prior = log_prior(class_counts).masked_fill(unseen, float("-inf"))
        self.register_buffer("log_prior", prior)

    def forward(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        if student_logits.shape[1] != len(self.log_prior):
            raise ValueError(
                f"class_counts has {len(self.log_prior)} numbers and the logits "
                f"{student_logits.shape[1]} classes, expected as many: give "
                f"kd_balance.data.class_counts num_classes={student_logits.shape[1]}."
            )
        logits = student_logits
        if self.strength:  # times −∞ it would not be a number
            logits = torch.add(logits, self.log_prior.to(logits), alpha=self.strength)
        return cross_entropy(logits, targets)


class ClassBalancedCrossEntropy(nn.Module):
    """Cross entropy weighted by the inverse effective number of samples of the label's class.

    Args:
        class_counts: training samples of each class [C].
        beta: in [0, 1): 0 is plain cross entropy, near 1 is weighting by inverse frequency.

    Calling it with student_logits [N, C] and targets (class indices [N] or probabilities [N, C])
    gives [N].

    Raises:
        ValueError: no class with samples, or beta out of its range.

    Example::

        >>> hard_loss = ClassBalancedCrossEntropy([90, 10], beta=0.999)
        >>> hard_loss(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.1437, 1.2426])

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019, eq. 4.
    """

    by_rows = True
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
        class_counts: training samples n of each class [C]. A class without any is taken for as
            frequent as the rarest that has some.
        beta: in [0, 1).

    Returns:
        float [C].

    Raises:
        ValueError: no class with samples, or beta out of its range.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019, eq. 2.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}, expected a number from 0 to below 1.")
    counts = _counts(class_counts)
    counts = counts.clamp(min=counts[counts > 0].min())
    weights = (1 - beta) / (1 - beta**counts)
    return (weights / weights.mean()).float()


def log_prior(class_counts: Tensor | Sequence[int]) -> Tensor:
    """The log frequency of every class.

    Args:
        class_counts: training samples of each class [C]. A class without any is taken for as
            frequent as the rarest that has some.

    Returns:
        float [C], in nats, at most 0.

    Raises:
        ValueError: no class with samples.
    """
    counts = _counts(class_counts)
    log_share = (counts / counts.sum()).log()
    return log_share.clamp(min=log_share[counts > 0].min()).float()


def _counts(class_counts: Tensor | Sequence[int]) -> Tensor:
    counts = torch.as_tensor(class_counts).detach().cpu().double()
    known = counts.isfinite() & (counts >= 0)
    if counts.dim() != 1 or not bool(known.all()) or not bool((counts > 0).any()):
        raise ValueError(
            f"class_counts is {counts.tolist()}, expected a number of samples for each class, "
            "above 0 for one at least: count the training labels by kd_balance.data.class_counts."
        )
    return counts
