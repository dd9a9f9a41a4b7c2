"""MONAI: a small UNet distilled from a bigger one by SupervisedTrainer, every pixel weighted.

    pip install kd-balance pytorch-ignite==0.5.5 monai==1.6.1
    python examples/codebases/monai_segmentation.py
    python examples/codebases/monai_segmentation.py --check    # is the hypergradient right?

Trainer, handlers, networks, transforms and loaders are MONAI's. Made-up discs of rare and frequent
classes stand for the organs; the pixels at their rims are ignored.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial

import torch
import torch.nn.functional as F
from monai.data import DataLoader, Dataset
from monai.engines import PrepareBatch, SupervisedTrainer, default_prepare_batch
from monai.handlers import CheckpointSaver, LrScheduleHandler
from monai.networks.nets import UNet
from monai.optimizers import WarmupCosineSchedule
from monai.transforms import Compose, EnsureTyped, RandFlipd
from torch import Tensor, nn

from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts  # kd-balance
from kd_balance.check import check_hypergradient

CLASSES, IGNORED, SIZE, EPOCHS = 5, 255, 32, 5


class WithTeacher(PrepareBatch):
    """Images, and as targets the teacher's logits beside the labels."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs) -> tuple:
        images, labels = default_prepare_batch(batchdata, device, non_blocking, **kwargs)
        with torch.no_grad():
            return images, (self.teacher(images), labels[:, 0].long())  # kd-balance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    if check:
        torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    train, meta = scenes(64, [0.7, 0.2, 0.07, 0.03], seed=0), scenes(16, [0.25] * 4, seed=1)
    keys, dtype = ["image", "label"], torch.get_default_dtype()
    augmented = Compose([EnsureTyped(keys, dtype=dtype), RandFlipd(keys, 0.5, spatial_axis=0)])
    loader = DataLoader(Dataset(train, augmented), batch_size=4, shuffle=True)
    teacher = trained_teacher(loader)
    student = unet((4, 8))

    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    labels = torch.stack([scene["label"] for scene in train])  # kd-balance
    counts = class_counts(labels[labels != IGNORED].long(), CLASSES)  # kd-balance
    criterion = WeightedKDLoss.long_tailed(counts, ignore_index=IGNORED)  # kd-balance
    parts = student, criterion, [batch_of(meta[:8]), batch_of(meta[8:])]  # kd-balance
    optimizer = BilevelOptimizer(optimizer, *parts, teacher=teacher, every=8)  # kd-balance

    steps = EPOCHS * len(loader)
    schedule = WarmupCosineSchedule(optimizer, warmup_steps=5, t_total=steps)
    with tempfile.TemporaryDirectory() as folder:
        objects = {"student": student, "optimizer": optimizer}
        trainer = SupervisedTrainer(
            device="cpu", max_epochs=1 if check else EPOCHS, train_data_loader=loader,
            network=student, optimizer=optimizer, prepare_batch=WithTeacher(teacher),
            loss_function=lambda logits, targets: criterion(logits, *targets),  # kd-balance
            train_handlers=[LrScheduleHandler(schedule, epoch_level=False),
                            CheckpointSaver(folder, objects, save_final=True)],
        )
        trainer.run()
    if check:
        batches, step = list(loader), partial(trainer._iteration, trainer)
        print(check_hypergradient(optimizer, step, batches, raise_exception=False))
        return
    print(f"meta updates: {optimizer.metrics['meta_updates']:.0f}")


def trained_teacher(loader: DataLoader) -> nn.Module:
    """A bigger UNet, by the same trainer."""
    teacher = unet((8, 16, 32))
    SupervisedTrainer(
        device="cpu", max_epochs=2, train_data_loader=loader, network=teacher,
        optimizer=torch.optim.Adam(teacher.parameters(), lr=1e-2),
        loss_function=lambda x, y: F.cross_entropy(x, y[:, 0].long(), ignore_index=IGNORED),
    ).run()
    return teacher.eval().requires_grad_(False)


def unet(channels: tuple[int, ...]) -> UNet:
    return UNet(spatial_dims=2, in_channels=1, out_channels=CLASSES, channels=channels,
                strides=(2,) * (len(channels) - 1), num_res_units=1, norm="batch")


def scenes(count: int, how_often: list[float], seed: int) -> list[dict[str, Tensor]]:
    """Two discs each on a noisy background, class 0; the brighter a disc, the rarer."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    found = []
    for _ in range(count):
        image = 0.3 * torch.randn(1, SIZE, SIZE, generator=generator)
        label = torch.zeros(1, SIZE, SIZE)
        for kind in torch.multinomial(torch.tensor(how_often), 2, True, generator=generator) + 1:
            row, column = torch.randint(6, SIZE - 6, (2,), generator=generator)
            away = ((rows - row) ** 2 + (columns - column) ** 2).sqrt()[None]
            image[away < 5], label[away < 5], label[(away - 5).abs() < 0.5] = kind, kind, IGNORED
        found.append({"image": image.to(torch.get_default_dtype()), "label": label})
    return found


def batch_of(scenes: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:  # kd-balance
    """For the meta set: of the background so few pixels count as of another class."""
    labels = torch.cat([scene["label"] for scene in scenes]).long()  # kd-balance
    labels[(labels == 0) & (torch.rand(labels.shape) > 0.05)] = IGNORED  # kd-balance
    return torch.stack([scene["image"] for scene in scenes]), labels  # kd-balance


if __name__ == "__main__":
    main()
