"""CIFAR images, from the standard python folders or from an .npz of JPEG files."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Images(NamedTuple):
    """uint8 images [N, height, width, 3] and their class indices [N], for training and test."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


_FILES = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
    "cifar100": ("cifar-100-python", ["train"], "test"),
}


def load_images(dataset: str, path: Path) -> Images:
    """Reads CIFAR-10 or CIFAR-100.

    Args:
        dataset: "cifar10" or "cifar100".
        path: a directory that holds ``cifar-10-batches-py`` or ``cifar-100-python`` as torchvision
            lays them (pickles: open only files you trust), or an .npz with ``train_jpeg``,
            ``train_offsets``, ``train_labels`` and the same for test, image i being the JPEG
            bytes ``offsets[i]:offsets[i + 1]``.

    Raises:
        FileNotFoundError: neither is there.
    """
    if path.suffix == ".npz":
        return _load_jpeg(path)
    folder, train_files, test_file = _FILES[dataset]
    if not (path / folder).is_dir():
        raise FileNotFoundError(
            f"{path} holds no folder {folder}: give the directory in which torchvision put it, or "
            "an .npz of JPEG files, with --data."
        )
    train = [_load_batch(path / folder / name) for name in train_files]
    images, labels = (np.concatenate(parts) for parts in zip(*train))
    return Images(images, labels, *_load_batch(path / folder / test_file))


def _load_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with open(path, "rb") as file:
        batch = pickle.load(file, encoding="bytes")
    labels = batch.get(b"fine_labels", batch.get(b"labels"))
    images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.asarray(labels, dtype=np.int64)


def _load_jpeg(path: Path) -> Images:
    from PIL import Image

    parts = []
    with np.load(path) as archive:
        for split in ("train", "test"):
            stream, offsets = archive[f"{split}_jpeg"], archive[f"{split}_offsets"]
            decoded = [
                np.asarray(Image.open(io.BytesIO(stream[start:end].tobytes())).convert("RGB"))
                for start, end in zip(offsets, offsets[1:])
            ]
            parts += [np.stack(decoded), archive[f"{split}_labels"].astype(np.int64)]
    return Images(*parts)
