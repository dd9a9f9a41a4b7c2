"""Values that a student takes out of its own graph, which backward passes take for constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kd_balance.replay.fused_rules import FusedRules, make_dual
from kd_balance.replay.student_call import StudentCall

_DETACHES = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]


def stops_gradients(call: StudentCall, params: Mapping[str, Tensor]) -> bool:
    """Whether the logits depend on the parameters through what the student detaches.

    False too for a student without forward-mode derivative, of which it is not known.

    Args:
        call: is repeated, with tangents that pass what is detached, and without.
        params: that the call was made with.
    """
    try:
        passing = _Passing()
        with FusedRules(tangents=True), passing:
            whole = _tangent(call, params)
        if not passing.met:
            return False
        with FusedRules(tangents=True):
            return not torch.allclose(whole, _tangent(call, params), 1e-4, 1e-6)
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


def _tangent(call: StudentCall, params: Mapping[str, Tensor]) -> Tensor:
    """Of the logits, in a direction that every parameter has a part in."""
    with fwAD.dual_level(), torch.no_grad():
        duals = {n: make_dual(p.detach(), torch.ones_like(p)) for n, p in params.items()}
        logits = call.replay(duals)
        tangent = fwAD.unpack_dual(logits).tangent
        return torch.zeros_like(logits) if tangent is None else tangent.clone()
