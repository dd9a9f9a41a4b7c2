"""The Trainer example, and BilevelTrainer against plain loops."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from tests.students import EVERY_STEP, relative_error

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

EXAMPLE = Path(__file__).parent.parent / "examples" / "huggingface_trainer.py"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """And without the state that accelerators share within a process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("huggingface_trainer", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_trains_student_and_weight_net(example, tmp_path, windows_of_four, capsys):
    trainer = example.main(["--max_steps", "8", "--output_dir", str(tmp_path)])
    optimizer = trainer.bilevel_optimizer
    assert optimizer.metrics["meta_updates"] == 2
    assert optimizer.metrics["skipped_updates"] == 0
    assert all(p.grad.any() for p in trainer.criterion.weight_net.parameters())
    assert optimizer.optimizer.param_groups[0]["lr"] == 0  # the end of the linear schedule
    assert "eval_few" in capsys.readouterr().out


class Rows(torch.utils.data.Dataset):
    """Sequences of token ids, from one seed."""

    def __init__(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, 50, (count, 6), generator=generator)
        self.labels = torch.randint(3, (count,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        mask = torch.ones(6, dtype=torch.long)
        return {"input_ids": self.tokens[i], "attention_mask": mask, "labels": self.labels[i]}


def model(seed, dropout=0.0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config).double()


def made(example, folder, dropout=0.0, bilevel=None, optimizers=(None, None), **arguments):
    student, teacher = model(0, dropout), model(1)
    torch.manual_seed(2)
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)), temperature=2.0).double()
    settings = {
        "max_steps": 4,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        **arguments,
    }
    return example.DistillationTrainer(
        student,
        transformers.TrainingArguments(
            output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, **settings
        ),
        train_dataset=Rows(48),
        eval_dataset=Rows(8),
        teacher_model=teacher,
        optimizers=optimizers,
        criterion=criterion,
        meta_loader=torch.utils.data.DataLoader(Rows(12, seed=1), batch_size=6),
        bilevel={**EVERY_STEP, **(bilevel or {})},
    )


def everything(trainer):
    return [*trainer.model.parameters(), *trainer.criterion.parameters()]


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("method", ["online", "lookahead"])
def test_it_is_the_plain_loop(example, tmp_path, pieces, method):
    """Trainer's AdamW, linear schedule, accumulation and clipping, against unrolled graphs."""
    clip = 0.02 if method == "online" else 0
    trainer = made(
        example,
        tmp_path,
        bilevel={"method": method},
        gradient_accumulation_steps=pieces,
        max_grad_norm=clip,
        train_sampling_strategy="sequential",
    )
    trainer.train()

    student, teacher = model(0), model(1).eval()
    torch.manual_seed(2)
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)), temperature=2.0).double()
    meta_loader = torch.utils.data.DataLoader(Rows(12, seed=1), batch_size=6)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0)
    optimizer = BilevelOptimizer(
        optimizer, student, criterion, meta_loader, method=method, engine="unroll", **EVERY_STEP
    )
    rows = Rows(48)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 * (4 - step) / 4
        optimizer.zero_grad()
        batch = slice(4 * pieces * step, 4 * pieces * (step + 1))
        tokens, labels = rows.tokens[batch], rows.labels[batch]
        teacher_logits = teacher(tokens).logits.detach()
        criterion(student(tokens).logits, teacher_logits, labels).backward()
        if clip:
            assert clip_grad_norm_(student.parameters(), clip) > clip
        optimizer.step()
    expected = [*student.parameters(), *criterion.parameters()]
    assert relative_error(everything(trainer), expected) < 1e-8
    gradients = [[p.grad for p in c.parameters()] for c in (trainer.criterion, criterion)]
    assert relative_error(*gradients) < 1e-6


def test_its_logs_tell_of_the_meta_level(example, tmp_path):
    trainer = made(example, tmp_path, bilevel={"every": 2}, eval_strategy="steps", eval_steps=3)
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert ["meta_loss" in row for row in steps] == [False, True, True, True]
    assert all(0 < row["hard_weight"] < 1 and row["meta_loss"] > 0 for row in steps[1:])
    assert all(row["skipped_updates"] == 0 for row in steps[1:])
    assert steps[1]["soft_weight"] == steps[2]["soft_weight"] != steps[3]["soft_weight"]


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_resumed_from_a_checkpoint(example, tmp_path, settings):
    """Bit-identical to the uninterrupted run, dropout and weight net included."""
    options = dict(dropout=0.1, save_strategy="steps", save_steps=2, **settings)
    whole = made(example, tmp_path, **options)
    whole.train()
    resumed = made(example, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert relative_error(everything(resumed), everything(whole)) == 0
    assert resumed.bilevel_optimizer.metrics == whole.bilevel_optimizer.metrics


def test_trained_twice(example, tmp_path):
    """As Trainer does by itself: the second run goes on with the optimizer of the first."""
    trainer = made(example, tmp_path)
    trainer.train()
    first = trainer.bilevel_optimizer
    trainer.train()
    assert trainer.bilevel_optimizer is first
    assert first.metrics["meta_updates"] == 8


def test_an_optimizer_of_the_user_s_own(example, tmp_path):
    student = model(0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    trainer = made(example, tmp_path, optimizers=(optimizer, None))
    trainer.model = trainer.model_wrapped = student
    trainer.train()
    assert trainer.bilevel_optimizer.optimizer is optimizer
    assert trainer.bilevel_optimizer.metrics["meta_updates"] == 4
