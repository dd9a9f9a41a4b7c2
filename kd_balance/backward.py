"""Passes through the loop's graphs, seen from where they begin to where they end."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

Around = Callable[[Sequence[Tensor], Sequence[Tensor] | None, bool], AbstractContextManager[None]]
"""Given the tensors that a pass begins at, its inputs (None for all leaves) and whether it adds to
``.grad``, what to run it within."""

_watching: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_seen: WeakSet[Any] = WeakSet()
_backward: Any = torch.autograd.backward
_grad: Any = torch.autograd.grad


def watch(watcher: Any, method: str) -> None:
    """From now on runs every pass within a method of `watcher`, an :data:`Around`."""
    if watcher not in _seen:  # once: it may be dropped while it watches
        _seen.add(watcher)
        weakref.finalize(watcher, _go_back_if_idle).atexit = False
    _watching[watcher] = method
    if torch.autograd.backward is _backward:
        torch.autograd.backward, torch.autograd.grad = _watched_backward, _watched_grad


def ignore(watcher: Any) -> None:
    """Ends what :func:`watch` began."""
    _watching.pop(watcher, None)
    _go_back_if_idle()


def _go_back_if_idle() -> None:
    if not list(_watching) and torch.autograd.backward is _watched_backward:
        torch.autograd.backward, torch.autograd.grad = _backward, _grad


@functools.wraps(_backward)
def _watched_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    inputs = kwargs.get("inputs", args[4] if len(args) > 4 else None)
    with _watched(tensors, inputs, True):
        _backward(tensors, *args, **kwargs)


@functools.wraps(_grad)
def _watched_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    with _watched(outputs, inputs, False):
        return _grad(outputs, inputs, *args, **kwargs)


@contextmanager
def _watched(roots: Any, inputs: Any, accumulates: bool) -> Iterator[None]:
    roots, inputs = (
        [given] if isinstance(given, Tensor) else given and list(given) for given in (roots, inputs)
    )
    with ExitStack() as stack:
        for watcher, method in list(_watching.items()):
            stack.enter_context(getattr(watcher, method)(roots, inputs, accumulates))
        yield
