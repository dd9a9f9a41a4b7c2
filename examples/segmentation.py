"""Distil a segmentation student on scenes of handwritten digits, some of which are rare.

Digits out of scikit-learn's are laid onto scenes of 32 × 32 pixels: the 0 a hundred times as often
as the 9. Every pixel is one of eleven classes, and those at the rim of a stroke are ignored. The
student's logits have a quarter of the pixels; the loop upsamples them before the loss, and
kd-balance follows that. In its meta set all digits are equally frequent, and of the background so
many pixels are ignored that it has no more than they. All methods train on the meta scenes too.

    pip install 'kd-balance[examples]'
    python examples/segmentation.py            # about two minutes
    python examples/segmentation.py --quick    # a few steps, only to see that it runs
    python examples/segmentation.py --check    # is the hypergradient right in this loop?

It prints the intersection over union of plain KD, of the same losses with fixed weights and of
learned ones, and draws some test scenes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts
from kd_balance.check import check_hypergradient

BACKGROUND, CLASSES, IGNORED = 10, 11, 255
SIZE, DIGIT = 32, 12  # pixels
MANY, MEDIUM, FEW = slice(0, 3), slice(3, 7), slice(7, 10)  # digits
BATCH_SIZE = 32
TEACHER, STUDENT = (16, 32, 32), (8, 16, 16)  # channels
STEPS = 800
OPTIMIZER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
PICTURE = Path(__file__).parent.parent / "docs" / "segmentation.png"


class Scenes(NamedTuple):
    images: Tensor  # [N, 1, H, W]
    labels: Tensor  # [N, H, W]


def main(argv: Sequence[str] | None = None) -> dict[str, Tensor]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps")
    parser.add_argument("--check", action="store_true", help="check the hypergradient and stop")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where to draw it")
    args = parser.parse_args(argv)
    if args.check:
        torch.set_default_dtype(torch.float64)
    short = args.quick or args.check
    steps = 20 if short else STEPS
    train, meta, test = scenes_of_digits(100 if short else 2000)
    teacher = train_teacher(train, steps)
    counts = class_counts(train.labels[train.labels != IGNORED], CLASSES)
    balanced = {"temperature": 2.0, "ignore_index": IGNORED}
    criteria = {
        "plain KD": WeightedKDLoss(**balanced),
        "fixed weights": WeightedKDLoss.long_tailed(counts, **balanced),
        "learned weights": WeightedKDLoss.long_tailed(counts, **balanced),
    }
    if args.check:
        distil(teacher, criteria["learned weights"], train, meta, steps, check=True)
        return {}

    students = {
        name: distil(teacher, criterion, train, meta if name == "learned weights" else None, steps)
        for name, criterion in criteria.items()
    }
    scores = {name: intersection_over_union(s, test) for name, s in students.items()}
    print_table(scores)
    draw(args.picture, test, students)
    print(f"Some test scenes are drawn in {args.picture}.")
    return scores


def distil(
    teacher: nn.Module,
    criterion: WeightedKDLoss,
    train: Scenes,
    meta: Scenes | None,
    steps: int,
    *,
    check: bool = False,
) -> nn.Module:
    """Trains a student; on a meta set its weights learn beside it."""
    torch.manual_seed(1)
    student = network(STUDENT, stride=2)
    optimizer = torch.optim.SGD(student.parameters(), **OPTIMIZER)
    if meta is not None:
        batches = list(zip(meta.images.split(BATCH_SIZE), meta.labels.split(BATCH_SIZE)))
        optimizer = BilevelOptimizer(optimizer, student, criterion, batches, teacher=teacher)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(2)

    def step(scenes: Scenes) -> None:
        logits = F.interpolate(student(scenes.images), size=(SIZE, SIZE), mode="bilinear")
        with torch.no_grad():
            teacher_logits = teacher(scenes.images)
        loss = criterion(logits, teacher_logits, scenes.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

    if check:
        few = [drawn(train, generator, 4) for _ in range(optimizer.unroll)]
        print(check_hypergradient(optimizer, step, few, raise_exception=False))
        return student
    for _ in range(steps):
        step(drawn(train, generator))
    return student


def drawn(scenes: Scenes, generator: torch.Generator, count: int = BATCH_SIZE) -> Scenes:
    """A batch of scenes."""
    chosen = torch.randint(len(scenes.images), (count,), generator=generator)
    return Scenes(scenes.images[chosen], scenes.labels[chosen])


def network(channels: Sequence[int], stride: int = 1) -> nn.Sequential:
    """Convolutions with batch norm; [B, 1, H, W] to logits [B, C, H / stride, W / stride]."""
    layers: list[nn.Module] = []
    before = 1
    for i, width in enumerate(channels):
        layers += [
            nn.Conv2d(before, width, 3, stride if i == 0 else 1, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        before = width
    wide = nn.Conv2d(before, before, 3, padding=2, dilation=2, bias=False)
    return nn.Sequential(
        *layers, wide, nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, CLASSES, 1)
    )


def train_teacher(train: Scenes, steps: int) -> nn.Module:
    """A larger network, biased towards what is frequent; not interesting here."""
    torch.manual_seed(0)
    teacher = network(TEACHER)
    optimizer = torch.optim.SGD(teacher.parameters(), **OPTIMIZER)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps // 2)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps // 2):
        scenes = drawn(train, generator)
        loss = F.cross_entropy(teacher(scenes.images), scenes.labels, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return teacher.eval().requires_grad_(False)


# data


def scenes_of_digits(count: int) -> tuple[Scenes, Scenes, Scenes]:
    """Long-tailed training scenes and the meta scenes; meta scenes; balanced test scenes."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16).to(torch.get_default_dtype()).unsqueeze(1)
    images = F.interpolate(images, size=(DIGIT, DIGIT), mode="bilinear").squeeze(1)
    targets = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    tail, even = 100.0 ** (-torch.arange(10) / 9), torch.ones(10)
    parts = order.split([900, 200, len(order) - 1100])  # nobody's writing is in two of them
    train, meta, test = (
        composed(images[part], targets[part], how_often, number, seed)
        for seed, (part, how_often, number) in enumerate(
            zip(parts, (tail, even, even), (count, 4 * BATCH_SIZE, count // 4))
        )
    )
    both = Scenes(*(torch.cat(parts) for parts in zip(train, meta)))  # all methods train on these
    return both, Scenes(meta.images, thinned(meta.labels)), test


def composed(
    images: Tensor, targets: Tensor, how_often: Tensor, count: int, seed: int
) -> Scenes:
    """Scenes of four digits each, on a background of noise."""
    generator = torch.Generator().manual_seed(seed)
    scenes = 0.15 * torch.randn(count, SIZE, SIZE, generator=generator).to(images)
    labels = torch.full((count, SIZE, SIZE), BACKGROUND)
    members = [(targets == digit).nonzero().squeeze(1) for digit in range(10)]
    for scene, label in zip(scenes, labels):
        for corner in range(4):
            digit = int(torch.multinomial(how_often, 1, generator=generator))
            which = torch.randint(len(members[digit]), (1,), generator=generator)
            ink = images[members[digit][which]].squeeze(0)
            margin = SIZE // 2 - DIGIT + 1
            moved = torch.randint(margin, (2,), generator=generator).tolist()
            top, left = (half * SIZE // 2 + m for half, m in zip(divmod(corner, 2), moved))
            window = slice(top, top + DIGIT), slice(left, left + DIGIT)
            scene[window] += ink
            label[window][ink > 0.5] = digit
            label[window][(ink > 0.2) & (ink <= 0.5)] = IGNORED  # the rim
    return Scenes(scenes.unsqueeze(1), labels)


def thinned(labels: Tensor) -> Tensor:
    """Background pixels are ignored until there are as many as of a digit."""
    counts = class_counts(labels[labels != IGNORED], CLASSES)
    share = counts[:BACKGROUND].double().mean() / counts[BACKGROUND]
    draw = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    return labels.masked_fill((labels == BACKGROUND) & (draw > share), IGNORED)


# results


@torch.no_grad()
def predicted(student: nn.Module, images: Tensor) -> Tensor:
    """The class of every pixel, [N, H, W]."""
    student.eval()
    logits = F.interpolate(student(images), size=(SIZE, SIZE), mode="bilinear")
    return logits.argmax(1)


def intersection_over_union(student: nn.Module, test: Scenes) -> Tensor:
    """[C], in percent."""
    found, kept = predicted(student, test.images), test.labels != IGNORED
    scores = []
    for c in range(CLASSES):
        own, true = (found == c) & kept, test.labels == c
        scores.append(100 * (own & true).sum() / (own | true).sum().clamp(min=1))
    return torch.stack(scores)


def print_table(scores: dict[str, Tensor]) -> None:
    print("Intersection over union in %, means over classes:")
    print(f"{'':18}{'all':>7}{'many':>7}{'medium':>8}{'few':>7}{'background':>12}")
    for name, by_class in scores.items():
        parts = (by_class, by_class[MANY], by_class[MEDIUM], by_class[FEW], by_class[BACKGROUND:])
        numbers = zip((7, 7, 8, 7, 12), (part.mean().item() for part in parts))
        print(f"{name:18}" + "".join(f"{number:{width}.1f}" for width, number in numbers))


def draw(path: Path, test: Scenes, students: dict[str, nn.Module]) -> None:
    """Test scenes that hold a rare digit: what there is, and what each student sees."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rare = [i for i, label in enumerate(test.labels) if (label[label < BACKGROUND] > 6).any()][:5]
    colors = ListedColormap([*(colormaps["tab10"](i) for i in range(10)), (0.93, 0.93, 0.93, 1.0)])
    rows = {"labels": test.labels[rare]}
    rows |= {name: predicted(student, test.images[rare]) for name, student in students.items()}
    figure = Figure(figsize=(8.6, 7.4), layout="constrained")
    panels = figure.subplots(len(rows) + 1, len(rare), squeeze=False)
    for column, index in enumerate(rare):
        panels[0][column].imshow(test.images[index, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        for line, classes in zip(panels[1:], rows.values()):
            shown = np.ma.masked_equal(classes[column].numpy(), IGNORED)
            line[column].imshow(shown, cmap=colors, vmin=0, vmax=BACKGROUND, interpolation="none")
    for line, name in zip(panels, ("scene", *rows)):
        line[0].set_ylabel(name)
        for panel in line:
            panel.set(xticks=[], yticks=[])
    handles = [Patch(color=colors(c), label=str(c)) for c in range(10)]
    figure.legend(handles=handles, loc="outside lower center", ncols=10, frameon=False,
                  title="digit, frequent to rare", handlelength=1.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
