"""The runs that a protocol plans, and those of them without a result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from longtail.protocol import Protocol

# methods that a plan runs once, whatever the teacher
WITHOUT_TEACHER = ("ce", "bs", "drw", "meta-alone")


class Run(NamedTuple):
    """One cell of the table: `teacher` is "none" for methods without one."""

    imbalance: float
    teacher: str
    method: str
    seed: int


def runs_of(protocol: Protocol) -> Iterator[Run]:
    """The planned runs in order: the first seed of all methods, then the next seed."""
    seen = set()
    for imbalance in protocol.imbalances:
        for seed in protocol.seeds:
            for teacher, methods in protocol.plan:
                for method in methods:
                    alone = method.partition(":")[0] in WITHOUT_TEACHER
                    run = Run(imbalance, "none" if alone else teacher, method, seed)
                    if run not in seen:
                        seen.add(run)
                        yield run


def not_run(protocol: Protocol, records: Sequence[dict[str, Any]]) -> list[Run]:
    """The planned runs that the records do not hold."""
    done = {Run(r["imbalance"], r["teacher"], r["method"], r["seed"]) for r in records}
    return [run for run in runs_of(protocol) if run not in done]
