"""The two engines agree, and "online" is what a finite difference of the trajectory says."""

import pytest
import torch
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from tests.students import OPTIMIZERS, STUDENTS, Run, logits_of, relative_error, two_groups

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def hypergradient(
    engine,
    student="mlp",
    optimizer="sgd-momentum",
    *,
    warm=False,
    unroll=1,
    dtype=torch.float64,
    groups=False,
    **settings,
):
    """The hypergradient of one window after 0 or 3 plain steps, and the parameters after it."""
    run = Run(student, dtype)
    params = two_groups(run.student) if groups else run.student.parameters()
    inner = OPTIMIZERS[optimizer](params)
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(8,)).to(dtype), temperature=2.0)
    steps = run.batches(3 + unroll)
    meta = run.meta_batches(2)
    if not warm:
        steps = steps[3:]
    for index, (inputs, teacher_logits, labels) in enumerate(steps):
        if index == len(steps) - unroll:
            inner = BilevelOptimizer(
                inner,
                run.student,
                criterion,
                meta,
                engine=engine,
                unroll=unroll,
                every=unroll,
                meta_optimizer=torch.optim.SGD(criterion.weight_net.parameters(), lr=0.1),
                **settings,
            )
        inner.zero_grad()
        loss = criterion(logits_of(run.student(inputs)), teacher_logits, labels)
        loss.backward()
        inner.step()
    gradients = [p.grad for p in criterion.weight_net.parameters()]
    return gradients, list(run.student.parameters())


def assert_engines_agree(*args, dtype=torch.float64, **kwargs):
    adjoint, after_adjoint = hypergradient("adjoint", *args, dtype=dtype, **kwargs)
    reference, after_reference = hypergradient("unroll", *args, dtype=dtype, **kwargs)
    assert relative_error(adjoint, reference) < TOLERANCE[dtype]
    assert relative_error(after_adjoint, after_reference) < TOLERANCE[dtype]


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_engines_agree_in_float64(student, optimizer, warm, unroll):
    assert_engines_agree(student, optimizer, warm=warm, unroll=unroll)


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("student", ["mlp", "conv", "transformer"])
def test_engines_agree_in_float32(student, optimizer, warm, unroll):
    assert_engines_agree(student, optimizer, warm=warm, unroll=unroll, dtype=torch.float32)
