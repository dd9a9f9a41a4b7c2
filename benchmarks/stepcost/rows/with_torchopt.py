"""The look-ahead loop on torchopt's differentiable SGD."""

from __future__ import annotations

import torchopt

from stepcost.case import Batch
from stepcost.rows.lookahead import LookaheadLoop


class TorchOpt(LookaheadLoop):
    def virtual_step(self, train: Batch, meta: Batch) -> None:
        before = torchopt.extract_state_dict(self.student, by="reference", detach_buffers=True)
        virtual = torchopt.MetaSGD(self.student, lr=self.lr)
        virtual.step(self.training_loss(self.call(self.student, train.inputs), train))
        self.backward(self.call(self.student, meta.inputs), meta)
        torchopt.recover_state_dict(self.student, before)
