"""Plain operators for replays, in place of those that lack derivatives or have wrong ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from kd_balance.replay.embedding import differentiable_embeddings
from kd_balance.replay.sync_batch_norm import Summing, plain_sync_batch_norm
from kd_balance.torch_private import (
    WEIGHT_NORM,
    ParametrizedWeightNorm,
    forward_pre_hooks,
    without_onednn,
    without_parametrization_cache,
)


@contextmanager
def differentiable_operators(
    modules: Sequence[nn.Module], ranks: Summing | None
) -> Iterator[None]:
    """Plain operators in place of fused and compiled ones, which lack derivatives.

    Args:
        modules: all that are to be called.
        ranks: the processes that do so; None for one.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(without_parametrization_cache())
            if any(isinstance(m, nn.RNNBase) for m in modules):
                stack.enter_context(plain_recurrence())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(differentiable_embeddings(modules))
            if ranks is not None and any(isinstance(m, nn.SyncBatchNorm) for m in modules):
                stack.enter_context(plain_sync_batch_norm(ranks))
            if _has_weight_norm(modules):
                stack.enter_context(_PlainWeightNorm())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def plain_recurrence() -> Iterator[None]:
    """torch's own recurrent layers, where cuDNN and oneDNN have others."""
    cudnn, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        with without_onednn():
            yield
    finally:
        torch.backends.cudnn.enabled = cudnn


def _has_weight_norm(modules: Sequence[nn.Module]) -> bool:
    return any(
        isinstance(part, (ParametrizedWeightNorm, WeightNorm))
        for m in modules
        for part in (m, *forward_pre_hooks(m))
    )


class _PlainWeightNorm(TorchFunctionMode):
    """Weight norm by its definition: torch's operator has a wrong second derivative (2.13)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is WEIGHT_NORM:
            direction, magnitude, dim = args
            return direction * (magnitude / torch.norm_except_dim(direction, 2, dim))
        return func(*args, **(kwargs or {}))
