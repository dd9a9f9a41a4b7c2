"""When a meta update falls, and the steps that it will pass through."""

from __future__ import annotations

from torch import Tensor

from kd_balance.bilevel.settings import Settings
from kd_balance.inner_step import InnerStep


class Window:
    """The last `unroll` of every `every` student steps; the meta update falls at their end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.count = 0
        """Student steps so far."""
        self.steps: list[InnerStep] = []
        """Those of this window."""
        self.ended: dict[str, Tensor] = {}
        """The parameters that the last of them left."""

    @property
    def holds_next(self) -> bool:
        """Whether the meta update will pass through the coming step."""
        return self._position >= self._settings.every - self._settings.unroll

    @property
    def ends_next(self) -> bool:
        """Whether the meta update falls at the coming step."""
        return self._position == self._settings.every - 1

    @property
    def _position(self) -> int:
        return self.count % self._settings.every

    def forget(self) -> None:
        """Gives up its steps."""
        self.steps = []
        self.ended = {}
