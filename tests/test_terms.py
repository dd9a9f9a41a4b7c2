"""Named terms and several teachers: their values, names, masks and hypergradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.history import WeightHistory
from kd_balance.soft_losses import FlattenedKL
from tests.habits import assert_one_sentence
from tests.students import CLASSES, OPTIMIZERS, relative_error

N, WIDTH = 6, 7


class Student(nn.Module):
    """Returns its features too; what attends to them is a convolution's like."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, WIDTH)
        self.fc2 = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs):
        features = torch.tanh(self.fc1(inputs))
        return features, self.fc2(features)


def attention(student, teacher):
    """A curved function of the student's features, one value for each sample."""
    return (F.normalize(student**2, dim=1) - F.normalize(teacher**2, dim=1)).pow(2).sum(1)


def relation(student, teacher):
    """Distances between samples: the batch's, in one number."""
    student, teacher = ((x[:, None] - x).pow(2).sum(2) for x in (student, teacher))
    return F.smooth_l1_loss(student / student.mean(), teacher / teacher.mean())


def regression(student, teacher, there):
    """Of those samples alone whose teacher features are known."""
    return (student - teacher).pow(2).mean(1), there


FIVE = ("hard", "soft", "attention", "relation", "regression")
OWN = {"attention": attention, "relation": relation, "regression": regression}


def draw(generator):
    inputs = torch.randn(N, 8, generator=generator).double()
    teacher = torch.randn(N, CLASSES, generator=generator).double() * 3
    features = torch.rand(N, WIDTH, generator=generator).double()
    labels = torch.randint(CLASSES, (N,), generator=generator)
    return inputs, teacher, features, labels, torch.arange(N) % 3 > 0


def five_terms(criterion, student, batch):
    inputs, teacher, features, labels, there = batch
    own, logits = student(inputs)
    return criterion(
        logits, teacher, labels,
        attention=(own, features), relation=(own, features), regression=(own, features, there),
    )


def given_by_the_loop(criterion, student, batch):
    """The values themselves, and features that the loop makes something of."""
    inputs, teacher, features, labels, there = batch
    own, logits = student(inputs)
    return criterion(
        logits, teacher, labels,
        attention=attention(own, features), relation=(own * 2, features * 2),
        regression=(own, features, there),
    )


def three_teachers(criterion, student, batch):
    inputs, teacher, features, labels, there = batch
    own, logits = student(inputs)
    teachers = {"large": teacher, "small": (teacher.flip(1), there), "odd": -teacher}
    return criterion(logits, teachers, labels, attention=(own, features))


CALLS = {
    "five terms": (five_terms, {"terms": OWN}),
    "given by the loop": (given_by_the_loop, {"terms": {**OWN, "attention": None}}),
    "three teachers": (
        three_teachers,
        {
            "teachers": ("large", "small", "odd"),
            "soft_loss": {"odd": FlattenedKL(2.0)},
            "terms": {"attention": attention},
        },
    ),
}


class Table(nn.Module):
    """Weights that are parameters, whatever the features."""

    def __init__(self, terms):
        super().__init__()
        self.weights = nn.Parameter(0.3 + 0.4 * torch.rand(N, terms).double())

    def forward(self, features):
        return self.weights


def trained(call, settings, *, unroll=1, nudge=None, engine=None, optimizer="sgd-momentum"):
    """The meta loss after some steps under a nudged table; with an engine, its hypergradient."""
    torch.manual_seed(0)
    student = Student().double()
    criterion = WeightedKDLoss(Table(5), temperature=2.0, **settings)
    inner = OPTIMIZERS[optimizer](student.parameters())
    generator = torch.Generator().manual_seed(1)
    steps = [draw(generator) for _ in range(1 + unroll)]
    meta, labels = draw(generator)[0], torch.arange(N) % CLASSES
    call(criterion, student, steps[0]).backward()
    inner.step()  # so that momentum is there
    if nudge is not None:
        criterion.weight_net.weights.data += nudge
    if engine is not None:
        inner = BilevelOptimizer(
            inner, student, criterion, [(meta, labels)], engine=engine, unroll=unroll,
            every=unroll, meta_loss=lambda output, targets: F.cross_entropy(output, targets),
            meta_forward=lambda student, batch: (student(batch[0])[1], batch[1]),
        )
    for batch in steps[1:]:
        inner.zero_grad()
        call(criterion, student, batch).backward()
        inner.step()
    if engine is not None:
        return criterion.weight_net.weights.grad
    with torch.no_grad():
        return F.cross_entropy(student(meta)[1], labels).item()


def slope(call, settings, direction, **options):
    """By central differences of two lengths, extrapolated."""
    def difference(h):
        up, down = (trained(call, settings, nudge=s * h * direction, **options) for s in (1, -1))
        return (up - down) / (2 * h)

    return (4 * difference(2e-3) - difference(4e-3)) / 3


@pytest.mark.parametrize("unroll", [1, 4])
@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
@pytest.mark.parametrize("name", CALLS)
def test_the_hypergradient_is_the_finite_difference(name, engine, unroll):
    call, settings = CALLS[name]
    hypergradient = trained(call, settings, engine=engine, unroll=unroll)
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        direction = torch.randn(N, 5, generator=generator).double()
        expected = slope(call, settings, direction, unroll=unroll)
        assert (hypergradient * direction).sum().item() == pytest.approx(expected, rel=1e-6)


def test_terms_are_weighted_by_name_where_a_sample_has_them():
    generator = torch.Generator().manual_seed(3)
    batch = draw(generator)
    inputs, teacher, features, labels, there = batch
    criterion = WeightedKDLoss(Table(5), temperature=2.0, terms=OWN)
    student = Student().double()
    loss = five_terms(criterion, student, batch)
    own, logits = student(inputs)
    two = WeightedKDLoss(temperature=2.0).losses(logits, teacher, labels)
    expected = torch.stack(
        (
            *two.unbind(1), attention(own, features), relation(own, features).expand(N),
            torch.where(there, (own - features).pow(2).mean(1), 0),
        ),
        dim=1,
    )
    torch.testing.assert_close(criterion.last_losses, expected)
    weights = criterion.weight_net.weights.clone()
    weights[~there, 4] = 0
    assert criterion.names == FIVE
    torch.testing.assert_close(criterion.weights, weights)
    torch.testing.assert_close(loss, (weights * expected).sum() / N)
    for reduction, reduced in (("sum", expected.mul(weights).sum()), ("none", None)):
        criterion.reduction = reduction
        reduced = (weights * expected).sum(1) if reduced is None else reduced
        torch.testing.assert_close(five_terms(criterion, student, batch), reduced)


def test_fixed_weights_by_name():
    batch = draw(torch.Generator().manual_seed(3))
    weights = dict(zip(FIVE, (0.5, 0.2, 3.0, 1.0, 0.0)))
    student = Student().double()
    losses = [
        five_terms(WeightedKDLoss(terms=OWN, alpha=alpha), student, batch)
        for alpha in (weights, tuple(weights.values()))
    ]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("there", [[True] * 6, [True, False, True, False, False, True]])
def test_a_teacher_that_knows_some_samples_teaches_these_alone(there):
    _, teacher, _, labels, _ = draw(torch.Generator().manual_seed(3))
    student, there = torch.randn(N, CLASSES).double().requires_grad_(), torch.tensor(there)
    unknown = teacher.masked_fill(~there.unsqueeze(1), float("nan"))
    names = ("hard", "a", "b")
    features = ("student_ce", "a.kl", "b.kl", "b.teacher_entropy", "b")
    net = MetaWeightNet(features, terms=names, mean=(1.0, 0.5, 0.25)).double()
    nn.init.normal_(net.layers[-2].weight)
    criterion = WeightedKDLoss(net, teachers=("a", "b"))
    loss = criterion(student, {"a": -teacher, "b": (unknown, there)}, labels)
    loss.backward()
    assert student.grad.isfinite().all() and criterion.last_features.isfinite().all()
    assert (criterion.weights[:, 2] > 0).equal(there)
    whole = WeightedKDLoss(alpha=(1, 1)).losses(student, teacher, labels)[:, 1]
    torch.testing.assert_close(criterion.last_losses[:, 2], torch.where(there, whole, 0))
    torch.testing.assert_close(criterion.last_features[:, 4], criterion.last_losses[:, 2])
    due = N * 1.5 + there.sum() * 0.25
    torch.testing.assert_close(criterion.weights.sum(), due.double())


def test_ignored_positions_lack_every_term():
    student, teacher = torch.randn(2, 3, CLASSES, 4).transpose(2, 3).unbind()
    student.requires_grad_()
    labels = torch.randint(CLASSES, (3, 4))
    labels[0, 2:] = -100
    criterion = WeightedKDLoss(
        MetaWeightNet(("student_ce", "map"), terms=("hard", "soft", "map"), mean=1.0),
        terms={"map": lambda x, there: (x.pow(2).mean(-1), there)}, class_dim=-1,
    )
    there = torch.arange(12).view(3, 4) % 2 == 0
    criterion(student, teacher, labels, map=(student, there)).backward()
    kept = labels != -100
    expected = torch.stack((kept, kept, kept & there), 2).view(-1, 3)
    assert (criterion.weights > 0).equal(expected) and not student.grad[~kept].any()
    torch.testing.assert_close(criterion.weights.sum(), expected.sum().float())


def test_metrics_and_history_carry_the_names(tmp_path):
    torch.manual_seed(0)
    student = Student().double()
    criterion = WeightedKDLoss(MetaWeightNet(("attention", "kl"), terms=FIVE).double(), terms=OWN)
    history = WeightHistory(criterion)
    generator = torch.Generator().manual_seed(1)
    batch = draw(generator)
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), 0.1), student, criterion,
        [(draw(generator)[0], torch.arange(N) % CLASSES)], every=1,
        meta_forward=lambda student, batch: (student(batch[0])[1], batch[1]),
    )
    five_terms(criterion, student, batch).backward()
    weights = criterion.weights
    optimizer.step()
    for name, weight in zip(FIVE, weights.mean(0)):
        assert optimizer.metrics[f"{name}_weight"] == pytest.approx(weight.item())
    history.save(tmp_path / "weights.npz")
    history.plot(tmp_path / "weights.png")
    with np.load(tmp_path / "weights.npz") as file:
        table = dict(file)
    assert set(FIVE) < set(table)
    labels = batch[3]
    for label in labels.unique():
        mean = weights[labels == label, 4].mean()
        assert table["regression"][0, label] == pytest.approx(mean.item())
    other = WeightHistory(WeightedKDLoss())
    with pytest.raises(ValueError, match="records 5 terms, expected 2") as error:
        other.load_state_dict(history.state_dict())
    assert_one_sentence(error)


def test_half_precision_and_autocast_give_float32():
    inputs, teacher, features, labels, there = draw(torch.Generator().manual_seed(3))
    student = Student()
    criterion = WeightedKDLoss(MetaWeightNet(terms=FIVE), terms=OWN)
    with torch.autocast("cpu", torch.bfloat16):
        batch = inputs.float(), teacher.float(), features.bfloat16(), labels, there
        loss = five_terms(criterion, student, batch)
    assert loss.dtype == criterion.weights.dtype == torch.float32


def make(**settings):
    return WeightedKDLoss(**{"alpha": (1,) * 3, "terms": {"map": lambda x: x}, **settings})


def called(value, **settings):
    logits, labels = torch.randn(N, CLASSES), torch.zeros(N, dtype=torch.long)
    return make(**settings)(logits, logits, labels, **value)


def called_with_teachers(teachers):
    criterion = WeightedKDLoss(alpha=(1, 1, 1), teachers=("a", "b"))
    criterion(torch.randn(N, CLASSES), teachers, torch.zeros(N, dtype=torch.long))


REFUSED = {
    "a name that is taken": lambda: make(terms={"soft": attention}),
    "no name": lambda: make(terms={"my term": attention}),
    "one name twice": lambda: make(teachers=("a", "a")),
    "a string for teachers": lambda: make(teachers="large"),
    "too few weights": lambda: make(alpha=(1, 2)),
    "a number for three": lambda: make(alpha=0.5),
    "a name missing": lambda: make(alpha={"hard": 1.0, "soft": 1.0}),
    "a net of other terms": lambda: make(weight_net=MetaWeightNet()),
    "a mean too short": lambda: MetaWeightNet(mean=(1, 1), terms=FIVE),
    "a feature of no teacher": lambda: MetaWeightNet(("large.kl",), terms=FIVE),
    "nothing for a term": lambda: called({}),
    "something for no term": lambda: called({"map": torch.rand(N), "mop": 1}),
    "a term of another shape": lambda: called({"map": torch.rand(N, 2)}),
    "no tensor": lambda: called({"map": 3.0}),
    "a mask of another shape": lambda: called(
        {"map": torch.rand(N)}, terms={"map": lambda x: (x, torch.ones(2).bool())}
    ),
    "a mask of numbers": lambda: called(
        {"map": torch.rand(N)}, terms={"map": lambda x: (x, torch.ones(N))}
    ),
    "one teacher of two": lambda: called_with_teachers({"a": torch.randn(N, CLASSES)}),
    "a tensor for two teachers": lambda: called_with_teachers(torch.randn(N, CLASSES)),
    "a teacher of other classes": lambda: called_with_teachers(
        {"a": torch.randn(N, CLASSES), "b": torch.randn(N, 2)}
    ),
    "long_tailed with teachers": lambda: WeightedKDLoss.long_tailed([3, 2], teachers=("a", "b")),
    "a feature of one of two": lambda: WeightedKDLoss(
        MetaWeightNet(terms=("hard", "a", "b")), teachers=("a", "b")
    )(*[torch.randn(N, 2)], {"a": torch.randn(N, 2), "b": torch.randn(N, 2)}, torch.arange(N) % 2),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(what):
    with pytest.raises(ValueError) as error:
        REFUSED[what]()
    assert_one_sentence(error)


def looped(terms, call, **settings):
    torch.manual_seed(0)
    student = Student().double()
    criterion = WeightedKDLoss(Table(3), terms=terms)
    generator = torch.Generator().manual_seed(1)
    inputs, teacher, features, labels, _ = draw(generator)
    parts = settings.pop("parts", [])
    params = [*student.parameters(), *(p for part in parts for p in part.parameters())]
    optimizer = BilevelOptimizer(
        torch.optim.SGD(params, 0.1), student, criterion, [(inputs, labels)], every=1,
        meta_forward=lambda student, batch: (student(batch[0])[1], batch[1]), **settings,
    )
    own, logits = student(inputs)
    criterion(logits, teacher, labels, map=call(student, own, features)).backward()
    optimizer.step()
    return criterion.weight_net.weights.grad


def test_a_term_whose_parameters_the_optimizer_moves_is_refused():
    layer = nn.Linear(WIDTH, WIDTH).double()
    for terms, call in (
        ({"map": lambda x, y: attention(layer(x), y)}, lambda _, own, features: (own, features)),
        ({"map": attention}, lambda _, own, features: (layer(own), features)),
        ({"map": None}, lambda _, own, features: attention(layer(own), features)),
    ):
        with pytest.raises(ValueError, match="a parameter that the optimizer moves") as error:
            looped(terms, call, parts=[layer])
        assert_one_sentence(error)


def test_a_term_of_a_parameter_taken_past_the_student_is_refused():
    with pytest.raises(ValueError, match="map of shape .* are made of the student's") as error:
        looped({"map": None}, lambda student, own, _: own.pow(2).sum(1) * student.fc1.bias.sum())
    assert_one_sentence(error)


def test_a_term_that_draws_is_refused_and_its_values_are_not():
    def noisy(x, y):
        return attention(x + torch.rand_like(x), y)

    with pytest.raises(ValueError, match="repeated and gave losses that differ") as error:
        looped({"map": noisy}, lambda _, own, features: (own, features))
    assert_one_sentence(error)
    assert looped({"map": None}, lambda _, own, features: noisy(own, features))[:, 2].any()


def test_a_teacher_s_features_with_a_graph_and_an_argument_without_use():
    layer = nn.Linear(WIDTH, WIDTH).double()
    expected = looped({"map": attention}, lambda _, own, y: (own, layer(y).detach()))
    actual = looped({"map": attention}, lambda _, own, y: (own, layer(y)))
    assert relative_error([actual], [expected]) < 1e-12
    unused = looped({"map": lambda x, y, z: y.sum(1)}, lambda _, own, y: (own * 2, y, own))
    assert unused[:, :2].any() and not unused[:, 2].any()


def test_features_written_in_place_before_the_step_are_refused():
    student = Student().double()
    inputs, teacher, features, labels, _ = draw(torch.Generator().manual_seed(1))
    criterion = WeightedKDLoss(Table(3), terms={"map": attention})
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), 0.1), student, criterion, [(inputs, labels)],
        every=1, meta_forward=lambda student, batch: (student(batch[0])[1], batch[1]),
    )
    own, logits = student(inputs)
    criterion(logits, teacher, labels, map=(own, features)).backward()
    features.zero_()
    with pytest.raises(ValueError, match="map of shape .* was written in place") as error:
        optimizer.step()
    assert_one_sentence(error)


@pytest.mark.parametrize("kind", ["mix", "soft"])
def test_a_soft_meta_loss_of_several_teachers_is_refused(kind):
    student = Student()
    criterion = WeightedKDLoss(Table(3), teachers=("a", "b"))
    with pytest.raises(ValueError, match="expected one teacher") as error:
        BilevelOptimizer(
            torch.optim.SGD(student.parameters(), 0.1), student, criterion, [0], meta_loss=kind,
            teacher=student,
        )
    assert_one_sentence(error)


def test_a_student_changed_before_the_step_is_seen_where_values_are_recorded():
    """Recorded values are the same whatever a replay gives: its outputs tell."""
    class Scaled(Student):
        scale = 1.0

        def forward(self, inputs):
            features, logits = super().forward(inputs)
            return features * self.scale, logits

    torch.manual_seed(0)
    student = Scaled().double()
    inputs, teacher, features, labels, _ = draw(torch.Generator().manual_seed(1))
    criterion = WeightedKDLoss(Table(3), terms={"map": None})
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), 0.1), student, criterion, [(inputs, labels)],
        every=1, meta_forward=lambda student, batch: (student(batch[0])[1], batch[1]),
    )
    own, logits = student(inputs)
    criterion(logits, teacher, labels, map=attention(own, features)).backward()
    student.scale = 2.0
    with pytest.raises(ValueError, match="repeated and gave losses that differ") as error:
        optimizer.step()
    assert_one_sentence(error)
