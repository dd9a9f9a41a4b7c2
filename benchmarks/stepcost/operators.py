"""How many operators a piece of work runs: on an accelerator each is at least one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _Count(TorchDispatchMode):
    """Counts the operators that compute; views and bookkeeping launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        returned = function._schema.returns
        a_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returned)
        self.operators += not a_view and function._schema.name not in _FREE
        return function(*args, **(kwargs or {}))


_FREE = {
    "aten::_efficientzerotensor",
    "aten::_has_same_storage_numel",
    "aten::_unsafe_view",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::is_same_size",
    "aten::new_empty",
}


def computing_operators(work: Callable[[], Any]) -> int:
    """The operators that `work` runs, views not counted."""
    with _Count() as count:
        work()
    return count.operators
