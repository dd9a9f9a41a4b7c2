"""The accelerate example; the wrapper under prepare() is in test_habits_accelerate.py."""

import importlib.util
from pathlib import Path

import pytest

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("sklearn", reason="the example's data are scikit-learn's")

EXAMPLE = Path(__file__).parent.parent / "examples" / "accelerate_loop.py"


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerators share their state within a process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize(
    "arguments, steps",
    [
        ([], 18),  # steps: 280 images in batches of 32, twice
        (["--gradient_accumulation_steps", "3"], 6),
        (["--mixed_precision", "bf16"], 18),
    ],
)
def test_the_example_trains_student_and_weight_net(arguments, steps, windows_of_four, capsys):
    spec = importlib.util.spec_from_file_location("accelerate_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prepared = module.main(["--epochs", "2", *arguments])
    optimizer = prepared.optimizer
    assert optimizer.metrics["meta_updates"] == steps // 4
    assert optimizer.metrics["skipped_updates"] == 0
    assert optimizer.metrics["hypergradient_norm"] > 0
    assert optimizer.optimizer.param_groups[0]["lr"] < 1e-6  # the end of the cosine schedule
    assert "student, test: all" in capsys.readouterr().out
