"""The wrapper wrapped again by accelerate."""

import pytest
import torch

from tests.habits import Lab, assert_differentiates, assert_one_sentence, trained
from tests.students import OPTIMIZERS, relative_error
from tests.test_habits_modules import Dropped

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from kd_balance import BilevelOptimizer  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerators share their state within a process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def by_accelerate(steps, clip=None, pieces=1, **settings):
    """A loop in accelerate's words."""

    def loop(lab):
        accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=pieces, **settings
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(lab.optimizer, 0.3, total_steps=9)
        lab.rates = []
        student, optimizer, scheduler = accelerator.prepare(lab.called, lab.optimizer, scheduler)
        for inputs, teacher_logits, labels in lab.batches(steps * pieces, 4):
            with accelerator.accumulate(student):
                loss = lab.criterion(student(inputs), teacher_logits, labels)
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(student.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            group = innermost(optimizer).param_groups[0]
            lab.rates.append((group["lr"], group["momentum"]))

    return loop


def innermost(optimizer):
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def in_plain_words(steps, clip=None):
    def loop(lab):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(lab.optimizer, 0.3, total_steps=9)
        for inputs, teacher_logits, labels in lab.batches(steps, 4):
            lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(lab.student.parameters(), clip)
            lab.optimizer.step()
            scheduler.step()
            lab.optimizer.zero_grad()

    return loop


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_prepared(clip, pieces):
    """The scheduler moves the innermost rate and momentum, and everything is right with them."""
    loop = by_accelerate(3, clip, pieces)
    lab, bare = (trained(loop, wrapped=wrapped, make=Dropped) for wrapped in (True, False))
    assert isinstance(lab.optimizer, BilevelOptimizer)
    assert lab.rates == bare.rates and len(set(lab.rates)) >= 3
    assert relative_error(lab.student.parameters(), bare.student.parameters()) == 0
    assert_differentiates(loop, steps=3, make=Dropped, rtol=1e-4)
    if pieces == 1:
        assert_differentiates(
            loop, reference=in_plain_words(3, clip), steps=3, make=Dropped, rtol=1e-4
        )


def test_mixed_precision():
    loop = by_accelerate(2, mixed_precision="bf16")
    options = dict(wrapped=True, dtype=torch.float32, make=Dropped)
    settings = {"unroll": 2, "every": 2}
    lab = trained(loop, settings=settings, **options)
    fresh = accelerate.state.AcceleratorState._reset_state
    fresh(reset_partial_state=True)
    reference = trained(loop, settings={**settings, "engine": "unroll"}, **options)
    precise = trained(in_plain_words(2), settings=settings, **options)
    assert relative_error([lab.hypergradient], [reference.hypergradient]) < 3e-2
    assert 0 < relative_error([lab.hypergradient], [precise.hypergradient]) < 0.2
    assert lab.criterion.weights.dtype == torch.float32


def test_a_prepared_optimizer_is_refused():
    """The wrapper goes inside: it is made first and prepared afterwards."""
    lab = Lab()
    prepared = accelerate.Accelerator(cpu=True).prepare(OPTIMIZERS["sgd"](lab.student.parameters()))
    with pytest.raises(ValueError, match="optimizer is AcceleratedOptimizer") as error:
        BilevelOptimizer(prepared, lab.student, lab.criterion, lab.meta)
    assert_one_sentence(error)


def test_its_checkpoint(tmp_path):
    """save_state and load_state hold the weight net too, through the optimizer."""
    labs = []
    for start in (0, 3):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True)
        lab = Lab()
        lab.wrap(rate=0.1)
        student, optimizer = accelerator.prepare(lab.student, lab.optimizer)
        if start:
            accelerator.load_state(tmp_path)
        for inputs, teacher_logits, labels in list(lab.batches(6))[start:]:
            optimizer.zero_grad()
            accelerator.backward(lab.criterion(student(inputs), teacher_logits, labels))
            optimizer.step()
            if lab.optimizer.metrics["meta_updates"] == 3 and not start:
                accelerator.save_state(tmp_path)
        labs.append(lab)
    assert labs[0].optimizer.metrics == labs[1].optimizer.metrics
    assert relative_error(labs[1].student.parameters(), labs[0].student.parameters()) == 0
    assert relative_error([labs[1].table], [labs[0].table]) == 0
