"""Peak memory of a training step, each row in a process of its own.

On a CPU `over_import` is the highest resident set size during the steps
minus the resident set size after the imports and after student, weight net, optimizer and batches
were built; so it holds gradients, optimizer state, activations and what the libraries allocate at
their first use. On a GPU it is the caching allocator's peak minus what was allocated then.

glibc keeps much of what is freed, in pieces that the next phase of a step may not fit into, so the
resident set of one and the same step differs by tens of percent from run to run. "returned" has it
give every block of more than 1 MiB back at once, which leaves what the step really holds.
"""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import torch

from stepcost.case import Case
from stepcost.child import measured_alone, serve
from stepcost.rows import row

STEPS = 4  # at least, and two periods
STATUS = Path("/proc/self/status")
ALLOCATORS = {"default": {}, "returned": {"MALLOC_MMAP_THRESHOLD_": str(2**20)}}


def peak_memory(
    case: Case, name: str, threads: int, allocator: str = "default"
) -> dict[str, int]:
    """Bytes at the peak and before, with one of ALLOCATORS' settings in the child's environment.

    Raises:
        RuntimeError: with the last line of its errors, if it fails.
    """
    return measured_alone("stepcost.memory", case, threads, ALLOCATORS[allocator], name=name)


def _measure(case: Case, name: str) -> dict[str, int]:
    of = row(name)(case)
    train, meta = case.draw(0), case.draw(0, meta=True)
    gc.collect()
    before = _start(case)
    for _ in range(max(STEPS, 2 * of.period)):
        of.step(train, meta)
    peak = _peak(case)
    parameters = sum(p.numel() for p in of.student.parameters())
    return {"built": before, "peak": peak, "over_import": peak - before, "parameters": parameters}


def _start(case: Case) -> int:
    """Bytes held now, the peak being counted from here on."""
    if torch.device(case.device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not STATUS.exists():
        return _peak(case)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(case: Case) -> int:
    if torch.device(case.device).type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():  # ru_maxrss would start from the parent process's peak on Linux
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    serve(_measure)
