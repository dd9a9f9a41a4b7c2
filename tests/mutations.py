"""Deliberate faults in the engines and the recorder, and what catches each.

    python -m tests.mutations        # about three minutes; a table in Markdown

Each is one line of the package, changed in a copy of it. A loop with dropout, batch norm,
micro-batches, a GradScaler and four steps in a window is run on the copy, to see whether an
invariant stops it, and then the tests that should.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Fault(NamedTuple):
    """One line of the package, and what stands there instead."""

    what: str
    path: str
    line: str
    instead: str
    tests: str


FAULTS = [
    Fault(
        "the factor on the loss is dropped", "hypergradient/adjoint.py",
        "return losses * criterion.shares(call.upstream, losses, call.kept)",
        "return losses * criterion.shares(torch.ones_like(call.upstream), losses, call.kept)",
        "test_invariants.py test_habits_accumulation.py",
    ),
    Fault(
        "the sign of the step is swapped", "inner_step/products.py",
        "        of_param = -lr * (into_buffer", "        of_param = lr * (into_buffer",
        "test_inner_step.py test_engines.py",
    ),
    Fault(
        "batch norm's buffers are stale", "replay/student_call.py",
        "copies = {n: None if id(b) in unread else b.clone()",
        "copies = {n: None if id(b) in unread else b",
        "test_replay.py test_habits_modules.py",
    ),
    Fault(
        "dropout draws another mask", "replay/student_call.py",
        "            self.random_state.set()\n", "",
        "test_replay.py",
    ),
    Fault(
        "the modules' modes are not restored", "replay/student_call.py",
        "{**copies, **params}, self.training)",
        "{**copies, **params}, [False] * len(self.training))",
        "test_replay.py",
    ),
    Fault(
        "momentum is forgotten between steps", "inner_step/products.py",
        "held = _sum([(by_param, momentum * through), (by_buffer, momentum)])",
        "held = _sum([(by_param, momentum * through), (by_buffer, 0.0)])",
        "test_inner_step.py test_engines.py",
    ),
    Fault(
        "the weights are those of another call", "hypergradient/adjoint.py",
        "weights = criterion.weigh(call.features, weight_gradient, call.kept)",
        "weights = criterion.weigh(step.calls[0].features, weight_gradient, call.kept)",
        "test_habits_accumulation.py",
    ),
    Fault(
        "the loss scale stays in the gradients", "bilevel/coming_step.py",
        "            call.upstream = call.upstream / scale\n", "",
        "test_habits_precision.py",
    ),
    Fault(
        "clipping's projection is left out", "clipping.py",
        "self.factor * (vectors[name] - along * clipped[name])", "self.factor * vectors[name]",
        "test_habits_accumulation.py",
    ),
    Fault(
        "a micro-batch counts twice", "record.py",
        "                    self._recording.calls.append(call)\n",
        "                    self._recording.calls += [call, call]\n",
        "test_habits_accumulation.py",
    ),
    Fault(
        "the curvature is dropped", "hypergradient/adjoint.py",
        '                _add(cotangents.setdefault("param", {}), curvature)\n', "",
        "test_engines.py",
    ),
    Fault(
        "the meta loss is taken before the step", "bilevel/meta_update.py",
        "after = self.live(steps)",
        "after = dict(steps[-1].update.params)",
        "test_engines.py test_invariants.py",
    ),
]


def main():
    print("| fault | an invariant stops the loop | a test fails |")
    print("| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("kd_balance", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "setup.cfg", copy)
        for fault in FAULTS:
            path = copy / "kd_balance" / fault.path
            whole = path.read_text()
            path.write_text(whole.replace(fault.line, fault.instead))
            stopped = _last_line(copy, "-m", "tests.mutations", "--loop")
            tests = [f"tests/{name}" for name in fault.tests.split()]
            failed = _last_line(copy, "-m", "pytest", "-x", "-q", *tests, of="FAILED")
            print(f"| {fault.what} | {stopped or 'no'} | {failed or '**none**'} |", flush=True)
            path.write_text(whole)


def _last_line(folder, *arguments, of=""):
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    lines = [line for line in found.stdout.splitlines() if line.startswith(of)]
    text = lines[-1].removeprefix("FAILED ").split(" - ")[0] if lines else ""
    return f"`{text.removeprefix('tests/')}`" if text else ""


def loop():
    """Trains for two windows, and says which invariant broke."""
    import torch
    import torch.nn as nn

    from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
    from kd_balance.invariants import Broken

    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)
    ).double()
    criterion = WeightedKDLoss(MetaWeightNet().double())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9), student, criterion,
        [(torch.randn(6, 4).double(), torch.randint(3, (6,)))], every=4, grad_scaler=scaler,
    )
    try:
        for _ in range(8):
            optimizer.zero_grad()
            for _ in range(2):
                logits = student(torch.randn(5, 4).double())
                loss = criterion(logits, torch.randn(5, 3).double(), torch.randint(3, (5,)))
                scaler.scale(loss / 2).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(student.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
    except Broken as broken:
        print(broken.cause)
    except ValueError as error:
        print(str(error).split(",")[0])


if __name__ == "__main__":
    loop() if "--loop" in sys.argv else main()
