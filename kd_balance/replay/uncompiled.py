"""Compiled students, run as they are written in the steps that are replayed.

A compiler draws dropout masks from numbers of its own, which no replay can draw again.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from kd_balance.torch_private import compiled_from, compiles_calls

_stances: dict[int, Any] = {}
"""torch's switch for each watcher, which knows what to go back to."""


def is_compiled(student: nn.Module) -> bool:
    """Whether torch.compile made the student or one of its modules."""
    return any(
        compiled_from(module) is not None or compiles_calls(module)
        for module in student.modules()
    )


def run_uncompiled(watcher: Any) -> None:
    """From now on compiled functions run uncompiled, as long as `watcher` lives."""
    if id(watcher) not in _stances:
        _stances[id(watcher)] = torch.compiler.set_stance("force_eager")
        weakref.finalize(watcher, _go_back, id(watcher))


def run_compiled(watcher: Any) -> None:
    """Ends what :func:`run_uncompiled` began for this watcher."""
    _go_back(id(watcher))


def _go_back(key: int) -> None:
    stance = _stances.pop(key, None)
    if stance is not None:
        stance.__exit__(None, None, None)
