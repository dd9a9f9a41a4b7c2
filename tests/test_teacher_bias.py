"""prior_bias finds how much of the class frequencies a teacher has learned."""

import pytest
import torch
import torch.nn.functional as F

from kd_balance.teacher_bias import prior_bias
from tests.habits import assert_one_sentence

COUNTS = torch.tensor([600, 200, 50, 10])
LOG_PRIOR = (COUNTS / COUNTS.sum()).log()


def balanced(strength, count=4000):
    """Logits of a calibrated teacher on a balanced set, shifted by `strength` log frequencies."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 4, generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return logits + strength * LOG_PRIOR, targets


@pytest.mark.parametrize("strength", [-0.5, 0.0, 0.4, 1.0, 1.5])
def test_it_finds_the_bias_of_a_calibrated_teacher(strength):
    bias = prior_bias(*balanced(strength), COUNTS)
    found = bias / LOG_PRIOR
    torch.testing.assert_close(found, torch.full((4,), strength), rtol=0, atol=0.1)


def test_no_other_strength_has_a_lower_loss():
    logits, targets = balanced(1.0, count=60)
    strength = (prior_bias(logits, targets, COUNTS.tolist()) / LOG_PRIOR)[0].item()

    def loss(tau):
        shifted = logits - tau * LOG_PRIOR
        others = [
            F.cross_entropy(row[torch.arange(4) != label], torch.full((3,), 1 / 3))
            for row, label in zip(shifted, targets)
        ]
        return (F.cross_entropy(shifted, targets) + torch.stack(others).mean() / 20).item()

    others = [strength + nudge for nudge in (-1, -0.1, 0.1, 1)]
    assert all(loss(strength) < loss(other) for other in others)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_labels_known_by_heart_do_not_hide_the_bias(strength):
    logits, targets = balanced(strength)
    logits += 30 * F.one_hot(targets, 4)
    found = prior_bias(logits, targets, COUNTS) / LOG_PRIOR
    torch.testing.assert_close(found, torch.full((4,), strength), rtol=0, atol=0.2)


def test_a_sure_teacher_and_equal_classes_get_no_bias():
    targets = torch.arange(4).repeat(5)
    sure = 40.0 * F.one_hot(targets, 4)
    assert prior_bias(sure, targets, COUNTS).abs().max() < 1e-6
    assert prior_bias(*balanced(0.0, count=60), [7, 7, 7, 7]).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_has_the_dtype_of_the_logits_and_no_gradient(dtype):
    logits, targets = balanced(1.0)
    bias = prior_bias(logits.to(dtype).requires_grad_(), targets, COUNTS)
    assert bias.dtype == dtype and not bias.requires_grad


@pytest.mark.parametrize(
    "message, kept, labels, counts",
    [
        ("teacher_logits have shape", 9, 8, COUNTS),
        ("teacher_logits have shape", 0, 0, COUNTS),
        ("class_counts has . numbers", 9, 9, COUNTS[1:]),
        ("class_counts is", 9, 9, 0 * COUNTS),
    ],
)
def test_what_does_not_belong_together_is_refused(message, kept, labels, counts):
    logits, targets = balanced(1.0)
    with pytest.raises(ValueError, match=message) as error:
        prior_bias(logits[:kept], targets[:labels], counts)
    assert_one_sentence(error)
