"""TRL's GKDTrainer, a causal language model, with learned weights for every token.

    pip install 'kd-balance[huggingface]' trl==1.16.0
    python examples/codebases/trl_gkd.py
    python examples/codebases/trl_gkd.py --check    # is the hypergradient right in this trainer?

Tiny Llamas and made-up tokens stand for the real ones. The trainer's own loss is replaced where it
compares student and teacher; on-policy sampling, data and steps are TRL's.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402

from kd_balance import MetaWeightNet, WeightedKDLoss  # kd-balance  # noqa: E402
from kd_balance.check import check_hypergradient  # noqa: E402
from kd_balance.integrations.huggingface import BilevelTrainer  # kd-balance  # noqa: E402

WORDS, LENGTH, PROMPT = 40, 12, 4


class BalancedGKDTrainer(BilevelTrainer, GKDTrainer):  # kd-balance
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        outputs = model(**given)
        with torch.no_grad():
            teacher_logits = self.teacher_model(**given).logits
        loss = self.criterion(  # kd-balance
            outputs.logits[:, :-1], teacher_logits[:, :-1], inputs["labels"][:, 1:]  # kd-balance
        )  # kd-balance
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    if check:
        torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    texts = [example(i) for i in range(96)]
    criterion = WeightedKDLoss(MetaWeightNet(mean=0.5), class_dim=-1)  # kd-balance
    with tempfile.TemporaryDirectory() as folder:
        trainer = BalancedGKDTrainer(
            model=language_model(16),
            teacher_model=language_model(48),
            args=GKDConfig(
                output_dir=folder, max_steps=24, per_device_train_batch_size=8, lmbda=0.0,
                report_to="none", logging_steps=12, learning_rate=1e-3, use_cpu=True, bf16=False,
                gradient_checkpointing=False, max_grad_norm=1.0, warmup_steps=2, save_strategy="no",
                # the first steps of AdamW are all sign, which float32 norms are too coarse for
                optim="sgd" if check else "adamw_torch",
            ),
            data_collator=collated,
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer(),
            criterion=criterion,  # kd-balance
            meta_loader=[collated(texts[i:i + 16]) for i in (0, 16)],  # kd-balance
            bilevel={"every": 8},  # kd-balance
        )
        if check:
            trainer.create_optimizer()
            optimizer = trainer.bilevel_optimizer

            def step(batch: dict) -> None:
                trainer.compute_loss(trainer.model, batch).backward()
                torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

            batches = [collated(texts[i:i + 4]) for i in range(0, 32, 4)]
            print(check_hypergradient(optimizer, step, batches, raise_exception=False))
            return
        trainer.train()
        print(f"meta updates: {trainer.bilevel_optimizer.metrics['meta_updates']:.0f}")


def example(seed: int) -> dict[str, list[int]]:
    """Tokens of a prompt and of an answer in which some are rare."""
    generator = torch.Generator().manual_seed(seed)
    how_often = 0.9 ** torch.arange(WORDS)
    tokens = torch.multinomial(how_often, LENGTH, replacement=True, generator=generator).tolist()
    return {"input_ids": tokens, "labels": [-100] * PROMPT + tokens[PROMPT:]}


def collated(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    batch = {key: torch.tensor([e[key] for e in examples]) for key in ("input_ids", "labels")}
    prompts = batch["input_ids"][:, :PROMPT]
    mask = torch.ones_like(batch["input_ids"])
    return {**batch, "attention_mask": mask, "prompts": prompts,
            "prompt_attention_mask": torch.ones_like(prompts)}


def language_model(width: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=1,
    ))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({str(i): i for i in range(WORDS)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")


if __name__ == "__main__":
    main()
