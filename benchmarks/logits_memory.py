"""Peak memory of a step whose logits are the cost, as those of a language model are.

    python benchmarks/logits_memory.py
    python benchmarks/logits_memory.py --positions 8192 --classes 32000

Each row is measured in a process of its own, against plain distillation written by hand. The
student is small, so that nothing hides the logits; the teacher's logits are given, and so in no
figure. The table goes to ``benchmarks/results/logits_memory.md``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from stepcost.case import Case
from stepcost.memory import peak_memory
from stepcost.results import FOLDER

ROWS = [
    ("plain KD", "kd", 1),
    ("kd-balance, a meta update in every step", "online", 1),
    ("kd-balance, windows of four steps", "online", 4),
]
HEAD = """\
| training step | peak memory | times plain KD |
| --- | --- | --- |
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=1024, help="rows of logits")
    parser.add_argument("--classes", type=int, default=50_000)
    parser.add_argument("--params", type=int, default=10**6, help="of the student")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    case = Case(
        model="mlp", batch=args.positions, meta_batch=args.positions, classes=args.classes,
        parameters=args.params,
    )
    one = args.positions * args.classes * 4 / 2**20
    text = (
        f"Logits of {args.positions:,} × {args.classes:,} float32, {one:.0f} MiB; a student of "
        f"{args.params:,} parameters; `python benchmarks/logits_memory.py`, freed memory returned "
        f"at once.\n\n{HEAD}"
    )
    plain = 0
    for title, name, unroll in ROWS:
        found = peak_memory(replace(case, unroll=unroll), name, args.threads, "returned")
        peak = found["over_import"]
        plain = plain or peak
        text += f"| {title} | {peak / 2**20:,.0f} MiB | {peak / plain:.2f} |\n"
    (FOLDER.parent / "logits_memory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
