"""The page: what the run was, its plots, and how it was set."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping
from html import escape

import numpy as np

from kd_balance.report.plots import Plot, plots
from kd_balance.report.record import Record
from kd_balance.report.svg import COLORS, svg

_COLORS = {
    **COLORS,
    "faint": ("#59636e", "#a3acb6"),
    "page": ("#ffffff", "#16191d"),
    "card": ("#f6f8fa", "#1e2328"),
    "link": ("#0060a0", "#72c0f5"),
    "warn": ("#9a3c00", "#ffb27d"),
}
_LIGHT, _DARK = (
    " ".join(f"--{name}: {pair[i]};" for name, pair in _COLORS.items()) for i in (0, 1)
)
_STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
""" + """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: .5rem 0 1rem; font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 2rem 0 .75rem; font-size: 1.2rem; }
a { color: var(--link); }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.card { margin: 0; padding: .9rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--card); display: flex; flex-direction: column; }
.card h3 { margin: 0; font-size: 1rem; }
.card p { margin: .25rem 0 .6rem; color: var(--faint); font-size: .85rem; }
.card svg { display: block; width: 100%; height: auto; margin: auto 0; }
.card a { margin-top: .6rem; font-size: .85rem; align-self: start; }
svg text { font-family: system-ui, sans-serif !important; }
.sums { display: grid; gap: .75rem; margin: 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); }
.sums div { padding: .6rem .8rem; border: 1px solid var(--line); border-radius: .5rem; }
.sums dt { color: var(--faint); font-size: .85rem; }
.sums dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { width: 45%; padding-right: 1rem; font-weight: 400; color: var(--faint); }
.warnings { margin: 0; padding: .6rem .8rem .6rem 2rem; border: 1px solid var(--warn);
  border-radius: .5rem; }
"""


def page(record: Record, title: str) -> str:
    """The whole page as one text that loads nothing else."""
    figures = "\n".join(_figure(plot, f"plot{i}") for i, plot in enumerate(plots(record)))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)} – kd-balance</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}: what the weights did</h1>
{_summary(record)}
{_warnings(record)}
<h2>Over the course of training</h2>
<div class="cards">
{figures}
</div>
{_without_figure(record)}
<div class="cards">
{_table("Settings", record.settings)}
{_table("Versions", record.versions)}
</div>
</body>
</html>
"""


def _summary(record: Record) -> str:
    numbers = {
        "training calls": f"{record.step[-1]:,}",
        "classes": f"{record.count.shape[1]:,}",
        **{f"last {name} weight": _last(record, name) for name in record.weights},
    }
    if len(record.meta["step"]):
        numbers["hypergradients"] = f"{len(record.meta['step']):,}"
        numbers["skipped"] = f"{record.meta['skipped'].sum():,.0f}"
        losses = record.meta["meta_loss"]
        losses = losses[np.isfinite(losses)]
        if len(losses):
            n = min(10, (len(losses) + 1) // 2)
            first, last = losses[:n].mean(), losses[-n:].mean()
            numbers[f"meta loss, mean of first and last {n}"] = f"{first:.3g} → {last:.3g}"
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(number)}</dd></div>"
        for name, number in numbers.items()
    )
    return f'<dl class="sums">{items}</dl>'


def _last(record: Record, name: str) -> str:
    """The mean over the samples of the last row."""
    count, weights = record.count[-1], record.weights[name][-1]
    seen = count > 0
    if not seen.any():
        return "–"
    return f"{np.average(weights[seen], weights=count[seen]):.3g}"


def _warnings(record: Record) -> str:
    if not record.warnings:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in record.warnings)
    return f'<h2>Warnings</h2><ul class="warnings">{items}</ul>'


def _without_figure(record: Record) -> str:
    if not len(record.meta["step"]):
        return (
            "<p>No meta updates were recorded: make it WeightHistory(criterion, "
            "optimizer=optimizer) to see the meta loss, and train for more than one window.</p>"
        )
    if not record.meta["skipped"].any():
        return f"<p>No hypergradient was skipped, of {len(record.meta['step']):,}.</p>"
    return ""


def _figure(plot: Plot, name: str) -> str:
    file = plot.title.lower().replace(" ", "_") + ".csv"
    data = base64.b64encode(_csv(plot.columns).encode()).decode()
    return (
        f'<figure class="card" id="{name}"><figcaption><h3>{escape(plot.title)}</h3>'
        f"<p>{escape(plot.note)}</p></figcaption>\n{svg(plot, name)}\n"
        f'<a download="{escape(file, quote=True)}" href="data:text/csv;charset=utf-8;base64,'
        f'{data}">Numbers (CSV)</a></figure>'
    )


def _csv(columns: Mapping[str, np.ndarray]) -> str:
    """A line for each point; nothing stands where there is no number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(["" if np.isnan(x) else f"{x:.9g}" for x in row])
    return text.getvalue()


def _table(title: str, rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f"<section><h2>{title}</h2><table>{lines}</table></section>"
