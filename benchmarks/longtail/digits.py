"""Handwritten digits with a colour: groups that nobody labelled.

The colour is one of ten. In the training set it goes with the digit more often than not, elsewhere
it says nothing, so the samples whose colour does not fit are a rare group, and no count of the
classes shows it. The images are scikit-learn's, 8×8.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits as _load
from torch import Tensor

CLASSES = 10
TEST_PER_CLASS = 50


def load_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training features and labels, test features and labels.

    Returns:
        float32 [N, 64] in [0, 1] and int64 [N]; twice.
    """
    inputs, labels = _load(return_X_y=True)
    inputs = (inputs / 16).astype(np.float32)
    rank = np.zeros_like(labels)  # of a sample within its class
    for digit in range(CLASSES):
        rank[labels == digit] = np.arange((labels == digit).sum())
    test = rank < TEST_PER_CLASS
    return inputs[~test], labels[~test], inputs[test], labels[test]


def coloured(inputs: Tensor, targets: Tensor, share: float, seed: int) -> Tensor:
    """The features [N, F] with those of a colour appended, [N, F + 10].

    Args:
        inputs: [N, F].
        targets: [N].
        share: of the samples whose colour is their class's; the others' is drawn uniformly.
        seed: decides them.
    """
    generator = torch.Generator().manual_seed(seed)
    fits = torch.rand(len(targets), generator=generator) < share
    drawn = torch.randint(CLASSES, (len(targets),), generator=generator)
    colour = torch.where(fits, targets, drawn)
    return torch.cat((inputs, F.one_hot(colour, CLASSES).to(inputs)), 1)
