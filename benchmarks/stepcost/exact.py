"""Hypergradients in float64 by unrolling, from the definition of each row's inner step.

Nothing here comes from kd_balance, so that its rows are measured against something else.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from stepcost.case import Batch
from stepcost.losses import meta_loss, sample_losses, weight_features

Params = dict[str, Tensor]


@dataclass
class Snapshot:
    """Student, its optimizer and the weight net in float64, as they were before a step."""

    student: nn.Module
    weight_net: nn.Module
    kind: type[Optimizer]
    options: dict
    state: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, student: nn.Module, optimizer: Optimizer, weight_net: nn.Module) -> Snapshot:
        (group,) = optimizer.param_groups
        by_position = optimizer.state_dict()["state"]
        names = [name for name, _ in student.named_parameters()]
        state: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for i, slots in by_position.items():
            state[names[i]] = {k: v.to(torch.float64, copy=True) for k, v in slots.items()}
        kind = type(getattr(optimizer, "optimizer", optimizer))
        return cls(_double(student), _double(weight_net), kind, dict(group), state)

    def params(self) -> Params:
        return {n: p.detach().requires_grad_() for n, p in self.student.named_parameters()}


def _double(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        fresh = copy.deepcopy(module)
        for p in fresh.parameters():
            p.grad = None
        return fresh.double()


def hypergradient(definition: str, before: Snapshot, train: Batch, meta: Batch) -> list[Tensor]:
    """dL_meta/dφ for one inner step.

    Args:
        definition: "sgd", where the step is the learning rate times the gradient; "optimizer",
            where it is the student's own step; or "darts", where the step is the student's own and
            its derivative is replaced by the identity, −∂²L_train/∂φ∂θ · ∇L_meta, both taken after
            it: the limit of betty's finite difference.
        before: everything as it was before the step.
        train, meta: the batches of the step.
    """
    with sdpa_kernel(SDPBackend.MATH):
        params = before.params()
        loss = _train_loss(before, params, train, detached=True)
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        after = _moved(before, params, dict(zip(params, gradients)), definition == "sgd")
        if definition == "darts":
            return _darts(before, after, train, meta)
        return _grad(_meta_loss(before, after, meta), list(before.weight_net.parameters()))


def _darts(before: Snapshot, after: Params, train: Batch, meta: Batch) -> list[Tensor]:
    after = {name: p.detach().requires_grad_() for name, p in after.items()}
    v = _grad(_meta_loss(before, after, meta), list(after.values()))
    loss = _train_loss(before, after, train, detached=False)
    phi = list(before.weight_net.parameters())
    by_phi = torch.autograd.grad(loss, phi, create_graph=True)
    # the derivative of by_phi along v, by differentiating twice
    u = [torch.zeros_like(g, requires_grad=True) for g in by_phi]
    pulled = torch.autograd.grad(by_phi, list(after.values()), u, create_graph=True)
    return [-g for g in _grad(sum((a * b).sum() for a, b in zip(pulled, v)), u)]


def _train_loss(before: Snapshot, params: Params, train: Batch, *, detached: bool) -> Tensor:
    logits = functional_call(before.student, params, (_inputs(train),))
    teacher_logits = train.teacher_logits.double()
    losses = sample_losses(logits, teacher_logits, train.targets)
    features = weight_features(losses, teacher_logits, train.targets)
    weights = before.weight_net(features.detach() if detached else features)
    return (losses * weights).sum() / len(losses)


def _meta_loss(before: Snapshot, params: Params, meta: Batch) -> Tensor:
    return meta_loss(functional_call(before.student, params, (_inputs(meta),)), meta.targets)


def _inputs(batch: Batch) -> Tensor:
    return batch.inputs.double() if batch.inputs.is_floating_point() else batch.inputs


def _moved(before: Snapshot, params: Params, gradients: Params, plain: bool) -> Params:
    """The parameters after a step, the formulas written out."""
    o = before.options
    after = {}
    for name, p in params.items():
        g, state = gradients[name], before.state[name]
        if plain:
            after[name] = p - o["lr"] * g
        elif before.kind is torch.optim.SGD:
            g = g + o["weight_decay"] * p
            after[name] = p - o["lr"] * (o["momentum"] * state.get("momentum_buffer", 0) + g)
        elif before.kind is torch.optim.AdamW:
            beta1, beta2 = o["betas"]
            count = state["step"] + 1
            first = (beta1 * state["exp_avg"] + (1 - beta1) * g) / (1 - beta1**count)
            second = (beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2) / (1 - beta2**count)
            p = p * (1 - o["lr"] * o["weight_decay"])
            # at zero, where sqrt has no derivative, the gradient does not depend on φ
            root = torch.where(second > 0, second, 1).sqrt() * (second > 0)
            after[name] = p - o["lr"] * first / (root + o["eps"])
        else:
            raise ValueError(f"the optimizer is {before.kind.__name__}, expected SGD or AdamW.")
    return after


def _grad(value: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The norm of the difference over the norm of the exact one."""
    difference = torch.stack([(f - e).norm() for f, e in zip(found, exact, strict=True)]).norm()
    return (difference / torch.stack([e.norm() for e in exact]).norm()).item()
