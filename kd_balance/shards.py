"""A student whose parameters are spread over the processes, as FSDP2's ``fully_shard`` leaves it.

The optimizer steps each process's own shards, element by element, and so does what is kept of its
steps and what is multiplied by their derivatives. Replays run on whole parameters, gathered for as
long as a meta update lasts, without FSDP's hooks, which would put the present ones in their place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_balance.distributed import Ranks, is_shard
from kd_balance.torch_private import fsdp_gathered, fsdp_hooks, is_fully_sharded


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory and without a graph."""
    part: Any = tensor.detach()
    return part.to_local() if is_shard(part) else part


def own_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What this process holds of an optimizer's state of one parameter."""
    return {key: own(value) if isinstance(value, Tensor) else value for key, value in state.items()}


class Shards:
    """The parts of the student's parameters, and how to put them together.

    Args:
        student: what ``fully_shard`` returned.
        ranks: the processes that hold a part each.
    """

    def __init__(self, student: nn.Module, ranks: Ranks) -> None:
        self._ranks = ranks
        self._fully_sharded: Any = [m for m in student.modules() if is_fully_sharded(m)]
        self._gathered: set[Any] = {None}
        self.parameters: Mapping[str, Tensor] = {}
        """The live ones by name."""

    @classmethod
    def of(cls, student: nn.Module, ranks: Ranks) -> Shards | None:
        """Those of a student that has some."""
        return cls(student, ranks) if any(map(is_shard, student.parameters())) else None

    def put_back(self) -> None:
        """Lets the modules hold their shards, where a forward pass has left whole parameters."""
        for module in self._fully_sharded:
            module.reshard()

    def gathered(self) -> set[Any]:
        """The whole parameters that forward passes compute with, which graphs end in."""
        if None in self._gathered:  # of those that no pass has gathered yet
            self._gathered = {p for module in self._fully_sharded for p in fsdp_gathered(module)}
        return self._gathered

    def hooks(self) -> set[int]:
        """The numbers of FSDP's hooks among those of the modules."""
        return {number for module in self._fully_sharded for number in fsdp_hooks(module)}

    def everywhere(self, holds: bool) -> bool:
        """Whether something holds on all ranks."""
        return self._ranks.all(holds)

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors put together of every rank's own; those of parameters that are whole stay.

        Args:
            parts: by the names of parameters that they are split like, the same on all ranks.
        """
        params = [self.parameters[name] for name in parts]
        return dict(zip(parts, self.gather(list(parts.values()), params)))

    def gather(self, parts: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        """The same of tensors that are split like these parameters."""
        whole = list(parts)
        split = [i for i, param in enumerate(params) if is_shard(param)]
        shapes = [self._shapes(params[i]) for i in split]
        found = self._ranks.gather(
            [parts[i] for i in split], [[math.prod(s) for s in of_all] for of_all in shapes]
        )
        for i, pieces, of_all in zip(split, found, shapes):
            pieces = [piece.view(shape) for piece, shape in zip(pieces, of_all)]
            whole[i] = torch.cat(pieces, _dim(params[i])) if len(pieces) > 1 else pieces[0]
        return whole

    def own(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of tensors, which are split like the parameters of these names."""
        parts = dict(whole)
        for name, tensor in whole.items():
            if is_shard(param := self.parameters[name]):
                lengths = [shape[_dim(param)] for shape in self._shapes(param)]
                parts[name] = tensor.split(lengths, _dim(param))[self._ranks.rank].contiguous()
        return parts

    def _shapes(self, param: Tensor) -> list[list[int]]:
        """Of the parts on all ranks, which are as long as they can be, the last ones shorter."""
        dim, size = _dim(param), self._ranks.size
        left, most = param.shape[dim], -(-param.shape[dim] // size)
        shapes = []
        for _ in range(size):
            length = min(most, left)
            left -= length
            shapes.append([*param.shape[:dim], length, *param.shape[dim + 1 :]])
        return shapes


def _dim(param: Any) -> int:
    return param.placements[0].dim
