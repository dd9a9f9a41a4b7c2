"""python -m kd_balance.report history.json run.html"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kd_balance.report import read, write_report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kd_balance.report",
        description="Make one HTML page of a run's history.",
    )
    parser.add_argument("history", help="a JSON file that WeightHistory.save wrote")
    parser.add_argument("page", help="the HTML file to write")
    options = parser.parse_args(arguments)
    try:
        write_report(read(options.history), options.page)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
