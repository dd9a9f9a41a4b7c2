"""How much of a teacher's logits is the frequency of its training classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kd_balance.hard_losses import log_prior

_LARGEST = 4.0  # of the strength, either way
_HALVINGS = 50
_OTHERS = 0.05  # weight of the loss of the other classes
_FLAT = 1e-12  # a slope that says nothing


def prior_bias(
    teacher_logits: Tensor, targets: Tensor, class_counts: Tensor | Sequence[int]
) -> Tensor:
    """What to subtract from a teacher's logits so that it favours no class for being frequent.

    The bias is τ · log(class frequency), τ being the number for which the shifted teacher's cross
    entropy on a class-balanced set is least: 1 to 2 for a teacher trained with cross entropy, about
    0 for one that is balanced already. So it needs no knowledge of how the teacher was trained.
    Labels that the teacher knows by heart say nothing of its bias. A twentieth of a second loss
    decides there: with each sample's own class left out, the cross entropy with the uniform
    distribution over the others. τ still comes out too small.

    Args:
        teacher_logits: [N, C], the teacher's logits on a class-balanced set, best on one that it
            was not trained on.
        targets: class indices [N].
        class_counts: samples of each class [C] in the teacher's training set; see
            :func:`~kd_balance.hard_losses.log_prior` for a class without any.

    Returns:
        [C], like `teacher_logits`.

    Raises:
        ValueError: shapes that do not belong together, or labels out of range.

    Example::

        bias = prior_bias(teacher(meta_inputs), meta_targets, class_counts(train_targets))
        for inputs, targets in loader:
            loss = criterion(student(inputs), teacher(inputs) - bias, targets)

    Source: the shift is the logit adjustment of Menon et al., "Long-Tail Learning via Logit
    Adjustment", 2021, eq. 9; fitting its strength on the meta set is this package's.
    """
    by_class = log_prior(class_counts).double()
    classes = teacher_logits.shape[-1]
    if teacher_logits.shape != (*targets.shape, classes) or targets.dim() != 1 or not len(targets):
        raise ValueError(
            f"teacher_logits have shape {tuple(teacher_logits.shape)} and targets "
            f"{tuple(targets.shape)}, expected [N, C] and class indices [N]."
        )
    if len(by_class) != classes:
        raise ValueError(
            f"class_counts has {len(by_class)} numbers, expected {classes}: give one for "
            "each class of the teacher."
        )
    if targets.min() < 0 or targets.max() >= classes:
        raise ValueError(
            f"targets hold {targets.min()} to {targets.max()}, expected class indices from 0 to "
            f"{classes - 1}: leave out samples without a label."
        )
    # on the CPU, where reading the slope waits for nothing, and which has float64
    logits, labels = teacher_logits.detach().cpu().double(), targets.cpu().long()
    low, high = -_LARGEST, _LARGEST
    for _ in range(_HALVINGS):  # both losses are convex in τ: look where their slope turns
        middle = (low + high) / 2
        slope = _slope(logits - middle * by_class, labels, by_class)
        if abs(slope) < _FLAT:
            break
        low, high = (middle, high) if slope < 0 else (low, middle)
    return (middle * by_class).to(teacher_logits)


def _slope(logits: Tensor, labels: Tensor, by_class: Tensor) -> float:
    """The derivative of both losses by τ, at logits [N, C] that are shifted already."""
    own = by_class[labels]
    of_labels = own - logits.softmax(1) @ by_class
    others = logits.scatter(1, labels.unsqueeze(1), float("-inf")).softmax(1)
    of_others = (by_class.sum() - own) / max(1, len(by_class) - 1) - others @ by_class
    return (of_labels + _OTHERS * of_others).mean().item()
