"""The accuracies printed in README and docs are those of the committed reports."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
NAMES = ("cpu.md", "snippets.md", "images.md", "two-lines*.md")
REPORTS = [path.read_text() for name in NAMES for path in RESULTS.glob(name)]


def accuracies(text, begin, end):
    section = text.split(begin)[1].split(end)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 8
    return re.findall(r"(?<![+−])\b\d+\.\d ± \d+\.\d", "\n".join(rows))


def test_they_are_in_the_reports():
    page = (ROOT / "docs/long_tail.md").read_text()
    printed = accuracies(page, "## Step by step", "## At other imbalances")
    page = (ROOT / "docs/benchmarks.md").read_text()
    printed += accuracies(page, "## Does it help?", "The commands:")
    printed += accuracies((ROOT / "README.md").read_text(), "## What to expect", "## Install")
    assert [value for value in printed if not any(value in report for report in REPORTS)] == []
