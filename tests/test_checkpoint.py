"""Save, kill, load, continue: bit-identical to the run that was not interrupted."""

import warnings

import pytest
import torch

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
    torch.testing.assert_close(actual.everything(), expected.everything(), rtol=0, atol=0)


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
    if settings.get("unroll", 1) > 1:
        stop += stop % 2  # between windows
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
    import copy

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


def test_an_open_window_is_not_in_the_checkpoint_and_says_so(tmp_path):
    """The resumed run's first hypergradient passes through the steps that follow only."""
    settings = dict(unroll=4, every=4)
    training = Training(**settings).run(0, 5)
    with pytest.warns(UserWarning, match="1 of 4 steps.* are not saved") as caught:
        training.save(tmp_path / "checkpoint.pt")
    assert len(caught) == 1 and caught[0].filename == __file__
    resumed = Training(seed=1, **settings).load(tmp_path / "checkpoint.pt").run(5, 8)
    expected = training.run(5, 8)
    assert resumed.optimizer.metrics["meta_updates"] == 2
    assert relative_error(resumed.student.parameters(), expected.student.parameters()) == 0
    own, others = (t.everything()["gradients"] for t in (resumed, expected))
    assert 0 < relative_error(own, others) < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.save(tmp_path / "checkpoint.pt")


def test_a_state_put_back_within_a_window_closes_it_and_said_so():
    """As what simulates a schedule on the loop's own optimizer does."""
    settings = dict(unroll=4, every=4)
    training = Training(**settings).run(0, 6)
    sentence = "2 of 4 steps.*where the state is loaded, in this run or another"
    with pytest.warns(UserWarning, match=sentence):
        training.optimizer.load_state_dict(training.optimizer.state_dict())
    training.run(6, 8)
    expected = Training(**settings).run(0, 8)
    assert training.optimizer.metrics["meta_updates"] == 2
    assert relative_error(training.student.parameters(), expected.student.parameters()) == 0
    own, others = (t.everything()["gradients"] for t in (training, expected))
    assert relative_error(own, others) > 0


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
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.optimizer.load_state_dict(state)
    assert relative_error(other.student.parameters(), before) == 0


def test_history_and_criterion_state():
    """The criterion's own state_dict holds the weight net, for a script that saves modules."""
    training = Training().run(0, 4)
    other = Training(seed=1)
    other.criterion.load_state_dict(training.criterion.state_dict())
    expected = training.criterion.weight_net.parameters()
    assert relative_error(other.criterion.weight_net.parameters(), expected) == 0
