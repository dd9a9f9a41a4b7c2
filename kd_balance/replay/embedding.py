"""Embeddings that drop or scale the gradient of some rows in their backward pass.

``padding_idx`` and ``scale_grad_by_freq`` change what backward gives and not what forward computes:
with E the rows picked and D a factor for each of them, the loop steps along Eᵀ D g in the place of
the derivative Eᵀ g. Where a row gets a gradient elsewhere too, as one tied to the output layer
does, the two are told apart: the step's gradient has D, and so has E λ, the tangent whose product
with g is the step's part along λ. All other derivatives, of the meta loss and of the step's
gradient by the parameters that it was taken at, have none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_balance.replay.fused_rules import unpacked
from kd_balance.torch_private import make_dual


class LoopBackward:
    """Within it, a backward pass through what was replayed in it is the loop's own.

    After it, passes through the same graph are derivatives.
    """

    def __init__(self) -> None:
        self._within = False

    def __enter__(self) -> LoopBackward:
        self._within = True
        self._outer, _thread.backward = _thread.backward, self
        return self

    def __exit__(self, *_: Any) -> None:
        self._within = False
        _thread.backward = self._outer

    def keep(self, output: Tensor, factor: Tensor) -> None:
        """Multiplies the gradient of an embedding's output as the loop's own pass does."""
        output.register_hook(lambda g: g * factor.to(g.dtype) if self._within else g)


class _Thread(threading.local):
    backward: LoopBackward | None = None
    replays = 0


_thread = _Thread()
_entered = 0
_torchs: dict[str, Any] = {}


@contextmanager
def differentiable_embeddings(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Embeddings with the derivatives of what they compute, as far as the loop's own pass has them.

    Args:
        modules: all that are to be called.
    """
    if not any(
        isinstance(m, nn.Embedding) and (m.padding_idx is not None or m.scale_grad_by_freq)
        for m in modules
    ):
        yield
        return
    global _entered
    if _entered == 0:
        _torchs["embedding"], F.embedding = F.embedding, _embedding
    _entered += 1
    _thread.replays += 1
    try:
        yield
    finally:
        _thread.replays -= 1
        _entered -= 1
        if _entered == 0:
            F.embedding = _torchs["embedding"]


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if not _thread.replays or (padding_idx is None and not scale_grad_by_freq):
        return _torchs["embedding"](
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    output = _torchs["embedding"](input, weight, None, max_norm, norm_type, False, sparse)
    factor = torch.ones(input.shape, dtype=output.dtype, device=output.device)
    if scale_grad_by_freq:  # bincount would wait for the device
        rows = input.flatten().long()
        counts = factor.new_zeros(len(weight)).scatter_add_(0, rows, factor.flatten())
        factor = factor / counts[input]
    if padding_idx is not None:
        factor = factor.masked_fill(input == padding_idx % len(weight), 0)
    factor = factor.unsqueeze(-1)
    primal, tangent = unpacked(output)
    if tangent is not None:
        return make_dual(primal, tangent * factor)
    if output.requires_grad and _thread.backward is not None:
        _thread.backward.keep(output, factor)
    return output
