"""A plot as SVG within a page: its text stays text, and its colours are the page's variables."""

from __future__ import annotations

import io
import re
from html import escape
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

from kd_balance.report.plots import Plot

# of CSS variables, light and dark; the lines' are told apart by people who see fewer colours too
COLORS = {
    "ink": ("#24292f", "#e6e8eb"),
    "line": ("#d8dee4", "#3a414a"),
    "plot1": ("#0072b2", "#56b4e9"),
    "plot2": ("#009e73", "#2fc79a"),
    "plot3": ("#d55e00", "#ff8f4a"),
    "plot4": ("#9a5b8a", "#e09ccb"),
    "plot5": ("#8a6d00", "#f0e442"),
}
_LIGHT = {name: light for name, (light, _) in COLORS.items()}
_INK, _FAINT = _LIGHT["ink"], _LIGHT["line"]
_LINES = [light for name, light in _LIGHT.items() if name.startswith("plot")]
_NAMESPACES = re.compile(r'\sxmlns(:\w+)?="[^"]*"')
_REFERENCES = re.compile(r'((?<=\s)id="|url\(#|href="#)')


def svg(plot: Plot, name: str) -> str:
    """Draws the plot.

    Args:
        name: that no other drawing on the page has; its elements are named by it.
    """
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _FAINT,
        "axes.facecolor": "none",
        "axes.prop_cycle": cycler(color=_LINES * 4, linestyle=["-", "--", "-.", ":"] * 5),
        "axes.formatter.useoffset": False,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
        "grid.color": _FAINT,
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
    for variable, light in _LIGHT.items():
        text = text.replace(light, f"var(--{variable})")
    label = escape(plot.title, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
