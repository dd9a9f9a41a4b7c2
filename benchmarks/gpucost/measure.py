"""One row of the table: wall time against plain KD in turns, kernels, launches and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from stepcost.case import Batch, Case
from stepcost.measure import spread
from stepcost.rows import row
from stepcost.rows.base import Row

SECOND_DERIVATIVES = ("higher",)  # which fused attention has not
KD_STEPS = 4  # in a turn
LONG = 8  # periods longer than this are profiled in part


class Steps:
    """A row in training on two batches in turns."""

    def __init__(self, case: Case, name: str) -> None:
        self.case = case
        self.of: Row = row(name)(case)
        self.unroll = getattr(self.of.optimizer, "unroll", 1)
        self._plain = name in SECOND_DERIVATIVES
        self._batches = _alternating(case)

    def take(self, steps: int) -> None:
        with self._attention():
            for _ in range(steps):
                self.of.step(*next(self._batches))

    def timed(self, steps: int) -> float:
        """Seconds a step, nothing waited for in between."""
        _synchronize(self.case)
        start = time.perf_counter()
        self.take(steps)
        _synchronize(self.case)
        return (time.perf_counter() - start) / steps

    def _attention(self) -> AbstractContextManager:
        return sdpa_kernel(SDPBackend.MATH) if self._plain else nullcontext()


def measure(
    case: Case, name: str, plain: Steps, seconds: float, rounds: int, report: Callable[[dict], None]
) -> None:
    """Measures a row and reports after each part what there is so far.

    Args:
        plain: plain KD, which takes its steps before each of the row's turns.
        seconds: after which no further turn begins; two are always taken.
        rounds: the most turns.
    """
    found: dict[str, Any] = {}
    with _fresh_memory(case) as allocated:
        steps = Steps(case, name)
        period = found["period"] = steps.of.period
        steps.take(2 * period if period <= LONG else period)
        found["memory"] = allocated()
        report(found)

        turns = period * max(1, KD_STEPS // period)
        samples: list[tuple[float, float]] = []
        plain.take(1)
        deadline = time.perf_counter() + seconds
        while len(samples) < 2 or (len(samples) < rounds and time.perf_counter() < deadline):
            base = plain.timed(KD_STEPS)
            samples.append((steps.timed(turns), base))
        found["seconds"] = spread([own for own, _ in samples])
        found["kd_seconds"] = spread([base for _, base in samples])
        found["ratio"] = spread([own / base for own, base in samples])
        report(found)

        if period <= LONG:
            whole = _profiled(steps, period)
            found["kernels"] = {key: value / period for key, value in whole.items()}
        else:  # the steps outside the window are all alike
            outside = _profiled(steps, 1)
            steps.take(period - steps.unroll - 1)
            window = _profiled(steps, steps.unroll)
            rest = period - steps.unroll
            found["kernels"] = {
                key: (window[key] + rest * outside[key]) / period for key in window
            }
            found["amortised"] = _amortised(steps, plain)
        report(found)


def _amortised(steps: Steps, plain: Steps) -> dict[str, float]:
    """The ratio in a whole run, from a step outside the window and the window's own cost."""
    rest = steps.of.period - steps.unroll
    base = plain.timed(KD_STEPS)
    outside = steps.timed(rest)
    window = steps.timed(steps.unroll)
    mean = (rest * outside + steps.unroll * window) / steps.of.period
    return {"outside": outside / base, "window": window / base, "ratio": mean / base}


def _profiled(steps: Steps, number: int) -> dict[str, float]:
    """Seconds of kernels and their number in some steps; on a CPU, of outermost operators."""
    on_gpu = torch.device(steps.case.device).type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    _synchronize(steps.case)
    with profile(activities=[activity]) as profiler:
        steps.take(number)
        _synchronize(steps.case)
    if on_gpu:
        events = [
            event
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
            and not event.name.startswith(("Optimizer.", "Memcpy", "Memset", "ProfilerStep"))
        ]
    else:
        events = [event for event in profiler.events() if event.cpu_parent is None]
    microseconds = sum(event.time_range.elapsed_us() for event in events)
    return {"seconds": microseconds / 1e6, "launches": len(events)}


def _alternating(case: Case) -> Iterator[tuple[Batch, Batch]]:
    pairs = [(case.draw(i), case.draw(i, meta=True)) for i in range(2)]
    return (pairs[i % 2] for i in count())


@contextmanager
def _fresh_memory(case: Case) -> Iterator[Callable[[], int | None]]:
    """Gives the peak, in bytes, of what was allocated within; nothing on a CPU."""
    on_gpu = torch.device(case.device).type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    yield lambda: torch.cuda.max_memory_allocated() - before if on_gpu else None


def _synchronize(case: Case) -> None:
    if torch.device(case.device).type == "cuda":
        torch.cuda.synchronize()
