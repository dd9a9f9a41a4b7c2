"""Tables and figures of benchmark results.

    python benchmarks/report.py benchmarks/results/cpu.jsonl

writes ``cpu.md`` and the figures that it shows beside the results. A protocol without results gets
a report of what it plans.

    python benchmarks/report.py benchmarks/results/cpu.jsonl --against bs+kd

writes nothing, and prints what every method has more than that one, seed by seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longtail import figures, results
from longtail.paired import against
from longtail.protocol import FOLDER, load_protocol
from longtail.table import grouped, markdown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON lines of long_tail.py")
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--against", metavar="METHOD", help="print differences to this method")
    args = parser.parse_args(arguments)
    for path in args.results:
        records = [record for record in results.read(path) if record.get(args.split)]
        planned = (FOLDER / f"{path.stem}.json").exists()
        if not records and not planned:
            parser.error(f"{path} holds no results on the {args.split} set.")
        if args.against:
            tables = {group.title: methods for group, methods in grouped(records).items()}
            if not any(args.against in methods for methods in tables.values()):
                parser.error(f"{path} has no result of {args.against!r}, expected a method in it.")
            print(against(args.against, tables, args.split))
            continue
        suffix = "" if args.split == "test" else f"-{args.split}"
        out = path.with_name(f"{path.stem}{suffix}.md")
        pictures = figures.draw(records, args.split, out.with_suffix("")) if records else []
        protocol = load_protocol(path.stem) if planned else None
        out.write_text(markdown(records, args.split, path.name, pictures, protocol))
        print(f"{out}: {len(records)} results")


if __name__ == "__main__":
    main()
