"""How student and criterion are called: arguments, outputs, several calls, meta batches."""

import collections
import dataclasses
import gc
import math
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree

from kd_balance import BilevelOptimizer
from tests.habits import (
    Lab,
    assert_differentiates,
    assert_leaves_what_the_plain_loop_leaves,
    assert_one_sentence,
    assert_same_hypergradient,
    plain,
    trained,
)
from tests.students import CLASSES, MLP, ConvNet, relative_error

# several calls before a step


def loop_of(losses, steps=2):
    """A loop whose loss is ``losses(lab, inputs, teacher_logits, labels)``."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(steps):
            lab.optimizer.zero_grad()
            losses(lab, inputs, teacher_logits, labels).backward()
            lab.optimizer.step()

    return loop


def two_crops(lab, inputs, teacher_logits, labels):
    first, second = lab.called(inputs), lab.called(inputs.flip(0))
    return lab.criterion(first, teacher_logits, labels) + lab.criterion(
        second, teacher_logits.flip(0), labels.flip(0)
    )


def two_crops_in_another_order(lab, inputs, teacher_logits, labels):
    """The criterion is not called in the order of the student's calls."""
    first, second = lab.called(inputs), lab.called(2 * inputs)
    late = lab.criterion(second, teacher_logits, labels)
    return 0.7 * late + 0.3 * lab.criterion(first, teacher_logits, labels)


def soft_targets(lab, inputs, teacher_logits, labels):
    """Mixup with mixed labels."""
    one_hot = F.one_hot(labels, CLASSES).to(inputs)
    mixed = 0.7 * inputs + 0.3 * inputs.flip(0)
    targets = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    return lab.criterion(lab.called(mixed), teacher_logits, targets)


def two_labels(lab, inputs, teacher_logits, labels):
    """Mixup with two losses of one output."""
    logits = lab.called(0.7 * inputs + 0.3 * inputs.flip(0))
    return 0.7 * lab.criterion(logits, teacher_logits, labels) + 0.3 * lab.criterion(
        logits, teacher_logits, labels.flip(0)
    )


def evaluation_within(lab, inputs, teacher_logits, labels):
    """Between forward and backward, as a logging line does."""
    loss = lab.criterion(lab.called(inputs), teacher_logits, labels)
    evaluate(lab)
    return loss


def evaluate(lab):
    lab.called.eval()
    with torch.no_grad():
        lab.criterion(lab.called(lab.meta[0][0]), torch.zeros(7, CLASSES).double(), lab.meta[0][1])
    with torch.inference_mode():
        lab.called(lab.meta[0][0])
    lab.called.train()


def forgotten_loss(lab, inputs, teacher_logits, labels):
    """Evaluation without no_grad, whose loss nobody calls backward on."""
    lab.called.eval()
    lab.kept = lab.criterion(lab.called(inputs), teacher_logits, labels)
    lab.called.train()
    return lab.criterion(lab.called(inputs), teacher_logits, labels)


def other_use_of_the_student(lab, inputs, teacher_logits, labels):
    """A second output that a constant term is made of."""
    other = lab.called(inputs.roll(1, 0)).detach()
    return lab.criterion(lab.called(inputs), teacher_logits, labels) + other.mean()


def by_keywords(lab, inputs, teacher_logits, labels):
    return lab.criterion(
        targets=labels, student_logits=lab.called(inputs), teacher_logits=teacher_logits
    )


CALLS = [
    two_crops,
    two_crops_in_another_order,
    soft_targets,
    two_labels,
    evaluation_within,
    forgotten_loss,
    other_use_of_the_student,
    by_keywords,
]


@pytest.mark.parametrize("make", [MLP, ConvNet])
@pytest.mark.parametrize("losses", CALLS)
def test_calls(losses, make):
    options = dict(make=make, shape=(8,) if make is MLP else (2, 6, 6))
    assert_differentiates(loop_of(losses), steps=2, **options)
    assert_leaves_what_the_plain_loop_leaves(loop_of(losses), **options)


def test_evaluation_between_backward_and_step():
    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(2):
            lab.optimizer.zero_grad()
            lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
            evaluate(lab)
            lab.optimizer.step()
            evaluate(lab)

    assert_differentiates(loop, steps=2)
    assert_leaves_what_the_plain_loop_leaves(loop)


def test_backward_in_parts():
    """The graph kept, and the same result walked twice with different factors."""

    def loop(lab):
        for inputs, teacher_logits, labels in lab.batches(2):
            lab.optimizer.zero_grad()
            loss = lab.criterion(lab.called(inputs), teacher_logits, labels)
            (0.3 * loss).backward(retain_graph=True)
            (0.7 * loss).backward()
            lab.optimizer.step()

    assert_differentiates(loop, reference=plain(2), steps=2)


def test_inputs_changed_before_the_step_are_refused():
    """A replay would see the changed ones."""
    lab = Lab()
    lab.wrap()
    inputs, teacher_logits, labels = next(lab.batches(1))
    lab.criterion(lab.called(inputs), teacher_logits, labels).backward()
    inputs.mul_(0.5)
    with pytest.raises(ValueError, match="an input of shape .* was written in place") as error:
        lab.optimizer.step()
    assert_one_sentence(error)


# what the student is given and gives


class Wide(MLP):
    """Two inputs, of which the second has a default, and a flag."""

    def forward(self, inputs, scale=1.0, is_feat=False):
        hidden = torch.tanh(self.fc1(inputs * scale))
        logits = self.fc2(hidden)
        return ([inputs, hidden], logits) if is_feat else logits


@dataclasses.dataclass
class Plain:
    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden: list


class ModelOutput(collections.OrderedDict):
    """In the manner of Hugging Face: a dict with attributes, registered as a pytree."""

    __getattr__ = collections.OrderedDict.__getitem__


_pytree.register_pytree_node(
    ModelOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: ModelOutput(zip(names, values)),
)
Named = collections.namedtuple("Named", ["hidden", "logits"])

OUTPUTS = {
    "tuple": (lambda h, z: (h, z), lambda o: o[1]),
    "first of a list": (lambda h, z: [z, h], lambda o: o[0]),
    "named tuple": (lambda h, z: Named(h, z), lambda o: o.logits),
    "dict": (lambda h, z: {"hidden": h, "logits": z}, lambda o: o["logits"]),
    "nested": (lambda h, z: {"a": [h, {"b": (None, z)}], "n": 3}, lambda o: o["a"][1]["b"][1]),
    "ModelOutput": (
        lambda h, z: ModelOutput(hidden=(h, h), logits=z),
        lambda o: o.logits,
    ),
    "dataclass": (lambda h, z: Plain(None, z, [h]), lambda o: o.logits),
    "UserDict": (lambda h, z: collections.UserDict(hidden=h, logits=z), lambda o: o["logits"]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name):
    packed, logits_in = OUTPUTS[name]

    class Student(MLP):
        def forward(self, inputs):
            hidden = torch.tanh(self.fc1(inputs))
            return packed(hidden, self.fc2(hidden))

    assert_differentiates(
        plain(2), steps=2, make=Student, call=lambda student, x: logits_in(student(x))
    )


ARGUMENTS = {
    "keyword": lambda student, x: student(inputs=x),
    "with a flag": lambda student, x: student(x, is_feat=True)[1],
    "with a number": lambda student, x: student(x, 0.5),
    "all by keyword": lambda student, x: student(inputs=x, scale=0.5, is_feat=True)[1],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    assert_differentiates(plain(2), steps=2, make=Wide, call=ARGUMENTS[name])


@pytest.mark.parametrize("kind", [dict, collections.UserDict])
def test_a_student_that_writes_its_output_into_its_input(kind):
    """As the modules of sentence-transformers do."""

    class Student(MLP):
        def forward(self, features):
            features["logits"] = super().forward(features["inputs"])
            return features

    def call(student, inputs):
        return student(kind(inputs=inputs))["logits"]

    def forward(student, batch):
        return call(student, batch[0]), batch[1]

    settings = {"meta_forward": forward}
    assert_differentiates(plain(2), steps=2, make=Student, call=call, settings=settings)


class Language(MLP):
    """Called as Hugging Face models are: by keyword, labels among them, a loss in the output."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = super().forward(input_ids * attention_mask)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ModelOutput(loss=loss, logits=logits)


MASK = (torch.arange(8) < 6).double()


@pytest.mark.parametrize("kind", [dict, collections.UserDict])
@pytest.mark.parametrize("with_labels", [False, True])
def test_mappings_by_keyword(with_labels, kind):
    def losses(lab, inputs, teacher_logits, labels):
        batch = {"input_ids": inputs, "attention_mask": MASK.expand_as(inputs)}
        if with_labels:
            batch["labels"] = labels
        return lab.criterion(lab.called(**batch).logits, teacher_logits, labels)

    def meta(inputs, labels):
        mask = MASK.expand_as(inputs)
        return [kind({"input_ids": inputs, "attention_mask": mask, "labels": labels})]

    assert_differentiates(
        loop_of(losses),
        steps=2,
        make=Language,
        call=lambda student, x: student(input_ids=x, attention_mask=MASK.expand_as(x)).logits,
        settings={"meta": meta},
    )


class OfMapping(MLP):
    def forward(self, batch):
        return super().forward(batch["image"])


META_BATCHES = {
    "tuple": lambda x, y: [(x, y)],
    "list": lambda x, y: [[x, y]],
    "with an index": lambda x, y: [(x, y, torch.arange(len(y)))],
    "endless": lambda x, y: iter([(x, y)] * 9),
    "DataLoader": lambda x, y: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=len(y)
    ),
    "mapping": lambda x, y: [{"inputs": x, "labels": y}],
}


@pytest.mark.parametrize("name", META_BATCHES)
def test_meta_batches(name):
    settings = {"meta": META_BATCHES[name]}
    assert_differentiates(plain(2), steps=2, settings=settings)


def test_meta_batches_for_a_student_that_takes_a_mapping():
    assert_differentiates(
        plain(2),
        steps=2,
        make=OfMapping,
        call=lambda student, x: student({"image": x}),
        settings={"meta": lambda x, y: [({"image": x}, y)]},
    )


@pytest.mark.parametrize("method", ["online", "paper"])
def test_meta_forward(method):
    """A batch of any shape, and a student called in any way."""

    def forward(student, batch):
        return student(batch["pictures"][0], is_feat=True)[1], batch["answers"]

    settings = {
        "meta": lambda x, y: [{"pictures": [x], "answers": y}],
        "meta_forward": forward,
        "method": method,
    }
    if method == "online":
        assert_differentiates(plain(2), steps=2, make=Wide, settings=settings)
    lab = trained(plain(1), wrapped=True, make=Wide, settings=settings)
    other = trained(plain(1), wrapped=True, make=Wide, settings={"method": method})
    assert relative_error([lab.hypergradient], [other.hypergradient]) < 1e-12


def test_meta_forward_through_a_wrapped_student():
    """The user's function may close over the student instead of taking it."""
    lab = Lab()
    lab.wrap(meta_forward=lambda _, batch: (lab.student(batch[0]), batch[1]))
    plain(1)(lab)
    expected = trained(plain(1), wrapped=True)
    assert relative_error([lab.hypergradient], [expected.hypergradient]) < 1e-12


class Distiller(nn.Module):
    """In the manner of mdistiller: student, teacher and criterion inside one module."""

    def __init__(self, student, criterion):
        super().__init__()
        self.student, self.teacher, self.criterion = student, MLP().to(torch.float64), criterion

    def forward(self, image, target):
        logits = self.student(image)
        with torch.no_grad():
            teacher_logits = self.teacher(image)
        return logits, {"kd": self.criterion(logits, teacher_logits, target)}


@pytest.mark.parametrize("parallel", [False, True])
def test_a_module_that_holds_student_and_criterion(parallel):
    def losses(lab, inputs, _, labels):
        torch.manual_seed(4)
        distiller = Distiller(lab.student, lab.criterion)
        distiller = nn.DataParallel(distiller) if parallel else distiller
        return sum(loss for loss in distiller(inputs, labels)[1].values())

    assert_differentiates(loop_of(losses), steps=2)


# more in the loss, more in the optimizer


def with_feature_loss(lab, inputs, teacher_logits, labels):
    """One line with three factors, as in RepDistiller, and an adapter for the features."""
    features, logits = lab.called(inputs, is_feat=True)
    hint = F.mse_loss(lab.adapter(features[1]), teacher_logits)
    loss = 0.9 * lab.criterion(logits, teacher_logits, labels)
    return loss + 0.1 * F.cross_entropy(logits, labels) + 0.5 * hint


def with_adapter(steps, after):
    def loop(lab):
        torch.manual_seed(4)
        lab.adapter = nn.Linear(12, CLASSES).double()
        inner = getattr(lab.optimizer, "optimizer", lab.optimizer)
        (lab.optimizer if after else inner).add_param_group({"params": lab.adapter.parameters()})
        loop_of(with_feature_loss, steps)(lab)

    return loop


@pytest.mark.parametrize("after", [False, True], ids=["before wrapping", "after"])
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
def test_extra_terms_and_extra_modules(optimizer, after):
    loop = with_adapter(1, after)
    assert_differentiates(loop, make=Wide, optimizer=optimizer, rtol=1e-4)
    assert_leaves_what_the_plain_loop_leaves(
        with_adapter(3, after), make=Wide, optimizer=optimizer
    )


def test_extra_terms_count_as_constants_over_several_steps():
    """The engines agree; the curvature of the other terms is left out, as documented."""
    settings = {"unroll": 3, "every": 3}
    loop = with_adapter(3, True)
    assert_same_hypergradient(loop, loop, make=Wide, settings=settings)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_constant_factor(steps):
    def losses(lab, inputs, teacher_logits, labels):
        return lab.criterion(lab.called(inputs), teacher_logits, labels) / 4

    assert_differentiates(loop_of(losses, steps), steps=steps)


@pytest.mark.parametrize("steps", [1, 2])
def test_logits_cast_before_the_criterion(steps):
    def losses(lab, inputs, teacher_logits, labels):
        return lab.criterion(lab.called(inputs).double(), teacher_logits, labels)

    settings = {"unroll": steps, "every": steps}
    lab, reference = (
        trained(loop, wrapped=True, dtype=torch.float32, settings={**settings, **more})
        for loop, more in ((loop_of(losses, steps), {}), (plain(steps), {"engine": "unroll"}))
    )
    assert lab.criterion.last_losses.dtype == torch.float64
    assert relative_error([lab.hypergradient], [reference.hypergradient]) < 1e-4


def test_losses_that_never_go_through_backward_are_not_kept():
    """An evaluation that forgot torch.no_grad() holds no more memory than in the plain loop."""
    lab = Lab()
    lab.wrap()
    inputs = [weakref.ref(inputs) for inputs in _evaluated(lab)]
    gc.collect()
    assert [ref() for ref in inputs] == [None] * 3


def _evaluated(lab):
    for inputs, teacher_logits, labels in lab.batches(3):
        lab.criterion(lab.student(inputs), teacher_logits, labels)
        yield inputs


# reductions, class dimensions


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("steps", [1, 3])
def test_reductions(reduction, steps):
    def losses(lab, inputs, teacher_logits, labels):
        loss = lab.criterion(lab.called(inputs), teacher_logits, labels)
        if reduction == "sum":
            return loss / 9
        assert loss.shape == (9,)
        return (loss * torch.arange(9)).sum() / 40

    assert_differentiates(loop_of(losses, steps), steps=steps, criterion={"reduction": reduction})


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, CLASSES, 1)
        )

    def forward(self, inputs):
        return self.layers(inputs)


POSITIONS = {
    "language": dict(shape=(4, 8), places=(4,), criterion={"class_dim": -1}),
    "segmentation": dict(make=Segmenter, shape=(2, 2, 3), places=(2, 3)),
    "segmentation, 255": dict(
        make=Segmenter, shape=(2, 2, 3), places=(2, 3), criterion={"ignore_index": 255}
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", POSITIONS)
def test_every_position_is_a_sample(name, steps, reduction):
    def losses(lab, inputs, teacher_logits, labels):
        return lab.criterion(lab.called(inputs), teacher_logits, labels).mean()

    options = dict(POSITIONS[name])
    options["criterion"] = {**options.get("criterion", {}), "reduction": reduction}
    assert_differentiates(loop_of(losses, steps), steps=steps, **options)


def test_the_wrapper_trains_while_another_model_is_evaluated():
    """The criterion on another model's output under no_grad is nobody's business."""

    def loop(lab):
        other = MLP().double()
        for inputs, teacher_logits, labels in lab.batches(2):
            lab.optimizer.zero_grad()
            loss = lab.criterion(lab.called(inputs), teacher_logits, labels)
            with torch.no_grad():
                lab.criterion(other(inputs), teacher_logits, labels)
            loss.backward()
            lab.optimizer.step()

    assert_differentiates(loop, steps=2)


def test_two_students_with_two_wrappers():
    """Mutual learning: each has a criterion and an optimizer of its own."""
    labs = [Lab(), Lab(ConvNet, shape=(2, 6, 6))]
    for lab in labs:
        lab.wrap()
    batches = [list(lab.batches(2)) for lab in labs]
    for step in range(2):
        loss = 0
        for lab, drawn in zip(labs, batches):
            inputs, teacher_logits, labels = drawn[step]
            lab.optimizer.zero_grad()
            loss = loss + lab.criterion(lab.student(inputs), teacher_logits, labels)
        loss.backward()
        for lab in labs:
            lab.optimizer.step()
    for lab, options in zip(labs, ({}, dict(make=ConvNet, shape=(2, 6, 6)))):
        expected = trained(plain(2), wrapped=True, **options)
        assert relative_error([lab.hypergradient], [expected.hypergradient]) < 1e-9


def test_wrapped_twice_is_refused():
    lab = Lab()
    with pytest.raises(ValueError, match="optimizer is BilevelOptimizer") as error:
        BilevelOptimizer(lab.wrap(), lab.student, lab.criterion, lab.meta)
    assert_one_sentence(error)


def test_a_teacher_that_draws_random_numbers():
    """On the meta batch it draws its own; the training loop's are left as they are."""
    teacher = nn.Sequential(nn.Dropout(), nn.Linear(8, CLASSES)).double()
    settings = {"meta_loss": "mix", "teacher": teacher}
    assert_leaves_what_the_plain_loop_leaves(plain(2), settings=settings)


class Augmenting:
    """Meta batches augmented by Python's and numpy's random numbers."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels
        self.drawn = []

    def __iter__(self):
        while True:
            self.drawn.append(random.random() + np.random.rand() + torch.rand(()).item())
            yield self.inputs * self.drawn[-1], self.labels


def test_a_meta_loader_that_draws_random_numbers():
    settings = {"meta": Augmenting}
    assert_leaves_what_the_plain_loop_leaves(plain(3), settings=settings)
    loaders = []
    settings = {"meta": lambda x, y: loaders.append(Augmenting(x, y)) or loaders[0]}
    trained(plain(3), wrapped=True, settings=settings)
    assert len(set(loaders[0].drawn)) == 3


def test_metrics_before_the_first_step():
    lab = Lab()
    lab.wrap()
    metrics = lab.optimizer.metrics
    assert metrics["meta_updates"] == 0
    assert all(math.isnan(metrics[name]) for name in ("meta_loss", "hard_weight", "soft_weight"))
