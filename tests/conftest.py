import pytest
import torch

# the tensors here are tiny: threads would only wait for one another
torch.set_num_threads(1)


@pytest.fixture
def windows_of_four(monkeypatch):
    """The default `every`, shortened for programs that are run for a few steps."""
    monkeypatch.setattr("kd_balance.optimizer.EVERY", 4)
