"""Students of a few numbers that hold what real ones hold."""

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, WIDTH, INPUTS = 4, 5, 3


class Student(nn.Module):
    """Two layers with something between, and the habits that live within a forward pass."""

    def __init__(self, program):
        super().__init__()
        kind = program.student
        self.kind = kind
        self.first = nn.Conv1d(1, WIDTH, 2) if kind == "conv" else nn.Linear(INPUTS, WIDTH)
        middle = {
            "norm": nn.BatchNorm1d, "layernorm": nn.LayerNorm, "dropout": lambda _: nn.Dropout(0.3),
        }
        self.middle = middle[kind](WIDTH) if kind in middle else nn.Identity()
        self.last = nn.Linear(WIDTH, CLASSES)
        if kind == "tied":
            self.second = nn.Linear(WIDTH, WIDTH)
            self.third = nn.Linear(WIDTH, WIDTH)
            self.third.weight = self.second.weight
        self.log_scale = nn.Parameter(torch.tensor(0.3))
        self.temperature = 1.0
        self.register_buffer("count", torch.zeros(()))
        self.does = {what for k, what in program.deeds if k == "hooks"}

    def forward(self, inputs):
        hidden = self.first(inputs.unsqueeze(1)).mean(2) if self.kind == "conv" else (
            self.first(inputs))
        hidden = self.middle(hidden).tanh()
        if self.kind == "tied":
            hidden = self.third(self.second(hidden).tanh()).tanh()
        if hidden.requires_grad:
            if "activation" in self.does:
                hidden.register_hook(lambda g: 0.1 * g)
            if "activation clamped" in self.does:
                hidden.register_hook(lambda g: g.clamp(-0.01, 0.01))
            if "observer" in self.does:
                hidden.register_hook(lambda g: None)
        if "no_grad within" in self.does:
            with torch.no_grad():
                gate = self.first(inputs.unsqueeze(1)).mean(2) if self.kind == "conv" else (
                    self.first(inputs))
            hidden = hidden * gate.sigmoid()
        if "detached within" in self.does:
            hidden = hidden * hidden.detach().sigmoid()
        if "forward writes buffer" in self.does:
            self.count += 1
        logits = self.last(hidden) / self.temperature
        return (hidden, logits) if self.kind == "tuple" else logits


def logits_of(output):
    return output[1] if isinstance(output, tuple) else output


def focal(logits, targets):
    if targets.is_floating_point():
        return F.cross_entropy(logits, targets, reduction="none")
    loss = F.cross_entropy(logits, targets, reduction="none")
    return (1 - torch.exp(-loss)) * loss
