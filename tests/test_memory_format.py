"""Replays in channels_last change no number, and stay away from students that they would break."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.replay import memory_format
from tests.students import CLASSES, EVERY_STEP, relative_error


class Net(nn.Module):
    """Flattens by view, which contiguous activations alone allow, or draws dropout masks."""

    def __init__(self, flatten, dropout):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 36, CLASSES)
        self.flatten, self.dropout = flatten, dropout
        self.formats = []

    def forward(self, inputs):
        hidden = F.dropout(F.relu(self.conv(inputs)), self.dropout, self.training)
        self.formats.append(hidden.is_contiguous())
        return self.fc(self.flatten(hidden))


def flatten_by_view(hidden):
    return hidden.view(len(hidden), -1)


def flatten_by_reshape(hidden):
    return hidden.flatten(1)


def train(flatten, dropout, monkeypatch, convert=True):
    monkeypatch.setattr(memory_format, "_PIXELS", 1 if convert else 10**6)
    torch.manual_seed(0)
    student = Net(flatten, dropout).double()
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)).double())
    meta = [(torch.randn(5, 3, 6, 6).double(), torch.arange(5))]
    optimizer = BilevelOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.1), student, criterion, meta, **EVERY_STEP
    )
    gradients = []
    for _ in range(2):
        inputs, labels = torch.randn(7, 3, 6, 6).double(), torch.randint(CLASSES, (7,))
        optimizer.zero_grad()
        student.formats.clear()
        criterion(student(inputs), torch.randn(7, CLASSES).double(), labels).backward()
        optimizer.step()
        gradients += [p.grad.clone() for p in criterion.weight_net.parameters()]
    monkeypatch.undo()
    return gradients, student.formats


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("flatten", [flatten_by_view, flatten_by_reshape])
def test_the_hypergradient_is_the_same(flatten, dropout, monkeypatch):
    actual, formats = train(flatten, dropout, monkeypatch)
    expected, plain_formats = train(flatten, dropout, monkeypatch, convert=False)
    assert relative_error(actual, expected) < 1e-12
    assert all(plain_formats)
    converted = flatten is flatten_by_reshape and not dropout
    assert formats == [True, *[not converted] * (len(formats) - 1)]
