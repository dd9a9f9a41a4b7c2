"""Figures: accuracy by class frequency, learned weights by class over time, cost and accuracy."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

from longtail.paired import Record  # noqa: E402
from longtail.table import Group, cost, grouped  # noqa: E402

SHOWN = (
    "kd",
    "bkd",
    "bs+kd",
    "bikd-online",
    "bs+kd+meta:debias=1,hard=1,soft=1",
    "bs+bikd-online:debias=1,with_meta=1,unroll=4,every=4,"
    "features=student_ce+teacher_ce+frequency",
    "bs+bikd-online:debias=1,with_meta=1,scale=2,unroll=4,every=4,"
    "features=student_ce+teacher_ce+frequency",
    "bs+bikd-online:debias=1,with_meta=1,unroll=4,every=4,mean=0.25,ratio=10,"
    "features=student_ce+teacher_ce+frequency",
)
"""The methods whose accuracy is drawn class by class, beside the best one of all seeds."""


def draw(records: Sequence[Record], split: str, stem: Path) -> list[Path]:
    """Draws what the results allow.

    Args:
        records: results with that split.
        split: "test" or "validation".
        stem: path that the figures' names begin with.

    Returns:
        The files written.
    """
    tables = grouped(records)
    paths = []
    for group, methods in tables.items():
        if group.teacher == "none":
            continue
        both = {**methods, **tables.get(group._replace(teacher="none"), {})}
        teacher = Path(group.teacher).stem
        name = f"{stem.name}-{group.dataset}-{group.imbalance:g}-{teacher}"
        paths.append(_by_frequency(both, group, split, stem.with_name(f"{name}-classes.png")))
        paths.append(_cost_and_accuracy(both, group, split, stem.with_name(f"{name}-cost.png")))
        learned = {m: rows for m, rows in methods.items() if any(r.get("weights") for r in rows)}
        if learned:
            paths.append(_weights(learned, group, stem.with_name(f"{name}-weights.png")))
    return paths


def _short(method: str) -> str:
    """A method's name without what goes without saying."""
    name, _, options = method.partition(":")
    options = options.replace("features=student_ce+teacher_ce", "")
    options = re.sub(r"unroll=(\d+),every=\1", r"unroll=\1", options)
    words = options.replace("+tuned-adjustment", ",tuned-adjustment").split(",")
    switches = {"debias=1": "debias", "with_meta=1": "with_meta"}
    return " ".join([name, *(switches.get(word, word) for word in words if word)])


def _title(group: Group) -> str:
    return f"{group.data}, teacher {group.teacher}"


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def _overall(rows: Sequence[Record], split: str) -> float:
    return statistics.fmean(row[split]["overall"] for row in rows)


def _by_frequency(methods: dict[str, list[Record]], group: Group, split: str, path: Path) -> Path:
    most = max(len(rows) for rows in methods.values())
    complete = [method for method, rows in methods.items() if len(rows) == most]
    best = max(complete, key=lambda method: _overall(methods[method], split))
    shown = [method for method in SHOWN if method in methods and method != best] + [best]
    figure, axes = plt.subplots(figsize=(8, 5))
    for method in shown:
        rows = methods[method]
        counts = rows[0]["class_counts"]
        per_class = [statistics.fmean(c) for c in zip(*(row[split]["per_class"] for row in rows))]
        by_count = sorted(zip(counts, per_class), reverse=True)
        width = 2.4 if "bikd" in method else 1.4
        label = f"{_short(method)} ({_overall(rows, split):.1f} overall)"
        axes.plot(*zip(*by_count), marker="o", markersize=4, linewidth=width, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_xaxis()
    axes.set_xlabel("training samples of the class")
    axes.set_ylabel(f"{split} accuracy of the class (%)")
    axes.set_title(_title(group))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return _save(figure, path)


def _cost_and_accuracy(
    methods: dict[str, list[Record]], group: Group, split: str, path: Path
) -> Path:
    overall = {method: _overall(rows, split) for method, rows in methods.items()}
    drawn = {m: rows for m, rows in methods.items() if overall[m] > 0.5 * max(overall.values())}
    left_out = [_short(method) for method in methods if method not in drawn]
    figure, panels = plt.subplots(
        1,
        2,
        figsize=(18, 7),
        sharex=True,
        # room for the names beside each panel
        gridspec_kw={"wspace": 1.6, "left": 0.05, "right": 0.72},
    )
    unit = cost(methods["kd"]) if "kd" in methods else 1.0
    for axes, column in zip(panels, ("overall", "few")):
        points = []
        for method, rows in drawn.items():
            values = [row[split][column] for row in rows]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            x, y = cost(rows) / unit, statistics.fmean(values)
            colour = "tab:red" if "bikd" in method else "tab:blue"
            axes.errorbar(x, y, deviation, fmt="o", color=colour, markersize=4, alpha=0.7)
            points.append((x, y, method))
        axes.set_xscale("log")
        axes.set_xlim(0.85 * min(p[0] for p in points), 1.2 * max(p[0] for p in points))
        left, right = axes.get_xlim()
        ticks = [tick for tick in (0.5, 1, 2, 3, 5, 10, 20) if left <= tick <= right]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        _label(axes, _worth_naming(points))
        axes.set_xlabel("training time, KD = 1" if "kd" in methods else "seconds of a run")
        axes.set_ylabel(f"{split} accuracy, {column} (%)")
        axes.grid(alpha=0.3, which="both")
    note = f"; not drawn, near chance: {', '.join(left_out)}" if left_out else ""
    title = (
        f"{_title(group)}: cost and accuracy (BiKD in red; named: the best for their cost, the ten "
        f"best, and those drawn by class{note})"
    )
    figure.suptitle(textwrap.fill(title, 150), y=0.9, va="bottom")
    return _save(figure, path)


Point = tuple[float, float, str]
"""Cost, accuracy and method."""


def _worth_naming(points: list[Point]) -> list[Point]:
    """By rising accuracy: those that nothing cheaper outdoes, the ten best, and SHOWN."""
    rising = sorted(points, key=lambda point: point[1])
    return [
        (x, y, method)
        for rank, (x, y, method) in enumerate(rising)
        if len(rising) - rank <= 10
        or method in SHOWN
        or all(other > x for other, _, _ in rising[rank + 1 :])
    ]


def _label(axes: Axes, points: list[Point]) -> None:
    """Writes the names in a column beside the panel, in the order of the points."""
    low, high = axes.get_ylim()
    gap = (high - low) / 28
    heights: list[float] = []
    for _, y, _ in points:
        heights.append(max([y, *(height + gap for height in heights[-1:])]))
    for from_top, at in enumerate(reversed(range(len(points)))):
        heights[at] = min(heights[at], high - from_top * gap)
    for (x, y, method), height in zip(points, heights, strict=True):
        axes.annotate(
            _short(method),
            (x, y),
            (1.02, height),
            textcoords=axes.get_yaxis_transform(),
            fontsize=7,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "alpha": 0.25, "linewidth": 0.6, "relpos": (0, 0.5)},
        )


def _weights(methods: dict[str, list[Record]], group: Group, path: Path) -> Path:
    """Of each method's first seed: hard weights, soft ones below, eight methods side by side."""
    names = sorted(methods)
    columns = min(len(names), 8)
    bands = -(-len(names) // columns)
    figure, panels = plt.subplots(
        2 * bands, columns, figsize=(2.2 * columns + 1.2, 5 * bands), sharex=True, sharey="row",
        squeeze=False, layout="constrained",
    )
    for axes in panels.flat:
        axes.set_visible(False)
    colours = plt.get_cmap("viridis_r")
    for position, method in enumerate(names):
        record = next(row for row in methods[method] if row.get("weights"))
        counts = record["class_counts"]
        by_count = sorted(range(len(counts)), key=lambda c: -counts[c])
        band, column = divmod(position, columns)
        for row, kind in enumerate(("hard", "soft")):
            axes = panels[2 * band + row][column]
            axes.set_visible(True)
            for rank, c in enumerate(by_count):
                epochs = [epoch for epoch, _ in record["weights"]]
                values = [means[c][row] for _, means in record["weights"]]
                share = rank / max(1, len(counts) - 1)
                axes.plot(epochs, values, color=colours(share), linewidth=1)
            axes.grid(alpha=0.3)
            axes.tick_params(labelbottom=True)
            if row == 0:
                axes.set_title(textwrap.fill(_short(method), 22), fontsize=8)
            else:
                axes.set_xlabel("epoch", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"mean {kind} weight")
    for row in panels:
        highest = max(max(line.get_ydata()) for axes in row for line in axes.lines)
        row[0].set_ylim(0, 1.02 * max(1, highest))
    scale = plt.cm.ScalarMappable(cmap=colours, norm=plt.Normalize(0, 1))
    bar = figure.colorbar(scale, ax=panels.ravel().tolist(), ticks=[0, 1], fraction=0.03, pad=0.01)
    bar.ax.set_yticklabels(["most\nfrequent", "rarest"], fontsize=8)
    figure.suptitle(f"{_title(group)}: learned weights by class, first seed")
    return _save(figure, path)
