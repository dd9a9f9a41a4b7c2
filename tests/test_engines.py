"""The two engines agree, and "online" is what a finite difference of the trajectory says."""

import pytest
import torch
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from tests.students import (
    EVERY_STEP,
    OPTIMIZERS,
    STUDENTS,
    Run,
    logits_of,
    relative_error,
    two_groups,
)

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
    weights=None,
    **settings,
):
    """The hypergradient of one window after 0 or 3 plain steps, and the parameters after it."""
    run = Run(student, dtype)
    params = two_groups(run.student) if groups else run.student.parameters()
    inner = OPTIMIZERS[optimizer](params)
    weight_net = MetaWeightNet(hidden=(8,), **(weights or {})).to(dtype)
    if weights:  # not as alike as they begin
        nn.init.normal_(weight_net.layers[-2].weight)
    criterion = WeightedKDLoss(weight_net, temperature=2.0)
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


# the step moves every parameter by itself, so each student is tried with two optimizers and each
# optimizer with two students, of which "branching" leaves gradients None
PAIRS = list(dict.fromkeys([
    *((student, optimizer) for student in STUDENTS for optimizer in ("sgd-momentum", "adamw")),
    *((student, optimizer) for student in ("mlp", "branching") for optimizer in OPTIMIZERS),
]))


@pytest.mark.parametrize("warm, unroll", [(False, 1), (True, 3)], ids=["cold", "warm"])
@pytest.mark.parametrize("student, optimizer", PAIRS)
def test_engines_agree_in_float64(student, optimizer, warm, unroll):
    assert_engines_agree(student, optimizer, warm=warm, unroll=unroll)


@pytest.mark.parametrize("warm, unroll", [(False, 3), (True, 1)], ids=["cold", "warm"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_engines_agree_over_several_groups(optimizer, warm, unroll):
    assert_engines_agree("mlp", optimizer, warm=warm, unroll=unroll, groups=True)


@pytest.mark.parametrize(
    "student, optimizer",
    [*((student, "adamw") for student in STUDENTS), *(("conv", name) for name in OPTIMIZERS)],
)
def test_engines_agree_in_float32(student, optimizer):
    assert_engines_agree(student, optimizer, warm=True, unroll=3, dtype=torch.float32)


@pytest.mark.parametrize("method", ["online", "lookahead", "paper"])
@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("student", ["mlp", "transformer"])
def test_engines_agree_for_every_method_and_several_groups(student, unroll, method):
    assert_engines_agree(student, "adamw", unroll=unroll, method=method, groups=True, warm=True)


@pytest.mark.parametrize("meta_loss", ["hard", "mix", "soft", "callable"])
def test_engines_agree_for_every_meta_loss(meta_loss):
    teacher = torch.nn.Linear(8, 5).double()
    if meta_loss == "callable":
        meta_loss = nn.MultiMarginLoss()
    assert_engines_agree("mlp", meta_loss=meta_loss, teacher=teacher)


@pytest.mark.parametrize("unroll", [1, 3])
def test_engines_agree_over_weights_that_depend_on_each_other(unroll):
    assert_engines_agree("mlp", unroll=unroll, weights={"mean": 0.5, "ratio": 3.0})


class Table(nn.Module):
    """Weights that are parameters, whatever the features: one pair for each sample."""

    def __init__(self, count):
        super().__init__()
        self.weights = nn.Parameter(0.3 + 0.4 * torch.rand(count, 2).double())

    def forward(self, features):
        return self.weights


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    "student, optimizer",
    [
        *((student, optimizer) for student in STUDENTS for optimizer in ("sgd-nesterov", "adamw")),
        ("mlp", "sgd-dampening"), ("mlp", "adagrad"),
    ],
)
def test_online_is_the_finite_difference_of_the_real_step(student, optimizer, warm):
    def trajectory(nudge, record=False):
        """One real step with one weight nudged, by torch's own optimizer; then the meta loss."""
        run = Run(student)
        torch.manual_seed(1)
        criterion = WeightedKDLoss(Table(run.batch), temperature=2.0)
        inner = OPTIMIZERS[optimizer](run.student.parameters())
        steps, meta = run.batches(2), run.meta_batches(1)
        if warm:
            inputs, teacher_logits, labels = steps[0]
            criterion(logits_of(run.student(inputs)), teacher_logits, labels).backward()
            inner.step()
            inner.zero_grad()
        criterion.weight_net.weights.data[4, 1] += nudge
        if record:
            inner = BilevelOptimizer(inner, run.student, criterion, meta, **EVERY_STEP)
        inputs, teacher_logits, labels = steps[1]
        torch.manual_seed(2)
        criterion(logits_of(run.student(inputs)), teacher_logits, labels).backward()
        torch.manual_seed(3)
        inner.step()
        if record:
            return criterion.weight_net.weights.grad[4, 1]
        torch.manual_seed(3)
        inputs, labels = meta[0]
        with torch.no_grad():
            return nn.functional.cross_entropy(logits_of(run.student(inputs)), labels)

    h = 2e-6
    slope = (trajectory(h) - trajectory(-h)) / (2 * h)
    torch.testing.assert_close(trajectory(0, record=True), slope, rtol=1e-4, atol=1e-10)
