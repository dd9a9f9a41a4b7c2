"""torchdistill, driven by digits.yaml: the loss and the optimizer are named there by key.

This program is the one that torchdistill's own examples have, in short. Of kd-balance it knows that
the criterion finds the teacher's bias, which no key of the file can give it. What changed in
digits.yaml is marked there; docs/drop_in.md shows it against what it replaces.

    pip install 'kd-balance[examples,torchdistill]'
    python examples/torchdistill/train.py    # about fifteen seconds
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.models.registry import get_model

from kd_balance.check import check_hypergradient


def main(argv: Sequence[str] | None = None) -> DistillationBox:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=str(Path(__file__).with_name("digits.yaml")))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    if args.check:
        torch.set_default_dtype(torch.float64)

    torch.manual_seed(0)
    config = yaml_util.load_yaml_file(args.config)
    import_dependencies(config["dependencies"])
    datasets, models = config["datasets"], config["models"]
    if args.epochs is not None:
        config["train"]["num_epochs"] = args.epochs
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, student = (
        get_model(models[name]["key"], **models[name]["kwargs"]).to(device)
        for name in ("teacher_model", "student_model")
    )
    train_teacher(teacher, datasets["digits/train"], config["train"]["num_epochs"], device)
    print("teacher, test:", test(teacher, datasets["digits/test"], device))

    box = get_distillation_box(
        teacher, student, datasets, config["train"], device, None, False, 1
    )
    teacher.eval()
    meta_loader = config["train"]["optimizer"]["kwargs"]["meta_loader"]
    box.optimizer.criterion.find_teacher_bias((teacher(x.to(device)), y) for x, y in meta_loader)

    def step(batch):
        inputs, targets, supp_dict = batch
        loss = box.forward_process(inputs.to(device), targets.to(device), supp_dict)
        box.post_forward_process(loss=loss)
        return loss

    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        teacher.eval()  # the box does not
        if args.check:
            print(check_hypergradient(box.optimizer, step, box.train_data_loader))
            return box
        for batch in box.train_data_loader:
            loss = step(batch)
        if (epoch + 1) % 10 == 0 or epoch + 1 == box.num_epochs:
            print(f"epoch {epoch + 1}, loss {loss.item():.4f}")
        box.post_epoch_process()
    print("student, test:", test(student, datasets["digits/test"], device))
    return box


def train_teacher(teacher: nn.Module, dataset: Dataset, epochs: int, device) -> None:
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(epochs):
        for inputs, targets in torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            logits = teacher(inputs.to(device))
            nn.functional.cross_entropy(logits, targets.to(device)).backward()
            optimizer.step()


@torch.inference_mode()
def test(model: nn.Module, dataset: torch.utils.data.TensorDataset, device) -> str:
    """Accuracy over all classes, and over frequent, middle and rare ones."""
    model.eval()
    inputs, targets = dataset.tensors
    correct = (model(inputs.to(device)).argmax(1).cpu() == targets).float()
    parts = {"all": (0, 10), "0-3": (0, 4), "4-6": (4, 7), "7-9": (7, 10)}
    return "  ".join(
        f"{name} {100 * correct[(targets >= low) & (targets < high)].mean():.1f}%"
        for name, (low, high) in parts.items()
    )


if __name__ == "__main__":
    main()
