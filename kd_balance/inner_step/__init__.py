"""The inner step: one optimizer update as a differentiable function of its gradient."""

from kd_balance.inner_step.differentiable import (
    DIFFERENTIABLE,
    DifferentiableTorchOptimizer,
    differentiable_step,
    exact_dtype,
    is_differentiable,
)
from kd_balance.inner_step.own_step import StepCopy, predicted, runs_unhooked
from kd_balance.inner_step.rules import (
    State,
    full_name,
    known_optimizers,
    register_update_rule,
)
from kd_balance.inner_step.step import InnerStep
from kd_balance.inner_step.update import GroupUpdate, Slots, Update

__all__ = [
    "DIFFERENTIABLE",
    "DifferentiableTorchOptimizer",
    "GroupUpdate",
    "InnerStep",
    "Slots",
    "State",
    "StepCopy",
    "Update",
    "differentiable_step",
    "exact_dtype",
    "full_name",
    "is_differentiable",
    "known_optimizers",
    "predicted",
    "register_update_rule",
    "runs_unhooked",
]
