"""How often, through which steps and by which engine a meta update is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kd_balance.hypergradient import ENGINES

METHODS = ("online", "lookahead", "paper")
DERIVATIVES = ("exact", "finite_difference", "sgd")
UNROLL, EVERY = 4, 64  # a window: fewer steps of it gain less, more windows gain nothing


@dataclass
class Settings:
    """The numbers and words that a BilevelOptimizer was given, which say what they mean."""

    method: str
    engine: str
    unroll: int
    every: int
    accumulate: int
    step_derivative: str

    @classmethod
    def of(
        cls,
        method: str,
        engine: str,
        unroll: int | None,
        every: int | None,
        accumulate: int,
        step_derivative: str,
    ) -> Settings:
        """Those given; one of a window's sizes that is left out fits the other.

        Raises:
            ValueError: they cannot work.
        """
        _check_choice("method", method, METHODS)
        _check_choice("engine", engine, tuple(ENGINES))
        _check_choice("step_derivative", step_derivative, DERIVATIVES)
        if step_derivative != "exact" and (method, engine) != ("online", "adjoint"):
            raise ValueError(
                f"step_derivative is {step_derivative!r} with method={method!r} and "
                f"engine={engine!r}, expected 'exact' there: use method 'online' and engine "
                "'adjoint', or leave it out."
            )
        unroll, every = _window(method, unroll, every)
        for name, value in (("unroll", unroll), ("every", every), ("accumulate", accumulate)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1.")
        if unroll > every:
            raise ValueError(
                f"unroll is {unroll} and every is {every}, expected unroll ≤ every: φ must be the "
                f"same in all unrolled steps, so set every={unroll} or more."
            )
        return cls(method, engine, unroll, every, accumulate, step_derivative)

    @property
    def of_window(self) -> dict[str, Any]:
        """What a run that goes on with a window has to share with the one that began it."""
        return {
            "method": self.method, "engine": self.engine, "unroll": self.unroll,
            "every": self.every, "step_derivative": self.step_derivative,
        }


def _window(method: str, unroll: int | None, every: int | None) -> tuple[int, int]:
    """The sizes; method "paper" has the paper's."""
    most, length = (1, 1) if method == "paper" else (UNROLL, EVERY)
    if every is None:
        every = max(length, unroll) if isinstance(unroll, int) else length
    if unroll is None:
        unroll = min(most, every) if isinstance(every, int) else most
    return unroll, every


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}.")
