"""A long record in few points."""

from __future__ import annotations

import numpy as np

_POINTS = 50  # of a line at most


def stretches(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts a record into stretches of about the same length, 50 at most.

    Args:
        rows: of the record, 1 or more.

    Returns:
        The first row of each stretch, and the row behind its last.
    """
    starts = np.linspace(0, rows, min(rows, _POINTS), endpoint=False).astype(int)
    return starts, np.append(starts[1:], rows)
