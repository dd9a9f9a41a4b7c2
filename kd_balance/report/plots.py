"""The plots of a report: what each shows, and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from kd_balance.report.record import Record
from kd_balance.report.stretches import stretches

_WIDTH = 4.0  # inches, so that its text has the page's own size on a phone
_LABELS = 12  # of classes at an axis, so that none overlap
_CALLS, _STEPS = "training calls of the criterion", "student steps"
_WIDE = 30  # from which ratio of the largest to the smallest number on an axis is logarithmic
_SHORT = EngFormatter(sep="")  # 250k rather than 250000
_CAUSES = {
    "skipped_by_replay": "repeated call differs",
    "skipped_by_weights": "repeated weights differ",
    "skipped_by_factor": "factor moves with weights",
    "skipped_by_step": "step differs from formula",
    "skipped_by_window": "parameters moved between steps",
    "skipped_by_gradient": "gradients were changed",
    "skipped_by_ranks": "processes differ",
}


@dataclass(frozen=True)
class Plot:
    """A picture with its title, a sentence about it, and the numbers that it shows."""

    title: str
    note: str
    columns: dict[str, np.ndarray]  # [points] each, by their names
    draw: Callable[[Figure], None]
    size: tuple[float, float] = (_WIDTH, 2.6)  # inches


def plots(record: Record) -> Iterator[Plot]:
    """Those that the record has numbers for, in the order of the page."""
    for name in record.weights:
        yield _by_group(record, name)
    for name in record.weights:
        yield _by_class(record, name)
    if len(record.meta["step"]):
        yield _meta_curve(record, "meta_loss", "Meta loss", "Loss on the balanced meta set.")
        yield _meta_curve(
            record, "hypergradient_norm", "Hypergradient norm",
            "Size of the meta loss's derivative by the weight net's parameters.",
        )
        if record.meta["skipped"].any():
            yield _skipped(record)


def groups(record: Record) -> dict[str, np.ndarray]:
    """Thirds of the classes from the most frequent to the rarest; all of fewer than three."""
    order = np.argsort(-record.frequency, kind="stable")
    third = len(order) // 3
    if third == 0:
        return {"all": order}
    last = len(order) - third
    return {"many": order[:third], "medium": order[third:last], "few": order[last:]}


def _by_group(record: Record, name: str) -> Plot:
    step, count, total = _condensed(record, name)
    columns = {"step": step}
    for group, classes in groups(record).items():
        columns[group] = _ratio(total[:, classes].sum(1), count[:, classes].sum(1))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for group in groups(record):
            shown = np.isfinite(columns[group])  # a line goes on over gaps
            axes.plot(step[shown], columns[group][shown], label=group, marker=_marker(shown))
        axes.set_ylabel("mean weight")
        axes.set_xlabel(_CALLS)
        _plain_axes(figure)
        figure.legend(loc="outside upper left", ncols=3)

    ranges = [
        f"{group}: {_range(record.frequency[classes])}" for group, classes in groups(record).items()
    ]
    unit = _unit(record)
    note = f"Mean over the samples of each third of the classes, by {unit} ({'; '.join(ranges)})."
    return Plot(f"{_capital(name)} weight by class frequency", note + _calls_of_a_point(record),
                columns, draw)


def _by_class(record: Record, name: str) -> Plot:
    step, count, total = _condensed(record, name)
    mean = _ratio(total, count)
    order = np.argsort(-record.frequency, kind="stable")
    classes = len(order)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        edges = np.append(0, step), np.arange(classes + 1) - 0.5
        mesh = axes.pcolormesh(*edges, mean.T[order], rasterized=True)
        figure.colorbar(mesh, ax=axes, label="mean weight").outline.set_visible(False)
        ranks = np.linspace(0, classes - 1, min(classes, _LABELS)).round().astype(int)
        axes.set_yticks(ranks, [f"{c} ({_short(record.frequency[c])})" for c in order[ranks]])
        axes.invert_yaxis()
        axes.set_ylabel(f"class ({_unit(record)})")
        axes.set_xlabel(_CALLS)
        _plain_axes(figure)
        axes.grid(False)
        axes.tick_params(length=0, pad=6)

    note = "Mean over the samples of each class, the most frequent on top; blank where none came."
    return Plot(
        f"{_capital(name)} weight of every class", note + _calls_of_a_point(record),
        {"step": step, **{f"class {c}": mean[:, c] for c in range(classes)}}, draw,
        (_WIDTH, 1.1 + 0.2 * min(max(classes, 6), _LABELS)),
    )


def _meta_curve(record: Record, key: str, title: str, note: str) -> Plot:
    starts, ends = stretches(len(record.meta["step"]))
    step, values = record.meta["step"][ends - 1], record.meta[key]
    finite = np.isfinite(values)
    total = np.add.reduceat(np.where(finite, values, 0), starts)
    mean = _ratio(total, np.add.reduceat(finite, starts, dtype=int))
    if not finite.all():
        note += f" Those that are not finite ({(~finite).sum()}) are left out."

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shown = np.isfinite(mean)
        axes.plot(step[shown], mean[shown], marker=_marker(shown))
        axes.set_ylabel(title.lower())
        axes.set_xlabel(_STEPS)
        wide = shown.any() and mean[shown].min() > 0
        if wide and mean[shown].max() > _WIDE * mean[shown].min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.minorticks_off()
        _plain_axes(figure)

    note += _pooled(len(values), len(values), "hypergradients")
    return Plot(title, note, {"step": step.astype(int), key: mean}, draw)


def _skipped(record: Record) -> Plot:
    starts, ends = stretches(len(record.meta["step"]))
    step = record.meta["step"][ends - 1].astype(int)
    causes = {name: column > 0 for name, column in record.meta.items() if name in _CAUSES}
    known = np.any(list(causes.values()), axis=0) if causes else np.zeros(len(record.meta["step"]))
    others = (record.meta["skipped"] > 0) & ~known.astype(bool)
    if others.any():
        several = record.settings.get("processes", "1") != "1"
        causes[f"not finite{', or on another process' if several else ''}"] = others
    totals = {
        _CAUSES.get(name, name): column.cumsum()[ends - 1] for name, column in causes.items()
    }

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for cause, total in totals.items():
            axes.step(np.append(0, step), np.append(0, total), where="post", label=cause)
        axes.set_ylabel("skipped so far")
        axes.set_xlabel(_STEPS)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        _plain_axes(figure)
        figure.legend(loc="outside upper left", ncols=1)

    skipped = record.meta["skipped"]
    note = f"{skipped.sum():.0f} of {len(skipped)} hypergradients were skipped, by their causes."
    return Plot("Skipped updates", note, {"step": step, **totals}, draw,
                (_WIDTH, 2.6 + 0.2 * len(totals)))


def _condensed(record: Record, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each stretch its last step [S], and samples and summed weights of each class [S, C]."""
    starts, ends = stretches(len(record.step))
    total = np.where(record.count > 0, record.weights[name], 0) * record.count
    count = np.add.reduceat(record.count, starts)
    return record.step[ends - 1], count, np.add.reduceat(total, starts)


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return total / count


def _plain_axes(figure: Figure) -> None:
    axes = figure.axes[0]
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(_SHORT)
    axes.spines[:].set_visible(False)
    axes.grid(True)


def _marker(shown: np.ndarray) -> str:
    return "o" if shown.sum() == 1 else ""


def _unit(record: Record) -> str:
    return "times seen" if record.class_counts is None else "training samples"


def _short(number: float) -> str:
    return f"{number:.0f}" if number < 1e5 else _SHORT(round(number, -4))


def _range(frequency: np.ndarray) -> str:
    low, high = frequency.min(), frequency.max()
    return _short(low) if low == high else f"{_short(low)} to {_short(high)}"


def _calls_of_a_point(record: Record) -> str:
    return _pooled(len(record.step), record.step[-1], "calls")


def _pooled(rows: int, spanned: int, unit: str) -> str:
    """What a point is the mean of, where a record is too long for a point of each row."""
    points = len(stretches(rows)[0])
    about = f"{spanned / points:,.0f}"
    return "" if points == rows else f" A point is the mean over about {about} {unit}."


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]
