"""Students without a teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd_balance.hard_losses import BalancedSoftmax, ClassBalancedCrossEntropy
from longtail.methods.base import Method


class CrossEntropy(Method):
    """Cross entropy with the label.

    Logit adjustment after training is derived from it: Menon et al., "Long-tail learning via logit
    adjustment", 2021, eq. 9.
    """

    derived = ("logit-adjustment",)

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        return F.cross_entropy(student_logits, targets)


class MetaAlone(CrossEntropy):
    """Control: cross entropy on the meta set alone, for as many steps as the others take."""

    derived = ()

    def samples(self) -> Tensor:
        return self.task.meta.repeat(-(-len(self.task.train) // len(self.task.meta)))


class BalancedSoftmaxAlone(Method):
    """Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", 2020, eq. 4."""

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        return BalancedSoftmax(self.counts)(student_logits, targets).mean()


class DeferredReweighting(Method):
    """Cross entropy, in the last fifth of the epochs weighted by effective numbers of samples.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    2019, algorithm 1 (160 of 200 epochs, beta 0.9999), without its margin.
    """

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        if progress <= 0.8:
            return F.cross_entropy(student_logits, targets)
        weighted = ClassBalancedCrossEntropy(self.counts)(student_logits, targets)
        # the mean is over the weights, as torch.nn.CrossEntropyLoss(weight) takes it
        weight = ClassBalancedCrossEntropy(self.counts).weight.to(targets.device)
        return weighted.sum() / weight[targets].sum()
