"""DistilBERT's own Distiller, a masked language model, with learned weights for every masked token.

    git clone https://github.com/huggingface/transformers-research-projects    # commit fccd0cd
    pip install 'kd-balance[huggingface]' gitpython==3.2.1 tensorboardX==2.6.5
    cd transformers-research-projects
    python …/examples/codebases/distilbert_distiller.py --source .
    python …/examples/codebases/distilbert_distiller.py --source . --check

Loop, step, masking, samplers, schedule and TensorBoard are the Distiller's; a tiny BERT, a tiny
DistilBERT and made-up sentences, in which some words are rare, stand for the real ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts  # kd-balance
from kd_balance.check import Report, check_hypergradient

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--source", required=True, help="a clone of transformers-research-projects")
parser.add_argument("--check", action="store_true")
arguments = parser.parse_args()
sys.path.insert(0, arguments.source + "/distillation")

from distiller import Distiller  # noqa: E402
from lm_seqs_dataset import LmSeqsDataset  # noqa: E402

WORDS, LENGTH, T = 40, 16, 2.0
SPECIAL = {"pad_token": 0, "cls_token": 1, "sep_token": 2, "mask_token": 3, "unk_token": 4}


class BalancedDistiller(Distiller):
    """Weighs both losses in the place of its MLM loss; all else is as it was."""

    def balance(self, words: list[list[int]], meta_words: list[list[int]]) -> None:
        counts = class_counts(torch.tensor(words).flatten(), WORDS)  # kd-balance
        self.criterion = WeightedKDLoss.long_tailed(  # kd-balance
            counts, temperature=T, alpha=(2, 5), class_dim=-1  # kd-balance
        )  # kd-balance
        self.lm_loss_fct = self.weighted  # kd-balance
        meta = [self.meta_batch(part) for part in torch.tensor(meta_words).split(16)]  # kd-balance
        self.optimizer = BilevelOptimizer(  # kd-balance
            self.optimizer, self.student, self.criterion, meta, teacher=self.teacher,  # kd-balance
            unroll=4, every=8,  # kd-balance
        )  # kd-balance
        self.teacher.register_forward_hook(self.keep)  # kd-balance

    def keep(self, teacher: nn.Module, inputs: tuple, outputs: dict) -> None:  # kd-balance
        self.teacher_logits = outputs["logits"]  # kd-balance

    def weighted(self, logits: Tensor, labels: Tensor) -> Tensor:  # kd-balance
        return self.criterion(logits, self.teacher_logits.view_as(logits), labels)  # kd-balance

    def meta_batch(self, words: Tensor) -> dict[str, Tensor]:  # kd-balance
        parts = self.prepare_batch_mlm((words, torch.full((len(words),), LENGTH)))  # kd-balance
        return dict(zip(("input_ids", "attention_mask", "labels"), parts))  # kd-balance


def main() -> None:
    if arguments.check:
        torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    how_often = 0.9 ** torch.arange(WORDS)
    how_often[:len(SPECIAL)] = 0
    train, meta = sentences(320, how_often), sentences(64, how_often.sign())
    with tempfile.TemporaryDirectory() as folder:
        params = argparse.Namespace(
            alpha_ce=0.0, alpha_mlm=1.0, alpha_clm=0.0, alpha_mse=0.0, alpha_cos=0.0,  # kd-balance
            dump_path=folder, n_gpu=0, local_rank=0, is_master=True, multi_gpu=False, fp16=False,
            mlm=True, mlm_mask_prop=0.15, word_mask=0.8, word_keep=0.1, word_rand=0.1,
            temperature=T, restrict_ce_to_mask=True, group_by_size=True, batch_size=8, n_epoch=2,
            gradient_accumulation_steps=2, learning_rate=5e-4, weight_decay=0.01, warmup_prop=0.05,
            adam_epsilon=1e-6, max_grad_norm=5.0, log_interval=20, checkpoint_interval=1000,
            max_model_input_size=LENGTH, special_tok_ids=SPECIAL,
        )
        chances = how_often.clamp(min=0.01) ** -0.7 * (how_often > 0)  # of being masked
        dataset = LmSeqsDataset(params, train)
        distiller = BalancedDistiller(params, dataset, chances, small_student(), small_teacher())
        distiller.balance(train, meta)  # kd-balance
        if arguments.check:
            print(checked(distiller))
        else:
            distiller.train()
            print(f"meta updates: {distiller.optimizer.metrics['meta_updates']:.0f}")


def checked(distiller: BalancedDistiller) -> Report:
    """The check of the Distiller's own step, with accumulation and clipping."""
    distiller.tensorboard = None  # a writer cannot be put back
    batches = [distiller.prepare_batch_mlm(batch) for batch in distiller.dataloader]
    for batch in batches[:8]:  # transformers installs hooks in the first of them
        distiller.step(*batch)

    def step(batch: tuple[Tensor, Tensor, Tensor]) -> None:
        distiller.step(*batch)

    return check_hypergradient(distiller.optimizer, step, batches[8:], raise_exception=False)


def sentences(count: int, how_often: Tensor) -> list[list[int]]:
    words = torch.multinomial(how_often.expand(count, -1), LENGTH, replacement=True)
    words[:, 0], words[:, -1] = SPECIAL["cls_token"], SPECIAL["sep_token"]
    return words.tolist()


def small_student() -> DistilBertForMaskedLM:
    return DistilBertForMaskedLM(DistilBertConfig(
        vocab_size=WORDS, dim=16, hidden_dim=32, n_layers=1, n_heads=2,
        max_position_embeddings=LENGTH, output_hidden_states=True,
    ))


def small_teacher() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH, output_hidden_states=True,
    ))


if __name__ == "__main__":
    main()
