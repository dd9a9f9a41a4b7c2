"""The table in words, from the results' JSON."""

from __future__ import annotations

from typing import Any


def markdown(data: dict[str, Any]) -> str:
    """A heading, the machine, and one table for each student."""
    machine = ", ".join(f"{key} {value}" for key, value in data["machine"].items())
    lines = [
        "# What a step costs on a GPU",
        "",
        f"{machine}. `{data['command']}`.",
        "",
        "Ratios to plain KD, taken in turns with it: median (quartiles). Times, kernels and "
        "launches are of one step, averaged over whole periods; memory is the peak over what was "
        "allocated before the row.",
    ]
    if data["dry"]:
        lines += ["", "**A dry run with tiny students: the numbers mean nothing.**"]
    for student in data["students"].values():
        lines += [
            "",
            f"## {student['title']}, batch {student['batch']}",
            "",
            "| row | wall, × KD | wall, ms | kernels, ms | launches | memory, MiB |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [_line(row) for row in student["rows"].values()]
        lines += _amortised(student["rows"])
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    cells = [row["title"]]
    if ratio := row.get("ratio"):
        low, high = ratio["quartiles"]
        cells += [f"{ratio['median']:.2f} ({low:.2f}–{high:.2f})"]
        cells += [f"{1e3 * row['seconds']['median']:.2f}"]
    else:
        cells += [f"failed: {row['failed']}" if "failed" in row else "–", "–"]
    if kernels := row.get("kernels"):
        cells += [f"{1e3 * kernels['seconds']:.2f}", f"{kernels['launches']:.0f}"]
    else:
        cells += ["–", "–"]
    memory = row.get("memory")
    cells += ["–" if memory is None else f"{memory / 2**20:.0f}"]
    if "failed" in row and "ratio" in row:
        cells[0] += f" (then failed: {row['failed']})"
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _amortised(rows: dict[str, Any]) -> list[str]:
    lines = []
    for row in rows.values():
        if parts := row.get("amortised"):
            lines += [
                "",
                f"{row['title']}: a step outside the window {parts['outside']:.2f}×, one in it "
                f"{parts['window']:.2f}×, over the period of {row['period']} steps "
                f"{parts['ratio']:.3f}×.",
            ]
    return lines
