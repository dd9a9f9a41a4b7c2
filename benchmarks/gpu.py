"""The step-cost table of one GPU: wall time, kernels, launches and memory of every row.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --dry --device cpu

Writes a JSON file and a table under ``benchmarks/results/gpu`` after every row, so that a run that
is cut off has lost nothing. A row that fails says so in the table. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch

from gpucost.measure import Steps, measure
from gpucost.students import STUDENTS, case
from gpucost.table import markdown
from stepcost.rows import ROWS

FOLDER = Path(__file__).parent / "results" / "gpu"
TABLE = ("kd", "online", "online_4", "default", "no_meta", "lookahead", "higher", "betty")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)
    given = sys.argv[1:] if arguments is None else arguments
    data: dict[str, Any] = {
        "machine": _machine(args.device),
        "command": " ".join(["python benchmarks/gpu.py", *given]),
        "dry": args.dry,
        "students": {},
    }
    stem = args.out or FOLDER / ("dry" if args.dry else "step_cost")
    stem.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        stem.with_suffix(".md").write_text(markdown(data))

    end = time.perf_counter() + args.minutes * 60
    share = args.minutes * 60 / len(args.students)
    for name in args.students:
        left = min(end - time.perf_counter(), share * 1.5)
        _student(name, data, args, time.perf_counter() + left, write)
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    print(markdown(data))
    return data


def _student(name: str, data: dict, args: argparse.Namespace, end: float, write: Any) -> None:
    """All rows of a student until its time is over; a row that fails leaves the others alone."""
    setting = case(name, args.device, args.dry)
    rows: dict[str, Any] = {}
    data["students"][name] = {
        "title": STUDENTS[name].title,
        "batch": setting.batch,
        "rows": rows,
    }
    plain: Steps | None = None
    for index, row in enumerate(args.rows):
        rows[row] = entry = {"title": ROWS[row].title}
        left = end - time.perf_counter()
        if left <= 0:
            entry["failed"] = "no time left"
            continue
        start = time.perf_counter()
        try:
            plain = plain or Steps(setting, "kd")
            seconds = min(args.seconds, left / (len(args.rows) - index))
            measure(setting, row, plain, seconds, args.rounds, entry.update)
        except Exception as error:
            lines = f"{type(error).__name__}: {error}".splitlines()
            entry["failed"] = lines[0][:200]
        write()
        took = time.perf_counter() - start
        print(f"{name} {row}: {took:.1f} s {entry.get('failed', '')}", file=sys.stderr)


def _machine(device: str) -> dict[str, str]:
    machine = {"date": date.today().isoformat(), "torch": torch.__version__}
    git = "git", "-C", str(Path(__file__).parent)
    machine["commit"] = _output(*git, "rev-parse", "--short", "HEAD")
    if device.startswith("cuda"):
        machine["GPU"] = torch.cuda.get_device_name(device)
        machine["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"
        )
    else:
        machine["device"] = device
    return machine


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda")
    add("--students", nargs="+", choices=tuple(STUDENTS), default=list(STUDENTS))
    add("--rows", nargs="+", choices=tuple(ROWS), default=list(TABLE))
    add("--seconds", type=float, default=3.0, help="of a row's turns with plain KD, at most")
    add("--rounds", type=int, default=20, help="turns of a row, at most")
    add("--minutes", type=float, default=5.0, help="after which no further row begins")
    add("--dry", action="store_true", help="tiny students, to see that every row runs")
    add("--out", type=Path, help="the JSON file; the table lies beside it")
    return parser


if __name__ == "__main__":
    main()
