import os

import pytest
import torch

# the tensors here are tiny: threads would only wait for one another, in started processes too
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def windows_of_four(monkeypatch):
    """The default `every`, shortened for programs that are run for a few steps."""
    monkeypatch.setattr("kd_balance.bilevel.settings.EVERY", 4)


@pytest.fixture(autouse=True)
def no_gpu_in_sight(request, monkeypatch):
    """Tests that do not ask for a GPU mean the same on a machine with one."""
    if request.node.get_closest_marker("cuda") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
