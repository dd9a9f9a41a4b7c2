"""The training loop: one student, or one teacher, from its first step to its last."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_balance.teacher_bias import prior_bias
from longtail.meta_batches import MetaBatches
from longtail.methods import Method
from longtail.protocol import Protocol


@dataclass(frozen=True)
class Machine:
    """Where and in which precision to compute.

    Attributes:
        device: of all tensors.
        amp: bfloat16 autocast around the students' forward passes.
        compile: torch.compile of the student, where its method has no meta steps to replay.
    """

    device: torch.device
    amp: bool = False
    compile: bool = False


@dataclass
class Progress:
    """What a run has done so far; kept in checkpoints.

    Attributes:
        epoch: epochs done.
        seconds: wall time of the training loop.
        cpu_seconds: processor time of this process in it, which a busy machine does not lengthen.
        weights: after each recorded epoch [epoch, class-by-class means of (hard, soft)].
        metrics: of BilevelOptimizer, at the end.
    """

    epoch: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    weights: list[Any] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def fit(
    model: nn.Module,
    method: Method,
    epochs: int,
    teacher_logits: Tensor | None,
    machine: Machine,
    *,
    checkpoint: Path | None = None,
    advance: Callable[..., None] = lambda share, found=False: None,
) -> Progress:
    """Trains the model in place.

    Args:
        model: on any device; it is moved.
        method: its loss, and its optimizer if it wraps one; task, protocol and seed are its.
        epochs: passes over the training set.
        teacher_logits: [views, pool, C]; None for methods without a teacher.
        machine: where to compute.
        checkpoint: a file that holds the state every minute, to go on from; removed at the end.
        advance: called with each epoch's share of the run, and once with the share that a
            checkpoint had and `found=True`.
    """
    task, protocol, seed = method.task, method.protocol, method.seed
    model.to(machine.device, memory_format=torch.channels_last)
    plain = _optimizer(model, protocol)
    samples = method.samples()
    # The last, smaller batch is left out: all batches alike, and each epoch leaves out others.
    steps = len(samples) // protocol.batch_size
    scheduler = _schedule(plain, protocol, epochs, steps)
    if method.debiases and teacher_logits is not None:
        on_meta = teacher_logits[:, task.meta].flatten(0, 1)
        targets = task.targets[task.meta].repeat(len(teacher_logits))
        teacher_logits = teacher_logits - prior_bias(on_meta, targets, task.counts)
    source = task.train if getattr(method, "meta_source", None) == "resampled" else task.meta
    meta = MetaBatches(
        task, source, teacher_logits, protocol.views, protocol.meta_batch_size, seed
    )
    optimizer = method.wrap(plain, model, meta)
    order_of_views = _permutation(protocol.views, seed, 0)
    every = max(1, epochs // 40)  # epochs between records of the weights

    progress = Progress()
    saved = torch.load(checkpoint, weights_only=False) if checkpoint and checkpoint.exists() else {}
    if saved:
        progress = saved["progress"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        advance(progress.epoch / epochs, found=True)
    has_meta_steps = optimizer is not plain
    student = torch.compile(model) if machine.compile and not has_meta_steps else model

    last_save = time.monotonic()
    for epoch in range(progress.epoch, epochs):
        clock, cpu_clock = time.monotonic(), time.process_time()
        model.train()
        view = order_of_views[epoch % protocol.views].to(machine.device)
        order = samples[_permutation(len(samples), seed, epoch + 1).to(machine.device)]
        by_class = torch.zeros(task.num_classes, 3, device=machine.device)
        for batch in order[: steps * protocol.batch_size].split(protocol.batch_size):
            inputs, targets = task.views(batch, view), task.targets[batch]
            # The teacher's logits of this very view, computed beforehand.
            known = inputs if teacher_logits is None else teacher_logits[view, batch]
            with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.amp):
                logits = student(inputs)
            loss = method.loss(logits, known, targets, (epoch + 1) / epochs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if method.criterion is not None:
                ones = torch.ones_like(targets, dtype=torch.float32).unsqueeze(1)
                by_class.index_add_(0, targets, torch.cat((method.criterion.weights, ones), 1))
        if protocol.schedule == "step" and epoch + 1 in protocol.milestones:
            method.rate_decayed()
        progress.seconds += time.monotonic() - clock
        progress.cpu_seconds += time.process_time() - cpu_clock
        progress.epoch = epoch + 1
        if method.criterion is not None and progress.epoch % every == 0:
            means = (by_class[:, :2] / by_class[:, 2:].clamp(min=1)).tolist()
            progress.weights.append([progress.epoch, [[round(w, 4) for w in c] for c in means]])
        if checkpoint and time.monotonic() - last_save > 60 and progress.epoch < epochs:
            state = {
                "progress": progress,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
            last_save = time.monotonic()
        advance(1 / epochs)
    if hasattr(optimizer, "metrics"):
        progress.metrics = {name: float(value) for name, value in optimizer.metrics.items()}
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return progress


def _permutation(n: int, *seeds: int) -> Tensor:
    """A random order that depends on `seeds` alone, so that a resumed run draws the same."""
    mixed = 0
    for seed in seeds:
        mixed = mixed * 1_000_003 + seed
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))


def _optimizer(model: nn.Module, protocol: Protocol) -> torch.optim.Optimizer:
    lr, decay = protocol.lr, protocol.weight_decay
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr, protocol.momentum, weight_decay=decay)
    if protocol.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=decay)
    raise ValueError(f"optimizer {protocol.optimizer!r} is unknown, expected sgd or adamw.")


def _schedule(
    optimizer: torch.optim.Optimizer, protocol: Protocol, epochs: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if protocol.schedule == "one-cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, protocol.lr, epochs=epochs, steps_per_epoch=steps, cycle_momentum=False
        )
    if protocol.schedule == "step":
        milestones = [epoch * steps for epoch in protocol.milestones]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    raise ValueError(f"schedule {protocol.schedule!r} is unknown, expected one-cycle or step.")
