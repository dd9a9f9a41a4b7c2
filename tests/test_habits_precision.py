"""Autocast, half-precision students and gradient scaling."""

import math

import pytest
import torch
from torch import nn

from tests.habits import (
    Lab,
    assert_differentiates,
    assert_leaves_what_the_plain_loop_leaves,
    assert_one_sentence,
    plain,
    trained,
)
from tests.students import ConvNet, Transformer, logits_of, relative_error
from tests.test_habits_modules import Checkpointed, Dropped

STUDENTS = {
    "dropout": dict(make=Dropped),
    "conv": dict(make=ConvNet, shape=(2, 6, 6)),
    "transformer": dict(make=Transformer, shape=(3, 4)),
    "checkpointed": dict(make=Checkpointed),
}


def autocast(dtype, steps=1):
    """Student and criterion under autocast, as most loops have them."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(steps):
            lab.optimizer.zero_grad()
            with torch.autocast(lab.device, dtype=dtype):
                logits = logits_of(lab.called(inputs))
                assert logits.dtype == dtype
                lab.loss = lab.criterion(logits, teacher_logits.to(dtype), labels)
            lab.loss.backward()
            lab.optimizer.step()

    return loop


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, student, steps):
    """The engines agree as far as the format reaches, and with the same steps in float32."""
    assert_autocast(dtype, steps, **STUDENTS[student])


@pytest.mark.parametrize("method", ["online", "lookahead"])
def test_autocast_cast_back_by_the_loop(method):
    """`student(x).float()`: the number of the same loop without the cast."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(2):
            lab.optimizer.zero_grad()
            with torch.autocast(lab.device, dtype=torch.bfloat16):
                logits = lab.called(inputs)
            lab.criterion(logits.float(), teacher_logits, labels).backward()
            lab.optimizer.step()

    options = dict(wrapped=True, dtype=torch.float32, settings={"method": method})
    lab, reference = (trained(each, **options) for each in (loop, autocast(torch.bfloat16, 2)))
    assert relative_error([lab.hypergradient], [reference.hypergradient]) < 3e-2


def assert_autocast(dtype, steps, **options):
    settings = {"unroll": steps, "every": steps}
    options = {"dtype": torch.float32, "wrapped": True, **options}
    loop = autocast(dtype, steps)
    lab = trained(loop, settings=settings, **options)
    reference = trained(loop, settings={**settings, "engine": "unroll"}, **options)
    precise = trained(plain(steps), settings=settings, **options)
    assert relative_error([lab.hypergradient], [reference.hypergradient]) < 3e-2
    assert relative_error([lab.hypergradient], [precise.hypergradient]) < 0.2
    assert lab.loss.dtype == lab.hypergradient.dtype == torch.float32
    assert lab.criterion.weights.dtype == lab.criterion.last_features.dtype == torch.float32


@pytest.mark.parametrize("student", STUDENTS)
def test_autocast_leaves_the_student_of_the_plain_loop(student):
    assert_leaves_what_the_plain_loop_leaves(
        autocast(torch.bfloat16, 3), dtype=torch.float32, **STUDENTS[student]
    )


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
def test_the_step_within_autocast(optimizer):
    """Some loops keep everything under it; neither engine computes the rest in half precision."""

    def loop_with(step_within):
        def loop(lab):
            for inputs, teacher_logits, labels in lab.batches(3):
                lab.optimizer.zero_grad()
                with torch.autocast(lab.device, dtype=torch.bfloat16):
                    lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
                    if step_within:
                        lab.optimizer.step()
                if not step_within:
                    lab.optimizer.step()

        return loop

    loop = loop_with(True)
    options = dict(wrapped=True, dtype=torch.float32, optimizer=optimizer, make=Dropped)
    for engine in ("adjoint", "unroll"):
        settings = {"unroll": 3, "every": 3, "engine": engine}
        lab = trained(loop, settings=settings, **options)
        expected = trained(loop_with(False), settings=settings, **options)
        assert relative_error([lab.hypergradient], [expected.hypergradient]) < 1e-5
        assert lab.criterion.weights.dtype == torch.float32
    assert_leaves_what_the_plain_loop_leaves(
        loop, dtype=torch.float32, optimizer=optimizer, make=Dropped
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_a_student_in_bfloat16(steps):
    settings = {"unroll": steps, "every": steps}
    options = dict(wrapped=True, dtype=torch.bfloat16, make=Dropped)
    lab = trained(plain(steps), settings=settings, **options)
    reference = trained(plain(steps), settings={**settings, "engine": "unroll"}, **options)
    assert relative_error([lab.hypergradient], [reference.hypergradient]) < 5e-2
    assert lab.criterion.weights.dtype == torch.float32


# gradient scaling

CLEAR = {
    "optimizer.zero_grad()": lambda lab: lab.optimizer.zero_grad(),
    "optimizer.zero_grad(False)": lambda lab: lab.optimizer.zero_grad(set_to_none=False),
    "model.zero_grad()": lambda lab: lab.student.zero_grad(),
    "model.zero_grad(False)": lambda lab: lab.student.zero_grad(set_to_none=False),
}


def scaled(steps=1, *, clear="optimizer.zero_grad()", overflow=(), clip=None):
    """A loop with GradScaler whose batches numbered in `overflow` give infinite gradients."""

    def loop(lab):
        lab.moved, lab.scales = [], []
        for index, (inputs, teacher_logits, labels) in enumerate(lab.batches(steps)):
            before = [p.detach().clone() for p in lab.student.parameters()]
            loss = lab.criterion(logits_of(lab.called(inputs)), teacher_logits, labels)
            if index in overflow:
                loss = loss * math.inf
            CLEAR[clear](lab)
            lab.scaler.scale(loss).backward()
            if clip is not None:
                lab.scaler.unscale_(lab.optimizer)
                nn.utils.clip_grad_norm_(lab.student.parameters(), clip)
            lab.scaler.step(lab.optimizer)
            lab.scaler.update()
            now = lab.student.parameters()
            lab.moved.append(any((a != b).any() for a, b in zip(now, before)))
            lab.scales.append(lab.scaler.get_scale())

    return loop


@pytest.mark.parametrize("passed", [True, False], ids=["grad_scaler=", "not passed"])
@pytest.mark.parametrize("clip", [None, 0.05, 100.0])
def test_the_hypergradient_does_not_carry_the_scale(clip, passed):
    """Whether the scaler is known or found in the gradients; without it both are the same."""
    settings = {"grad_scaler": passed}
    assert_differentiates(scaled(3, clip=clip), steps=3, settings=settings)
    if clip is None:
        assert_differentiates(scaled(3), reference=plain(3), steps=3, settings=settings)


@pytest.mark.parametrize("method", ["lookahead", "paper"])
def test_the_lookahead_methods_need_to_be_given_the_scaler(method):
    options = dict(wrapped=True, dtype=torch.float32)
    lab = trained(scaled(2), settings={"grad_scaler": True, "method": method}, **options)
    expected = trained(plain(2), settings={"method": method}, **options)
    assert relative_error([lab.hypergradient], [expected.hypergradient]) < 1e-5
    student, reference = lab.student.parameters(), expected.student.parameters()
    assert relative_error(student, reference) < 1e-6
    with pytest.raises(ValueError, match="grad_scaler=") as error:
        trained(scaled(2), settings={"method": method}, **options)
    assert_one_sentence(error)


@pytest.mark.parametrize("clear", CLEAR)
@pytest.mark.parametrize("passed", [True, False], ids=["grad_scaler=", "not passed"])
def test_an_overflowed_step_is_skipped_whole(passed, clear):
    """Student, counters and weight net stand still, and the next step knows its own batch only."""
    loop = scaled(4, overflow=(0, 2), clear=clear)

    def counted(lab):
        seen = lab.table.detach().clone()
        lab.optimizer.zero_grad()
        loop(lab)
        assert lab.moved == [False, True, False, True]
        assert lab.scales == [2.0**9, 2.0**9, 2.0**8, 2.0**8]
        if not passed:
            return
        assert lab.optimizer.metrics["meta_updates"] == 1
        assert (lab.table != seen).any()

    assert_differentiates(loop, steps=2, settings={"grad_scaler": passed})
    trained(counted, wrapped=True, settings={"grad_scaler": passed, "rate": 0.1, "every": 2})
    assert_leaves_what_the_plain_loop_leaves(loop, settings={"grad_scaler": passed})


def test_an_overflow_of_float16_itself():
    """No batch is poisoned here: the first scale is too large for the format."""
    assert_skips_overflows("cpu")


def assert_skips_overflows(device):
    def loop(lab):
        lab.scaler = torch.amp.GradScaler(device, init_scale=2.0**22)
        lab.wrap(grad_scaler=True, rate=0.1)
        lab.steps = 0
        for inputs, teacher_logits, labels in lab.batches(12):
            with torch.autocast(device, dtype=torch.float16):
                loss = lab.criterion(lab.called(inputs), teacher_logits, labels)
            lab.optimizer.zero_grad()
            lab.scaler.scale(loss).backward()
            scale = lab.scaler.get_scale()
            lab.scaler.step(lab.optimizer)
            lab.scaler.update()
            lab.steps += lab.scaler.get_scale() == scale

    lab = trained(loop, wrapped=False, dtype=torch.float32, device=device)
    assert 0 < lab.steps < 12
    assert lab.optimizer.metrics["meta_updates"] == lab.steps
    assert lab.optimizer.metrics["skipped_updates"] == 0
    assert 0 < lab.optimizer.metrics["hypergradient_norm"] < 10
    assert all(p.isfinite().all() for p in lab.student.parameters())


def test_a_disabled_scaler():
    lab = Lab()
    lab.scaler = torch.amp.GradScaler("cpu", enabled=False)
    lab.wrap(grad_scaler=True)
    scaled(1)(lab)
    expected = trained(plain(1), wrapped=True)
    assert relative_error([lab.hypergradient], [expected.hypergradient]) < 1e-12
