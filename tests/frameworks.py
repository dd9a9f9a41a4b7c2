"""Scripts in the words of accelerate, Lightning and the Hugging Face Trainer.

    torchrun --standalone --nproc-per-node 2 -m tests.frameworks FOLDER lightning …

Each leaves its student's and weight net's parameters in FOLDER, as ``<script><rank>``.
"""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

from kd_balance import BilevelOptimizer

EXAMPLES = Path(__file__).parent.parent / "examples"
PROCESSES = 2  # that a script alone has the batches of, one after the other


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accelerate(folder, alone):
    """Its gradient accumulation, clipping and scheduler; batch i is that of rank i modulo 2."""
    import accelerate

    from tests.test_examples_lightning import data, networks

    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2 * (PROCESSES if alone else 1)
    )
    student, teacher, criterion = networks()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    meta = data(10, seed=1, batch_size=5)
    optimizer = BilevelOptimizer(optimizer, student, criterion, meta, unroll=2, every=2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    called, optimizer, loader, scheduler = accelerator.prepare(
        student, optimizer, data(64), scheduler
    )
    for inputs, targets in loader:
        with accelerator.accumulate(called):
            loss = criterion(called(inputs), teacher(inputs).detach(), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(called.parameters(), 0.1)
                scheduler.scheduler.step()  # its own steps as often as there are processes
            optimizer.step()
            optimizer.zero_grad()
    return [*student.parameters(), *criterion.parameters()]


def lightning(folder, alone):
    """Its Trainer's loop, clipping and scheduler; the samples are dealt out in turns."""
    from tests.test_examples_lightning import data, everything, fit, module

    dealt = [range(48)[rank::PROCESSES] for rank in range(PROCESSES)]
    if alone:
        order = [i for at in range(0, 24, 4) for part in dealt for i in part[at : at + 4]]
        settings = {"devices": 1, "accumulate_grad_batches": PROCESSES}
    else:
        order = dealt[int(os.environ["RANK"])]
        settings = {"devices": PROCESSES, "strategy": "ddp_find_unused_parameters_true"}
    dataset = Subset(data(48).dataset, order)
    lit = module(example("lightning_module").Distillation, unroll=2, every=2)
    fit(lit, folder, loader=DataLoader(dataset, batch_size=4), precision="64-true",
        gradient_clip_val=0.1, use_distributed_sampler=False, **settings)
    return everything(lit)


def huggingface(folder, alone):
    """Its AdamW, linear schedule, accumulation and clipping."""
    from tests.test_examples_huggingface import everything, made

    trainer = made(
        example("huggingface_trainer"),
        folder,
        bilevel={"unroll": 2, "every": 2},
        gradient_accumulation_steps=PROCESSES if alone else 1,
        max_grad_norm=0.02,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    return everything(trainer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, *names = sys.argv[1:]
    for name in names:
        found = globals()[name](folder, alone=False)
        torch.save([p.detach() for p in found], f"{folder}/{name}{os.environ['RANK']}")
