"""Teachers of whom only the largest probabilities are known, as caches and servers give them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TopK(NamedTuple):
    """The k most probable classes of every position, in place of teacher logits.

    The mass that they leave is taken to be spread evenly over the other classes: it is with this
    distribution that temperatures, soft losses and features are computed, exactly. It is laid out
    over all classes for a few rows at a time, so that it takes the memory of k classes.

    Args:
        log_probs: [N, k] or [N, L, k] for ``class_dim=-1``, at temperature 1: the log softmax over
            all classes, of which k were kept; the k stand where the logits have their classes.
        indices: the same shape, int64, which classes they are.

    Example::

        >>> teacher_logits = torch.tensor([[3.0, 2.0, 0.0, 0.0]])
        >>> teacher = TopK(*teacher_logits.log_softmax(1).topk(2, dim=1))
        >>> student_logits, targets = torch.zeros(1, 4), torch.tensor([0])
        >>> from kd_balance import WeightedKDLoss
        >>> WeightedKDLoss()(student_logits, teacher, targets)
        tensor(1.1149)
        >>> WeightedKDLoss()(student_logits, teacher_logits, targets)
        tensor(1.1149)

    Source: this package's; of all distributions with these k probabilities it is the one of the
    largest entropy.
    """

    log_probs: Tensor
    indices: Tensor

    def check_shape(self, shape: Sequence[int], class_dim: int) -> None:
        """Holds it against the shape of student logits.

        Raises:
            ValueError: it does not fit them.
        """
        given = tuple(self.log_probs.shape)
        k = given[class_dim] if len(given) == len(shape) else 0
        expected = list(shape)
        expected[class_dim] = k
        if not 0 < k <= shape[class_dim] or list(given) != expected:
            raise ValueError(
                f"log_probs of a TopK teacher have shape {given}, expected that of student_logits, "
                f"{tuple(shape)}, with k of 1 to {shape[class_dim]} in the place of the classes: "
                "give one class for each position at least."
            )
        if self.indices.shape != self.log_probs.shape or self.indices.dtype != torch.long:
            raise ValueError(
                f"indices of a TopK teacher are {self.indices.dtype} of shape "
                f"{tuple(self.indices.shape)}, expected torch.int64 of shape {given}: one for each "
                "of log_probs."
            )

    def check_values(self, classes: int) -> None:
        """Looks whether rows [N, k] are a distribution; on a CPU, where that waits for nothing.

        Raises:
            ValueError: they are none.
        """
        if self.indices.device.type != "cpu" or not len(self.indices):
            return
        low, high = self.indices.min().item(), self.indices.max().item()
        if low < 0 or high >= classes:
            raise ValueError(
                f"indices of a TopK teacher go from {low} to {high}, expected classes from 0 to "
                f"{classes - 1}: give it the student's vocabulary, and a mask, (TopK(…), mask), "
                "where some positions have no teacher."
            )
        if not self.indices.sort(1).values.diff(dim=1).all():
            raise ValueError(
                "indices of a TopK teacher name a class twice at one position, expected k "
                "different ones."
            )
        total = self.log_probs.logsumexp(1).max().exp().item()
        if not total <= 1.01:  # rounded to half precision
            raise ValueError(
                f"log_probs of a TopK teacher add up to a probability of {total:.4g}, expected at "
                "most 1: take the log softmax over all classes before the top k, not logits."
            )

    def where(self, known: Tensor, classes: int) -> TopK:
        """Rows [N, k] that are the uniform distribution where a mask [N] is False."""
        known = known.unsqueeze(1)
        first = torch.arange(self.indices.shape[1], device=self.indices.device)
        return TopK(
            torch.where(known, self.log_probs, -math.log(classes)),
            torch.where(known, self.indices, first),
        )

    def dense(self, classes: int) -> Tensor:
        """Log probabilities [N, C] of rows [N, k]."""
        left = -torch.expm1(self.log_probs.logsumexp(1, keepdim=True).clamp(max=0.0))
        others = max(1, classes - self.log_probs.shape[1])
        return (left / others).log().repeat(1, classes).scatter(1, self.indices, self.log_probs)


def dense(teacher: Tensor | TopK, classes: int) -> Tensor:
    """A teacher's rows [N, C], whatever it is given as."""
    return teacher.dense(classes) if isinstance(teacher, TopK) else teacher
