"""What WeightHistory records of a criterion's calls, and what it makes of them."""

import io
import sys

import numpy as np
import pytest
import torch
from torch import nn

from kd_balance.history import WeightHistory
from kd_balance.loss import WeightedKDLoss
from tests.devices import CUDA, STANDIN, never_waits


class Scripted(nn.Module):
    """A weight net whose hard and soft weight are the teacher's logits of classes 0 and 1."""

    features = (lambda s, t, y: t[:, 0], lambda s, t, y: t[:, 1])

    def forward(self, features):
        return features


def criterion(**settings):
    return WeightedKDLoss(Scripted(), **settings)


def call(loss, targets, seed=0, classes=3):
    """One training call with random weights; returns them."""
    targets = torch.as_tensor(targets)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(len(targets), classes, generator=generator)
    loss(torch.zeros_like(logits, requires_grad=True), logits, targets)
    return logits[:, :2].numpy()


def test_a_row_holds_the_mean_weights_of_each_class():
    loss = criterion()
    history = WeightHistory(loss)
    weights = call(loss, [0, 2, 2, 0, 2])
    table = history.table()
    assert table["step"].tolist() == [1] and table["count"].tolist() == [[2, 0, 3]]
    for column, name in enumerate(("hard", "soft")):
        mean = weights[[0, 3], column].mean(), weights[[1, 2, 4], column].mean()
        np.testing.assert_allclose(table[name][0, [0, 2]], mean, rtol=1e-6)
        assert np.isnan(table[name][0, 1])


def test_every_gathers_calls_into_one_row():
    loss = criterion()
    history = WeightHistory(loss, every=2)
    weights = np.concatenate([call(loss, [1, 1], seed) for seed in range(5)])
    table = history.table()
    assert table["step"].tolist() == [2, 4]
    assert table["count"].tolist() == [[0, 4, 0]] * 2  # the fifth call waits for a sixth
    np.testing.assert_allclose(table["soft"][1, 1], weights[4:8, 1].mean(), rtol=1e-6)
    call(loss, [0])
    assert history.table()["step"].tolist() == [2, 4, 6]


def test_only_training_calls_are_recorded():
    loss = criterion()
    history = WeightHistory(loss)
    with torch.no_grad():
        call(loss, [0, 1])
    loss.eval()
    call(loss, [0, 1])
    assert history.table()["count"].shape[0] == 0
    loss.train()
    call(loss, [0, 1])
    history.close()
    call(loss, [0, 1])
    assert history.table()["step"].tolist() == [1]


def test_recording_leaves_the_loss_and_its_gradient_alone():
    results = []
    for watch in (False, True):
        loss = criterion()
        if watch:
            WeightHistory(loss)
        logits = torch.linspace(0, 1, 12).view(4, 3).requires_grad_()
        value = loss(logits, torch.linspace(1, 0, 12).view(4, 3), torch.tensor([0, 1, 2, 2]))
        value.backward()
        results.append((value.detach(), logits.grad))
    assert all(map(torch.equal, *results))


def test_arguments_may_be_keywords():
    loss = criterion()
    history = WeightHistory(loss)
    logits = torch.rand(2, 3)
    loss(targets=torch.tensor([2, 0]), teacher_logits=logits, student_logits=logits)
    np.testing.assert_allclose(history.table()["hard"][0, [2, 0]], logits[:, 0], rtol=1e-6)


@pytest.mark.parametrize("class_dim", [1, -1])
def test_every_position_is_a_sample_and_ignored_ones_are_left_out(class_dim):
    loss = criterion(class_dim=class_dim, ignore_index=2)
    history = WeightHistory(loss)
    targets = torch.tensor([[0, 2, 1, 1], [1, 0, 2, 2]])
    logits = torch.rand(2, 4, 3)
    given = logits.movedim(-1, class_dim)
    loss(given, given, targets)
    table = history.table()
    assert table["count"].tolist() == [[2, 3, 0]]
    for c in (0, 1):
        np.testing.assert_allclose(table["hard"][0, c], logits[targets == c][:, 0].mean())


def test_probabilities_count_for_their_largest_class():
    loss = criterion(ignore_index=1)  # which says nothing about probabilities
    history = WeightHistory(loss)
    targets = torch.tensor([[0.1, 0.7, 0.2], [0.0, 0.4, 0.6], [0.2, 0.5, 0.3]])
    logits = torch.rand(3, 3)
    loss(logits, logits, targets)
    assert history.table()["count"].tolist() == [[0, 2, 1]]
    np.testing.assert_allclose(history.table()["soft"][0, 1], logits[[0, 2], 1].mean(), rtol=1e-6)


def test_a_resumed_record_is_that_of_an_uninterrupted_run():
    loss = criterion()
    whole = WeightHistory(loss, every=2)
    for seed in range(3):
        call(loss, [0, 1, 2], seed)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = WeightHistory(loss, every=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(3, 6):
        call(loss, [0, 1, 2], seed)
    assert len(whole.table()["step"]) == 3
    for name, expected in whole.table().items():
        np.testing.assert_array_equal(resumed.table()[name], expected)


def test_a_saved_state_does_not_move_on_with_the_record():
    loss = criterion()
    history = WeightHistory(loss, every=2)
    call(loss, [0])
    state = history.state_dict()
    before = state["open"].clone()
    call(loss, [0])
    assert torch.equal(state["open"], before)
    history.load_state_dict(state)
    call(loss, [0])
    assert torch.equal(state["open"], before)


def test_a_record_saved_before_the_first_call_loads():
    loss = criterion()
    history = WeightHistory(loss, num_classes=5)
    history.load_state_dict(WeightHistory(criterion()).state_dict())
    call(loss, [1])
    assert history.table()["count"].tolist() == [[0, 1, 0, 0, 0]]


def test_save_writes_the_table(tmp_path):
    loss = criterion()
    history = WeightHistory(loss)
    call(loss, [0, 1])
    history.save(tmp_path / "weights.npz")
    with np.load(tmp_path / "weights.npz") as saved:
        assert sorted(saved) == ["count", "hard", "soft", "step"]
        for name, expected in history.table().items():
            np.testing.assert_array_equal(saved[name], expected)


@pytest.mark.parametrize("calls", [1, 120])
def test_plot_draws_the_lines_of_the_classes_that_occurred(calls, tmp_path, monkeypatch):
    figures = []
    figure_module = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda figure, path, **_: figures.append(figure)
    )
    loss = criterion()
    history = WeightHistory(loss)
    weights = np.stack([call(loss, [0, 0, 2], seed) for seed in range(calls)])
    history.plot(tmp_path / "weights.png", class_counts=[10, 30, 20])
    hard, soft, bar = figures[0].axes
    for column, panel in enumerate((hard, soft)):
        # in the order of class_counts: class 1 that never occurred, class 2, class 0
        never, rare, frequent = (line.get_ydata() for line in panel.lines)
        assert len(never) == 0 and len(rare) <= 50
        np.testing.assert_allclose(rare.mean(), weights[:, 2, column].mean(), rtol=0.02)
        np.testing.assert_allclose(frequent.mean(), weights[:, :2, column].mean(), rtol=0.02)
        assert panel.lines[1].get_xdata()[-1] == calls
    labels = [label.get_text() for label in bar.get_yticklabels()]
    assert labels == ["1 (30)", "2 (20)", "0 (10)"]


def test_plot_writes_a_picture_whatever_the_number_of_classes(tmp_path):
    pytest.importorskip("matplotlib")
    loss = criterion()
    history = WeightHistory(loss)
    call(loss, list(range(100)), classes=100)
    history.plot(tmp_path / "weights.png")
    assert (tmp_path / "weights.png").stat().st_size > 10_000


@pytest.mark.parametrize("device", [CUDA, STANDIN])
def test_recording_never_waits_for_the_device(device):
    loss = criterion()
    history = WeightHistory(loss)
    logits = torch.rand(4, 3).to(device).requires_grad_()
    targets = torch.tensor([0, 1, 1, -100]).to(device)
    with never_waits(device):
        loss(logits, logits.detach(), targets)
    assert history.table()["count"].tolist() == [[1, 2, 0]]


def plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    WeightHistory(criterion()).plot("weights.png")


def load_other_classes(monkeypatch):
    first, second = criterion(), criterion()
    saved = WeightHistory(first)
    call(first, [0])
    WeightHistory(second, num_classes=5).load_state_dict(saved.state_dict())


def plot_with_other_counts(monkeypatch):
    loss = criterion()
    history = WeightHistory(loss)
    call(loss, [0])
    history.plot("weights.png", class_counts=[1, 2])


def call_with_more_classes(monkeypatch):
    loss = criterion()
    WeightHistory(loss, num_classes=2)
    call(loss, [0])


@pytest.mark.parametrize(
    "mistake, kind, sentence",
    [
        (lambda _: WeightHistory(criterion(), every=0), ValueError, "every is 0"),
        (lambda _: WeightHistory(criterion()).plot("weights.png"), RuntimeError, "Nothing was"),
        (plot_without_matplotlib, ImportError, "pip install 'kd-balance[plot]'"),
        (plot_with_other_counts, ValueError, "expected (3,)"),
        (load_other_classes, ValueError, "records 3 classes, expected 5"),
        (call_with_more_classes, ValueError, "3 classes, expected 2 at most"),
    ],
)
def test_a_mistake_gets_one_sentence(mistake, kind, sentence, monkeypatch):
    with pytest.raises(kind) as error:
        mistake(monkeypatch)
    message = str(error.value)
    assert sentence in message
    assert message.endswith(".") and ". " not in message
