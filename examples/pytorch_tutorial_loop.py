"""The loop of PyTorch's knowledge distillation tutorial, on long-tailed handwritten digits.

The functions are named as in the tutorial (pytorch.org/tutorials, "Knowledge Distillation"), the
code is our own. Where kd-balance changed the plain loop, the line ends with its name in a comment:
six lines; docs/drop_in.md shows them against the lines they replace.

    pip install 'kd-balance[examples]'
    python examples/pytorch_tutorial_loop.py            # about ten seconds
    python examples/pytorch_tutorial_loop.py --check    # is the hypergradient right in this loop?
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts, meta_loader  # kd-balance
from kd_balance.check import check_hypergradient
from kd_balance.data import long_tail_indices, split_balanced


def train_knowledge_distillation(teacher, student, train_loader, epochs, learning_rate, T,
                                 soft_target_loss_weight, ce_loss_weight, device, check=False):
    counts, meta = class_counts(train_loader), meta_loader(train_loader)  # kd-balance
    alpha = (ce_loss_weight, soft_target_loss_weight)  # kd-balance
    criterion = WeightedKDLoss.long_tailed(counts, temperature=T, alpha=alpha)  # kd-balance
    optimizer = optim.Adam(student.parameters(), lr=learning_rate)
    optimizer = BilevelOptimizer(optimizer, student, criterion, meta, teacher=teacher)  # kd-balance

    def step(batch):
        inputs, labels = (x.to(device) for x in batch)
        optimizer.zero_grad()
        with torch.no_grad():
            teacher_logits = teacher(inputs)
        student_logits = student(inputs)
        loss = criterion(student_logits, teacher_logits, labels)  # kd-balance
        loss.backward()
        optimizer.step()
        return loss.item()

    teacher.eval()
    student.train()
    if check:
        print(check_hypergradient(optimizer, step, train_loader))
        return
    for epoch in range(epochs):
        running_loss = sum(step(batch) for batch in train_loader)
        report(epoch, epochs, running_loss / len(train_loader))


def train(model, train_loader, epochs, learning_rate, device):
    """The teacher's training, without distillation."""
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.Adam(model.parameters(), lr=learning_rate)
    model.train()
    for epoch in range(epochs):
        running_loss = 0.0
        for inputs, labels in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        report(epoch, epochs, running_loss / len(train_loader))


def test(model, test_loader, device) -> str:
    """Accuracy over all classes, and over frequent, middle and rare ones."""
    model.eval()
    correct, total = torch.zeros(10), torch.zeros(10)
    with torch.no_grad():
        for inputs, labels in test_loader:
            predicted = model(inputs.to(device)).argmax(1).cpu()
            correct += torch.bincount(labels[predicted == labels], minlength=10)
            total += torch.bincount(labels, minlength=10)
    parts = {"all": slice(10), "0-3": slice(4), "4-6": slice(4, 7), "7-9": slice(7, 10)}
    return "  ".join(
        f"{name} {100 * correct[part].sum() / total[part].sum():.1f}%"
        for name, part in parts.items()
    )


def report(epoch: int, epochs: int, loss: float) -> None:
    if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
        print(f"epoch {epoch + 1}, loss {loss:.4f}")


class DeepNN(nn.Module):
    """The teacher."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(256, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class LightNN(nn.Module):
    """The student."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def digits() -> list[TensorDataset]:
    """scikit-learn's digits: a long-tailed training set, balanced validation and test sets."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16).to(torch.get_default_dtype())
    images = images.unsqueeze(1)  # [1797, 1, 8, 8]
    labels = torch.tensor(bunch.target)
    test, rest = split_balanced(labels, per_class=60, seed=0)
    val, rest = (rest[i] for i in split_balanced(labels[rest], per_class=10, seed=0))
    train = rest[long_tail_indices(labels[rest], imbalance_factor=50, seed=0, head_count=100)]
    return [TensorDataset(images[i], labels[i]) for i in (train, val, test)]


def main(argv: Sequence[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.check:
        torch.set_default_dtype(torch.float64)
    epochs = options.epochs
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    train_dataset, val_dataset, test_dataset = digits()
    train_loader = DataLoader(train_dataset, batch_size=32, shuffle=True)
    val_loader = DataLoader(val_dataset, batch_size=50, shuffle=True)
    test_loader = DataLoader(test_dataset, batch_size=200)

    torch.manual_seed(42)
    nn_deep = DeepNN().to(device)
    train(nn_deep, train_loader, epochs, 0.002, device)
    print("teacher, test:", test(nn_deep, test_loader, device))

    torch.manual_seed(42)
    nn_light = LightNN().to(device)
    train_knowledge_distillation(nn_deep, nn_light, train_loader, epochs, learning_rate=0.005, T=2,
                                 soft_target_loss_weight=0.25, ce_loss_weight=0.75, device=device,
                                 check=options.check)
    if options.check:
        return nn_light
    print("student, validation:", test(nn_light, val_loader, device))
    print("student, test:", test(nn_light, test_loader, device))
    return nn_light


if __name__ == "__main__":
    main()
