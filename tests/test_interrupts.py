"""Exceptions in the midst of a step: the next steps are those of a run that begins from there.

    python -m tests.test_interrupts 200 0        # as many lines of each setting, and a seed
"""

import copy
import os
import random
import sys
import warnings
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import nn

import kd_balance
from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.torch_private import function_modes

PACKAGE = os.path.dirname(kd_balance.__file__)
CLASSES, STEP = 3, 5
SETTINGS = {
    "windows": dict(every=3, unroll=2, accumulate=2),
    "unroll engine": dict(every=2, unroll=2, engine="unroll"),
    "lookahead": dict(every=1, unroll=1, method="lookahead"),
}


class Batches:
    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.batch = (
            torch.randn(6, 4, generator=generator, dtype=torch.float64), torch.arange(6) % CLASSES
        )
        self.error = None

    def __iter__(self):
        if self.error is not None:
            raise self.error
        yield self.batch


class Training:
    def __init__(self, seed=0, **settings):
        torch.manual_seed(seed)
        self.student = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, CLASSES)
        ).double()
        self.criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)).double())
        self.inner = torch.optim.SGD(self.student.parameters(), 0.1, 0.9)
        self.batches = Batches()
        self.optimizer = BilevelOptimizer(
            self.inner, self.student, self.criterion, self.batches, **settings
        )

    def step(self, number):
        generator = torch.Generator().manual_seed(100 + number)
        inputs = torch.randn(6, 4, generator=generator).double()
        teacher = torch.randn(6, CLASSES, generator=generator).double()
        targets = torch.randint(CLASSES, (6,), generator=generator)
        self.optimizer.zero_grad()
        self.criterion(self.student(inputs), teacher, targets).backward()
        self.optimizer.step()

    def run(self, start, stop):
        for number in range(start, stop):
            torch.manual_seed(number)  # of dropout
            self.step(number)
        return self

    def state(self):
        return copy.deepcopy([self.student.state_dict(), self.optimizer.state_dict()])

    def load(self, state):
        for part, its in zip((self.student, self.optimizer), copy.deepcopy(state)):
            part.load_state_dict(its)
        return self


def alike(one, other):
    try:
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


class Base:
    """A run up to a step, and what that step may leave: the state before it, or after it."""

    def __init__(self, name):
        self.settings = SETTINGS[name]
        self.state = Training(**self.settings).run(0, STEP).state()
        first = Training(**self.settings).load(self.state)
        self.before = self.seen(first)
        self.lines, _ = interrupted(first, -1)
        self.after = self.seen(first)

    @staticmethod
    def seen(training):
        student = copy.deepcopy(training.student.state_dict())
        buffers = {n: student.pop(n) for n in list(student) if "running" in n or "num" in n}
        return {"parameters": student, "buffers": buffers,
                "net": copy.deepcopy(training.criterion.state_dict())}

    def faults(self, cut):
        """What is wrong after a step that is cut off.

        Args:
            cut: takes that step of a training, up to an exception.
        """
        training = Training(**self.settings).load(self.state)
        params, flags = list(training.student.parameters()), [m.training for m in training.student]
        cut(training)
        found = []
        if any(p is not q for p, q in zip(training.student.parameters(), params, strict=True)):
            found.append("the student's parameters are others")
        if [m.training for m in training.student] != flags:
            found.append("the student's modes are others")
        if function_modes() or not torch.is_grad_enabled():
            found.append("a mode of torch's is left")
        found += [
            f"the {part} are neither those of before nor of after"
            for part, now in self.seen(training).items()
            if not alike(now, self.before[part]) and not alike(now, self.after[part])
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a window that is not saved
            fresh = Training(seed=3, **self.settings).load(training.state())
            ends = []
            for each in (training, fresh):
                state = each.run(STEP + 1, STEP + 7).state()
                for key in ("window", "window_of"):
                    state[1]["kd_balance"].pop(key, None)
                ends.append(state)
        if not alike(*ends):
            found.append("the later steps are others")
        return found

    def faults_at(self, line):
        """The same of an interrupt at a line, counted; and where that was."""
        where = []
        found = self.faults(lambda training: where.append(interrupted(training, line)[1]))
        return where[0], found


def interrupted(training, line, error=KeyboardInterrupt):
    """Takes a step, raising at a line of the package, counted; the lines, and where it was."""
    count, where = 0, None

    def trace(frame, event, argument):
        nonlocal count, where
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count += 1
            if count == line:
                where = f"{os.path.relpath(frame.f_code.co_filename, PACKAGE)}:{frame.f_lineno}"
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        training.run(STEP, STEP + 1)
    except error:
        pass
    finally:
        sys.settrace(before)
    return count, where


def fails(error):
    def hook(*_):
        raise error

    return hook


PHASES = {
    "the forward pass": lambda t, hook: [t.student[3].register_forward_hook(hook)],
    "the backward pass": lambda t, hook: [t.student[3].register_full_backward_hook(hook)],
    "the criterion": lambda t, hook: [t.criterion.weight_net.register_forward_hook(hook)],
    "before the student's step": lambda t, hook: [t.inner.register_step_pre_hook(hook)],
    "after the student's step": lambda t, hook: [t.inner.register_step_post_hook(hook)],
    "the weight net's step": lambda t, hook: [
        t.optimizer.meta_optimizer.register_step_pre_hook(hook)
    ],
    "a batch norm's replay": lambda t, hook: [
        t.optimizer.register_step_pre_hook(
            lambda *_: handles.append(t.student[1].register_forward_hook(hook))
        )
    ],
}
handles = []


@pytest.mark.parametrize(
    ("name", "error"),
    list(zip(SETTINGS, [KeyboardInterrupt(), RuntimeError("no"), ValueError("no")])),
)
def test_the_steps_after_one_that_was_cut_off(name, error):
    base = Base(name)
    for phase, within in PHASES.items():
        found = base.faults(partial(cut_off, within=within, error=error))
        assert not found, f"{phase}: {found}"


def cut_off(training, within, error):
    handles[:] = within(training, fails(error))
    with suppress(RuntimeError, ValueError, KeyboardInterrupt):
        training.run(STEP, STEP + 1)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", SETTINGS)
def test_at_any_line(name):
    base = Base(name)
    for line in random.Random(0).sample(range(1, base.lines), 4):
        where, found = base.faults_at(line)
        assert not found, f"{where}: {found}"


if __name__ == "__main__":
    for name in SETTINGS:
        base = Base(name)
        lines = random.Random(int(sys.argv[2])).sample(range(1, base.lines), int(sys.argv[1]))
        print(name, base.lines, flush=True)
        for line in lines:
            where, found = base.faults_at(line)
            if found:
                print("  ", where, found, flush=True)
