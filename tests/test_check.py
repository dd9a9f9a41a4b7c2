"""The check of a whole loop: right for right loops, red for what the invariants cannot see."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.check import check_hypergradient
from kd_balance.data import BalancedBatches


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 5)
        )
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.seen = [0]

    def forward(self, inputs):
        self.seen[0] += 1
        return self.net(inputs)


class Loop:
    """A loop with a scheduler, an average, a counter and random numbers of three kinds."""

    def __init__(self, dtype=torch.float64, between=lambda loop: None, of_loss=lambda _, x: x,
                 **settings):
        torch.manual_seed(0)
        self.student = Student().to(dtype)
        self.criterion = WeightedKDLoss(MetaWeightNet(hidden=(6,))).to(dtype)
        meta = BalancedBatches(torch.randn(30, 4, dtype=dtype), torch.arange(30) % 5, 10, seed=0)
        optimizer = torch.optim.SGD(self.student.parameters(), 0.2, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        settings = {"unroll": 3, "every": 5, **settings}
        self.optimizer = BilevelOptimizer(
            optimizer, self.student, self.criterion, meta, **settings
        )
        self.average = copy.deepcopy(self.student)
        self.steps = 0
        self.between, self.of_loss = between, of_loss
        self.batches = [
            (torch.randn(8, 4, dtype=dtype), torch.randn(8, 5, dtype=dtype),
             torch.randint(0, 5, (8,)))
            for _ in range(12)
        ]

    def step(self, batch):
        inputs, teacher_logits, labels = batch
        inputs += 0.1 * (torch.rand(1).item() + random.random() + np.random.rand())
        loss = self.criterion(self.student(inputs), teacher_logits, labels)
        self.optimizer.zero_grad()
        self.of_loss(self, loss).backward()
        self.between(self)
        self.optimizer.step()
        self.scheduler.step()
        self.steps += 1
        torch.rand(1)
        with torch.no_grad():
            for mine, other in zip(self.average.parameters(), self.student.parameters()):
                mine.lerp_(other, 0.1)

    def state(self):
        """Everything that one can ask of it, copied."""
        return copy.deepcopy([
            self.student.state_dict(), self.average.state_dict(), self.optimizer.state_dict(),
            [p.grad for p in [*self.student.parameters(), *self.criterion.parameters()]],
            self.scheduler.state_dict(), self.steps, self.student.seen,
            torch.get_rng_state(), random.getstate(), np.random.get_state(), self.batches,
            self.criterion.__dict__.get("_weights"),
        ])


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other):
            assert_same(left, right)
    else:
        assert one == other or one != one


@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
@pytest.mark.parametrize("method", ["online", "lookahead", "paper"])
def test_a_right_loop_passes(method, engine):
    loop = Loop(method=method, engine=engine)
    report = check_hypergradient(loop.optimizer, loop.step, loop.batches)
    assert report.passed and report.error < 1e-8
    assert "3 steps" in str(report)


@pytest.mark.parametrize("unroll", [1, 4])
def test_float32_passes_within_its_tolerance(unroll):
    loop = Loop(torch.float32, unroll=unroll)
    assert check_hypergradient(loop.optimizer, loop.step, loop.batches).tolerance == 0.03


@pytest.mark.filterwarnings("ignore:.*called between steps that")
@pytest.mark.parametrize("steps_before", [0, 3, 6])
@pytest.mark.parametrize("method", ["online", "lookahead"])
def test_everything_is_put_back(method, steps_before):
    loop, undisturbed = Loop(method=method), Loop(method=method)
    for mine in (undisturbed, loop):
        random.seed(0), np.random.seed(0), torch.manual_seed(1)
        for batch in mine.batches[:steps_before]:
            mine.step(copy.deepcopy(batch))
        if mine is loop:
            before = loop.state()
            check_hypergradient(loop.optimizer, loop.step, copy.deepcopy(loop.batches))
            assert_same(loop.state(), before)
        for batch in mine.batches[steps_before:10]:
            mine.step(copy.deepcopy(batch))
    assert_same(loop.state(), undisturbed.state())


def by_its_own_value(_, loss):
    return loss * loss.item()


def with_curvature_of_another_loss(loop, loss):
    return loss + sum(p.pow(4).sum() for p in loop.student.parameters())


@pytest.mark.parametrize("of_loss", [by_its_own_value, with_curvature_of_another_loss])
def test_finds_what_the_invariants_cannot(of_loss):
    loop = Loop(of_loss=of_loss)
    before = loop.state()
    with pytest.raises(RuntimeError, match="relative error of .*, expected at most 1e-05"):
        check_hypergradient(loop.optimizer, loop.step, loop.batches)
    assert_same(loop.state()[:-2], before[:-2])
    report = check_hypergradient(loop.optimizer, loop.step, loop.batches, raise_exception=False)
    assert not report.passed and report.error > 1e-3


def test_finds_a_wrong_engine(monkeypatch):
    loop = Loop()
    engine = type(loop.optimizer._steps.meta_update.engine)
    right = engine.__call__

    def wrong(*args):
        loss, gradients = right(*args)
        return loss, [gradients[0] * 1.01, *gradients[1:]]

    monkeypatch.setattr(engine, "__call__", wrong)
    with pytest.raises(RuntimeError, match="relative error"):
        check_hypergradient(loop.optimizer, loop.step, loop.batches)


def negated(loop):
    for param in loop.student.parameters():
        if param.grad is not None:
            param.grad.neg_()


def test_a_window_in_which_nothing_moves_is_told():
    loop = Loop()
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0
    report = check_hypergradient(loop.optimizer, loop.step, loop.batches)
    assert report.error == 0 and "learning rate of 0" in str(report)


def test_a_student_that_registers_a_hook_in_its_first_call():
    loop = Loop()

    def step(batch):
        if not loop.student.net._forward_hooks:
            loop.student.net.register_forward_hook(lambda *_: None)
        loop.step(batch)

    assert check_hypergradient(loop.optimizer, step, loop.batches).passed
    assert not dict(loop.student.net._forward_hooks)


def test_a_loop_that_calls_the_criterion_after_the_step_passes():
    loop = Loop()

    def step(batch):
        loop.step(batch)
        logits = torch.zeros(2, 5).double()
        loop.criterion(logits, logits, torch.zeros(2).long())

    assert check_hypergradient(loop.optimizer, step, loop.batches).error < 1e-8


def test_a_refused_loop_is_refused_or_reported():
    loop = Loop(between=negated)
    before = loop.state()
    with pytest.raises(ValueError, match="gradients"):
        check_hypergradient(loop.optimizer, loop.step, loop.batches)
    report = check_hypergradient(loop.optimizer, loop.step, loop.batches, raise_exception=False)
    assert not report.passed and str(report).startswith("Refused: ")
    assert_same(loop.state()[:-2], before[:-2])


def test_a_loop_that_draws_from_elsewhere_is_told():
    source = iter(range(1, 10**9))
    loop = Loop(between=lambda loop: [p.data.mul_(1 + 1e-3 * (next(source) % 7))
                                      for p in loop.average.parameters()],
                of_loss=lambda _, loss: loss * next(source))
    report = check_hypergradient(loop.optimizer, loop.step, loop.batches, raise_exception=False)
    assert not report.passed and "run again" in str(report)


def test_too_few_batches():
    loop = Loop()
    with pytest.raises(ValueError, match="batches ended after 2"):
        check_hypergradient(loop.optimizer, loop.step, loop.batches[:2])


def test_micro_batches_and_closures():
    loop = Loop()
    count = [0]

    def step(batch):
        inputs, teacher_logits, labels = batch
        loss = loop.criterion(loop.student(inputs), teacher_logits, labels) / 2
        loss.backward()
        count[0] += 1
        if count[0] % 2 == 0:
            nn.utils.clip_grad_norm_(loop.student.parameters(), 0.1)
            loop.optimizer.step()
            loop.optimizer.zero_grad()

    assert check_hypergradient(loop.optimizer, step, loop.batches).passed
    assert count == [0]

    def closure_step(batch):
        def closure():
            loop.optimizer.zero_grad()
            loss = loop.criterion(loop.student(batch[0]), batch[1], batch[2])
            loss.backward()
            return loss

        loop.optimizer.step(closure)

    assert check_hypergradient(loop.optimizer, closure_step, loop.batches).error < 1e-7


def test_bfloat16_is_too_coarse_or_passes():
    loop = Loop(torch.float32)
    step = loop.step

    def in_bfloat16(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step(batch)

    report = check_hypergradient(loop.optimizer, in_bfloat16, loop.batches, raise_exception=False)
    assert report.passed or "too coarse" in str(report)


def deep_loop(blocks):
    """Blocks of batch norm and ReLU: the deeper, the more kinks within a short move."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16)]
    for _ in range(blocks):
        layers += [nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16)]
    loop = Loop()
    loop.optimizer.close()
    student = nn.Sequential(*layers, nn.Linear(16, 5)).double()
    loop.criterion.weight_net.layers[-2].weight.data.normal_()
    loop.student = student
    loop.optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), 0.1), student, loop.criterion,
        BalancedBatches(torch.randn(30, 4).double(), torch.arange(30) % 5, 10, seed=0),
        unroll=4, every=4,
    )

    def step(batch):
        inputs, teacher_logits, labels = batch
        loss = loop.criterion(student(inputs), teacher_logits, labels)
        loop.optimizer.zero_grad()
        loss.backward()
        loop.optimizer.step()

    return loop, step


def test_a_student_with_many_kinks_is_checked_by_shorter_moves():
    loop, step = deep_loop(14)
    assert check_hypergradient(loop.optimizer, step, loop.batches).error < 1e-5


def test_a_student_with_too_many_kinks_is_not_judged():
    loop, step = deep_loop(30)
    report = check_hypergradient(loop.optimizer, step, loop.batches, raise_exception=False)
    assert "too coarse" in str(report) and "unroll=1" in str(report)


def test_objects_whose_attributes_are_no_dict_are_left_alone():
    class Sealed:  # as a protocol buffer is
        @property
        def __dict__(self):
            return type(self).__dict__

    loop = Loop()
    loop.sealed = Sealed()
    assert check_hypergradient(loop.optimizer, loop.step, loop.batches).passed


def test_a_loss_of_the_student_s_own_in_float32_leaves_a_float64_check_strict():
    class WithLoss(Student):
        def forward(self, inputs):
            logits = super().forward(inputs)
            return {"loss": logits.float().square().mean(), "logits": logits}

    loop = Loop()
    loop.optimizer.close()
    student = WithLoss().double()
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), 0.2), student, loop.criterion,
        [(torch.randn(10, 4).double(), torch.arange(10) % 5)], unroll=2, every=2,
    )

    def step(batch):
        loss = loop.criterion(student(batch[0])["logits"], *batch[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert check_hypergradient(optimizer, step, loop.batches).tolerance == 1e-5


def test_a_weight_net_of_a_coarser_format_than_the_student_s_is_no_fault():
    loop = Loop()
    loop.criterion.weight_net.float()
    report = check_hypergradient(loop.optimizer, loop.step, loop.batches)
    assert report.passed and report.tolerance > 1e-5
