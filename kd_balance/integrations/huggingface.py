"""Hugging Face Trainer: a base class that wraps the optimizer the Trainer makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer

from kd_balance.loss import WeightedKDLoss
from kd_balance.optimizer import BilevelOptimizer


class BilevelTrainer(Trainer):
    """A Trainer whose optimizer also trains the weight net of `criterion`.

    Subclass it in the place of Trainer, and let ``compute_loss`` call ``self.criterion`` on the
    logits of ``model``. Its logs gain the ``metrics`` of the optimizer, such as ``meta_loss``,
    ``hard_weight``, ``soft_weight`` and ``skipped_updates``; its checkpoints hold the weight net
    within the optimizer's state.

    Args:
        *args, **kwargs: those of Trainer. An optimizer in ``optimizers=`` is wrapped too.
        criterion: a WeightedKDLoss with a weight net.
        meta_loader: class-balanced batches as the data collator makes them, a mapping that has the
            key ``labels``.
        bilevel: further settings of BilevelOptimizer, such as ``{"every": 5}``.

    With ``reduction="sum"`` Trainer counts the labels of all micro-batches of a step, and
    ``compute_loss`` is to divide by them: ``self.criterion(…) / num_items_in_batch``, for language
    models whose micro-batches hold different numbers of tokens. For some models it counts the first
    label too, which a shifted loss has no part of: make it −100. In several processes multiply by
    ``self.accelerator.num_processes`` too, as Trainer does with losses of its own.

    Raises:
        ValueError, TypeError: what BilevelOptimizer refuses, when training begins.

    Example::

        class DistillationTrainer(BilevelTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                outputs = model(**inputs)
                with torch.no_grad():
                    teacher_logits = self.teacher(**inputs).logits
                loss = self.criterion(outputs.logits, teacher_logits, inputs["labels"])
                return (loss, outputs) if return_outputs else loss

        DistillationTrainer(
            student, arguments, train_dataset=train, criterion=criterion, meta_loader=meta_loader
        ).train()
    """

    def __init__(
        self,
        *args: Any,
        criterion: WeightedKDLoss,
        meta_loader: Iterable[Any],
        bilevel: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.criterion = criterion
        self.meta_loader = meta_loader
        self.bilevel = dict(bilevel or {})
        self.bilevel_optimizer: BilevelOptimizer | None = None
        # A mean is over one micro-batch, and Trainer divides by their number; it takes a student
        # that accepts **kwargs for one that divides by the items in all of them, and would not.
        self.model_accepts_loss_kwargs = criterion.reduction == "sum"

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Trainer's own optimizer, wrapped; asked anew, the same one."""
        optimizer = super().create_optimizer(*args, **kwargs)
        known = (optimizer, getattr(optimizer, "optimizer", None))  # itself, or prepared
        if self.bilevel_optimizer is None or self.bilevel_optimizer not in known:
            settings = {"grad_scaler": self.accelerator.scaler, **self.bilevel}
            self.optimizer = self.bilevel_optimizer = BilevelOptimizer(
                optimizer, self.model, self.criterion, self.meta_loader, **settings
            )
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the last meta update to the logs of training steps."""
        if "loss" in logs and self.bilevel_optimizer is not None:
            metrics = self.bilevel_optimizer.metrics
            if metrics["meta_updates"]:
                logs = {**logs, **{k: v for k, v in metrics.items() if k != "meta_updates"}}
        super().log(logs, *args, **kwargs)
