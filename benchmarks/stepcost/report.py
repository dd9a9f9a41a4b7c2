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
    """Time and memory of every row, a line of panels for each case; of a sweep, over its values."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    swept, cases = data["settings"].get("swept"), data["cases"]
    lines = 1 if swept else len(cases)
    most = max(len(held["rows"]) for held in cases)
    size = (11, 4.5) if swept else (11, lines * (1.2 + 0.32 * most))
    figure, axes = plt.subplots(lines, 2, figsize=size, squeeze=False, layout="constrained")
    if swept:
        _lines(axes[0], cases, swept)
    else:
        for pair, held in zip(axes, cases):
            _bars(pair, held["case"], held["rows"])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _kind(rows: dict[str, dict[str, Any]]) -> str:
    """The allocator whose figures are drawn."""
    return "default" if memory_ratio(rows, "kd", "returned") is None else "returned"


def _lines(axes: Any, cases: list[dict[str, Any]], swept: str) -> None:
    kind = _kind(cases[0]["rows"])
    names = dict.fromkeys(name for held in cases for name in held["rows"] if name != "kd")
    for name in sorted(names, key=list(ROWS).index):
        times, memories = [], []
        for held in cases:
            rows, x = held["rows"], held["case"][swept]
            if "time" in rows.get(name, {}):
                ratio = rows[name]["time"]["ratio"]
                times.append((x, ratio["median"], *ratio["quartiles"]))
            if (memory := memory_ratio(rows, name, kind)) is not None:
                memories.append((x, memory))
        if times:
            x, median, low, high = zip(*times)
            (line,) = axes[0].plot(x, median, "o-", label=ROWS[name].title)
            axes[0].fill_between(x, low, high, alpha=0.2, color=line.get_color())
        if memories:
            axes[1].plot(*zip(*memories), "o-", label=ROWS[name].title)
    values = [held["case"][swept] for held in cases]
    for axis, label in zip(axes, ("time", "peak memory")):
        axis.set(xscale="log", xlabel=swept.replace("_", " "), ylabel=f"{label} / plain KD")
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.set_xticks([], minor=True)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    sizes = {**cases[0]["case"], **({swept: "…"} if swept != "unroll" else {"unroll": 1})}
    axes[0].set_title(title(sizes, {}), fontsize=8, loc="left")


def _bars(axes: Any, case: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    kind = _kind(rows)
    names = [name for name in sorted(rows, key=list(ROWS).index) if "failed" not in rows[name]]
    if not names:
        return
    colours = [
        {"ours": "tab:blue", "plain": "black"}.get(ROWS[name].module, "tab:orange")
        for name in names
    ]
    alone = {"median": 1.0, "quartiles": (1.0, 1.0)}
    times = [rows[name].get("time", {}).get("ratio", alone) for name in names]
    medians = [time["median"] for time in times]
    errors = [
        [time["median"] - time["quartiles"][0] for time in times],
        [time["quartiles"][1] - time["median"] for time in times],
    ]
    memories = [memory_ratio(rows, name, kind) or 0.0 for name in names]
    titles = [ROWS[name].title for name in names]
    for axis, values, spread in ((axes[0], medians, errors), (axes[1], memories, None)):
        bars = axis.barh(titles, values, xerr=spread, color=colours, alpha=0.8, ecolor="gray")
        axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=4, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * max(values))
        axis.grid(alpha=0.3, axis="x")
        axis.tick_params(labelsize=8)
    axes[1].set_yticklabels([])
    suffix = ", freed memory returned at once" if kind == "returned" else ""
    axes[0].set_xlabel("time / plain KD")
    axes[1].set_xlabel(f"peak memory / plain KD{suffix}")
    axes[0].set_title(title(case, rows), fontsize=9, loc="left")
