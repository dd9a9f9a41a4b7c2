"""Rows of an embedding whose gradient the loop's backward pass drops or scales."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.habits import Lab, assert_differentiates, plain
from tests.students import CLASSES


class Tied(nn.Module):
    """Words in, a word out, by one table; the padding row stands for a word like any other."""

    options = {"padding_idx": 0}

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 6, **self.options)
        self.embed.weight.data.normal_()
        self.body = nn.Linear(6, 6)

    def hidden(self, words):
        return torch.tanh(self.body(self.embed(words))).sum(1)

    def forward(self, inputs):
        words = (1.5 * inputs[:, :4].abs()).long() % CLASSES
        return self.hidden(words) @ self.embed.weight.T


class Normalised(Tied):
    """Which goes through forward over reverse instead of double backward."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def hidden(self, words):
        return self.norm(super().hidden(words))


class Checkpointed(Tied):
    def hidden(self, words):
        return checkpoint(super().hidden, words, use_reentrant=False)


class Bounded(Tied):
    options = {"padding_idx": -2, "max_norm": 1.5}


class Scaled(Tied):
    options = {"scale_grad_by_freq": True}


class Both(Normalised):
    options = {"padding_idx": 1, "scale_grad_by_freq": True}


STUDENTS = [Tied, Normalised, Checkpointed, Bounded, Scaled, Both]


@pytest.mark.parametrize("steps, engine", [(3, "adjoint"), (1, "unroll")])
@pytest.mark.parametrize("make", STUDENTS)
def test_the_step_drops_them_and_no_other_derivative_does(make, steps, engine):
    assert_differentiates(
        plain(steps), steps=steps, rtol=1e-6, make=make, settings={"engine": engine}
    )


def test_beside_another_loss():
    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(1):
            lab.optimizer.zero_grad()
            logits = lab.called(inputs)
            loss = lab.criterion(logits, teacher_logits, labels) + 0.1 * logits.square().mean()
            loss.backward()
            lab.optimizer.step()

    assert_differentiates(loop, rtol=1e-6, make=Tied)


@pytest.mark.parametrize("make", [Tied, Scaled])
def test_gradients_under_new_weights_drop_them_too(make):
    lab = Lab(make=make, optimizer="sgd")
    lab.wrap(rate=1.0, method="lookahead")
    before = copy.deepcopy(lab.student)
    (batch,) = lab.batches(1)
    inputs, teacher_logits, labels = batch
    lab.criterion(lab.student(inputs), teacher_logits, labels).backward()
    old = lab.student.embed.weight.grad.clone()
    lab.optimizer.step()
    lab.optimizer.close()
    lab.criterion(before(inputs), teacher_logits, labels).backward()
    assert (lab.student.embed.weight.grad - old).norm() > 1e-3 * old.norm()
    for param, expected in zip(lab.student.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(param.grad, expected.grad)
