"""Loops whose record would not be true: right all the same, refused in one sentence, or told."""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad

from kd_balance import BilevelOptimizer, WeightedKDLoss, optimizer as optimizers
from tests.habits import (
    Lab,
    assert_differentiates,
    assert_leaves_what_the_plain_loop_leaves,
    assert_one_sentence,
    plain,
    trained,
)
from tests.students import MLP

ENGINES = ["adjoint", "unroll"]


def loop_of(backward, steps=1, before=lambda lab, k: None, between=lambda lab: None):
    """A loop with its own way of backward, ``backward(lab, logits, loss)``."""

    def loop(lab):
        for k, (inputs, teacher_logits, labels) in enumerate(lab.batches(steps)):
            before(lab, k)
            logits = lab.call(lab.called, inputs)
            loss = lab.criterion(logits, teacher_logits, labels)
            lab.optimizer.zero_grad()
            backward(lab, inputs, loss)
            between(lab)
            lab.optimizer.step()

    return loop


def assert_refused(loop, match, *, settings=None, **options):
    with pytest.raises(ValueError, match=match) as error:
        trained(loop, wrapped=True, settings={"every": 1, "unroll": 1, **(settings or {})},
                **options)
    assert_one_sentence(error)


# what counts as a step's gradient


def in_parts(lab, inputs, loss):
    loss.backward(inputs=list(lab.student.fc1.parameters()), retain_graph=True)
    loss.backward(inputs=list(lab.student.fc2.parameters()))


def in_one_part(lab, inputs, loss):
    loss.backward(inputs=list(lab.student.fc2.parameters()))


def other_loss_for_the_rest(lab, inputs, loss):
    loss.backward(inputs=list(lab.student.fc2.parameters()))
    F.log_softmax(lab.called(inputs), 1).mean().backward(inputs=list(lab.student.fc1.parameters()))


def walked_twice(lab, inputs, loss):
    loss.backward(retain_graph=True)
    (0.3 * loss).backward()


def probed(lab, inputs, loss):
    torch.autograd.grad(loss, lab.student.fc2.weight, retain_graph=True)
    loss.backward(retain_graph=True)
    torch.autograd.grad(loss, lab.student.fc2.weight)


def assigned(lab, inputs, loss):
    params = list(lab.student.parameters())
    for param, gradient in zip(params, torch.autograd.grad(loss, params)):
        param.grad = gradient


def once_raised(lab, inputs, loss):
    def fail(gradient):
        raise RuntimeError("deliberate")

    broken = loss * 1.0
    broken.register_hook(fail)
    with pytest.raises(RuntimeError, match="deliberate"):
        broken.backward(retain_graph=True)
    loss.backward()


def adversarial(lab, inputs, loss):
    probe = inputs.clone().requires_grad_()
    teacher_logits, labels = torch.zeros(9, 5).to(inputs), torch.zeros(9, dtype=torch.long)
    torch.autograd.grad(lab.criterion(lab.called(probe), teacher_logits, labels), probe)
    loss.backward()


GRADIENTS = [in_parts, in_one_part, walked_twice, probed, assigned, once_raised, adversarial]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backward", GRADIENTS)
def test_what_reached_the_gradients_counts_and_nothing_else(backward, engine):
    assert_differentiates(loop_of(backward, 3), steps=3, settings={"engine": engine})
    assert_leaves_what_the_plain_loop_leaves(loop_of(backward, 3))


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_that_only_another_loss_reached_have_no_part(engine):
    settings = {"every": 1, "unroll": 1, "engine": engine}
    assert_differentiates(loop_of(other_loss_for_the_rest), settings=settings)


def test_a_pass_that_nobody_could_watch_is_refused_where_the_step_depends_on_it():
    def by_name(lab, inputs, loss):
        params = list(lab.student.parameters())
        for param, gradient in zip(params, grad(loss.square(), params)):
            param.grad = gradient

    def probed_by_name(lab, inputs, loss):
        grad(loss, lab.student.fc2.weight, retain_graph=True)
        loss.backward()

    assert_refused(loop_of(by_name), "began unseen")
    assert_differentiates(loop_of(probed_by_name), settings={"every": 1, "unroll": 1})


def test_gradients_from_autograd_beside_another_loss_s_backward_are_refused():
    def backward(lab, inputs, loss):
        grads = torch.autograd.grad(loss, list(lab.student.parameters()))
        F.log_softmax(lab.called(inputs), 1).mean().backward()
        for param, gradient in zip(lab.student.parameters(), grads):
            param.grad += gradient

    assert_refused(loop_of(backward), "only torch.autograd.grad went through")


# gradients changed afterwards


def change(edit):
    return loop_of(lambda lab, inputs, loss: loss.backward(), 2, between=edit)


def gradients(lab):
    return [p.grad for p in lab.student.parameters()]


CHANGES = {
    "negated": lambda lab: [g.neg_() for g in gradients(lab)],
    "a layer zeroed": lambda lab: lab.student.fc1.weight.grad.zero_(),
    "rows masked": lambda lab: lab.student.fc1.weight.grad[:3].zero_(),
    "noise of the same norm": lambda lab: [g.copy_(g.flip(0)) for g in gradients(lab)],
    "past autograd": lambda lab: [g.data.neg_() for g in gradients(lab)],
    "normalised by layer": lambda lab: [g.div_(g.norm()) for g in gradients(lab)],
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_gradients_are_refused(name):
    assert_refused(change(CHANGES[name]), "by something else than torch's clip_grad_norm_")


@pytest.mark.parametrize("method", ["online", "lookahead"])
def test_gradients_clipped_between_micro_batches_are_refused(method):
    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(1):
            for part in (slice(5), slice(5, 9)):
                logits = lab.called(inputs[part])
                lab.criterion(logits, teacher_logits[part], labels[part]).backward()
                nn.utils.clip_grad_norm_(lab.student.parameters(), 0.01)
            lab.optimizer.step()

    assert_refused(loop, "changed between two backward passes", settings={"method": method})


def test_gradients_from_autograd_that_were_changed_are_refused():
    def backward(lab, inputs, loss):
        assigned(lab, inputs, loss)
        lab.student.fc1.weight.grad *= 0.5

    assert_refused(loop_of(backward), "gradients differ from the criterion's own")


def test_a_function_of_the_result_before_autograd_is_refused():
    def backward(lab, inputs, loss):
        assigned(lab, inputs, loss.log())

    assert_refused(loop_of(backward), "went through log before")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hook_that_changes_a_parameter_s_gradient_is_refused(engine):
    class Hooked(MLP):
        def __init__(self):
            super().__init__()
            self.fc1.weight.register_hook(lambda gradient: 0.1 * gradient)

    match = "gradients differ from the criterion's own"
    assert_refused(plain(2), match, make=Hooked, settings={"engine": engine})


def test_hooks_that_step_within_backward_are_refused():
    lab = Lab(optimizer="sgd")
    lab.wrap()
    for param in lab.student.parameters():
        own = torch.optim.SGD([param], lr=0.1)

        def step(p, own=own):
            own.step()
            p.grad = None

        param.register_post_accumulate_grad_hook(step)
    with pytest.raises(ValueError, match="hook took away.*within backward") as error:
        plain(1)(lab)
    assert_one_sentence(error)


def test_a_hook_that_only_looks_is_none_of_our_business():
    class Hooked(MLP):
        def __init__(self):
            super().__init__()
            self.fc1.weight.register_hook(lambda gradient: None)

    assert_differentiates(plain(2), steps=2, make=Hooked)


# parameters moved by somebody else


def with_hook(register, function):
    def optimizer(params):
        made = torch.optim.SGD(list(params), lr=0.3, momentum=0.9)
        getattr(made, register)(function)
        return made

    return optimizer


def shrink(optimizer, *_):
    for group in optimizer.param_groups:
        torch._foreach_mul_([p.data for p in group["params"]], 0.5)


def clip(optimizer, *_):
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.01)


HOOKS = {"shrunk": ("register_step_post_hook", shrink), "clipped": ("register_step_pre_hook", clip)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", HOOKS)
def test_a_step_that_a_hook_of_the_optimizer_changed_is_refused(name, engine):
    settings = {"engine": engine}
    optimizer = with_hook(*HOOKS[name])
    assert_refused(plain(2), "the optimizer's step left", optimizer=optimizer, settings=settings)


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_moved_within_a_window_are_refused(engine):
    def move(lab, k):
        with torch.no_grad():
            lab.student.fc1.weight.mul_(0.9)

    loop = loop_of(lambda lab, inputs, loss: loss.backward(), 3, before=move)
    settings = {"unroll": 3, "every": 3, "engine": engine}
    assert_refused(loop, "moved by .* between two steps", settings=settings)
    assert trained(loop, wrapped=True, settings={"unroll": 1, "every": 1}).slope is not None


def test_maximize_turns_the_virtual_step_of_method_paper_too():
    def step(lab):
        inputs, teacher_logits, labels = next(lab.batches(1))
        lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
        lab.optimizer.step()

    up, down = (
        trained(
            step, wrapped=True, settings={"method": "paper"},
            optimizer=partial(torch.optim.SGD, lr=1e-6, maximize=maximize),
        ).hypergradient
        for maximize in (True, False)
    )
    torch.testing.assert_close(up, -down, rtol=1e-4, atol=1e-12)


# what a replay reads later


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_was_written_in_place_is_refused_at_every_update(which):
    def loop(lab):
        for k, batch in enumerate(lab.batches(3)):
            lab.criterion(lab.called(batch[0]), *batch[1:]).backward()
            if k == 2:
                batch[which].add_(1)
            lab.optimizer.step()

    assert_refused(loop, "was written in place since the forward pass")


@pytest.mark.parametrize("name, value", [("temperature", 3.0), ("ignore_index", 1)])
def test_settings_of_the_criterion_changed_before_the_step_are_refused(name, value):
    def change_setting(lab):
        setattr(lab.criterion, name, value)

    assert_refused(change(change_setting), "differ")


def test_an_attribute_annealed_within_a_window_is_refused():
    class Annealed(MLP):
        scale = 1.0

        def forward(self, inputs):
            return self.scale * super().forward(inputs)

    def anneal(lab, k):
        lab.student.scale = 1.0 if k < 3 else 0.8**k

    loop = loop_of(lambda lab, inputs, loss: loss.backward(), 6, before=anneal)
    assert_refused(
        loop, "repeated and gave losses", make=Annealed, settings={"unroll": 3, "every": 3}
    )


class Split(nn.Module):
    """A part that the loop calls by itself."""

    def __init__(self):
        super().__init__()
        self.part, self.rest = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, hidden):
        return self.rest(hidden.tanh())


def test_an_input_made_of_the_student_s_own_parameters_is_refused():
    def call(student, inputs):
        return student(student.part(inputs))

    assert_refused(plain(1), "carries a graph of the student's own", make=Split, call=call)


# what a replay leaves behind


class Writes(MLP):
    """Writes in place into an embedding's weight, an encoder, a tensor, a list and a dict."""

    def __init__(self):
        super().__init__()
        self.bounded = nn.Embedding(4, 8, max_norm=0.5)
        self.encoder = nn.Parameter(torch.zeros(6, 8), requires_grad=False)
        self.mean, self.seen, self.sums = torch.zeros(8).double(), [0], {"n": 0}

    def forward(self, inputs):
        with torch.no_grad():
            self.encoder.mul_(0.9).add_(self.fc1.weight[:6], alpha=0.1)
        self.mean.add_(inputs.mean(0))
        self.seen.append(len(inputs))
        self.sums["n"] += len(inputs)
        index = torch.arange(len(inputs)) % 4
        return super().forward(inputs + self.bounded(index))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_calls_write_in_place_is_what_the_plain_loop_leaves(engine):
    settings = {"every": 1, "unroll": 1, "engine": engine}
    assert_leaves_what_the_plain_loop_leaves(plain(4), make=Writes, settings=settings)
    ours, theirs = (
        trained(plain(4), wrapped=wrapped, make=Writes, settings=settings).student
        for wrapped in (True, False)
    )
    assert torch.equal(ours.mean, theirs.mean)
    assert ours.seen == theirs.seen and ours.sums == theirs.sums


# what only one mode of differentiation sees


class Gated(MLP):
    def forward(self, inputs):
        with torch.no_grad():
            gate = self.fc1(inputs).sigmoid()
        return self.fc2(torch.tanh(self.fc1(inputs)) * gate)


def test_no_grad_within_forward_is_right_and_told():
    with pytest.warns(UserWarning, match="Forward mode and the backward pass disagree"):
        lab = trained(plain(1), wrapped=True, make=Gated, settings={"every": 1, "unroll": 1})
    settings = {"every": 1, "unroll": 1, "engine": "unroll"}
    reference = trained(plain(1), wrapped=True, make=Gated, settings=settings)
    torch.testing.assert_close(lab.hypergradient, reference.hypergradient, rtol=1e-9, atol=0)


def test_an_activation_s_gradient_that_a_hook_clamps_is_refused():
    class Clamped(MLP):
        def forward(self, inputs):
            hidden = torch.tanh(self.fc1(inputs))
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
            return self.fc2(hidden)

    assert_refused(plain(1), "gradients differ from the criterion's own", make=Clamped)


# what surrounds the criterion

FUNCTIONS = {
    "log": lambda loss: loss.log(),
    "a square": lambda loss: loss * loss,
    "a power": lambda loss: loss**2,
    "its own share": lambda loss: loss / (1 + loss),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_the_result_that_is_not_linear_is_refused(name):
    loop = loop_of(lambda lab, inputs, loss: FUNCTIONS[name](loss).backward())
    assert_refused(loop, "the criterion's result went through")


LINEAR = {
    "a factor": lambda lab, loss: 0.9 * loss,
    "a penalty": lambda lab, loss: loss / 3 + 0.1 * sum(p.pow(2).sum() for p in lab.params),
    "stacked": lambda lab, loss: torch.stack([loss, 2 * loss]).mean(),
    "flooded": lambda lab, loss: (loss - 0.1).abs() + 0.1,
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LINEAR)
def test_sums_and_factors_are_right(name, engine):
    def backward(lab, inputs, loss):
        lab.params = list(lab.student.parameters())
        LINEAR[name](lab, loss).backward()

    assert_differentiates(loop_of(backward), settings={"engine": engine})


@pytest.mark.parametrize("unroll", [1, 2])
def test_a_learned_factor_is_told(unroll):
    def backward(lab, inputs, loss):
        (loss * lab.student.fc2.bias[0].exp()).backward()

    with pytest.warns(UserWarning, match="that factor counts as a constant"):
        trained(loop_of(backward, 2), wrapped=True, settings={"every": 2, "unroll": unroll})


def test_a_division_by_the_weights_own_mean_is_refused():
    def backward(lab, inputs, loss):
        (loss / lab.criterion.weights.mean().item()).backward()

    def nudged(lab, k):
        lab.table.data += 0.01

    assert_refused(loop_of(backward, 3, before=nudged), "factor on the criterion's result")


def test_a_second_criterion_on_the_same_weight_net_is_refused():
    def loop(lab):
        inputs, teacher_logits, labels = next(lab.batches(1))
        other = WeightedKDLoss(lab.criterion.weight_net, temperature=1.0)
        logits = lab.called(inputs)
        loss = lab.criterion(logits, teacher_logits, labels) + other(logits, teacher_logits, labels)
        loss.backward()
        lab.optimizer.step()

    assert_refused(loop, "a second criterion with the same weight_net")


def test_a_loss_whose_parameters_the_optimizer_moves_is_refused():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, logits, labels):
            return F.cross_entropy(logits * self.scale, labels, reduction="none")

    head = Head()
    assert_refused(
        plain(1), "holds a parameter that the optimizer moves", criterion={"hard_loss": head},
        optimizer=lambda params: torch.optim.SGD([*params, head.scale], lr=0.1),
    )


def test_a_weight_net_that_draws_is_refused():
    lab = Lab()
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2), nn.Sigmoid()).double()
    lab.criterion.weight_net = net
    lab.wrap(every=1, unroll=1)
    with pytest.raises(ValueError, match="the weight net gave weights that differ") as error:
        plain(2)(lab)
    assert_one_sentence(error)


# a layer that rests within a window


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("resting", [{0}, {1}, {2}])
def test_a_layer_that_rests_in_a_step_of_the_window(engine, resting):
    def rest(lab, k):
        for param in lab.student.fc1.parameters():
            param.requires_grad_(k not in resting)

    loop = loop_of(lambda lab, inputs, loss: loss.backward(), 3, before=rest)
    assert_differentiates(loop, steps=3, settings={"engine": engine})


# after a failure


def test_the_student_has_taken_the_step_that_broke_and_the_next_one_goes_on():
    lab = Lab(optimizer=with_hook("register_step_post_hook", shrink))
    lab.wrap(every=1, unroll=1)
    batches = list(lab.batches(2))
    before = lab.student.fc1.weight.detach().clone()
    lab.criterion(lab.called(batches[0][0]), *batches[0][1:]).backward()
    with pytest.raises(ValueError, match="the optimizer's step left"):
        lab.optimizer.step()
    assert not torch.equal(lab.student.fc1.weight, before)
    assert lab.optimizer.metrics["meta_updates"] == 0
    lab.optimizer.optimizer._optimizer_step_post_hooks.clear()
    lab.optimizer.zero_grad()
    lab.criterion(lab.called(batches[1][0]), *batches[1][1:]).backward()
    lab.optimizer.step()
    assert lab.optimizer.metrics["meta_updates"] == 1


@pytest.fixture
def nobody_else_watches():
    for other in list(optimizers._watching):  # of other tests
        other.close()


def test_backward_is_torch_s_own_when_the_optimizer_was_dropped(nobody_else_watches):
    own = torch.autograd.backward
    lab = Lab()
    lab.wrap(every=1, unroll=1)
    plain(1)(lab)
    assert torch.autograd.backward is not own
    del lab
    gc.collect()
    assert torch.autograd.backward is own


def test_backward_is_torch_s_own_outside_windows_and_after_close(nobody_else_watches):
    own = torch.autograd.backward
    lab = Lab()
    lab.wrap(every=4, unroll=1)
    assert isinstance(lab.optimizer, BilevelOptimizer)
    plain(1)(lab)  # the first step is looked at
    assert torch.autograd.backward is own
    plain(2)(lab)
    assert torch.autograd.backward is not own
    lab.optimizer.close()
    assert torch.autograd.backward is own
