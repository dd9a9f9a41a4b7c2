"""Which library does a piece of source code come from: a text data set with nothing to download.

The texts are the Python files of libraries that torch, scikit-learn and matplotlib bring along,
and of Python's own library. A snippet is six lines of code; its features are counts of hashed
words. Snippets of one file fall into training or test together, so a model cannot recognise the
file. Import lines are dropped and so is every library's own name, which would give it away. The
data depend on the installed versions; every result carries their digest.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
import zlib
from pathlib import Path

import numpy as np

LIBRARIES = (
    "torch",
    "sympy",
    "scipy",
    "sklearn",
    "numpy",
    "matplotlib",
    "networkx",
    "fontTools",
    "mpmath",
    "python",
)
"""The classes, the most frequent one of a long-tailed profile first."""

FEATURES = 512
LINES = 6
PER_FILE = 40  # snippets of one file, so that no huge file speaks for its library

_WORD = re.compile(r"[A-Za-z]+|[^\sA-Za-z\d]")
_NAMES = {name.lower() for name in LIBRARIES} | {"np", "sp", "plt", "mpl", "nx", "mp", "scikit"}


def load_snippets(per_class: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training features and labels, test features and labels.

    Args:
        per_class: snippets of each library at most, a quarter of them for the test.

    Returns:
        float32 [N, 512], the mean square of a row being one, and int64 [N]; twice.
    """
    splits: dict[bool, tuple[list[np.ndarray], list[int]]] = {False: ([], []), True: ([], [])}
    for label, library in enumerate(LIBRARIES):
        room = {True: per_class // 4, False: per_class - per_class // 4}
        for file in _files(library):
            is_test = zlib.crc32(file.name.encode()) % 4 == 0
            if not room[is_test]:
                continue
            texts = _cut(file.read_text(errors="ignore"))[:PER_FILE][: room[is_test]]
            room[is_test] -= len(texts)
            splits[is_test][0].extend(_count(text) for text in texts)
            splits[is_test][1].extend([label] * len(texts))
    train, test = splits[False], splits[True]
    return (np.stack(train[0]), np.array(train[1]), np.stack(test[0]), np.array(test[1]))


def _files(library: str) -> list[Path]:
    """The library's own source files, in an order that neither names nor folders explain."""
    if library == "python":
        root = Path(sysconfig.get_path("stdlib"))
    else:
        spec = importlib.util.find_spec(library)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"the snippets need the source of {library}: install the benchmark's requirements."
            )
        root = Path(spec.origin).parent
    skipped = {"test", "tests", "testing", "site-packages", "idlelib", "lib2to3"}
    files = [file for file in root.rglob("*.py") if not skipped & set(file.parts[len(root.parts):])]
    return sorted(files, key=lambda file: zlib.crc32(str(file.relative_to(root)).encode()))


def _cut(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    code = [line for line in lines if line and not line.startswith(("#", "import ", "from "))]
    return ["\n".join(code[at : at + LINES]) for at in range(0, len(code) - LINES + 1, LINES)]


def _count(text: str) -> np.ndarray:
    words = [word for word in _WORD.findall(text.lower()) if word not in _NAMES]
    buckets = [zlib.crc32(word.encode()) % FEATURES for word in words]
    counts = np.log1p(np.bincount(buckets, minlength=FEATURES)).astype(np.float32)
    return counts * FEATURES**0.5 / max(float(np.linalg.norm(counts)), 1e-6)
