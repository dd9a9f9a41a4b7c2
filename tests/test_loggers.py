"""The lines of docs/loggers.md against the real libraries; nothing leaves the machine."""

import csv
import io
import re
import time
from pathlib import Path

import pytest
import torch

from tests.habits import Lab, train

PAGE = (Path(__file__).parent.parent / "docs/loggers.md").read_text(encoding="utf-8")


def line(logger):
    """The first code of a logger's row."""
    (row,) = re.findall(rf"^\| {re.escape(logger)} \| (.*) \|$", PAGE, flags=re.MULTILINE)
    return re.search(r"`([^`]+)`", row)[1]


@pytest.fixture
def optimizer():
    lab = Lab()
    lab.wrap()
    train(lab, lab.batches(2))
    assert lab.optimizer.metrics["meta_updates"] == 2
    return lab.optimizer


def test_csv(optimizer):
    file = io.StringIO()
    make, = re.findall(r"`rows = ([^`]+)`", PAGE)
    rows = eval(make, {"csv": csv, "file": file, "optimizer": optimizer})
    rows.writeheader()
    exec(line("CSV"), {"rows": rows, "step": 7, "optimizer": optimizer})
    (read,) = csv.DictReader(io.StringIO(file.getvalue()))
    assert float(read["meta_loss"]) == optimizer.metrics["meta_loss"] and read["step"] == "7"


def test_tqdm(optimizer):
    tqdm = pytest.importorskip("tqdm")
    with tqdm.tqdm(total=1, file=io.StringIO()) as progress:
        exec(line("tqdm"), {"progress": progress, "optimizer": optimizer})
        assert "meta_loss=" in progress.postfix


def test_tensorboard(optimizer, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        exec(line("TensorBoard"), {"writer": writer, "step": 7, "optimizer": optimizer})
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("kd/meta_loss")
    assert event.step == 7
    assert event.value == pytest.approx(optimizer.metrics["meta_loss"], rel=1e-6)


def test_wandb_offline(optimizer, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=tmp_path, project="test")
    exec(line("Weights & Biases"), {"run": run, "step": 7, "optimizer": optimizer})
    run.finish()
    (kept,) = tmp_path.rglob("*.wandb")
    until = time.monotonic() + 60  # its own process writes the file
    while b"kd/meta_loss" not in kept.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    assert b"kd/meta_loss" in kept.read_bytes()


def test_mlflow(optimizer, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    with mlflow.start_run() as run:
        exec(line("MLflow"), {"mlflow": mlflow, "step": 7, "optimizer": optimizer})
    kept = mlflow.get_run(run.info.run_id).data.metrics
    assert kept["meta_loss"] == optimizer.metrics["meta_loss"]


def test_accelerate(optimizer, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    accelerator = accelerate.Accelerator(
        cpu=True, log_with="tensorboard", project_dir=tmp_path
    )
    accelerator.init_trackers("run")
    names = {"accelerator": accelerator, "step": 7, "optimizer": accelerator.prepare(optimizer)}
    exec(line("accelerate"), names)
    accelerator.end_training()
    assert list(tmp_path.rglob("events*"))


def test_lightning(optimizer):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def optimizers(self):
            return optimizer

        def training_step(self, batch, batch_idx):
            exec(line("Lightning"), {"self": self})
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(2, 1)))
    logged = trainer.logged_metrics["meta_loss"]
    assert logged == pytest.approx(optimizer.metrics["meta_loss"], rel=1e-6)
