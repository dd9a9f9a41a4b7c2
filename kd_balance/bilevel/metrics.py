"""What the meta updates saw."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_balance.bilevel.skipped import Skipped
from kd_balance.bilevel.weight_net_step import WeightNetStep
from kd_balance.invariants import Invariants
from kd_balance.loop_warnings import LoopWarnings
from kd_balance.loss import WeightedKDLoss

_FIRST = 10  # windows that tell where the meta loss began


class Metrics:
    """Keeps the numbers of the last meta update where they are; reading waits for the device."""

    def __init__(
        self,
        criterion: WeightedKDLoss,
        weight_net_step: WeightNetStep,
        skipped: Skipped,
        invariants: Invariants,
        warnings: LoopWarnings,
    ) -> None:
        self._criterion = criterion
        self._weight_net_step = weight_net_step
        self._skipped = skipped
        self._invariants = invariants
        self._warnings = warnings
        self.meta_loss = torch.tensor(float("nan"))
        self.meta_loss_start = torch.tensor(float("nan"))
        self.hypergradient_norm = torch.tensor(float("nan"))
        self._mean_weights = torch.full((len(criterion.names),), float("nan"))

    def note(
        self, loss: Tensor, hypergradient: Tensor, used: Tensor, mean_weights: Tensor
    ) -> None:
        """Notes one, before the weight net's step knows of it.

        Args:
            loss: the meta loss.
            hypergradient: all of it, flat.
            used: whether it is not skipped.
            mean_weights: [K], of the terms.
        """
        self.meta_loss, self.hypergradient_norm = loss, hypergradient.norm()
        self._mean_weights = mean_weights
        if (windows := self._weight_net_step.windows) < _FIRST:
            start = self.meta_loss_start.to(loss)
            start = torch.where(start.isfinite(), start, loss)
            mean = start + (loss - start) / (windows + 1)
            self.meta_loss_start = torch.where(loss.isfinite(), mean, start)
        self._skipped.note(used, loss, hypergradient)

    def read(self) -> dict[str, float]:
        """All of them.

        Raises:
            ValueError: on an accelerator, an invariant broke since the last reading.
        """
        self._invariants.check()
        self.tell_if_all_skipped()
        mean_weights = zip(self._criterion.names, self._mean_weights.tolist(), strict=True)
        return {
            "meta_loss": self.meta_loss.item(),
            "meta_loss_start": self.meta_loss_start.item(),
            "hypergradient_norm": self.hypergradient_norm.item(),
            **{f"{name}_weight": mean for name, mean in mean_weights},
            "meta_updates": float(self._weight_net_step.count - self._skipped.steps.item()),
            "skipped_updates": float(self._skipped.updates.item()),
            **{f"skipped_by_{k}": n for k, n in self._skip_causes().items() if n},
        }

    def tell_if_all_skipped(self) -> None:
        """Warns of a weight net that learns nothing; waits for the device."""
        windows = self._weight_net_step.windows
        if windows < _FIRST or self._skipped.updates < windows:
            return
        causes = ", ".join(f"{cause}: {n:.0f}" for cause, n in self._skip_causes().items() if n)
        self._warnings.once(
            f"All {windows} meta updates so far were skipped ({causes}), so the weight net learns "
            "nothing: look for nan and inf in the meta batches and in what becomes of them.",
            "all skipped",
        )

    def _skip_causes(self) -> dict[str, float]:
        return {**self._skipped.counts(), **self._invariants.counts()}
