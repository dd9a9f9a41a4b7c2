"""The segmentation example runs, draws, and its hypergradient is right."""

import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples import segmentation  # noqa: E402


def test_it_trains_scores_and_draws(tmp_path, capsys):
    picture = tmp_path / "scenes.png"
    scores = segmentation.main(["--quick", "--picture", str(picture)])
    assert list(scores) == ["plain KD", "fixed weights", "learned weights"]
    for by_class in scores.values():
        assert by_class.shape == (segmentation.CLASSES,)
        assert 0 <= by_class.min() and by_class.max() <= 100
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "learned weights" in capsys.readouterr().out


def test_its_hypergradient_is_right(capsys):
    default = torch.get_default_dtype()
    try:
        segmentation.main(["--check"])
    finally:
        torch.set_default_dtype(default)
    error = float(re.search(r"relative error of (\S+)", capsys.readouterr().out)[1])
    assert error < 1e-7


def test_meta_scenes_have_classes_of_one_size():
    _, meta, _ = segmentation.scenes_of_digits(100)
    labels = meta.labels[meta.labels != segmentation.IGNORED]
    counts = torch.bincount(labels, minlength=segmentation.CLASSES).double()
    assert counts.max() / counts.min() < 4
