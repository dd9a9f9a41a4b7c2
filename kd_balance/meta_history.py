"""What the meta updates saw over the course of training, and the settings they ran with."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_balance.invariants import CAUSES
from kd_balance.joint import wholes
from kd_balance.optimizer import BilevelOptimizer


class MetaHistory:
    """Records the meta loss, the norm of the hypergradient and whether it was skipped.

    A row is one hypergradient. It stays on the device of the student, so that recording never waits
    for a GPU.

    Args:
        optimizer: whose steps to watch; None records nothing.
    """

    def __init__(self, optimizer: BilevelOptimizer | None) -> None:
        self._optimizer = optimizer
        self._steps: list[int] = []
        self._waiting: list[Tensor] = []  # rows [2 + 1 + causes], still on their device
        self._fetched = torch.zeros(0, 3 + len(CAUSES), dtype=torch.float64)
        self._earlier_warnings: list[str] = []
        self._hooks: list[Any] = []
        if optimizer is not None:
            self._last = optimizer._steps.metrics.meta_loss
            self._failures = dict(optimizer._steps.invariants.failures)
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def close(self) -> None:
        """Stop recording."""
        for hook in self._hooks:
            hook.remove()

    def table(self) -> dict[str, np.ndarray]:
        """A row for each hypergradient.

        Returns:
            ``step`` [M], int64: student steps up to it; ``meta_loss``, ``hypergradient_norm`` [M],
            float64; ``skipped`` [M], bool; and ``skipped_by_…`` [M], bool, for each cause that
            occurred.
        """
        rows = self._rows().numpy()
        causes = {f"skipped_by_{c}": rows[:, i] > 0 for i, c in enumerate(CAUSES, start=3)}
        return {
            "step": np.array(self._steps, dtype=np.int64),
            "meta_loss": rows[:, 0],
            "hypergradient_norm": rows[:, 1],
            "skipped": rows[:, 2] > 0,
            **{name: column for name, column in causes.items() if column.any()},
        }

    @property
    def warnings(self) -> list[str]:
        """Those that the optimizer gave, in order."""
        now = [] if self._optimizer is None else self._optimizer._steps.warnings.given.values()
        return list(dict.fromkeys([*self._earlier_warnings, *now]))

    @property
    def settings(self) -> dict[str, str]:
        """How the optimizer is set, for people to read."""
        optimizer = self._optimizer
        if optimizer is None:
            return {}
        groups = [*optimizer.param_groups, *optimizer.meta_optimizer.param_groups]
        rates = [f"{float(group['lr']):.4g}" for group in groups if "lr" in group]
        count = len(optimizer.param_groups)
        return {
            "optimizer": ", ".join(type(each).__name__ for each in wholes(optimizer.optimizer)),
            "last learning rate": ", ".join(dict.fromkeys(rates[:count])),
            "method": optimizer.method,
            "every": str(optimizer.every),
            "unroll": str(optimizer.unroll),
            "accumulate": str(optimizer.accumulate),
            "engine": optimizer._steps.settings.engine,
            "step_derivative": optimizer.step_derivative,
            "meta_loss": _name(optimizer._steps.objective.kind),
            "meta optimizer": type(optimizer.meta_optimizer).__name__,
            "its last learning rate": ", ".join(dict.fromkeys(rates[count:])),
            "processes": str(optimizer._steps.ranks.size),
            "device": _device(optimizer._steps.structure.parameters),
        }

    def state_dict(self) -> dict[str, Any]:
        """The record, on the CPU."""
        return {
            "rows": self._rows(),
            "steps": torch.tensor(self._steps, dtype=torch.long),
            "warnings": self.warnings,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the record of an earlier run."""
        self._waiting = []
        self._fetched = state["rows"].cpu()
        self._steps = state["steps"].tolist()
        self._earlier_warnings = list(state["warnings"])

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert isinstance(optimizer, BilevelOptimizer)
        steps = optimizer._steps
        if steps.metrics.meta_loss is self._last:  # counters move on loading a checkpoint, too
            return
        self._last = steps.metrics.meta_loss
        failures, before = steps.invariants.failures, self._failures
        self._failures = dict(failures)
        none = torch.zeros((), device=self._last.device)
        new = [
            none if cause not in failures
            else failures[cause] - before[cause] if cause in before else failures[cause]
            for cause in CAUSES
        ]
        row = (self._last, steps.metrics.hypergradient_norm, steps.skipped.last, *new)
        self._waiting.append(torch.stack([x.detach().to(self._last) for x in row]))
        self._steps.append(steps.window.count)

    def _rows(self) -> Tensor:
        if self._waiting:
            waiting = torch.stack(self._waiting).cpu().double()
            self._fetched = torch.cat((self._fetched, waiting))
            self._waiting = []
        return self._fetched


def criterion_settings(criterion: Any) -> dict[str, str]:
    """How a WeightedKDLoss is set, for people to read."""
    net = criterion.weight_net
    soft = criterion.soft_loss
    losses = soft.values() if isinstance(soft, Mapping) else [soft]
    return {
        "terms": ", ".join(criterion.names),
        "weight net": (
            "none, weights fixed by alpha"
            if net is None
            else f"{type(net).__name__}, {sum(p.numel() for p in net.parameters())} parameters"
        ),
        "temperature": f"{criterion.temperature:g}",
        "alpha": str(criterion.alpha),
        "hard loss": _name(criterion.hard_loss, "cross entropy"),
        "soft loss": ", ".join(_name(loss, "temperature KL") for loss in losses),
        "reduction": criterion.reduction,
    }


def versions() -> dict[str, str]:
    """Of what the run was computed by."""
    try:
        own = version("kd-balance")
    except PackageNotFoundError:  # run from its sources
        own = "not installed"
    return {
        "kd-balance": own,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _name(thing: Any, default: str = "") -> str:
    if thing is None or isinstance(thing, str):
        return thing or default
    return getattr(thing, "__name__", type(thing).__name__)


def _device(params: Mapping[Tensor, str]) -> str:
    device = next(iter(params)).device
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
