"""Draw the README's picture out of the results: accuracy of frequent and of rare classes.

    python benchmarks/at_a_glance.py
"""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from longtail.results import read

RESULTS = Path(__file__).parent / "results/two-lines.jsonl"
PICTURE = Path(__file__).parent.parent / "docs/at_a_glance.png"
DATA = {"imbalance": 100, "teacher": "biased"}
METHODS = {  # a row of the results: its name here, its colour
    "kd": ("plain KD", "#b8bfc6"),
    "bs+kd+meta:debias=1": ("the same losses, fixed weights", "#6fb3dc"),
    "bikd": ("the two lines", "#d55e00"),
}
GROUPS = {
    "many": "most frequent third\nof the classes",
    "medium": "medium third",
    "few": "rarest third",
    "overall": "all classes",
}


def main() -> None:
    rows = [row for row in read(RESULTS) if DATA.items() <= row.items()]
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(METHODS)
    for i, (method, (name, color)) in enumerate(METHODS.items()):
        tests = [row["test"] for row in rows if row["method"] == method]
        places = [g + (i - 1) * width for g in range(len(GROUPS))]
        heights = [statistics.fmean(test[group] for test in tests) for group in GROUPS]
        bars = axes.bar(places, heights, 0.94 * width, color=color, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.set_xticks(range(len(GROUPS)), list(GROUPS.values()))
    axes.tick_params(length=0)
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 75)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(METHODS), frameon=False)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
