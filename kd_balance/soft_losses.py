"""Soft losses, to take the temperature KL's place in ``WeightedKDLoss``.

Each maps (student_logits [N, C], teacher_logits [N, C]) to one loss a sample, [N]. A class whose
logit is −∞ in both, as those that pad a vocabulary, has no part in it. A true attribute ``by_rows``
says that a sample's loss is of its own logits alone: large logits are then looked at in chunks.
:class:`DecoupledKD` also needs the targets, because it treats the label's class apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_balance.hard_losses import effective_number_weights


class FlattenedKL(nn.Module):
    """KL to a teacher whose probabilities are flattened by a power before the comparison.

    Args:
        temperature: T, above 0, which softens student and teacher.
        power: in (0, 1]: the teacher's probabilities are raised to it and normalised again; 1 is
            the plain temperature KL.

    Calling it with student_logits and teacher_logits [N, C] gives T² · KL, [N].

    Raises:
        ValueError: temperature or power out of its range.

    Source: He, Wu, Wei, "Distilling Virtual Examples for Long-tailed Recognition" (DiVE), 2021:
    the virtual examples' power normalisation, 0.5 in the paper.
    """

    by_rows = True

    def __init__(self, temperature: float = 4.0, power: float = 0.5) -> None:
        super().__init__()
        self.temperature = _positive("temperature", temperature)
        if not 0 < power <= 1:
            raise ValueError(f"power is {power}, expected a number above 0 and at most 1.")
        self.power = power

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        teacher = (self.power * teacher_logits / self.temperature).log_softmax(1)
        return _scaled_kl(student_logits, teacher, self.temperature)


class BalancedKL(nn.Module):
    """KL to a teacher whose probabilities are weighted by class and normalised again.

    Args:
        class_counts: training samples of each class [C]; rare classes weigh more, by their
            effective number of samples, and one without any as much as the rarest.
        temperature: T, above 0, which softens student and teacher.
        beta: in [0, 1), of the effective number.

    Calling it with student_logits and teacher_logits [N, C] gives T² · KL, [N].

    Raises:
        ValueError: an argument out of its range.

    Source: Zhang et al., "Balanced Knowledge Distillation for Long-tailed Learning", 2021, eq. 8;
    the weights are those of Cui et al. 2019, eq. 2.
    """

    by_rows = True
    log_weight: Tensor

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        temperature: float = 2.0,
        beta: float = 0.9999,
    ) -> None:
        super().__init__()
        self.temperature = _positive("temperature", temperature)
        self.register_buffer("log_weight", effective_number_weights(class_counts, beta).log())

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        weighted = teacher_logits / self.temperature + self.log_weight.to(teacher_logits)
        return _scaled_kl(student_logits, weighted.log_softmax(1), self.temperature)


class DecoupledKD(nn.Module):
    """KL split into the label's class against the rest, and the rest among themselves.

    Args:
        target_weight: alpha, of the KL between (label, not label) probabilities.
        other_weight: beta, of the KL among the other classes, which ordinary distillation scales
            down by the teacher's confidence.
        temperature: T, above 0.

    Calling it with student_logits, teacher_logits [N, C] and class indices [N] gives
    T² · (alpha · TCKD + beta · NCKD), [N].

    Raises:
        ValueError: a temperature out of its range.

    Source: Zhao et al., "Decoupled Knowledge Distillation", 2022, eq. 7.
    """

    by_rows = True
    needs_targets = True

    def __init__(
        self, target_weight: float = 1.0, other_weight: float = 8.0, temperature: float = 4.0
    ) -> None:
        super().__init__()
        self.target_weight = target_weight
        self.other_weight = other_weight
        self.temperature = _positive("temperature", temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        is_label = F.one_hot(targets, student_logits.shape[1]).bool()
        student_two, student_rest = self._decouple(student_logits, is_label)
        teacher_two, teacher_rest = self._decouple(teacher_logits, is_label)
        target = kl_divergence(student_two, teacher_two)
        other = kl_divergence(student_rest, teacher_rest)
        return (self.target_weight * target + self.other_weight * other) * self.temperature**2

    def _decouple(self, logits: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor]:
        """Log probabilities [N, 2] of label and rest, and [N, C − 1] within the rest."""
        logits = logits / self.temperature
        label = logits[is_label].unsqueeze(1)
        rest = logits[~is_label].view(len(logits), -1)
        two = torch.cat((label, rest.logsumexp(1, keepdim=True)), dim=1)
        return two.log_softmax(1), rest.log_softmax(1)


class ReverseKL(nn.Module):
    """KL(student ‖ teacher): where the teacher gives no probability the student gives none either.

    Args:
        temperature: T, above 0, which softens student and teacher.

    Calling it with student_logits and teacher_logits [N, C] gives T² · KL, [N]; infinite where the
    teacher alone has −∞.

    Raises:
        ValueError: a temperature out of its range.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", 2024; here token
    by token on given text, as in Agarwal et al. 2024.
    """

    by_rows = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = _positive("temperature", temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        student, teacher = _both(student_logits, teacher_logits, self.temperature)
        return kl_divergence(teacher, student) * self.temperature**2


class GeneralizedJSD(nn.Module):
    """Jensen-Shannon divergence, with the teacher's share in the mixture to choose.

    Args:
        beta: in (0, 1), the teacher's share: near 0 it goes the way of KL(teacher ‖ student), near
            1 that of the reverse KL, times beta and 1 − beta.
        temperature: T, above 0, which softens student and teacher.

    Calling it with student_logits and teacher_logits [N, C] gives, with the mixture M of beta
    teacher and 1 − beta student, T² · (beta · KL(teacher ‖ M) + (1 − beta) · KL(student ‖ M)), [N].

    Raises:
        ValueError: beta or temperature out of its range.

    Source: Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
    Mistakes" (GKD), 2024.
    """

    by_rows = True

    def __init__(self, beta: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        self.beta = _share("beta", beta)
        self.temperature = _positive("temperature", temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        student, teacher = _both(student_logits, teacher_logits, self.temperature)
        mixture = _mixture(teacher, student, self.beta)
        of_teacher = self.beta * kl_divergence(mixture, teacher)
        of_student = (1 - self.beta) * kl_divergence(mixture, student)
        return (of_teacher + of_student) * self.temperature**2


class SkewedKL(nn.Module):
    """KL to a mixture of both distributions, whose gradient stays bounded.

    Args:
        alpha: in (0, 1), the share of the distribution that the KL is of.
        reverse: of the student instead of the teacher.
        temperature: T, above 0, which softens student and teacher.

    Calling it with student_logits and teacher_logits [N, C] gives
    T² · KL(teacher ‖ alpha · teacher + (1 − alpha) · student), [N], and in reverse
    T² · KL(student ‖ alpha · student + (1 − alpha) · teacher).

    Raises:
        ValueError: alpha or temperature out of its range.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", 2024.
    """

    by_rows = True

    def __init__(
        self, alpha: float = 0.1, reverse: bool = False, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.alpha = _share("alpha", alpha)
        self.reverse = reverse
        self.temperature = _positive("temperature", temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        other, of = _both(student_logits, teacher_logits, self.temperature)
        if self.reverse:
            other, of = of, other
        return kl_divergence(_mixture(of, other, self.alpha), of) * self.temperature**2


def temperature_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of every sample, both softened by the temperature T.

    Args:
        student_logits, teacher_logits: [N, C]; a class of −∞ in both has no part in it.
        temperature: T, above 0.

    Returns:
        [N], in nats times T²; infinite where the student alone has −∞.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, eq. 1.
    """
    teacher = (teacher_logits / temperature).log_softmax(1)
    return _scaled_kl(student_logits, teacher, temperature)


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of log probabilities [N, C], [N]; 0 · ∞ counts as 0."""
    probabilities = teacher.exp()
    # before the product, whose derivative by the probabilities would not be a number
    difference = (teacher - student).masked_fill(probabilities == 0, 0.0)
    return (probabilities * difference).sum(1)


def _scaled_kl(student_logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    student = (student_logits / temperature).log_softmax(1)
    return kl_divergence(student, teacher) * temperature**2


def _both(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log probabilities of both."""
    return (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)


def _mixture(one: Tensor, other: Tensor, share: float) -> Tensor:
    """The log of share · one + (1 − share) · other, all in log probabilities."""
    mixed = share * one.exp() + (1 - share) * other.exp()
    return mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()  # −∞ would have no derivative


def _share(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(
            f"{name} is {value}, expected a number between 0 and 1: at the ends there are "
            "WeightedKDLoss's own KL and ReverseKL."
        )
    return value


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} is {value}, expected a number above 0.")
    return value
