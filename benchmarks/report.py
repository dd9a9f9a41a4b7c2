"""Tables and figures of benchmark results.

    python benchmarks/report.py benchmarks/results/cpu.jsonl

writes ``cpu.md`` and the figures that it shows beside the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longtail import figures, results
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
        if not records:
            parser.error(f"{path} holds no results on the {args.split} set.")
        suffix = "" if args.split == "test" else f"-{args.split}"
        out = path.with_name(f"{path.stem}{suffix}.md")
        pictures = figures.draw(records, args.split, out.with_suffix(""))
        out.write_text(markdown(records, args.split, path.name, pictures))
        print(f"{out}: {len(records)} results")


if __name__ == "__main__":
    main()
