"""The rows of the table by name, each imported when asked for: a peer may not be installed."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from stepcost.rows.base import Row


class Entry(NamedTuple):
    """Where a row is found, and what the table calls it."""

    module: str
    kind: str
    title: str


ROWS = {
    "kd": Entry("plain", "PlainKD", "plain KD"),
    "no_meta": Entry("ours", "WithoutMeta", "kd-balance, a step without meta update"),
    "online": Entry("ours", "Online", "kd-balance online"),
    "online_unchecked": Entry("ours", "OnlineUnchecked", "kd-balance online, no invariants"),
    "online_4": Entry("ours", "OnlineEvery4", "kd-balance online, every=4"),
    "online_5": Entry("ours", "OnlineEvery5", "kd-balance online, every=5"),
    "online_10": Entry("ours", "OnlineEvery10", "kd-balance online, every=10"),
    "online_16": Entry("ours", "OnlineEvery16", "kd-balance online, every=16"),
    "unroll_4_16": Entry("ours", "Unroll4Every16", "kd-balance online, unroll=4, every=16"),
    "default": Entry("ours", "Default", "kd-balance, default options"),
    "lookahead": Entry("ours", "Lookahead", "kd-balance lookahead"),
    "paper": Entry("ours", "Paper", "kd-balance paper"),
    "unroll": Entry("ours", "Unroll", "kd-balance online, unroll engine"),
    "higher": Entry("lookahead", "BareHigher", "look-ahead loop on bare higher"),
    "create_graph": Entry("lookahead", "MetaWeightNetLoop", "look-ahead loop with create_graph"),
    "betty": Entry("with_betty", "Betty", "betty-ml, finite difference"),
    "torchopt": Entry("with_torchopt", "TorchOpt", "look-ahead loop on torchopt MetaSGD"),
}
"""By name; "kd" is what the others are measured against."""


def row(name: str) -> type[Row]:
    """The class of a row.

    Raises:
        ImportError: its package is not installed.
    """
    entry = ROWS[name]
    return getattr(importlib.import_module(f"stepcost.rows.{entry.module}"), entry.kind)
