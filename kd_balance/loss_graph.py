"""What a loss is made of, read off its autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.autograd.function import BackwardCFunction

Node = Any

_LINEAR = frozenset(
    # sums and copies
    "Add Sub Rsub Neg Sum Mean Nansum Cumsum ToCopy Clone Alias Copys Stack Cat Lerp "
    # other shapes
    "View UnsafeView ReshapeAlias Squeeze Unsqueeze Expand Permute Transpose T Mt Flatten Unbind "
    "Split SplitWithSizes Repeat AsStrided Detach "
    # linear piece by piece, the pieces chosen by values
    "Select Slice Narrow Index IndexSelect Gather Where MaskedFill MaskedSelect Scatter IndexPut "
    "Topk Sort Max Min Amax Amin Maximum Minimum Clamp ClampMin ClampMax Relu Abs Threshold "
    "LeakyRelu HardtanhBackward Median Kthvalue".split()
)
_PRODUCTS = frozenset("Mul Dot Mv Mm Bmm Addcmul Div".split())


@dataclass
class Surroundings:
    """What stands between the results of a criterion and the tensor that backward was called on."""

    alone: bool = True
    """Whether nothing else that backward reached is made of the student's parameters."""
    factor_learns: bool = False
    """Whether a result was multiplied by something that depends on them."""
    nonlinear: str | None = None
    """The operation that a result went through and that is not linear in it."""


def surroundings(
    roots: Iterable[Node], is_result: Callable[[Node], bool], is_student: Callable[[Node], bool]
) -> Surroundings:
    """Walks from the roots of a graph to the results.

    Args:
        roots: the nodes of the tensors that backward was called on.
        is_result: whether a node is where a result of the criterion came from.
        is_student: whether a node is an output or a parameter of the student.
    """
    found = Surroundings()
    holds: dict[Node, tuple[bool, bool]] = {}  # a result; anything else of the student
    for node in _children_first(roots, lambda n: is_result(n) or is_student(n)):
        if is_result(node):
            holds[node] = True, False
        elif is_student(node):
            holds[node] = False, True
        else:
            parts = [holds[child] for child, _ in node.next_functions if child in holds]
            holds[node] = any(r for r, _ in parts), any(s for _, s in parts)
            if holds[node][0]:
                _look_at(node, holds, found)
    found.alone = not any(holds[root][1] for root in roots)
    return found


def leaves(roots: Iterable[Node], stop: Callable[[Node], bool]) -> Iterator[Any]:
    """The leaf tensors of a graph, as far as they lie before the nodes to stop at."""
    for node in _children_first(roots, stop):
        if hasattr(node, "variable"):
            yield node.variable


def _look_at(node: Node, holds: dict[Node, tuple[bool, bool]], found: Surroundings) -> None:
    """Notes what the operation does to the results within it."""
    name = node.name().rstrip("0123456789").removesuffix("Backward")
    operands = [holds.get(child, (False, False)) for child, _ in node.next_functions]
    if name in _LINEAR or isinstance(node, BackwardCFunction):
        return
    divides = name == "Div" and len(operands) > 1 and operands[1][0]
    if name not in _PRODUCTS or sum(result for result, _ in operands) > 1 or divides:
        found.nonlinear = name
    elif any(student and not result for result, student in operands):
        found.factor_learns = True


def _children_first(roots: Iterable[Node], stop: Callable[[Node], bool]) -> Iterator[Node]:
    seen: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            if not stop(node):
                stack += [(child, False) for child, _ in node.next_functions]
