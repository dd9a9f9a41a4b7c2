"""Hugging Face's Trainer with a compute_loss of its own, on long-tailed pieces of source code.

A small BERT, made here and not downloaded, tells which package of Python's standard library a
piece of code comes from. Where kd-balance changed the plain program, the line ends with its name
in a comment; docs/drop_in.md shows the lines against those they replace.

    pip install 'kd-balance[huggingface]'
    python examples/huggingface_trainer.py            # about half a minute
    python examples/huggingface_trainer.py --check    # is the hypergradient right in this loop?
"""

from __future__ import annotations

import argparse
import re
import sysconfig
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from kd_balance import WeightedKDLoss, class_counts, meta_loader  # kd-balance
from kd_balance.check import check_hypergradient
from kd_balance.data import long_tail_indices, split_balanced
from kd_balance.integrations.huggingface import BilevelTrainer  # kd-balance

PACKAGES = (  # the most frequent one first
    "unittest", "asyncio", "email", "xml", "multiprocessing", "importlib", "http", "logging"
)  # fmt: skip
VOCABULARY, LENGTH = 1000, 40


class DistillationTrainer(BilevelTrainer):  # kd-balance
    def __init__(self, *args, teacher_model: PreTrainedModel, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher_model.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        loss = self.criterion(outputs.logits, teacher_logits, inputs["labels"])  # kd-balance
        return (loss, outputs) if return_outputs else loss


def main(argv: Sequence[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--output_dir", default=None)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.check:
        torch.set_default_dtype(torch.float64)

    with tempfile.TemporaryDirectory() as temporary:
        arguments = TrainingArguments(
            output_dir=options.output_dir or temporary,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=200,
            learning_rate=3e-3,
            num_train_epochs=options.epochs,
            max_steps=options.max_steps,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
        )
        train, meta, test = snippets()
        set_seed(0)
        teacher = Trainer(bert(64, 2), arguments, train_dataset=train, compute_metrics=accuracy)
        teacher.train()
        print("teacher:", teacher.evaluate(test))

        set_seed(1)
        counts = class_counts(train)  # kd-balance
        trainer = DistillationTrainer(
            bert(32, 1),
            arguments,
            train_dataset=train,
            compute_metrics=accuracy,
            teacher_model=teacher.model,
            criterion=WeightedKDLoss.long_tailed(counts, temperature=2.0),  # kd-balance
            meta_loader=meta_loader(meta, per_class=10, batch_size=40),  # kd-balance
            bilevel={"teacher": teacher.model},  # kd-balance
        )
        if options.check:
            check(trainer)
            return trainer
        trainer.train()
        print("student:", trainer.evaluate(test))
    return trainer


def check(trainer: DistillationTrainer) -> None:
    """After one step, which sets all up."""
    trainer.args.max_steps, trainer.args.lr_scheduler_type = 1, "constant"
    trainer.train()
    optimizer, model = trainer.optimizer.optimizer, trainer.model_wrapped

    def step(batch: dict[str, torch.Tensor]) -> None:
        trainer.training_step(model, batch)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        model.zero_grad()

    print(check_hypergradient(optimizer, step, trainer.get_train_dataloader()))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Over all classes, and over frequent, middle and rare ones."""
    correct = prediction.predictions.argmax(1) == prediction.label_ids
    parts = {"all": (0, 8), "many": (0, 3), "medium": (3, 5), "few": (5, 8)}
    labels = prediction.label_ids
    return {
        name: float(correct[(labels >= low) & (labels < high)].mean())
        for name, (low, high) in parts.items()
    }


def bert(hidden_size: int, layers: int) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
        num_labels=len(PACKAGES),
    )
    return BertForSequenceClassification(config)


class Snippets(Dataset):
    """Pieces of source code as token ids, padded to one length."""

    def __init__(self, tokens: list[list[int]], labels: list[int]) -> None:
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[index][:LENGTH]
        padding = LENGTH - len(tokens)
        return {
            "input_ids": torch.tensor(tokens + [0] * padding),
            "attention_mask": torch.tensor([1] * len(tokens) + [0] * padding),
            "labels": torch.tensor(self.labels[index]),
        }


def snippets(per_class: int = 350) -> list[Snippets]:
    """A long-tailed training set; balanced meta and test sets."""
    tokens, labels = [], []
    root = Path(sysconfig.get_path("stdlib"))
    for label, package in enumerate(PACKAGES):
        lines = []
        for file in sorted((root / package).rglob("*.py")):
            if not {"test", "tests"} & set(file.relative_to(root).parts):
                code = file.read_text(errors="ignore").splitlines()
                lines += [line for line in code if line.strip() and "import" not in line]
        pieces = ["\n".join(lines[at : at + 5]) for at in range(0, len(lines), 5)]
        for piece in np.random.default_rng(label).permutation(pieces)[:per_class]:
            words = re.findall(r"[A-Za-z]+|[^\sA-Za-z\d]", piece.lower())
            tokens.append([1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words])
            labels.append(label)
    test, rest = split_balanced(labels, per_class=50, seed=0)
    rest_labels = torch.tensor(labels)[rest]
    meta, rest = (rest[i] for i in split_balanced(rest_labels, per_class=10, seed=0))
    rest_labels = torch.tensor(labels)[rest]
    train = rest[long_tail_indices(rest_labels, imbalance_factor=20, seed=0)]
    return [
        Snippets([tokens[i] for i in part], [labels[i] for i in part])
        for part in (train, meta, test)
    ]


if __name__ == "__main__":
    main()
