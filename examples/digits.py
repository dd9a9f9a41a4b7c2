"""Distil a small student on long-tailed handwritten digits, with fixed and with learned weights.

scikit-learn's digits (1,797 real scans of 8 × 8 pixels) are made long-tailed: 100 images of the
digit 0 down to 2 of the digit 9. Of two teachers one is biased towards the frequent digits, the
other is debiased by balanced softmax. The same small student learns from them by plain KD and by
BiKD, whose weights are learned on a balanced meta set of 10 images a digit.

    pip install 'kd-balance[examples]'
    python examples/digits.py            # 3 seeds, about two minutes
    python examples/digits.py --quick    # 1 seed and 3 epochs, only to see that it runs
    python examples/digits.py --check    # is the hypergradient right in this loop?

It prints test accuracies, whichever way they come out, and draws the weights that BiKD learned.
What concerns kd-balance is in the functions `distil` and `compare`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.check import check_hypergradient
from kd_balance.data import BalancedBatches, class_counts, long_tail_indices, split_balanced
from kd_balance.hard_losses import BalancedSoftmax
from kd_balance.history import WeightHistory
from kd_balance.teacher_bias import prior_bias

EPOCHS = 100
BATCH_SIZE = 32
LEARNING_RATE = 0.05  # of 0.1, 0.05, 0.02 and 0.01, plain KD's lowest training loss
NOISE = 0.1  # standard deviation; pixels are in [0, 1]
TEACHER = (64, 256, 256, 10)
STUDENT = (64, 16, 16, 10)
ENTROPY, BALANCED = "cross entropy", "balanced softmax"
BIKD_COST = 2  # what an epoch of BiKD counts on the progress bar

BIASED, DEBIASED, FREED = "biased", "debiased", " - bias"
KD, ADDED, BIKD = "KD", "KD + meta images", "BiKD"

Row = tuple[str, str, str]  # method, hard loss, teacher
Teacher = Callable[[Tensor], Tensor]  # images -> logits


class Images(NamedTuple):
    inputs: Tensor  # [N, 64]
    targets: Tensor  # [N]


def distil(
    teacher: Teacher,
    criterion: WeightedKDLoss,
    train: Images,
    meta: Images,
    seed: int,
    epochs: int,
    progress: tqdm,
    *,
    picture: Path | None = None,
    check: bool = False,
) -> nn.Module:
    """Train a student by BiKD, or by plain KD if the criterion has no weight net."""
    student = mlp(STUDENT, seed)
    optimizer = sgd(student)
    if criterion.weight_net is not None:
        meta_loader = BalancedBatches(meta.inputs, meta.targets, batch_size=50, seed=seed)
        known = teacher if criterion.class_counts is not None else None
        optimizer = BilevelOptimizer(optimizer, student, criterion, meta_loader, teacher=known)
    history = WeightHistory(criterion)

    scheduler = CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)

    def step(batch: Images) -> None:
        with torch.no_grad():
            teacher_logits = teacher(batch.inputs)
        loss = criterion(student(batch.inputs), teacher_logits, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if check:
        print(check_hypergradient(optimizer, step, batches(train, generator)))
        return student
    for _ in range(epochs):
        for batch in batches(train, generator):
            step(batch)
        scheduler.step()
        progress.update(1 if criterion.weight_net is None else BIKD_COST)
    if picture is not None:
        history.plot(picture, class_counts(train.targets))
    return student


def fit(
    model: nn.Module, hard_loss: nn.Module, train: Images, seed: int, epochs: int, progress: tqdm
) -> nn.Module:
    """Train a model without a teacher."""
    optimizer = sgd(model)
    scheduler = CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for inputs, targets in batches(train, generator):
            loss = hard_loss(model(inputs), targets).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        progress.update()
    return model


def mlp(widths: Sequence[int], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)  # the same student for every method
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)


def split(seed: int) -> tuple[Images, Images, Images]:
    """A long-tailed training set, a balanced meta set and a balanced test set, without overlap."""
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16).to(torch.get_default_dtype())
    images = Images(inputs, torch.tensor(digits.target))

    def pick(images: Images, index: Tensor) -> Images:
        return Images(images.inputs[index], images.targets[index])

    test_index, rest_index = split_balanced(images.targets, per_class=60, seed=seed)
    test, rest = pick(images, test_index), pick(images, rest_index)
    meta_index, rest_index = split_balanced(rest.targets, per_class=10, seed=seed)
    meta, rest = pick(rest, meta_index), pick(rest, rest_index)
    tail_index = long_tail_indices(rest.targets, imbalance_factor=50, seed=seed, head_count=100)
    return pick(rest, tail_index), meta, test


def batches(images: Images, generator: torch.Generator) -> Iterator[Images]:
    """One epoch in random order, every image shifted by up to a pixel and noised."""
    for index in torch.randperm(len(images.targets), generator=generator).split(BATCH_SIZE):
        n = len(index)
        padded = F.pad(images.inputs[index].view(n, 8, 8), (1, 1, 1, 1))
        windows = padded.unfold(1, 8, 1).unfold(2, 8, 1)  # [n, 3, 3, 8, 8], one for each shift
        down, right = torch.randint(3, (2, n), generator=generator)
        shifted = windows[torch.arange(n), down, right].flatten(1)
        noise = NOISE * torch.randn(n, 64, generator=generator)
        yield Images(shifted + noise, images.targets[index])


def accuracies(model: nn.Module, test: Images, counts: Tensor) -> Tensor:
    """[4], percent correct: overall, many-shot, medium-shot and few-shot classes."""
    with torch.no_grad():
        correct = (model(test.inputs).argmax(1) == test.targets).double()
    by_class = torch.zeros(10).double().index_add(0, test.targets, correct) / 60
    groups = (counts > 0, counts > 40, (counts <= 40) & (counts > 5), counts <= 5)
    return torch.stack([100 * by_class[group].mean() for group in groups])


def check() -> None:
    """Whether the hypergradient is right in this loop."""
    torch.set_default_dtype(torch.float64)
    train, meta, _ = split(seed=0)
    criterion = WeightedKDLoss.long_tailed(class_counts(train.targets))
    distil(mlp(TEACHER, 1), criterion, train, meta, 0, EPOCHS, tqdm(disable=True), check=True)


def compare(seed: int, epochs: int, progress: tqdm, picture: Path | None) -> dict[Row, Tensor]:
    """Train every model of the table with one seed; gives the accuracies [4] of each."""
    train, meta, test = split(seed)
    added = Images(*(torch.cat(pair) for pair in zip(train, meta)))
    counts, counts_added = class_counts(train.targets), class_counts(added.targets)
    entropy = nn.CrossEntropyLoss(reduction="none")
    balanced, balanced_added = BalancedSoftmax(counts), BalancedSoftmax(counts_added)
    rest = (seed, epochs, progress)

    biased = fit(mlp(TEACHER, seed), entropy, train, *rest)
    debiased = fit(mlp(TEACHER, seed), balanced, train, *rest)
    models: dict[Row, nn.Module] = {
        ("biased teacher", ENTROPY, "-"): biased,
        ("debiased teacher", BALANCED, "-"): debiased,
        ("no distillation", ENTROPY, "-"): fit(mlp(STUDENT, seed), entropy, train, *rest),
        ("no distillation", BALANCED, "-"): fit(mlp(STUDENT, seed), balanced, train, *rest),
    }
    for name, teacher in ((BIASED, biased), (DEBIASED, debiased)):
        with torch.no_grad():
            bias = prior_bias(teacher(meta.inputs), meta.targets, counts)

        def freed(inputs: Tensor, teacher: nn.Module = teacher, bias: Tensor = bias) -> Tensor:
            return teacher(inputs) - bias

        fixed = WeightedKDLoss(temperature=4.0, hard_loss=entropy)
        models[KD, ENTROPY, name] = distil(teacher, fixed, train, meta, *rest)
        models[ADDED, ENTROPY, name] = distil(teacher, fixed, added, meta, *rest)

        torch.manual_seed(seed)
        learned = WeightedKDLoss(MetaWeightNet(), temperature=4.0)
        models[BIKD, ENTROPY, name] = distil(teacher, learned, train, meta, *rest)

        fixed = WeightedKDLoss(temperature=4.0, hard_loss=balanced_added)
        models[ADDED, BALANCED, name + FREED] = distil(freed, fixed, added, meta, *rest)

        torch.manual_seed(seed)
        learned = WeightedKDLoss.long_tailed(counts_added, temperature=4.0)
        drawn = picture if name == DEBIASED else None
        models[BIKD, BALANCED, name + FREED] = distil(
            teacher, learned, added, meta, *rest, picture=drawn
        )
    return {row: accuracies(model, test, counts) for row, model in models.items()}


def mean_and_deviation(values: Tensor) -> str:
    """Over the seeds, values [S]."""
    deviation = f" ± {values.std():4.1f}" if len(values) > 1 else " " * 7
    return f"{values.mean():5.1f}{deviation}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs to average over (default 3)")
    parser.add_argument("--quick", action="store_true", help="one seed and three epochs")
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("build/digits_weights.png"),
        help="where to draw the learned weights (default build/digits_weights.png)",
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}, expected at least 1.")
    torch.set_num_threads(1)  # for batches this small more threads take longer
    if options.check:
        check()
        return
    seeds, epochs = (1, 3) if options.quick else (options.seeds, EPOCHS)
    options.picture.parent.mkdir(parents=True, exist_ok=True)

    runs = []
    with tqdm(
        total=seeds * epochs * (10 + 4 * BIKD_COST),
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left",
        smoothing=0,
        mininterval=1,
    ) as progress:
        for seed in range(seeds):
            progress.set_description_str(f"seed {seed + 1} of {seeds}")
            runs.append(compare(seed, epochs, progress, options.picture if seed == 0 else None))
    results = {row: torch.stack([run[row] for run in runs]) for row in runs[0]}  # each [S, 4]

    counts = class_counts(split(0)[0].targets).tolist()
    print(f"\nTraining images of the digits 0 to 9: {', '.join(map(str, counts))}.")
    print("Many-shot are digits with more than 40, few-shot those with at most 5.")
    print(f"Student {'-'.join(map(str, STUDENT))}, {epochs} epochs, {seeds} seed(s).")
    print(f"\nTest accuracy in %{', mean ± standard deviation' if seeds > 1 else ''}")
    headings = "".join(f"{name:>14}" for name in ("overall", "many", "medium", "few"))
    print(f"{'method':18}{'hard loss':18}{'teacher':17}{headings}")
    for (method, hard_loss, teacher), values in results.items():
        columns = "".join(f"{mean_and_deviation(column):>14}" for column in values.T)
        print(f"{method:18}{hard_loss:18}{teacher:17}{columns}")
    print("\nBiKD minus another, seed by seed")
    for name in (BIASED, DEBIASED):
        for hard_loss, teacher, method in (
            (ENTROPY, name, KD), (BALANCED, name + FREED, ADDED)
        ):
            difference = results[BIKD, hard_loss, teacher] - results[method, hard_loss, teacher]
            columns = "".join(f"{mean_and_deviation(column):>14}" for column in difference.T)
            print(f"{method:18}{hard_loss:18}{teacher:17}{columns}")
    print(
        f"\n{ADDED}: the meta set is added to the training data, as for BiKD with {BALANCED}."
        f"\n{FREED.strip()}: the class bias that the teacher shows on the meta set is taken off."
        f"\nThe weights of BiKD with {BALANCED} and the debiased teacher: {options.picture}"
    )


if __name__ == "__main__":
    main()
