"""The Lightning example, and the wrapper under Lightning's Trainer against plain loops."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from tests.habits import assert_one_sentence
from tests.students import EVERY_STEP, ConvNet, relative_error

L = pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("sklearn", reason="the example's data are scikit-learn's")

EXAMPLE = Path(__file__).parent.parent / "examples" / "lightning_module.py"
CLASSES = 5


@pytest.fixture(scope="module")
def example():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    spec = importlib.util.spec_from_file_location("lightning_module", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_trains_student_and_weight_net(
    example, windows_of_four, monkeypatch, capsys
):
    made = []

    class Watched(BilevelOptimizer):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.before = [p.detach().clone() for p in self.criterion.parameters()]
            made.append(self)

    monkeypatch.setattr(example, "BilevelOptimizer", Watched)
    distillation = example.main(["--epochs", "2"])
    (optimizer,) = made
    assert optimizer.metrics["meta_updates"] == 4  # 280 images in batches of 32, twice
    assert optimizer.metrics["skipped_updates"] == 0
    assert relative_error(distillation.criterion.parameters(), optimizer.before) > 0
    assert optimizer.optimizer.param_groups[0]["lr"] < 0.01  # the end of the one-cycle schedule
    assert "7-9" in capsys.readouterr().out


def data(count=24, seed=0, batch_size=4):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size)


def module(base, dtype=torch.float64, rate=0.1, scheduled=True, parameters=None, **settings):
    """`base` of the example with a smaller student and another scheduler."""

    class Small(base):
        def configure_optimizers(self):
            trained = parameters(self) if parameters else self.student.parameters()
            optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
            self.wrapper = BilevelOptimizer(
                optimizer,
                self.student,
                self.criterion,
                self.meta,
                meta_optimizer=torch.optim.SGD(self.criterion.parameters(), lr=rate),
                **{**EVERY_STEP, **settings},
            )
            if not scheduled:
                return self.wrapper
            scheduler = torch.optim.lr_scheduler.ExponentialLR(self.wrapper, 0.5)
            return {
                "optimizer": self.wrapper,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
            }

    student, teacher, criterion = networks(dtype)
    made = Small(student, teacher, [1] * CLASSES, data(10, seed=1, batch_size=5))
    made.criterion = criterion
    return made


def networks(dtype=torch.float64):
    torch.manual_seed(0)
    student, teacher = ConvNet().to(dtype), ConvNet().to(dtype).eval()
    return student, teacher, WeightedKDLoss(MetaWeightNet(hidden=(4,)), temperature=2.0).to(dtype)


def fit(lit, folder, *, epochs=1, resume=None, loader=None, **settings):
    settings = {"enable_checkpointing": False, **settings}
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )
    trainer.fit(lit, loader or data(), ckpt_path=resume, weights_only=True if resume else None)
    return lit


def everything(lit):
    return [*lit.student.parameters(), *lit.criterion.parameters()]


@pytest.mark.parametrize("manual, pieces", [(False, 1), (False, 2), (True, 1)])
def test_it_is_the_plain_loop(example, tmp_path, manual, pieces):
    """Its scheduler, clipping and accumulation, against unrolled graphs."""
    base = by_hand(example) if manual else example.Distillation
    settings = {} if manual else {"gradient_clip_val": 0.1, "accumulate_grad_batches": pieces}
    lit = module(base, scheduled=not manual)
    fit(lit, tmp_path, precision="64-true", **settings)

    student, teacher, criterion = networks()
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9),
        student,
        criterion,
        data(10, seed=1, batch_size=5),
        meta_optimizer=torch.optim.SGD(criterion.parameters(), lr=0.1),
        engine="unroll",
        **EVERY_STEP,
    )
    for step, (inputs, targets) in enumerate(data(), 1):
        (criterion(student(inputs), teacher(inputs).detach(), targets) / pieces).backward()
        if step % pieces == 0:
            if not manual:
                assert clip_grad_norm_(student.parameters(), 0.1) > 0.1
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] *= 1 if manual else 0.5
    expected = [*student.parameters(), *criterion.parameters()]
    assert relative_error(everything(lit), expected) < 1e-8
    gradients = [[p.grad for p in c.parameters()] for c in (lit.criterion, criterion)]
    assert relative_error(*gradients) < 1e-6
    metrics = lit.wrapper.metrics
    assert metrics["meta_updates"] == 6 // pieces
    assert lit.wrapper.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def by_hand(example):
    class Manual(example.Distillation):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            assert optimizer.metrics == self.wrapper.metrics

    return Manual


@pytest.mark.parametrize("method", ["online", "lookahead"])
def test_mixed_precision(example, tmp_path, method):
    results = []
    for engine in ("adjoint", "unroll"):
        lit = module(example.Distillation, torch.float32, method=method, engine=engine, rate=0.0)
        inputs, labels = data().dataset.tensors
        loader = DataLoader(TensorDataset(inputs.float(), labels), batch_size=4)
        fit(lit, tmp_path, precision="bf16-mixed", loader=loader)
        results.append([p.grad for p in lit.criterion.parameters()])
    assert relative_error(*results) < 3e-2


def test_resumed_from_a_checkpoint(example, tmp_path):
    """Bit-identical to the uninterrupted run; Lightning's own checkpoints hold the weight net."""
    every_epoch = L.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1
    )
    settings = {"precision": "64-true", "epochs": 3}
    whole = module(example.Distillation)
    fit(whole, tmp_path, enable_checkpointing=True, callbacks=[every_epoch], **settings)
    resumed = module(example.Distillation)
    fit(resumed, tmp_path, resume=tmp_path / "epoch=0.ckpt", **settings)
    assert relative_error(everything(resumed), everything(whole)) == 0
    assert resumed.wrapper.metrics == whole.wrapper.metrics


def test_fitted_twice(example, tmp_path):
    """Lightning asks for optimizers at every fit; the new wrapper ends the old one."""
    lit = fit(module(example.Distillation), tmp_path, precision="64-true")
    first = lit.wrapper
    fit(lit, tmp_path, precision="64-true")
    assert lit.wrapper is not first
    assert [w.metrics["meta_updates"] for w in (first, lit.wrapper)] == [6, 6]
    assert len(lit.student._forward_hooks) == 1


def test_batches_given_up(example, tmp_path):
    """A training_step that returns None moves nothing."""

    class Choosy(example.Distillation):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    lit = fit(module(Choosy, scheduled=False), tmp_path, precision="64-true")
    assert lit.wrapper.metrics["meta_updates"] == 3


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_averages_of_the_weights(example, tmp_path, name):
    callback = getattr(L.pytorch.callbacks, name)
    callback = callback(swa_lrs=0.01) if name.startswith("Stoch") else callback()
    lit = module(example.Distillation)
    fit(lit, tmp_path, epochs=4, precision="64-true", callbacks=[callback])
    assert lit.wrapper.metrics["meta_updates"] >= 23


def test_the_parameters_of_the_whole_module_are_refused(example, tmp_path):
    lit = module(example.Distillation, parameters=lambda lit: lit.parameters())
    with pytest.raises(ValueError, match="holds parameters of the weight net") as error:
        fit(lit, tmp_path, precision="64-true")
    assert_one_sentence(error)
