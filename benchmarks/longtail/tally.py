"""How far a plan is, counted by all its processes and shown with the time left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.multiprocessing as multiprocessing
from tqdm import tqdm


class Tally:
    """Adds up the shares of runs that are computed, apart from those that were found done.

    What was found done took no time here, so the bar leaves it out.

    Args:
        costs: of every run, in any unit of time.
    """

    def __init__(self, costs: Mapping[Any, float]) -> None:
        context = multiprocessing.get_context("spawn")
        self._costs = list(costs.values())
        self._index = {run: index for index, run in enumerate(costs)}
        self._computed = context.Array("d", len(costs))
        self._found = context.Array("d", len(costs))

    def add(self, run: Any, share: float, found: bool = False) -> None:
        """Counts a share of a run, which a checkpoint may have held already."""
        shares = self._found if found else self._computed
        with shares.get_lock():
            shares[self._index[run]] += share

    def finished(self, run: Any) -> None:
        """Counts what is left of a run as found: a result exists."""
        index = self._index[run]
        with self._found.get_lock():
            self._found[index] = 1 - self._computed[index]

    def show(self, bar: tqdm) -> None:
        """Brings a bar up to date, whose total shrinks by what was found."""
        shares = list(zip(self._costs, self._computed, self._found, strict=True))
        bar.total = sum(cost * (1 - found) for cost, _, found in shares)
        # epochs' shares add up to one only nearly
        done = sum(cost * min(computed, 1 - found) for cost, computed, found in shares)
        bar.update(done - bar.n)
        bar.refresh()
