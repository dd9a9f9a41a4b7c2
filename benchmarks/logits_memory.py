"""Peak memory of a step whose logits are the cost, as those of a language model are.

    python benchmarks/logits_memory.py
    python benchmarks/logits_memory.py --positions 8192 --classes 32000 --top-k 64

Each row is measured in a process of its own, against plain distillation written by hand. The
student is small, so that nothing hides the logits; the teacher's logits are given, and so in no
peak: the last column adds them. The table goes to ``benchmarks/results/logits_memory.md``, that of
a teacher's k largest to ``logits_memory-top_k.md``.
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
| training step | peak memory | times plain KD | with the teacher's logits |
| --- | --- | --- | --- |
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=1024, help="rows of logits")
    parser.add_argument("--classes", type=int, default=50_000)
    parser.add_argument("--params", type=int, default=10**6, help="of the student")
    parser.add_argument("--top-k", type=int, help="of the teacher, which plain KD has whole")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    case = Case(
        model="mlp", batch=args.positions, meta_batch=args.positions, classes=args.classes,
        parameters=args.params,
    )
    one = args.positions * args.classes * 4 / 2**20
    text = (
        f"Logits of {args.positions:,} × {args.classes:,} float32, {one:.0f} MiB; a student of "
        f"{args.params:,} parameters; freed memory returned at once. `{command(args)}`\n\n{HEAD}"
    )
    plain: list[float] = []
    for title, name, unroll in ROWS:
        sparse = args.top_k if name != "kd" else None
        found = peak_memory(
            replace(case, unroll=unroll, top_k=sparse), name, args.threads, "returned"
        )
        peak = found["over_import"] / 2**20
        # a probability in four bytes and its class in eight
        teacher = args.positions * sparse * 12 / 2**20 if sparse else one
        plain = plain or [peak, peak + teacher]
        text += (
            f"| {title} | {peak:,.0f} MiB | {peak / plain[0]:.2f} | {peak + teacher:,.0f} MiB, "
            f"{(peak + teacher) / plain[1]:.2f} |\n"
        )
    name = "logits_memory-top_k.md" if args.top_k else "logits_memory.md"
    (FOLDER.parent / name).write_text(text)
    print(text)


def command(args: argparse.Namespace) -> str:
    sizes = f" --positions {args.positions} --classes {args.classes} --top-k {args.top_k}"
    return f"python benchmarks/logits_memory.py{sizes if args.top_k else ''}"


if __name__ == "__main__":
    main()
