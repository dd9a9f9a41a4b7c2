"""The students of the GPU table, full and tiny, from what the machine has installed."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stepcost.case import Case
from stepcost.models import MODELS, Model, _adamw, _sgd

LAYERS, WIDTH = 2, 16  # of tiny transformers


class Student(NamedTuple):
    """A line of the table: a name in MODELS, the precision and the number of classes."""

    title: str
    dtype: str
    classes: int = 100


STUDENTS = {
    "resnet8x4": Student("resnet8x4, 32×32, float32", "float32"),
    "resnet50": Student("ResNet-50, 224×224, bf16", "bfloat16", 1000),
    "vit_s": Student("ViT-S/16, 224×224, bf16", "bfloat16", 1000),
    "bert": Student("BERT-base with its dropout, 128 tokens, bf16", "bfloat16"),
    "decoder": Student("GPT-2 (124 M) with its dropout, 256 tokens, bf16", "bfloat16", 50_257),
}


def case(name: str, device: str, dry: bool) -> Case:
    """The setting of a student's rows."""
    student = STUDENTS[name]
    model = f"{name}-dry" if dry else name
    batch = MODELS[model].batch
    classes = 10 if dry else student.classes
    return Case(model, batch, batch, classes, device=device, dtype=student.dtype)


class Logits(nn.Module):
    """A Hugging Face model's logits, one row for each sample or token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.train()

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits.flatten(0, -2)


def _resnet50(dry: bool, classes: int, _: int | None) -> nn.Module:
    from torchvision.models import resnet
    from torchvision.models.resnet import Bottleneck

    if dry:
        return resnet.ResNet(Bottleneck, [1, 1, 1, 1], classes, width_per_group=4)
    return resnet.resnet50(num_classes=classes)


def _vit_s(dry: bool, classes: int, _: int | None) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    size = dict(img_size=32, embed_dim=WIDTH, depth=LAYERS, num_heads=2) if dry else dict(
        img_size=224, embed_dim=384, depth=12, num_heads=6
    )
    return VisionTransformer(num_classes=classes, **size)


def _bert(dry: bool, classes: int, _: int | None) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    size = dict(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=WIDTH
    )
    config = BertConfig(num_labels=classes, **(size if dry else {}))
    return Logits(BertForSequenceClassification(config))


def _decoder(dry: bool, classes: int, _: int | None) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = dict(n_embd=WIDTH, n_layer=LAYERS, n_head=2) if dry else {}
    # without a cache, which would be an output of every call
    config = GPT2Config(
        vocab_size=classes, use_cache=False, bos_token_id=0, eos_token_id=0, **size
    )
    return Logits(GPT2LMHeadModel(config))


def _images(size: int, count: int) -> Tensor:
    return torch.randn(count, 3, size, size)


def _ids(length: int, count: int) -> Tensor:
    return torch.randint(10, (count, length))


def _model(dry: bool) -> dict[str, Model]:
    image, batch = (32, 2) if dry else (224, 32)
    words, tokens = (8, 8) if dry else (128, 256)
    return {
        "resnet50": Model(partial(_resnet50, dry), partial(_images, image), _sgd, batch),
        "vit_s": Model(partial(_vit_s, dry), partial(_images, image), _adamw, batch),
        "bert": Model(partial(_bert, dry), partial(_ids, words), _adamw, batch),
        "decoder": Model(
            partial(_decoder, dry), partial(_ids, tokens), _adamw, 2 if dry else 4, tokens
        ),
    }


MODELS.update(_model(dry=False))
MODELS.update({f"{name}-dry": model for name, model in _model(dry=True).items()})
MODELS["resnet8x4-dry"] = MODELS["resnet8x4"]._replace(
    inputs=partial(_images, 8), batch=2
)
