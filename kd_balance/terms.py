"""The named terms of a loss: which there are, what each gives for a sample, who has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Term = Callable[..., Any]
"""What the loop gives -> [N], or a scalar for the batch, or ([N], bool [N]: who has it)."""

_TAKEN = (
    "hard", "soft", "student_logits", "teacher_logits", "targets", "sequences", "given", "step",
    "count",
)


def term_names(
    teachers: Sequence[str] | None, terms: Mapping[str, Term | None] | None
) -> tuple[str, ...]:
    """"hard", the teachers or else "soft", and the other terms.

    Raises:
        ValueError: a name that is taken, or no name.
    """
    if teachers is not None and (isinstance(teachers, str) or not teachers):
        raise ValueError(f"teachers is {teachers!r}, expected names such as ('large', 'small').")
    others = (*(teachers or ()), *(terms or ()))
    for name in others:
        if not (isinstance(name, str) and name.isidentifier()) or name in _TAKEN:
            raise ValueError(
                f"a term is named {name!r}, expected a name like 'attention' that a keyword "
                f"argument may have, and none of {', '.join(_TAKEN)}."
            )
        if others.count(name) > 1:
            raise ValueError(f"two terms are named {name!r}, expected a name of its own for each.")
    return ("hard", *(teachers or ("soft",)), *(terms or ()))


def fixed_weights(
    alpha: float | Sequence[float] | Mapping[str, float], names: Sequence[str]
) -> tuple[float, ...]:
    """One weight for each term: for (hard, soft) also by one number, (alpha, 1 − alpha).

    Raises:
        ValueError: not as many as there are terms, or a negative one.
    """
    if isinstance(alpha, Mapping):
        fits = set(alpha) == set(names)
        weights = tuple(alpha[name] for name in names) if fits else ()
    elif isinstance(alpha, Sequence):
        weights = tuple(alpha)
    else:
        weights = (alpha, 1 - alpha) if len(names) == 2 else ()
    if len(weights) == len(names) and min(weights) >= 0:
        return weights
    if len(names) == 2:
        raise ValueError(
            f"alpha is {alpha}, expected a number in [0, 1] or a pair (hard weight, soft "
            "weight) of numbers that are not negative."
        )
    raise ValueError(
        f"alpha is {alpha}, expected a weight that is not negative for each of "
        f"({', '.join(names)}): give them in this order, or by name."
    )


def per_sample(
    name: str, value: Any, positions: Sequence[int], like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A term's losses [N], and which samples have it; None for all.

    Args:
        name: of the term.
        value: what the term gave.
        positions: the shape of the targets without classes, of N elements.
        like: of the losses' dtype.

    Raises:
        ValueError: other shapes.
    """
    losses, there = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not isinstance(losses, Tensor) or losses.shape not in ((), (like.numel(),), positions):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"{name} gave {got}, expected one loss for each sample, ({like.numel()},), or one for "
            "the batch, (): reduce over everything but samples."
        )
    losses = losses.to(like.dtype)
    losses = losses.expand(like.numel()) if losses.dim() == 0 else losses.reshape(-1)
    return losses, None if there is None else mask(name, there, positions)


def mask(name: str, there: Tensor, positions: Sequence[int]) -> Tensor:
    """[N], which samples have a term.

    Raises:
        ValueError: no mask, or one of another shape.
    """
    count = torch.Size(positions).numel()
    if there.dtype != torch.bool or there.shape not in ((count,), positions):
        raise ValueError(
            f"the mask of {name} is {there.dtype} of shape {tuple(there.shape)}, expected "
            f"torch.bool of shape {tuple(positions)}: True where the sample has the term."
        )
    return there.reshape(-1)


def of_terms(kept: Tensor) -> Tensor:
    """[N, 1] or [N, K] out of [N] or [N, K]: where a term of a sample counts."""
    return kept.unsqueeze(1) if kept.dim() == 1 else kept


def of_samples(kept: Tensor) -> Tensor:
    """[N] out of [N] or [N, K]: where anything of a sample counts."""
    return kept if kept.dim() == 1 else kept.any(1)
