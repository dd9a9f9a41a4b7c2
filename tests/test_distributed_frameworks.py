"""accelerate, Lightning and the Trainer in two processes, as torchrun starts them."""

import os
import subprocess
import sys

import pytest
import torch

from tests import frameworks
from tests.students import relative_error

NEEDS = {"accelerate": "accelerate", "lightning": "lightning", "huggingface": "transformers"}


@pytest.mark.parametrize("name", NEEDS)
def test_two_processes_train_what_one_trains(name, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[name])
    pytest.importorskip("sklearn", reason="the examples' data are scikit-learn's")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "-m", "tests.frameworks", name, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    expected = getattr(frameworks, name)(tmp_path, alone=True)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 0, output
    for rank in range(2):
        assert relative_error(torch.load(tmp_path / f"{name}{rank}"), expected) < 1e-9
