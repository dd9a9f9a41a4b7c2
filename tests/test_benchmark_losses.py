"""The drop-in losses, each against its paper's formula written out another way."""

import pytest
import torch
import torch.nn.functional as F

from kd_balance import WeightedKDLoss
from kd_balance.hard_losses import (
    BalancedSoftmax,
    ClassBalancedCrossEntropy,
    effective_number_weights,
)
from kd_balance.soft_losses import BalancedKL, DecoupledKD, FlattenedKL, temperature_kl

COUNTS = [50, 10, 4]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    return student, teacher, torch.tensor([0, 1, 2, 0, 1, 2])


def test_balanced_softmax_is_the_softmax_weighted_by_counts(batch):
    student, _, targets = batch
    weighted = student.exp() * torch.tensor(COUNTS)
    expected = -(weighted[range(6), targets] / weighted.sum(1)).log()
    torch.testing.assert_close(BalancedSoftmax(COUNTS)(student, targets), expected)


def test_balanced_softmax_of_equal_counts_or_no_strength_is_cross_entropy(batch):
    student, _, targets = batch
    expected = F.cross_entropy(student, targets, reduction="none")
    torch.testing.assert_close(BalancedSoftmax([7, 7, 7])(student, targets), expected)
    torch.testing.assert_close(BalancedSoftmax(COUNTS, strength=0)(student, targets), expected)


def test_balanced_softmax_takes_probabilities(batch):
    student, _, targets = batch
    one_hot = F.one_hot(targets, 3).double()
    loss = BalancedSoftmax(COUNTS)
    torch.testing.assert_close(loss(student, one_hot), loss(student, targets))


def test_a_class_without_samples_takes_no_part_in_balanced_softmax(batch):
    student, _, targets = batch
    head = torch.cat((student, 9 * torch.ones(6, 1)), dim=1).requires_grad_()  # a fourth class
    hard_loss = BalancedSoftmax([*COUNTS, 0])
    expected = BalancedSoftmax(COUNTS)(student, targets)
    for given in (targets, F.one_hot(targets, 4).to(student)):
        loss = hard_loss(head, given)
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss.sum(), head, create_graph=True)
        (second,) = torch.autograd.grad(gradient[:, 0].sum(), head)
        for derivative in (gradient, second):
            assert derivative.isfinite().all() and not derivative[:, 3].any()
    assert hard_loss(head, torch.full_like(targets, 3)).isinf().all()
    plain = BalancedSoftmax([*COUNTS, 0], strength=0)(head, targets)
    torch.testing.assert_close(plain, F.cross_entropy(head, targets, reduction="none"))


def test_effective_numbers_run_from_equal_weights_to_inverse_counts():
    torch.testing.assert_close(effective_number_weights(COUNTS, 0.0), torch.ones(3))
    near_one = effective_number_weights(COUNTS, 1 - 1e-9)
    torch.testing.assert_close(near_one * torch.tensor(COUNTS), near_one[0].expand(3) * 50)


def test_class_balanced_cross_entropy_weighs_by_the_label(batch):
    student, _, targets = batch
    loss = ClassBalancedCrossEntropy(COUNTS, beta=0.99)(student, targets)
    weights = effective_number_weights(COUNTS, 0.99).double()
    plain = F.cross_entropy(student, targets, reduction="none")
    torch.testing.assert_close(loss, plain * weights[targets])


def test_flattened_kl_is_kl_to_the_powered_probabilities(batch):
    student, teacher, _ = batch
    powered = (teacher / 2).softmax(1) ** 0.5
    powered = powered / powered.sum(1, keepdim=True)
    expected = 4 * (powered * (powered.log() - (student / 2).log_softmax(1))).sum(1)
    torch.testing.assert_close(FlattenedKL(2.0, 0.5)(student, teacher), expected)
    plain = temperature_kl(student, teacher, 2.0)
    torch.testing.assert_close(FlattenedKL(2.0, power=1)(student, teacher), plain)


def test_balanced_kl_weights_the_teachers_probabilities_by_class(batch):
    student, teacher, _ = batch
    weighted = (teacher / 2).softmax(1) * effective_number_weights(COUNTS, 0.99).double()
    weighted = weighted / weighted.sum(1, keepdim=True)
    expected = 4 * (weighted * (weighted.log() - (student / 2).log_softmax(1))).sum(1)
    torch.testing.assert_close(BalancedKL(COUNTS, 2.0, 0.99)(student, teacher), expected)


def test_decoupled_kd_with_the_teachers_own_weight_is_kl(batch):
    """KL = TCKD + (1 − p_target) · NCKD, eq. 5 of the paper."""
    student, teacher, targets = batch
    target = DecoupledKD(1, 0, temperature=3.0)(student, teacher, targets)
    other = DecoupledKD(0, 1, temperature=3.0)(student, teacher, targets)
    rest = 1 - (teacher / 3).softmax(1)[range(6), targets]
    torch.testing.assert_close(target + rest * other, temperature_kl(student, teacher, 3.0))


def test_a_class_without_samples_weighs_as_much_as_the_rarest():
    weights = effective_number_weights([*COUNTS, 0], 0.99)
    assert weights[-1] == weights.max()
    torch.testing.assert_close(weights[:-1] / weights[0], effective_number_weights(COUNTS, 0.99) /
                               effective_number_weights(COUNTS, 0.99)[0])


def test_the_losses_fit_into_the_criterion_and_send_gradients(batch):
    student, teacher, targets = batch
    student = student.clone().requires_grad_()
    criterion = WeightedKDLoss(hard_loss=BalancedSoftmax(COUNTS), soft_loss=BalancedKL(COUNTS))
    criterion(student, teacher, targets).backward()
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: BalancedSoftmax([0, 0]), "above 0 for one at least"),
        (lambda: ClassBalancedCrossEntropy([0, 0]), "above 0 for one at least"),
        (lambda: ClassBalancedCrossEntropy(COUNTS, beta=1.0), "beta is 1.0"),
        (lambda: FlattenedKL(power=0), "power is 0"),
        (lambda: DecoupledKD(temperature=0), "temperature is 0"),
    ],
)
def test_bad_arguments_get_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
