"""The soft losses that language models are distilled by, against their definitions."""

import pytest
import torch

from kd_balance import chunks
from kd_balance.soft_losses import GeneralizedJSD, ReverseKL, SkewedKL, temperature_kl
from tests.habits import assert_one_sentence


def kl(p, q):
    return (p * (p / q).log()).sum(1)


DEFINITIONS = {
    "reverse": (ReverseKL, {}, lambda p, q: kl(q, p)),
    "jsd": (
        GeneralizedJSD,
        {"beta": 0.3},
        lambda p, q: 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q),
    ),
    "skewed": (SkewedKL, {"alpha": 0.1}, lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    "skewed reverse": (
        SkewedKL, {"alpha": 0.2, "reverse": True}, lambda p, q: kl(q, 0.2 * q + 0.8 * p)
    ),
}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_it_is_its_definition(name, temperature):
    kind, settings, definition = DEFINITIONS[name]
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64).unbind()
    p, q = ((x / temperature).softmax(1) for x in (teacher, student))
    loss = kind(**settings, temperature=temperature)(student, teacher)
    torch.testing.assert_close(loss, temperature**2 * definition(p, q))
    assert loss.min() > 0
    zero = kind(**settings)(teacher, teacher)
    torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", [*DEFINITIONS, "temperature"])
def test_both_derivatives_exist_beside_classes_that_are_masked_or_improbable(name):
    loss = lambda s, t: temperature_kl(s, t, 2.0)  # noqa: E731
    if name in DEFINITIONS:
        kind, settings, _ = DEFINITIONS[name]
        loss = kind(**settings)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    teacher[0, 1] = -900.0  # a probability that is 0 all the same
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([0.0, 0.0, 0.0, 0.0, float("-inf")], dtype=torch.float64)

    def masked(s):
        padded = (torch.cat((x, torch.zeros(3, 1)), dim=1) + mask for x in (s, teacher))
        return loss(*padded)

    torch.testing.assert_close(masked(student), loss(student, teacher))
    assert torch.autograd.gradcheck(masked, student)
    assert torch.autograd.gradgradcheck(masked, student)


def test_the_ends_of_the_divergence_are_both_kls():
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64).unbind()
    for beta, end in ((1e-6, temperature_kl(student, teacher, 1.0)),
                      (1 - 1e-6, ReverseKL()(student, teacher))):
        near = GeneralizedJSD(beta)(student, teacher) / min(beta, 1 - beta)
        torch.testing.assert_close(near, end, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_large_logits_are_looked_at_in_chunks(name):
    kind, settings, _ = DEFINITIONS[name]
    loss = kind(**settings)
    student, teacher = torch.randn(2, 9, 40_000).unbind()
    assert loss.by_rows and student.numel() > chunks.CPU_CHUNK
    whole = loss(student, teacher)
    torch.testing.assert_close(chunks.by_chunks(loss, student, teacher), whole)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GeneralizedJSD(beta=0),
        lambda: GeneralizedJSD(beta=1.0),
        lambda: SkewedKL(alpha=-0.1),
        lambda: ReverseKL(temperature=0),
        lambda: SkewedKL(temperature=-1),
    ],
)
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(ValueError) as error:
        make()
    assert_one_sentence(error)
