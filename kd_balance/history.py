"""What the weights did: their means by class over the course of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kd_balance.data import Labels
from kd_balance.loss import WeightedKDLoss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMOOTHED_POINTS = 60  # a longer record is drawn as moving averages over this part of it


class WeightHistory:
    """Records the mean hard and soft weight of every class while a criterion is used.

    It watches the calls of the criterion by a forward hook, and of these only the training calls:
    those in training mode with gradients enabled. The sums stay on the device of the weights, so
    that recording never waits for a GPU; :meth:`table` and what builds on it fetches them.

    Args:
        criterion: the loss to watch.
        num_classes: C; by default the size of the logits' class dimension in the first call.
        every: calls that make up one row of the record, at least 1.

    Raises:
        ValueError: `every` below 1; at the first call, logits with more than `num_classes` classes.

    Example::

        >>> from kd_balance.loss import WeightedKDLoss
        >>> criterion = WeightedKDLoss(alpha=(0.3, 0.7))
        >>> history = WeightHistory(criterion)
        >>> loss = criterion(torch.randn(5, 2), torch.randn(5, 2), torch.tensor([0, 0, 0, 1, 1]))
        >>> history.table()["count"], history.table()["soft"]
        (array([[3, 2]]), array([[0.7, 0.7]], dtype=float32))
    """

    def __init__(
        self, criterion: WeightedKDLoss, num_classes: int | None = None, every: int = 1
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}, expected at least 1 call for each row.")
        self._num_classes = num_classes
        self._every = every
        self._calls = 0  # recorded so far, the last `_open_calls` of them in `_open`
        self._open_calls = 0
        self._open: Tensor | None = None  # [C, 3]: sums of (1, hard weight, soft weight)
        self._steps: list[int] = []  # of each row, `_calls` at its end
        self._fetched: list[Tensor] = []  # rows already on the CPU, then those that are not
        self._waiting: list[Tensor] = []
        self._hook = criterion.register_forward_hook(self._record, with_kwargs=True)

    def close(self) -> None:
        """Stop recording; what was recorded stays."""
        self._hook.remove()

    def table(self) -> dict[str, np.ndarray]:
        """The record, a row for every `every` training calls and a column for each class.

        Returns:
            ``step`` [R], int64: training calls of the criterion up to the end of the row;
            ``count`` [R, C], int64: samples of the class in the row;
            ``hard`` and ``soft`` [R, C], float32: their mean weights, NaN where there were none.
        """
        sums = self._rows().numpy()
        count = sums[..., 0]
        with np.errstate(invalid="ignore"):
            hard, soft = sums[..., 1] / count, sums[..., 2] / count
        return {
            "step": np.array(self._steps, dtype=np.int64),
            "count": count.astype(np.int64),
            "hard": hard,
            "soft": soft,
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write the arrays of :meth:`table` to an .npz file, for numpy.load."""
        np.savez(path, **self.table())

    def plot(self, path: str | PathLike[str], class_counts: Labels | None = None) -> None:
        """Draw the hard and the soft weight of every class over the training calls.

        The colours run from the most frequent class to the rarest. A long record is drawn as
        moving averages.

        Args:
            path: of the picture; its suffix decides the format, as in matplotlib's savefig.
            class_counts: training samples of each class [C], which order the colours; by default
                the samples recorded.

        Raises:
            RuntimeError: nothing was recorded yet.
            ValueError: `class_counts` of another length.
            ImportError: matplotlib is missing.
        """
        try:
            from matplotlib.cm import ScalarMappable
            from matplotlib.colors import BoundaryNorm, ListedColormap
            from matplotlib.figure import Figure
            from matplotlib import colormaps
        except ImportError as error:
            raise ImportError(
                "WeightHistory.plot draws with matplotlib, which is missing: "
                "pip install 'kd-balance[plot]'."
            ) from error

        table = self.table()
        rows, classes = table["count"].shape
        if rows == 0:
            raise RuntimeError(
                f"There is nothing to draw yet, expected at least {self._every} training calls of "
                "the criterion: plot after training, and make the WeightHistory before it."
            )
        seen = table["count"].sum(0)
        frequency = seen if class_counts is None else np.asarray(class_counts)
        if frequency.shape != (classes,):
            raise ValueError(
                f"class_counts has shape {frequency.shape}, expected ({classes},): one number for "
                "each class."
            )
        head_to_tail = np.argsort(-frequency, kind="stable")

    def state_dict(self) -> dict[str, Any]:
        """The whole record, on the CPU, in types that torch.load(weights_only=True) takes."""
        rows = self._rows()
        return {
            "calls": self._calls,
            "open_calls": self._open_calls,
            "open": None if self._open is None else self._open.cpu().clone(),
            "steps": list(self._steps),
            "rows": rows,
        }
