"""The pages docs/habits.md, guarantees.md and scaling.md name tests that there are."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGES = ("habits.md", "guarantees.md", "scaling.md")
HABITS, *OTHERS = (TESTS.parent / "docs" / name for name in PAGES)


def named_in(line):
    return re.findall(r"`(\w+)::(test_\w+)`", line)


def test_every_habit_names_its_tests():
    rows = [line for line in HABITS.read_text().splitlines() if re.match(r"\| (?!---|habit)", line)]
    assert len(rows) > 60
    assert [row for row in rows if not named_in(row)] == []


def test_every_named_test_exists():
    for file, name in set(named_in("".join(page.read_text() for page in (HABITS, *OTHERS)))):
        candidates = (TESTS / f"test_habits_{file}.py", TESTS / f"test_{file}.py")
        source = next(path for path in candidates if path.exists()).read_text()
        assert f"\ndef {name}(" in source, f"{file}::{name}"
