"""Outputs of convolutions that a call's own autograd graph holds, for a replay to take over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

_SHARE = 1 / 3


def kept_outputs(results: Iterable[Tensor]) -> list[Tensor]:
    """What 2d convolutions before batch norms gave on the way to `results`, in their order.

    Batch norm saves its input for the backward pass, so keeping it costs nothing until then, and
    memory afterwards: of all that is saved, the third that took the most multiplications for each
    element is kept. What a hook packed away, a checkpoint's say, is left out.
    """
    found: list[tuple[int, int, Tensor]] = []
    waiting: list[Any] = [result.grad_fn for result in results]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if "BatchNorm" in node.name() and parents and parents[0].name() == "ConvolutionBackward0":
            weight, value = _saved(parents[0], "weight"), _saved(node, "input")
            if weight is not None and value is not None and value.dim() == 4:
                found.append((parents[0]._sequence_nr(), weight[0].numel(), value))
        waiting += [parent for parent in parents if parent not in seen]
        seen.update(parents)
    room = _SHARE * sum(value.nbytes for *_, value in found)
    kept = []
    for order, _, value in sorted(found, key=lambda entry: (-entry[1], entry[2].nbytes)):
        if value.nbytes <= room:
            room -= value.nbytes
            kept.append((order, value))
    return [value for _, value in sorted(kept, key=lambda entry: entry[0])]


def _saved(node: Any, name: str) -> Tensor | None:
    """What a node of the graph saved under this name, unless a hook packed it away."""
    saved = getattr(node, f"_raw_saved_{name}", None)
    # where torch is too old to tell, it counts as packed
    packed = getattr(saved, "unpack_hook", saved) is not None
    return None if packed or saved is None else saved.unpack().detach()
