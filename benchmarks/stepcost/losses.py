"""The losses of the hand-written rows, in the fewest operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepcost.case import TEMPERATURE


def sample_losses(logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """Hard and soft loss of every sample, [N, 2]."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    hard = F.cross_entropy(logits, targets, reduction="none")
    student = (logits / TEMPERATURE).log_softmax(1)
    teacher = (teacher_logits / TEMPERATURE).log_softmax(1)
    soft = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return torch.stack((hard, TEMPERATURE**2 * soft), 1)


def weight_features(losses: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """What the weight net sees, [N, 2]: cross entropy of student and teacher."""
    teacher = F.cross_entropy(teacher_logits, targets, reduction="none")
    return torch.stack((losses[:, 0], teacher), 1)


def meta_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets)
