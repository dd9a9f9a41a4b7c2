"""A protocol: every setting of a comparison except the method, the teacher and the seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "protocols"


@dataclass(frozen=True)
class Protocol:
    """The settings, read from a file under ``protocols/``.

    Attributes:
        dataset: "cifar10", "cifar100", "snippets" or "digits".
        imbalance: training samples of the first class over those of the last.
        head: training samples of the first class; None takes as many as there are.
        meta_per_class: samples a class of the balanced meta set, taken out of the training images
            before they are made long-tailed.
        validation_per_class: the same for a set that only serves to choose settings; may be 0.
        test_per_class: test samples a class; None takes all.
        label_noise: share of the training samples that bear another class's label, drawn
            uniformly. The labels of the meta, validation and test samples are right.
        colour: share of the training samples that have the colour of their class (digits); None
            for samples without colours.
        teacher_sees_meta: whether the meta set is in the teacher's training set too, as where it is
            cut out of the training set when the teacher is there already.
        teacher_amp: bfloat16 autocast for the teacher, in training and for its logits.
        views: how many augmented views of each training sample there are. Every method sees the
            same ones, so a teacher's logits are computed once.
        split_seed: decides the sets and the views, for all seeds alike.
        optimizer: of students and teachers, "sgd" or "adamw", which takes no momentum.
        schedule: "one-cycle", or "step" with the rate times 0.1 at each of `milestones`.
        plan: (teacher, methods) in the order in which they are run.
    """

    name: str
    dataset: str
    teacher: str
    student: str
    imbalance: float = 100
    head: int | None = None
    meta_per_class: int = 20
    validation_per_class: int = 0
    test_per_class: int | None = None
    label_noise: float = 0.0
    epochs: int = 40
    teacher_epochs: int = 40
    colour: float | None = None
    teacher_sees_meta: bool = False
    teacher_amp: bool = False
    batch_size: int = 100
    meta_batch_size: int = 100
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "one-cycle"
    milestones: tuple[int, ...] = ()
    temperature: float = 4.0
    views: int = 40
    split_seed: int = 0
    imbalances: tuple[float, ...] = field(default=(100,), compare=False)
    seeds: tuple[int, ...] = field(default=(0, 1, 2), compare=False)
    plan: tuple[tuple[str, tuple[str, ...]], ...] = field(default=(), compare=False)

    def settings(self) -> dict[str, Any]:
        """What has an influence on a run: all but the plan."""
        values = dataclasses.asdict(self)
        for name in ("imbalances", "seeds", "plan"):
            del values[name]
        return values

    def digest(self, *more: Any) -> str:
        """A short name for these settings and `more`, the same in every process.

        Only settings that differ from their defaults count, so that a new one with a default
        leaves the results and teachers of old protocols valid.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        settings = {
            name: value
            for name, value in self.settings().items()
            if name != "name" and value != defaults[name]
        }
        text = json.dumps([settings, *more], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def replace(self, **changes: Any) -> Protocol:
        """The protocol with some settings changed."""
        return dataclasses.replace(self, **changes)


def load_protocol(name: str) -> Protocol:
    """The protocol in ``protocols/<name>.json``."""
    path = FOLDER / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise FileNotFoundError(f"protocol {name!r} is unknown, expected one of {known}.")
    values = json.loads(path.read_text())
    values["plan"] = tuple((row["teacher"], tuple(row["methods"])) for row in values["plan"])
    for key in ("milestones", "imbalances", "seeds"):
        if key in values:
            values[key] = tuple(values[key])
    return Protocol(name=name, imbalance=values["imbalances"][0], **values)
