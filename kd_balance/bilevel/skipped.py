"""Hypergradients that are not used, counted by their cause without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

META_LOSS, HYPERGRADIENT = "meta_loss", "hypergradient"


class Skipped:
    """How many there were, and how many averages of them held nothing else."""

    def __init__(self) -> None:
        zero = torch.zeros((), dtype=torch.long)
        self.updates = zero
        """Hypergradients that count as zero."""
        self.steps = zero
        """Steps of the weight net that were not taken."""
        self.last = torch.tensor(False)
        """Whether the last one does."""
        self._by_cause = {META_LOSS: zero, HYPERGRADIENT: zero}

    def note(self, used: Tensor, loss: Tensor, hypergradient: Tensor) -> None:
        """Counts one.

        Args:
            used: whether it is.
            loss: the meta loss.
            hypergradient: all of it, flat.
        """
        bad_loss = ~loss.isfinite().to(used.device)
        bad = ~hypergradient.isfinite().all().to(used.device)
        self.last = ~used
        self.updates = self.updates.to(used.device) + self.last
        for cause, fails in ((META_LOSS, bad_loss), (HYPERGRADIENT, bad & ~bad_loss)):
            self._by_cause[cause] = self._by_cause[cause].to(used.device) + fails

    def note_step(self, taken: Tensor) -> None:
        """Counts a step of the weight net."""
        self.steps = self.steps.to(taken.device) + ~taken

    def counts(self) -> dict[str, float]:
        """By their causes; reading waits for the device."""
        return {cause: float(count) for cause, count in self._by_cause.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return {"updates": self.updates, "steps": self.steps, **self._by_cause}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates, self.steps = state["updates"], state["steps"]
        self._by_cause = {cause: state[cause] for cause in self._by_cause}
