"""Dropout inside fused kernels: drawn by plain ones in the steps that are replayed.

Fused attention and cuDNN's recurrent layers draw their masks in an order of their own, or from a
stream of their own. Replays need derivatives that these kernels lack, run plain ones, and would
see another mask. So while a step is watched, calls with dropout run the plain kernels in the
loop's own forward pass too, and in what a checkpoint computes again. Calls without dropout keep
the fused ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kd_balance.replay.operators import plain_recurrence
from kd_balance.torch_private import RECURRENT

_watching: WeakSet[Any] = WeakSet()


def draw_plainly(watcher: Any) -> None:
    """From now on dropout is drawn by plain kernels, as long as `watcher` lives."""
    _watching.add(watcher)
    for call in _FUSED:
        call.install()


def draw_as_usual(watcher: Any) -> None:
    """Ends what :func:`draw_plainly` began for this watcher."""
    _watching.discard(watcher)
    if not _watching:
        for call in _FUSED:
            call.remove()


class _FusedCall:
    """One of torch's functions that may drop within a fused kernel.

    Args:
        module, name: where torch's modules look it up.
        drops: whether a call with these arguments draws a mask.
        plainly: the context in which it runs plain kernels.
    """

    def __init__(
        self,
        module: Any,
        name: str,
        drops: Callable[..., bool],
        plainly: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._module = module
        self._name = name
        self._drops = drops
        self._plainly = plainly
        self._original: Callable[..., Any] | None = None
        self._ours: Callable[..., Any] | None = None

    def install(self) -> None:
        current = getattr(self._module, self._name)
        if current is not self._ours:  # the first time, or somebody has replaced it since
            self._original, self._ours = current, self._around(current)
            setattr(self._module, self._name, self._ours)

    def remove(self) -> None:
        if getattr(self._module, self._name) is self._ours:  # else ours is inert within another
            setattr(self._module, self._name, self._original)
        self._original = self._ours = None

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def drawn_plainly(*args: Any, **kwargs: Any) -> Any:
            if not (_watching and self._drops(*args, **kwargs)):
                return function(*args, **kwargs)
            with self._plainly():
                return function(*args, **kwargs)

        return drawn_plainly


def _attention_drops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *_: Any,
    **__: Any,
) -> bool:
    return dropout_p > 0


def _plain_attention() -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH)


def _recurrence_drops(*args: Any) -> bool:
    padded = isinstance(args[3], bool)  # packed sequences have one argument more before it
    dropout, training = args[5:7] if padded else args[6:8]
    return args[0].is_cuda and training and dropout > 0


_FUSED = [
    _FusedCall(F, "scaled_dot_product_attention", _attention_drops, _plain_attention),
    *(
        _FusedCall(RECURRENT, name, _recurrence_drops, plain_recurrence)
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    ),
]
