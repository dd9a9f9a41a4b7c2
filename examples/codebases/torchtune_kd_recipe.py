"""torchtune's KD recipe for one device, a LoRA student, with learned weights for every token.

    pip install kd-balance torchtune==0.6.1 torchao==0.13.0
    python examples/codebases/torchtune_kd_recipe.py
    python examples/codebases/torchtune_kd_recipe.py --check    # is the hypergradient right?

Setup, loop, accumulation, scaling, clipping, schedule and checkpoints are the recipe's; tiny Llamas
and made-up sentences, in which some words are rare, stand for the real ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchtune
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import Dataset
from torchtune.models.llama3 import llama3

from kd_balance import BilevelOptimizer, WeightedKDLoss, class_counts  # kd-balance
from kd_balance.check import Report, check_hypergradient

WORDS, LENGTH, PAD = 40, 12, 0
SIZE = dict(vocab_size=WORDS, num_layers=1, num_heads=2, num_kv_heads=1, max_seq_len=LENGTH)


def recipe_module() -> Any:
    """Recipes are scripts beside the package, which cannot be imported by name."""
    folder = Path(torchtune.__file__).parent.parent / "recipes"
    file = folder / "knowledge_distillation_single_device.py"
    spec = importlib.util.spec_from_file_location("kd_recipe", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = recipe_module()


class Sentences(Dataset):
    """In the place of a tokenized data set."""

    def __init__(self, tokenizer: Any, count: int = 96, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        how_often = 0.9 ** torch.arange(WORDS)
        how_often[PAD] = 0
        words = torch.multinomial(how_often.expand(count, -1), LENGTH, True, generator=generator)
        self.words = words.tolist()

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {"tokens": self.words[i], "labels": self.words[i]}


class Tokenizer:
    pad_id = PAD


class BalancedRecipe(recipe.KDRecipeSingleDevice):
    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        counts = class_counts(torch.tensor(Sentences(None).words).flatten(), WORDS)  # kd-balance
        self._kd_loss_fn = WeightedKDLoss.long_tailed(  # kd-balance
            counts, temperature=2.0, class_dim=-1  # kd-balance
        )  # kd-balance
        meta = torch.tensor(Sentences(None, 32, seed=1).words)  # kd-balance
        labels = meta.roll(-1, 1)  # as the recipe shifts them  # kd-balance
        labels[:, -1] = -100  # kd-balance
        batches = [  # kd-balance
            {"tokens": t, "labels": x} for t, x in zip(meta.split(8), labels.split(8))  # kd-balance
        ]  # kd-balance
        self._optimizer = BilevelOptimizer(  # kd-balance
            self._optimizer, self._model, self._kd_loss_fn, batches,  # kd-balance
            teacher=self._teacher_model, unroll=2, every=4,  # kd-balance
        )  # kd-balance
        recipe.training.scale_grads = self.scale_grads  # kd-balance

    def scale_grads(self, model: torch.nn.Module, factor: Tensor) -> None:  # kd-balance
        self._optimizer.transform_gradients(lambda gs: [g * factor for g in gs])  # kd-balance


def settings(folder: str, check: bool) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64 if check else torch.float32)
    os.mkdir(f"{folder}/in")
    for name, width in (("teacher", 32), ("student", 16)):
        torch.save(llama3(embed_dim=width, **SIZE).state_dict(), f"{folder}/in/{name}.pt")

    def checkpointer(name: str) -> dict[str, Any]:
        return {
            "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
            "checkpoint_dir": f"{folder}/in", "checkpoint_files": [f"{name}.pt"],
            "model_type": "LLAMA3", "output_dir": f"{folder}/out",
        }

    return OmegaConf.create({
        "model": {
            "_component_": "torchtune.models.llama3.lora_llama3",
            "lora_attn_modules": ["q_proj", "v_proj"],
            "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8, "embed_dim": 16, **SIZE,
        },
        "teacher_model": {"_component_": "torchtune.models.llama3.llama3", "embed_dim": 32, **SIZE},
        "tokenizer": {"_component_": f"{__name__}.Tokenizer"},
        "checkpointer": checkpointer("student"), "teacher_checkpointer": checkpointer("teacher"),
        "dataset": {"_component_": f"{__name__}.Sentences"}, "batch_size": 4, "shuffle": True,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2, "weight_decay": 0.01},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 4,
        },
        "loss": {"_component_": "torch.nn.CrossEntropyLoss"},
        "kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLLoss"},
        "kd_ratio": 1.0,  # kd-balance
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": folder,
        },
        "epochs": 2, "max_steps_per_epoch": None, "gradient_accumulation_steps": 2,
        "clip_grad_norm": 0.01, "compile": False, "device": "cpu", "seed": 0,
        "dtype": "fp64" if check else "fp32", "output_dir": folder,
        "resume_from_checkpoint": False, "enable_activation_checkpointing": False,
    })


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        cfg = settings(folder, check)
        run = BalancedRecipe(cfg)
        run.setup(cfg)
        run.train()
        if check:
            print(checked(run))
        else:
            print(f"meta updates: {run._optimizer.metrics['meta_updates']:.0f}")
            print("saved:", ", ".join(sorted(os.listdir(f"{folder}/out/epoch_0"))))
        run.cleanup()


def checked(run: BalancedRecipe) -> Report:
    """The check of the recipe's own loop, given the batches of one step at a time."""
    batches, sampler = list(run._dataloader), run._dataloader.sampler
    run.save_checkpoint = lambda epoch: None

    def step(pair: tuple[Any, Any]) -> None:
        run._dataloader = Batches(pair)
        run._dataloader.sampler = sampler
        run.epochs_run, run.total_epochs = 0, 1
        run.train()

    pairs = list(zip(batches[::2], batches[1::2]))
    return check_hypergradient(run._optimizer, step, pairs, raise_exception=False)


class Batches(list):
    """In the place of a DataLoader, which has a sampler."""

    sampler: Any


if __name__ == "__main__":
    main()
