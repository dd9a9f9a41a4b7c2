"""What a checkpoint has to be, looked at before anything is loaded from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_balance.inner_step import DIFFERENTIABLE
from kd_balance.joint import JointOptimizer, shares_out
from kd_balance.replay import RandomState, preserved_random_state

FORMAT = 1
"""Of the part under ``kd_balance``; what was written before there were numbers has none."""

_DO = "load what this optimizer's state_dict() returned, and all of it"


def check_optimizer(state_dict: Any, optimizer: Optimizer, whose: str = "optimizer") -> None:
    """Holds the state of an optimizer against the one that is to load it.

    Raises:
        ValueError: it is another one's, or a part of one.
    """
    if not isinstance(state_dict, Mapping):
        _refuse(f"the {whose}'s state is {type(state_dict).__name__}", "a dict")
    if isinstance(optimizer, JointOptimizer):
        states = state_dict.get("optimizers")
        if not isinstance(states, Sequence) or len(states) != len(optimizer.optimizers):
            _refuse(f"the {whose}'s state has the keys {_some(state_dict)}",
                    f"'optimizers' with {len(optimizer.optimizers)} states")
        for part, state in zip(optimizer.optimizers, states):
            check_optimizer(state, part, whose)
        return
    if lacking := {"state", "param_groups"} - state_dict.keys():
        _refuse(f"the {whose}'s state has the keys {_some(state_dict)}",
                f"also {', '.join(sorted(lacking))}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    try:
        sizes = [len(group["params"]) for group in groups]
        by_index = {index: state.get(index, {}) for group in groups for index in group["params"]}
        tensors = {index: dict(slots) for index, slots in by_index.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        _refuse(f"the {whose}'s param_groups or state cannot be read", "those of an optimizer")
    own = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own:
        _refuse(f"the {whose}'s groups hold {sizes} parameters", f"{own}")
    if shares_out(optimizer) or type(optimizer) not in DIFFERENTIABLE:
        return  # whose states may have other shapes than parameters
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, slots in zip(params, tensors.values()):
        for key, value in slots.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != param.shape:
                _refuse(f"the {whose}'s {key} has shape {tuple(value.shape)}",
                        f"that of its parameter, {tuple(param.shape)}")


def check_meta_state(
    state: Any, known: Mapping[str, Callable[[Any], str | None]]
) -> None:
    """Holds the part under ``kd_balance`` against what is known of its entries.

    Args:
        state: to be loaded.
        known: by key what an entry fails to be, or None.

    Raises:
        ValueError: it is of a later version, lacks something, or does not fit.
    """
    if not isinstance(state, Mapping):
        _refuse(f"what is under 'kd_balance' is {type(state).__name__}", "a dict")
    version = state.get("format", 0)
    if not _is_count(version) or version > FORMAT:
        raise ValueError(
            f"the checkpoint's format is {version!r}, expected at most {FORMAT}: load it with the "
            "kd_balance that wrote it, or a later one."
        )
    if lacking := known.keys() - state.keys() if version else set():
        _refuse(f"what is under 'kd_balance' lacks {', '.join(sorted(lacking))}", "all of it")
    for key, fails in known.items():
        if key in state and (wrong := fails(state[key])) is not None:
            _refuse(f"{key} in the checkpoint is {_short(state[key])}", wrong)


def count(value: Any) -> str | None:
    return None if _is_count(value) else "a whole number"


def number(value: Any) -> str | None:
    held = isinstance(value, Tensor) and value.numel() == 1
    return None if held else "a tensor of one number"


def tensors_like(expected: Mapping[str, Any]) -> Callable[[Any], str | None]:
    """Whether an entry holds tensors of these names and shapes."""
    shapes = {name: _shape(held) for name, held in expected.items()}

    def check(value: Any) -> str | None:
        fits = isinstance(value, Mapping) and {n: _shape(t) for n, t in value.items()} == shapes
        return None if fits else f"tensors of this weight net, {shapes}"

    return check


def none_or_like(expected: Sequence[Tensor]) -> Callable[[Any], str | None]:
    """Whether an entry is empty, or a list of tensors of these shapes."""
    shapes = [tuple(tensor.shape) for tensor in expected]

    def check(value: Any) -> str | None:
        if isinstance(value, Sequence) and all(isinstance(t, Tensor) for t in value):
            if [tuple(t.shape) for t in value] in ([], shapes):
                return None
        return f"nothing, or tensors of shapes {shapes}"

    return check


def positions(value: Any) -> str | None:
    """Whether an entry tells where meta loaders are."""
    try:
        for position in value:
            position["loader"]
            with preserved_random_state(torch.device("cpu")):
                RandomState.from_state_dict(position["random_state"]).set()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return "a list of the meta loaders' positions"
    return None if len(value) else "at least one position"


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (int, float, str)) else type(value).__name__
    return text[:60]


def _some(state_dict: Mapping[str, Any]) -> str:
    keys = [str(key) for key in state_dict]
    return ", ".join(keys[:4]) + (", …" if len(keys) > 4 else "") if keys else "none"


def _refuse(what: str, expected: str) -> NoReturn:
    raise ValueError(f"{what}, expected {expected}: {_DO}.")
