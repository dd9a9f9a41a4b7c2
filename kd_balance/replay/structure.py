"""A student's modules and the places of its tensors, walked through once for many replays."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import Tensor, nn

from kd_balance.replay.sync_batch_norm import Summing
from kd_balance.shards import Shards, own
from kd_balance.torch_private import (
    FORWARD_HOOKS,
    buffers_within,
    modules_within,
    parameters_within,
    writes_to,
)

_OF_MODULES = vars(nn.Module()).keys()

Held = dict[str, Any]
"""One of the dictionaries in which a module keeps its parameters or its buffers."""


class Structure:
    """Where a student keeps what a replay puts other tensors in the place of.

    Args:
        student: may be changed later on; :meth:`refresh` notices.
        ranks: the processes that all call it, if there are several.
        shards: its parameters, if each process holds a part of them.
    """

    def __init__(
        self, student: nn.Module, ranks: Summing | None = None, shards: Shards | None = None
    ) -> None:
        self.student = student
        self.ranks = ranks
        self.shards = shards
        self._gathered: dict[str, Tensor] = {}
        self.written: set[str] = set()
        """Parameters that calls write in place: momentum encoders, bounded embeddings."""
        self._lent: list[list[tuple[Held, Held]]] = []
        """What modules had before they were given something else, and are to get back."""
        if shards is not None:
            shards.put_back()
        self._walk()

    def refresh(self) -> None:
        """Walks again if layers, parameters or buffers were added, removed or replaced."""
        if self._lent:
            return
        if self.shards is not None:
            self.shards.put_back()
        if self._seen != self._content():
            self._walk()

    def _content(self) -> list[Any]:
        names = [name for held in self._dictionaries for name in held]
        return names + [id(value) for held in self._dictionaries for value in held.values()]

    def _walk(self) -> None:
        self.modules = list(self.student.modules())
        self._dictionaries = [
            held for m in self.modules
            for held in (modules_within(m), parameters_within(m), buffers_within(m))
        ]
        self._seen = self._content()
        self.parameters: dict[Tensor, str] = {p: n for n, p in self.student.named_parameters()}
        """The name of every parameter, which is the first of several."""
        self.buffers: dict[Tensor, str] = {b: n for n, b in self.student.named_buffers()}
        names = {**self.buffers, **self.parameters}
        self._places: list[tuple[Held, str, str]] = []
        for module in self.modules:
            for held in (parameters_within(module), buffers_within(module)):
                self._places += [(held, k, names[t]) for k, t in held.items() if t is not None]
        self._names = {name for _, _, name in self._places}
        if self.shards is not None:
            self.shards.parameters = {n: p for p, n in self.parameters.items()}

    def is_parameter(self, leaf: Any) -> bool:
        """Whether a graph that ends in a tensor ends in a parameter, or what was made of shards."""
        if leaf is None or self.shards is None:
            return leaf in self.parameters
        return leaf in self.parameters or leaf in self.shards.gathered()

    def live(self, names: Collection[str]) -> dict[str, Tensor]:
        """The parameters of these names as they are, in one piece and without a graph."""
        live = {name: own(p) for p, name in self.parameters.items() if name in names}
        return live if self.shards is None else self.shards.whole(live)

    @contextmanager
    def whole(self, given: Collection[str]) -> Iterator[None]:
        """Has the parameters that replays are not given in one piece, as long as it lasts."""
        if self.shards is not None:
            self._gathered = self.live(set(self.parameters.values()) - set(given))
        try:
            yield
        finally:
            self._gathered = {}

    def versions(self) -> list[int]:
        """How often every parameter was written in place."""
        return [writes_to(param) for param in self.parameters]

    def note_written(self, versions: list[int]) -> None:
        """Remembers the parameters that were written since :meth:`versions`."""
        if (now := self.versions()) != versions and len(now) == len(versions):
            pairs = zip(self.parameters.values(), now, versions)
            self.written |= {name for name, new, old in pairs if new != old}

    @contextmanager
    def holding(
        self, tensors: Mapping[str, Tensor | None], training: list[bool]
    ) -> Iterator[None]:
        """Lets the student hold other tensors and flags, and gives it back all that it had.

        What a call leaves in attributes goes with it: the weights of old-style norm hooks,
        counters, new buffers, what it writes into tensors, lists and dicts.

        Args:
            tensors: parameters and buffers by name, in every place of one that has several.
            training: the flags of all modules.

        Raises:
            ValueError: the student lost one of these tensors since.
        """
        tensors = {**self._gathered, **tensors}
        if lost := tensors.keys() - self._names:
            raise ValueError(
                f"the student holds no {min(lost)} any more, expected the layers that it was "
                "called with: replace layers before the forward pass, not between it and step()."
            )
        before = [
            (held, dict(held))
            for module in self.modules
            for held in (vars(module), parameters_within(module), buffers_within(module))
        ]
        if self.written:
            live = {name: param for param, name in self.parameters.items()}
            for name in self.written & live.keys():
                given = tensors.get(name, live[name])
                tensors = {**tensors, name: None if given is None else given.clone()}
        self._lent.append(before)
        try:
            copies: dict[int, Any] = {}
            for module in self.modules:
                held = vars(module)
                for key in held.keys() - _OF_MODULES:
                    if isinstance(held[key], (Tensor, list, dict, set, deque)):
                        held[key] = _copy(held[key], copies)
            for module, flag in zip(self.modules, training, strict=True):
                vars(module)["training"] = flag
            if self.shards is not None:
                self._unhook(self.shards.hooks())
            for held, key, name in self._places:
                if name in tensors:
                    held[key] = tensors[name]
            yield
        finally:
            self._give_back()

    def recover(self) -> None:
        """Gives back what an exception at the end of :meth:`holding` left elsewhere."""
        self._gathered = {}
        while self._lent:
            self._give_back()

    def _give_back(self) -> None:
        """May be cut off anywhere, and called again."""
        for held, values in self._lent[-1]:
            held.update(values)
            if len(held) > len(values):
                for key in held.keys() - values.keys():
                    del held[key]
        self._lent.pop()

    def _unhook(self, numbers: set[int]) -> None:
        for module in self.modules:
            for key in FORWARD_HOOKS:
                hooks = vars(module)[key]
                if numbers & hooks.keys():
                    kept = {n: hook for n, hook in hooks.items() if n not in numbers}
                    vars(module)[key] = OrderedDict(kept)


def _copy(value: Any, copies: dict[int, Any]) -> Any:
    """A copy that in-place writes do not reach through; what was one thing stays one thing."""
    if id(value) in copies:
        return copies[id(value)]
    copied: Any = value
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        copied = value.clone()
    elif isinstance(value, (list, dict, set, deque)):
        copied = copies[id(value)] = copy(value)
        if not isinstance(value, set):
            places = value.items() if isinstance(value, dict) else enumerate(value)
            for key, part in places:
                copied[key] = _copy(part, copies)
    copies[id(value)] = copied
    return copied
