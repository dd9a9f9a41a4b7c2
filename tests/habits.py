"""A laboratory for training habits: the same loop run wrapped and plain.

A habit is a loop, ``loop(lab)``, that trains ``lab.student`` by ``lab.optimizer`` in some manner
of its own. Two references need nothing of this package but the loss: the plain loop, which leaves
the same student, and the plain loop with nudged weights, whose slope is the hypergradient.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kd_balance import BilevelOptimizer, WeightedKDLoss
from tests.students import CLASSES, EVERY_STEP, MLP, OPTIMIZERS, logits_of, relative_error


class Table(nn.Module):
    """Weights that are parameters, whatever the features: a pair for each place in the batch."""

    def __init__(self, count=64):
        super().__init__()
        self.weights = nn.Parameter(0.3 + 0.4 * torch.rand(count, 2))

    def forward(self, features):
        return self.weights[: len(features)]


class Lab:
    """A student, its optimizer and criterion, and data from one seed.

    Args:
        make: the student.
        shape: of one input.
        optimizer: a name in OPTIMIZERS, or ``parameters -> optimizer``.
        criterion: settings of the WeightedKDLoss.
        call: ``(student, inputs) -> logits``.
        places: the shape of one sample's labels; a third of them are ignored.
    """

    def __init__(
        self,
        make=MLP,
        *,
        shape=(8,),
        dtype=torch.float64,
        device="cpu",
        optimizer="sgd-momentum",
        criterion=None,
        call=lambda student, inputs: logits_of(student(inputs)),
        places=(),
    ):
        torch.manual_seed(0)
        self.student = make().to(device, dtype)
        self.called = self.student  # what the loop calls: the student, compiled for example
        table = Table().to(device, dtype)
        self.criterion = WeightedKDLoss(table, temperature=2.0, **(criterion or {}))
        self.optimizer = OPTIMIZERS.get(optimizer, optimizer)(self.student.parameters())
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
        self.shape, self.dtype, self.device = shape, dtype, device
        self.call, self.places = call, places
        self.generator = torch.Generator().manual_seed(1)
        self.meta = [(self.inputs(7), self.labels(7))]

    def inputs(self, count=9):
        draw = torch.randn(count, *self.shape, generator=self.generator)
        return draw.to(self.device, self.dtype)

    def labels(self, count=9):
        shape = (count, *self.places)
        labels = torch.randint(CLASSES, shape, generator=self.generator)
        if self.places:
            ignored = torch.rand(shape, generator=self.generator) < 1 / 3
            labels = labels.masked_fill(ignored, self.criterion.ignore_index)
        return labels.to(self.device)

    def teacher_logits(self, count=9):
        draw = 3 * torch.randn(count, *self.places, CLASSES, generator=self.generator)
        return draw.movedim(-1, (self.criterion.class_dim or 1)).to(self.device, self.dtype)

    def batches(self, steps, count=9):
        for _ in range(steps):
            yield self.inputs(count), self.teacher_logits(count), self.labels(count)

    def wrap(self, rate=0.0, **settings):
        """Wraps the optimizer; φ stands still by default.

        ``grad_scaler=True`` stands for the laboratory's own, and `meta` may be a function of the
        meta inputs and labels.
        """
        meta = settings.pop("meta", self.meta)
        if callable(meta):
            meta = meta(*self.meta[0])
        if settings.pop("grad_scaler", False):
            settings["grad_scaler"] = self.scaler
        phi = torch.optim.SGD(self.criterion.weight_net.parameters(), lr=rate)
        settings = {"meta_optimizer": phi, **EVERY_STEP, **settings}
        self.optimizer = BilevelOptimizer(
            self.optimizer, self.called, self.criterion, meta, **settings
        )
        return self.optimizer

    @property
    def table(self):
        return self.criterion.weight_net.weights

    @property
    def hypergradient(self):
        return self.table.grad.detach().clone()

    def meta_loss(self):
        """Of the student as it is; in the mode it is in."""
        inputs, labels = self.meta[0]
        with torch.no_grad():
            logits = self.call(self.student, inputs).double()
            logits = logits.movedim((self.criterion.class_dim or 1), 1)
            return F.cross_entropy(
                logits, labels, ignore_index=self.criterion.ignore_index
            ).item()


def plain(steps):
    """The uncluttered loop."""

    def loop(lab):
        train(lab, lab.batches(steps))

    return loop


def train(lab, batches):
    for inputs, teacher_logits, labels in batches:
        lab.optimizer.zero_grad()
        lab.criterion(lab.call(lab.called, inputs), teacher_logits, labels).backward()
        lab.optimizer.step()


def trained(loop, *, wrapped, prepare=None, nudge=0.0, settings=None, **options):
    """A laboratory after a loop.

    Args:
        wrapped: wrap the optimizer.
        prepare: what to make of the student before it is wrapped, and called instead of it.
        nudge: times a fixed direction is added to the weights.
        settings: of the BilevelOptimizer.
        options: of the Lab.
    """
    lab = Lab(**options)
    direction = torch.randn(lab.table.shape, generator=torch.Generator().manual_seed(2))
    lab.table.data += nudge * direction.to(lab.table)
    if prepare is not None:
        lab.called = prepare(lab.student)
    if wrapped:
        lab.wrap(**(settings or {}))
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    loop(lab)
    lab.slope = None
    if lab.table.grad is not None:
        lab.slope = (lab.hypergradient * direction.to(lab.table)).sum().item()
    return lab


def everything(lab):
    """What a loop leaves behind."""
    state = lab.optimizer.state_dict()
    state.pop("kd_balance", None)
    return {
        "student": lab.student.state_dict(),
        "gradients": [p.grad for p in lab.student.parameters()],
        "optimizer": state,
        "random numbers": (torch.rand(3), torch.rand(3, device=lab.device)),
        "others": (random.random(), np.random.rand()),
    }


def assert_leaves_what_the_plain_loop_leaves(loop, **options):
    """Exactly, φ standing still."""
    reference = {k: v for k, v in options.items() if k != "settings"}
    expected = everything(trained(loop, wrapped=False, **reference))
    lab = trained(loop, wrapped=True, **options)
    assert lab.optimizer.metrics["meta_updates"] > 0
    torch.testing.assert_close(everything(lab), expected, rtol=0, atol=0)


def assert_differentiates(loop, *, steps=1, reference=None, rtol=1e-5, **options):
    """The hypergradient is the slope of the meta loss along the real trajectory.

    Args:
        loop: takes `steps` steps.
        reference: a plain loop that takes the same steps; default the same loop.
    """
    plain_options = {k: v for k, v in options.items() if k not in ("settings", "prepare")}
    settings = {"unroll": steps, "every": steps, **options.pop("settings", {})}
    h = 2e-6
    up, down = (
        trained(reference or loop, wrapped=False, nudge=nudge, **plain_options).meta_loss()
        for nudge in (h, -h)
    )
    lab = trained(loop, wrapped=True, settings=settings, **options)
    expected = (up - down) / (2 * h)
    assert abs(lab.slope - expected) <= rtol * abs(expected) + 1e-9, (lab.slope, expected)


def assert_same_hypergradient(loop, reference, *, tolerance=1e-9, **options):
    """That of the uncluttered loop by the "unroll" engine."""
    settings = options.pop("settings", {})
    lab = trained(loop, wrapped=True, settings=settings, **options)
    options.pop("prepare", None)
    other = trained(reference, wrapped=True, settings={**settings, "engine": "unroll"}, **options)
    assert relative_error([lab.hypergradient], [other.hypergradient]) < tolerance


def assert_one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and text.count(". ") == 0, text
