"""The function from outputs to logits, read off the loop's graph, for outputs of another batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_balance.torch_private import output_format

Node = Any
Edge = tuple[Node, int]
"""A node of autograd's graph, and which of its results."""


class Untraceable(ValueError):
    """An operation whose like on another batch is not known."""


@dataclass
class Step:
    """One operation: how to repeat it, and what it does to classes and positions."""

    repeat: Callable[..., Tensor]
    class_axis: int
    """Of its input."""
    kind: str = "moves"
    """"moves" positions to other places, "keeps" them or "mixes" several."""
    sources: Sequence[int] = ()


class Retraced:
    """The operations between the outputs and the logits, to be repeated on other outputs.

    Slices, other shapes and orders of the axes, choices of classes, casts, scalar factors, softmax,
    upsampling, sums and concatenations: what means the same for a batch of another size. An index
    or a mask over samples does not, nor does an added constant, which a graph does not keep.

    Args:
        root: where the logits stand in the loop's graph, not freed yet.
        sources: where the student's outputs do.
        class_dim: of the logits.

    Raises:
        Untraceable: anything else.
    """

    def __init__(self, root: Edge, sources: Sequence[Edge], class_dim: int) -> None:
        self._class_dim = class_dim
        self._steps: list[Step] = []
        self._places = {source: i for i, source in enumerate(sources)}
        self._count = len(sources)
        self._class_axes: dict[Edge, int] = {}
        self._root = self._place(root, class_dim % len(_shape(root)))
        self.class_axes = [self._class_axes[source] for source in sources]
        """The class axis of every output."""

    def _place(self, edge: Edge, class_axis: int) -> int:
        if self._class_axes.setdefault(edge, class_axis) != class_axis:
            raise Untraceable("classes along several axes")
        if edge in self._places:
            return self._places[edge]
        node, _ = edge
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        if name not in _RULES:
            raise Untraceable(name)
        step = _RULES[name](_Seen(edge, class_axis))
        children = [child for child in node.next_functions if child[0] is not None]
        if len(children) < len(node.next_functions) and name not in ("Mul", "Div"):
            raise Untraceable(f"{name} of a constant")
        step.sources = [self._place(child, step.class_axis) for child in children]
        self._steps.append(step)
        self._places[edge] = self._count + len(self._steps) - 1
        return self._places[edge]

    def __call__(self, *outputs: Tensor) -> Tensor:
        """The logits of these outputs."""
        values = list(outputs)
        for step in self._steps:
            values.append(step.repeat(*(values[i] for i in step.sources)))
        return values[self._root]

    def positions(self, shape: Sequence[int]) -> Tensor:
        """For every sample of the logits, the position of the output that it was made of.

        Args:
            shape: of the output, which has to be one; positions are counted without classes.

        Raises:
            Untraceable: a sample is made of several positions.
        """
        if self._count != 1 or any(step.kind == "mixes" for step in self._steps):
            raise Untraceable("a sum of several positions")
        (axis,) = self.class_axes
        grid = [size for i, size in enumerate(shape) if i != axis]
        values = [torch.arange(math.prod(grid)).view(grid).unsqueeze(axis)]
        for step in self._steps:
            value = values[step.sources[0]]
            values.append(step.repeat(value) if step.kind == "moves" else value)
        return values[self._root].squeeze(self._class_dim)


def _shape(edge: Edge) -> tuple[int, ...]:
    node, number = edge
    return tuple(output_format(node, number).shape)


class _Seen:
    """What a node of the graph tells of its operation."""

    def __init__(self, edge: Edge, class_axis: int) -> None:
        self.node, self.number = edge
        self.class_axis = class_axis
        """Of the result."""
        self.shape = _shape(edge)
        """Of the result."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.node, f"_saved_{name}")
        if isinstance(value, tuple) and all(isinstance(part, int) for part in value):
            return tuple(map(_signed, value))
        return _signed(value) if isinstance(value, int) else value

    @property
    def result(self) -> Any:
        """The format of the result."""
        return output_format(self.node, self.number)


def _signed(value: int) -> int:
    """autograd shows −1 as 2⁶⁴ − 1."""
    return value - 2**64 if value >= 2**63 else value


def _slice(seen: _Seen) -> Step:
    dim, bounds = seen.dim, slice(seen.start, seen.end, seen.step)
    of_classes = dim == seen.class_axis

    def repeat(x: Tensor) -> Tensor:
        return x[(slice(None),) * dim + (bounds,)]

    return Step(repeat, seen.class_axis, "keeps" if of_classes else "moves")


def _select(seen: _Seen) -> Step:
    dim, index = seen.dim, seen.index
    return Step(lambda x: x.select(dim, index), seen.class_axis + (dim <= seen.class_axis))


def _unbind(seen: _Seen) -> Step:
    dim, number = seen.dim, seen.number
    return Step(lambda x: x.unbind(dim)[number], seen.class_axis + (dim <= seen.class_axis))


def _split(seen: _Seen) -> Step:
    size, dim, number = seen.split_size, seen.dim, seen.number
    kind = "keeps" if dim == seen.class_axis else "moves"
    return Step(lambda x: x.split(size, dim)[number], seen.class_axis, kind)


def _reshape(seen: _Seen) -> Step:
    """Axes that are merged, dropped or added with size 1; others keep their size."""
    groups = _merged(seen.self_sym_sizes, seen.shape)
    if len(groups[seen.class_axis]) != 1:
        raise Untraceable("a reshape that merges classes")

    def repeat(x: Tensor) -> Tensor:
        return x.reshape([math.prod(x.shape[axis] for axis in group) for group in groups])

    return Step(repeat, groups[seen.class_axis][0])


def _merged(old: tuple[int, ...], new: tuple[int, ...]) -> list[list[int]]:
    """For every new axis, the old ones that it is made of."""
    groups: list[list[int]] = []
    left = list(range(len(old)))
    for i, size in enumerate(new):
        group: list[int] = []
        while left and (
            math.prod(old[axis] for axis in group) < size
            or (old[left[0]] == 1 and (size == 1) > len(group))
            or (old[left[0]] == 1 and len(left) > len(new) - i - 1)
        ):
            group.append(left.pop(0))
        if math.prod(old[axis] for axis in group) != size:
            raise Untraceable("a reshape that splits an axis")
        groups.append(group)
    return groups


def _squeeze(seen: _Seen) -> Step:
    sizes = seen.self_sym_sizes
    dims = seen.dim if hasattr(seen.node, "_saved_dim") else tuple(range(len(sizes)))
    dims = (dims,) if isinstance(dims, int) else dims
    dropped = tuple(dim % len(sizes) for dim in dims if sizes[dim] == 1)
    kept = [axis for axis in range(len(sizes)) if axis not in dropped]
    return Step(lambda x: x.squeeze(dropped), kept[seen.class_axis])


def _unsqueeze(seen: _Seen) -> Step:
    dim, axis = seen.dim % len(seen.shape), seen.class_axis
    if dim == axis:
        raise Untraceable("classes that are one")
    return Step(lambda x: x.unsqueeze(dim), axis - (dim < axis))


def _permute(seen: _Seen) -> Step:
    dims = [dim % len(seen.shape) for dim in seen.dims]
    return Step(lambda x: x.permute(dims), dims[seen.class_axis])


def _transpose(seen: _Seen) -> Step:
    first, second = (dim % len(seen.shape) for dim in (seen.dim0, seen.dim1))
    axis = {first: second, second: first}.get(seen.class_axis, seen.class_axis)
    return Step(lambda x: x.transpose(first, second), axis)


def _t(seen: _Seen) -> Step:
    return Step(torch.t, 1 - seen.class_axis)


def _flip(seen: _Seen) -> Step:
    dims = seen.dims
    return Step(lambda x: x.flip(dims), seen.class_axis)


def _index(seen: _Seen) -> Step:
    given = [(dim, index) for dim, index in enumerate(seen.indices) if index is not None]
    if len(given) != 1 or given[0][1].dim() != 1:
        raise Untraceable("an index over samples or positions")
    dim, index = given[0]
    return _choice(seen, dim, index.nonzero().flatten() if index.dtype == torch.bool else index)


def _index_select(seen: _Seen) -> Step:
    return _choice(seen, seen.dim, seen.index)


def _choice(seen: _Seen, dim: int, index: Tensor) -> Step:
    if dim % len(seen.shape) != seen.class_axis:
        raise Untraceable("an index over samples or positions")
    return Step(lambda x: x.index_select(dim, index), seen.class_axis, "keeps")


def _to(seen: _Seen) -> Step:
    device, dtype = seen.result.device, seen.result.dtype
    return Step(lambda x: x.to(device, dtype), seen.class_axis, "keeps")


def _mul(seen: _Seen) -> Step:
    factor = _number(seen)
    return Step(lambda x: x * factor.to(x.dtype), seen.class_axis, "keeps")


def _div(seen: _Seen) -> Step:
    if seen.node.next_functions[0][0] is None:
        raise Untraceable("a division by the logits")
    divisor = _number(seen)
    return Step(lambda x: x / divisor.to(x.dtype), seen.class_axis, "keeps")


def _number(seen: _Seen) -> Tensor:
    factors = [seen.other, seen.self]
    if any(child is not None for child, _ in seen.node.next_functions[1:]):
        factors = [seen.self] if seen.node.next_functions[0][0] is None else []
    for factor in factors:
        if factor is not None and factor.dim() == 0:
            return factor.detach().clone()
    raise Untraceable("a factor that is no number")


def _entrywise(function: Callable[..., Tensor], *settings: str) -> Callable[[_Seen], Step]:
    def rule(seen: _Seen) -> Step:
        given = [getattr(seen, setting) for setting in settings]
        return Step(lambda x: function(x, *given), seen.class_axis, "keeps")

    return rule


def _sum(sign: int) -> Callable[[_Seen], Step]:
    def rule(seen: _Seen) -> Step:
        alpha = sign * seen.alpha
        return Step(lambda x, y: x + alpha * y, seen.class_axis, "mixes")

    return rule


def _cat(seen: _Seen) -> Step:
    dim = seen.dim
    return Step(lambda *parts: torch.cat(parts, dim), seen.class_axis, "mixes")


def _upsample(mode: str) -> Callable[[_Seen], Step]:
    def rule(seen: _Seen) -> Step:
        given, size = seen.self_sym_sizes[2:], seen.output_size
        names = [f"scales_{axis}" for axis in "dhw"[-len(size):]] if len(size) > 1 else ["scales"]
        factors = [getattr(seen, name) for name in names]
        corners = {} if mode == "nearest" else {"align_corners": seen.align_corners}

        def repeat(x: Tensor) -> Tensor:
            if None not in factors:
                return F.interpolate(x, scale_factor=factors, mode=mode, **corners)
            if tuple(x.shape[2:]) != given:
                raise Untraceable(f"upsampling to {size}, which fits images of one size")
            return F.interpolate(x, size=size, mode=mode, **corners)

        return Step(repeat, seen.class_axis, "mixes")

    return rule


_RULES: dict[str, Callable[[_Seen], Step]] = {
    "Slice": _slice,
    "Select": _select,
    "Split": _split,
    "Unbind": _unbind,
    "View": _reshape,
    "UnsafeView": _reshape,
    "ReshapeAlias": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Permute": _permute,
    "Transpose": _transpose,
    "T": _t,
    "Flip": _flip,
    "Index": _index,
    "IndexSelect": _index_select,
    "Clone": _entrywise(torch.clone),
    "Alias": _entrywise(torch.clone),
    "ToCopy": _to,
    "Mul": _mul,
    "Div": _div,
    "Neg": _entrywise(torch.neg),
    "Softmax": _entrywise(torch.softmax, "dim"),
    "LogSoftmax": _entrywise(torch.log_softmax, "dim"),
    "Add": _sum(1),
    "Sub": _sum(-1),
    "Cat": _cat,
    "UpsampleNearest1D": _upsample("nearest"),
    "UpsampleNearest2D": _upsample("nearest"),
    "UpsampleNearest3D": _upsample("nearest"),
    "UpsampleLinear1D": _upsample("linear"),
    "UpsampleBilinear2D": _upsample("bilinear"),
    "UpsampleBicubic2D": _upsample("bicubic"),
    "UpsampleTrilinear3D": _upsample("trilinear"),
}
