"""What a bilevel step costs in time and memory, as ratios to a step of plain distillation.

    python benchmarks/step_cost.py --model resnet8x4
    python benchmarks/step_cost.py --model mlp --sweep params

Results are added to a JSON file under ``benchmarks/results/step_cost``, beside a table and a
figure. What the file holds already is not measured again, so the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stepcost import report
from stepcost.case import Case
from stepcost.measure import hypergradient_errors, spread, times
from stepcost.memory import peak_memory
from stepcost.models import MODELS
from stepcost.results import FOLDER, Results
from stepcost.rows import ROWS

SWEEPS = {
    "unroll": ("unroll", (1, 2, 4, 8)),
    "batch": ("batch", (25, 50, 100, 200)),
    "meta-batch": ("meta_batch", (10, 25, 50, 100, 200)),
    "params": ("parameters", (10**5, 10**6, 10**7, 10**8)),
    "classes": ("classes", (10, 1_000, 100_000)),
}
SWEEP_ROWS = {"unroll": ("online", "unroll")}


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.sweep == "params" and args.model != "mlp":
        parser.error(f"--sweep params changes the size of --model mlp, not of {args.model}.")
    torch.set_num_threads(args.threads)
    batch = args.batch or MODELS[args.model].batch
    case = Case(
        model=args.model,
        batch=batch,
        meta_batch=args.meta_batch or batch,
        classes=args.classes,
        parameters=args.params,
        unroll=args.unroll,
        device=args.device,
        dtype=args.dtype,
        channels_last=args.channels_last,
    )
    cases, swept = [case], None
    if args.sweep:
        swept, values = SWEEPS[args.sweep]
        cases = [replace(case, **{swept: value}) for value in args.values or values]
    # in a sweep only some rows, since at its large end all of them together do not fit in memory
    names = args.rows or SWEEP_ROWS.get(args.sweep, ("online", "higher") if args.sweep else ROWS)
    names = tuple(dict.fromkeys(("kd", *names)))
    layout = "channels_last" if args.channels_last else None
    kinds = (args.model, args.sweep, args.device.split(":")[0], args.dtype, layout)
    stem = "-".join(filter(None, kinds))
    results = Results(
        args.out or FOLDER / f"{stem}.json",
        {
            "device": args.device,
            "threads": args.threads,
            "repeats": args.repeats,
            "swept": swept,
        },
    )
    results.data["commands"].append(_command(arguments))
    for case in cases:
        _measure(results, case, names, args)
    table = report.markdown(results.data)
    results.path.with_suffix(".md").write_text(table)
    report.draw(results.data, results.path.with_suffix(".png"))
    print(table)


def _measure(
    results: Results, case: Case, names: tuple[str, ...], args: argparse.Namespace
) -> None:
    """Fills in what the results lack; what fails in one row leaves the others alone."""
    rows = results.rows(case)
    print(case, file=sys.stderr)

    def lacking(key: str) -> list[str]:
        return [name for name in names if not {"failed", key} & set(rows.setdefault(name, {}))]

    def fill(key: str, name: str, measure: Callable[..., Any], *args: Any) -> None:
        print(f"  {key}: {name}", file=sys.stderr)
        try:
            rows[name][key] = measure(case, name, *args)
        except Exception as error:
            rows[name]["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        results.write()

    for name in names:
        rows.setdefault(name, {}).setdefault("title", ROWS[name].title)
    for name in () if args.sweep else lacking("error"):
        fill("error", name, _errors)
    for name in lacking("time"):
        if name != "kd":
            fill("time", name, times, args.threads, args.repeats, args.warmup)
    for name in lacking("memory"):
        fill("memory", name, _memory, args.threads, args.memory_repeats)


def _errors(case: Case, name: str) -> dict[str, Any]:
    """By the type computed in; empty for a row without hypergradient."""
    errors = {
        dtype: hypergradient_errors(replace(case, dtype=dtype), name)
        for dtype in dict.fromkeys((case.dtype, "float64"))
    }
    return {dtype: spread(samples) for dtype, samples in errors.items() if samples}


def _memory(case: Case, name: str, threads: int, repeats: int) -> dict[str, Any]:
    """Under the allocator's own settings and, on a CPU, with freed memory returned at once."""
    memory: dict[str, Any] = {}
    for kind in ("default", "returned") if case.device == "cpu" else ("default",):
        children = [peak_memory(case, name, threads, kind) for _ in range(repeats)]
        memory[kind] = spread([child["over_import"] for child in children])
        memory["parameters"] = children[0]["parameters"]
    return memory


def _command(arguments: list[str] | None) -> str:
    given = sys.argv[1:] if arguments is None else arguments
    return " ".join(["python benchmarks/step_cost.py", *given])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="resnet8x4", choices=tuple(MODELS))
    add("--rows", nargs="+", choices=tuple(ROWS), metavar="ROW", help=", ".join(ROWS))
    add("--batch", type=int, help="default: 100, or 32 for the transformers")
    add("--meta-batch", type=int, help="default: as --batch")
    add("--classes", type=int, default=100)
    add("--params", type=int, help="about how many parameters the mlp gets")
    add("--unroll", type=int, default=1, help="student steps under one hypergradient")
    add("--sweep", choices=tuple(SWEEPS), help="measure for several sizes of one thing")
    add("--values", type=int, nargs="+", help="of the sweep, in place of its own")
    add("--repeats", type=int, default=20, help="samples of each row's time")
    add("--warmup", type=int, default=2, help="samples thrown away before")
    add("--memory-repeats", type=int, default=3, help="child processes for each row's memory")
    add("--threads", type=int, default=1)
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the forward passes")
    add("--channels-last", action="store_true", help="images and weights in this memory format")
    add("--out", type=Path, help="the JSON file; the table and the figure lie beside it")
    return parser


if __name__ == "__main__":
    main()
