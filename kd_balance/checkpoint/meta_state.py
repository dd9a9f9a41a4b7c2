"""The state of the meta level, which stands under ``kd_balance`` in a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kd_balance.bilevel import BilevelSteps
from kd_balance.checkpoint import checks
from kd_balance.checkpoint.open_window import Around, NotPlain, packed, unpacked
from kd_balance.inner_step import InnerStep
from kd_balance.joint import parts
from kd_balance.loop_warnings import loop_level


def meta_state_of(steps: BilevelSteps) -> dict[str, Any]:
    """Everything of the meta level, as tensors, numbers and words."""
    weight_net = steps.criterion.weight_net
    assert weight_net is not None
    state = {
        "format": checks.FORMAT,
        "weight_net": weight_net.state_dict(),
        "teacher_bias": steps.criterion.teacher_bias,
        "meta_sets": steps.meta_set.positions,
        "steps": steps.window.count,
        "meta_loss_start": steps.metrics.meta_loss_start,
        "skipped": steps.skipped.state_dict(),
        **steps.weight_net_step.state_dict(),
    }
    window = steps.window
    if window.steps:
        state["window_of"] = steps.settings.of_window
        try:
            if steps.ranks.size > 1:
                raise NotPlain("each process has its own")
            state["window"] = packed(window.steps, window.ended, _around(steps))
        except NotPlain as reason:
            warnings.warn(
                "state_dict() was called between steps that one hypergradient passes through: "
                f"{len(window.steps)} of {steps.settings.unroll} steps are not saved, for {reason},"
                " and where the state is loaded, in this run or another, that one passes through "
                "the others only.",
                stacklevel=loop_level(),
            )
    return state


def load_meta_state(
    steps: BilevelSteps, state: Mapping[str, Any], load_rest: Callable[[], None]
) -> None:
    """Loads what :func:`meta_state_of` returned.

    Args:
        steps: to be brought there.
        state: held against them before anything is changed.
        load_rest: loads the wrapped optimizer's state, when nothing can be refused any more.

    Raises:
        ValueError: it does not fit, or is a part.
    """
    checks.check_meta_state(state, _entries(steps))
    window = _window_in(state, steps)
    # first, for the loader's own code may fail
    steps.meta_set.load_positions(state.get("meta_sets", steps.meta_set.positions))
    load_rest()
    steps.give_up()
    criterion = steps.criterion
    if "weight_net" in state:
        assert criterion.weight_net is not None
        criterion.weight_net.load_state_dict(state["weight_net"])
    teacher_bias = state.get("teacher_bias")
    if criterion.teacher_bias is not None and teacher_bias is not None:
        criterion.teacher_bias = teacher_bias.to(criterion.teacher_bias)
    if "meta_optimizer" in state:
        state = {**state, "meta_optimizer": by_index(state["meta_optimizer"])}
    steps.weight_net_step.load_state_dict(state)
    steps.window.count = state.get("steps", steps.window.count)
    steps.metrics.meta_loss_start = state.get("meta_loss_start", steps.metrics.meta_loss_start)
    if "skipped" in state:
        steps.skipped.load_state_dict(state["skipped"])
    if window is not None:
        steps.window.steps, steps.window.ended, written = window
        steps.structure.written |= written
    steps.watch_if_due()


def by_index(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state by numbers, which torch.distributed.checkpoint turns into strings."""
    found = dict(state_dict)
    if isinstance(found.get("state"), Mapping):
        found["state"] = {
            int(k) if isinstance(k, str) and k.isdigit() else k: v
            for k, v in found["state"].items()
        }
    if isinstance(found.get("optimizers"), list):
        found["optimizers"] = [
            by_index(part) if isinstance(part, Mapping) else part for part in found["optimizers"]
        ]
    return found


def _entries(steps: BilevelSteps) -> dict[str, Callable[[Any], str | None]]:
    """What the entries fail to be, or None."""
    criterion = steps.criterion
    assert criterion.weight_net is not None

    def of_meta_optimizer(state: Any) -> None:
        found = by_index(state) if isinstance(state, Mapping) else state
        checks.check_optimizer(found, steps.weight_net_step.optimizer, "meta_optimizer")

    def of_bias(bias: Any) -> str | None:
        own = criterion.teacher_bias
        if own is None or bias is None or getattr(bias, "shape", None) == own.shape:
            return None
        return f"one number for each of {len(own)} classes"

    def of_skipped(counts: Any) -> str | None:
        names = steps.skipped.state_dict().keys()
        if isinstance(counts, Mapping) and names <= counts.keys():
            return None
        return f"counts of {', '.join(names)}"

    return {
        "weight_net": checks.tensors_like(criterion.weight_net.state_dict()),
        "teacher_bias": of_bias,
        "meta_optimizer": of_meta_optimizer,
        "meta_sets": checks.positions,
        "steps": checks.count,
        "meta_updates": checks.count,
        "meta_loss_start": checks.number,
        "skipped": of_skipped,
        "holds_some": checks.number,
        "accumulated": checks.count,
        "partial_average": checks.none_or_like(criterion.phi),
    }


def _around(steps: BilevelSteps) -> Around:
    """What the steps of a window refer to."""
    return Around(steps.structure, steps.recorder.objects, parts(steps.optimizer))


def _window_in(
    state: Mapping[str, Any], steps: BilevelSteps
) -> tuple[list[InnerStep], dict[str, Tensor], set[str]] | None:
    """The open window of a checkpoint, if it has one that this run can go on with."""
    if "window_of" not in state:
        return None
    own = steps.settings.of_window
    if state["window_of"] != own:
        why = f"it is one of {state['window_of']}, and this run's {own}"
    elif "window" not in state:
        why = "it is not saved"
    else:
        return unpacked(state["window"], _around(steps))
    warnings.warn(
        "The checkpoint was written between steps that one hypergradient passes through, and "
        f"what they were is not loaded, for {why}: that one passes through the others only.",
        stacklevel=loop_level(),
    )
    return None
