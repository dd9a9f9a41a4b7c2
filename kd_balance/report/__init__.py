"""One HTML page of what a run's weights and meta updates did: for people, and complete in itself.

    python -m kd_balance.report history.json run.html

makes it of what :meth:`kd_balance.history.WeightHistory.save` wrote, and
:meth:`~kd_balance.history.WeightHistory.report` makes it in the training program itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from kd_balance.report.record import FORMAT, VERSION, Record, read

__all__ = ["FORMAT", "VERSION", "read", "write_report"]


def write_report(record: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Writes the page.

    Args:
        record: what :meth:`WeightHistory.as_dict` returned, or :func:`read`.
        path: of the page.

    Raises:
        ValueError: it is no such record.
        RuntimeError: nothing was recorded.
        ImportError: matplotlib is missing.

    Example::

        write_report(read("history.json"), "run.html")
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "A report needs matplotlib, which is missing: install it by "
            "pip install 'kd-balance[plot]'."
        ) from error
    from kd_balance.report.page import page

    text = page(Record.of(record), title=Path(path).stem)
    Path(path).write_text(text, encoding="utf-8")
