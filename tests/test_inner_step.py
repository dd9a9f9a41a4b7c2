"""The differentiable step is torch's, its products are its derivatives, `higher` can use it."""

import warnings

import higher
import pytest
import torch
import torch.nn.functional as F

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.inner_step import DIFFERENTIABLE, GroupUpdate, Update
from tests.students import EVERY_STEP, OPTIMIZERS, Run, relative_error, two_groups

# torch rounds NAdam's momentum product and ASGD's rate to float32 even for float64 parameters
STEP_TOLERANCE = {"nadam": 1e-6, "asgd": 1e-7}


def stepped(name, warm, zeros=False):
    """A student about to take a step, with two groups and 3 or 0 steps behind it."""
    run = Run("mlp")
    optimizer = OPTIMIZERS[name](two_groups(run.student))
    for inputs, _, labels in run.batches(4 if warm else 1):
        optimizer.step()
        optimizer.zero_grad()
        F.cross_entropy(run.student(inputs), labels).backward()
    if zeros:
        run.student.fc1.weight.grad[2] = 0
    names = {p: n for n, p in run.student.named_parameters()}
    return run.student, optimizer, names


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_is_torchs(name, warm):
    student, optimizer, names = stepped(name, warm)
    after = Update.of(optimizer, names).apply()
    optimizer.step()
    for key, param in student.named_parameters():
        rtol = STEP_TOLERANCE.get(name, 1e-12)
        torch.testing.assert_close(after[key], param.detach(), rtol=rtol, atol=1e-15)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_product_is_a_finite_difference_of_torchs_own_step(name, warm):
    def moved(nudge):
        student, optimizer, names = stepped(name, warm)
        update = Update.of(optimizer, names)
        update.freeze(grads=True, states=True)
        for n, p in student.named_parameters():
            p.grad += nudge * direction[n]
        optimizer.step()
        return update, {n: p.detach().clone() for n, p in student.named_parameters()}

    generator = torch.Generator().manual_seed(0)
    student, _, _ = stepped(name, warm)
    draw = [
        {n: torch.randn(p.shape, generator=generator).double() for n, p in s.named_parameters()}
        for s in (student, student)
    ]
    direction, cotangent = draw
    h = 1e-6
    ahead, behind = moved(h)[1], moved(-h)[1]
    slope = sum((cotangent[n] * (ahead[n] - behind[n])).sum() for n in ahead) / (2 * h)
    product = moved(0.0)[0].vjp({"param": cotangent})["grad"]
    assert sum((product[n] * direction[n]).sum() for n in product).item() == pytest.approx(
        slope.item(), rel=1e-4, abs=1e-8
    )


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_of_exactly_zero_give_finite_products(name, warm):
    _, optimizer, names = stepped(name, warm, zeros=True)
    update = Update.of(optimizer, names)
    products = update.vjp({"param": {n: torch.ones_like(p) for n, p in update.params.items()}})
    assert all(p.isfinite().all() for p in products["grad"].values())


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.startswith(("sgd", "adam"))])
def test_products_that_are_written_out_are_those_of_torchs_own_step(
    name, warm, through, monkeypatch
):
    _, optimizer, names = stepped(name, warm)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    update = Update.of(optimizer, names)
    generator = torch.Generator().manual_seed(0)

    def product():
        generator.manual_seed(0)
        cotangents = {
            slot: {n: torch.randn(p.shape, generator=generator).double() for n, p in params}
            for slot in ("param", *(update.groups[0].states[0] if through else ()))
            if slot != "step"
            for params in [list(update.params.items())[slot != "param":]]  # some have none
        }
        return update.vjp(cotangents, through=through)

    written_out = product()
    monkeypatch.setattr(GroupUpdate, "is_linear", False)
    monkeypatch.setattr(GroupUpdate, "is_adam", False)
    by_autograd = product()
    assert written_out.keys() == by_autograd.keys()
    for slot in written_out:
        assert written_out[slot].keys() == by_autograd[slot].keys()
        pairs = [(written_out[slot][n], by_autograd[slot][n]) for n in by_autograd[slot]]
        assert relative_error(*zip(*pairs)) < (1e-12 if warm else 1e-9)


def test_adams_counters_on_a_device_are_read_element_by_element(monkeypatch):
    _, optimizer, names = stepped("adamw", True)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] += 5  # it was thawed earlier
    update = Update.of(optimizer, names)

    def product():
        return update.vjp({"param": {n: torch.ones_like(p) for n, p in update.params.items()}})

    expected = product()["grad"]
    monkeypatch.setattr("kd_balance.inner_step.update._known", lambda is_adam, counter: None)
    actual = product()["grad"]
    assert relative_error([actual[n] for n in expected], list(expected.values())) < 1e-14


def test_all_promised_optimizers_are_tried():
    tried = {type(make([torch.zeros(1, requires_grad=True)])) for make in OPTIMIZERS.values()}
    assert tried == set(DIFFERENTIABLE) - {torch.optim.Rprop}  # whose derivative is zero


@pytest.mark.parametrize("name", ["adamw", "nadam", "radam"])
def test_higher_takes_the_optimizers_that_it_lacks(name):
    run = Run("mlp")
    optimizer = OPTIMIZERS[name](run.student.parameters())
    inputs, _, labels = run.batches(1)[0]
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    with higher.innerloop_ctx(run.student, optimizer) as (student, differentiable):
        for _ in range(3):
            differentiable.step(scale * F.cross_entropy(student(inputs), labels))
        fast = [p.detach() for p in student.parameters()]
        (slope,) = torch.autograd.grad(sum(p.sum() for p in student.parameters()), scale)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(run.student(inputs), labels).backward()
        optimizer.step()
    assert relative_error(fast, run.student.parameters()) < STEP_TOLERANCE.get(name, 1e-12)
    assert slope.isfinite() and slope != 0


@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
@pytest.mark.parametrize("unroll", [1, 3])
def test_a_plain_loop_on_bare_higher_gives_the_same_hypergradient(unroll, engine):
    """An independent reference: higher's own module patch and its own SGD."""
    run = Run("conv")
    optimizer = OPTIMIZERS["sgd-nesterov"](run.student.parameters())
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(6,)).double())
    batches, (meta,) = run.batches(unroll), run.meta_batches(1)
    weight_net = criterion.weight_net
    with higher.innerloop_ctx(run.student, optimizer) as (student, differentiable):
        for inputs, teacher_logits, labels in batches:
            losses = criterion.losses(student(inputs), teacher_logits, labels)
            ce = F.cross_entropy(teacher_logits, labels, reduction="none")
            weights = weight_net(torch.stack((losses[:, 0].detach(), ce), 1))
            differentiable.step((weights * losses).sum() / len(losses))
        meta_loss = F.cross_entropy(student(meta[0]), meta[1])
        expected = torch.autograd.grad(meta_loss, list(weight_net.parameters()))
    wrapped = BilevelOptimizer(
        optimizer, run.student, criterion, [meta], unroll=unroll, every=unroll, engine=engine
    )
    for inputs, teacher_logits, labels in batches:
        wrapped.zero_grad()
        criterion(run.student(inputs), teacher_logits, labels).backward()
        wrapped.step()
    assert relative_error([p.grad for p in weight_net.parameters()], expected) < 1e-9


def test_no_warning_reaches_the_user():
    run = Run("mlp", torch.float32)
    criterion = WeightedKDLoss(MetaWeightNet())
    optimizer = BilevelOptimizer(
        OPTIMIZERS["adamw"](run.student.parameters()),
        run.student,
        criterion,
        run.meta_batches(1),
        **EVERY_STEP,
    )
    inputs, teacher_logits, labels = run.batches(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch's own
        criterion(run.student(inputs), teacher_logits, labels).backward()
        optimizer.step()
