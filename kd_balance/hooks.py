"""Hooks that do not outlive, and are not copied with, what they belong to."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class WeakHook:
    """Calls a bound method as long as its object lives.

    Copies of a module, such as an exponential moving average of the student, and pickles of it
    carry an inert hook, so they neither copy nor feed the object.
    """

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = weakref.WeakMethod(method) if method is not None else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = self._method() if self._method is not None else None
        return None if method is None else method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakHook:
        return WeakHook()

    def __reduce__(self) -> tuple[type[WeakHook], tuple[()]]:
        return WeakHook, ()
