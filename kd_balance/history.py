"""What the weights did: their means by class over the course of training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from kd_balance.loss import WeightedKDLoss
from kd_balance.meta_history import MetaHistory, criterion_settings, versions
from kd_balance.optimizer import BilevelOptimizer
from kd_balance.report import FORMAT, VERSION, embedded, write_report
from kd_balance.report.stretches import stretches


class WeightHistory:
    """Records the mean hard and soft weight of every class, and those of a criterion's other terms.

    It watches the calls of the criterion by a forward hook, and of these only the training calls:
    those in training mode with gradients enabled. The sums stay on the device of the weights, so
    that recording never waits for a GPU; :meth:`table` and what builds on it fetches them.

    Args:
        criterion: the loss to watch.
        num_classes: C; by default the size of the logits' class dimension in the first call.
        every: calls that make up one row of the record, at least 1.
        optimizer: the BilevelOptimizer that was given `criterion`, whose meta updates, settings and
            warnings are recorded too; None records the weights alone.

    Raises:
        ValueError: `every` below 1, or an optimizer of another criterion; at the first call, logits
            with more than `num_classes` classes.
        TypeError: an optimizer that is no BilevelOptimizer.

    Example::

        >>> from kd_balance.loss import WeightedKDLoss
        >>> criterion = WeightedKDLoss(alpha=(0.3, 0.7))
        >>> history = WeightHistory(criterion)
        >>> loss = criterion(torch.randn(5, 2), torch.randn(5, 2), torch.tensor([0, 0, 0, 1, 1]))
        >>> history.table()["count"], history.table()["soft"]
        (array([[3, 2]]), array([[0.7, 0.7]], dtype=float32))
    """

    def __init__(
        self,
        criterion: WeightedKDLoss,
        num_classes: int | None = None,
        every: int = 1,
        optimizer: BilevelOptimizer | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}, expected at least 1 call for each row.")
        if not isinstance(optimizer, BilevelOptimizer | None):
            raise TypeError(
                f"optimizer is {type(optimizer).__name__}, expected the BilevelOptimizer: wrap the "
                "student's optimizer first, or leave it out to record the weights alone."
            )
        if optimizer is not None and optimizer.criterion is not criterion:
            raise ValueError(
                f"optimizer trains the weights of another {type(optimizer.criterion).__name__}, "
                "expected that of criterion: give WeightHistory the criterion that the optimizer "
                "was given."
            )
        self._criterion = criterion
        self._meta = MetaHistory(optimizer)
        self._num_classes = num_classes
        self._every = every
        self._calls = 0
        self._names = criterion.names
        # A row is [C, 1 + K], the sums of (1, hard weight, soft weight) over a class's samples.
        self._open: Tensor | None = None  # the row that is being filled
        self._open_calls = 0
        self._waiting: list[Tensor] = []  # full rows, still on the device of the weights
        self._fetched = torch.zeros(0, num_classes or 0, 1 + len(self._names))  # on the CPU
        self._steps: list[int] = []  # of each full row, the calls up to its end
        self._hook = criterion.register_forward_hook(self._record, with_kwargs=True)

    def close(self) -> None:
        """Stop recording; what was recorded stays."""
        self._hook.remove()
        self._meta.close()

    def table(self) -> dict[str, np.ndarray]:
        """The record, a row for every `every` training calls and a column for each class.

        Returns:
            ``step`` [R], int64: training calls of the criterion up to the end of the row;
            ``count`` [R, C], int64: samples of the class in the row;
            ``hard``, ``soft`` and other terms by their names [R, C], float32: their mean weights,
            NaN where there were no samples; a term that a sample lacks weighs 0.
        """
        sums = self._rows().numpy()
        count = sums[..., 0]
        with np.errstate(invalid="ignore"):
            means = {name: sums[..., i] / count for i, name in enumerate(self._names, start=1)}
        return {
            "step": np.array(self._steps, dtype=np.int64),
            "count": count.astype(np.int64),
            **means,
        }

    def as_dict(self) -> dict[str, Any]:
        """All that was recorded, in lists, strings and numbers that JSON can hold.

        Returns:
            ``weights``, the columns of :meth:`table`, with None where there were no samples;
            ``meta``, a row for each hypergradient: ``step`` (student steps up to it),
            ``meta_loss``, ``hypergradient_norm``, ``skipped`` and ``skipped_by_…`` for each cause
            that occurred; ``class_counts`` [C] or None; ``settings``, ``versions`` and
            ``warnings``; and ``format`` and ``version``, which say what this is.
        """
        counts = self._criterion.class_counts
        return {
            "format": FORMAT,
            "version": VERSION,
            "weights": {name: _plain(column) for name, column in self.table().items()},
            "meta": {name: _plain(column) for name, column in self._meta.table().items()},
            "class_counts": None if counts is None else torch.as_tensor(counts).tolist(),
            "settings": {**criterion_settings(self._criterion), **self._meta.settings},
            "versions": versions(),
            "warnings": self._meta.warnings,
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write the record to a file.

        Args:
            path: of a .json file for :meth:`as_dict`, from which ``python -m kd_balance.report``
                makes a report; or of an .npz file for the arrays of :meth:`table`, for numpy.load.
        """
        if fspath(path).endswith(".json"):
            Path(path).write_text(json.dumps(self.as_dict(), allow_nan=False), encoding="utf-8")
            return
        arrays: dict[str, Any] = self.table()
        np.savez(path, **arrays)

    def report(self, path: str | PathLike[str], class_counts: ArrayLike | None = None) -> None:
        """Write what was recorded as one HTML page, for people; it loads nothing else.

        Weights by class and by thirds of the classes (many, medium and few samples), and, with the
        `optimizer`, meta loss, hypergradient norm, skipped updates by cause, settings and warnings.
        Every plot has its numbers beside it. It may be written over and over while training.

        Args:
            path: of the page.
            class_counts: training samples of each class [C], which order the classes; by default
                those of :meth:`WeightedKDLoss.long_tailed`, or else the samples recorded.

        Raises:
            RuntimeError: nothing was recorded yet.
            ValueError: `class_counts` of another length.
            ImportError: matplotlib is missing.

        Example::

            history = WeightHistory(criterion, optimizer=optimizer)
            ...  # training
            history.report("run.html")
        """
        record = self.as_dict()
        if class_counts is not None:
            record["class_counts"] = torch.as_tensor(class_counts).tolist()
        write_report(record, path)

    def _repr_html_(self) -> str:
        """The report, where a notebook displays this object; a sentence while there is none."""
        try:
            return embedded(self.as_dict())
        except (RuntimeError, ImportError) as error:
            return f"<p>{escape(str(error))}</p>"

    def plot(self, path: str | PathLike[str], class_counts: ArrayLike | None = None) -> None:
        """Draw the weights of every class over the training calls, a panel for each term.

        The colours run from the most frequent class to the rarest. A long record is drawn as the
        means of 50 stretches.

        Args:
            path: of the picture; its suffix decides the format, as for matplotlib's savefig.
            class_counts: training samples of each class [C], which order the colours; by default
                the samples recorded.

        Raises:
            RuntimeError: nothing was recorded yet.
            ValueError: `class_counts` of another length.
            ImportError: matplotlib is missing.
        """
        try:
            from matplotlib import colormaps
            from matplotlib.cm import ScalarMappable
            from matplotlib.colors import BoundaryNorm, ListedColormap
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "WeightHistory.plot needs matplotlib, which is missing: install it by "
                "pip install 'kd-balance[plot]'."
            ) from error

        sums = self._rows().numpy()
        rows, classes, _ = sums.shape
        if rows == 0:
            raise RuntimeError(
                f"Nothing was recorded, expected {self._every} or more training calls of the "
                "criterion: make the WeightHistory before training and plot after it."
            )
        if class_counts is None:
            frequency, unit = sums[..., 0].sum(0), "times seen"
        else:
            frequency, unit = np.asarray(class_counts), "samples"
        if frequency.shape != (classes,):
            raise ValueError(
                f"class_counts has shape {frequency.shape}, expected ({classes},): give one number "
                "for each class."
            )
        starts, ends = stretches(rows)
        sums = np.add.reduceat(sums, starts)
        steps = np.array(self._steps)[ends - 1]
        calls = round(self._every * rows / len(starts))

        head_to_tail = np.argsort(-frequency, kind="stable")
        # Without the palest tenth, which does not show on white.
        colors = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, classes)))
        alpha = 1.0 if classes <= 20 else 0.6
        figure = Figure(figsize=(4.5 * len(self._names), 3.6), layout="constrained")
        panels = figure.subplots(1, len(self._names), sharey=True)
        for column, (panel, name) in enumerate(zip(panels, self._names), start=1):
            for rank, c in enumerate(head_to_tail):
                there = sums[:, c, 0] > 0
                mean = sums[there, c, column] / sums[there, c, 0]
                marker = "o" if len(mean) == 1 else ""
                panel.plot(steps[there], mean, marker=marker, color=colors(rank), alpha=alpha)
            panel.set_title(f"{name} weight")
            panel.set_xlabel("training calls of the criterion")
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("class mean" + (f", over {calls} calls" if calls > 1 else ""))

        ranks = np.unique(np.linspace(0, classes - 1, min(classes, 11)).round().astype(int))
        bar = figure.colorbar(
            ScalarMappable(BoundaryNorm(np.arange(classes + 1) - 0.5, classes), colors),
            ax=panels,
            ticks=ranks,
            label=f"class ({unit}), head to tail",
        )
        bar.ax.set_yticklabels([f"{c} ({frequency[c]:.0f})" for c in head_to_tail[ranks]])
        bar.ax.tick_params(length=0)
        bar.ax.minorticks_off()
        bar.ax.invert_yaxis()
        figure.savefig(path, dpi=150)

    def state_dict(self) -> dict[str, Any]:
        """The whole record, with its tensors on the CPU."""
        return {
            "num_classes": self._num_classes,
            "calls": self._calls,
            "open_calls": self._open_calls,
            "open": None if self._open is None else self._open.cpu().clone(),
            "rows": self._rows(),
            "steps": torch.tensor(self._steps, dtype=torch.long),
            "meta": self._meta.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the record of an earlier run.

        Args:
            state: what :meth:`state_dict` returned there.

        Raises:
            ValueError: a record with another number of classes, or of terms.
        """
        classes = state["num_classes"]
        if None not in (classes, self._num_classes) and classes != self._num_classes:
            raise ValueError(
                f"The state records {classes} classes, expected {self._num_classes}: make this "
                "WeightHistory with the num_classes of the saved one."
            )
        rows = state["rows"].cpu()
        if len(rows) and rows.shape[2] != 1 + len(self._names):
            raise ValueError(
                f"The state records {rows.shape[2] - 1} terms, expected {len(self._names)}: give "
                f"WeightHistory a criterion with the terms of the saved one, not {self._names}."
            )
        self._num_classes = self._num_classes or classes
        self._calls = state["calls"]
        self._open_calls = state["open_calls"]
        self._open = None if state["open"] is None else state["open"].clone()
        self._waiting = []
        self._fetched = rows.view(len(rows), self._num_classes or 0, 1 + len(self._names))
        self._steps = state["steps"].tolist()
        if "meta" in state:  # states of before 1.0 have none
            self._meta.load_state_dict(state["meta"])

    def _record(
        self, criterion: WeightedKDLoss, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor
    ) -> None:
        if not (criterion.training and torch.is_grad_enabled()):
            return
        call = dict(zip(("student_logits", "teacher_logits", "targets"), args)) | kwargs
        targets = call["targets"]
        class_dim = criterion.class_dim_of(call["student_logits"], targets)
        classes = call["student_logits"].shape[class_dim]
        if self._num_classes is None:
            self._num_classes = classes
            self._fetched = torch.zeros(0, classes, 1 + len(self._names))
        if classes > self._num_classes:
            raise ValueError(
                f"The logits have {classes} classes, expected {self._num_classes} at most: give "
                "WeightHistory that num_classes, or none."
            )
        if targets.is_floating_point():
            labels = targets.argmax(class_dim).flatten()
            kept = torch.ones_like(labels, dtype=torch.bool)
        else:
            labels = targets.flatten().long()
            kept = labels != criterion.ignore_index
        # Ignored positions go to class 0 as zeros: picking the others out would wait for the GPU.
        added = torch.cat((kept.unsqueeze(1), criterion.weights.float()), dim=1)
        if self._open is None:
            self._open = added.new_zeros(self._num_classes, added.shape[1])
        self._open = self._open.to(added.device)
        self._open.index_add_(0, labels.masked_fill(~kept, 0), added)
        self._calls += 1
        self._open_calls += 1
        if self._open_calls >= self._every:
            self._waiting.append(self._open)
            self._steps.append(self._calls)
            self._open, self._open_calls = None, 0

    def _rows(self) -> Tensor:
        """All full rows, [R, C, 3] on the CPU."""
        if self._waiting:
            waiting = torch.stack(self._waiting).cpu()
            self._fetched = torch.cat((self._fetched, waiting))
            self._waiting = []
        return self._fetched


def _plain(array: np.ndarray) -> list[Any]:
    """Nested lists; None for what is not finite, and a float32 by its own few digits."""
    if array.ndim > 1:
        return [_plain(row) for row in array]
    if array.dtype.kind != "f":
        return array.tolist()
    return [float(str(x)) if finite else None for x, finite in zip(array, np.isfinite(array))]
