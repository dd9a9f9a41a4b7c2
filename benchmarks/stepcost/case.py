"""One setting of the benchmark: the student, the sizes, the device, and what is drawn for them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_balance import MetaWeightNet
from kd_balance.top_k import TopK
from stepcost.models import MODELS

TEMPERATURE = 4.0


class Batch(NamedTuple):
    """Inputs of the student, class indices [N] and teacher logits [N, C]."""

    inputs: Tensor
    targets: Tensor
    teacher_logits: Tensor | TopK


@dataclass(frozen=True)
class Case:
    """What every row is measured on.

    The teacher's logits are given, so that no row pays for the teacher and no ratio is flattered.
    """

    model: str = "resnet8x4"
    batch: int = 100
    meta_batch: int = 100
    classes: int = 100
    parameters: int | None = None
    unroll: int = 1
    top_k: int | None = None
    """How many classes are known of the teacher; None for all."""

    device: str = "cpu"
    dtype: str = "float32"
    """bfloat16 runs the forward passes under autocast, the parameters staying float32; float64
    computes everything in float64."""

    channels_last: bool = False
    """The memory format of images and convolution weights, for plain KD as for every other row."""

    def student(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            student = MODELS[self.model].build(self.classes, self.parameters)
        student = student.to(self.device, self._storage)
        return student.to(memory_format=torch.channels_last) if self.channels_last else student

    def weight_net(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return MetaWeightNet().to(self.device, self._storage)

    def optimizer(self, student: nn.Module) -> Optimizer:
        return MODELS[self.model].optimizer(list(student.parameters()))

    def meta_optimizer(self, weight_net: nn.Module) -> Optimizer:
        return torch.optim.Adam(weight_net.parameters(), lr=1e-3, weight_decay=1e-4)

    def draw(self, seed: int, *, meta: bool = False) -> Batch:
        """A batch, or a meta batch, of random numbers."""
        count = self.meta_batch if meta else self.batch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2 * seed + meta)
            inputs = MODELS[self.model].inputs(count)
            rows = count * MODELS[self.model].positions
            targets = torch.randint(self.classes, (rows,))
            logits = 3 * torch.randn(rows, self.classes)
        if inputs.is_floating_point():
            inputs = inputs.to(self._storage)
        if self.channels_last and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        inputs, targets, logits = (t.to(self.device) for t in (inputs, targets, logits))
        logits = logits.to(self._storage)
        if self.top_k is None:
            return Batch(inputs, targets, logits)
        return Batch(inputs, targets, TopK(*logits.log_softmax(1).topk(self.top_k)))

    @property
    def _storage(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    def autocast(self) -> AbstractContextManager[None]:
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")
