"""Save, kill, load, continue: bit-identical to the run that was not interrupted."""

import copy
import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.data import BalancedBatches
from kd_balance.history import WeightHistory
from tests.students import CLASSES, EVERY_STEP, OPTIMIZERS, ConvNet, relative_error

STEPS = 8


class Training:
    """A training script: everything is made anew at the start, the data come from a seed."""

    def __init__(self, optimizer="sgd-momentum", wrapped=True, seed=0, **settings):
        torch.manual_seed(seed)
        self.student = ConvNet()
        self.criterion = WeightedKDLoss(MetaWeightNet(hidden=(8,)), temperature=2.0)
        self.optimizer = OPTIMIZERS[optimizer](self.student.parameters())
        self.history = WeightHistory(self.criterion, CLASSES, every=3)
        generator = torch.Generator().manual_seed(7)
        inputs = torch.randn(40, 2, 6, 6, generator=generator)
        labels = torch.arange(40) % CLASSES
        if wrapped:
            self.optimizer = BilevelOptimizer(
                self.optimizer,
                self.student,
                self.criterion,
                BalancedBatches(inputs, labels, batch_size=7, seed=seed),
                **{**EVERY_STEP, **settings},
            )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, gamma=0.5)

    def run(self, start, stop):
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(100 + step)
            inputs = torch.randn(9, 2, 6, 6, generator=generator)
            teacher_logits = 3 * torch.randn(9, CLASSES, generator=generator)
            labels = torch.randint(CLASSES, (9,), generator=generator)
            self.optimizer.zero_grad()
            self.criterion(self.student(inputs), teacher_logits, labels).backward()
            self.optimizer.step()
            self.scheduler.step()
        return self

    def parts(self):
        return {
            "student": self.student,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "history": self.history,
        }

    def save(self, path):
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, path)

    def load(self, path):
        checkpoint = torch.load(path, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(checkpoint[name])
        return self

    def everything(self):
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state["gradients"] = [p.grad for p in self.criterion.weight_net.parameters()]
        if isinstance(self.optimizer, BilevelOptimizer):
            state["metrics"] = self.optimizer.metrics
        return state


def same(actual, expected):
    alike(actual.everything(), expected.everything())


def alike(actual, expected):
    pairs = [tree_leaves(actual), tree_leaves(expected)]
    words, numbers = ([[x for x in leaves if isinstance(x, str) is is_word] for leaves in pairs]
                      for is_word in (True, False))
    assert words[0] == words[1]
    torch.testing.assert_close(*numbers, rtol=0, atol=0, equal_nan=True)


SETTINGS = {
    "every step": {},
    "accumulate": dict(accumulate=3),
    "every": dict(every=3),
    "every and accumulate": dict(every=2, accumulate=2),
    "unroll": dict(unroll=2, every=2),
    "lookahead": dict(method="lookahead", accumulate=2),
    "paper": dict(method="paper"),
    "unroll engine": dict(engine="unroll"),
}


@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_is_the_uninterrupted_one(name, stop, tmp_path):
    settings = SETTINGS[name]
    expected = Training(**settings).run(0, STEPS)
    Training(**settings).run(0, stop).save(tmp_path / "checkpoint.pt")
    resumed = Training(seed=1, **settings).load(tmp_path / "checkpoint.pt")
    same(resumed.run(stop, STEPS), expected)


@pytest.mark.parametrize("optimizer", ["sgd-nesterov", "adamw", "adadelta", "nadam"])
def test_with_other_optimizers(optimizer, tmp_path):
    expected = Training(optimizer).run(0, STEPS)
    Training(optimizer).run(0, 4).save(tmp_path / "checkpoint.pt")
    same(Training(optimizer, seed=1).load(tmp_path / "checkpoint.pt").run(4, STEPS), expected)


def test_saving_changes_nothing(tmp_path):
    expected = Training().run(0, STEPS)
    training = Training()
    for step in range(STEPS):
        training.run(step, step + 1).save(tmp_path / "checkpoint.pt")
    same(training, expected)


def test_a_checkpoint_is_a_snapshot(tmp_path):
    """Training on after state_dict() and a deep copy, as early stopping does, leaves it as is."""
    training = Training(accumulate=2).run(0, 3)
    saved = copy.deepcopy({n: part.state_dict() for n, part in training.parts().items()})
    training.run(3, STEPS)
    torch.save(saved, tmp_path / "checkpoint.pt")
    resumed = Training(seed=1, accumulate=2).load(tmp_path / "checkpoint.pt").run(3, STEPS)
    same(resumed, training)


def test_loading_into_a_run_that_has_begun(tmp_path):
    """Rolling back: what the later steps left is gone."""
    expected = Training(accumulate=3).run(0, STEPS)
    training = Training(accumulate=3).run(0, 4)
    training.save(tmp_path / "checkpoint.pt")
    same(training.run(4, 7).load(tmp_path / "checkpoint.pt").run(4, STEPS), expected)
    at_start = Training(accumulate=3)
    at_start.save(tmp_path / "start.pt")
    same(training.load(tmp_path / "start.pt").run(0, STEPS), expected)


WINDOWS = {
    "sgd": ("sgd-momentum", {}),
    "adamw": ("adamw", {}),
    "nadam": ("nadam", {}),
    "unroll engine": ("sgd-nesterov", dict(engine="unroll")),
    "lookahead": ("sgd-momentum", dict(method="lookahead")),
    "sgd for its derivative": ("adamw", dict(step_derivative="sgd")),
    "logits by a function": ("adamw", dict(to_logits=lambda output: output[:, :CLASSES])),
    "every": ("adamw", dict(every=8)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_run_killed_within_a_window_resumes_bit_for_bit(name, tmp_path):
    optimizer, given = WINDOWS[name]
    settings = dict(unroll=4, every=4) | given
    expected = Training(optimizer, **settings).run(0, 12)
    training = Training(optimizer, **settings)
    for stop in range(1, 12):
        training.run(stop - 1, stop)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            training.save(tmp_path / f"{stop}.pt")
    for stop in (1, 3, 6, 11) if name == "sgd" else (6,):
        resumed = Training(optimizer, seed=1, **settings).load(tmp_path / f"{stop}.pt")
        resumed.save(tmp_path / "again.pt")
        resumed = Training(optimizer, seed=2, **settings).load(tmp_path / "again.pt")
        same(resumed.run(stop, 12), expected)


def test_a_window_of_micro_batches_clipped_and_with_dropout_resumes_bit_for_bit(tmp_path):
    """Each step is of two criterion calls, one of them on two student calls at once."""

    def made(seed):
        torch.manual_seed(seed)
        student = torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(),
            torch.nn.Linear(8, 3),
        )
        criterion = WeightedKDLoss(
            MetaWeightNet(hidden=(4,), terms=("hard", "soft", "size")),
            terms={"size": lambda hidden: hidden.square().mean(1)},
        )
        optimizer = BilevelOptimizer(
            torch.optim.Adam(student.parameters(), lr=torch.tensor(0.01), foreach=False),
            student, criterion,
            [(torch.randn(6, 5), torch.arange(6) % 3)], unroll=3, every=3,
        )
        return student, criterion, optimizer

    def run(student, criterion, optimizer, start, stop):
        for step in range(start, stop):
            torch.manual_seed(100 + step)
            optimizer.zero_grad()
            for _ in range(2):
                logits = student(torch.randn(4, 5))
                labels = torch.tensor([0, 1, -100, 2])
                known = torch.randn(4, 3), torch.tensor([True, False, True, True])
                loss = criterion(logits, known, labels, size=logits)
                (loss / 2 + 0.01 * logits.square().mean()).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 0.1)
            optimizer.step()
        return student.state_dict(), criterion.state_dict(), optimizer.metrics

    first, expected = made(0), made(0)
    run(*first, 0, 5)
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    resumed = made(1)
    loader = expected[2]._steps.meta_set._loader  # data, as a script's are
    resumed[2]._steps.meta_set._loader = loader
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for part, state in zip(resumed, states):
        part.load_state_dict(state)
    actual, expected = run(*resumed, 5, 9), run(*expected, 0, 9)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_state_put_back_within_a_window_changes_nothing():
    """As what simulates a schedule on the loop's own optimizer does."""
    settings = dict(unroll=4, every=4)
    training = Training(**settings).run(0, 6)
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    same(training.run(6, 8), Training(**settings).run(0, 8))


def test_a_window_that_tensors_do_not_tell_is_not_in_the_checkpoint_and_says_so(tmp_path):
    settings = dict(unroll=4, every=4, step_derivative="finite_difference")
    training = Training(**settings).run(0, 5)
    with pytest.warns(UserWarning, match="1 of 4 steps are not saved.*finite_diff") as caught:
        training.save(tmp_path / "checkpoint.pt")
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="through the others only"):
        resumed = Training(seed=1, **settings).load(tmp_path / "checkpoint.pt")
    expected = training.run(5, 8)
    resumed.run(5, 8)
    assert resumed.optimizer.metrics["meta_updates"] == 2
    assert relative_error(resumed.student.parameters(), expected.student.parameters()) == 0
    own, others = (t.everything()["gradients"] for t in (resumed, expected))
    assert 0 < relative_error(own, others) < 1


def test_a_window_of_other_settings_is_left_out_and_says_so(tmp_path):
    Training(unroll=4, every=4).run(0, 6).save(tmp_path / "checkpoint.pt")
    with pytest.warns(UserWarning, match="is not loaded.*'unroll': 4.*'unroll': 2"):
        resumed = Training(unroll=2, every=4).load(tmp_path / "checkpoint.pt")
    assert resumed.run(6, 8).optimizer.metrics["meta_updates"] == 2


def test_a_window_goes_on_with_the_student_that_it_left_alone(tmp_path):
    training = Training(unroll=4, every=4).run(0, 6)
    training.save(tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]
    other = Training(unroll=4, every=4, seed=1)
    other.optimizer.load_state_dict(state)  # and not the student
    with pytest.raises(ValueError, match="parameters moved by"):
        other.run(6, 8)


def _without(*path):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def _with(value, *path):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


META = "kd_balance"
BROKEN = {
    "no groups": (_without("param_groups"), "has the keys state, expected also param_groups"),
    "no state": (_without("state"), "expected also state"),
    "fewer parameters": (lambda s: s["param_groups"][0]["params"].pop(), "hold .* parameters"),
    "another state": (_with(torch.zeros(3), "state", 0, "momentum_buffer"), "momentum_buffer has"),
    "no dict": (_with(3, META), "under 'kd_balance' is int"),
    "a later format": (_with(99, META, "format"), "format is 99, expected at most"),
    "no counter": (_without(META, "steps"), "lacks steps"),
    "a counter that is none": (_with(-1, META, "steps"), "steps in the checkpoint is -1"),
    "no weight net": (_without(META, "weight_net"), "lacks weight_net"),
    "another net": (_with({"a": torch.zeros(1)}, META, "weight_net"), "tensors of this weight net"),
    "no state of φ's": (_with({}, META, "meta_optimizer"), "meta_optimizer's state has the keys"),
    "another average": (_with([torch.zeros(1)], META, "partial_average"), "partial_average"),
    "no position": (_with([], META, "meta_sets"), "meta_sets"),
    "no random state": (_without(META, "meta_sets", 0, "random_state", "numpy"), "meta_sets"),
    "half a window": (lambda s: s[META]["window"][2].pop(), "window cannot be read"),
    "an unknown kind": (_with(["eval", "1"], META, "window"), "window cannot be read"),
    "a tensor cut short": (lambda s: s[META]["window"][2][1].pop(), "window cannot be read"),
}


@pytest.fixture(scope="module")
def within_a_window():
    """A run, and a checkpoint of another."""
    first, second = (Training(unroll=4, every=4, seed=seed).run(0, 6) for seed in (0, 2))
    return first, second.optimizer.state_dict()


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_checkpoint_of_this_run_is_refused_before_anything_changes(
    name, within_a_window
):
    change, sentence = BROKEN[name]
    training, saved = within_a_window
    state = copy.deepcopy(saved)
    change(state)
    before = copy.deepcopy(training.everything())
    with pytest.raises(ValueError, match=sentence) as refusal:
        training.optimizer.load_state_dict(state)
    assert str(refusal.value).count(". ") == 0 and len(str(refusal.value)) < 600
    alike(training.everything(), before)


@pytest.mark.parametrize("state", [None, {}, [1], {"weight": torch.zeros(2)}, {"kd_balance": {}}])
def test_what_is_no_checkpoint_at_all_is_refused(state):
    training, expected = (Training().run(0, 3) for _ in range(2))
    with pytest.raises(ValueError, match="expected"):
        training.optimizer.load_state_dict(state)
    same(training.run(3, 5), expected.run(3, 5))


def test_a_checkpoint_without_a_format_loads_with_what_it_has(tmp_path):
    """As releases before there was a number wrote them."""
    expected = Training(accumulate=3).run(0, STEPS)
    Training(accumulate=3).run(0, 5).save(tmp_path / "checkpoint.pt")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for key in ("format", "meta_loss_start", "teacher_bias"):
        del checkpoint["optimizer"]["kd_balance"][key]
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    resumed = Training(seed=1, accumulate=3).load(tmp_path / "checkpoint.pt").run(5, STEPS)
    assert relative_error(resumed.student.parameters(), expected.student.parameters()) == 0
    assert relative_error(resumed.criterion.phi, expected.criterion.phi) == 0


def test_the_plain_optimizer_s_checkpoint_loads_with_a_warning(tmp_path):
    plain = Training(wrapped=False).run(0, 4)
    torch.save(plain.optimizer.state_dict(), tmp_path / "checkpoint.pt")
    training = Training()
    before = [p.clone() for p in training.criterion.weight_net.parameters()]
    with pytest.warns(UserWarning, match="written by a plain optimizer.* start fresh"):
        training.optimizer.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))
    torch.testing.assert_close(
        training.optimizer.optimizer.state_dict(), plain.optimizer.state_dict(), rtol=0, atol=0
    )
    assert relative_error(training.criterion.weight_net.parameters(), before) == 0
    training.run(4, STEPS)
    assert training.optimizer.metrics["meta_updates"] == STEPS - 4


def test_the_wrapper_s_checkpoint_loads_into_the_plain_optimizer(tmp_path):
    training = Training().run(0, 4)
    training.save(tmp_path / "checkpoint.pt")
    plain = Training(wrapped=False)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    plain.student.load_state_dict(checkpoint["student"])
    plain.optimizer.load_state_dict(checkpoint["optimizer"])
    torch.testing.assert_close(
        plain.optimizer.state_dict(), training.optimizer.optimizer.state_dict(), rtol=0, atol=0
    )
    plain.run(4, 6)


def test_a_meta_loader_without_a_position_begins_its_epoch_anew(tmp_path):
    """A DataLoader has none; the random numbers that it shuffles by are saved all the same."""

    def training():
        made = Training(wrapped=False)
        samples = [(torch.full((2, 6, 6), float(i)), i % CLASSES) for i in range(6)]
        loader = torch.utils.data.DataLoader(samples, batch_size=2, shuffle=True)
        made.optimizer = BilevelOptimizer(
            made.optimizer, made.student, made.criterion, loader, **EVERY_STEP
        )
        return made

    expected = training().run(0, 6)
    first = training().run(0, 3)  # the loader's epoch has three batches
    first.save(tmp_path / "checkpoint.pt")
    same(training().load(tmp_path / "checkpoint.pt").run(3, 6), expected)


def test_meta_batches_looked_at_ahead_are_not_lost_on_loading():
    torch.manual_seed(0)
    batches = [(torch.randn(600, 5), torch.arange(600) % 3) for _ in range(2)]  # one finds the bias

    def wrapped():
        torch.manual_seed(1)
        student, teacher = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
        criterion = WeightedKDLoss.long_tailed([100, 10, 1])
        optimizer = BilevelOptimizer(
            torch.optim.SGD(student.parameters(), 0.1), student, criterion, batches,
            teacher=teacher, **EVERY_STEP
        )
        return student, criterion, optimizer

    def run(student, criterion, optimizer):
        inputs, labels = batches[0]
        criterion(student(inputs), torch.zeros(600, 3), labels).backward()
        optimizer.step()
        return optimizer.metrics["meta_loss"]

    first, second = wrapped(), wrapped()
    second[2].load_state_dict(first[2].state_dict())
    assert run(*first) == run(*second)


def test_a_checkpoint_of_another_weight_net_is_refused(tmp_path):
    training = Training().run(0, 2)
    training.save(tmp_path / "checkpoint.pt")
    other = Training()
    wider = WeightedKDLoss(MetaWeightNet(hidden=(9,)))
    other.optimizer = BilevelOptimizer(
        other.optimizer.optimizer, other.student, wider, [(torch.zeros(1, 2, 6, 6), torch.ones(1))]
    )
    before = [p.clone() for p in other.student.parameters()]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]
    with pytest.raises(ValueError, match="weight_net in the checkpoint .* of this weight net"):
        other.optimizer.load_state_dict(state)
    assert relative_error(other.student.parameters(), before) == 0


def test_history_and_criterion_state():
    """The criterion's own state_dict holds the weight net, for a script that saves modules."""
    training = Training().run(0, 4)
    other = Training(seed=1)
    other.criterion.load_state_dict(training.criterion.state_dict())
    expected = training.criterion.weight_net.parameters()
    assert relative_error(other.criterion.weight_net.parameters(), expected) == 0
