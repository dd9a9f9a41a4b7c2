"""accelerate, Lightning and the Trainer in two processes, as torchrun starts them."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tests import frameworks
from tests.students import relative_error

NEEDS = {"accelerate": "accelerate", "lightning": "lightning", "huggingface": "transformers"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What all that are installed train, by the name of the script and the rank."""
    pytest.importorskip("sklearn", reason="the examples' data are scikit-learn's")
    folder = tmp_path_factory.mktemp("frameworks")
    names = [name for name in NEEDS if importlib.util.find_spec(NEEDS[name])]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "-m", "tests.frameworks", folder, *names]
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env={**os.environ, **quiet}, timeout=120, **output)
    assert done.returncode == 0, done.stdout
    return {file.name: torch.load(file) for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("name", NEEDS)
def test_two_processes_train_what_one_trains(name, found, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[name])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    expected = getattr(frameworks, name)(tmp_path, alone=True)
    for rank in range(2):
        assert relative_error(found[f"{name}{rank}"], expected) < 1e-9
