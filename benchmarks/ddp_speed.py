"""What a step costs in one process and in two, beside what docs/scaling.md predicts for two.

    python benchmarks/ddp_speed.py

Each process has one thread and batches of the same size, so two do twice the work of one. Plain KD
and the two settings take turns, one window after the other, and so do one process and two. Every
round is added to the JSON file at once, and the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from longtail.models import MODELS

OUT = Path(__file__).parent / "results" / "ddp_speed.json"
WINDOW, CLASSES = 64, 100


class Row(NamedTuple):
    """A setting, and what docs/scaling.md counts for it."""

    bilevel: dict[str, Any] | None
    warm_up: int
    """Steps until all of a kind have been taken once."""
    reduces: float = 0
    """All-reduces of as many numbers as the student has parameters, a step."""
    questions: float = 0
    """A step."""


ROWS = {
    "plain KD": Row(None, 2),
    "default": Row({}, WINDOW, 4 / WINDOW, 25 / WINDOW),
    "online, every step": Row({"unroll": 1, "every": 1}, 2, 1, 10),
}


class Loop:
    """A student that one of the rows trains on random images."""

    def __init__(self, model: str, batch: int, settings: dict[str, Any] | None) -> None:
        torch.manual_seed(0)
        self.student = DistributedDataParallel(MODELS[model](CLASSES))
        optimizer = torch.optim.SGD(self.student.parameters(), 0.01, momentum=0.9)
        self.criterion, self.optimizer = WeightedKDLoss(temperature=4.0), optimizer
        torch.manual_seed(dist.get_rank())
        self.batch = self._images(batch), torch.randn(batch, CLASSES), self._labels(batch)
        if settings is not None:
            self.criterion = WeightedKDLoss(MetaWeightNet(), temperature=4.0)
            meta = [(self._images(batch), self._labels(batch))]
            self.optimizer = BilevelOptimizer(
                optimizer, self.student, self.criterion, meta, **settings
            )

    def _images(self, count: int) -> torch.Tensor:
        return torch.randn(count, 3, 32, 32)

    def _labels(self, count: int) -> torch.Tensor:
        return torch.randint(CLASSES, (count,))

    def seconds(self, steps: int) -> float:
        """Of one step, the mean over some."""
        inputs, teacher_logits, targets = self.batch
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.criterion(self.student(inputs), teacher_logits, targets).backward()
            self.optimizer.step()
        dist.barrier()
        return (time.perf_counter() - start) / steps


def measure(rank: int, size: int, folder: str, options: argparse.Namespace) -> None:
    """One round: a window of every row, after one that is thrown away."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    loops = {n: Loop(options.model, options.batch, row.bilevel) for n, row in ROWS.items()}
    parameters = sum(p.numel() for p in next(iter(loops.values())).student.parameters())
    for name, loop in loops.items():
        loop.seconds(ROWS[name].warm_up)
    found = {name: loop.seconds(WINDOW) for name, loop in loops.items()}
    told = {"steps": found, "parameters": parameters, **exchange_seconds(parameters)}
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(told))
    dist.destroy_process_group()


def exchange_seconds(parameters: int) -> dict[str, float]:
    """Of an all-reduce of as many numbers as the student has, and of one question's round."""
    if dist.get_world_size() == 1:
        return {"all_reduce": 0.0, "question": 0.0}
    return {"all_reduce": _seconds(parameters, 20), "question": _seconds(1, 200)}


def _seconds(numbers: int, count: int) -> float:
    tensor = torch.zeros(numbers)
    dist.all_reduce(tensor)
    start = time.perf_counter()
    for _ in range(count):
        dist.all_reduce(tensor)
    return (time.perf_counter() - start) / count


def table(rounds: dict[str, list[dict[str, Any]]]) -> str:
    """Milliseconds a step, medians over the rounds, and the prediction for two processes."""
    one, two = rounds["1"], rounds["2"]

    def median(of: list[dict[str, Any]], name: str) -> float:
        return 1e3 * statistics.median(found["steps"][name] for found in of)

    exchange = {
        key: 1e3 * statistics.median(found[key] for found in two)
        for key in ("all_reduce", "question")
    }
    lines = [
        f"{len(one)} rounds, {one[0]['parameters']:,} parameters; an all-reduce of them takes "
        f"{exchange['all_reduce']:.2f} ms, a question {exchange['question']:.2f} ms.",
        "",
        "| | one process | two | two, predicted |",
        "| --- | ---: | ---: | ---: |",
    ]
    plain = [median(of, "plain KD") for of in (one, two)]
    for name, row in ROWS.items():
        measured = [median(of, name) for of in (one, two)]
        predicted = plain[1] + measured[0] - plain[0] + row.reduces * exchange["all_reduce"]
        predicted += row.questions * exchange["question"]
        told = f"{predicted:.1f} ms" if row.bilevel is not None else ""
        cells = [f"{ms:.1f} ms ({ms / kd:.2f}×)" for ms, kd in zip(measured, plain)]
        lines.append(f"| {' | '.join([name, *cells, told])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet8x4", choices=tuple(MODELS))
    parser.add_argument("--batch", type=int, default=32, help="of each process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    settings = {"model": options.model, "batch": options.batch}
    data = json.loads(options.out.read_text()) if options.out.exists() else {}
    if data.get("settings") != settings:
        data = {"settings": settings, "rounds": {"1": [], "2": []}}
    rounds = data["rounds"]
    due = [n for i in range(options.rounds) for n in (1, 2) if len(rounds[str(n)]) <= i]
    for size in due:
        with tempfile.TemporaryDirectory() as folder:
            arguments = size, folder, options
            torch.multiprocessing.start_processes(
                measure, arguments, nprocs=size, start_method="spawn"
            )
            rounds[str(size)].append(json.loads(Path(folder, "found").read_text()))
        options.out.write_text(json.dumps(data, indent=1))
    text = table(rounds)
    options.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
