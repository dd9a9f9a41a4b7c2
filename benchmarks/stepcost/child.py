"""Measurements in processes of their own, since a training script runs one kind of step only.

In a process that has run other rows the allocator holds their memory, which spares a step that
needs much of it the page faults of fresh memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from stepcost.case import Case


def measured_alone(
    module: str,
    case: Case,
    threads: int,
    environment: Mapping[str, str] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """What ``python -m MODULE`` finds, a module whose main is :func:`serve`.

    Raises:
        RuntimeError: with the last line of its errors, if it fails.
    """
    request = json.dumps({"case": asdict(case), "threads": threads, "arguments": arguments})
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.run(
        [sys.executable, "-m", module, request],
        env={**os.environ, **path, **(environment or {})},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(child.stdout.splitlines()[-1])


def serve(measure: Callable[..., dict[str, Any]]) -> None:
    """Answers the request on the command line by ``measure(case, **arguments)``."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    print(json.dumps(measure(Case(**request["case"]), **request["arguments"])))
