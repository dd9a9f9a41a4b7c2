"""Results to Markdown: mean ± standard deviation over seeds, and a paired test against KD."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from longtail.paired import Record, paired_gain
from longtail.plan import Run, not_run
from longtail.protocol import Protocol

COLUMNS = ("overall", "many", "medium", "few", "worst", "ece")
_TEACHERS = {
    "biased": "Teacher trained with cross entropy (biased)",
    "debiased": "Teacher trained with balanced softmax (debiased)",
    "none": "No teacher",
}


def _described(teacher: str) -> str:
    return _TEACHERS.get(teacher, f"Teacher {teacher}")


class Group(NamedTuple):
    """What belongs into one table."""

    dataset: str
    imbalance: float
    teacher: str
    label_noise: float = 0.0

    @property
    def data(self) -> str:
        noise = f", {self.label_noise:.0%} of the labels wrong" if self.label_noise else ""
        return f"{self.dataset}, imbalance {self.imbalance:g}{noise}"

    @property
    def title(self) -> str:
        return f"{self.data}: {_described(self.teacher)}"


def grouped(records: Sequence[Record]) -> dict[Group, dict[str, list[Record]]]:
    """Results by table and method, each sorted by seed; of a repeated seed the last counts."""
    tables: dict[Group, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        noise = record["settings"].get("label_noise", 0.0)
        group = Group(record["dataset"], record["imbalance"], record["teacher"], noise)
        tables[group][record["method"]][record["seed"]] = record
    order = list(_TEACHERS)
    names = sorted(
        tables, key=lambda g: (g.dataset, g.imbalance, (*order, g.teacher).index(g.teacher))
    )
    return {
        group: {
            method: [by_seed[seed] for seed in sorted(by_seed)]
            for method, by_seed in tables[group].items()
        }
        for group in names
    }


def markdown(
    records: Sequence[Record],
    split: str,
    source: str,
    pictures: Sequence[Path] = (),
    protocol: Protocol | None = None,
) -> str:
    """The whole report; what the protocol plans and the records lack stands at its end."""
    name = Path(source).stem
    results_by = f"`python benchmarks/long_tail.py --protocol {name} --data DATA`"
    lines = [f"# {name}: {split} accuracy by method", ""]
    if records:
        lines += [
            f"Made from `{source}` by `python benchmarks/report.py benchmarks/results/{source}`; "
            f"the results by {results_by}.",
            "",
            "Percent, mean ± standard deviation over seeds. Many, medium and few are the thirds of "
            "the classes by training samples, worst is the worst class, ECE the expected "
            "calibration error (lower is better). Gains are against KD with the same teacher "
            "(without a teacher: with the biased one) over common seeds, with the p-value of a "
            "paired t test. Cost is the processor time of the training loop in units of KD's; the "
            "teacher's logits are computed beforehand for all methods alike and are in none of "
            "these. Runs on a busier machine than KD's come out up to twice too high.",
            "",
        ]
    else:
        lines += [f"Nothing has been run; {results_by} does.", ""]
    tables = grouped(records)
    for group, methods in tables.items():
        with_kd = group if group.teacher != "none" else group._replace(teacher="biased")
        reference = tables.get(with_kd, {}).get("kd", [])
        lines += [f"## {group.title}", ""]
        lines += _teacher_line(methods)
        lines += _rows(methods, reference, split) + [""]
    if protocol is not None:
        lines += _not_run(not_run(protocol, records)) + [""]
    if records:
        lines += _settings(records) + [""]
    for picture in pictures:
        lines += [f"![{picture.stem}]({picture.name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(methods: dict[str, list[Record]], reference: list[Record], split: str) -> list[str]:
    heads = ("method", "seeds", *COLUMNS, "gain overall", "gain few", "cost")
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    ordered = sorted(
        methods.items(), key=lambda item: -statistics.fmean(r[split]["overall"] for r in item[1])
    )
    for method, rows in ordered:
        cells = [method, str(len(rows))]
        cells += [_mean_and_deviation([row[split][column] for row in rows]) for column in COLUMNS]
        cells += [_gain(method, rows, reference, split, column) for column in ("overall", "few")]
        cells.append(_cost(rows, reference))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _mean_and_deviation(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def _gain(
    method: str, rows: list[Record], reference: list[Record], split: str, column: str
) -> str:
    if method == "kd" or not reference:
        return ""
    gain = paired_gain(rows, reference, split, column)
    if not gain.seeds:
        return ""
    return f"{gain.mean:+.1f}{gain.p_value}"


def _cost(rows: list[Record], reference: list[Record]) -> str:
    if not reference:
        return ""
    return f"{cost(rows) / cost(reference):.1f}×"


def cost(rows: Sequence[Record]) -> float:
    """Seconds of a run: of the processor on a CPU, where others may run, of the clock on a GPU."""
    on_cpu = all(row["machine"]["device"] == "cpu" for row in rows)
    return statistics.median(row["cpu_seconds" if on_cpu else "seconds"] for row in rows)


def _teacher_line(methods: dict[str, list[Record]]) -> list[str]:
    found = next((rows[0] for rows in methods.values() if rows[0].get("teacher_metrics")), None)
    if found is None:
        return []
    metrics = found["teacher_metrics"]
    values = ", ".join(f"{column} {metrics[column]:.1f}" for column in COLUMNS)
    return [f"The teacher itself ({found['settings']['teacher']}): {values}.", ""]


def _not_run(runs: Sequence[Run]) -> list[str]:
    lines = ["## Planned and not run", ""]
    if not runs:
        return [*lines, "None: the plan is complete."]
    cells: dict[tuple[float, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        cells[run.imbalance, run.teacher][run.method].append(run.seed)
    for (imbalance, teacher), methods in cells.items():
        by_seeds: dict[str, list[str]] = defaultdict(list)
        for method, seeds in methods.items():
            by_seeds[", ".join(map(str, seeds))].append(f"`{method}`")
        for seeds, names in by_seeds.items():
            where = f"Imbalance {imbalance:g}. {_described(teacher)}"
            lines.append(f"- {where}. Seeds {seeds}: {', '.join(names)}.")
    return lines


def _settings(records: Sequence[Record]) -> list[str]:
    lines = ["## Settings", ""]
    shown = set()
    for record in records:
        text = ", ".join(
            f"{name} {value}"
            for name, value in record["settings"].items()
            # a share of none goes unsaid: older results do not name it
            if name != "imbalance" and value != [] and (name, value) != ("label_noise", 0)
        )
        versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
        machine = record["machine"]
        where = f"{machine['device']}, amp {machine['amp']}, compile {machine['compile']}"
        line = f"- {text}; {versions}; {where}"
        if line not in shown:
            shown.add(line)
            lines.append(line)
    return lines
