"""TextBrewer: a tiny BERT distilled by GeneralDistiller, with learned weights for every text.

    pip install kd-balance transformers tensorboard textbrewer==0.2.1.post1
    python examples/codebases/textbrewer_distiller.py
    python examples/codebases/textbrewer_distiller.py --check    # is the hypergradient right?

TextBrewer runs the loop: micro-batches, clipping, schedule, saved models, and a loss on hidden
layers whose projection it adds to the optimizer. Made-up words stand for texts of rare and frequent
classes.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from typing import Any

import torch
from textbrewer import BasicTrainer, DistillationConfig, GeneralDistiller, TrainingConfig
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    get_linear_schedule_with_warmup as linear_schedule,
)

from clouds import BALANCED, CLASSES, LONG_TAIL
from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts, meta_loader  # kd-balance
from kd_balance.check import check_hypergradient

WORDS, LENGTH, EPOCHS, ACCUMULATED = 60, 10, 4, 2
HIDDEN = {"feature": "hidden", "loss": "hidden_mse", "layer_T": 2, "layer_S": 1, "weight": 0.1,
          "proj": ["linear", 16, 32, {"lr": 1e-2}]}


class BalancedDistiller(GeneralDistiller):  # kd-balance
    """TextBrewer's losses, but for the one on logits."""

    criterion: WeightedKDLoss  # kd-balance

    def compute_loss(self, results_S: dict, results_T: dict) -> tuple[Tensor, dict[str, Tensor]]:
        (student,), (teacher,) = results_S.pop("logits"), results_T.pop("logits")  # kd-balance
        others, named = super().compute_loss(results_S, results_T)  # kd-balance
        loss = self.criterion(student, teacher, results_S["labels"][0])  # kd-balance
        return loss + others, {**named, "balanced_kd_loss": loss.detach()}  # kd-balance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    if check:
        torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    train = texts(LONG_TAIL, seed=0)
    loader = DataLoader(train, batch_size=16, shuffle=True, drop_last=True)
    steps = EPOCHS * (len(loader) // ACCUMULATED)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(ACCUMULATED, log_dir=folder, output_dir=folder,
                                device="cpu", ckpt_steps=1000)
        teacher, student = trained_teacher(loader, config), bert(width=16, layers=1)

        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        criterion = WeightedKDLoss.long_tailed(class_counts(train))  # kd-balance
        parts = student, criterion, meta_loader(texts(BALANCED, seed=1))  # kd-balance
        optimizer = BilevelOptimizer(  # kd-balance
            optimizer, *parts, unroll=4, every=8,  # kd-balance
            teacher=lambda **batch: teacher(**batch).logits,  # kd-balance
        )  # kd-balance

        # Through several steps, losses beside the criterion cost the check its exactness.
        matches = None if check else [HIDDEN]
        configs = config, DistillationConfig(intermediate_matches=matches)
        distiller = BalancedDistiller(*configs, teacher, student, adapted, adapted)  # kd-balance
        distiller.criterion = criterion  # kd-balance
        schedule = {"num_warmup_steps": 5, "num_training_steps": steps}
        with distiller:
            distiller.train(
                optimizer, loader, num_epochs=1 if check else EPOCHS, max_grad_norm=1.0,
                scheduler_class=linear_schedule, scheduler_args=schedule, output_hidden_states=True,
            )
            if check:  # TextBrewer's loop for one step of two micro-batches, again and again
                step = partial(distiller.train, optimizer, num_steps=1, max_grad_norm=1.0)
                pairs = zip(loader, loader)
                print(check_hypergradient(optimizer, step, pairs, raise_exception=False))
                return
    print(f"meta updates: {optimizer.metrics['meta_updates']:.0f}")


def adapted(batch: dict[str, Tensor], outputs: Any) -> dict[str, Any]:
    """What TextBrewer is to see of a model's outputs, as its users write it."""
    return {"logits": outputs.logits, "labels": batch["labels"], "losses": outputs.loss,
            "hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}


def trained_teacher(loader: DataLoader, config: TrainingConfig) -> BertForSequenceClassification:
    """A bigger BERT, by TextBrewer's own trainer."""
    teacher = bert(width=32, layers=2)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    trainer = BasicTrainer(config, teacher, adapted)
    with trainer:
        trainer.train(optimizer, loader, num_epochs=3)
    return teacher.eval().requires_grad_(False)


def bert(width: int, layers: int) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=LENGTH, num_labels=CLASSES,
    ))


def texts(sizes: list[int], seed: int) -> list[dict[str, Tensor]]:
    """So many texts of each class, which prefers words of its own."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for label, size in enumerate(sizes):
        how_often = torch.ones(WORDS)
        how_often[8 * label:8 * label + 12] += 4
        rows = torch.multinomial(how_often.expand(size, -1), LENGTH, True, generator=generator)
        for words in rows:
            length = torch.randint(5, LENGTH + 1, (), generator=generator)
            mask = (torch.arange(LENGTH) < length).long()
            inputs = {"input_ids": words * mask, "attention_mask": mask}
            found.append({**inputs, "labels": torch.tensor(label)})
    return found


if __name__ == "__main__":
    main()
