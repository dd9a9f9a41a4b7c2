"""skorch: a NeuralNetClassifier that distils, with learned weights.

    pip install kd-balance scikit-learn skorch==1.4.0
    python examples/codebases/skorch_net.py
    python examples/codebases/skorch_net.py --check    # is the hypergradient right in this net?

fit, partial_fit, callbacks and scores are skorch's and scikit-learn's. Made-up clouds of points
stand for the data.
"""

from __future__ import annotations

import argparse

import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import EpochScoring, GradientNormClipping, LRScheduler
from torch import Tensor, nn

from clouds import BALANCED, LONG_TAIL, Mlp, clouds
from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts, meta_loader  # kd-balance
from kd_balance.check import check_hypergradient

EPOCHS = 6


class DistilledClassifier(NeuralNetClassifier):
    """Takes a trained teacher and class-balanced samples beside skorch's own settings."""

    def __init__(self, *args, teacher=None, meta=None, **kwargs) -> None:
        self.teacher = teacher  # skorch takes modules as settings only before its own __init__
        self.meta = meta  # kd-balance
        super().__init__(*args, **kwargs)

    def initialize_criterion(self) -> DistilledClassifier:  # kd-balance
        settings = self.get_params_for("criterion")  # kd-balance
        self.criterion_ = WeightedKDLoss.long_tailed(**settings)  # kd-balance
        return self  # kd-balance

    def initialize_optimizer(self, triggered_directly=None) -> DistilledClassifier:  # kd-balance
        names = self.module_.named_parameters()  # kd-balance
        args, kwargs = self.get_params_for_optimizer("optimizer", names)  # kd-balance
        plain = self.optimizer(*args, **kwargs)  # kd-balance
        parts = self.module_, self.criterion_, meta_loader(self.meta)  # kd-balance
        self.optimizer_ = BilevelOptimizer(  # kd-balance
            plain, *parts, teacher=self.teacher, every=8  # kd-balance
        )  # kd-balance
        return self  # kd-balance

    def get_loss(self, y_pred: Tensor, y_true: Tensor, X: Tensor, training: bool = False) -> Tensor:
        with torch.no_grad():
            teacher_logits = self.teacher(X)
        return self.criterion_(y_pred, teacher_logits, y_true)  # kd-balance

    def train_step_single(self, batch: list[Tensor], **fit_params) -> dict[str, Tensor]:
        step = super().train_step_single(batch, **fit_params)
        hard, soft = self.criterion_.weights.mean(0).tolist()
        self.history.record_batch("hard", hard)
        self.history.record_batch("soft", soft)
        return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    if check:
        torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    points, labels = (t.numpy() for t in clouds(LONG_TAIL, seed=0).tensors)
    teacher = NeuralNetClassifier(
        Mlp, module__width=64, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.Adam, lr=3e-3,
        max_epochs=5, verbose=0, train_split=None,
    ).fit(points, labels).module_.eval().requires_grad_(False)

    steps = EPOCHS * -(-len(points) * 4 // 5 // 32)
    score = EpochScoring("balanced_accuracy", lower_is_better=False)
    cosine = LRScheduler("CosineAnnealingLR", T_max=steps, step_every="batch")
    net = DistilledClassifier(
        Mlp, module__width=12,
        criterion=WeightedKDLoss,  # kd-balance
        criterion__class_counts=class_counts(labels),  # kd-balance
        optimizer=torch.optim.SGD, optimizer__momentum=0.9, optimizer__nesterov=True, lr=0.1,
        batch_size=32, iterator_train__shuffle=True, max_epochs=EPOCHS,
        callbacks=[cosine, GradientNormClipping(2.0), score],
        teacher=teacher,
        meta=clouds(BALANCED, seed=1),  # kd-balance
    )
    if check:
        net.set_params(max_epochs=1).fit(points, labels)
        batches = list(net.get_iterator(net.get_dataset(points, labels), training=True))
        print(check_hypergradient(net.optimizer_, net.train_step, batches, raise_exception=False))
        return
    net.fit(points, labels)
    print("hard weights of the last epoch's first batch:", net.history[-1, "batches", 0, "hard"])
    print(f"meta updates: {net.optimizer_.metrics['meta_updates']:.0f}")


if __name__ == "__main__":
    main()
