"""Optimizers beyond those that torch can differentiate: rules, several at once, copies nudged."""

import warnings
from contextlib import nullcontext

import pytest
import torch

from kd_balance.check import check_hypergradient
from kd_balance.inner_step import register_update_rule
from kd_balance.joint import JointOptimizer
from tests.habits import (
    Lab,
    assert_differentiates,
    assert_leaves_what_the_plain_loop_leaves,
    assert_one_sentence,
    plain,
    train,
    trained,
)
from tests.students import MLP, relative_error

MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


class Lion(torch.optim.Optimizer):
    """A third-party optimizer, as they are written. Chen et al. 2023, algorithm 2."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                moment = state.setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(moment.lerp(p.grad, 1 - beta1).sign_(), alpha=-group["lr"])
                moment.lerp_(p.grad, 1 - beta2)


class Softsign(torch.optim.Optimizer):
    """Every element by itself, with a state that is a list."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("seen", []).append(p.grad.clone())
                p -= group["lr"] * p.grad / (0.1 + p.grad.abs())


class Rescaled(torch.optim.Optimizer):
    """By the gradient of a whole parameter, divided by its own length and a part of it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad / p.grad.view(-1)[:3].norm()


def muon_and_adamw(params, **options):
    params = list(params)
    return JointOptimizer([
        torch.optim.Muon([p for p in params if p.dim() == 2], lr=0.02, **options),
        torch.optim.AdamW([p for p in params if p.dim() != 2], lr=0.01),
    ])


def unrounded(monkeypatch):
    """Muon's iteration without its rounding to bfloat16, so that its slope can be measured."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.double().clone())


ADAFACTORS = {
    "usual": {},
    "decay": {"weight_decay": 0.1, "maximize": True},
    "clipped": {"d": 1.0, "lr": 0.5},
    "small": {"eps": (1e-8, 0.5)},
}


@pytest.mark.parametrize("steps, engine", [(4, "adjoint"), (1, "unroll")])
@pytest.mark.parametrize("name", ADAFACTORS)
def test_adafactor(name, steps, engine):
    def make(params):
        return torch.optim.Adafactor(params, **{"lr": 0.05, **ADAFACTORS[name]})

    assert_differentiates(
        plain(steps), steps=steps, rtol=1e-6, optimizer=make, settings={"engine": engine}
    )


OF_TRANSFORMERS = {
    "relative": {},
    "warm-up": {"warmup_init": True, "weight_decay": 0.1},
    "rate": {"lr": 0.05, "relative_step": False, "beta1": 0.9, "clip_threshold": 0.5},
    "unscaled": {
        "lr": 0.02, "relative_step": False, "scale_parameter": False, "weight_decay": 0.1,
        "eps": (1e-3, 0.5),
    },
}


@pytest.mark.parametrize("steps, engine", [(4, "adjoint"), (1, "unroll")])
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_the_adafactor_of_transformers(name, steps, engine):
    kind = pytest.importorskip("transformers.optimization").Adafactor
    assert_differentiates(
        plain(steps), steps=steps, rtol=1e-6, settings={"engine": engine},
        optimizer=lambda params: kind(params, **OF_TRANSFORMERS[name]),
    )


def test_the_adafactor_of_transformers_in_float32():
    kind = pytest.importorskip("transformers.optimization").Adafactor
    assert_leaves_what_the_plain_loop_leaves(plain(4), optimizer=kind, dtype=torch.float32)


@pytest.mark.parametrize("settings", [{"method": "paper"}, {"step_derivative": "sgd"}])
def test_a_step_taken_for_plain_sgd_s_needs_a_rate(settings):
    kind = pytest.importorskip("transformers.optimization").Adafactor
    with pytest.raises(ValueError, match="lr is None.*relative_step=False") as error:
        Lab(optimizer=kind).wrap(**settings)
    assert_one_sentence(error)


def test_another_class_of_a_known_name_is_refused_by_its_full_name():
    kind = type("Adafactor", (torch.optim.Adafactor,), {"__module__": "of.somebody"})
    with pytest.raises(
        ValueError, match="optimizer is of.somebody.Adafactor, .*torch.optim's .*step_derivative="
    ) as error:
        Lab(optimizer=kind).wrap()
    assert_one_sentence(error)


@MUON
@pytest.mark.parametrize("steps, engine", [(4, "adjoint"), (1, "unroll")])
@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}], ids=["usual", "other"]
)
def test_muon_beside_adamw(options, steps, engine, monkeypatch):
    unrounded(monkeypatch)
    assert_differentiates(
        plain(steps), steps=steps, rtol=1e-6, optimizer=lambda ps: muon_and_adamw(ps, **options),
        settings={"engine": engine},
    )


@MUON
@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
def test_muon_s_own_rounding(engine, monkeypatch):
    options = {"optimizer": muon_and_adamw, "settings": {"engine": engine, "unroll": 4, "every": 4}}
    rounded = trained(plain(4), wrapped=True, **options)
    unrounded(monkeypatch)
    exact = trained(plain(4), wrapped=True, **options)
    assert relative_error([rounded.hypergradient], [exact.hypergradient]) < 0.03


@MUON
def test_several_optimizers_leave_what_they_leave_alone():
    assert_leaves_what_the_plain_loop_leaves(plain(3), optimizer=muon_and_adamw)


@MUON
@pytest.mark.parametrize("method", ["lookahead", "paper"])
def test_several_optimizers_under_other_methods(method):
    settings = {"method": method}
    lab = trained(plain(2), wrapped=True, optimizer=muon_and_adamw, settings=settings)
    assert lab.hypergradient.abs().sum() > 0


@MUON
def test_a_list_of_optimizers_with_schedulers_checkpoints_and_the_check(monkeypatch):
    unrounded(monkeypatch)
    lab = Lab(optimizer=muon_and_adamw)
    muon, adamw = lab.optimizer.optimizers
    lab.optimizer = [muon, adamw]
    optimizer = lab.wrap(rate=0.1, unroll=2, every=2)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (muon, adamw)]
    batches = list(lab.batches(6))

    def step(batch):
        inputs, teacher_logits, labels = batch
        optimizer.zero_grad()
        lab.criterion(lab.student(inputs), teacher_logits, labels).backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()

    for batch in batches[:2]:
        step(batch)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02 / 4, 0.01 / 4]
    assert check_hypergradient(optimizer, step, batches[:2]).passed

    state = optimizer.state_dict()
    for batch in batches[2:4]:
        step(batch)
    left = [p.clone() for p in lab.student.parameters()]

    other = Lab(optimizer=muon_and_adamw)
    resumed = other.wrap(rate=0.1, unroll=2, every=2)
    other.student.load_state_dict(lab.student.state_dict())
    resumed.load_state_dict(state)
    assert [g["lr"] for g in resumed.param_groups] == [0.02 / 4, 0.01 / 4]
    assert all(resumed.state[p] for p in other.student.parameters()) and left


def test_a_parameter_in_two_optimizers_is_refused():
    lab = Lab()
    twice = [torch.optim.SGD(lab.student.parameters(), lr=0.1) for _ in range(2)]
    lab.optimizer = twice
    with pytest.raises(ValueError, match="in one of them") as error:
        lab.wrap()
    assert_one_sentence(error)


# every optimizer of torch

RATES = {"SGD": 0.1, "Adadelta": 1.0, "ASGD": 0.05, "Adafactor": 0.05}
REFUSED = {"LBFGS": "computes the loss several times.*method='paper'", "SparseAdam": "sparse=False"}
KINDS = [
    name for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name != "Optimizer"
]


@pytest.mark.parametrize("name", KINDS)
def test_every_optimizer_of_torch_is_right_or_refused(name, monkeypatch):
    def make(params):
        return getattr(torch.optim, name)(params, lr=RATES.get(name, 0.01))

    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]) as error:
            Lab(optimizer=make).wrap()
        assert_one_sentence(error)
        return
    unrounded(monkeypatch)
    warns = pytest.warns(match="derivative is zero") if name == "Rprop" else nullcontext()
    with warns:
        assert_differentiates(
            plain(4), steps=4, rtol=1e-5, optimizer=muon_and_adamw if name == "Muon" else make
        )


ADAPTIVE = ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop"]


@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_rate_of_zero_as_a_warm_up_begins_with(name, engine):
    lab = Lab(optimizer=lambda params: getattr(torch.optim, name)(params, lr=0.0))
    lab.wrap(engine=engine, unroll=1, every=1)
    train(lab, lab.batches(2))
    assert lab.optimizer.metrics["skipped_updates"] == 0
    assert lab.optimizer.metrics["hypergradient_norm"] < 1e-20


@pytest.mark.parametrize("settings", [
    {}, {"method": "paper"}, {"method": "lookahead"}, {"step_derivative": "finite_difference"},
])
def test_sparse_adam_is_refused_with_the_way_out_whatever_the_method(settings):
    with pytest.raises(ValueError, match="SparseAdam.*sparse gradients alone.*sparse=False"):
        Lab(optimizer=torch.optim.SparseAdam).wrap(**settings)


# rules of one's own


def lion_smoothed(options, param, grad, state):
    """Its step, with the slope of a line where a sign has none."""
    beta1, beta2 = options["betas"]
    before = state.get("exp_avg", torch.zeros_like(grad))
    moment = before.lerp(grad, 1 - beta1)
    step = moment + (moment.sign() - moment).detach()
    new = param * (1 - options["lr"] * options["weight_decay"]) - options["lr"] * step
    return new, {"exp_avg": before.lerp(grad, 1 - beta2)}


def softsign(options, param, grad, state):
    return param - options["lr"] * grad / (0.1 + grad.abs()), {}


@pytest.fixture
def rules(monkeypatch):
    """Registered rules are forgotten afterwards."""
    from kd_balance.inner_step import rules

    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


@pytest.mark.parametrize("steps, engine", [(4, "adjoint"), (1, "unroll")])
def test_a_registered_rule(steps, engine, rules):
    register_update_rule(Softsign, softsign)
    assert_differentiates(
        plain(steps), steps=steps, rtol=1e-6, optimizer=Softsign, settings={"engine": engine}
    )


@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
def test_a_rule_whose_values_are_the_step_s_may_have_a_slope_of_its_own(engine, rules):
    register_update_rule(Lion, lion_smoothed)
    settings = {"engine": engine, "unroll": 3, "every": 3}
    lab = trained(plain(3), wrapped=True, optimizer=Lion, settings=settings)
    assert lab.hypergradient.abs().sum() > 0


def test_a_rule_that_is_not_the_step_is_refused(rules):
    register_update_rule(Softsign, lambda options, param, grad, state: (param - 0.1 * grad, {}))
    with pytest.raises(ValueError, match="its own formula's"):
        trained(plain(1), wrapped=True, optimizer=Softsign)


def test_a_rule_for_something_else_is_refused():
    with pytest.raises(TypeError, match="torch.optim.Optimizer") as error:
        register_update_rule(MLP, softsign)
    assert_one_sentence(error)


# optimizers that nobody has a formula of


@pytest.mark.parametrize("derivative", ["exact", "finite_difference", "sgd"])
def test_a_step_that_computes_the_loss_several_times_is_refused(derivative):
    lab = Lab(optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match="method='paper'") as error:
        lab.wrap(step_derivative=derivative)
    assert_one_sentence(error)


@pytest.mark.parametrize("make", [Lion, Softsign], ids=lambda kind: kind.__name__)
def test_an_unknown_step_is_refused_with_ways_out(make):
    lab = Lab(optimizer=make)
    with pytest.raises(ValueError, match="step_derivative=.*register_update_rule") as error:
        lab.wrap()
    assert_one_sentence(error)


def test_finite_differences_of_a_step_whose_elements_move_alone():
    settings = {"step_derivative": "finite_difference"}
    for steps in (1, 4):
        assert_differentiates(
            plain(steps), steps=steps, rtol=1e-6, optimizer=Softsign, settings=settings
        )


@pytest.mark.parametrize("name, error", [
    ("sgd", 1e-9), ("adam", 1e-6), ("adamw", 1e-6), ("rmsprop-centered", 1e-4), ("nadam", 1e-6),
])
def test_finite_differences_are_what_is_known_of_one_step(name, error):
    exact = trained(plain(2), wrapped=True, optimizer=name)
    settings = {"step_derivative": "finite_difference"}
    lab = trained(plain(2), wrapped=True, optimizer=name, settings=settings)
    assert relative_error([lab.hypergradient], [exact.hypergradient]) < error


def test_finite_differences_in_float32():
    options = {"optimizer": "adamw", "dtype": torch.float32}
    exact = trained(plain(2), wrapped=True, **options)
    settings = {"step_derivative": "finite_difference"}
    lab = trained(plain(2), wrapped=True, settings=settings, **options)
    assert relative_error([lab.hypergradient], [exact.hypergradient]) < 1e-3


def test_a_step_without_symmetric_jacobian_says_by_how_much():
    settings = {"step_derivative": "finite_difference"}
    with pytest.warns(UserWarning, match="not symmetric.*[0-9] %"):
        trained(plain(1), wrapped=True, optimizer=Rescaled, settings=settings)


def test_a_step_taken_for_plain_sgd_s():
    options = {"optimizer": "sgd", "settings": {"unroll": 3, "every": 3}}
    exact = trained(plain(3), wrapped=True, **options)
    options["settings"] = {**options["settings"], "step_derivative": "sgd"}
    lab = trained(plain(3), wrapped=True, **options)
    torch.testing.assert_close(lab.hypergradient, exact.hypergradient)
    lion = trained(plain(3), wrapped=True, **{**options, "optimizer": Lion})
    assert lion.hypergradient.abs().sum() > 0


@pytest.mark.parametrize("derivative", ["finite_difference", "sgd"])
def test_the_student_is_that_of_the_plain_loop(derivative):
    for make in (Lion, Softsign):
        assert_leaves_what_the_plain_loop_leaves(
            plain(3), optimizer=make, settings={"step_derivative": derivative}
        )


@pytest.mark.parametrize("settings", [
    {"engine": "unroll"}, {"method": "lookahead"}, {"method": "paper"},
])
def test_other_engines_and_methods_need_the_formula(settings):
    lab = Lab()
    with pytest.raises(ValueError, match="expected 'exact'") as error:
        lab.wrap(step_derivative="sgd", **settings)
    assert_one_sentence(error)


def test_rprop_s_derivative_is_zero_and_it_says_so():
    options = {"optimizer": lambda ps: torch.optim.Rprop(ps, lr=1e-2)}
    with pytest.warns(UserWarning, match="derivative is zero"):
        lab = trained(plain(2), wrapped=True, **options)
    assert lab.hypergradient.abs().sum() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lab = trained(
            plain(2), wrapped=True, settings={"step_derivative": "sgd"}, **options
        )
    assert lab.hypergradient.abs().sum() > 0
