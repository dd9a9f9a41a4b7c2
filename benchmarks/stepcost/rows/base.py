"""What every row of the table offers to the measurement."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.optim import Optimizer

from stepcost.case import Batch, Case


class Row(ABC):
    """A student in training, one step at a time.

    Args:
        case: the setting.
    """

    definition: str | None = None
    """What its hypergradient is the derivative of, as in stepcost.exact; None where it has none."""
    period: int = 1
    """Steps after which the costs repeat."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.student: nn.Module = case.student()
        self.optimizer: Optimizer = case.optimizer(self.student)
        self.lr: float = self.optimizer.param_groups[0]["lr"]
        self.weight_net: nn.Module = case.weight_net()

    @abstractmethod
    def step(self, train: Batch, meta: Batch) -> None:
        """One training step: the student moves, and the weight net if its turn has come."""

    def hypergradient(self) -> list[Tensor]:
        """What the last step of the weight net used."""
        gradients = [p.grad for p in self.weight_net.parameters()]
        return [g.detach().clone() for g in gradients if g is not None]
