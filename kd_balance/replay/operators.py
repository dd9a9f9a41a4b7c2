"""Plain operators for replays, in place of those that lack derivatives or have wrong ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from kd_balance.replay.embedding import differentiable_embeddings
from kd_balance.replay.sync_batch_norm import Summing, plain_sync_batch_norm


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
    cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
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
        parametrize._cache_enabled = cached
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def plain_recurrence() -> Iterator[None]:
    """torch's own recurrent layers, where cuDNN and oneDNN have others."""
    cudnn, mkldnn = torch.backends.cudnn.enabled, torch._C._get_mkldnn_enabled()
    torch.backends.cudnn.enabled = False
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        torch._C._set_mkldnn_enabled(mkldnn)


def _has_weight_norm(modules: Sequence[nn.Module]) -> bool:
    return any(
        isinstance(part, (_WeightNorm, WeightNorm))
        for m in modules
        for part in (m, *m._forward_pre_hooks.values())
    )


class _PlainWeightNorm(TorchFunctionMode):
    """Weight norm by its definition: torch's operator has a wrong second derivative (2.13)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            direction, magnitude, dim = args
            return direction * (magnitude / torch.norm_except_dim(direction, 2, dim))
        return func(*args, **(kwargs or {}))
