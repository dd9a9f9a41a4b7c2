"""What a method is: a loss on the student's logits, and perhaps a say in the optimizer."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from longtail.data import Task
from longtail.meta_batches import MetaBatches
from longtail.protocol import Protocol


class Method:
    """One row of the table.

    A subclass gives :meth:`loss`, and overrides of the rest what it needs.

    Attributes:
        meta_copies: how often the meta set is in the training set.
        derived: what else is made of the trained student, names in ``longtail.afterwards``.
        cost: time of a run in units of a plain one, roughly, for the progress bar alone.
        criterion: the WeightedKDLoss with a weight net whose weights are to be recorded.
        chosen_on: the set whose accuracy decides between candidates, an attribute of the task.
        debiases: whether the teacher's logits lose their ``prior_bias``, found on the meta set.
    """

    meta_copies: int = 0
    derived: ClassVar[tuple[str, ...]] = ()
    cost: float = 1.0
    criterion: nn.Module | None = None
    chosen_on: ClassVar[str] = "meta_set"

    def __init__(self, task: Task, protocol: Protocol, seed: int, *, debias: int = 0) -> None:
        self.task = task
        self.protocol = protocol
        self.seed = seed
        self.debiases = bool(debias)

    @property
    def counts(self) -> Tensor:
        """Samples of each class that the student is trained on, [C]."""
        return self.task.counts + self.meta_copies * self.protocol.meta_per_class

    def samples(self) -> Tensor:
        """Pool indices of one epoch."""
        return torch.cat((self.task.train, self.task.meta.repeat(self.meta_copies)))

    def candidates(self) -> list[Method]:
        """Methods of which the one with the best accuracy on the set `chosen_on` counts."""
        return [self]

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            student_logits, teacher_logits: [B, C].
            targets: class indices [B].
            progress: share of the epochs, the running one included, in (0, 1].
        """
        raise NotImplementedError

    def wrap(self, optimizer: Optimizer, student: nn.Module, meta: MetaBatches) -> Optimizer:
        """The optimizer that takes the student's steps."""
        return optimizer

    def rate_decayed(self) -> None:
        """Called when a step schedule has lowered the student's learning rate."""
