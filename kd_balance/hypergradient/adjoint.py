"""The cheap engine: the same hypergradient from forward-mode passes, without the inner graph.

One inner step is θ' = U(θ, g, state), g the gradient of Σ_i Σ_k c_i w_ik ℓ_ik(θ), c_i being 1/B for
a mean times whatever factor the user put on the criterion's result. With v = ∇L_meta(θ'),

    dL_meta/dw_ik = c_i ⟨λ, ∇ℓ_ik(θ)⟩,     λ = (∂U/∂g)ᵀ v,

and all the products ⟨λ, ∇ℓ_ik⟩ are the tangents of one forward pass at θ in direction λ. Going back
over several steps, the cotangents also pass U's other Jacobians and a Hessian-vector product. The
same pass gives it when a backward pass runs inside it (forward over reverse), which costs least
with batch norm and our own rule for it; elsewhere double backward does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from kd_balance.distributed import Ranks
from kd_balance.inner_step import InnerStep, Slots
from kd_balance.invariants import Invariants
from kd_balance.loss import WeightedKDLoss
from kd_balance.record import CriterionCall
from kd_balance.replay import LoopBackward
from kd_balance.replay.fused_rules import FusedRules
from kd_balance.torch_private import make_dual


class Adjoint:
    """dL_meta/dφ without a graph through the student, one step at a time, newest first.

    Args:
        ranks: L_meta is the mean of theirs, and so is g.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._forward_mode_works = True
        self._double_backward_works = True

    def try_without_forward_mode(self) -> bool:
        """Goes through double backward from now on; False if it did so already."""
        worked, self._forward_mode_works = self._forward_mode_works, False
        return worked

    def __call__(
        self,
        criterion: WeightedKDLoss,
        steps: list[InnerStep],
        meta_loss: Callable[[Mapping[str, Tensor]], Tensor],
        after: Mapping[str, Tensor],
        invariants: Invariants,
    ) -> tuple[Tensor, list[Tensor]]:
        """The meta loss and its gradients for the weight net's parameters.

        Args:
            criterion: the weight net is its own.
            steps: the inner steps, oldest first; φ is the same in all of them.
            meta_loss: of the student's parameters by name.
            after: the parameters that the steps moved, by name, after the last one.
            invariants: are told what should agree.
        """
        cotangents: Slots = {}
        loss, gradients = _value_and_gradients(meta_loss, after)
        (loss,) = self._ranks.mean([loss])
        cotangents["param"] = self._ranks.mean_by_name(gradients, after)
        phi = criterion.phi
        hypergradient: list[Tensor] = []
        params = dict(after)
        for step in reversed(steps):
            is_first = step is steps[0]
            params.update(step.update.put_together(step.update.params))
            cotangents = step.update.vjp(cotangents, through=not is_first)
            direction = cotangents.pop("grad", {})
            products = []
            curvature: dict[str, Tensor] = {}
            for call in step.calls if direction else ():
                weight_gradient, of_call = self._products(
                    criterion, call, params, call.part_of(direction, step.ids),
                    invariants, with_curvature=not is_first,
                )
                products.append(weight_gradient * call.weights)
                with torch.enable_grad():
                    weights = criterion.weigh(call.features, weight_gradient, call.kept)
                invariants.weighed(weights, call.weights, call.kept)
                parts = torch.autograd.grad(
                    weights, phi, weight_gradient, allow_unused=True, materialize_grads=True
                )
                if hypergradient:  # not in place: two leaves may have been given one tensor
                    parts = torch._foreach_add(hypergradient, parts)
                hypergradient = list(parts)
                _add(curvature, of_call)
            if products:
                if not is_first:
                    curvature = self._ranks.mean_by_name(curvature, params)
                    _add(cotangents.setdefault("param", {}), curvature)
                self._check_gradient(criterion, step, params, direction, products, invariants)
        return loss, self._ranks.mean(hypergradient or [torch.zeros_like(p) for p in phi])

    def _check_gradient(
        self,
        criterion: WeightedKDLoss,
        step: InnerStep,
        params: Mapping[str, Tensor],
        direction: Mapping[str, Tensor],
        products: list[Tensor],
        invariants: Invariants,
    ) -> None:
        """Holds the step's gradient against the products that came of its calls."""
        own = step.own_gradients(criterion, params)
        if own is None:
            return
        if not step.alone:
            own = self._ranks.mean_by_name(own, params)
        clipping = step.update.clipping
        if clipping is not None and clipping.is_to_norm:  # then λ is at right angles to it
            if not step.is_rare:
                return
            direction = {n: own[n] for n in direction if n in own}
            products = [
                call.weights * self._products(
                    criterion, call, params, call.part_of(direction, step.ids), invariants,
                    with_curvature=False,
                )[0]
                for call in step.calls
            ]
        parts = torch.cat([p.flatten() for p in products])
        total, size = self._ranks.mean([parts.sum(), parts.abs().sum()])
        invariants.along(own, direction, total, size)

    def _products(
        self,
        criterion: WeightedKDLoss,
        call: CriterionCall,
        params: Mapping[str, Tensor],
        direction: Mapping[str, Tensor],
        invariants: Invariants,
        *,
        with_curvature: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[N, K] dL_meta/dw of a call, and the Hessian of its loss times `direction`."""
        if with_curvature and self._double_backward_works and not call.student_call.normalises:
            try:
                return _double_backward(
                    criterion, call, params, direction, invariants, with_curvature
                )
            except RuntimeError:  # an operator without second derivative, most likely
                self._double_backward_works = False
        if self._forward_mode_works:
            try:
                return _forward_mode(
                    criterion, call, params, direction, invariants, with_curvature
                )
            except NotImplementedError as error:
                self._forward_mode_works = False
                warnings.warn(
                    "The student has an operator without forward-mode derivative, so "
                    "hypergradients go through double backward, which costs more time and "
                    f"memory. torch says: {str(error).splitlines()[0]}",
                    stacklevel=2,
                )
        return _double_backward(criterion, call, params, direction, invariants, with_curvature)


def _value_and_gradients(
    function: Callable[[Mapping[str, Tensor]], Tensor], params: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value and the gradients, whose memory nothing else shares."""
    leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
    with torch.enable_grad(), FusedRules(tangents=False):
        value = function(leaves)
    # torch.autograd.grad may give one tensor to two leaves; .grad is always a leaf's own
    torch.autograd.backward(value, inputs=list(leaves.values()))
    return value.detach(), {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


def _forward_mode(
    criterion: WeightedKDLoss,
    call: CriterionCall,
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    invariants: Invariants,
    with_curvature: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward pass with dual parameters; with curvature, a backward pass inside it."""
    curvature: dict[str, Tensor] = {}
    with fwAD.dual_level(), torch.set_grad_enabled(with_curvature):
        duals = {}
        for name, param in params.items():
            param = param.detach().requires_grad_(with_curvature)
            tangent = direction.get(name)
            duals[name] = param if tangent is None else make_dual(param, tangent)
        with FusedRules(tangents=True):
            dual_outputs = call.replay(duals)
        outputs, tangents = zip(*map(fwAD.unpack_dual, dual_outputs))
        if all(tangent is None for tangent in tangents):
            return torch.zeros_like(call.weights), curvature
        loss_tangents, gradients = _loss_tangents(
            criterion,
            call,
            [output.detach() for output in outputs],
            [torch.zeros_like(o) if t is None else t.detach() for o, t in zip(outputs, tangents)],
            invariants,
            with_curvature,
        )
        if with_curvature:
            trained = [i for i, output in enumerate(dual_outputs) if output.requires_grad]
            by_param = torch.autograd.grad(
                [dual_outputs[i] for i in trained],
                list(duals.values()),
                [make_dual(*gradients[i]) for i in trained],
                allow_unused=True,
            )
            for name, gradient in zip(duals, by_param, strict=True):
                tangent = None if gradient is None else fwAD.unpack_dual(gradient).tangent
                if tangent is not None:
                    curvature[name] = tangent.detach()
    return _by_weight(criterion, call, loss_tangents), curvature


def _loss_tangents(
    criterion: WeightedKDLoss,
    call: CriterionCall,
    outputs: list[Tensor],
    direction: list[Tensor],
    invariants: Invariants,
    with_curvature: bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """In a direction of the outputs, the derivatives of the losses and of the outputs' gradients.

    Two backward passes: the first is linear in what it begins with, and its transpose is wanted;
    its derivative by the outputs is symmetric. Forward mode does the same, but goes through softmax
    and KL in Python.

    Returns:
        The tangents of the losses [N, K]; with curvature, of every output the gradient of the
        result by it, and that gradient's tangent.
    """
    with torch.enable_grad():
        for output in outputs:
            output.requires_grad_()
        losses = call.losses(criterion, outputs)
        invariants.replayed(*call.replayed(outputs, losses))
        start = _by_losses(criterion, call, losses).requires_grad_()
        gradients = torch.autograd.grad(
            losses, outputs, start, create_graph=True, allow_unused=True
        )
        used, along = zip(*((g, d) for g, d in zip(gradients, direction) if g is not None))
        by_start, *tangents = torch.autograd.grad(
            used, (start, *outputs) if with_curvature else (start,), along, allow_unused=True
        )

    def known(of: Tensor | None, output: Tensor) -> Tensor:
        return torch.zeros_like(output) if of is None else of.detach()

    return by_start, [  # losses that are linear in the outputs have no second derivative
        (known(gradient, output), known(tangent, output))
        for gradient, tangent, output in zip(gradients, tangents, outputs)
    ]


def _by_losses(criterion: WeightedKDLoss, call: CriterionCall, losses: Tensor) -> Tensor:
    """[N, K], the derivatives of what backward was called on by the losses."""
    assert call.upstream is not None
    return call.weights * criterion.shares(call.upstream, losses.detach(), call.kept)


def _by_weight(criterion: WeightedKDLoss, call: CriterionCall, losses: Tensor) -> Tensor:
    """[N, K], the derivatives of what backward was called on by the weights, given the losses."""
    assert call.upstream is not None
    return losses * criterion.shares(call.upstream, losses, call.kept)


def _double_backward(
    criterion: WeightedKDLoss,
    call: CriterionCall,
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    invariants: Invariants,
    with_curvature: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same products as derivatives of ⟨λ, gradient⟩, through a graph of the gradient."""
    leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
    weights = call.weights.detach().requires_grad_()
    with torch.enable_grad(), LoopBackward():
        outputs = call.replay(leaves)
        losses = call.losses(criterion, outputs)
        invariants.replayed(*call.replayed(outputs, losses))
        result = criterion.combine(losses, weights, call.kept, call.targets)
        gradients = torch.autograd.grad(
            result,
            [leaves[name] for name in direction],
            call.upstream,
            create_graph=True,
            allow_unused=True,
        )
    pairs = [(g, d) for g, d in zip(gradients, direction.values(), strict=True) if g is not None]
    if not pairs:
        return torch.zeros_like(call.weights), {}
    wanted = list(leaves.values()) if with_curvature else []
    ends, cotangents = zip(*pairs)
    weight_gradient, *second = torch.autograd.grad(
        ends, [weights, *wanted], cotangents, allow_unused=True
    )
    curvature = dict(zip(leaves, second)) if with_curvature else {}
    return weight_gradient, {name: h for name, h in curvature.items() if h is not None}


def _add(totals: dict[str, Tensor], terms: Mapping[str, Tensor]) -> None:
    for name, term in terms.items():
        totals[name] = totals[name] + term if name in totals else term
