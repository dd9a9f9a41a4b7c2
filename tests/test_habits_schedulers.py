"""Learning rate schedulers, made on the wrapper or on the optimizer before it was wrapped."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from tests.habits import assert_differentiates, everything, trained
from tests.students import OPTIMIZERS

STEPS = 6


def sequential(optimizer):
    return schedulers.SequentialLR(
        optimizer,
        [schedulers.LinearLR(optimizer, total_iters=2), schedulers.ExponentialLR(optimizer, 0.5)],
        milestones=[2],
    )


SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, 2, gamma=0.3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 4], gamma=0.3),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=STEPS),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.3, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.3, patience=0),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "SequentialLR": sequential,
}


def scheduled(name, before=False, steps=STEPS):
    """A loop that makes the scheduler itself, before wrapping or after it, and moves it."""

    def loop(lab):
        optimizer = lab.optimizer
        if before:
            optimizer = getattr(optimizer, "optimizer", optimizer)
        scheduler = lab.scheduler if before else SCHEDULERS[name](optimizer)
        lab.seen = []
        for index, (inputs, teacher_logits, labels) in enumerate(lab.batches(steps)):
            lab.optimizer.zero_grad()
            loss = lab.criterion(lab.called(inputs), teacher_logits, labels)
            loss.backward()
            lab.optimizer.step()
            group = lab.optimizer.param_groups[0]
            lab.seen.append((group["lr"], group.get("momentum", group.get("betas"))))
            if name == "ReduceLROnPlateau":
                scheduler.step(1.0 + index)
            else:
                scheduler.step()

    return loop


def scheduled_before(name):
    """Laboratory options whose optimizer already has its scheduler when it is wrapped."""
    made = []

    def optimizer(kind):
        def make(params):
            inner = OPTIMIZERS[kind](params)
            made.append(SCHEDULERS[name](inner))
            return inner

        return make

    def loop(lab):
        lab.scheduler = made.pop()
        scheduled(name, before=True)(lab)

    return loop, optimizer


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_moves_the_innermost_rate(name, optimizer):
    """The student is that of the plain loop, bit by bit, and no scheduler warns of its order."""
    before, make_optimizer = scheduled_before(name)
    after = scheduled(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        plain = trained(after, wrapped=False, optimizer=optimizer)
        expected = everything(plain)
        by_itself = {str(warning.message) for warning in told}  # SequentialLR does, before 2.7
        for loop, kind in ((after, optimizer), (before, make_optimizer(optimizer))):
            lab = trained(loop, wrapped=True, optimizer=kind)
            assert lab.seen == plain.seen
            torch.testing.assert_close(everything(lab), expected, rtol=0, atol=0)
    assert {str(warning.message) for warning in told} == by_itself
    rates = {rate for rate, _ in plain.seen}
    assert len(rates) > 1
    if name == "OneCycleLR":
        assert len({momentum for _, momentum in plain.seen}) > 1


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_hypergradient_passes_through_the_moved_rates(name, optimizer):
    """All six steps, each under the rate and momentum that it was taken with."""
    if optimizer == "sgd-momentum":
        assert_differentiates(scheduled(name), steps=STEPS)
    else:
        assert_differentiates(scheduled(name, steps=3), steps=3, optimizer=optimizer, rtol=1e-4)


def by_hand(lab):
    """As RepDistiller's adjust_learning_rate does."""
    for index, (inputs, teacher_logits, labels) in enumerate(lab.batches(3)):
        for group in lab.optimizer.param_groups:
            group["lr"] = 0.1 * 0.3**index
            group["momentum"] = 0.5 + 0.1 * index
        lab.optimizer.zero_grad()
        lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
        lab.optimizer.step()


def test_rates_set_by_hand():
    assert_differentiates(by_hand, steps=3)
    expected = everything(trained(by_hand, wrapped=False))
    torch.testing.assert_close(
        everything(trained(by_hand, wrapped=True)), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "LambdaLR"])
def test_a_rate_that_is_a_tensor(name):
    """A scheduler moves it in place, after the step was recorded."""

    def optimizer(params):
        return torch.optim.SGD(params, lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.9)

    assert_differentiates(scheduled(name), steps=STEPS, optimizer=optimizer)


def test_a_scheduler_state_loads_on_the_wrapper():
    """The scheduler of a resumed run is made on the wrapper and continues."""

    def loop(lab):
        scheduler = SCHEDULERS["StepLR"](lab.optimizer)
        for index, (inputs, teacher_logits, labels) in enumerate(lab.batches(4)):
            lab.optimizer.zero_grad()
            lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
            lab.optimizer.step()
            scheduler.step()
            if index == 1:
                state = scheduler.state_dict()
                scheduler = SCHEDULERS["StepLR"](lab.optimizer)
                scheduler.load_state_dict(state)
                lab.optimizer.param_groups[0]["lr"] = scheduler.get_last_lr()[0]

    expected = everything(trained(loop, wrapped=False))
    torch.testing.assert_close(everything(trained(loop, wrapped=True)), expected, rtol=0, atol=0)
