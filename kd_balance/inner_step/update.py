"""One optimizer step held as it was before it was taken, and its vector-Jacobian product."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_balance.clipping import Clipping
from kd_balance.distributed import Ranks
from kd_balance.gradient_transform import GradientTransform
from kd_balance.gradients import copies
from kd_balance.inner_step.differentiable import (
    COUNTERS,
    differentiable_step,
    exact_dtype,
    hyperparameters,
    off_the_kink,
)
from kd_balance.inner_step.own_step import StepCopy, copied
from kd_balance.inner_step.products import adam_product, sgd_product
from kd_balance.inner_step.rules import State, update_rule
from kd_balance.joint import parts, shares_out, wholes
from kd_balance.shards import Shards, own, own_state

Slots = dict[str, dict[str, Tensor]]
"""Tensors by what they are ("param", "grad" or a key of the optimizer state) and parameter name."""

_CANCELLING = 100  # steps of Adam whose derivative is a difference of nearly equal terms


def _state(optimizer: Optimizer, param: Tensor) -> State:
    state = {k: v for k, v in optimizer.state.get(param, {}).items() if v is not None}
    return own_state(state)


@dataclass
class GroupUpdate:
    """The part of an :class:`Update` that one parameter group takes."""

    kind: type[Optimizer]
    options: dict[str, Any]
    names: list[str]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    is_own: bool = True
    """Whether this process steps them, and has their states."""

    @property
    def is_linear(self) -> bool:
        """Whether the Jacobian is a handful of numbers, whatever parameters and state hold."""
        return self.kind is torch.optim.SGD

    @property
    def is_adam(self) -> bool:
        """Whether :func:`adam_product` knows the Jacobian."""
        numbers = all(isinstance(beta, float) for beta in self.options.get("betas", ()))
        known = self.kind in (torch.optim.Adam, torch.optim.AdamW)
        return known and numbers and not self.options["amsgrad"]

    @property
    def is_elementwise(self) -> bool:
        """Whether every element moves by itself."""
        return update_rule(self.kind) is None

    def product(self, indices: list[int], cotangents: Slots, through: bool) -> Slots:
        """The vector-Jacobian product for parameters that are updated alike."""
        if self.is_linear:
            return _linear_vjp(self, indices, cotangents, through)
        if self.is_elementwise:
            return _elementwise_vjp(self, indices, cotangents, through)
        return _whole_vjp(self, indices[0], cotangents, through)


@dataclass
class Update:
    """One optimizer step of the student, held as it was before it was taken.

    It holds references to the live tensors until :meth:`freeze`; of those that are spread over the
    processes, this one's parts.
    """

    groups: list[GroupUpdate]
    clipping: Clipping | None = None
    transforms: Sequence[GradientTransform] = ()
    """What the loop did to the gradients before clipping."""
    own_steps: list[StepCopy] = field(default_factory=list)
    """Where products are finite differences of the optimizers' own steps."""
    ranks: Ranks | None = None
    """Where other processes step some of the parameters."""
    shards: Shards | None = None
    """Where each steps its part of every parameter."""

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        names: Mapping[Tensor, str],
        *,
        clipping: Clipping | None = None,
        transforms: Sequence[GradientTransform] = (),
        plain_sgd: bool = False,
        finite_difference: bool = False,
        ranks: Ranks | None = None,
        shards: Shards | None = None,
    ) -> Update:
        """The step that `optimizer` is about to take.

        Args:
            optimizer: its parameters hold their gradients; those without one do not move.
            names: the name in the student of every parameter of interest.
            clipping, transforms: what the loop did to the gradients after backward.
            plain_sgd: take a step of SGD at each group's learning rate instead, without momentum
                and weight decay, as the look-ahead of the BiKD authors' program.
            finite_difference: differentiate the optimizer's own step, whose formula is not known.
            ranks: the processes that a ZeroRedundancyOptimizer shares the parameters out to.
            shards: the parameters, if each process has a part of them.
        """
        groups = []
        for whole, part in zip(wholes(optimizer), parts(optimizer), strict=True):
            held = {p for group in part.param_groups for p in group["params"]}
            for group, is_own in itertools.product(whole.param_groups, (True, False)):
                params = [p for p in group["params"] if p.grad is not None and p in names]
                params = [p for p in params if plain_sgd or (p in held) == is_own]
                if not params or (plain_sgd and not is_own):
                    continue
                kind = torch.optim.SGD if plain_sgd else type(part)
                options = hyperparameters(kind, group)
                if plain_sgd:
                    options = {"lr": group["lr"], "maximize": group.get("maximize", False)}
                states = [{} if plain_sgd else _state(part, p) for p in params]
                grads = [own(p.grad) for p in params]
                own_names = [names[p] for p in params]
                data = [own(p) for p in params]
                groups.append(GroupUpdate(kind, options, own_names, data, grads, states, is_own))
        copied_steps = parts(optimizer) if finite_difference else []
        steps = [StepCopy(part, names) for part in copied_steps]
        # some rank has none of another's, whose exchanges it has to enter all the same
        shared = ranks if shares_out(optimizer) and not plain_sgd else None
        return cls(groups, clipping, transforms, steps, shared, shards)

    def freeze(self, *, grads: bool, states: bool) -> None:
        """Copies what the real step, or a scheduler after it, is about to overwrite.

        Args:
            grads: copy the gradients too; without, they must be used before they are cleared.
            states: copy the state of linear updates too, whose Jacobian does not need it.
        """
        for group in self.groups:
            group.options = {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in group.options.items()
            }
            group.params = copies(group.params)
            if grads:
                group.grads = copies(group.grads)
            if not self.own_steps and (states or not group.is_linear):
                group.states = copied(group.states)

    @property
    def _own_groups(self) -> list[GroupUpdate]:
        return [group for group in self.groups if group.is_own]

    def _of_all(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What every process knows of the parameters that it steps, put together."""
        if self.shards is not None:
            known = {n: found.get(n, torch.zeros_like(p)) for n, p in self.params.items()}
            return self.shards.whole(known)
        if self.ranks is None:
            return dict(found)
        names = {n for group in self._own_groups for n in group.names}
        mean = self.ranks.mean_by_name({n: t for n, t in found.items() if n in names}, self.params)
        return {name: tensor * self.ranks.size for name, tensor in mean.items()}

    def put_together(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors by the names of parameters, of which every process knows its part."""
        return dict(parts) if self.shards is None else self.shards.whole(parts)

    def own(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts of whole tensors."""
        return dict(whole) if self.shards is None else self.shards.own(whole)

    def whole(self) -> Update:
        """The same step where every process has all of it."""
        if self.shards is None:
            return self
        groups = [_whole(group, self.shards) for group in self.groups]
        return replace(self, groups=groups, shards=None)

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters before the step, by name."""
        return {n: p for group in self.groups for n, p in zip(group.names, group.params)}

    @property
    def grads(self) -> dict[str, Tensor]:
        """The gradients that the step uses, by name."""
        return {n: g for group in self.groups for n, g in zip(group.names, group.grads)}

    def apply(self) -> dict[str, Tensor]:
        """The parameters after the step, by name, without a graph and without taking the step."""
        after: dict[str, Tensor] = {}
        for group in self._own_groups:
            new, _ = differentiable_step(
                group.kind, group.options, group.params, group.grads, group.states
            )
            after.update(zip(group.names, new, strict=True))
        return self._of_all(after)

    def vjp(self, cotangents: Slots, *, through: bool = False) -> Slots:
        """The vector-Jacobian product of the step.

        Args:
            cotangents: of the new parameters ("param"), whole, and of the new state (by its key),
                as :attr:`groups` hold it. Without `through` they are used up.
            through: also return the cotangents of the old parameters and of the old state.

        Returns:
            Cotangents of the gradients that backward left ("grad"), and of the rest if `through`.
        """
        result: Slots = defaultdict(dict)
        if through:
            own = {name for group in self.groups for name in group.names}
            for slot, by_name in cotangents.items():
                result[slot].update((n, c) for n, c in by_name.items() if n not in own)
        if self.shards is not None:
            moved = {n: c for n, c in cotangents.get("param", {}).items() if n in self.params}
            cotangents = {**cotangents, "param": self.own(moved)}
        for own_step in self.own_steps:
            result["grad"].update(own_step.by_gradient(cotangents.get("param", {})))
            if through:
                result["param"].update(own_step.by_param(cotangents.get("param", {})))
        for group in self._own_groups if not self.own_steps else ():
            for alike in _alike(group):
                for slot, by_name in group.product(alike, cotangents, through).items():
                    result[slot].update(by_name)
        for slot in ("grad", "param") if through else ("grad",):
            result[slot].update(self._of_all(result[slot]))
        if self.clipping is not None:
            clipped = self.put_together(self.grads)
            result["grad"] = self.clipping.product(result["grad"], clipped)
        for transform in reversed(self.transforms):
            result["grad"] = transform.pull(result["grad"])
        return dict(result)


def _whole(group: GroupUpdate, shards: Shards) -> GroupUpdate:
    def put_together(tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(shards.whole(dict(zip(group.names, tensors))).values())

    states = [
        {k: v for k, v in state.items() if k in COUNTERS or not isinstance(v, Tensor)}
        for state in group.states
    ]
    for key in dict.fromkeys(k for state in group.states for k in state):
        by_name = {n: s.get(key) for n, s in zip(group.names, group.states)}
        split = {n: v for n, v in by_name.items() if isinstance(v, Tensor)}
        if key not in COUNTERS:
            found = shards.whole(split)
            for name, state in zip(group.names, states):
                if name in found:
                    state[key] = found[name]
    return replace(
        group, params=put_together(group.params), grads=put_together(group.grads), states=states
    )


def _alike(group: GroupUpdate) -> list[list[int]]:
    """Indices of the parameters whose updates are one and the same elementwise function.

    Others stand alone.
    """
    if not group.is_elementwise:
        return [[i] for i in range(len(group.params))]
    buckets: dict[Any, list[int]] = defaultdict(list)
    is_adam = group.is_adam
    for i, state in enumerate(group.states):
        counters = tuple((k, _known(is_adam, state[k])) for k in sorted(state) if k in COUNTERS)
        param = group.params[i]
        buckets[(*counters, *sorted(state), param.device, param.dtype)].append(i)
    return list(buckets.values())


def _known(is_adam: bool, counter: Any) -> float | None:
    """The counter's value; None where reading would wait for the device and need not."""
    if is_adam and isinstance(counter, Tensor) and counter.device.type != "cpu":
        return None
    return float(counter)


def _linear_vjp(
    group: GroupUpdate, indices: list[int], cotangents: Slots, through: bool
) -> Slots:
    """The product where every element has the same constant Jacobian."""

    def given(slot: str) -> list[Tensor] | None:
        by_name = cotangents.get(slot, {})
        held = [by_name.get(group.names[i]) for i in indices]
        if all(cotangent is None for cotangent in held):
            return None
        like = [group.params[i] for i in indices]
        return [torch.zeros_like(p) if c is None else c for p, c in zip(like, held, strict=True)]

    by_param, by_buffer = given("param"), given("momentum_buffer")
    if by_param is None and by_buffer is None:
        return {}
    product = sgd_product(
        group.options,
        by_param,
        by_buffer,
        warm=bool(group.states[indices[0]]),
        in_place=not through,
    )
    names = [group.names[i] for i in indices]
    return {slot: dict(zip(names, tensors, strict=True)) for slot, tensors in product.items()}


def _elementwise_vjp(
    group: GroupUpdate, indices: list[int], cotangents: Slots, through: bool
) -> Slots:
    """The product where every element has a Jacobian of its own, over flat chunks of parameters."""
    vectors = [k for k in group.states[indices[0]] if k not in COUNTERS]
    wanted = ["grad", "param", *vectors] if through else ["grad"]
    product = _adam_vjp if group.is_adam else _autograd_vjp
    result: Slots = {slot: {} for slot in wanted}
    params = {i: group.params[i] for i in indices}
    inputs = {"param": _flat(params), "grad": _flat({i: group.grads[i] for i in indices})}
    inputs.update((k, _flat({i: group.states[i][k] for i in indices})) for k in vectors)
    incoming = {}
    for out, by_name in cotangents.items():
        given = {i: by_name.get(group.names[i]) for i in indices}
        if any(cotangent is not None for cotangent in given.values()):
            incoming[out] = _flat(
                {i: torch.zeros_like(params[i]) if c is None else c for i, c in given.items()}
            )
    sizes = [param.numel() for param in params.values()]
    for chunk in _chunks(indices, sizes, _chunk_size(params[indices[0]].device)):
        parts = {slot: _joined(chunk, tensors) for slot, tensors in inputs.items()}
        given_parts = {out: _joined(chunk, tensors) for out, tensors in incoming.items()}
        found = product(group, chunk, parts, given_parts, wanted)
        for slot in wanted:
            moved = found[slot].to(params[indices[0]].dtype)
            pieces = moved.split([part.stop - part.start for _, part in chunk])
            for (i, part), piece in zip(chunk, pieces, strict=True):
                name, param = group.names[i], params[i]
                if piece.numel() == param.numel():
                    result[slot][name] = piece.view(param.shape)
                else:
                    whole = result[slot].setdefault(name, param.new_empty(param.shape))
                    whole.view(-1)[part] = piece
    return result


def _whole_vjp(group: GroupUpdate, i: int, cotangents: Slots, through: bool) -> Slots:
    """The product where elements of a parameter move together."""
    name, param, state = group.names[i], group.params[i], group.states[i]
    vectors = [k for k, v in state.items() if k not in COUNTERS and isinstance(v, Tensor)]
    wanted = ["grad", "param", *vectors] if through else ["grad"]
    inputs = {"param": param, "grad": group.grads[i], **{k: state[k] for k in vectors}}
    inputs = {slot: tensor.detach() for slot, tensor in inputs.items()}
    incoming = {slot: by_name[name] for slot, by_name in cotangents.items() if name in by_name}
    if not incoming:
        return {}
    found = _autograd_vjp(group, [(i, slice(None))], inputs, incoming, wanted)
    return {slot: {name: found[slot]} for slot in wanted}


Chunk = list[tuple[int, slice]]


def _flat(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {i: tensor.reshape(-1) for i, tensor in tensors.items()}


def _joined(chunk: Chunk, tensors: Mapping[int, Tensor]) -> Tensor:
    return torch.cat([
        tensors[i] if part.stop - part.start == tensors[i].numel() else tensors[i][part]
        for i, part in chunk
    ])


def _autograd_vjp(
    group: GroupUpdate,
    chunk: Chunk,
    inputs: dict[str, Tensor],
    incoming: dict[str, Tensor],
    wanted: list[str],
) -> dict[str, Tensor]:
    """Through torch's own update."""
    first = group.states[chunk[0][0]]
    for slot in wanted:
        inputs[slot].requires_grad_()
    state = {k: inputs.get(k, v) for k, v in first.items()}
    (param,), (new_state,) = differentiable_step(
        group.kind, group.options, [inputs["param"]], [inputs["grad"]], [state]
    )
    outputs = {"param": param, **new_state}
    outs = [out for out in incoming if out in outputs and outputs[out].requires_grad]
    products = torch.autograd.grad(
        [outputs[out] for out in outs],
        [inputs[slot] for slot in wanted],
        [incoming[out] for out in outs],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(wanted, products, strict=True))


def _adam_vjp(
    group: GroupUpdate,
    chunk: Chunk,
    inputs: dict[str, Tensor],
    incoming: dict[str, Tensor],
    wanted: list[str],
) -> dict[str, Tensor]:
    """Written out."""
    exact = exact_dtype(inputs["param"].device)
    step: float | Tensor = 1.0
    if state := group.states[chunk[0][0]]:
        if _known(True, state["step"]) is None:
            counters = [group.states[i]["step"].expand(p.stop - p.start) for i, p in chunk]
            step = torch.cat(counters).to(exact) + 1
        else:
            step = float(state["step"]) + 1
            exact = exact if step <= _CANCELLING else inputs["param"].dtype
    inputs = {slot: tensor.to(exact) for slot, tensor in inputs.items()}
    inputs["grad"] = off_the_kink(inputs["grad"])
    incoming = {slot: tensor.to(exact) for slot, tensor in incoming.items()}
    decoupled = group.kind is torch.optim.AdamW or group.options.get("decoupled_weight_decay")
    through = "param" in wanted
    return adam_product(group.options, bool(decoupled), step, inputs, incoming, through=through)


def _chunk_size(device: torch.device) -> int:
    """Elements whose update is computed at a time: few enough for the cache, or for memory."""
    return 2**15 if device.type == "cpu" else 2**23


def _chunks(indices: list[int], sizes: list[int], most: int) -> Iterator[Chunk]:
    """Cuts parameters into lists of (index, slice of the flat parameter) of bounded size."""
    chunk: Chunk = []
    room = most
    for index, size in zip(indices, sizes, strict=True):
        start = 0
        while start < size:
            stop = min(size, start + room)
            chunk.append((index, slice(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield chunk
                chunk, room = [], most
    if chunk:
        yield chunk
