"""method="paper" in the plain loop reproduces runs of the paper's own program to the digit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-9

RUNS = {
    "mlp_hard_accumulate1": dict(hidden=(8,), meta_loss="hard", accumulate=1),
    "mlp_mix_accumulate2": dict(hidden=(8, 8), meta_loss="mix", accumulate=2),
}


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, inputs):
        return self.fc2(torch.tanh(self.fc1(inputs)))


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def section(golden, prefix):
    return [value for key, value in golden.items() if key.startswith(prefix)]


def fill(module, values):
    with torch.no_grad():
        for param, value in zip(module.parameters(), values, strict=True):
            param.copy_(value)


def assert_matches(actual, golden, prefix):
    expected = section(golden, prefix)
    assert len(actual) == len(expected) > 0
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=TOLERANCE, atol=1e-15)


@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
@pytest.mark.parametrize("name", RUNS)
def test_paper_run_is_reproduced(name, engine):
    golden, run = load(name), RUNS[name]
    steps = 1 + max(int(key[4 : key.index("/")]) for key in golden if key.startswith("step"))
    student = Student().double()
    fill(student, section(golden, "student0/"))
    weight_net = MetaWeightNet(hidden=run["hidden"]).double()
    fill(weight_net, section(golden, "weightnet0/"))
    criterion = WeightedKDLoss(weight_net, temperature=4.0)
    meta_batches = [
        (golden[f"step{k}/meta_inputs"], golden[f"step{k}/meta_targets"]) for k in range(steps)
    ]
    meta_teacher = iter([golden[f"step{k}/meta_teacher_logits"] for k in range(steps)])
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        student,
        criterion,
        meta_batches,
        method="paper",
        engine=engine,
        accumulate=run["accumulate"],
        meta_loss=run["meta_loss"],
        teacher=lambda inputs: next(meta_teacher),
    )
    window = []
    for k in range(steps):
        step = f"step{k}/"
        inputs, targets = golden[step + "inputs"], golden[step + "targets"]
        loss = criterion(student(inputs), golden[step + "teacher_logits"], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        window = [*window, section(golden, step + "hypergradient/")][-run["accumulate"] :]
        if (k + 1) % run["accumulate"] == 0:
            averages = [sum(parts) / len(parts) for parts in zip(*window, strict=True)]
            for param, average in zip(weight_net.parameters(), averages, strict=True):
                torch.testing.assert_close(param.grad, average, rtol=TOLERANCE, atol=1e-15)
        torch.testing.assert_close(
            torch.tensor(optimizer.metrics["meta_loss"], dtype=torch.float64),
            golden[step + "meta_loss"],
            rtol=TOLERANCE,
            atol=0,
        )
        torch.testing.assert_close(
            criterion.weights, golden[step + "weights"], rtol=TOLERANCE, atol=0
        )
        assert_matches(list(student.parameters()), golden, step + "student/")
        assert_matches(list(weight_net.parameters()), golden, step + "weightnet/")
