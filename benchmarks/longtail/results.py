"""Results as JSON lines: appended, never changed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """All results in a file; none where it does not exist. A torn last line is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Adds results to a file that other processes may be adding to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        # A killed process may have left half a line behind.
        file.write(text if not content or content.endswith("\n") else "\n" + text)


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process alone now holds `path`; it lets go at the end, or when it dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def versions() -> dict[str, str]:
    """Python and the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in ("torch", "higher", "numpy", "scikit-learn", "kd-balance"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """The git commit of this checkout, with "-dirty" where tracked files were changed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
