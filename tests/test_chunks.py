"""Large logits are looked at in chunks of rows, and nothing but memory shows it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss, chunks
from kd_balance.hard_losses import BalancedSoftmax, ClassBalancedCrossEntropy
from kd_balance.soft_losses import BalancedKL, DecoupledKD, FlattenedKL
from kd_balance.weight_net import FEATURES, LogFrequency
from tests.students import CLASSES, Run, relative_error

COUNTS = [9, 5, 4, 2, 1]
LOSSES = {
    "usual": {},
    "balanced": {"hard_loss": BalancedSoftmax(COUNTS), "soft_loss": BalancedKL(COUNTS)},
    "class-balanced": {"hard_loss": ClassBalancedCrossEntropy(COUNTS), "soft_loss": FlattenedKL()},
    "decoupled": {"soft_loss": DecoupledKD()},
}


@pytest.fixture
def small(monkeypatch):
    """Logits of four rows are large."""
    monkeypatch.setattr(chunks, "CPU_CHUNK", 3 * CLASSES)


def hypergradient(engine, unroll, settings):
    run = Run("mlp")
    features = (*FEATURES, LogFrequency(COUNTS))
    criterion = WeightedKDLoss(MetaWeightNet(features, hidden=(4,)).double(), **settings)
    optimizer = BilevelOptimizer(
        torch.optim.SGD(run.student.parameters(), lr=0.1, momentum=0.9), run.student, criterion,
        run.meta_batches(2), engine=engine, unroll=unroll, every=unroll,
        teacher=torch.nn.Linear(8, CLASSES).double(), meta_loss="mix",
    )
    for inputs, teacher_logits, labels in run.batches(unroll):
        optimizer.zero_grad()
        criterion(run.student(inputs), teacher_logits, labels).backward()
        optimizer.step()
    return [p.grad for p in criterion.phi], list(run.student.parameters())


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
@pytest.mark.parametrize("name", LOSSES)
def test_numbers_are_those_of_the_whole(name, engine, unroll, monkeypatch):
    expected, student = hypergradient(engine, unroll, LOSSES[name])
    monkeypatch.setattr(chunks, "CPU_CHUNK", 2 * CLASSES)
    actual, chunked = hypergradient(engine, unroll, LOSSES[name])
    assert relative_error(actual, expected) < 1e-12
    assert relative_error(chunked, student) < 1e-12


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator made memory for."""

    def __init__(self, *given):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                if made.untyped_storage().data_ptr() not in self.given:
                    self.largest = max(self.largest, made.numel())
        return result


def test_nothing_as_large_as_the_logits_is_made_but_their_gradient(small):
    student, teacher = torch.randn(40, 50).requires_grad_(), torch.randn(40, 50)
    criterion = WeightedKDLoss(MetaWeightNet(tuple(FEATURES), hidden=(2,)))
    with Sizes(student, teacher) as forward:
        loss = criterion(student, teacher, torch.zeros(40, dtype=torch.long))
    with Sizes(student, teacher) as backward:
        loss.backward()
    assert forward.largest < student.numel() == backward.largest


def test_a_loss_of_the_whole_batch_is_not_cut(small):
    def against_the_mean(student, teacher):
        return (student - student.mean(0)).pow(2).sum(1)

    student, teacher = torch.randn(2, 9, CLASSES).unbind()
    labels = torch.zeros(9, dtype=torch.long)
    losses = WeightedKDLoss(soft_loss=against_the_mean).losses(student, teacher, labels)
    torch.testing.assert_close(losses[:, 1], against_the_mean(student, teacher))


def test_settings_changed_before_backward_do_not_reach_it(small):
    student, teacher = torch.randn(2, 9, CLASSES).unbind()
    student.requires_grad_()
    labels = torch.zeros(9, dtype=torch.long)
    criterion = WeightedKDLoss(temperature=2.0)
    (expected,) = torch.autograd.grad(criterion(student, teacher, labels), student)
    loss = criterion(student, teacher, labels)
    criterion.temperature = 9.0
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], expected)
