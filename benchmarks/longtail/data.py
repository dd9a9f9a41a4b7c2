"""The sets of one setting, as tensors on the device, and augmented views made there in batches."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple, Protocol as Interface

import numpy as np
import torch
from torch import Tensor

from kd_balance.data import class_counts, long_tail_indices, split_balanced
from longtail.digits import coloured, load_digits
from longtail.images import load_images
from longtail.protocol import Protocol
from longtail.snippets import load_snippets


class Raw(NamedTuple):
    """A whole data set on the CPU: samples [N, …] and class indices [N]."""

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


class Split(NamedTuple):
    """One held-out set."""

    inputs: Tensor  # as the network wants them
    targets: Tensor  # [N]


class Views(Interface):
    """Augmented views: view v of sample i is the same whenever it is asked for."""

    def __call__(self, samples: Tensor, view: Tensor) -> Tensor:
        """Inputs [B, …] for sample indices [B] and view numbers [B]."""
        ...


class Task:
    """What every method of a setting shares.

    The pool holds the long-tailed training samples and after them the meta samples; `train` and
    `meta` are indices into it, and `views` makes network inputs of such indices.

    Attributes:
        views: augmented inputs of pool samples.
        targets: class indices of the pool, as labelled.
        train, meta: pool indices.
        counts: training samples of each class, as labelled, the meta set not counted.
        groups: "many", "medium" and "few", each a list of classes: thirds of the classes by their
            true count.
        test, validation: held-out sets; validation may be empty.
        digest: of the pool and the test samples.
    """

    def __init__(self, raw: Raw, protocol: Protocol, device: torch.device) -> None:
        seed = protocol.split_seed
        meta, rest = split_balanced(raw.targets, protocol.meta_per_class, seed)
        validation = rest[:0]
        if protocol.validation_per_class:
            taken, left = split_balanced(raw.targets[rest], protocol.validation_per_class, seed + 1)
            validation, rest = rest[taken], rest[left]
        chosen = long_tail_indices(raw.targets[rest], protocol.imbalance, seed, protocol.head)
        train = rest[chosen]
        test = torch.arange(len(raw.test_targets))
        if protocol.test_per_class is not None:
            test, _ = split_balanced(raw.test_targets, protocol.test_per_class, seed)
        pool = torch.cat((train, meta))

        raw = _with_colours(raw, protocol, train)

        self.device = device
        self.temperature = protocol.temperature
        labels = mislabel(raw.targets[train], protocol.label_noise, seed)
        self.targets = torch.cat((labels, raw.targets[meta])).to(device)
        self.train = torch.arange(len(train), device=device)
        self.meta = torch.arange(len(train), len(pool), device=device)
        self.counts = class_counts(labels)
        self.num_classes = len(self.counts)
        self.groups = frequency_thirds(class_counts(raw.targets[train]))
        kind = CropsAndFlips if raw.inputs.dim() == 4 else FeatureDropout
        self.views: Views = kind(raw.inputs[pool].to(device), protocol.views, seed)
        self.test = Split(plain(raw.test_inputs[test], device), raw.test_targets[test].to(device))
        self.validation = Split(
            plain(raw.inputs[validation], device), raw.targets[validation].to(device)
        )
        self.meta_set = Split(plain(raw.inputs[meta], device), raw.targets[meta].to(device))
        content = hashlib.sha256(raw.inputs[pool].numpy().tobytes())
        content.update(raw.test_inputs[test].numpy().tobytes())
        self.digest = content.hexdigest()[:12]


def load_raw(dataset: str, path: Path | None) -> Raw:
    """A data set by name; images come from `path`."""
    if dataset == "snippets":
        return Raw(*map(torch.from_numpy, load_snippets()))
    if dataset == "digits":
        return Raw(*map(torch.from_numpy, load_digits()))
    if dataset not in ("cifar10", "cifar100"):
        raise ValueError(
            f"dataset {dataset!r} is unknown, expected cifar10, cifar100, snippets or digits."
        )
    if path is None:
        raise ValueError(
            f"{dataset} needs --data, the directory with the CIFAR python folders or an .npz."
        )
    return Raw(*map(torch.from_numpy, load_images(dataset, path)))


def mislabel(targets: Tensor, share: float, seed: int) -> Tensor:
    """The labels [N], a share of them replaced by another class drawn uniformly."""
    if not share:
        return targets
    generator = torch.Generator().manual_seed(seed)
    classes = int(targets.max()) + 1
    wrong = torch.randperm(len(targets), generator=generator)[: round(share * len(targets))]
    labels = targets.clone()
    labels[wrong] += torch.randint(1, classes, (len(wrong),), generator=generator)
    return labels % classes


def _with_colours(raw: Raw, protocol: Protocol, train: Tensor) -> Raw:
    """The features with those of a colour, which goes with the class in the training set alone."""
    if protocol.colour is None:
        return raw
    seed = protocol.split_seed
    inputs = coloured(raw.inputs, raw.targets, 0.0, seed)
    inputs[train] = coloured(raw.inputs[train], raw.targets[train], protocol.colour, seed + 1)
    test_inputs = coloured(raw.test_inputs, raw.test_targets, 0.0, seed + 2)
    return raw._replace(inputs=inputs, test_inputs=test_inputs)


def frequency_thirds(counts: Tensor) -> dict[str, list[int]]:
    """The classes by size: the rounded third that has most samples, that has fewest, the rest."""
    order = counts.argsort(descending=True, stable=True).tolist()
    third = round(len(order) / 3)
    return {"many": order[:third], "medium": order[third:-third], "few": order[-third:]}


_MEAN = np.array([0.4914, 0.4822, 0.4465], dtype=np.float32) * 255
_STD = np.array([0.2470, 0.2435, 0.2616], dtype=np.float32) * 255
_PADDING = 4


def _normalise(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in channels-last memory."""
    mean, std = (torch.from_numpy(values).to(images.device) for values in (_MEAN, _STD))
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


def plain(inputs: Tensor, device: torch.device) -> Tensor:
    """Network inputs without augmentation."""
    inputs = inputs.to(device)
    return _normalise(inputs) if inputs.dim() == 4 else inputs


class CropsAndFlips:
    """Random crops of images padded by four pixels, and horizontal flips.

    Args:
        images: uint8 [N, H, W, 3], on the device that shall make the views.
        views: how many of each image there are.
        seed: decides them.
    """

    def __init__(self, images: Tensor, views: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (views, len(images))
        offsets = torch.randint(2 * _PADDING + 1, (2, *shape), generator=generator)
        self._top, self._left = offsets.to(images.device, torch.int16)
        self._flip = (torch.rand(shape, generator=generator) < 0.5).to(images.device)
        border = (0, 0, _PADDING, _PADDING, _PADDING, _PADDING)
        self._padded = torch.nn.functional.pad(images, border)
        self._line = torch.arange(images.shape[1], device=images.device)

    def __call__(self, samples: Tensor, view: Tensor) -> Tensor:
        rows = self._top[view, samples].long().unsqueeze(1) + self._line
        flip = self._flip[view, samples].unsqueeze(1)
        columns = torch.where(flip, self._line.flip(0), self._line)
        columns = self._left[view, samples].long().unsqueeze(1) + columns
        return _normalise(
            self._padded[samples[:, None, None], rows[:, :, None], columns[:, None, :]]
        )


class FeatureDropout:
    """Each feature is missing with probability 0.3: words are struck out of a text at random.

    Args:
        inputs: float [N, F], on the device that shall make the views.
        views: how many of each sample there are.
        seed: decides them.
    """

    def __init__(self, inputs: Tensor, views: int, seed: int) -> None:
        self._inputs = inputs
        generator = torch.Generator().manual_seed(seed)
        # One byte a feature and view would be large: rows of masks are shared between samples.
        self._masks = (torch.rand(4096, inputs.shape[1], generator=generator) >= 0.3).to(inputs)
        choice = torch.randint(4096, (views, len(inputs)), generator=generator)
        self._choice = choice.to(inputs.device)

    def __call__(self, samples: Tensor, view: Tensor) -> Tensor:
        return self._inputs[samples] * self._masks[self._choice[view, samples]]
