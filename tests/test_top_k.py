"""A teacher of whom only the largest probabilities are known."""

import math

import pytest
import torch
import torch.nn.functional as F

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss, chunks
from kd_balance.soft_losses import DecoupledKD, GeneralizedJSD
from kd_balance.top_k import TopK
from kd_balance.weight_net import FEATURES, LogFrequency
from tests.habits import assert_one_sentence
from tests.students import CLASSES, Run, relative_error

K = 3
NEGATIVE = float("-inf")


def sparse_and_spread(logits):
    """The largest of [N, C] logits, and the whole distribution that they stand for."""
    log_probs, indices = logits.log_softmax(1).topk(K, dim=1)
    spread = (1 - log_probs.exp().sum(1, keepdim=True)) / (logits.shape[1] - K)
    return TopK(log_probs, indices), spread.log().expand_as(logits).scatter(1, indices, log_probs)


@pytest.mark.parametrize("soft_loss", [None, GeneralizedJSD(), DecoupledKD()])
@pytest.mark.parametrize("small", [False, True])
def test_it_is_the_distribution_with_an_even_tail(soft_loss, small, monkeypatch):
    if small:
        monkeypatch.setattr(chunks, "CPU_CHUNK", 8)
    student, teacher = torch.randn(2, 6, 7, dtype=torch.float64).unbind()
    sparse, spread = sparse_and_spread(3 * teacher)
    labels = torch.randint(7, (6,))
    labels[2] = -100
    features = (*FEATURES, LogFrequency([1] * 7), lambda s, t, y: t.softmax(1).amax(1))
    values = []
    for given in (sparse, spread):
        net = MetaWeightNet(features, hidden=()).double()
        criterion = WeightedKDLoss(net, temperature=3.0, soft_loss=soft_loss)
        leaf = student.clone().requires_grad_()
        net.load_state_dict({k: torch.ones_like(v) for k, v in net.state_dict().items()})
        loss = criterion(leaf, given, labels)
        loss.backward()
        kept = criterion.last_kept
        values.append((loss, leaf.grad, criterion.last_features[kept], criterion.weights))
    torch.testing.assert_close(values[0], values[1])


def test_positions_and_classes_lie_where_the_logits_have_them():
    student, teacher = torch.randn(2, 4, 5, 7).unbind()
    labels = torch.randint(7, (4, 5))
    log_probs, indices = teacher.log_softmax(-1).topk(7, dim=-1)  # all of them
    last = WeightedKDLoss(class_dim=-1)
    expected = last(student, teacher, labels)
    torch.testing.assert_close(last(student, TopK(log_probs, indices), labels), expected)
    second = TopK(log_probs.transpose(1, 2), indices.transpose(1, 2))
    actual = WeightedKDLoss()(student.transpose(1, 2), second, labels)
    torch.testing.assert_close(actual, expected)


def test_what_stands_at_ignored_and_unknown_positions_does_not_matter():
    student, teacher = torch.randn(2, 6, 7).unbind()
    sparse, _ = sparse_and_spread(teacher)
    labels, there = torch.tensor([0, 1, -100, 3, 4, 5]), torch.arange(6) != 4
    padded = TopK(sparse.log_probs.clone(), sparse.indices.clone())
    padded.log_probs[[2, 4]], padded.indices[[2, 4]] = float("nan"), -1
    results = []
    for given in (sparse, padded):
        criterion = WeightedKDLoss(MetaWeightNet(tuple(FEATURES), terms=("hard", "soft"), mean=1.0))
        results.append(criterion(student, (given, there), labels))
        assert criterion.last_features.isfinite().all()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
def test_the_hypergradient_is_that_of_the_whole_distribution(engine):
    found = []
    for whole in (False, True):
        run = Run("mlp")
        criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)).double(), temperature=2.0)
        optimizer = BilevelOptimizer(
            torch.optim.SGD(run.student.parameters(), 0.1, 0.9), run.student, criterion,
            run.meta_batches(1), engine=engine, unroll=2, every=2,
        )
        for inputs, logits, labels in run.batches(2):
            optimizer.zero_grad()
            criterion(run.student(inputs), sparse_and_spread(logits)[whole], labels).backward()
            optimizer.step()
        found.append([p.grad for p in criterion.phi])
    assert relative_error(*found) < 1e-10


def test_several_teachers_one_of_them_sparse():
    student, a, b = torch.randn(3, 6, 7).unbind()
    sparse, spread = sparse_and_spread(b)
    net = MetaWeightNet(("a.kl", "b.kl"), terms=("hard", "a", "b"))
    criterion = WeightedKDLoss(net, teachers=("a", "b"))
    labels = torch.randint(7, (6,))
    losses = [criterion(student, {"a": a, "b": given}, labels) for given in (sparse, spread)]
    torch.testing.assert_close(*losses)


def test_memory_is_that_of_the_k_classes(monkeypatch):
    from tests.test_chunks import Sizes

    monkeypatch.setattr(chunks, "CPU_CHUNK", 500)
    student = torch.randn(60, 100, requires_grad=True)
    sparse, _ = sparse_and_spread(torch.randn(60, 100))
    with Sizes(student) as sizes:
        WeightedKDLoss(MetaWeightNet(hidden=(2,)))(student, sparse, torch.zeros(60).long())
    assert sizes.largest <= 500


def given(log_probs, indices, **settings):
    logits = torch.randn(2, CLASSES)
    WeightedKDLoss(**settings)(logits, TopK(log_probs, indices), torch.zeros(2).long())


PROBABLE = torch.full((2, 2), 0.25).log()
REFUSED = {
    "k of 0": (lambda: given(torch.zeros(2, 0), torch.zeros(2, 0).long()), "k of 1 to 5"),
    "k above the classes": (lambda: given(torch.zeros(2, 9), torch.zeros(2, 9).long()), "k of 1"),
    "other positions": (lambda: given(torch.zeros(3, 2), torch.zeros(3, 2).long()), "shape"),
    "one dimension": (lambda: given(torch.zeros(2), torch.zeros(2).long()), "shape"),
    "an index too large": (
        lambda: given(PROBABLE, torch.tensor([[0, 1], [4, 5]])), "from 0 to 5, expected .* to 4"
    ),
    "an index below 0": (lambda: given(PROBABLE, torch.tensor([[0, 1], [4, -1]])), "from -1"),
    "a class twice": (lambda: given(PROBABLE, torch.tensor([[0, 1], [2, 2]])), "twice"),
    "logits": (lambda: given(torch.ones(2, 2), torch.tensor([[0, 1], [2, 1]])), "add up to"),
    "indices of floats": (lambda: given(PROBABLE, torch.ones(2, 2)), "int64"),
    "fewer indices": (lambda: given(PROBABLE, torch.ones(2, 1).long()), "int64 of shape"),
    "long_tailed": (
        lambda: WeightedKDLoss.long_tailed([2] * CLASSES)(
            torch.randn(2, CLASSES), TopK(PROBABLE, torch.tensor([[0, 1], [2, 1]])),
            torch.zeros(2).long(),
        ),
        "long_tailed",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_such_teacher_is_refused_in_one_sentence(what):
    call, match = REFUSED[what]
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert_one_sentence(error)


def test_a_teacher_that_is_certain_leaves_nothing_to_the_others():
    student = torch.randn(1, 5, dtype=torch.float64)
    teacher = TopK(torch.tensor([[0.0, NEGATIVE]]).double(), torch.tensor([[2, 0]]))
    losses = WeightedKDLoss(temperature=1.0).losses(student, teacher, torch.tensor([2]))
    torch.testing.assert_close(losses[0, 1], F.cross_entropy(student, torch.tensor([2])))
    assert math.isfinite(losses.sum())
