"""Several optimizers over parts of one student, as Muon and its companion AdamW are, as one.

And one whose states several processes share out between them, each of which steps its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_balance.torch_private import share_out_groups


class JointOptimizer(Optimizer):
    """Steps several optimizers together; their groups and states stay their own.

    Args:
        optimizers: of different parameters.

    Raises:
        TypeError, ValueError: none, something that is no optimizer, or a parameter in two of them.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(
                    f"optimizer holds a {type(optimizer).__name__}, expected each to be a "
                    "torch.optim.Optimizer."
                )
        held = [id(p) for group in self.param_groups for p in group["params"]]
        if not held or len(set(held)) < len(held):
            raise ValueError(
                f"optimizer lists {len(self.optimizers)} optimizers that hold {len(held)} "
                f"parameters, {len(set(held))} of them different, expected every parameter in one "
                "of them."
            )
        self.defaults: dict[str, Any] = {}
        self.__setstate__({})  # step hooks of its own

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        groups = list(groups)
        for optimizer in self.optimizers:
            count = len(optimizer.param_groups)
            optimizer.param_groups, groups = groups[:count], groups[count:]

    @property
    def state(self) -> Any:
        return _States([optimizer.state for optimizer in self.optimizers])

    @state.setter
    def state(self, state: Mapping[Tensor, Any]) -> None:
        for optimizer in self.optimizers:
            own = {p for group in optimizer.param_groups for p in group["params"]}
            optimizer.state.clear()
            optimizer.state.update({p: s for p, s in state.items() if p in own})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: which optimizer is meant?"""
        raise ValueError(
            "add_param_group was called on several optimizers, expected one of them: add the group "
            "to the optimizer that it is for."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)


class _States(Mapping[Tensor, Any]):
    """The states of several optimizers, looked up in each."""

    def __init__(self, states: Sequence[Any]) -> None:
        self._states = states

    def __getitem__(self, param: Tensor) -> Any:
        for state in self._states:
            if param in state:
                return state[param]
        raise KeyError(param)

    def __iter__(self) -> Iterator[Tensor]:
        return (param for state in self._states for param in state)

    def __len__(self) -> int:
        return sum(map(len, self._states))


def parts(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that it steps in this process: itself, several, or that of its own share."""
    if isinstance(optimizer, JointOptimizer):
        return [part for each in optimizer.optimizers for part in parts(each)]
    if shares_out(optimizer):
        whole: Any = optimizer
        share_out_groups(whole)
        return [whole.optim]
    return [optimizer]


def wholes(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that it steps, with the parameters of all processes."""
    return optimizer.optimizers if isinstance(optimizer, JointOptimizer) else [optimizer]


def shares_out(optimizer: Optimizer) -> bool:
    """Whether other processes hold states of it, as with torch's ZeroRedundancyOptimizer."""
    if isinstance(optimizer, JointOptimizer):
        return any(map(shares_out, optimizer.optimizers))
    return type(optimizer).__name__ == "ZeroRedundancyOptimizer"
