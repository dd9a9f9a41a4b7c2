"""Values that a student takes out of its own graph, which backward passes take for constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kd_balance.replay.fused_rules import FusedRules
from kd_balance.torch_private import make_dual

_DETACHES = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]


Replay = Callable[[Mapping[str, Tensor]], list[Tensor]]


def stops_gradients(replay: Replay, params: Mapping[str, Tensor]) -> bool:
    """Whether the outputs depend on the parameters through what the student detaches.

    False too for a student without forward-mode derivative, of which it is not known.

    Args:
        replay: the call, repeated with tangents that pass what is detached, and without.
        params: that the call was made with.
    """
    try:
        passing = _Passing()
        with FusedRules(tangents=True), passing:
            whole = _tangent(replay, params)
        if not passing.met:
            return False
        with FusedRules(tangents=True):
            return not torch.allclose(whole, _tangent(replay, params), 1e-4, 1e-6)
    except (RuntimeError, NotImplementedError):
        return False


class _Passing(TorchFunctionMode):
    """Leaves tangents where detaching would drop them."""

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _DETACHES and isinstance(args[0], Tensor):
            if fwAD.unpack_dual(args[0]).tangent is not None:
                self.met = True
                return args[0].view_as(args[0])
        return function(*args, **(kwargs or {}))


def _tangent(replay: Replay, params: Mapping[str, Tensor]) -> Tensor:
    """Of the outputs, in a direction that every parameter has a part in."""
    with fwAD.dual_level(), torch.no_grad():
        duals = {n: make_dual(p.detach(), torch.ones_like(p)) for n, p in params.items()}
        pairs = [fwAD.unpack_dual(output) for output in replay(duals)]
        parts = [torch.zeros_like(p) if t is None else t.clone() for p, t in pairs]
        return torch.cat([part.flatten() for part in parts])
