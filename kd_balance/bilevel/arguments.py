"""What cannot work together, refused before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_balance.bilevel.settings import Settings
from kd_balance.bilevel.student_step import needs_closure
from kd_balance.inner_step import DIFFERENTIABLE, full_name, is_differentiable, known_optimizers
from kd_balance.inner_step.rules import update_rule
from kd_balance.joint import parts, shares_out
from kd_balance.loop_warnings import loop_level
from kd_balance.loss import WeightedKDLoss


def weight_net_of(criterion: WeightedKDLoss) -> nn.Module:
    """The one to train.

    Raises:
        TypeError, ValueError: there is none.
    """
    if not isinstance(criterion, WeightedKDLoss):
        raise TypeError(
            f"criterion is {type(criterion).__name__}, expected a WeightedKDLoss: put your own "
            "losses into its hard_loss and soft_loss."
        )
    if criterion.weight_net is None:
        raise ValueError(
            "criterion has no weight_net, expected one to train: write "
            "WeightedKDLoss(MetaWeightNet(), …)."
        )
    if not criterion.phi:
        raise ValueError(
            f"weight_net is a {type(criterion.weight_net).__name__} without a parameter that "
            "requires a gradient, expected one to train: leave some unfrozen, or keep the plain "
            "optimizer."
        )
    return criterion.weight_net


def check_optimizer(optimizer: Optimizer, settings: Settings) -> None:
    """Looks whether the optimizer's step can be differentiated as the settings say.

    Raises:
        TypeError, ValueError: it cannot.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is {type(optimizer).__name__}, expected a torch.optim.Optimizer."
        )
    needs_formula = settings.method != "paper" and settings.step_derivative == "exact"
    differentiable = not needs_formula or is_differentiable(optimizer)
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer) and not differentiable:
        refuse_outer(optimizer)
    if any(isinstance(part, torch.optim.SparseAdam) for part in parts(optimizer)):
        raise ValueError(
            "optimizer is SparseAdam, which steps along sparse gradients alone, expected dense "
            "ones: make embeddings with sparse=False, and use Adam."
        )
    if settings.method != "paper" and any(map(needs_closure, parts(optimizer))):
        raise ValueError(
            f"optimizer is {type(optimizer).__name__}, whose step computes the loss several times, "
            "expected steps along one gradient: set method='paper', which works with any."
        )
    if not differentiable:
        _refuse_unknown(optimizer)
    if settings.method == "paper" or settings.step_derivative == "sgd":
        _check_rate(optimizer)
    if shares_out(optimizer) and settings.engine == "unroll":
        raise ValueError(
            "optimizer is a ZeroRedundancyOptimizer and engine is 'unroll', expected engine "
            "'adjoint': the graph of the whole inner run needs the states of all processes."
        )
    if needs_formula and any(type(part) is torch.optim.Rprop for part in parts(optimizer)):
        warnings.warn(
            "Rprop's step follows the signs of the gradients, whose derivative is zero, so the "
            "weight net learns nothing from it: set step_derivative='sgd'.",
            stacklevel=loop_level(),
        )


def check_steps_shards(optimizer: Optimizer, settings: Settings) -> None:
    """Looks whether an optimizer steps every element by itself, so that shards may be stepped.

    Raises:
        ValueError: it does not, or it is not known to.
    """
    kinds = [full_name(type(part)) for part in parts(optimizer)]
    together = [full_name(type(p)) for p in parts(optimizer) if update_rule(type(p)) is not None]
    if together or settings.step_derivative == "finite_difference":
        raise ValueError(
            f"optimizer is {(together or kinds)[0]} and the student's parameters are shards, "
            "expected one that is known to move each element by itself: take SGD, Adam or AdamW, "
            "or train in DistributedDataParallel."
        )
    if shares_out(optimizer):
        raise ValueError(
            "optimizer is a ZeroRedundancyOptimizer and the student's parameters are shards, "
            "expected one of the two: give the shards to the optimizer itself."
        )


def refuse_outer(optimizer: Optimizer) -> NoReturn:
    """Of an optimizer that is itself around another one.

    Raises:
        ValueError: always.
    """
    within = getattr(optimizer, "optimizer", None)
    raise ValueError(
        f"optimizer is {type(optimizer).__name__} around {type(within).__name__}, expected the "
        "innermost optimizer: wrap that one, and prepare or wrap the BilevelOptimizer "
        "afterwards."
    )


def _refuse_unknown(optimizer: Optimizer) -> NoReturn:
    known = {*map(full_name, DIFFERENTIABLE), *known_optimizers()}
    theirs = sorted(name.split(".")[-1] for name in known if name.startswith("torch.optim."))
    others = sorted(name for name in known if not name.startswith("torch.optim."))
    kinds = " and ".join(full_name(type(part)) for part in parts(optimizer))
    raise ValueError(
        f"optimizer is {kinds}, whose step's derivative is not known; "
        f"expected torch.optim's {', '.join(theirs)}, or {', '.join(others)}: set "
        "step_derivative='finite_difference' or 'sgd', tell "
        "kd_balance.inner_step.register_update_rule of it, or set method='paper', which works "
        "with any."
    )


def _check_rate(optimizer: Optimizer) -> None:
    """Looks for a rate, which a step of plain SGD needs."""
    if any(group.get("lr", 0) is None for group in optimizer.param_groups):
        raise ValueError(
            f"lr is None in a group of {full_name(type(optimizer))}, whose step was to be taken "
            "for plain SGD's, expected a number: give it an lr and relative_step=False, or keep "
            "method='online' and step_derivative='exact'."
        )


def check_parameters(
    optimizer: Optimizer, names: Mapping[Tensor, str], weight_net: nn.Module
) -> None:
    """Looks at what the optimizer holds.

    Args:
        optimizer: to be wrapped.
        names: of the student's parameters.
        weight_net: which has an optimizer of its own.

    Raises:
        ValueError: it is not the student's.
    """
    params = {p for group in optimizer.param_groups for p in group["params"]}
    if any(p in params for p in weight_net.parameters()):
        raise ValueError(
            "optimizer holds parameters of the weight net, expected the student's alone: the "
            "weight net has a meta_optimizer of its own."
        )
    if not any(p in params for p in names):
        raise ValueError(
            "optimizer holds no parameter of the student, expected the optimizer that moves it: "
            "wrap that one, and give the same student."
        )


def check_one_device(student: nn.Module) -> None:
    """Looks where the student is.

    Raises:
        ValueError: on several devices.
    """
    replicas = len(student.device_ids or ()) if isinstance(student, nn.DataParallel) else 1
    devices = max(replicas, len({p.device for p in student.parameters()}))
    if devices > 1:
        raise ValueError(
            f"student runs on {devices} devices at once, expected one: train it with one process "
            "for each, in DistributedDataParallel."
        )


def check_modules(student: nn.Module) -> None:
    """Looks for modules that cannot be repeated, or whose gradients are sparse.

    Raises:
        ValueError: there is one.
    """
    for name, module in student.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"student holds a ScriptModule ({name or 'itself'}), which cannot be repeated "
                "under other parameters, expected ordinary modules: use torch.compile in place of "
                "torch.jit.script."
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ValueError(
                f"student has sparse gradients ({name}), expected dense ones: make the embedding "
                "with sparse=False."
            )
