"""Arcee's DistillKit: its trainer of language models, with learned weights for every token.

    git clone https://github.com/arcee-ai/DistillKit    # commit a61c2e7
    pip install 'kd-balance[huggingface]' trl==0.25.1 datasets==4.4.1
    python examples/codebases/distillkit_trainer.py --source DistillKit
    python examples/codebases/distillkit_trainer.py --source DistillKit --check

Configuration, trainer and teacher signals are DistillKit's; tiny GPT-2s and made-up tokens stand
for the real ones. With --offline the teacher's best logits come, compressed, from the data.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig

from kd_balance import MetaWeightNet, WeightedKDLoss  # kd-balance
from kd_balance.check import Report, check_hypergradient
from kd_balance.integrations.huggingface import BilevelTrainer  # kd-balance

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--source", required=True, help="a clone of DistillKit")
parser.add_argument("--offline", action="store_true", help="no teacher beside the student")
parser.add_argument("--check", action="store_true")
arguments = parser.parse_args()
sys.path.insert(0, arguments.source)

from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor  # noqa: E402
from distillkit.compression.densify import densify  # noqa: E402
from distillkit.configuration import DistillationRunConfig  # noqa: E402
from distillkit.main import collate_packed_batch  # noqa: E402
from distillkit.missing_probability import MissingProbabilityHandling  # noqa: E402
from distillkit.signals import DenseSignal, OfflineSignalSource, OnlineSignalSource  # noqa: E402
from distillkit.trainer import DistillationTrainer  # noqa: E402

WORDS, PADDED, LENGTH, PROMPT, CLIP = 50, 64, 12, 4, 0.5
SPREAD = MissingProbabilityHandling.SYMMETRIC_UNIFORM  # a label of −∞ says nothing  # kd-balance


class BalancedDistillation(BilevelTrainer, DistillationTrainer):  # kd-balance
    def total_distillation_loss(self, student_outputs, inputs, num_items_in_batch=None):
        signal = self.signal_source.get_signal(inputs)
        logits = signal.logits if isinstance(signal, DenseSignal) else densify(  # kd-balance
            signal.sparse_ids, signal.sparse_values, WORDS, SPREAD  # kd-balance
        )  # kd-balance
        return self.criterion(  # kd-balance
            student_outputs.logits[:, :-1], logits[:, :-1], inputs["labels"][:, 1:]  # kd-balance
        )  # kd-balance


def main() -> None:
    if arguments.check:
        torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    texts, teacher = [example(i) for i in range(96)], language_model(48).eval()
    signals = OnlineSignalSource(teacher, vocab_size=WORDS)
    if arguments.offline:
        form = {"d": WORDS, "k": 12, "exact_k": 12, "residual_bins": [], "delta_encoding": False}
        compressor = LogprobCompressor(DistributionQuantizationConfig(**form))
        with torch.no_grad():
            logits = teacher(torch.tensor([text["input_ids"] for text in texts])).logits
        for name, parts in compressor.compress(logits[..., :WORDS].log_softmax(-1)).items():
            texts = [{**text, name: part.tolist()} for text, part in zip(texts, parts)]
        signals = OfflineSignalSource(compressor, vocab_size=WORDS)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(WORDS)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationRunConfig.model_validate({
            "model": "student", "output_path": folder, "sequence_length": LENGTH,
            "dataset": {"train_dataset": {"disk_path": "texts"}, "prepacked": True},
            "teacher": {"kind": "hf", "path": "teacher"},
        })
        training = SFTConfig(
            output_dir=folder, max_steps=24, per_device_train_batch_size=4, use_cpu=True,
            gradient_accumulation_steps=2, learning_rate=1e-3, weight_decay=0.05, bf16=False,
            max_grad_norm=CLIP, lr_scheduler_type="cosine", warmup_steps=2, logging_steps=12,
            report_to="none", save_strategy="no", remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = BalancedDistillation(
            language_model(16), config, signals, WORDS, training, collate_packed_batch,
            train_dataset=Dataset.from_list(texts), processing_class=tokenizer,
            criterion=WeightedKDLoss(MetaWeightNet(mean=0.5), class_dim=-1),  # kd-balance
            meta_loader=[collate_packed_batch(texts[i:i + 16]) for i in (0, 16)],  # kd-balance
            bilevel={"every": 8},  # kd-balance
        )
        if arguments.check:
            print(checked(trainer, texts))
        else:
            trainer.train()
            print(f"meta updates: {trainer.bilevel_optimizer.metrics['meta_updates']:.0f}")


def checked(trainer: BalancedDistillation, texts: list[dict]) -> Report:
    """The check of the trainer's own loss, with its optimizer and clipping."""
    optimizer = trainer.create_optimizer()
    trainer.model.loss_function = lambda *_, **__: None  # of no use, and float32 in any student

    def step(batch: dict) -> None:
        trainer.compute_loss(trainer.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    batches = [collate_packed_batch(texts[i:i + 4]) for i in range(0, 32, 4)]
    return check_hypergradient(optimizer, step, batches, raise_exception=False)


def example(seed: int) -> dict[str, list[int]]:
    """Tokens of a prompt and of an answer in which some are rare."""
    generator, how_often = torch.Generator().manual_seed(seed), 0.9 ** torch.arange(WORDS)
    tokens = torch.multinomial(how_often, LENGTH, True, generator=generator).tolist()
    return {"input_ids": tokens, "labels": [-100] * PROMPT + tokens[PROMPT:]}


def language_model(width: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=PADDED, n_embd=width, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    ))


if __name__ == "__main__":
    main()
