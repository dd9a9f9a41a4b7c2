"""The page docs/habits.md names tests that there are, in every row."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "habits.md"


def named_in(line):
    return re.findall(r"`(\w+)::(test_\w+)`", line)


def test_every_row_names_its_tests():
    rows = [line for line in PAGE.read_text().splitlines() if re.match(r"\| (?!---|habit)", line)]
    assert len(rows) > 60
    assert [row for row in rows if not named_in(row)] == []


def test_every_named_test_exists():
    for file, name in set(named_in(PAGE.read_text())):
        candidates = (TESTS / f"test_habits_{file}.py", TESTS / f"test_{file}.py")
        source = next(path for path in candidates if path.exists()).read_text()
        assert f"\ndef {name}(" in source, f"{file}::{name}"
