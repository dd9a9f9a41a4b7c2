"""Small students that between them hold what real ones hold, and optimizers for them."""

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 5


EVERY_STEP = {"unroll": 1, "every": 1}  # of a BilevelOptimizer: the finest, for tests of one step


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 12)
        self.fc2 = nn.Linear(12, CLASSES)

    def forward(self, inputs):
        return self.fc2(torch.tanh(self.fc1(inputs)))


class ConvNet(nn.Module):
    """Convolutions with batch norm in training mode."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, inputs):
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        return self.fc(hidden.mean((2, 3)))


class Transformer(nn.Module):
    """Layer norm, dropout, attention; returns a tuple as many students do."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.block = nn.TransformerEncoderLayer(
            16, 2, dim_feedforward=32, dropout=dropout, batch_first=True
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, inputs):
        hidden = self.block(self.embed(inputs))
        return hidden, self.head(hidden.mean(1))


class Tied(nn.Module):
    """One matrix used twice, and two vectors with one gradient, as a tensor and not by value."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.shifts = nn.ParameterList([torch.zeros(8), torch.ones(8)])
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs) + (self.shifts[0] + self.shifts[1]))
        return self.head(torch.tanh(self.second(hidden)))


class Frozen(MLP):
    def __init__(self):
        super().__init__()
        self.fc1.weight.requires_grad_(False)


class Branching(MLP):
    """A layer that some batches pass through, and one that none does."""

    def __init__(self):
        super().__init__()
        self.at_times = nn.Linear(12, CLASSES)
        self.never = nn.Linear(12, CLASSES)

    def forward(self, inputs):
        hidden = torch.tanh(self.fc1(inputs))
        logits = self.fc2(hidden)
        return logits + self.at_times(hidden) if inputs[0, 0] > 0 else logits


STUDENTS = {
    "mlp": (MLP, (8,)),
    "conv": (ConvNet, (2, 6, 6)),
    "transformer": (Transformer, (3, 4)),
    "tied": (Tied, (8,)),
    "frozen": (Frozen, (8,)),
    "branching": (Branching, (8,)),
}

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "sgd-momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "sgd-nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.8, nesterov=True),
    "sgd-dampening": lambda ps: torch.optim.SGD(
        ps, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=1e-2, maximize=True
    ),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=1e-2),
    "adam-amsgrad": lambda ps: torch.optim.Adam(ps, lr=1e-2, amsgrad=True, maximize=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, weight_decay=1e-3),
    "rmsprop-centered": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.5, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2, lr_decay=0.1, weight_decay=1e-3),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1.0, weight_decay=1e-3, maximize=True),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=1e-2, weight_decay=1e-3),
    "nadam": lambda ps: torch.optim.NAdam(
        ps, lr=1e-2, weight_decay=1e-2, decoupled_weight_decay=True
    ),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.05, lambd=0.1, weight_decay=1e-2),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=1e-2, weight_decay=1e-2, maximize=True),
}


def two_groups(student):
    """Biases apart, at another learning rate, as many loops have them."""
    trained = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in trained if not n.endswith("bias")]},
        {"params": [p for n, p in trained if n.endswith("bias")], "lr": 0.02},
    ]


class Run:
    """A student, its teacher's logits and batches to train it on, all drawn from one seed."""

    def __init__(self, name="mlp", dtype=torch.float64, seed=0, batch=9, device="cpu"):
        kind, self.shape = STUDENTS[name]
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.batch, self.device = dtype, batch, device
        torch.manual_seed(seed)
        self.student = kind().to(device, dtype)

    def inputs(self, count=None):
        draw = torch.randn(count or self.batch, *self.shape, generator=self.generator)
        return draw.to(self.device, self.dtype)

    def labels(self, count=None):
        draw = torch.randint(CLASSES, (count or self.batch,), generator=self.generator)
        return draw.to(self.device)

    def teacher_logits(self, count=None):
        draw = 3 * torch.randn(count or self.batch, CLASSES, generator=self.generator)
        return draw.to(self.device, self.dtype)

    def batches(self, count):
        return [(self.inputs(), self.teacher_logits(), self.labels()) for _ in range(count)]

    def meta_batches(self, count, size=7):
        return [(self.inputs(size), self.labels(size)) for _ in range(count)]


def logits_of(output):
    return output[1] if isinstance(output, tuple) else output


def relative_error(actual, expected):
    """‖actual − expected‖ / ‖expected‖ over lists of tensors."""
    actual = torch.cat([a.detach().double().flatten() for a in actual])
    expected = torch.cat([e.detach().double().flatten() for e in expected])
    assert expected.norm() > 0
    return ((actual - expected).norm() / expected.norm()).item()
