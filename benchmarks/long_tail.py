"""Compares ways to distil a student on long-tailed data, all under one protocol.

    python benchmarks/long_tail.py --protocol cpu --data DIR_OR_NPZ

Runs that have a result are skipped, so the same command goes on after a kill. Results are appended
to ``benchmarks/results/<protocol>.jsonl``; ``benchmarks/report.py`` makes tables and figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from longtail.fit import Machine
from longtail.methods import METHODS, parse
from longtail.models import MODELS
from longtail.plan import runs_of
from longtail.protocol import FOLDER, load_protocol
from longtail.runner import Job, execute


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    protocol = load_protocol(args.protocol)
    names = ("dataset", "student", "epochs")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.teacher:
        changes["teacher"] = args.teacher
    if args.teacher_epochs or args.epochs:
        changes["teacher_epochs"] = args.teacher_epochs or args.epochs
    if args.imbalance:
        changes["imbalances"] = tuple(args.imbalance)
    if args.seeds:
        changes["seeds"] = tuple(args.seeds)

    plan = dict(protocol.plan)
    if args.teacher_kind:
        plan = {kind: plan.get(kind, ()) for kind in args.teacher_kind}
    if args.method:
        for spec in args.method:
            parse(spec)
        plan = {kind: tuple(args.method) for kind in plan}
    protocol = protocol.replace(**changes, plan=tuple(plan.items()))
    runs = tuple(runs_of(protocol))
    if args.list:
        print("\n".join(f"{r.imbalance:g} {r.teacher} {r.method} seed {r.seed}" for r in runs))
        return
    machine = Machine(torch.device(args.device), args.amp, args.compile)
    out = args.out or Path(__file__).parent / "results" / f"{args.protocol}.jsonl"
    job = Job(protocol, runs, args.data, args.cache, out, machine, args.threads)
    execute(job, args.processes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    protocols = sorted(file.stem for file in FOLDER.glob("*.json"))
    add("--protocol", default="cpu", choices=protocols, help="settings and plan (default: cpu)")
    add("--data", type=Path, help="folder with the CIFAR python folders, or .npz of JPEG files")
    add("--dataset", choices=("cifar10", "cifar100", "snippets"))
    add("--imbalance", type=float, nargs="+", help="first class over last, such as 10 50 100")
    add("--seeds", type=int, nargs="+")
    add(
        "--method",
        nargs="+",
        metavar="NAME[:KEY=VALUE,…]",
        help=f"instead of the protocol's plan; names: {', '.join(METHODS)}",
    )
    add(
        "--teacher-kind",
        nargs="+",
        help="biased (cross entropy), debiased (balanced softmax) or a checkpoint's path",
    )
    add("--teacher", choices=MODELS, help="the teacher's architecture")
    add("--student", choices=MODELS, help="the student's architecture")
    add("--epochs", type=int, help="of the student, and of the teacher unless --teacher-epochs")
    add("--teacher-epochs", type=int)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--compile", action="store_true", help="torch.compile students without meta steps")
    add("--processes", type=int, default=1, help="that share the plan and the device")
    add("--threads", type=int, help="of torch in each process")
    add("--cache", type=Path, default=Path(__file__).parent / ".cache", help="teachers, locks")
    add("--out", type=Path, help="JSON lines (default: benchmarks/results/<protocol>.jsonl)")
    add("--list", action="store_true", help="print the runs and stop")
    return parser


if __name__ == "__main__":
    main()
