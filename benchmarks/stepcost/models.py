"""The students whose steps are timed, each with its inputs and the optimizer it is trained by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from longtail.models import MLP, MODELS as CIFAR_MODELS

VOCABULARY = 30_522
LENGTH = 64


class Attention(nn.Module):
    """Multi-head self-attention through torch's scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A pre-norm transformer block without dropout, so that every row sees the same function."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer for 32×32 images, mean-pooled (Dosovitskiy et al. 2021)."""

    def __init__(self, classes: int, width: int, depth: int, heads: int, patch: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((32 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.fc(self.norm(self.blocks(x)).mean(1))


class Encoder(nn.Module):
    """A BERT-like text classifier: token and position embeddings, transformer blocks."""

    def __init__(
        self,
        classes: int,
        width: int,
        depth: int,
        heads: int,
        vocabulary: int = VOCABULARY,
        length: int = LENGTH,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.fc = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.token(ids) + self.position)
        return self.fc(self.blocks(x).mean(1))


class Depthwise(nn.Module):
    """A depthwise-separable network with batch norm (Howard et al. 2017, MobileNet)."""

    def __init__(self, classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_normalised(nn.Conv2d(3, width, 3, padding=1, bias=False)))
        blocks: list[nn.Module] = []
        for _ in range(depth):
            across = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            blocks += [*_normalised(across), *_normalised(nn.Conv2d(width, width, 1, bias=False))]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def _normalised(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32)


def _thumbnails(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8)


def _ids(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count, LENGTH))


def _words(count: int) -> Tensor:
    return torch.randint(100, (count, 8))


def _vectors(count: int) -> Tensor:
    return torch.randn(count, 512)


def _sgd(params: list[Tensor]) -> Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4)


def _adamw(params: list[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05)


class Model(NamedTuple):
    """A student and what it is trained with."""

    build: Callable[[int, int | None], nn.Module]
    """(classes, parameters wanted or None for the usual size) -> student."""
    inputs: Callable[[int], Tensor]
    optimizer: Callable[[list[Tensor]], Optimizer]
    batch: int
    """Default batch size; the meta batch is as large."""
    positions: int = 1
    """Rows of logits for each input: a decoder has one for each token."""


def _cifar(name: str) -> Model:
    return Model(lambda classes, _: CIFAR_MODELS[name](classes), _images, _sgd, 100)


def _mlp(classes: int, parameters: int | None) -> nn.Module:
    width = 512
    if parameters is not None:  # 512 w + w² + w · classes = parameters
        linear = 512 + classes
        width = max(1, round((math.sqrt(linear**2 + 4 * parameters) - linear) / 2))
    return MLP((512, width, width), classes)


MODELS = {
    "resnet8x4": _cifar("resnet8x4"),
    "resnet8": _cifar("resnet8"),
    "wrn_16_2": _cifar("wrn_16_2"),
    "vit_tiny": Model(lambda classes, _: ViT(classes, 192, 12, 3), _images, _adamw, 32),
    "bert_mini": Model(lambda classes, _: Encoder(classes, 256, 4, 4), _ids, _adamw, 32),
    "mlp": Model(_mlp, _vectors, _sgd, 100),
    "tiny_resnet8x4": _cifar("resnet8x4")._replace(inputs=_thumbnails, batch=2),
    "tiny_depthwise": Model(lambda classes, _: Depthwise(classes, 16, 6), _thumbnails, _sgd, 2),
    "tiny_transformer": Model(
        lambda classes, _: Encoder(classes, 32, 4, 4, vocabulary=100, length=8), _words, _adamw, 2
    ),
}
"""By name; only the MLP's size can be chosen. The steps of the tiny ones are all host and no
arithmetic."""
