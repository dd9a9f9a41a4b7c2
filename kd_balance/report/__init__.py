"""One HTML page of what a run's weights and meta updates did: for people, and complete in itself.

    python -m kd_balance.report history.json run.html

makes it of what :meth:`kd_balance.history.WeightHistory.save` wrote, and
:meth:`~kd_balance.history.WeightHistory.report` makes it in the training program itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from kd_balance.report.record import FORMAT, VERSION, Record, read

__all__ = ["FORMAT", "VERSION", "embedded", "read", "write_report"]


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
    Path(path).write_text(_page(record, Path(path).stem), encoding="utf-8")


def embedded(record: Mapping[str, Any], height: str = "40rem") -> str:
    """The page as a frame within another page, such as a notebook's.

    Args:
        record: what :meth:`WeightHistory.as_dict` returned, or :func:`read`.
        height: of the frame, in CSS.

    Returns:
        HTML whose styles do not touch what is around it.

    Raises:
        ValueError, RuntimeError, ImportError: as :func:`write_report`.
    """
    page = escape(_page(record, "This run"), quote=True)
    style = f"width: 100%; height: {height}; border: 0; resize: vertical"
    return f'<iframe title="kd-balance report" style="{style}" srcdoc="{page}"></iframe>'


def _page(record: Mapping[str, Any], title: str) -> str:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "A report needs matplotlib, which is missing: install it by "
            "pip install 'kd-balance[plot]'."
        ) from error
    from kd_balance.report.page import page

    return page(Record.of(record), title)
