"""The devices that tests run on beside the CPU, and the proof that nothing waits for them."""

from contextlib import contextmanager

import pytest
import torch

from tests import standin

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(
            not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none"
        ),
    ],
)
STANDIN = pytest.param(
    standin.DEVICE,
    marks=pytest.mark.skipif(
        not standin.available(), reason="this torch takes no devices written in Python, or has CUDA"
    ),
)


@contextmanager
def never_waits(device):
    """Raises RuntimeError where the host would wait for the device."""
    if device == standin.DEVICE:
        with standin.never_waits():
            yield
        return
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
