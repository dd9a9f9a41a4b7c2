"""Sentence Transformers: a CrossEncoder that sorts pairs of sentences into classes, distilled.

    pip install 'kd-balance[huggingface]' 'sentence-transformers[train]==6.2.0'
    python examples/codebases/sentence_transformers_cross_encoder.py
    python examples/codebases/sentence_transformers_cross_encoder.py --check    # is it right?

CrossEncoderTrainer runs the loop: AdamW, schedule, clipping, micro-batches, evaluation in between.
The loss is one as its users write them. Tiny BERTs and made-up words stand for the real ones.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from clouds import BALANCED, CLASSES, LONG_TAIL
from kd_balance import WeightedKDLoss, class_counts, meta_loader  # kd-balance
from kd_balance.check import check_hypergradient
from kd_balance.integrations.huggingface import BilevelTrainer  # kd-balance

WORDS = ["[PAD]", "[UNK]"] + [f"w{i}" for i in range(60)]


class BalancedTrainer(BilevelTrainer, CrossEncoderTrainer):  # kd-balance
    pass


class DistillationLoss(nn.Module):
    """The trainer hands it texts, and trains every parameter in it that needs a gradient."""

    def __init__(self, model: CrossEncoder, teacher: CrossEncoder, criterion: Any) -> None:
        super().__init__()
        self.model, self.teacher, self.criterion = model, teacher, criterion

    def forward(self, inputs: list[list[str]], labels: Tensor, **settings: Any) -> Tensor:
        pairs = list(zip(*inputs))
        logits, teacher_logits = scores(self.model, pairs), scores(self.teacher, pairs)
        return self.criterion(logits, teacher_logits, labels)  # kd-balance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if check := parser.parse_args().check:
        torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    train, meta = pairs_of(LONG_TAIL, seed=0), pairs_of(BALANCED, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = CrossEncoderTrainingArguments(
            folder, max_steps=40, per_device_train_batch_size=16, gradient_accumulation_steps=2,
            learning_rate=3e-3, warmup_steps=4, lr_scheduler_type="constant_with_warmup",
            eval_strategy="epoch", save_strategy="no", report_to="none", use_cpu=True,
        )
        teacher, student = (cross_encoder(f"{folder}/{width}", width) for width in (32, 16))
        CrossEncoderTrainer(teacher, arguments, train, meta).train()
        teacher.eval().requires_grad_(False)

        criterion = WeightedKDLoss.long_tailed(class_counts(train))  # kd-balance
        trainer = BalancedTrainer(  # kd-balance
            student, arguments, train, meta,
            loss=DistillationLoss(student, teacher, criterion.__call__),  # kd-balance
            criterion=criterion, meta_loader=meta_loader(meta, collate_fn=list),  # kd-balance
            bilevel={"meta_forward": on_texts, "unroll": 4, "every": 8,  # kd-balance
                     "teacher": lambda batch: on_texts(teacher, batch)[0]},  # kd-balance
        )  # kd-balance
        trainer.train()
        optimizer = trainer.bilevel_optimizer
        if check:
            def step(batch: dict) -> None:
                trainer.training_step(trainer.model_wrapped, batch)
                nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

            batches = trainer.get_train_dataloader()
            print(check_hypergradient(optimizer, step, batches, raise_exception=False))
        print(f"meta updates: {optimizer.metrics['meta_updates']:.0f}")


def on_texts(model: CrossEncoder, batch: list[dict]) -> tuple[Tensor, Tensor]:  # kd-balance
    """Logits and labels of a meta batch, which holds texts."""
    *texts, labels = zip(*(row.values() for row in batch))  # kd-balance
    return scores(model, list(zip(*texts))), torch.tensor(labels)  # kd-balance


def scores(model: CrossEncoder, pairs: list[tuple[str, str]]) -> Tensor:
    return model(model.preprocess(pairs))["scores"]


def cross_encoder(path: str, width: int) -> CrossEncoder:
    """As if it had been downloaded."""
    sizes = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 2 * width}
    config = BertConfig(vocab_size=len(WORDS), **sizes, num_hidden_layers=1, num_labels=CLASSES)
    BertForSequenceClassification(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(path)
    return CrossEncoder(path, device="cpu", local_files_only=True)


def pairs_of(sizes: list[int], seed: int) -> Dataset:
    """So many pairs of each class, which prefers words of its own."""
    rows, generator = [], torch.Generator().manual_seed(seed)
    for label in torch.arange(CLASSES).repeat_interleave(torch.tensor(sizes)).tolist():
        often = 1.0 + 4.0 * (torch.arange(60) // 10 == label)
        words = [f"w{i}" for i in torch.multinomial(often, 14, True, generator=generator)]
        first, second = " ".join(words[:4 + label % 3]), " ".join(words[6:])
        rows.append({"sentence1": first, "sentence2": second, "label": label})
    return Dataset.from_list(rows)


if __name__ == "__main__":
    main()
