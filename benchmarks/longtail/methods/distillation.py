"""Students with a teacher whose loss weights are fixed or follow a formula."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_balance import WeightedKDLoss
from kd_balance.hard_losses import BalancedSoftmax
from kd_balance.soft_losses import BalancedKL, DecoupledKD, FlattenedKL
from longtail.data import Task
from longtail.methods.base import Method
from longtail.protocol import Protocol


class KD(Method):
    """Half cross entropy, half T² · KL(teacher ‖ student).

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    Derived from it are logit adjustment (Menon et al. 2021, eq. 9), plain and with a chosen tau,
    and the control whose classifier is trained anew on the meta set (Kang et al., "Decoupling
    Representation and Classifier for Long-Tailed Recognition", 2020, section 4, there with
    class-balanced sampling).
    """

    derived = ("logit-adjustment", "tuned-adjustment", "retrain")
    alpha: ClassVar[float] = 0.5

    def __init__(self, task: Task, protocol: Protocol, seed: int, **options: int) -> None:
        super().__init__(task, protocol, seed, **options)
        self._loss = WeightedKDLoss(temperature=protocol.temperature, alpha=self.alpha)

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        return self._loss(student_logits, teacher_logits, targets)


class KDWithMeta(KD):
    """Control: KD with the meta set added to the training set."""

    derived = ()
    meta_copies = 1


class KDHalf(KD):
    """A candidate of :class:`KDChosen`."""

    derived = ()


class KDSoft(KDHalf):
    """A candidate of :class:`KDChosen`; the weights are those of RepDistiller."""

    alpha = 0.1


class KDHard(KDHalf):
    """A candidate of :class:`KDChosen`."""

    alpha = 0.9


class KDChosen(KD):
    """Control: KD with hard weight 0.1, 0.5 or 0.9, whichever does best on the meta set."""

    derived = ()
    cost = 3.0

    def candidates(self) -> list[Method]:
        return [kind(self.task, self.protocol, self.seed) for kind in (KDSoft, KDHalf, KDHard)]


class BalancedSoftmaxKD(Method):
    """KD whose hard loss is balanced softmax (Ren et al. 2020, eq. 4).

    Args:
        hard, soft: weights of the two losses.
        tail: power of a class's frequency by which its hard weight falls, `hard` on average over
            the training samples: what of BiKD's gain a formula has too.
        robust: q of generalized cross entropy (Zhang, Sabuncu, "Generalized Cross Entropy Loss for
            Training Deep Neural Networks with Noisy Labels", 2018, eq. 6), which samples with an
            unlikely label hardly move: (1 − exp(−q · h)) / q in place of the hard loss h.
        debias: as for every method.
    """

    derived = ("tuned-adjustment",)

    def __init__(
        self,
        task: Task,
        protocol: Protocol,
        seed: int,
        *,
        hard: float = 0.5,
        soft: float = 0.5,
        tail: float = 0.0,
        robust: float = 0.0,
        debias: int = 0,
    ) -> None:
        super().__init__(task, protocol, seed, debias=debias)
        self._loss = WeightedKDLoss(
            temperature=protocol.temperature,
            alpha=(hard, soft),
            hard_loss=_HardLoss(self.counts, tail, robust),
        )

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        return self._loss(student_logits, teacher_logits, targets)


class _HardLoss(BalancedSoftmax):
    """Balanced softmax, robust on demand, weighted by a power of the class's frequency.

    The weight is 1 on average over the training samples.
    """

    def __init__(self, counts: Tensor, power: float, robust: float) -> None:
        super().__init__(counts)
        self._robust = robust
        weight = counts.double() ** -power
        self.register_buffer("weight", (weight * counts.sum() / (weight * counts).sum()).float())

    def forward(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        weight = self.weight.to(student_logits)
        loss = super().forward(student_logits, targets)
        if self._robust:
            loss = -torch.expm1(-self._robust * loss) / self._robust
        return weight[targets] * loss


class BalancedSoftmaxKDWithMeta(BalancedSoftmaxKD):
    """Control: balanced softmax and KD with the meta set added to the training set.

    Args:
        copies: how often, so that its samples weigh more.
    """

    def __init__(
        self, task: Task, protocol: Protocol, seed: int, *, copies: int = 1, **options: float
    ) -> None:
        self.meta_copies = copies
        super().__init__(task, protocol, seed, **options)


class Sweep(BalancedSoftmaxKDWithMeta):
    """The honest rival of learned weights: eight fixed settings, the best on validation counts.

    Both weights are ¼, ½, 1 or 2, and the hard one falls with the frequency of the class or does
    not. The teacher is debiased and the meta set is added, and the time of all eight is summed.
    """

    derived = ()
    cost = 8.0
    chosen_on = "validation"

    def __init__(self, task: Task, protocol: Protocol, seed: int) -> None:
        super().__init__(task, protocol, seed, debias=1)

    def candidates(self) -> list[Method]:
        return [
            BalancedSoftmaxKDWithMeta(
                self.task, self.protocol, self.seed, hard=size, soft=size, tail=tail, debias=1
            )
            for size in (0.25, 0.5, 1.0, 2.0)
            for tail in (0.0, 0.4)
        ]


class DKD(Method):
    """Cross entropy plus decoupled KD with weights 1 and 8, brought in over a twelfth of training.

    Source: Zhao et al., "Decoupled Knowledge Distillation", 2022, eq. 7; weights and the warm-up
    (20 of 240 epochs) as its authors set them for resnet32x4 and resnet8x4.
    """

    def __init__(self, task: Task, protocol: Protocol, seed: int, **options: int) -> None:
        super().__init__(task, protocol, seed, **options)
        self._soft = DecoupledKD(1.0, 8.0, protocol.temperature)

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        soft = self._soft(student_logits, teacher_logits, targets).mean()
        return F.cross_entropy(student_logits, targets) + min(12 * progress, 1.0) * soft


class BalancedKD(Method):
    """Cross entropy plus KL to the teacher weighted by class, T = 2.

    Source: Zhang et al., "Balanced Knowledge Distillation for Long-tailed Learning", 2021, eq. 8.
    As in its authors' program the class weights are held back to the last fifth of training where
    there are 10 classes, and used throughout where there are more.
    """

    def __init__(self, task: Task, protocol: Protocol, seed: int, **options: int) -> None:
        super().__init__(task, protocol, seed, **options)
        self._balanced = WeightedKDLoss(alpha=(1, 1), soft_loss=BalancedKL(task.counts, 2.0))
        self._plain = WeightedKDLoss(alpha=(1, 1), temperature=2.0)

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        wait = self.task.num_classes <= 10 and progress <= 0.8
        kind = self._plain if wait else self._balanced
        return kind(student_logits, teacher_logits, targets)


class DiVE(Method):
    """Balanced softmax, and KL to a teacher flattened by the power 0.5, half each.

    Source: He, Wu, Wei, "Distilling Virtual Examples for Long-tailed Recognition", 2021, its loss
    with power normalisation; the paper tunes the mixture by data set, here it is that of KD. Its
    teacher is trained with balanced softmax, the debiased one here.
    """

    def __init__(self, task: Task, protocol: Protocol, seed: int, **options: int) -> None:
        super().__init__(task, protocol, seed, **options)
        soft = FlattenedKL(protocol.temperature, power=0.5)
        self._loss = WeightedKDLoss(hard_loss=BalancedSoftmax(task.counts), soft_loss=soft)

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        return self._loss(student_logits, teacher_logits, targets)


class WeightedSoftLabels(Method):
    """Cross entropy plus 2.5 · T² · (1 − exp(−h_student / h_teacher)) · soft cross entropy.

    h is the cross entropy with the label, of student and teacher, without gradient.

    Source: Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
    Tradeoff Perspective", 2021, eq. 9 and 10; the factor 2.5 is that of the authors' program, for
    temperature 2.
    """

    strength: ClassVar[float] = 2.5

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        temperature = self.protocol.temperature
        hard = F.cross_entropy(student_logits, targets, reduction="none")
        teacher_hard = F.cross_entropy(teacher_logits, targets, reduction="none")
        weight = 1 - torch.exp(-hard.detach() / teacher_hard.clamp(min=1e-7))
        soft_labels = (teacher_logits / temperature).softmax(1)
        soft = F.cross_entropy(student_logits / temperature, soft_labels, reduction="none")
        return (hard + self.strength * temperature**2 * weight * soft).mean()


class BalancedDivergences(Method):
    """Cross entropy plus forward and reverse KL, one of the two counting double by sample.

    A student that is surer than its teacher (lower entropy) gets the double weight on the forward
    KL, which spreads it; any other gets it on the reverse KL.

    Source: Amara et al., "BD-KD: Balancing the Divergences for Online Knowledge Distillation",
    2022, the student's loss, with a fixed teacher. Written from the abstract's idea: that the
    larger weight is 2, and which divergence gets it, are choices made here.
    """

    larger: ClassVar[float] = 2.0

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        temperature = self.protocol.temperature
        student = (student_logits / temperature).log_softmax(1)
        teacher = (teacher_logits / temperature).log_softmax(1)
        forward = (teacher.exp() * (teacher - student)).sum(1)
        reverse = (student.exp() * (student - teacher)).sum(1)
        entropy = [-(p.exp() * p).sum(1).detach() for p in (student, teacher)]
        surer = (entropy[0] < entropy[1]).to(student)
        extra = self.larger - 1
        soft = (1 + extra * surer) * forward + (1 + extra * (1 - surer)) * reverse
        return F.cross_entropy(student_logits, targets) + temperature**2 * soft.mean()


class LongTailedKD(Method):
    """Cross entropy plus the KL between class groups and the KL within them, both rebalanced.

    KL(teacher ‖ student) is the KL of the probabilities of the groups many, medium and few plus
    the KLs within each group, weighted by the teacher's probability of the group. Here the
    teacher's group probabilities are scaled so that their mean over the batch is equal for all
    groups, and the groups weigh the same within.

    Source: Kim, "Distilling Balanced Knowledge from a Biased Teacher" (LTKD), 2025/2026, the
    rebalanced cross-group and the reweighted within-group loss; both with factor one here.
    """

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, progress: float
    ) -> Tensor:
        temperature = self.protocol.temperature
        student = (student_logits / temperature).log_softmax(1)
        teacher = (teacher_logits / temperature).log_softmax(1)
        groups = list(self.task.groups.values())
        student_groups = torch.stack([student[:, group].logsumexp(1) for group in groups], 1)
        teacher_groups = torch.stack([teacher[:, group].logsumexp(1) for group in groups], 1)
        scaled = teacher_groups.exp() / teacher_groups.exp().mean(0)
        scaled = scaled / scaled.sum(1, keepdim=True)
        cross = F.kl_div(student_groups, scaled, reduction="batchmean")
        within = [
            F.kl_div(
                student[:, group].log_softmax(1),
                teacher[:, group].log_softmax(1),
                reduction="batchmean",
                log_target=True,
            )
            for group in groups
        ]
        soft = cross + torch.stack(within).mean()
        return F.cross_entropy(student_logits, targets) + temperature**2 * soft
