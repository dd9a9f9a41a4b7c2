"""Between forward and step: micro-batches, clipping, clearing gradients, closures."""

import pytest
import torch
from torch import nn

from tests.habits import (
    Lab,
    assert_differentiates,
    assert_leaves_what_the_plain_loop_leaves,
    assert_one_sentence,
    plain,
    trained,
)
from tests.students import ConvNet, relative_error, two_groups

# micro-batches


def micro_batches(steps=1, sizes=(4, 4, 1), joined=False):
    """Batches in pieces, the last one smaller; factors make the pieces one mean over all."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(steps, sum(sizes)):
            lab.optimizer.zero_grad()
            if joined:
                lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
            else:
                pieces = zip(*(x.split(sizes) for x in (inputs, teacher_logits, labels)))
                for x, t, y in pieces:
                    loss = lab.criterion(lab.called(x), t, y) * (len(x) / sum(sizes))
                    loss.backward()
            lab.optimizer.step()

    return loop


@pytest.mark.parametrize("make", [None, ConvNet])
@pytest.mark.parametrize("steps", [1, 3])
def test_micro_batches(steps, make):
    options = dict(make=make, shape=(2, 6, 6)) if make else {}
    assert_differentiates(micro_batches(steps), steps=steps, **options)
    assert_leaves_what_the_plain_loop_leaves(micro_batches(steps), **options)


def sample_hypergradients(loop, method, **settings):
    """[N, 2] with one weight for each sample of the whole batch, by a net of the features."""
    lab = Lab()
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2), nn.Sigmoid()).double()
    lab.criterion.weight_net = net
    lab.wrap(method=method, **settings)
    loop(lab)
    return [p.grad for p in net.parameters()], list(lab.student.parameters())


@pytest.mark.parametrize("method", ["online", "lookahead", "paper"])
@pytest.mark.parametrize("sizes", [(3, 3, 3), (4, 4, 1)])
def test_micro_batches_are_one_big_batch(sizes, method):
    settings = dict(rate=0.1, unroll=2, every=2)
    pieces = sample_hypergradients(micro_batches(2, sizes), method, **settings)
    whole = sample_hypergradients(micro_batches(2, sizes, joined=True), method, **settings)
    for actual, expected in zip(pieces, whole, strict=True):
        assert relative_error(actual, expected) < 1e-9


# clipping

SECOND = ("fc2.weight", "fc2.bias")


def by_data(lab):
    """As old code does, past autograd."""
    for param in lab.student.parameters():
        param.grad.data.clamp_(-0.02, 0.02)


CLIPPINGS = {
    "norm": lambda lab: nn.utils.clip_grad_norm_(lab.student.parameters(), 0.05),
    "norm, not reached": lambda lab: nn.utils.clip_grad_norm_(lab.student.parameters(), 100.0),
    "norm of some": lambda lab: nn.utils.clip_grad_norm_(lab.student.fc2.parameters(), 0.05),
    "norm of those in groups": lambda lab: nn.utils.clip_grad_norm_(
        [p for group in lab.optimizer.param_groups for p in group["params"]], 0.05
    ),
    "norm, one by one call": lambda lab: nn.utils.clip_grads_with_norm_(
        lab.student.parameters(), 0.05, nn.utils.get_total_norm(
            [p.grad for p in lab.student.parameters()]
        )
    ),
    "value": lambda lab: nn.utils.clip_grad_value_(lab.student.parameters(), 0.02),
    "value, not reached": lambda lab: nn.utils.clip_grad_value_(lab.student.parameters(), 9.0),
    "value of some": lambda lab: nn.utils.clip_grad_value_(lab.student.fc2.parameters(), 0.02),
    "value by .data": by_data,
}


def clipped(name, steps, sizes=(9,)):
    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(steps, sum(sizes)):
            lab.optimizer.zero_grad()
            pieces = zip(*(x.split(sizes) for x in (inputs, teacher_logits, labels)))
            for x, t, y in pieces:
                lab.criterion(lab.called(x), t, y).backward()
            CLIPPINGS[name](lab)
            lab.optimizer.step()

    return loop


@pytest.mark.parametrize("steps, sizes", [(1, (5, 4)), (3, (9,))])
@pytest.mark.parametrize("name", CLIPPINGS)
def test_clipping(name, steps, sizes):
    assert_differentiates(clipped(name, steps, sizes), steps=steps, rtol=1e-4)


@pytest.mark.parametrize("name", CLIPPINGS)
def test_clipping_leaves_the_student_of_the_plain_loop(name):
    assert_leaves_what_the_plain_loop_leaves(clipped(name, 2))


def test_clipping_over_student_and_criterion_leaves_the_student_of_the_plain_loop():
    """What the meta optimizer has used is no part of the norm of the loop's own gradients."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(3):
            lab.optimizer.zero_grad()
            lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
            both = nn.ModuleList([lab.student, lab.criterion])
            nn.utils.clip_grad_norm_(both.parameters(), 0.01)
            lab.optimizer.step()

    assert_leaves_what_the_plain_loop_leaves(loop)


def test_clipping_by_data_that_begins_late():
    """The first step, which is tried out, sees nothing of it."""

    def loop(lab):
        for index, (inputs, teacher_logits, labels) in enumerate(lab.batches(3)):
            lab.optimizer.zero_grad()
            lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
            if index > 0:
                by_data(lab)
            lab.optimizer.step()

    assert_differentiates(loop, steps=3, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_clipping_before_an_adaptive_step(optimizer):
    assert_differentiates(clipped("norm", 3), steps=3, optimizer=optimizer, rtol=1e-3)


def head_only(params):
    return torch.optim.SGD(list(params)[2:], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("name", ["norm of some", "norm of those in groups", "value"])
def test_clipping_a_student_that_is_partly_in_the_optimizer(name):
    assert_differentiates(clipped(name, 2), steps=2, optimizer=head_only, rtol=1e-4)


def test_clipping_by_a_norm_over_parameters_that_no_optimizer_holds_is_refused():
    lab = Lab(optimizer=head_only)
    lab.wrap()
    with pytest.raises(ValueError, match="norm over more parameters of the student") as error:
        clipped("norm", 1)(lab)
    assert_one_sentence(error)


EDITS = {
    "half of them scaled": lambda ps: [ps[i].grad.mul_(0.3 + 0.1 * i) for i in (0, 1)],
    "enlarged": lambda ps: [p.grad.mul_(3.0) for p in ps],
    "noise": lambda ps: [p.grad.add_(torch.randn_like(p.grad)) for p in ps],
    "sign": lambda ps: [p.grad.sign_() for p in ps],
}


@pytest.mark.parametrize("name", EDITS)
def test_other_changes_to_the_gradients_are_refused(name):
    lab = Lab()
    lab.wrap()
    inputs, teacher_logits, labels = next(lab.batches(1))
    lab.criterion(lab.student(inputs), teacher_logits, labels).backward()
    params = list(lab.student.parameters())
    before = [p.detach().clone() for p in params]
    EDITS[name](params)
    with pytest.raises(ValueError, match="something else than torch's clip_grad_norm_") as error:
        lab.optimizer.step()
    assert_one_sentence(error)
    assert relative_error(params, before) == 0


SCALINGS = {
    "largest norm": lambda ps: nn.utils.clip_grad_norm_(ps, 0.01, norm_type=float("inf")),
    "by hand": lambda ps: [p.grad.div_(3) for p in ps],
}


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaling_that_is_no_clipping_to_a_norm_warns(name):
    lab = Lab()
    lab.wrap()
    with pytest.warns(UserWarning, match="scaled between backward.* counts as clip_grad_norm_"):
        for inputs, teacher_logits, labels in lab.batches(2):
            lab.optimizer.zero_grad()
            lab.criterion(lab.student(inputs), teacher_logits, labels).backward()
            SCALINGS[name](list(lab.student.parameters()))
            lab.optimizer.step()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("factor", [0.25, 2.0])
def test_gradients_scaled_by_a_power_of_two(factor, steps):
    """Told from clipping by its exactness; a loss scale taken out by hand is one."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(steps):
            lab.optimizer.zero_grad()
            lab.criterion(lab.student(inputs), teacher_logits, labels).backward()
            for param in lab.student.parameters():
                param.grad *= factor
            lab.optimizer.step()

    assert_differentiates(loop, steps=steps)


@pytest.mark.parametrize("method", ["lookahead", "paper"])
@pytest.mark.parametrize("name", ["norm", "value"])
def test_the_lookahead_methods_refuse_clipped_gradients(name, method):
    lab = Lab()
    lab.wrap(method=method)
    before = [p.detach().clone() for p in lab.student.parameters()]
    with pytest.raises(ValueError, match="gradients were clipped and method is") as error:
        clipped(name, 1)(lab)
    assert_one_sentence(error)
    assert relative_error(lab.student.parameters(), before) == 0
    clipped("norm, not reached", 1)(lab)


def test_a_gradient_that_is_not_finite_stays_the_loop_s_own_affair():
    """The loss is finite, its derivative is not: the student ends as in the plain loop."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(1):
            lab.optimizer.zero_grad()
            loss = lab.criterion(lab.student(inputs), teacher_logits, labels)
            (loss + (lab.student.fc1.bias * 0.0).abs().sqrt().sum()).backward()
            lab.optimizer.step()

    expected, lab = (trained(loop, wrapped=wrapped) for wrapped in (False, True))
    torch.testing.assert_close(
        lab.student.state_dict(), expected.student.state_dict(), rtol=0, atol=0, equal_nan=True
    )
    assert lab.optimizer.metrics["skipped_updates"] > 0


# clearing gradients, closures

CLEARINGS = {
    "optimizer.zero_grad()": lambda lab: lab.optimizer.zero_grad(),
    "optimizer.zero_grad(False)": lambda lab: lab.optimizer.zero_grad(set_to_none=False),
    "model.zero_grad()": lambda lab: lab.student.zero_grad(),
    "model.zero_grad(False)": lambda lab: lab.student.zero_grad(set_to_none=False),
    "by hand": lambda lab: [setattr(p, "grad", None) for p in lab.student.parameters()],
}


def clearing(name, where, steps=3):
    """The gradients cleared at one of the places where loops do it."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(steps):
            if where == "first":
                CLEARINGS[name](lab)
            loss = lab.criterion(lab.called(inputs), teacher_logits, labels)
            if where == "before backward":
                CLEARINGS[name](lab)
            loss.backward()
            lab.optimizer.step()
            if where == "after step":
                CLEARINGS[name](lab)

    return loop


@pytest.mark.parametrize("where", ["first", "before backward", "after step"])
@pytest.mark.parametrize("name", CLEARINGS)
def test_clearing_gradients(name, where):
    assert_differentiates(clearing(name, where), steps=3)
    assert_leaves_what_the_plain_loop_leaves(clearing(name, where))


@pytest.mark.parametrize("name", CLEARINGS)
def test_a_batch_that_the_loop_gave_up_leaves_no_trace(name):
    """Backward was called, then the gradients were cleared and no step was taken."""

    def loop(lab):
        for index, (inputs, teacher_logits, labels) in enumerate(lab.batches(4)):
            loss = lab.criterion(lab.called(inputs), teacher_logits, labels)
            loss.backward()
            if index % 2 == 0:
                CLEARINGS[name](lab)
                continue
            lab.optimizer.step()
            CLEARINGS[name](lab)

    assert_differentiates(loop, steps=2)
    assert_leaves_what_the_plain_loop_leaves(loop)


def first_step_apart(lab):
    """The same two steps, the first under weights that are not nudged."""
    direction = lab.table.detach() - Lab().table.detach()
    lab.table.data -= direction
    for index, (inputs, teacher_logits, labels) in enumerate(lab.batches(2)):
        lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
        lab.optimizer.step()
        lab.table.data += direction * (index == 0)


def test_gradients_that_are_never_cleared():
    """What earlier steps left in them counts as constant."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(2):
            lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
            lab.optimizer.step()

    assert_leaves_what_the_plain_loop_leaves(loop)
    assert_differentiates(loop, settings={"unroll": 1, "every": 2}, reference=first_step_apart)


def test_step_with_a_closure():
    def loop(lab):
        for batch in lab.batches(3):

            def closure(batch=batch):
                inputs, teacher_logits, labels = batch
                lab.optimizer.zero_grad()
                loss = lab.criterion(lab.called(inputs), teacher_logits, labels)
                loss.backward()
                return loss

            returned = lab.optimizer.step(closure)
            assert returned.item() > 0

    assert_differentiates(loop, reference=plain(3), steps=3)
    assert_leaves_what_the_plain_loop_leaves(loop)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
def test_the_step_within_no_grad(optimizer, mode):
    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(2):
            lab.optimizer.zero_grad()
            lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
            with mode():
                lab.optimizer.step()

    assert_differentiates(loop, reference=plain(2), steps=2, optimizer=optimizer, rtol=1e-4)
    for method in ("lookahead", "paper"):
        settings = {"method": method}
        lab, expected = (
            trained(each, wrapped=True, optimizer=optimizer, settings=settings)
            for each in (loop, plain(2))
        )
        assert relative_error([lab.hypergradient], [expected.hypergradient]) < 1e-12
        assert relative_error(lab.student.parameters(), expected.student.parameters()) < 1e-12


@pytest.mark.parametrize("how", ["fused", "foreach"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_and_foreach_optimizers(kind, how):
    def optimizer(params):
        return kind(params, lr=0.01, **{how: True})

    assert_differentiates(plain(2), steps=2, optimizer=optimizer, rtol=1e-4)
    assert_leaves_what_the_plain_loop_leaves(plain(2), optimizer=optimizer)


def test_several_parameter_groups():
    def optimizer(params):
        return torch.optim.SGD(two_groups(optimizer.student), lr=0.1, momentum=0.9)

    class Student(ConvNet):
        def __init__(self):
            super().__init__()
            optimizer.student = self

    options = dict(make=Student, shape=(2, 6, 6), optimizer=optimizer)
    assert_differentiates(micro_batches(2), steps=2, **options)
