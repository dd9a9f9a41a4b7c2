"""Activation checkpointing within a replay.

A checkpoint computes its activations again during the backward pass, when the replay has returned
and the student holds its own parameters again: it would see others than the replay saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch.utils.checkpoint

from kd_balance.torch_private import CHECKPOINT_GENERATOR, let_inputs_pass_in_forward_mode

let_inputs_pass_in_forward_mode()


@contextmanager
def recomputed_under(again: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Lets checkpoints made in here run their recomputation within ``again()``.

    Reentrant checkpoints, which only ``.backward()`` can go through, become the other kind.
    """
    module: Any = torch.utils.checkpoint
    generator, function = getattr(module, CHECKPOINT_GENERATOR), module.CheckpointFunction

    def under(context_fn: Any) -> Any:
        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            forward, recompute = context_fn()
            return forward, _Nested(again, recompute)

        return contexts

    def generator_under(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if "context_fn" in kwargs:  # torch 2.14
            return generator(fn, *args, **{**kwargs, "context_fn": under(kwargs["context_fn"])})
        preserve, context_fn, *rest = args
        return generator(fn, preserve, under(context_fn), *rest, **kwargs)

    setattr(module, CHECKPOINT_GENERATOR, generator_under)
    module.CheckpointFunction = _NotReentrant
    try:
        yield
    finally:
        setattr(module, CHECKPOINT_GENERATOR, generator)
        module.CheckpointFunction = function


class _NotReentrant:
    """Takes the place of torch's CheckpointFunction."""

    @staticmethod
    def apply(fn: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            fn, *args, use_reentrant=False, preserve_rng_state=preserve
        )


class _Nested(AbstractContextManager[Any]):
    """One context inside another, entered anew for every recomputation."""

    def __init__(
        self, outer: Callable[[], AbstractContextManager[Any]], inner: AbstractContextManager[Any]
    ) -> None:
        self._outer = outer
        self._inner = inner
        self._open: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        stack.enter_context(self._outer())
        stack.enter_context(self._inner)
        self._open.append(stack)

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.pop().__exit__(*error)
