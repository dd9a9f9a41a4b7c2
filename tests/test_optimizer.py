"""BilevelOptimizer as a torch optimizer, what it counts, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from tests.students import CLASSES, EVERY_STEP, MLP, OPTIMIZERS, Run, relative_error


class Setting:
    """A student, its criterion and optimizer, and a step to take with them."""

    def __init__(self, student=None, optimizer=None, criterion=None, meta=None, **settings):
        self.run = Run("mlp", torch.float32)
        self.student = student or self.run.student
        self.criterion = criterion or WeightedKDLoss(MetaWeightNet(hidden=(4,)))
        self.inner = optimizer or OPTIMIZERS["sgd-momentum"](self.student.parameters())
        self.meta = self.run.meta_batches(2) if meta is None else meta
        self.settings = {**EVERY_STEP, **settings}

    def wrapped(self):
        return BilevelOptimizer(
            self.inner, self.student, self.criterion, self.meta, **self.settings
        )

    def loss(self, logits=None):
        inputs, teacher_logits, labels = self.run.batches(1)[0]
        logits = self.student(inputs) if logits is None else logits(self.student(inputs))
        return self.criterion(logits, teacher_logits, labels)


def phi(criterion):
    return [p.detach().clone() for p in criterion.weight_net.parameters()]


# what is refused


def refused_when_wrapped():
    student = MLP()
    net = MetaWeightNet()
    shared = torch.optim.SGD([*student.parameters(), *net.parameters()], lr=0.1)
    other = torch.optim.SGD(MLP().parameters(), lr=0.1)
    lbfgs = torch.optim.LBFGS(student.parameters())
    return {
        "method is 'onlin'": dict(method="onlin"),
        "engine is 'higher'": dict(engine="higher"),
        "unroll is 4 and every is 2": dict(unroll=4, every=2),
        "every is 0": dict(every=0),
        "accumulate is 1.5": dict(accumulate=1.5),
        "is empty": dict(meta=[]),
        "meta_loader is 3": dict(meta=3),
        "meta_loss is 'medium'": dict(meta_loss="medium"),
        "teacher is None": dict(meta_loss="soft"),
        "has no weight_net": dict(criterion=WeightedKDLoss()),
        "without a parameter": dict(
            criterion=WeightedKDLoss(MetaWeightNet().requires_grad_(False))
        ),
        "criterion is CrossEntropyLoss": dict(criterion=nn.CrossEntropyLoss()),
        "parameters of the weight net": dict(
            student=student, optimizer=shared, criterion=WeightedKDLoss(net)
        ),
        "holds no parameter of the student": dict(optimizer=other),
        "optimizer is LBFGS.*several times.*method='paper'": dict(student=student, optimizer=lbfgs),
        "optimizer is str": dict(optimizer="sgd"),
    }


@pytest.mark.parametrize("message", refused_when_wrapped())
def test_bad_arguments_are_refused_when_wrapped(message):
    setting = Setting(**refused_when_wrapped()[message])
    before = [p.clone() for p in setting.student.parameters()]
    with pytest.raises((ValueError, TypeError), match=message) as error:
        setting.wrapped()
    assert_one_sentence(error)
    assert relative_error(setting.student.parameters(), before) == 0
    assert not setting.student._forward_hooks and not setting.criterion._forward_hooks


def assert_one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and text.count(". ") == 0, text


def endless_nothing():
    yield from ()


REFUSED_BATCHES = {
    "wrong inputs": [(torch.randn(4, 9), torch.arange(4))],
    "wrong number of labels": [(torch.randn(4, 8), torch.arange(3))],
    "labels out of range": [(torch.randn(4, 8), torch.arange(4) + CLASSES)],
    "no labels": [torch.randn(4, 8)],
    "mapping without labels": [{"inputs": torch.randn(4, 8)}],
    "mapping without an argument": [{"wrong": torch.randn(4, 8), "labels": torch.arange(4)}],
    "nan": [(torch.full((4, 8), torch.nan), torch.arange(4))],
    "nothing": None,
}


@pytest.mark.parametrize("window", [EVERY_STEP, {"unroll": 4, "every": 64}], ids=str)
@pytest.mark.parametrize("method", ["online", "lookahead", "paper"])
@pytest.mark.parametrize("name", REFUSED_BATCHES)
def test_a_bad_meta_batch_is_refused_before_the_student_moves(name, method, window):
    meta = endless_nothing() if name == "nothing" else REFUSED_BATCHES[name]
    setting = Setting(meta=meta, method=method, **window)
    optimizer = setting.wrapped()
    before, before_phi = [p.clone() for p in setting.student.parameters()], phi(setting.criterion)
    setting.loss().backward()
    with pytest.raises(ValueError) as error:
        optimizer.step()
    assert "meta" in str(error.value) and "expected" in str(error.value)
    assert relative_error(setting.student.parameters(), before) == 0
    assert relative_error(phi(setting.criterion), before_phi) == 0
    assert not setting.inner.state


WINDOWS = pytest.mark.parametrize("every", [1, 64])


@WINDOWS
def test_logits_that_the_student_did_not_return_are_refused(every):
    setting = Setting(every=every)
    optimizer = setting.wrapped()  # watches as long as it lives
    with pytest.raises(ValueError, match="what the wrapped student returned") as error:
        setting.loss(logits=lambda logits: torch.zeros_like(logits).requires_grad_())
    assert_one_sentence(error)
    assert optimizer.state == {}


@WINDOWS
def test_a_step_without_the_criterion_is_refused(every):
    setting = Setting(every=every)
    optimizer = setting.wrapped()
    setting.student(setting.run.inputs()).sum().backward()
    before = [p.clone() for p in setting.student.parameters()]
    with pytest.raises(ValueError, match="no result of the criterion") as error:
        optimizer.step()
    assert_one_sentence(error)
    assert relative_error(setting.student.parameters(), before) == 0


def test_later_steps_on_other_losses_alone_are_plain():
    """Warned of once; a window that such a step interrupts begins anew."""
    students = []
    for wrapped in (True, False):
        setting = Setting(every=2, unroll=2)
        still = torch.optim.SGD(setting.criterion.parameters(), lr=0.0)
        setting.settings["meta_optimizer"] = still
        optimizer = setting.wrapped() if wrapped else setting.inner
        for other in (False, False, False, True, False, False):
            optimizer.zero_grad()
            loss = setting.loss()
            if other:
                loss = setting.student(torch.ones(5, 8)).square().sum()
            loss.backward()
            if other and wrapped:
                with pytest.warns(UserWarning, match="followed no backward pass of the criterion"):
                    optimizer.step()
            else:
                optimizer.step()
        students.append(setting.student)
        if wrapped:
            assert optimizer.metrics["meta_updates"] == 2
    wrapped, plain = students
    assert relative_error(wrapped.parameters(), plain.parameters()) == 0


def test_the_look_at_the_first_step_leaves_no_trace():
    """The meta batches, φ and the student are those of a run that takes no look."""
    drawn, runs = [], []
    for look in (True, False):
        setting = Setting(every=2)
        setting.meta = map(lambda batch: drawn.append(look) or batch, setting.meta)
        optimizer = setting.wrapped()
        optimizer._steps.rehearsal.of_step = not look
        for _ in range(2):
            optimizer.zero_grad()
            setting.loss().backward()
            optimizer.step()
        assert optimizer.metrics["meta_updates"] == 1
        runs.append(setting)
    assert drawn == [True, False]
    one, other = runs
    assert relative_error(phi(one.criterion), phi(other.criterion)) == 0
    assert relative_error(one.student.parameters(), other.student.parameters()) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    setting = Setting()
    optimizer = setting.wrapped()
    before = [p.clone() for p in setting.student.parameters()]
    inputs, teacher_logits, labels = setting.run.batches(1)[0]
    teacher_logits[0, 0] = value
    setting.criterion(setting.student(inputs), teacher_logits, labels).backward()
    with pytest.raises(ValueError, match="finite loss: look for nan or inf") as error:
        optimizer.step()
    assert_one_sentence(error)
    assert relative_error(setting.student.parameters(), before) == 0


# what it is and does


def test_it_is_the_wrapped_optimizer_to_everything_that_asks():
    setting = Setting()
    optimizer = setting.wrapped()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is setting.inner.param_groups
    assert optimizer.state is setting.inner.state
    assert optimizer.defaults is setting.inner.defaults
    optimizer.param_groups = [*setting.inner.param_groups]
    assert setting.inner.param_groups is optimizer.param_groups
    extra = nn.Linear(2, 2)
    optimizer.add_param_group({"params": extra.parameters(), "lr": 0.5})
    assert setting.inner.param_groups[1]["lr"] == 0.5
    assert "SGD" in repr(optimizer)


def test_the_weight_net_moves_and_lowers_the_meta_loss():
    """With a teacher that is right, raising the weights is what lowers the meta loss."""
    setting = Setting()
    optimizer = setting.wrapped()
    before = phi(setting.criterion)
    setting.loss().backward()
    optimizer.step()
    assert relative_error(phi(setting.criterion), before) > 0
    assert optimizer.metrics["meta_updates"] == 1
    assert optimizer.metrics["hypergradient_norm"] > 0
    assert optimizer.metrics["skipped_updates"] == 0
    assert 0 < optimizer.metrics["hard_weight"] < 1


@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
def test_frozen_parts_of_the_weight_net_stay_and_the_rest_moves_as_ever(engine):
    moved = {}
    for frozen in (False, True):
        setting = Setting(engine=engine)
        first, last = setting.criterion.weight_net.layers[0], setting.criterion.weight_net.layers[2]
        first.requires_grad_(not frozen)
        before = [p.clone() for p in first.parameters()]
        optimizer = setting.wrapped()
        setting.loss().backward()
        optimizer.step()
        assert (relative_error(first.parameters(), before) == 0) == frozen
        moved[frozen] = list(last.parameters())
    assert relative_error(moved[True], moved[False]) == 0


def test_where_the_meta_loss_began_is_the_mean_of_ten_windows():
    optimizer = (setting := Setting()).wrapped()
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        setting.loss().backward()
        optimizer.step()
        seen.append(optimizer.metrics["meta_loss"])
        start = optimizer.metrics["meta_loss_start"]
        assert start == pytest.approx(sum(seen[:10]) / len(seen[:10]), rel=1e-6)
    other = Setting().wrapped()
    other.load_state_dict(optimizer.state_dict())
    assert other.metrics["meta_loss_start"] == start


@pytest.mark.parametrize(
    "given, unroll, every, rate",
    [
        ({}, 4, 64, 1.6e-2),
        ({"method": "lookahead"}, 4, 64, 1.6e-2),
        ({"method": "paper"}, 1, 1, 1e-3),
        ({"method": "paper", "every": 8}, 1, 8, 2e-3),
        ({"every": 3}, 3, 3, 1e-3),
        ({"every": 16}, 4, 16, 4e-3),
        ({"unroll": 1}, 1, 64, 1.6e-2),
        ({"unroll": 80}, 80, 80, 2e-2),
        ({"every": 1, "unroll": 1}, 1, 1, 1e-3),
    ],
)
def test_what_is_not_given_of_a_window(given, unroll, every, rate):
    """One size left out fits the other, and φ's rate makes up for rare steps."""
    setting = Setting()
    optimizer = BilevelOptimizer(
        setting.inner, setting.student, setting.criterion, setting.meta, **given
    )
    assert (optimizer.unroll, optimizer.every) == (unroll, every)
    assert optimizer.meta_optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)


def test_every_and_accumulate_decide_when_phi_moves():
    setting = Setting(every=2, accumulate=3)
    optimizer = setting.wrapped()
    moved = []
    for _ in range(12):
        before = phi(setting.criterion)
        optimizer.zero_grad()
        setting.loss().backward()
        optimizer.step()
        after = phi(setting.criterion)
        moved.append(any((a != b).any() for a, b in zip(after, before, strict=True)))
    assert moved == [False] * 5 + [True] + [False] * 5 + [True]


def test_accumulated_hypergradients_are_averaged():
    """With φ held still, the average over two windows is the mean of the two hypergradients."""

    def gradients(accumulate):
        torch.manual_seed(5)
        criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)))
        still = torch.optim.SGD(criterion.weight_net.parameters(), lr=0.0)
        setting = Setting(criterion=criterion, meta_optimizer=still, accumulate=accumulate)
        optimizer = setting.wrapped()
        collected = []
        for step in range(1, 5):
            optimizer.zero_grad()
            setting.loss().backward()
            optimizer.step()
            gradients = [p.grad for p in criterion.weight_net.parameters()]
            if step % accumulate == 0:
                collected.append([gradient.clone() for gradient in gradients])
            else:
                assert gradients == [None] * len(gradients)
                criterion.zero_grad()  # a module that holds the criterion clears its parameters
        return collected

    single, averaged = gradients(1), gradients(2)
    for average, pair in zip(averaged, (single[:2], single[2:]), strict=True):
        mean = [(a + b) / 2 for a, b in zip(*pair, strict=True)]
        assert relative_error(average, mean) < 1e-6


def test_a_hypergradient_that_is_not_finite_counts_as_zero():
    setting = Setting(meta_loss=lambda logits, targets: logits.sum() * scale[0])
    scale = [1.0]
    optimizer = setting.wrapped()
    for value in (1.0, float("nan"), 1.0):
        scale[0] = value
        optimizer.zero_grad()
        setting.loss().backward()
        optimizer.step()
    assert optimizer.metrics["skipped_updates"] == 1
    assert optimizer.metrics["meta_updates"] == 2
    assert all(p.isfinite().all() for p in setting.criterion.weight_net.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.ASGD, torch.optim.Rprop])
def test_paper_works_with_any_optimizer(optimizer):
    setting = Setting(method="paper")
    setting.inner = optimizer(setting.student.parameters(), lr=1e-3)
    wrapped = setting.wrapped()
    batch = setting.run.batches(1)[0]
    before = [p.clone() for p in setting.student.parameters()]

    def closure():
        wrapped.zero_grad()
        loss = setting.criterion(setting.student(batch[0]), *batch[1:])
        loss.backward()
        return loss

    losses = [wrapped.step(closure).item() for _ in range(5)]
    assert wrapped.metrics["meta_updates"] == 5
    assert relative_error(setting.student.parameters(), before) > 0
    assert losses[-1] < losses[0]


def test_metrics_are_the_step_s_even_after_an_evaluation():
    setting = Setting()
    optimizer = setting.wrapped()
    setting.loss().backward()
    optimizer.step()
    metrics = optimizer.metrics
    with torch.no_grad():
        setting.criterion(100 * torch.randn(2, CLASSES), torch.randn(2, CLASSES), torch.arange(2))
    assert optimizer.metrics == metrics


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused(copied):
    with pytest.raises(TypeError, match="was to be copied or pickled") as error:
        copied(Setting().wrapped())
    assert_one_sentence(error)


def test_wrapping_anew_ends_the_older_wrapper():
    """As a second run of a notebook's cell does, or a framework that asks for optimizers twice."""
    setting = Setting()
    older = setting.wrapped()
    hooks = len(setting.student._forward_hooks), len(setting.criterion._forward_hooks)
    newer = setting.wrapped()
    assert (len(setting.student._forward_hooks), len(setting.criterion._forward_hooks)) == hooks
    setting.loss().backward()
    before = [p.clone() for p in setting.student.parameters()]
    with pytest.raises(RuntimeError, match="wrapped in another one since") as error:
        older.step()
    assert_one_sentence(error)
    assert relative_error(setting.student.parameters(), before) == 0
    newer.step()
    assert newer.metrics["meta_updates"] == 1 and older.metrics["meta_updates"] == 0


def test_after_close_the_optimizer_goes_on_alone():
    setting = Setting()
    optimizer = setting.wrapped()
    optimizer.close()
    before = phi(setting.criterion)
    setting.loss().backward()
    optimizer.step()
    assert relative_error(phi(setting.criterion), before) == 0


def test_a_replica_of_several_devices_is_refused():
    setting = Setting()
    optimizer = setting.wrapped()
    replica = setting.student._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="replica that nn.DataParallel made") as error:
        replica(setting.run.inputs())
    assert_one_sentence(error)
    assert optimizer.metrics["meta_updates"] == 0


def test_the_criterion_follows_a_student_that_moves_after_wrapping():
    setting = Setting()
    optimizer = setting.wrapped()
    setting.student.to("meta")  # a device without data, on every machine
    with torch.no_grad():
        setting.student(setting.run.inputs().to("meta"))
    assert {p.device.type for p in setting.criterion.parameters()} == {"meta"}
    assert optimizer.param_groups is setting.inner.param_groups


def test_a_step_without_any_gradient_is_the_plain_one():
    setting = Setting(every=2)
    optimizer = setting.wrapped()
    for gives_up in (False, True, False):
        optimizer.zero_grad()
        if not gives_up:
            setting.loss().backward()
        optimizer.step()
    assert optimizer.metrics["meta_updates"] == 1


def test_meta_inputs_get_the_precision_of_the_training_inputs():
    setting = Setting(student=MLP().double())
    optimizer = setting.wrapped()
    inputs, teacher_logits, labels = setting.run.batches(1)[0]
    setting.criterion(setting.student(inputs.double()), teacher_logits.double(), labels).backward()
    optimizer.step()
    assert optimizer.metrics["meta_updates"] == 1
