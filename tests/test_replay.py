"""Replays never touch the student: a step leaves what the plain loop would have left."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.replay import RandomState, preserved_random_state
from tests.students import EVERY_STEP, OPTIMIZERS, STUDENTS, Run, logits_of


def train(wrap, student="conv", steps=4, optimizer="sgd-momentum", **settings):
    """A plain loop of `steps`, the optimizer wrapped or not; φ does not move (its rate is 0)."""
    run = Run(student, torch.float32)
    torch.manual_seed(1)
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)))
    inner = OPTIMIZERS[optimizer](run.student.parameters())
    batches, meta = run.batches(steps), run.meta_batches(3)
    if wrap:
        inner = BilevelOptimizer(
            inner,
            run.student,
            criterion,
            torch.utils.data.DataLoader(_flat(meta), batch_size=7, shuffle=True),
            meta_optimizer=torch.optim.SGD(criterion.weight_net.parameters(), lr=0.0),
            **{**EVERY_STEP, **settings},
        )
    torch.manual_seed(2)
    for inputs, teacher_logits, labels in batches:
        loss = criterion(logits_of(run.student(inputs)), teacher_logits, labels)
        inner.zero_grad()
        loss.backward()
        inner.step()
    return run.student, inner


def _flat(batches):
    return [(x, y) for inputs, labels in batches for x, y in zip(inputs, labels)]


def everything(student):
    """What can be seen of a student from outside."""
    return {
        "parameters and buffers": {k: v.clone() for k, v in student.state_dict().items()},
        "gradients": [p.grad for p in student.parameters()],
        "requires_grad": [p.requires_grad for p in student.parameters()],
        "training": [m.training for m in student.modules()],
        "attributes": [sorted(m.__dict__) for m in student.modules()],
        "random numbers": torch.rand(3),
    }


def assert_same(actual, expected, rtol=0.0):
    actual, expected = dict(actual), dict(expected)
    assert actual.pop("attributes") == expected.pop("attributes")
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
@pytest.mark.parametrize("student", STUDENTS)
def test_online_training_leaves_exactly_what_the_plain_loop_leaves(student, engine):
    plain, _ = train(False, student)
    expected = everything(plain)
    for settings in ({}, {"every": 3, "unroll": 3}, {"every": 2, "accumulate": 2}):
        wrapped, optimizer = train(True, student, engine=engine, **settings)
        assert optimizer.metrics["meta_loss"] > 0
        assert_same(everything(wrapped), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_a_meta_update_training_is_bit_identical(optimizer):
    expected = everything(train(False, optimizer=optimizer)[0])
    wrapped, _ = train(True, optimizer=optimizer, every=10**9)
    assert_same(everything(wrapped), expected)


@pytest.mark.parametrize("method", ["lookahead", "paper"])
def test_recomputed_gradients_under_the_same_weights_are_the_plain_ones(method):
    expected = everything(train(False, "transformer")[0])
    wrapped, _ = train(True, "transformer", method=method)
    assert_same(everything(wrapped), expected, rtol=1e-5)


def test_dropout_in_a_replay_draws_the_mask_of_the_call(monkeypatch):
    """With dropout alone between input and output, the replayed losses tell the mask."""

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5, dtype=torch.float64))

        def forward(self, inputs):
            return nn.functional.dropout(inputs, 0.5) * self.scale

    student = Dropped()
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)).double(), temperature=1.0)
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.1),
        student,
        criterion,
        [(torch.randn(4, 5).double(), torch.arange(4))],
        **EVERY_STEP,
    )
    seen = []
    losses = criterion.losses
    monkeypatch.setattr(criterion, "losses", lambda *a: seen.append(losses(*a)) or seen[-1])
    inputs, labels = torch.randn(40, 5).double(), torch.arange(40) % 5
    logits = student(inputs)
    criterion(logits, torch.zeros(40, 5).double(), labels).backward()
    expected = losses(logits, torch.zeros(40, 5).double(), labels)
    torch.rand(17)
    optimizer.step()
    assert len(seen) > 1  # the first update is tried out before the student moves
    for replayed in seen:
        torch.testing.assert_close(replayed, expected, rtol=1e-12, atol=0)


def test_hooks_of_the_student_stay_and_ours_can_be_removed():
    student = nn.Linear(4, 3)
    student.register_forward_hook(lambda *_: None)
    before = copy.copy(student._forward_hooks)
    criterion = WeightedKDLoss(MetaWeightNet())
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.1),
        student,
        criterion,
        [(torch.randn(3, 4), torch.arange(3))],
        **EVERY_STEP,
    )
    criterion(student(torch.randn(5, 4)), torch.randn(5, 3), torch.arange(5) % 3).backward()
    optimizer.step()
    optimizer.close()
    assert student._forward_hooks == before
    assert not student._forward_pre_hooks and not criterion._forward_hooks


def test_nothing_is_kept_after_a_step_or_when_outputs_die():
    """Inputs are freed as in the plain loop."""
    import gc
    import weakref

    student = nn.Linear(4, 3)
    criterion = WeightedKDLoss(MetaWeightNet())
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.1),
        student,
        criterion,
        [(torch.randn(3, 4), torch.arange(3))],
        **EVERY_STEP,
    )
    unmatched = torch.randn(5, 4)
    student(unmatched)
    inputs = torch.randn(5, 4)
    loss = criterion(student(inputs), torch.randn(5, 3), torch.arange(5) % 3)
    loss.backward()
    optimizer.step()
    held = [weakref.ref(inputs), weakref.ref(unmatched)]
    del inputs, unmatched
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert loss.isfinite()


@pytest.mark.parametrize("drawn", [0, 1, 2])
@pytest.mark.parametrize(
    "draw", [np.random.rand, np.random.randn, random.random, lambda: torch.rand(())]
)
def test_random_numbers_are_what_they_were(draw, drawn):
    """Of numpy's normal numbers every second one is held back, not computed."""
    cpu = torch.device("cpu")
    torch.rand(1), random.random(), np.random.seed(0)
    for _ in range(drawn):
        draw()
    with preserved_random_state(cpu):
        before = RandomState.current(cpu)
        first = [float(draw()) for _ in range(3)]
        before.set()
        assert [float(draw()) for _ in range(3)] == first
    assert [float(draw()) for _ in range(3)] == first


def test_another_generator_of_numpy_s_own():
    cpu, usual = torch.device("cpu"), np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(0))
        with preserved_random_state(cpu):
            first = np.random.rand(3)
        assert (np.random.rand(3) == first).all()
    finally:
        np.random.set_bit_generator(usual)


def test_running_statistics_can_be_read_in_a_replay_by_hooks():
    run = Run("conv", torch.float64)
    norm = next(m for m in run.student.modules() if isinstance(m, nn.BatchNorm2d))
    seen = []
    norm.register_forward_hook(lambda m, _, __: seen.append(m.running_mean.clone()))
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)).double())
    optimizer = OPTIMIZERS["sgd"](run.student.parameters())
    meta_batches = run.meta_batches(1)
    optimizer = BilevelOptimizer(optimizer, run.student, criterion, meta_batches, **EVERY_STEP)
    (inputs, teacher_logits, labels), = run.batches(1)
    criterion(logits_of(run.student(inputs)), teacher_logits, labels).backward()
    optimizer.step()
    assert len(seen) > 2
    torch.testing.assert_close(norm.running_mean, seen[0])
