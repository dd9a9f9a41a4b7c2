"""Methods against one of them, seed by seed: what seeds share falls out of the difference."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]


class Gain(NamedTuple):
    """Differences over common seeds.

    Attributes:
        mean: nan without a common seed.
        deviation: standard deviation; None for fewer than two seeds.
        p: of the two-sided paired t test; None where the deviation is None or zero.
        seeds: their number.
    """

    mean: float
    deviation: float | None
    p: float | None
    seeds: int

    @property
    def p_value(self) -> str:
        return "" if self.p is None else f" (p = {self.p:.2g})"


def paired_gain(
    ours: Sequence[Record], reference: Sequence[Record], split: str, column: str
) -> Gain:
    """What `ours` have more than the reference."""
    known = {record["seed"]: record[split][column] for record in reference}
    gains = [r[split][column] - known[r["seed"]] for r in ours if r["seed"] in known]
    if len(gains) < 2:
        return Gain(gains[0] if gains else float("nan"), None, None, len(gains))
    mean, deviation = statistics.fmean(gains), statistics.stdev(gains)
    if len(set(gains)) == 1:
        return Gain(mean, deviation, None, len(gains))
    from scipy.stats import ttest_1samp

    return Gain(mean, deviation, float(ttest_1samp(gains, 0).pvalue), len(gains))


def against(
    reference: str, tables: Mapping[str, Mapping[str, Sequence[Record]]], split: str
) -> str:
    """Markdown: in every table that holds the reference, what the other methods have more.

    Args:
        reference: a method.
        tables: results by title and method.
        split: "test" or "validation".
    """
    lines = []
    for title, methods in tables.items():
        rest = dict(methods)
        base = rest.pop(reference, ())
        gains = {
            method: [paired_gain(rows, base, split, column) for column in ("overall", "few")]
            for method, rows in rest.items()
        }
        shared = [(method, gain) for method, gain in gains.items() if gain[0].seeds]
        if not shared:
            continue
        lines += [f"## {title}", "", f"Against `{reference}`, seed by seed.", ""]
        lines += ["| method | seeds | overall | few |", "|---|---:|---:|---:|"]
        for method, gain in sorted(shared, key=lambda item: -item[1][0].mean):
            cells = [method, str(gain[0].seeds), *(_text(g) for g in gain)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _text(gain: Gain) -> str:
    spread = "" if gain.deviation is None else f" ± {gain.deviation:.1f}"
    return f"{gain.mean:+.1f}{spread}{gain.p_value}"
