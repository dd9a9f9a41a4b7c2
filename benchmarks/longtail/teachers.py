"""Teachers: trained once for a setting, then kept on disk with their logits for every view."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longtail.afterwards import predict_with
from longtail.data import Task
from longtail.fit import Machine, fit
from longtail.methods import make_method
from longtail.metrics import evaluate
from longtail.models import build
from longtail.protocol import Protocol

KINDS = {"biased": "ce", "debiased": "bs"}
"""The method that each kind of teacher is trained with."""


class Teacher(NamedTuple):
    """A trained teacher.

    Attributes:
        logits: [views, pool, C], float32, on the task's device.
        metrics: on the test set.
        seconds: what its training took.
    """

    logits: Tensor
    metrics: dict[str, Any]
    seconds: float


def teacher_path(cache: Path, kind: str, task: Task, protocol: Protocol) -> Path:
    """Where the teacher is kept; settings that concern it and the data decide the name."""
    aside = {name: getattr(Protocol, name) for name in ("epochs", "temperature", "meta_batch_size")}
    name = protocol.replace(student="", **aside).digest(kind, task.digest)
    return cache / "teachers" / f"{protocol.dataset}-{kind}-{name}.pt"


def obtain_teacher(
    kind: str,
    task: Task,
    protocol: Protocol,
    machine: Machine,
    cache: Path,
) -> Teacher:
    """Reads the teacher of this setting from the cache, or trains it.

    Args:
        kind: "biased", "debiased", or a path to a checkpoint with RepDistiller's names.
    """
    path = teacher_path(cache, kind, task, protocol)
    if not path.exists():
        _make(kind, task, protocol, machine, path)
    saved = torch.load(path, map_location=task.device, weights_only=True)
    return Teacher(saved["logits"].float(), saved["metrics"], saved["seconds"])


def _make(
    kind: str,
    task: Task,
    protocol: Protocol,
    machine: Machine,
    path: Path,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = dataclasses.replace(machine, amp=machine.amp or protocol.teacher_amp)
    model = build(protocol.teacher, task.num_classes, protocol.split_seed)
    trained = path.with_suffix(".trained")  # the logits may take long too
    seconds = 0.0
    if trained.exists():
        saved = torch.load(trained, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        seconds = saved["seconds"]
    elif kind in KINDS:
        method = make_method(KINDS[kind], task, protocol, protocol.split_seed)
        method.meta_copies = int(protocol.teacher_sees_meta)
        part = path.with_suffix(".checkpoint")
        done = fit(model, method, protocol.teacher_epochs, None, machine, checkpoint=part)
        seconds = done.seconds
        torch.save({"model": model.state_dict(), "seconds": seconds}, trained)
    else:
        model.load_state_dict(_published(Path(kind)))
    model.to(task.device, memory_format=torch.channels_last).eval()
    content = {
        "model": model.state_dict(),
        "logits": _logits_of_views(model, task, protocol, machine),
        "metrics": evaluate(predict_with(model)(task.test.inputs), task.test.targets, task.groups),
        "seconds": seconds,
    }
    torch.save(content, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    trained.unlink(missing_ok=True)


def _published(path: Path) -> dict[str, Tensor]:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return saved.get("model", saved)


@torch.no_grad()
def _logits_of_views(model: nn.Module, task: Task, protocol: Protocol, machine: Machine) -> Tensor:
    pool = torch.arange(len(task.targets), device=task.device)
    rows = []
    for view in torch.arange(protocol.views, device=task.device):
        with torch.autocast(task.device.type, torch.bfloat16, enabled=machine.amp):
            parts = [model(task.views(part, view)).float() for part in pool.split(100)]
        rows.append(torch.cat(parts))
    return torch.stack(rows)
