"""NaN, infinity, overflow, and batches that say little: right, skipped and counted, or refused."""

import copy
import math
import warnings

import pytest
import torch

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from tests.habits import assert_one_sentence
from tests.students import CLASSES, EVERY_STEP, OPTIMIZERS, Run, relative_error

NAN, INF = math.nan, math.inf


class Training:
    """Takes steps on batches that may be bad."""

    def __init__(self, meta=None, optimizer="sgd-momentum", dtype=torch.float32, **settings):
        self.run = Run("mlp", dtype)
        self.student = self.run.student
        torch.manual_seed(1)
        self.criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)).to(dtype))
        self.inner = OPTIMIZERS[optimizer](self.student.parameters())
        self.meta = meta or self.run.meta_batches(3)
        self.optimizer = BilevelOptimizer(
            self.inner, self.student, self.criterion, self.meta, **{**EVERY_STEP, **settings}
        )

    def batch(self, count=9):
        return self.run.inputs(count), self.run.teacher_logits(count), self.run.labels(count)

    def step(self, *batches, factor=1.0):
        """One step on micro-batches."""
        self.optimizer.zero_grad()
        for inputs, teacher_logits, labels in batches or [self.batch()]:
            loss = self.criterion(self.student(inputs), teacher_logits, labels)
            (factor * loss).backward()
        self.optimizer.step()
        return self

    def state(self):
        parts = self.student, self.inner, self.criterion, self.optimizer.meta_optimizer
        return copy.deepcopy([part.state_dict() for part in parts])


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def at(places, value):
    """A batch with a value in the place of one number."""

    def spoilt(training):
        batch = training.batch()
        batch[places].view(-1)[3] = value
        return [batch]

    return spoilt


def student_of(value):
    def spoilt(training):
        training.student.fc1.weight.data[0, 0] = value
        return [training.batch()]

    return spoilt


def weight_net_of(value):
    def spoilt(training):
        next(training.criterion.parameters()).data[0, 0] = value
        return [training.batch()]

    return spoilt


def one_micro_batch(training):
    return [training.batch(), *at(0, NAN)(training), training.batch()]


def other_classes(count):
    def made(training):
        inputs, _, labels = training.batch()
        return [(inputs, torch.randn(len(inputs), count), labels)]

    return made


REFUSED = {
    "nan in the inputs": (at(0, NAN), "finite loss: look for nan or inf in the inputs"),
    "nan of the teacher": (at(1, NAN), "teacher's logits"),
    "inf of the teacher": (at(1, INF), "teacher's logits"),
    "nan in the student": (student_of(NAN), "finite loss"),
    "nan in the weight net": (weight_net_of(NAN), "look for nan or inf in the weight net's param"),
    "nan in one micro-batch": (one_micro_batch, "finite loss"),
    "a label that is no class": (at(2, CLASSES), f"the class {CLASSES}, expected 0 to"),
    "a negative label": (at(2, -1), "the class -1, expected 0 to"),
    "a teacher of more classes": (other_classes(CLASSES + 2), "the same classes"),
    "a teacher of fewer classes": (other_classes(CLASSES - 1), "the same classes"),
}
MANNERS = {
    "online": {},
    "lookahead": dict(method="lookahead"),
    "paper": dict(method="paper"),
    "within a window": dict(unroll=3, every=3),
    "unroll engine": dict(engine="unroll"),
}


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_before_anything_moves(name, manner):
    spoilt, message = REFUSED[name]
    training = Training(**MANNERS[manner])
    training.step().step()
    batches = spoilt(training)
    before = training.state()
    with pytest.raises(ValueError, match=message) as error:
        training.step(*batches)
    assert_one_sentence(error)
    same(training.state(), before)


@pytest.mark.parametrize("manner", MANNERS)
def test_after_a_refusal_the_run_goes_on_as_if_nothing_had_been(manner):
    expected = Training(**MANNERS[manner])
    batches = [expected.batch() for _ in range(6)]
    for i in (0, 1, 2, 3, 4, 5):
        expected.step(batches[i])
    training = Training(**MANNERS[manner])
    for i in (0, 1, 2):
        training.step(batches[i])
    with pytest.raises(ValueError, match="finite loss"):
        training.step(*at(0, NAN)(training))
    for i in (3, 4, 5):
        training.step(batches[i])
    same(training.state(), expected.state())


def test_a_factor_that_is_not_finite_is_refused():
    training = Training().step()
    before = training.state()
    with pytest.raises(ValueError, match="was multiplied by inf before") as error:
        training.step(factor=INF)
    assert_one_sentence(error)
    same(training.state(), before)


@pytest.mark.parametrize("manner", MANNERS)
def test_a_gradient_that_is_not_finite_moves_the_student_as_in_the_plain_loop(manner):
    """Infinite inputs saturate: the loss is finite, its gradient is not. φ stands still."""
    training = Training(**MANNERS[manner]).step().step()
    batch = at(0, INF)(training)
    before = training.state()
    student = copy.deepcopy(training.student)
    plain = OPTIMIZERS["sgd-momentum"](student.parameters())
    plain.load_state_dict(copy.deepcopy(training.inner.state_dict()))
    WeightedKDLoss(training.criterion.weight_net)(student(batch[0][0]), *batch[0][1:]).backward()
    plain.step()
    training.step(*batch)
    same(list(training.student.state_dict().values()), list(student.state_dict().values()))
    same(training.state()[2:], before[2:])
    metrics = training.optimizer.metrics
    assert metrics["skipped_updates"] == metrics["skipped_by_meta_loss"] == 1


META_RUN = Run("mlp", torch.float32)


def good():
    return META_RUN.meta_batches(1)[0]


SPOILT_META = {
    "nan": (lambda x, y: (x * NAN, y), "meta_loss"),
    "inf": (lambda x, y: (x * INF, y), "meta_loss"),
    "empty": (lambda x, y: (x[:0], y[:0]), "meta_loss"),
    "all ignored": (lambda x, y: (x, torch.full_like(y, -100)), "meta_loss"),
}


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("name", SPOILT_META)
def test_a_meta_batch_without_a_loss_is_skipped_and_counted(name, manner):
    """The student takes the plain step, and the weight net and its optimizer stand still."""
    spoil, cause = SPOILT_META[name]
    training = Training([good(), spoil(*good()), good()], **MANNERS[manner])
    length = MANNERS[manner].get("every", 1)
    for _ in range(length):
        training.step()
    before = training.state()
    for _ in range(length):
        training.step()
    student, optimizer, *meta = training.state()
    same(meta, before[2:])
    assert relative_error(student.values(), before[0].values()) > 0
    assert all(p.isfinite().all() for p in student.values())
    metrics = training.optimizer.metrics
    assert (metrics["skipped_updates"], metrics[f"skipped_by_{cause}"]) == (1, 1)
    assert metrics["meta_updates"] == 1 and math.isfinite(metrics["meta_loss_start"])
    for _ in range(length):
        training.step()
    assert training.optimizer.metrics["meta_updates"] == 2
    assert all(p.isfinite().all() for p in training.criterion.parameters())


def test_an_average_is_of_what_is_not_skipped_and_zeros():
    spoil, _ = SPOILT_META["nan"]
    training = Training([good(), spoil(*good())], accumulate=2)
    before = training.state()
    training.step().step()
    assert relative_error(training.criterion.parameters(), before[2].values()) > 0
    metrics = training.optimizer.metrics
    assert (metrics["meta_updates"], metrics["skipped_updates"]) == (1, 1)


def test_a_hypergradient_that_is_not_finite_is_counted_apart():
    """The loss is finite, and its derivative is not."""
    training = Training(meta_loss=lambda z, y: (z.sum() * 0).sqrt() if bad else z.square().mean())
    bad = []
    training.step()
    before = training.state()
    bad.append(True)
    training.step()
    same(training.state()[2:], before[2:])
    assert training.optimizer.metrics["skipped_by_hypergradient"] == 1


def test_a_meta_label_that_is_no_class_is_refused_before_the_student_moves():
    inputs, labels = good()
    training = Training([good(), (inputs, labels + CLASSES)]).step()
    before = training.state()
    with pytest.raises(ValueError, match="labels of a meta batch hold the class") as error:
        training.step()
    assert_one_sentence(error)
    same(training.state(), before)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_whose_meta_updates_are_all_skipped_says_so_once(accumulate):
    def loss(logits, targets):
        return logits.square().mean() * (NAN if bad else 1.0)

    training = Training(meta_loss=loss, accumulate=accumulate)
    bad = []
    rehearsal = training.optimizer._steps.rehearsal
    rehearsal.of_step = rehearsal.of_window = True  # or it is refused at once
    bad.append(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            training.step()
    with pytest.warns(UserWarning, match=r"All 10 meta .* skipped \(meta_loss: 10\)") as caught:
        for _ in range(5):
            training.step()
        assert training.optimizer.metrics["skipped_updates"] == 14
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 1e30])
def test_losses_of_any_size(factor, optimizer):
    """As in float64, or skipped, or refused; what float32 cannot square stands still."""
    torch.manual_seed(0)
    training = Training(optimizer=optimizer)
    precise = Training(optimizer=optimizer, dtype=torch.float64)
    precise.student.load_state_dict(training.student.state_dict())
    precise.criterion.load_state_dict(training.criterion.state_dict())
    precise.optimizer._steps.meta_set._loader = [(x.double(), y) for x, y in training.meta]
    takes = 2 if optimizer == "adamw" else 1
    for _ in range(takes):  # the first step of Adam has no derivative but that of rounding
        inputs, teacher_logits, labels = training.batch()
        before = copy.deepcopy(training.student)
        training.step((inputs, teacher_logits, labels), factor=factor)
        precise.step((inputs.double(), teacher_logits.double(), labels), factor=factor)
    if training.optimizer.metrics["skipped_updates"]:
        return
    actual = [p.grad for p in training.criterion.parameters()]
    moved = relative_error(training.student.parameters(), before.parameters())
    if optimizer == "adamw" and factor == 1e30:  # whose second moment is infinite in float32
        assert moved < 1e-2 and all((g == 0).all() for g in actual)
        return
    assert relative_error(actual, [p.grad for p in precise.criterion.parameters()]) < 1e-3
    norm = precise.optimizer.metrics["hypergradient_norm"]
    assert training.optimizer.metrics["hypergradient_norm"] == pytest.approx(norm, rel=1e-3)


LITTLE = {
    "one sample": lambda x, t, y: (x[:1], t[:1], y[:1]),
    "one class": lambda x, t, y: (x, t, torch.full_like(y, 2)),
    "no sample": lambda x, t, y: (x[:0], t[:0], y[:0]),
    "all ignored": lambda x, t, y: (x, t, torch.full_like(y, -100)),
}


@pytest.mark.parametrize("name", LITTLE)
def test_batches_that_say_little(name):
    """The student is the plain loop's, and the hypergradient both engines'."""
    gradients = []
    for engine in ("adjoint", "unroll"):
        training = Training(dtype=torch.float64, engine=engine)
        training.step()
        batch = LITTLE[name](*training.batch())
        student, inner = copy.deepcopy((training.student, training.inner.state_dict()))
        plain = OPTIMIZERS["sgd-momentum"](student.parameters())
        plain.load_state_dict(inner)
        loss = WeightedKDLoss(training.criterion.weight_net)(student(batch[0]), *batch[1:])
        loss.backward()
        plain.step()
        training.step(batch)
        same(list(training.student.state_dict().values()), list(student.state_dict().values()))
        gradients.append([p.grad for p in training.criterion.parameters()])
        assert training.optimizer.metrics["skipped_updates"] == 0
    torch.testing.assert_close(*gradients)
    empty = name in ("no sample", "all ignored")
    assert all((g == 0).all() == empty for g in gradients[0][-2:])


def test_a_student_of_one_class():
    """Nothing can be wrong, so nothing is to be learned."""
    student = torch.nn.Linear(8, 1)
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)))
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), 0.1), student, criterion,
        [(torch.randn(4, 8), torch.zeros(4, dtype=torch.long))], **EVERY_STEP,
    )
    labels = torch.zeros(6, dtype=torch.long)
    criterion(student(torch.randn(6, 8)), torch.randn(6, 1), labels).backward()
    optimizer.step()
    assert optimizer.metrics["hypergradient_norm"] == 0
