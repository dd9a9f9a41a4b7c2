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


def on_devices(names, *, cuda, standin, cpu=()):
    """Tries all of `cuda` on a CUDA device; on the stand-in, which computes as the CPU, a few.

    Args:
        names: of the arguments beside ``device``.
        cuda, standin, cpu: tuples of their values.
    """
    return pytest.mark.parametrize(
        f"device, {names}",
        [
            pytest.param(*device.values, *values, marks=device.marks)
            for device, tried in ((pytest.param("cpu"), cpu), (CUDA, cuda), (STANDIN, standin))
            for values in tried
        ],
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
