"""Several processes train what one process trains on all the data, in float64 to rounding."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from tests import ranks
from tests.students import (
    EVERY_STEP,
    OPTIMIZERS,
    Run,
    logits_of,
    relative_error,
)

STEPS = 10
SIZE = 2


@dataclass
class Setting:
    """How the loop differs from the plainest one."""

    student: str = "mlp"
    loop: str = "plain"
    optimizer: str = "sgd-momentum"
    batch: tuple[int, ...] = (6, 6, 6, 6)  # by rank
    bilevel: dict[str, Any] = field(default_factory=dict)
    net: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9


THREE = {"unroll": 3, "every": 3}
SETTINGS = {
    **{
        f"{engine}, {optimizer}, unroll {unroll}": Setting(
            optimizer=optimizer,
            bilevel={"engine": engine, **({} if unroll == 1 else THREE)},
        )
        for engine in ("adjoint", "unroll")
        for optimizer in ("sgd-momentum", "adamw")
        for unroll in (1, 3)
    },
    **{
        f"{method}, {optimizer}": Setting(
            optimizer=optimizer, batch=(6, 4, 5, 9), bilevel={"method": method, "every": 2}
        )
        for method in ("lookahead", "paper")
        for optimizer in ("sgd-momentum", "adamw")
    },
    "batch norm": Setting("conv", bilevel={"unroll": 3, "every": 4}),
    "batch norm, unrolled": Setting("conv", bilevel={"engine": "unroll", **THREE}),
    "dropout": Setting("transformer", bilevel=THREE),
    "tied, uneven": Setting("tied", batch=(3, 8, 1, 5), bilevel=THREE),
    "hypergradients averaged": Setting(bilevel={"accumulate": 3}),
    "weights of a fixed mean": Setting(batch=(3, 8, 1, 5), net={"mean": 0.5}, bilevel=THREE),
    "micro-batches": Setting(loop="micro_batches", bilevel=THREE),
    "no_sync": Setting(loop="no_sync", bilevel=THREE),
    "no_sync, lookahead": Setting(loop="no_sync", bilevel={"method": "lookahead"}),
    "clipped": Setting(loop="clipped", bilevel=THREE),
    "clipped, unrolled": Setting(loop="clipped", bilevel={"engine": "unroll"}),
    "another loss on one rank": Setting(loop="another_loss"),
    "another loss, unrolled": Setting(loop="another_loss", bilevel={"engine": "unroll"}),
    "all ignored on one rank": Setting(loop="ignored", bilevel=THREE),
    "an empty batch": Setting(batch=(6, 0, 2, 5), bilevel=THREE),
    "GradScaler": Setting(loop="scaled", bilevel=THREE),
    "GradScaler, told": Setting(loop="scaled", bilevel={"grad_scaler": True, **THREE}),
    "GradScaler, lookahead": Setting(
        loop="scaled", bilevel={"grad_scaler": True, "method": "lookahead"}
    ),
    "autocast": Setting(loop="autocast", bilevel=THREE, dtype=torch.float32, tolerance=1e-3),
    "find_unused_parameters": Setting(
        "branching", bilevel=THREE, ddp={"find_unused_parameters": True}
    ),
    "find_unused_parameters, unrolled": Setting(
        "branching", bilevel={"engine": "unroll", **THREE}, ddp={"find_unused_parameters": True}
    ),
    "static_graph": Setting(bilevel=THREE, ddp={"static_graph": True}),
    "static_graph, another loss": Setting(loop="another_loss", ddp={"static_graph": True}),
    "gradient_as_bucket_view": Setting(bilevel=THREE, ddp={"gradient_as_bucket_view": True}),
    "gradient_as_bucket_view, lookahead": Setting(
        loop="no_sync", bilevel={"method": "lookahead"}, ddp={"gradient_as_bucket_view": True}
    ),
    "small buckets": Setting("conv", bilevel=THREE, ddp={"bucket_cap_mb": 1e-4}),
}


class Program:
    """A training script; `rank` None is one process that has the data of all ranks."""

    def __init__(self, setting, rank, size):
        self.setting, self.size = setting, size
        self.ranks = range(size) if rank is None else [rank]
        run = Run(setting.student, setting.dtype)
        self.shards = [
            [(run.inputs(n), run.teacher_logits(n), run.labels(n)) for n in setting.batch[:size]]
            for _ in range(STEPS)
        ]
        meta = [[(run.inputs(7), run.labels(7)) for _ in range(size)] for _ in range(STEPS)]
        self.student = self.called = run.student
        torch.manual_seed(rank or 0)
        net = MetaWeightNet(hidden=(8,), **setting.net).to(setting.dtype)
        if rank is not None:
            with torch.no_grad():  # rank 0's is everyone's
                for tensor in self.student.state_dict().values():
                    tensor += rank
            self.called = DistributedDataParallel(self.student, **setting.ddp)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        bilevel = dict(setting.bilevel)
        if bilevel.get("grad_scaler"):
            bilevel["grad_scaler"] = self.scaler
        self.criterion = WeightedKDLoss(net, temperature=2.0)
        self.optimizer = BilevelOptimizer(
            OPTIMIZERS[setting.optimizer](self.student.parameters()),
            self.called,
            self.criterion,
            meta if rank is None else [batches[rank] for batches in meta],
            meta_forward=_one_after_the_other if rank is None else None,
            **{**EVERY_STEP, "meta_optimizer": torch.optim.Adam(net.parameters(), 0.1),
               **bilevel},
        )

    def plain(self, rank, inputs, teacher_logits, labels):
        self.loss(inputs, teacher_logits, labels).backward()

    def micro_batches(self, rank, *batch):
        for part in zip(*(tensor.chunk(2) for tensor in batch)):
            (self.loss(*part) / 2).backward()

    def no_sync(self, rank, *batch):
        first, second = zip(*(tensor.chunk(2) for tensor in batch))
        with getattr(self.called, "no_sync", nullcontext)():
            (self.loss(*first) / 2).backward()
        (self.loss(*second) / 2).backward()

    def clipped(self, rank, *batch):
        self.loss(*batch).backward()
        if rank == self.ranks[-1]:
            nn.utils.clip_grad_norm_(self.student.parameters(), 0.1)

    def another_loss(self, rank, inputs, teacher_logits, labels):
        output = logits_of(self.called(inputs))
        loss = self.criterion(output, teacher_logits, labels)
        if rank == 1:
            loss = loss + 0.1 * output.square().mean()
        (loss / len(self.ranks)).backward()

    def ignored(self, rank, inputs, teacher_logits, labels):
        if rank == 1:
            labels = labels.fill_(-100)
        self.loss(inputs, teacher_logits, labels).backward()

    def scaled(self, rank, *batch):
        self.scaler.scale(self.loss(*batch)).backward()

    def autocast(self, rank, *batch):
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(*batch)
        loss.backward()

    def loss(self, inputs, teacher_logits, labels):
        output = logits_of(self.called(inputs))
        return self.criterion(output, teacher_logits, labels) / len(self.ranks)

    def train(self):
        for shards in self.shards:
            self.optimizer.zero_grad()
            for rank in self.ranks:
                getattr(self, self.setting.loop)(rank, *shards[rank])
            if self.setting.loop == "scaled":
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
        return {
            "student": [p.detach().clone() for p in self.student.parameters()],
            "weight net": [p.detach().clone() for p in self.criterion.weight_net.parameters()],
            "metrics": self.optimizer.metrics,
        }


def _one_after_the_other(student, batches):
    logits = torch.cat([logits_of(student(inputs)) for inputs, _ in batches])
    return logits, torch.cat([labels for _, labels in batches])


def train(setting, rank, size):
    return Program(setting, rank, size).train()


@pytest.fixture(scope="module")
def found():
    return ranks.run(train, SETTINGS, SIZE)


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_train_what_one_process_trains(name, found):
    for result in found[name]:
        assert not isinstance(result, ranks.Failure), result.traceback
    expected = train(SETTINGS[name], None, SIZE)
    first, *others = found[name]
    assert first["metrics"]["meta_updates"] > 0
    for part in ("student", "weight net"):
        for other in others:
            assert all(map(torch.equal, first[part], other[part]))
        assert relative_error(first[part], expected[part]) < SETTINGS[name].tolerance
    assert first["metrics"] == pytest.approx(expected["metrics"], rel=SETTINGS[name].tolerance)
