"""The methods by name, each a row of the table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from longtail.data import Task
from longtail.methods.base import Method
from longtail.methods.bikd import BiKD, PlainTwoLines, TwoLines
from longtail.methods.distillation import (
    DKD,
    KD,
    BalancedDivergences,
    BalancedKD,
    BalancedSoftmaxKD,
    BalancedSoftmaxKDWithMeta,
    DiVE,
    KDChosen,
    KDWithMeta,
    LongTailedKD,
    Sweep,
    WeightedSoftLabels,
)
from longtail.methods.plain import (
    BalancedSoftmaxAlone,
    CrossEntropy,
    DeferredReweighting,
    MetaAlone,
)
from longtail.protocol import Protocol

METHODS: dict[str, Callable[..., Method]] = {
    "ce": CrossEntropy,
    "bs": BalancedSoftmaxAlone,
    "drw": DeferredReweighting,
    "meta-alone": MetaAlone,
    "kd": KD,
    "kd+meta": KDWithMeta,
    "kd-chosen": KDChosen,
    "bs+kd": BalancedSoftmaxKD,
    "bs+kd+meta": BalancedSoftmaxKDWithMeta,
    "sweep": Sweep,
    "dkd": DKD,
    "bkd": BalancedKD,
    "dive": DiVE,
    "wsl": WeightedSoftLabels,
    "bd-kd": BalancedDivergences,
    "ltkd": LongTailedKD,
    "bikd": TwoLines,
    "bikd-plain": PlainTwoLines,
}
for _method in ("online", "lookahead", "paper"):
    for _prefix, _losses in (("", {}), ("bs+", {"hard": "bs"}), ("dkd+", {"soft": "dkd"})):
        METHODS[f"{_prefix}bikd-{_method}"] = functools.partial(BiKD, method=_method, **_losses)
METHODS["bikd-resampled"] = functools.partial(BiKD, meta="resampled")
METHODS["bs+bikd-resampled"] = functools.partial(BiKD, hard="bs", meta="resampled")


def make_method(spec: str, task: Task, protocol: Protocol, seed: int) -> Method:
    """A method from its name and options.

    Args:
        spec: a name in METHODS, or one with options of its class: "bikd-online:unroll=2,every=2".
        task, protocol, seed: of the run.

    Raises:
        ValueError: an unknown name or option.
    """
    name, options = parse(spec)
    try:
        return METHODS[name](task, protocol, seed, **options)
    except TypeError as error:
        raise ValueError(f"method {spec!r} cannot be made: {error}.") from error


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a method's specification.

    Raises:
        ValueError: an unknown name, or an option without a value.
    """
    name, _, text = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown, expected one of {', '.join(METHODS)}.")
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"option {part!r} of {spec!r} has no value, expected key=value.")
        options[key] = _number(value)
    return name, options


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
