"""A distiller module in the shape of mdistiller's, on long-tailed handwritten digits.

Student and teacher live in one module, whose forward_train returns logits and a dict of losses; a
trainer sums the losses and makes the optimizer; DataParallel is around it all. The names are
mdistiller's (github.com/megvii-research/mdistiller), the code is our own. Where kd-balance changed
the plain program, the line ends with its name in a comment: nine lines; docs/drop_in.md shows them
against the lines they replace.

    pip install 'kd-balance[examples]'
    python examples/mdistiller_module.py            # about ten seconds
    python examples/mdistiller_module.py --check    # is the hypergradient right in this loop?
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts  # kd-balance
from kd_balance.check import check_hypergradient
from kd_balance.data import long_tail_indices, split_balanced


class Distiller(nn.Module):
    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        self.teacher.eval()
        return self

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return list(self.student.parameters())

    def forward_train(self, image, target, **kwargs):
        raise NotImplementedError

    def forward(self, **kwargs):
        if self.training:
            return self.forward_train(**kwargs)
        return self.student(kwargs["image"])[0]


class KD(Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)
        alpha = (cfg.KD.CE_WEIGHT, cfg.KD.KD_WEIGHT)  # kd-balance
        self.criterion = WeightedKDLoss.long_tailed(  # kd-balance
            cfg.KD.COUNTS, temperature=cfg.KD.T, alpha=alpha  # kd-balance
        )  # kd-balance

    def forward_train(self, image, target, **kwargs):
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        losses_dict = {
            "loss_kd": self.criterion(logits_student, logits_teacher, target),  # kd-balance
        }
        return logits_student, losses_dict


class Trainer:
    def __init__(self, distiller, train_loader, val_loader, cfg):
        self.cfg = cfg
        self.distiller = distiller
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.optimizer = self.init_optimizer(cfg)

    def init_optimizer(self, cfg):
        distiller = self.distiller.module
        optimizer = optim.SGD(
            distiller.get_learnable_parameters(), lr=cfg.SOLVER.LR, momentum=0.9, weight_decay=5e-4
        )
        parts = distiller.student, distiller.criterion, self.val_loader  # kd-balance
        optimizer = BilevelOptimizer(optimizer, *parts, teacher=distiller.teacher)  # kd-balance
        return optimizer

    def train(self):
        for epoch in range(1, self.cfg.SOLVER.EPOCHS + 1):
            self.adjust_learning_rate(epoch)
            self.distiller.train()
            losses = [self.train_iter(data, epoch) for data in self.train_loader]
            if epoch % 10 == 0 or epoch == self.cfg.SOLVER.EPOCHS:
                print(f"epoch {epoch}, loss {sum(losses) / len(losses):.4f}")
        print("student, validation:", validate(self.val_loader, self.distiller))

    def train_iter(self, data, epoch) -> float:
        self.optimizer.zero_grad()
        image, target, index = data
        if torch.cuda.is_available():
            image, target = image.cuda(non_blocking=True), target.cuda(non_blocking=True)
        preds, losses_dict = self.distiller(image=image, target=target, epoch=epoch)
        loss = sum(loss.mean() for loss in losses_dict.values())
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def adjust_learning_rate(self, epoch):
        solver = self.cfg.SOLVER
        decays = sum(epoch > stage for stage in solver.LR_DECAY_STAGES)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = solver.LR * solver.LR_DECAY_RATE**decays


class ConvNet(nn.Module):
    """Returns logits and a dict of what mdistiller's methods ask for."""

    def __init__(self, width: int, num_classes: int = 10) -> None:
        super().__init__()
        widths = (1, width, 2 * width, 2 * width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for inputs, outputs in zip(widths, widths[1:])
        )
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, dict]:
        feats = []
        for block in self.blocks:
            x = block(x)
            feats.append(x)
        pooled = x.flatten(1)
        return self.fc(pooled), {"feats": feats, "pooled_feat": pooled}


def train_teacher(train_loader: DataLoader, epochs: int, device: torch.device) -> nn.Module:
    model = ConvNet(width=32).to(device)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for image, target, _ in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(image.to(device))[0], target.to(device)).backward()
            optimizer.step()
    return model


def validate(loader: DataLoader, distiller: nn.Module) -> str:
    """Accuracy over all classes, and over frequent, middle and rare ones."""
    distiller.eval()
    device = next(distiller.parameters()).device
    correct, total = torch.zeros(10), torch.zeros(10)
    with torch.no_grad():
        for image, target in loader:
            predicted = distiller(image=image.to(device)).argmax(1).cpu()
            correct += torch.bincount(target[predicted == target], minlength=10)
            total += torch.bincount(target, minlength=10)
    parts = {"all": slice(10), "0-3": slice(4), "4-6": slice(4, 7), "7-9": slice(7, 10)}
    return "  ".join(
        f"{name} {100 * correct[part].sum() / total[part].sum():.1f}%"
        for name, part in parts.items()
    )


def get_dataset() -> tuple[DataLoader, DataLoader, DataLoader]:
    """scikit-learn's digits: a long-tailed training set, balanced validation and test sets.

    Training batches are (image, target, index), the others (image, target).
    """
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16).to(torch.get_default_dtype())
    images = images.unsqueeze(1)  # [1797, 1, 8, 8]
    labels = torch.tensor(bunch.target)
    test, rest = split_balanced(labels, per_class=60, seed=0)
    val, rest = (rest[i] for i in split_balanced(labels[rest], per_class=10, seed=0))
    train = rest[long_tail_indices(labels[rest], imbalance_factor=50, seed=0, head_count=100)]
    instances = TensorDataset(images[train], labels[train], torch.arange(len(train)))
    return (
        DataLoader(instances, batch_size=32, shuffle=True),
        DataLoader(TensorDataset(images[val], labels[val]), batch_size=50, shuffle=True),
        DataLoader(TensorDataset(images[test], labels[test]), batch_size=200),
    )


def main(argv: Sequence[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.check:
        torch.set_default_dtype(torch.float64)
    epochs = options.epochs
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = SimpleNamespace(
        KD=SimpleNamespace(T=4, CE_WEIGHT=0.5, KD_WEIGHT=0.5),
        SOLVER=SimpleNamespace(
            EPOCHS=epochs, LR=0.05, LR_DECAY_STAGES=[20, 27], LR_DECAY_RATE=0.1
        ),
    )
    train_loader, val_loader, test_loader = get_dataset()
    cfg.KD.COUNTS = class_counts(train_loader)  # kd-balance
    torch.manual_seed(0)
    teacher = train_teacher(train_loader, epochs, device)
    torch.manual_seed(1)
    distiller = nn.DataParallel(KD(ConvNet(width=8), teacher, cfg).to(device))
    trainer = Trainer(distiller, train_loader, val_loader, cfg)
    if options.check:
        distiller.train()
        step = lambda data: trainer.train_iter(data, epoch=1)  # noqa: E731
        print(check_hypergradient(trainer.optimizer, step, train_loader))
        return distiller.module.student
    trainer.train()
    print("student, test:", validate(test_loader, distiller))
    return distiller.module.student


if __name__ == "__main__":
    main()
