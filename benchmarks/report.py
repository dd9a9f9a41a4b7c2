"""Tables and figures of benchmark results.

    python benchmarks/report.py benchmarks/results/cpu.jsonl

writes ``cpu.md`` and the figures that it shows beside the results. A protocol without results gets
a report of what it plans.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longtail import figures, results
from longtail.protocol import FOLDER, load_protocol
from longtail.table import markdown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON lines of long_tail.py")
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    args = parser.parse_args(arguments)
    for path in args.results:
        records = [record for record in results.read(path) if record.get(args.split)]
        planned = (FOLDER / f"{path.stem}.json").exists()
        if not records and not planned:
            parser.error(f"{path} holds no results on the {args.split} set.")
        suffix = "" if args.split == "test" else f"-{args.split}"
        out = path.with_name(f"{path.stem}{suffix}.md")
        pictures = figures.draw(records, args.split, out.with_suffix("")) if records else []
        protocol = load_protocol(path.stem) if planned else None
        out.write_text(markdown(records, args.split, path.name, pictures, protocol))
        print(f"{out}: {len(records)} results")


if __name__ == "__main__":
    main()
