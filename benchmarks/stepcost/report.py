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
    dtypes = list(dict.fromkeys((case["dtype"], "float64")))
    lines = [
        f"{title(case, rows)}; ratios to plain KD, medians (quartiles):",
        "",
        "| training step | time | CPU time | peak memory | with freed memory returned at once "
        f"| error of the hypergradient in {', '.join(dtypes)} |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted(rows, key=list(ROWS).index):
        found = rows[name]
        if "failed" in found:
            lines.append(f"| {found['title']} | {found['failed']} | | | | |")
            continue
        time = found.get("time", {})
        errors = [found.get("error", {}).get(dtype) for dtype in dtypes]
        cells = [
            found["title"],
            "1" if name == "kd" else _spread(time.get("ratio")),
            "1" if name == "kd" else _spread(time.get("cpu_ratio")),
            *(_memory(rows, name, kind) for kind in ("default", "returned")),
            ", ".join(f"{error['median']:.0e}" for error in errors if error),
        ]
        lines.append(f"| {' | '.join(cells)} |")
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


def memory_ratio(rows: dict[str, dict[str, Any]], name: str, kind: str) -> float | None:
    """Peak memory over that of plain KD, what import and construction take being left out."""
    own, base = (rows.get(row, {}).get("memory", {}).get(kind) for row in (name, "kd"))
    return own["median"] / base["median"] if own and base else None


def _memory(rows: dict[str, dict[str, Any]], name: str, kind: str) -> str:
    ratio = memory_ratio(rows, name, kind)
    if ratio is None:
        return ""
    return f"{ratio:.2f} ({rows[name]['memory'][kind]['median'] / MIB:.0f} MiB)"


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
            memory = memory_ratio(rows, name, "returned") or memory_ratio(rows, name, "default")
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
        returned = memory_ratio(rows, "kd", "returned") is not None
        suffix = ", freed memory returned at once" if returned else ""
        axis.set(xlabel="time / plain KD", ylabel=f"peak memory / plain KD{suffix}")
        axis.set_title(title(held["case"], rows), fontsize=8)
        axis.margins(0.2)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
