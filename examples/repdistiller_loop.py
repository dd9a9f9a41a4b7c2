"""A loop in the shape of RepDistiller's train_distill, on long-tailed handwritten digits.

Modules and criteria come in lists, networks are called with is_feat=True, one line adds three
losses with factors, a regressor trains in the same optimizer, and the learning rate is set by hand.
The names are RepDistiller's (github.com/HobbitLong/RepDistiller), the code is our own. Where
kd-balance changed the plain loop, the line ends with its name in a comment: seven lines;
docs/drop_in.md shows them against the lines they replace.

    pip install 'kd-balance[examples]'
    python examples/repdistiller_loop.py            # about ten seconds
    python examples/repdistiller_loop.py --check    # is the hypergradient right in this loop?
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts  # kd-balance
from kd_balance.check import check_hypergradient
from kd_balance.data import long_tail_indices, split_balanced


def train_distill(epoch, train_loader, module_list, criterion_list, optimizer, opt):
    """One epoch."""
    for module in module_list:
        module.train()
    module_list[-1].eval()  # the teacher
    criterion_cls, criterion_div, criterion_kd = criterion_list
    model_s, model_t = module_list[0], module_list[-1]

    total = 0.0
    for input, target, _ in train_loader:
        if torch.cuda.is_available():
            input, target = input.cuda(), target.cuda()

        feat_s, logit_s = model_s(input, is_feat=True, preact=False)
        with torch.no_grad():
            feat_t, logit_t = model_t(input, is_feat=True, preact=False)

        loss_cls = criterion_cls(logit_s, target)
        loss_div = criterion_div(logit_s, logit_t, target)  # kd-balance
        if opt.distill == "hint":
            f_s = module_list[1](feat_s[opt.hint_layer])
            loss_kd = criterion_kd(f_s, feat_t[opt.hint_layer])
        else:
            loss_kd = 0
        loss = opt.gamma * loss_cls + opt.alpha * loss_div + opt.beta * loss_kd

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    if epoch % 10 == 0 or epoch == opt.epochs:
        print(f"epoch {epoch}, loss {total / len(train_loader):.4f}")


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--learning_rate", type=float, default=0.05)
    parser.add_argument("--lr_decay_epochs", type=int, nargs="+", default=[20, 27])
    parser.add_argument("--lr_decay_rate", type=float, default=0.1)
    parser.add_argument("--distill", choices=["kd", "hint"], default="hint")
    parser.add_argument("-r", "--gamma", type=float, default=0, help="of loss_cls")  # kd-balance
    parser.add_argument("-a", "--alpha", type=float, default=1, help="of loss_div")
    parser.add_argument("-b", "--beta", type=float, default=10, help="of loss_kd")
    parser.add_argument("--kd_T", type=float, default=4)
    parser.add_argument("--hint_layer", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> nn.Module:
    opt = parse_option(argv)
    if opt.check:
        torch.set_default_dtype(torch.float64)
    train_loader, val_loader, test_loader = get_dataloaders()
    torch.manual_seed(0)
    model_t = train_teacher(train_loader, opt.epochs)
    print("teacher, test:", validate(test_loader, model_t))
    torch.manual_seed(1)
    model_s = ConvNet(width=8)

    # The student first and the teacher last; what lies between is the method's own.
    module_list, trainable_list = nn.ModuleList([model_s]), nn.ModuleList([model_s])
    criterion_cls = nn.CrossEntropyLoss()
    T, counts = opt.kd_T, class_counts(train_loader)  # kd-balance
    criterion_div = WeightedKDLoss.long_tailed(counts, temperature=T, alpha=(1, 1))  # kd-balance
    criterion_kd = nn.MSELoss()
    if opt.distill == "hint":
        regress_s = nn.Conv2d(*(model.widths[opt.hint_layer] for model in (model_s, model_t)), 1)
        module_list.append(regress_s)
        trainable_list.append(regress_s)
    criterion_list = nn.ModuleList([criterion_cls, criterion_div, criterion_kd])

    optimizer = optim.SGD(
        trainable_list.parameters(), lr=opt.learning_rate, momentum=0.9, weight_decay=5e-4
    )
    parts = model_s, criterion_div, val_loader  # kd-balance
    optimizer = BilevelOptimizer(optimizer, *parts, teacher=model_t)  # kd-balance
    module_list.append(model_t)
    if torch.cuda.is_available():
        module_list.cuda()
        criterion_list.cuda()

    if opt.check:
        def step(batch):
            train_distill(1, [batch], module_list, criterion_list, optimizer, opt)

        # the hint's curvature counts as constant: exact with --distill kd
        print(check_hypergradient(optimizer, step, train_loader, raise_exception=False))
        return model_s
    for epoch in range(1, opt.epochs + 1):
        adjust_learning_rate(epoch, opt, optimizer)
        train_distill(epoch, train_loader, module_list, criterion_list, optimizer, opt)
    print("student, validation:", validate(val_loader, model_s))
    print("student, test:", validate(test_loader, model_s))
    return model_s


def adjust_learning_rate(epoch: int, opt: argparse.Namespace, optimizer: optim.Optimizer) -> None:
    decays = sum(epoch > decay_epoch for decay_epoch in opt.lr_decay_epochs)
    for param_group in optimizer.param_groups:
        param_group["lr"] = opt.learning_rate * opt.lr_decay_rate**decays


class ConvNet(nn.Module):
    """With is_feat=True it returns (activations of its blocks, logits)."""

    def __init__(self, width: int, num_classes: int = 10) -> None:
        super().__init__()
        self.widths = (width, 2 * width, 2 * width)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for inputs, outputs in zip((1, *self.widths), self.widths):
            self.convs.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            self.norms.append(nn.BatchNorm2d(outputs))
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False):
        feats = []
        for conv, norm in zip(self.convs, self.norms):
            before = norm(conv(x))
            x = before.relu()
            feats.append(before if preact else x)
            x = F.max_pool2d(x, 2)
        logits = self.fc(x.flatten(1))
        return (feats, logits) if is_feat else logits


def train_teacher(train_loader: DataLoader, epochs: int) -> nn.Module:
    model = ConvNet(width=32)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for input, target, _ in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(input), target).backward()
            optimizer.step()
    return model


def validate(loader: DataLoader, model: nn.Module) -> str:
    """Accuracy over all classes, and over frequent, middle and rare ones."""
    model.eval()
    device = next(model.parameters()).device
    correct, total = torch.zeros(10), torch.zeros(10)
    with torch.no_grad():
        for input, target in loader:
            predicted = model(input.to(device)).argmax(1).cpu()
            correct += torch.bincount(target[predicted == target], minlength=10)
            total += torch.bincount(target, minlength=10)
    parts = {"all": slice(10), "0-3": slice(4), "4-6": slice(4, 7), "7-9": slice(7, 10)}
    return "  ".join(
        f"{name} {100 * correct[part].sum() / total[part].sum():.1f}%"
        for name, part in parts.items()
    )


def get_dataloaders() -> tuple[DataLoader, DataLoader, DataLoader]:
    """scikit-learn's digits: a long-tailed training set, balanced validation and test sets.

    Training batches are (input, target, index), the others (input, target).
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


if __name__ == "__main__":
    main()
