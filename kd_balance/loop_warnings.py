"""Warnings that point at the loop's own line."""

from __future__ import annotations

import re
import sys
import warnings

_OF_PACKAGES = re.compile(r"(kd_balance|torch)(\.|$)")


class LoopWarnings:
    """Gives each warning once."""

    def __init__(self) -> None:
        self.given: dict[str, str] = {}
        """Texts by their kind."""

    def once(self, text: str, kind: str = "") -> None:
        """Warns, if it has not.

        Args:
            text: what to say.
            kind: what is said once, if the text differs from time to time.
        """
        if (kind or text) not in self.given:
            self.given[kind or text] = text
            warnings.warn(text, stacklevel=loop_level())


def loop_level() -> int:
    """How many calls above the caller's the loop is, which torch's and this package's stand in."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _OF_PACKAGES.match(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level
