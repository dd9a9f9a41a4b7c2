"""The inner step: one optimizer update as a differentiable function of its gradient.

torch's own optimizers carry the formulas (their ``differentiable=True`` mode), so flags such as
``maximize``, ``amsgrad`` or decoupled weight decay mean here what they mean in the real step.
:class:`DifferentiableTorchOptimizer` offers them to `higher` and is registered for the optimizers
that `higher` lacks; :class:`Update` is one step held as it was before it was taken, with its
vector-Jacobian product.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import higher
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from kd_balance.clipping import Clipping
from kd_balance.gradients import copies
from kd_balance.loss import WeightedKDLoss
from kd_balance.record import CriterionCall
from kd_balance.step_products import adam_product, sgd_product

State = dict[str, Any]
Slots = dict[str, dict[str, Tensor]]
"""Tensors by what they are ("param", "grad" or a key of the optimizer state) and parameter name."""

DIFFERENTIABLE: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
)

_IMPLEMENTATIONS = {"foreach", "fused", "capturable", "differentiable"}
_COUNTERS = {"step", "mu_product"}  # state that is one number a parameter
_WITHOUT_FLOAT64 = {"mps"}  # types of devices
_CANCELLING = 100  # steps of Adam whose derivative is a difference of nearly equal terms


def is_differentiable(optimizer: Optimizer) -> bool:
    """Whether the update of `optimizer` can be differentiated; a subclass may have another one."""
    return type(optimizer) in DIFFERENTIABLE


def differentiable_step(
    kind: type[Optimizer],
    options: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
) -> tuple[list[Tensor], list[State]]:
    """One optimizer step as a differentiable function of parameters, gradients and state.

    Adaptive optimizers are computed in float64 where the device has it: in the derivative of their
    first steps two nearly equal terms cancel, which leaves three digits of float32.

    Args:
        kind: one of :data:`DIFFERENTIABLE`.
        options: the hyperparameters of a parameter group, as `kind` takes them.
        params: the parameters before the step.
        grads: their gradients, same shapes.
        states: the optimizer's state of each parameter before the step, {} where it is cold.

    Returns:
        The new parameters and the new states. No argument is modified.
    """
    exact = _exact(params[0].device) if kind is not torch.optim.SGD else None
    fresh = [p.to(exact, copy=True) for p in params]
    with _float64_counters():
        optimizer = kind(fresh, **options, foreach=False, differentiable=True)  # type: ignore
        for new, param, grad, state in zip(fresh, params, grads, states, strict=True):
            state = {k: v.to(exact, copy=True) for k, v in state.items()}
            if kind is not torch.optim.SGD:
                grad = _off_the_kink(grad.to(exact))
            elif options.get("momentum") and not state:
                state["momentum_buffer"] = _first_momentum_buffer(options, param, grad)
            if state:
                optimizer.state[new] = state
            new.grad = grad
        optimizer.step()
    for new in fresh:
        new.grad = None
    moved = [new.to(p.dtype) for new, p in zip(fresh, params, strict=True)]
    return moved, [
        {k: v if k in _COUNTERS else v.to(p.dtype) for k, v in optimizer.state[new].items()}
        for new, p in zip(fresh, params, strict=True)
    ]


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


@contextmanager
def _float64_counters() -> Iterator[None]:
    """Lets torch create its step counters in float64: in float32, 1 - 0.999**1 has 4 digits."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _off_the_kink(grad: Tensor) -> Tensor:
    """Moves exact zeros, where sqrt(grad²) has no derivative and autograd gives nan."""
    return grad + (grad == 0).to(grad.dtype) * (1e3 * torch.finfo(grad.dtype).tiny ** 0.5)


def _first_momentum_buffer(options: Mapping[str, Any], param: Tensor, grad: Tensor) -> Tensor:
    """The buffer for which a warm step equals torch's first one, which detaches its gradient."""
    if not options["dampening"]:
        return torch.zeros_like(param)
    direction = (-grad if options["maximize"] else grad) + options["weight_decay"] * param
    return direction * (options["dampening"] / options["momentum"])


class DifferentiableTorchOptimizer(higher.optim.DifferentiableOptimizer):
    """A torch optimizer for `higher`, computed by torch's own differentiable mode.

    Importing this module registers it for AdamW, NAdam and RAdam, so ``higher.innerloop_ctx``
    takes them. For the optimizers that `higher` brings itself, its own class stays registered.
    """

    def __init__(self, other: Optimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(other, *args, **kwargs)
        self._kind = type(other)

    def _update(self, grouped_grads: list[list[Tensor]], **kwargs: Any) -> None:
        for group, states, grads in zip(self.param_groups, self.state, grouped_grads, strict=True):
            moved = [i for i, grad in enumerate(grads) if grad is not None]
            params, new_states = differentiable_step(
                self._kind,
                _hyperparameters(self._kind, group),
                [group["params"][i] for i in moved],
                [grads[i] for i in moved],
                [states[i] for i in moved],
            )
            for i, param, state in zip(moved, params, new_states, strict=True):
                group["params"][i], states[i] = param, state


for _kind in (torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam):
    higher.register_optim(_kind, DifferentiableTorchOptimizer)


def _hyperparameters(kind: type[Optimizer], group: Mapping[str, Any]) -> dict[str, Any]:
    accepted = set(inspect.signature(kind.__init__).parameters) - {"self", "params"}
    return {k: v for k, v in group.items() if k in accepted - _IMPLEMENTATIONS}


def _state(optimizer: Optimizer, param: Tensor) -> State:
    return {k: v for k, v in optimizer.state.get(param, {}).items() if v is not None}


@dataclass
class GroupUpdate:
    """The part of an :class:`Update` that one parameter group takes."""

    kind: type[Optimizer]
    options: dict[str, Any]
    names: list[str]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]

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


@dataclass
class Update:
    """One optimizer step of the student, held as it was before it was taken.

    It holds references to the live tensors until :meth:`freeze`.
    """

    groups: list[GroupUpdate]
    clipping: Clipping | None = None

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        names: Mapping[Tensor, str],
        *,
        clipping: Clipping | None = None,
        plain_sgd: bool = False,
    ) -> Update:
        """The step that `optimizer` is about to take.

        Args:
            optimizer: its parameters hold their gradients; those without one do not move.
            names: the name in the student of every parameter of interest.
            clipping: what the loop did to the gradients after backward.
            plain_sgd: take a step of SGD at each group's learning rate instead, without momentum
                and weight decay, as the look-ahead of the BiKD authors' program.
        """
        groups = []
        for group in optimizer.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p in names]
            if not params:
                continue
            kind = torch.optim.SGD if plain_sgd else type(optimizer)
            options = _hyperparameters(kind, group)
            if plain_sgd:
                options = {"lr": group["lr"], "maximize": group.get("maximize", False)}
            states = [{} if plain_sgd else _state(optimizer, p) for p in params]
            grads = [p.grad.detach() for p in params]
            own_names = [names[p] for p in params]
            data = [p.detach() for p in params]
            groups.append(GroupUpdate(kind, options, own_names, data, grads, states))
        return cls(groups, clipping)

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
            if states or not group.is_linear:
                group.states = _copied(group.states)

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
        for group in self.groups:
            new, _ = differentiable_step(
                group.kind, group.options, group.params, group.grads, group.states
            )
            after.update(zip(group.names, new, strict=True))
        return after

    def vjp(self, cotangents: Slots, *, through: bool = False) -> Slots:
        """The vector-Jacobian product of the step.

        Args:
            cotangents: of the new parameters ("param") and of the new state (by its key). Without
                `through` they are used up.
            through: also return the cotangents of the old parameters and of the old state.

        Returns:
            Cotangents of the gradients before clipping ("grad"), and of the rest where `through`.
        """
        result: Slots = defaultdict(dict)
        if through:
            own = {name for group in self.groups for name in group.names}
            for slot, by_name in cotangents.items():
                result[slot].update((n, c) for n, c in by_name.items() if n not in own)
        for group in self.groups:
            for alike in _alike(group):
                product = _linear_vjp if group.is_linear else _elementwise_vjp
                for slot, by_name in product(group, alike, cotangents, through).items():
                    result[slot].update(by_name)
        if self.clipping is not None:
            result["grad"] = self.clipping.product(result["grad"], self.grads)
        return dict(result)


@dataclass
class InnerStep:
    """One step of the student: the criterion calls behind its gradient, and the update."""

    calls: list[CriterionCall]
    update: Update
    gradients: dict[str, Tensor]
    """What the step's backward passes added to the gradients, by name, before clipping."""
    alone: bool
    """Whether nothing but these calls reached them."""
    ids: dict[str, int]
    """The identities of the live parameters, by name."""
    is_rare: bool = False
    """Whether costly checks are due, such as to repeat the calls' backward passes."""

    def own_gradients(
        self, criterion: WeightedKDLoss, params: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """The calls' part of the gradients; None where it is not known without a replay.

        Args:
            criterion: of the calls.
            params: that the calls were made with.
        """
        if self.alone:
            return self.gradients
        if not self.is_rare:
            return None
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        for call in self.calls:
            mapped = call.part_of(leaves, self.ids)
            with torch.enable_grad():
                losses = call.losses(criterion, call.replay({**params, **mapped}))
                result = criterion.combine(losses, call.weights, call.targets)
            torch.autograd.backward(result, call.upstream, inputs=list(mapped.values()))
        return {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


def steps_as_written(optimizer: Optimizer) -> bool:
    """Whether a step runs nothing but torch's own code, without hooks and patches."""
    patch = vars(optimizer).get("step")  # schedulers wrap it
    return is_differentiable(optimizer) and not (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or (patch is not None and getattr(patch, "__wrapped__", None) is not type(optimizer).step)
        or hasattr(optimizer, "grad_scale")  # of a GradScaler, for a fused step
    )


def predicted(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """What the coming step makes of every parameter by the optimizer's own formula, hooks aside."""
    held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not held:
        return {}
    moved = dict(zip(held, copies([p.detach() for p in held]), strict=True))
    shadow = object.__new__(type(optimizer))
    vars(shadow).update(vars(optimizer))
    shadow.param_groups = [
        {
            **group,
            "params": [moved[p] for p in group["params"] if p in moved],
            "foreach": not (group.get("fused") or group.get("differentiable")),
        }
        for group in optimizer.param_groups
    ]
    states = _copied([dict(optimizer.state.get(p, {})) for p in held])
    shadow.state = defaultdict(dict, zip(moved.values(), states, strict=True))
    gradients = copies([p.grad.detach() for p in held if p.grad is not None])
    for copy, gradient in zip(moved.values(), gradients, strict=True):
        copy.grad = gradient  # torch adds Nesterov's momentum in place
    shadow._optimizer_step_pre_hooks = OrderedDict()
    shadow._optimizer_step_post_hooks = OrderedDict()
    type(optimizer).step(shadow)
    for copy in moved.values():
        copy.grad = None
    return moved


def _copied(states: list[State]) -> list[State]:
    by_key: dict[str, list[Tensor]] = defaultdict(list)
    for state in states:
        for key, value in state.items():
            if isinstance(value, Tensor):
                by_key[key].append(value)
    held = {key: iter(copies(tensors)) for key, tensors in by_key.items()}
    return [
        {k: next(held[k]) if isinstance(v, Tensor) else v for k, v in state.items()}
        for state in states
    ]


def _alike(group: GroupUpdate) -> list[list[int]]:
    """Indices of the parameters whose updates are one and the same elementwise function."""
    buckets: dict[Any, list[int]] = defaultdict(list)
    is_adam = group.is_adam
    for i, state in enumerate(group.states):
        counters = tuple((k, _known(is_adam, state[k])) for k in sorted(state) if k in _COUNTERS)
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
    vectors = [k for k in group.states[indices[0]] if k not in _COUNTERS]
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
    state = {k: v if k in _COUNTERS else inputs[k] for k, v in first.items()}
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
    exact = _exact(inputs["param"].device)
    step: float | Tensor = 1.0
    if state := group.states[chunk[0][0]]:
        if _known(True, state["step"]) is None:
            counters = [group.states[i]["step"].expand(p.stop - p.start) for i, p in chunk]
            step = torch.cat(counters).to(exact) + 1
        else:
            step = float(state["step"]) + 1
            exact = exact if step <= _CANCELLING else inputs["param"].dtype
    inputs = {slot: tensor.to(exact) for slot, tensor in inputs.items()}
    inputs["grad"] = _off_the_kink(inputs["grad"])
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
