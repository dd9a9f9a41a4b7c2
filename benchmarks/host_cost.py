"""What a bilevel step costs the host, as ratios to a step of plain distillation.

    python benchmarks/host_cost.py

The students are so small that arithmetic is nothing, which is how an accelerator sees a larger one:
it waits for the host. Every step of a row is taken beside one of plain KD, on one thread, and a
sample is the mean over a whole window of `every` steps. CPU time is that of the process, which
other work on the machine hardly changes. Operators are those that compute (no views): on an
accelerator each is at least one launch. Results go to a JSON file and a table under
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from stepcost.case import Case
from stepcost.measure import in_turns
from stepcost.models import MODELS
from stepcost.operators import computing_operators
from stepcost.results import environment
from stepcost.rows import ROWS, row

STUDENTS = {
    "tiny_resnet8x4": "resnet8x4 on two 8×8 images",
    "tiny_depthwise": "depthwise-separable CNN with batch norm on two 8×8 images",
    "tiny_transformer": "transformer of 4 layers with AdamW on two sequences of 8 tokens",
}
TARGETS = {"online": 3.5, "online_16": None, "unroll_4_16": 1.6, "default": 1.2, "no_meta": 1.02}
OUT = Path(__file__).parent / "results" / "host_cost.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--students", nargs="+", default=list(STUDENTS), choices=STUDENTS)
    add("--rows", nargs="+", default=list(TARGETS), choices=TARGETS)
    add("--repeats", type=int, default=200, help="samples of a row whose every step is alike")
    add("--warmup", type=int, default=3, help="samples thrown away before")
    add("--out", type=Path, default=OUT, help="the JSON file; the table lies beside it")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data: dict[str, Any] = {
        "settings": {"repeats": args.repeats, **environment("cpu")},
        "students": {name: _measure(name, args) for name in args.students},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n")
    table = markdown(data)
    args.out.with_suffix(".md").write_text(table)
    print(table)


def _measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Ratios and operators of every row on one student."""
    batch = MODELS[model].batch
    case = Case(model, batch=batch, meta_batch=batch)
    rows: dict[str, Any] = {"kd": {"operators": _operators(case, "kd")}}
    gc.collect()
    gc.disable()  # a collection takes as long as some steps, and falls anywhere
    try:
        for name in args.rows:
            rows[name] = in_turns(case, name, args.repeats, args.warmup)
            gc.collect()
        if "online" in args.rows:
            checked = in_turns(case, "online", args.repeats, args.warmup, "online_unchecked")
            rows["online"]["invariants"] = checked["cpu_ratio"]
    finally:
        gc.enable()
    for name in args.rows:
        rows[name]["operators"] = _operators(case, name)
    return rows


def _operators(case: Case, name: str) -> float:
    """Operators of one step, the mean over a window."""
    of = row(name)(case)
    train, meta = case.draw(0), case.draw(0, meta=True)
    for _ in range(2 * of.period):  # the first meta update tries things out
        of.step(train, meta)
    counts = [computing_operators(lambda: of.step(train, meta)) for _ in range(of.period)]
    return statistics.fmean(counts)


def markdown(data: dict[str, Any]) -> str:
    """A table for each student."""
    settings = data["settings"]
    versions = ", ".join(f"{k} {v}" for k, v in settings["versions"].items() if v)
    tables = [_table(STUDENTS[name], rows) for name, rows in data["students"].items()]
    where = f"{settings['machine']}, 1 thread; {versions}."
    return "\n\n".join([*tables, where, "Measured by `python benchmarks/host_cost.py`."]) + "\n"


def _table(title: str, rows: dict[str, Any]) -> str:
    base = rows["kd"]["operators"]
    lines = [
        f"{title[0].upper()}{title[1:]}; ratios to plain KD, medians (quartiles):",
        "",
        "| training step | time | CPU time | operators | goal for time |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| {ROWS['kd'].title} | 1 | 1 | {base:.0f} | |",
    ]
    for name, found in rows.items():
        if name == "kd":
            continue
        goal = f"≤ {TARGETS[name]}" if TARGETS[name] else ""
        operators = f"{found['operators'] / base:.2f} ({found['operators']:.0f})"
        times = [_spread(found[key]) for key in ("ratio", "cpu_ratio")]
        lines.append(f"| {ROWS[name].title} | {' | '.join(times)} | {operators} | {goal} |")
    if "invariants" in rows.get("online", {}):
        found = rows["online"]["invariants"]
        median, low, high = (100 * (x - 1) for x in (found["median"], *found["quartiles"]))
        share = f"{median:.1f} % ({low:.1f}–{high:.1f})"
        lines += ["", f"The invariants take {share} of an online step."]
    return "\n".join(lines)


def _spread(spread: dict[str, Any]) -> str:
    low, high = spread["quartiles"]
    return f"{spread['median']:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    main()
