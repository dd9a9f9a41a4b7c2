"""Look-ahead loops written by hand: a virtual SGD step, a step of φ, then the real step.

This is the order of the BiKD authors' program and of Meta-Weight-Net.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import higher
import torch
from torch import Tensor
from torch.func import functional_call

from stepcost.case import Batch, Case
from stepcost.losses import meta_loss, sample_losses, weight_features
from stepcost.rows.base import Row


class LookaheadLoop(Row):
    """The part that does not depend on who builds the graph of the virtual step."""

    definition = "sgd"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.meta_optimizer = case.meta_optimizer(self.weight_net)

    def step(self, train: Batch, meta: Batch) -> None:
        self.meta_optimizer.zero_grad()
        self.virtual_step(train, meta)
        self.meta_optimizer.step()

        with self.case.autocast():
            logits = self.student(train.inputs)
        loss = self.training_loss(logits, train)
        self.optimizer.zero_grad()
        loss.backward(inputs=list(self.student.parameters()))
        self.optimizer.step()

    @abstractmethod
    def virtual_step(self, train: Batch, meta: Batch) -> None:
        """Leaves dL_meta/dφ in the gradients of the weight net."""

    def training_loss(self, logits: Tensor, train: Batch) -> Tensor:
        losses = sample_losses(logits, train.teacher_logits, train.targets)
        features = weight_features(losses, train.teacher_logits, train.targets)
        weights = self.weight_net(features.detach())
        return (losses * weights).sum() / len(losses)

    def backward(self, meta_logits: Tensor, meta: Batch) -> None:
        meta_loss(meta_logits, meta.targets).backward(inputs=list(self.weight_net.parameters()))

    def call(self, module: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with self.case.autocast():
            return module(inputs)


class BareHigher(LookaheadLoop):
    def virtual_step(self, train: Batch, meta: Batch) -> None:
        plain = torch.optim.SGD(self.student.parameters(), lr=self.lr)
        with higher.innerloop_ctx(self.student, plain) as (fast, virtual):
            virtual.step(self.training_loss(self.call(fast, train.inputs), train))
            self.backward(self.call(fast, meta.inputs), meta)


class MetaWeightNetLoop(LookaheadLoop):
    """As Meta-Weight-Net does it (Shu et al. 2019), with torch.func in place of its own layers."""

    def virtual_step(self, train: Batch, meta: Batch) -> None:
        params = {n: p.detach().requires_grad_() for n, p in self.student.named_parameters()}
        buffers = {n: b.clone() for n, b in self.student.named_buffers()}

        def student(inputs: Tensor) -> Tensor:
            return functional_call(self.student, {**params, **buffers}, (inputs,))

        loss = self.training_loss(self.call(student, train.inputs), train)
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        for (name, p), g in zip(list(params.items()), gradients):
            params[name] = p - self.lr * g
        self.backward(self.call(student, meta.inputs), meta)
