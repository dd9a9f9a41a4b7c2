"""Several processes train what one process trains on all the data, in float64 to rounding."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from tests import ranks
from tests.students import EVERY_STEP, OPTIMIZERS, Run, relative_error

STEPS = 10
SIZE = 2


@dataclass
class Setting:
    """How the loop differs from the plainest one."""

    student: str = "mlp"
    optimizer: str = "sgd-momentum"
    batch: tuple[int, ...] = (6, 6, 6, 6)  # by rank
    bilevel: dict[str, Any] = field(default_factory=dict)
    net: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    **{
        f"{engine}, {optimizer}, unroll {unroll}": Setting(
            optimizer=optimizer,
            bilevel={"engine": engine, "unroll": unroll, "every": unroll},
        )
        for engine in ("adjoint", "unroll")
        for optimizer in ("sgd-momentum", "adamw")
        for unroll in (1, 3)
    },
    "batch norm": Setting("conv", bilevel={"unroll": 3, "every": 4}),
}


class Program:
    """A training script; `rank` None is one process that has the data of all ranks."""

    def __init__(self, setting, rank, size):
        self.setting, self.size = setting, size
        self.ranks = range(size) if rank is None else [rank]
        run = Run(setting.student)
        self.shards = [
            [(run.inputs(n), run.teacher_logits(n), run.labels(n)) for n in setting.batch[:size]]
            for _ in range(STEPS)
        ]
        meta = [[(run.inputs(7), run.labels(7)) for _ in range(size)] for _ in range(STEPS)]
        self.student = self.called = run.student
        torch.manual_seed(rank or 0)
        net = MetaWeightNet(hidden=(8,), **setting.net).double()
        if rank is not None:
            with torch.no_grad():  # rank 0's is everyone's
                for tensor in self.student.state_dict().values():
                    tensor += rank
            self.called = DistributedDataParallel(self.student, **setting.ddp)
        self.criterion = WeightedKDLoss(net, temperature=2.0)
        self.optimizer = BilevelOptimizer(
            OPTIMIZERS[setting.optimizer](self.student.parameters()),
            self.called,
            self.criterion,
            meta if rank is None else [batches[rank] for batches in meta],
            meta_forward=_one_after_the_other if rank is None else None,
            **{**EVERY_STEP, "meta_optimizer": torch.optim.Adam(net.parameters(), 0.1),
               **setting.bilevel},
        )

    def train(self):
        for shards in self.shards:
            self.optimizer.zero_grad()
            for rank in self.ranks:
                inputs, teacher_logits, labels = shards[rank]
                output = self.called(inputs)
                loss = self.criterion(output, teacher_logits, labels)
                (loss / len(self.ranks)).backward()
            self.optimizer.step()
        return {
            "student": [p.detach().clone() for p in self.student.parameters()],
            "weight net": [p.detach().clone() for p in self.criterion.weight_net.parameters()],
            "metrics": self.optimizer.metrics,
        }


def _one_after_the_other(student, batches):
    logits = torch.cat([student(inputs) for inputs, _ in batches])
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
        assert relative_error(first[part], expected[part]) < 1e-9
    assert first["metrics"] == pytest.approx(expected["metrics"], rel=1e-9)
