"""What convolutions gave in the loop's own forward pass is taken over, and only where it fits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from tests.students import CLASSES, relative_error


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, hidden):
        return F.relu(self.bn(self.conv(hidden)))


class Net(nn.Module):
    """Three convolutions whose outputs are of one shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = Block(), Block(), Block()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, inputs):
        return self.fc(self.third(self.second(self.first(inputs))).mean((2, 3)))


class Shared(Net):
    """One block called three times."""

    def __init__(self):
        super().__init__()
        self.second = self.third = self.first


class FrozenBelow(Net):
    """The first tangent appears behind the second convolution."""

    def __init__(self):
        super().__init__()
        self.first.requires_grad_(False)


class Aside(Net):
    """A convolution that the graph does not hold, and one without batch norm, before the others."""

    def __init__(self):
        super().__init__()
        self.aside, self.bare = Block(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, inputs):
        with torch.no_grad():
            scale = 1 + self.aside(inputs)
        return super().forward(self.bare(inputs) * scale)


class Checkpointed(Net):
    """Its saved tensors are packed away."""

    def forward(self, inputs):
        hidden = checkpoint(self.first, inputs, use_reentrant=False)
        return self.fc(self.third(self.second(hidden)).mean((2, 3)))


class WithFeatures(Net):
    """Early features come first."""

    def forward(self, inputs):
        first = self.first(inputs)
        return [first], self.fc(self.third(self.second(first)).mean((2, 3)))


class Convolutions(TorchDispatchMode):
    """Counts those of a whole batch."""

    def __init__(self, batch):
        super().__init__()
        self.batch, self.count = batch, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default and len(args[0]) == self.batch:
            self.count += 1
        return func(*args, **(kwargs or {}))


def train(net, share, monkeypatch, micro_batches=1, **settings):
    """The hypergradients of four steps, and the convolutions of the last one's step()."""
    monkeypatch.setattr("kd_balance.replay.activations._SHARE", share)
    torch.manual_seed(0)
    student = net().double()
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)).double())
    meta = [(torch.randn(5, 4, 6, 6).double(), torch.arange(5))]
    optimizer = torch.optim.SGD(
        [p for p in student.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    optimizer = BilevelOptimizer(optimizer, student, criterion, meta, **settings)
    hypergradients = []
    for step in range(4):
        optimizer.zero_grad()
        for _ in range(micro_batches):
            inputs, labels = torch.randn(7, 4, 6, 6).double(), torch.randint(CLASSES, (7,))
            logits = student(inputs)
            logits = logits[-1] if isinstance(logits, tuple) else logits
            criterion(logits, torch.randn(7, CLASSES).double(), labels).backward()
        with Convolutions(7) as convolutions:
            optimizer.step()
        if (step + 1) % settings.get("every", 1) == 0:
            hypergradients += [p.grad.clone() for p in criterion.weight_net.parameters()]
    return hypergradients, convolutions.count


NETS = {
    # how many convolutions are taken over: not the first, whose input has no tangent
    Net: 2,
    Shared: 2,
    FrozenBelow: 1,
    Aside: 3,
    Checkpointed: 2,
    WithFeatures: 2,
}


@pytest.mark.parametrize("net", NETS)
def test_the_hypergradient_is_the_same_with_fewer_convolutions(net, monkeypatch):
    actual, count = train(net, 1, monkeypatch)
    expected, all_of_them = train(net, 0, monkeypatch)
    assert relative_error(actual, expected) < 1e-12
    assert count == all_of_them - NETS[net]


def test_of_several_calls_the_newest_is_kept(monkeypatch):
    actual, count = train(Net, 1, monkeypatch, micro_batches=3)
    expected, all_of_them = train(Net, 0, monkeypatch, micro_batches=3)
    assert relative_error(actual, expected) < 1e-12
    assert count == all_of_them - 2


def test_the_share_that_is_kept_took_the_most_multiplications(monkeypatch):
    assert train(Net, 0.4, monkeypatch)[1] == train(Net, 0, monkeypatch)[1] - 1


def test_inputs_changed_after_the_forward_pass_are_no_reason_to_take_over(monkeypatch):
    """What was kept must not hide that the replay is another call."""
    monkeypatch.setattr("kd_balance.replay.activations._SHARE", 1)
    torch.manual_seed(0)
    student = Net().double()
    criterion = WeightedKDLoss(MetaWeightNet(hidden=(4,)).double())
    meta = [(torch.randn(5, 4, 6, 6).double(), torch.arange(5))]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    optimizer = BilevelOptimizer(optimizer, student, criterion, meta)
    inputs = torch.randn(7, 4, 6, 6).double()
    criterion(student(inputs), torch.randn(7, CLASSES).double(), torch.arange(7) % 5).backward()
    inputs.copy_(torch.randn(7, 4, 6, 6))
    with pytest.raises(ValueError, match="repeated and gave losses that differ"):
        optimizer.step()


@pytest.mark.parametrize("settings", [{"every": 2, "unroll": 2}, {"engine": "unroll"}])
def test_nothing_is_kept_where_nothing_would_take_it_over(settings, monkeypatch):
    actual, count = train(Net, 1, monkeypatch, **settings)
    expected, all_of_them = train(Net, 0, monkeypatch, **settings)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert count == all_of_them
