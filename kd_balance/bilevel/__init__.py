"""What a step of a :class:`~kd_balance.optimizer.BilevelOptimizer` does, one part a file."""

from kd_balance.bilevel.arguments import (
    check_modules,
    check_one_device,
    check_optimizer,
    check_parameters,
    check_steps_shards,
    refuse_outer,
    weight_net_of,
)
from kd_balance.bilevel.settings import DERIVATIVES, EVERY, METHODS, UNROLL, Settings
from kd_balance.bilevel.steps import BilevelSteps, modes_of_our_own

__all__ = [
    "DERIVATIVES",
    "EVERY",
    "METHODS",
    "UNROLL",
    "BilevelSteps",
    "Settings",
    "check_modules",
    "check_one_device",
    "check_optimizer",
    "check_parameters",
    "check_steps_shards",
    "modes_of_our_own",
    "refuse_outer",
    "weight_net_of",
]
