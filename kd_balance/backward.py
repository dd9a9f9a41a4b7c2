"""Backward passes of the loop, seen from where they begin to where they end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

Around = Callable[[Sequence[Tensor], Sequence[Tensor] | None], AbstractContextManager[None]]
"""Given the tensors that backward is called on and its ``inputs=``, what to run it within."""

_watching: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_original: Any = torch.autograd.backward


def watch(watcher: Any, method: str) -> None:
    """From now on runs every backward pass within a method of `watcher`, an :data:`Around`."""
    _watching[watcher] = method
    if torch.autograd.backward is _original:
        torch.autograd.backward = _watched


def ignore(watcher: Any) -> None:
    """Ends what :func:`watch` began."""
    _watching.pop(watcher, None)
    if not _watching and torch.autograd.backward is _watched:
        torch.autograd.backward = _original


@functools.wraps(_original)
def _watched(tensors: Any, *args: Any, **kwargs: Any) -> None:
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    inputs = kwargs.get("inputs", args[4] if len(args) > 4 else None)
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    with ExitStack() as stack:
        for watcher, method in list(_watching.items()):
            stack.enter_context(getattr(watcher, method)(roots, inputs))
        _original(tensors, *args, **kwargs)
