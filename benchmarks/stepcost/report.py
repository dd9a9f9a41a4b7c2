"""The table and the figures of a results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepcost.rows import ROWS

MIB = 2**20


def markdown(data: dict[str, Any]) -> str:
    """A table for each case, with what it was measured on and the command that repeats it."""
    settings = data["settings"]
    versions = ", ".join(f"{k} {v}" for k, v in settings["versions"].items() if v)
    threads = f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"
    where = settings["machine"] + (f", {threads}" if settings["device"] == "cpu" else "")
    parts = [_table(held["case"], held["rows"]) for held in data["cases"]]
    commands = "\n".join(f"    {command}" for command in dict.fromkeys(data["commands"]))
    return "\n\n".join([*parts, f"{where}; {versions}.", f"Measured by\n\n{commands}"]) + "\n"


def _table(case: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{title(case, rows)}; ratios to plain KD, medians (quartiles):",
        "",
        "| training step | time | CPU time | peak memory | error of the hypergradient |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted(rows, key=list(ROWS).index):
        found = rows[name]
        if "failed" in found:
            lines.append(f"| {found['title']} | {found['failed']} | | | |")
        elif name == "kd":
            lines.append(f"| {found['title']} | 1 | 1 | {_memory(found, rows)} | |")
        else:
            error = found["relative_error"] and found["relative_error"]["median"]
            lines.append(
                f"| {found['title']} | {_spread(found.get('time', {}).get('ratio'))} "
                f"| {_spread(found.get('time', {}).get('cpu_ratio'))} "
                f"| {_memory(found, rows)} | {'' if error is None else f'{error:.0e}'} |"
            )
    return "\n".join(lines)


def title(case: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """The case in words."""
    parameters = rows.get("kd", {}).get("memory", {}).get("parameters")
    size = f" ({parameters / 1e6:.3g} M parameters)" if parameters else ""
    unroll = f", unroll {case['unroll']}" if case["unroll"] > 1 else ""
    layout = ", channels_last" if case["channels_last"] else ""
    return (
        f"{case['model']}{size}, batch {case['batch']}, meta batch {case['meta_batch']}, "
        f"{case['classes']} classes{unroll}, {case['device']}, {case['dtype']}{layout}"
    )


def memory_ratio(found: dict[str, Any], rows: dict[str, dict[str, Any]]) -> float | None:
    """Peak memory over that of plain KD, what import and construction take being left out."""
    if "memory" not in found or "memory" not in rows.get("kd", {}):
        return None
    return _over_import(found) / _over_import(rows["kd"])


def _over_import(found: dict[str, Any]) -> float:
    return found["memory"]["over_import"]["median"]


def _memory(found: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    ratio = memory_ratio(found, rows)
    return "" if ratio is None else f"{ratio:.2f} ({_over_import(found) / MIB:.0f} MiB)"


def _spread(spread: dict[str, Any] | None) -> str:
    if spread is None:
        return ""
    low, high = spread["quartiles"]
    return f"{spread['median']:.2f} ({low:.2f}–{high:.2f})"


def draw(data: dict[str, Any], path: Path) -> None:
    """Time ratio against memory ratio, a panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = data["cases"]
    figure, axes = plt.subplots(
        1, len(cases), figsize=(6.5 * len(cases), 5), squeeze=False, layout="constrained"
    )
    for axis, held in zip(axes[0], cases):
        rows = held["rows"]
        for name in sorted(rows, key=list(ROWS).index):
            found = rows[name]
            memory = memory_ratio(found, rows)
            if memory is None or name == "kd" or "time" not in found:
                continue
            ratio = found["time"]["ratio"]
            low, high = ratio["quartiles"]
            median = ratio["median"]
            ours = "kd-balance" in found["title"]
            axis.errorbar(
                median,
                memory,
                xerr=[[median - low], [high - median]],
                fmt="o" if ours else "s",
                color="tab:blue" if ours else "tab:orange",
            )
            axis.annotate(
                found["title"].removeprefix("kd-balance "),
                (median, memory),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
            )
        axis.plot(1, 1, "k*", markersize=10)
        axis.annotate("plain KD", (1, 1), xytext=(5, -12), textcoords="offset points", fontsize=8)
        axis.set(xlabel="time / plain KD", ylabel="peak memory / plain KD")
        axis.set_title(title(held["case"], rows), fontsize=8)
        axis.margins(0.2)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
