"""Times of training steps, taken in turns with plain KD's, and errors of their hypergradients."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from stepcost.case import Batch, Case
from stepcost.child import measured_alone, serve
from stepcost.exact import Snapshot, hypergradient, relative_error
from stepcost.rows import row
from stepcost.rows.base import Row

BATCHES = 2  # distinct batches that the steps go through in turns
ERROR_BATCH = 4
ERROR_SAMPLES = {"float32": 15, "bfloat16": 15, "float64": 3}
FEWEST = 5  # samples of a row, however long its period


class Seconds(NamedTuple):
    """Of one step: on the clock, and of the process on all cores (0 where work is on a GPU)."""

    wall: float
    cpu: float


def timed_step(of: Row, train: Batch, meta: Batch) -> Seconds:
    device = torch.device(of.case.device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        of.step(train, meta)
        end.record()
        torch.cuda.synchronize(device)
        return Seconds(start.elapsed_time(end) / 1e3, 0.0)
    wall, cpu = time.perf_counter(), time.process_time()
    of.step(train, meta)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def times(
    case: Case, name: str, threads: int, rounds: int, warmup: int
) -> dict[str, dict[str, Any]]:
    """:func:`in_turns` in a process of its own.

    Raises:
        RuntimeError: with the last line of its errors, if it fails.
    """
    return measured_alone(
        "stepcost.measure", case, threads, name=name, rounds=rounds, warmup=warmup
    )


def in_turns(
    case: Case, name: str, rounds: int, warmup: int, beside: str = "kd"
) -> dict[str, dict[str, Any]]:
    """Time per step of a row, as ratios to another's, which takes a step before each of the row's.

    A sample is the mean step of a period over the mean of the other's steps. Of long periods fewer
    samples are taken, each being a mean of many steps.
    """
    plain, of = row(beside)(case), row(name)(case)
    pairs = [(case.draw(i), case.draw(i, meta=True)) for i in range(BATCHES)]
    samples = []
    for _ in range(warmup + max(FEWEST, min(rounds, 2 * rounds // of.period))):
        own, base = [], []
        for i in range(of.period):
            pair = pairs[i % BATCHES]
            base.append(timed_step(plain, *pair))
            own.append(timed_step(of, *pair))
        samples.append((_mean(own), _mean(base)))
    return _ratios(samples[warmup:])


def _mean(steps: Sequence[Seconds]) -> Seconds:
    return Seconds(*(statistics.fmean(column) for column in zip(*steps)))


def _ratios(samples: list[tuple[Seconds, Seconds]]) -> dict[str, Any]:
    ratios = {"ratio": spread([own.wall / base.wall for own, base in samples])}
    if all(base.cpu for _, base in samples):
        ratios["cpu_ratio"] = spread([own.cpu / base.cpu for own, base in samples])
    ratios["seconds"] = spread([own.wall for own, _ in samples])
    ratios["kd_seconds"] = spread([base.wall for _, base in samples])
    return ratios


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and the samples themselves."""
    twice = [*samples, *samples] if len(samples) == 1 else samples
    quartiles = statistics.quantiles(twice, n=4, method="inclusive")
    return {
        "median": quartiles[1],
        "quartiles": [quartiles[0], quartiles[2]],
        "samples": [float(f"{sample:.5g}") for sample in samples],
    }


def hypergradient_errors(case: Case, name: str) -> list[float]:
    """Relative errors against float64 unrolling of the row's own step, on small batches.

    Each is taken at the step that ends a period, after a first period that warms up momentum and
    moments. In float32 a ReLU whose input rounds to the other side of zero makes an error of about
    1e-4 in any of the rows; in float64 what the method leaves out shows alone. None with
    unroll > 1.
    """
    small = replace(
        case, batch=min(case.batch, ERROR_BATCH), meta_batch=min(case.meta_batch, ERROR_BATCH)
    )
    kind = row(name)
    if kind.definition is None or case.unroll > 1:
        return []
    of = kind(small)
    errors = []
    for period in range(1 + ERROR_SAMPLES[case.dtype]):
        for i in range(of.period):
            train, meta = (small.draw(period * of.period + i, meta=meta) for meta in (False, True))
            if i == of.period - 1:
                before = Snapshot.of(of.student, of.optimizer, of.weight_net)
            of.step(train, meta)
        if period > 0:
            exact = hypergradient(kind.definition, before, train, meta)
            errors.append(relative_error(of.hypergradient(), exact))
    return errors


if __name__ == "__main__":
    serve(in_turns)
