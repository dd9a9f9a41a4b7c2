"""A plot as SVG within a page: its text stays text, and its colours are those of a theme."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

from kd_balance.report.plots import Plot


@dataclass(frozen=True)
class Theme:
    """The colours of a page."""

    name: str
    ink: str
    faint: str
    lines: tuple[str, ...]


# lines that people who see fewer colours tell apart too: Okabe and Ito's
THEMES = (
    Theme("light", "#24292f", "#d8dee4", ("#0072b2", "#009e73", "#d55e00", "#9a5b8a", "#8a6d00")),
    Theme("dark", "#e6e8eb", "#3a414a", ("#56b4e9", "#2fc79a", "#ff8f4a", "#e09ccb", "#f0e442")),
)
_NAMESPACES = re.compile(r'\sxmlns(:\w+)?="[^"]*"')
_REFERENCES = re.compile(r'((?<=\s)id="|url\(#|href="#)')


def svg(plot: Plot, theme: Theme, name: str) -> str:
    """Draws the plot.

    Args:
        name: that no other drawing on the page has; its elements are named by it.
    """
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "axes.facecolor": "none",
        "axes.prop_cycle": cycler(color=theme.lines * 4, linestyle=["-", "--", "-.", ":"] * 5),
        "axes.formatter.useoffset": False,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.8,
        "legend.frameon": False,
        "legend.handlelength": 2.4,
        "figure.facecolor": "none",
    }
    file = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=plot.size, layout="constrained")
        plot.draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", dpi=200, metadata=nothing)
    text = file.getvalue()
    text = _NAMESPACES.sub("", text[text.index("<svg"):])
    text = _REFERENCES.sub(rf"\g<1>{name}-", text)
    label = escape(plot.title, quote=True)
    return text.replace("<svg", f'<svg class="{theme.name}" role="img" aria-label="{label}"', 1)
