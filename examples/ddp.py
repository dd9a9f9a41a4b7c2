"""Several processes under torchrun, on long-tailed handwritten digits; CPUs or one GPU for each.

What one process needs stays as it is: the student goes through DistributedDataParallel, the
training set through a DistributedSampler, and BilevelOptimizer is given what is called. Where
kd-balance changed the plain program, the line ends with its name in a comment.

    pip install 'kd-balance[examples]'
    torchrun --standalone --nproc-per-node 2 examples/ddp.py            # about twenty seconds
    torchrun --standalone --nproc-per-node 2 examples/ddp.py --plain    # without kd-balance
    python examples/ddp.py --batch_size 32                              # the same in one process
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts  # kd-balance
from kd_balance.data import BalancedBatches, long_tail_indices, split_balanced


def main(argv: Sequence[str] | None = None) -> torch.optim.Optimizer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=16, help="of each process")
    parser.add_argument("--plain", action="store_true", help="fixed weights of the two losses")
    options = parser.parse_args(argv)
    device = begin()
    rank = dist.get_rank()
    train, val, test = digits(device)

    torch.manual_seed(0)
    teacher = convnet(32).to(device)
    train_teacher(teacher, train, options.epochs)

    torch.manual_seed(1)
    student = DistributedDataParallel(convnet(8).to(device))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    criterion = WeightedKDLoss()
    if not options.plain:
        criterion = WeightedKDLoss.long_tailed(class_counts(train.tensors[1]))  # kd-balance
        meta = BalancedBatches(*val.tensors, batch_size=50, seed=rank)  # kd-balance
        parts = student, criterion, meta  # kd-balance
        optimizer = BilevelOptimizer(optimizer, *parts, teacher=teacher)  # kd-balance
    sampler = DistributedSampler(train)
    loader = DataLoader(train, batch_size=options.batch_size, sampler=sampler)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(loader))

    start = time.perf_counter()
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            with torch.no_grad():
                teacher_logits = teacher(inputs)
            loss = criterion(student(inputs), teacher_logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    if rank == 0:
        steps = options.epochs * len(loader)
        print(f"{1e3 * (time.perf_counter() - start) / steps:.1f} ms a step, {steps} steps")
        print("teacher, test:", accuracy(teacher, test))
        print("student, test:", accuracy(student.module, test))
        if not options.plain:
            print(optimizer.metrics)
    dist.destroy_process_group()
    return optimizer


def begin() -> torch.device:
    """Joins the processes that torchrun started, or is one by itself."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        device, backend = torch.device("cpu"), "gloo"
    else:
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    return device


def train_teacher(teacher: nn.Module, train: TensorDataset, epochs: int) -> None:
    """The same in every process, for the data and the seed are."""
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(epochs // 2):
        for inputs, targets in DataLoader(train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(teacher(inputs), targets).backward()
            optimizer.step()
    teacher.eval()


def accuracy(model: nn.Module, test: TensorDataset) -> str:
    """Over all classes, and over frequent, middle and rare ones."""
    inputs, targets = test.tensors
    with torch.no_grad():
        correct = (model.eval()(inputs).argmax(1) == targets).float()
    parts = {"all": (0, 10), "0-3": (0, 4), "4-6": (4, 7), "7-9": (7, 10)}
    return "  ".join(
        f"{name} {100 * correct[(targets >= low) & (targets < high)].mean():.1f}%"
        for name, (low, high) in parts.items()
    )


def convnet(width: int, num_classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, num_classes),
    )  # fmt: skip


def digits(device: torch.device) -> list[TensorDataset]:
    """scikit-learn's digits: a long-tailed training set, balanced validation and test sets."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16).float().unsqueeze(1)  # [1797, 1, 8, 8]
    labels = torch.tensor(bunch.target)
    test, rest = split_balanced(labels, per_class=60, seed=0)
    val, rest = (rest[i] for i in split_balanced(labels[rest], per_class=10, seed=0))
    train = rest[long_tail_indices(labels[rest], imbalance_factor=50, seed=0, head_count=100)]
    parts = (train, val, test)
    return [TensorDataset(images[i].to(device), labels[i].to(device)) for i in parts]


if __name__ == "__main__":
    main()
