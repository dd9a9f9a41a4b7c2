"""Engines for dL_meta/dφ, the derivative of the meta loss through the student's own steps."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from kd_balance.distributed import Ranks
from kd_balance.hypergradient.adjoint import Adjoint
from kd_balance.hypergradient.unroll import Unroll
from kd_balance.inner_step import InnerStep
from kd_balance.invariants import Invariants
from kd_balance.loss import WeightedKDLoss


class Engine(Protocol):
    """Computes the meta loss and its gradients for the weight net's parameters."""

    def try_without_forward_mode(self) -> bool: ...

    def __call__(
        self,
        criterion: WeightedKDLoss,
        steps: list[InnerStep],
        meta_loss: Callable[[Mapping[str, Tensor]], Tensor],
        after: Mapping[str, Tensor],
        invariants: Invariants,
    ) -> tuple[Tensor, list[Tensor]]: ...


ENGINES: dict[str, Callable[[Ranks], Engine]] = {"adjoint": Adjoint, "unroll": Unroll}
