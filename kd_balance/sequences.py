"""Positions that form sequences, as the tokens of a text do: where each stands, means over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_balance.terms import of_samples

_HOW = (
    "give the call sequences=, int64 of the targets' shape, the same number all through a sequence"
)


class Sequences(NamedTuple):
    """Of every position, in the order in which the criterion flattens them."""

    which: Tensor  # [N], int64 below N, the same for positions of one sequence
    place: Tensor  # [N], int64, within the sequence, from 0

    @classmethod
    def of(cls, positions: torch.Size, ids: Tensor | None, device: torch.device) -> Sequences:
        """Rows, or parts of them.

        Args:
            positions: their shape, of N elements.
            ids: of this shape, another number than before where a sequence begins within a row;
                None for rows that are one sequence each.
            device: of the result.

        Raises:
            ValueError: ids of another shape or no integers, or rows of one position without any.
        """
        if ids is None and len(positions) < 2:
            raise ValueError(
                f"the targets have shape {tuple(positions)}, expected [N, length] where weights or "
                f"features are of a sequence: leave logits and targets unflattened, or {_HOW}."
            )
        if ids is not None and (ids.shape != positions or ids.is_floating_point()):
            raise ValueError(
                f"sequences are {ids.dtype} of shape {tuple(ids.shape)}, expected integers of "
                f"shape {tuple(positions)}, one for each target: cut them as the targets are cut."
            )
        # a row begins a sequence in any case; without looking for values, which waits
        length = positions[1:].numel() if len(positions) > 1 else positions.numel()
        at = torch.arange(positions.numel(), device=device)
        begins = at % max(length, 1) == 0
        if ids is not None:
            flat = ids.to(device).reshape(-1)
            begins = begins | (flat != flat.roll(1))
        return cls(begins.cumsum(0) - 1, at - torch.where(begins, at, 0).cummax(0).values)

    def mean(self, columns: Tensor, kept: Tensor | None) -> Tensor:
        """[N, F], every sequence's mean over what counts, at each of its positions.

        Args:
            columns: [N, F].
            kept: [N] or [N, K], what counts; None where all does.
        """
        counts = torch.ones_like(columns[:, :1])
        if kept is not None:
            counts = of_samples(kept).unsqueeze(1).to(columns.dtype)
            columns = torch.where(counts > 0, columns, 0.0)
        total = torch.zeros_like(columns).index_add_(0, self.which, columns)
        count = torch.zeros_like(counts).index_add_(0, self.which, counts)
        return (total / count.clamp(min=1))[self.which]
