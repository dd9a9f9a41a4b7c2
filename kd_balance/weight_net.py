"""The weight network and the table of per-sample features it can look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from kd_balance.chunks import by_chunks
from kd_balance.hard_losses import cross_entropy, log_prior
from kd_balance.soft_losses import kl_divergence
from kd_balance.top_k import TopK, dense

Feature = Callable[[Tensor, Any, Tensor], Tensor]
"""(student_logits [N, C], teacher_logits [N, C], targets [N] or [N, C]) -> [N].

With several teachers their logits are a mapping by name.
"""


def _entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(1)).sum(1)


def _kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return kl_divergence(student_logits.log_softmax(1), teacher_logits.log_softmax(1))


def _margin(logits: Tensor, targets: Tensor) -> Tensor:
    label = (targets.argmax(1) if targets.dim() == 2 else targets).unsqueeze(1)
    others = logits.scatter(1, label, float("-inf")).amax(1)
    return logits.gather(1, label).squeeze(1) - others


FEATURES: dict[str, Feature] = {
    "student_ce": lambda s, t, y: cross_entropy(s, y),
    "teacher_ce": lambda s, t, y: cross_entropy(t, y).clamp(max=100.0),
    "teacher_probability": lambda s, t, y: cross_entropy(t, y).neg().exp(),
    "kl": lambda s, t, y: _kl(s, t),
    "student_entropy": lambda s, t, y: _entropy(s),
    "teacher_entropy": lambda s, t, y: _entropy(t),
    "student_margin": lambda s, t, y: _margin(s, y),
    "teacher_margin": lambda s, t, y: _margin(t, y).clamp(min=-100.0),
}
"""Per-sample features by name, all at temperature 1 and in nats.

- ``student_ce``, ``teacher_ce``: cross entropy with the label
- ``teacher_probability``: what the teacher gives the label, from 0 to 1
- ``kl``: KL(teacher ‖ student)
- ``student_entropy``, ``teacher_entropy``: entropy of the prediction
- ``student_margin``, ``teacher_margin``: logit of the label minus the largest other logit

A teacher whose probability of the label is 0 counts as 100 nats away from it.

The criterion knows more: ``position``, the logarithm of 1 + the number of positions before this one
in its sequence; ``given.name``, what the loop gives by that name; and the loss of every term.
"""

_GIVEN = "given."
DEFAULT_FEATURES = ("student_ce", "teacher_ce")


class LogFrequency(nn.Module):
    """Feature: the log frequency of the label's class, so that weights may differ by class.

    Args:
        class_counts: training samples of each class [C]; see
            :func:`~kd_balance.hard_losses.log_prior` for a class without any.

    Calling it with student_logits [N, C], teacher_logits [N, C] and targets (class indices [N] or
    probabilities [N, C]) gives [N], in nats.

    Raises:
        ValueError: no class with samples.

    Example::

        >>> feature = LogFrequency([90, 10])
        >>> feature(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([-0.1054, -2.3026])
        >>> weight_net = MetaWeightNet(features=("student_ce", "teacher_ce", feature))

    Source: not in the paper; see ``benchmarks/results`` for what it gains.
    """

    log_prior: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("log_prior", log_prior(class_counts))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        by_class = self.log_prior.to(student_logits)
        return targets @ by_class if targets.dim() == 2 else by_class[targets]


def compute_features(
    features: Sequence[str | Feature],
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | Mapping[str, Tensor | TopK],
    targets: Tensor,
    known: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """The features of every sample, detached.

    Args:
        features: names in :data:`FEATURES`, or callables of the same signature; with several
            teachers ``large.kl`` is that of the teacher named so. The name of a term is its loss.
        student_logits: [N, C].
        teacher_logits: [N, C], or its largest; or several by name.
        targets: class indices [N] or class probabilities [N, C].
        known: [N] by name, features that are there already.

    Returns:
        [N, len(features)].

    Raises:
        ValueError: a callable returned another shape than [N], or it is not said of which teacher.
    """
    columns, classes = [], student_logits.shape[1]
    several = isinstance(teacher_logits, Mapping)
    with torch.no_grad():
        for feature in features:
            if not isinstance(feature, str):
                column = feature(student_logits, _of_all(teacher_logits, classes), targets)
            elif feature in known:
                column = known[feature]
            else:
                teacher: Any = teacher_logits
                name, _, last = feature.rpartition(".")
                if name or several:
                    teacher = _of_teacher(name, last, teacher, student_logits)
                column = by_chunks(_of_rows(last), student_logits, teacher, targets)
            if column.shape != student_logits.shape[:1]:
                raise ValueError(
                    f"feature {feature!r} returned shape {tuple(column.shape)}, expected "
                    f"({len(student_logits)},): return one number for each sample."
                )
            columns.append(column)
        return torch.stack(columns, dim=1)


def given_columns(
    features: Sequence[str | Feature],
    given: Mapping[str, Tensor],
    positions: torch.Size,
    like: Tensor,
) -> dict[str, Tensor]:
    """The features that the loop gives, [N] by the names that they have in `features`.

    Args:
        features: that the weight net sees.
        given: by name, of the shape of the positions or one for each of the first dimension.
        positions: their shape, of N elements.
        like: of the dtype and the device to be.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    columns = {}
    for feature in features:
        if not isinstance(feature, str) or not feature.startswith(_GIVEN):
            continue
        name = feature.removeprefix(_GIVEN)
        if name not in given:
            raise ValueError(
                f"feature {feature!r} is not among what the call was given, {sorted(given)}, "
                f"expected the loop to give it: criterion(…, given={{{name!r}: …}})."
            )
        value = given[name]
        if value.shape not in (positions, positions[:1]):
            raise ValueError(
                f"given[{name!r}] has shape {tuple(value.shape)}, expected {tuple(positions)} or "
                f"{tuple(positions[:1])}: one number for each position, or for each of the batch."
            )
        value = value.detach().to(like.device, like.dtype)
        missing = len(positions) - value.dim()
        columns[feature] = value[(..., *[None] * missing)].expand(positions).reshape(-1)
    return columns


def _of_rows(feature: str) -> Callable[..., Tensor]:
    function = FEATURES[feature]
    return lambda s, t, y: function(s, dense(t, s.shape[1]), y)


def _of_all(teacher: Any, classes: int) -> Any:
    """What a callable is given: the logits of all classes, of one teacher or of several."""
    if isinstance(teacher, Mapping):
        return {name: dense(logits, classes) for name, logits in teacher.items()}
    return dense(teacher, classes)


def _of_teacher(name: str, feature: str, teachers: Any, student: Tensor) -> Tensor | TopK:
    if isinstance(teachers, Mapping) and name in teachers:
        return teachers[name]
    if not name and feature.startswith("student"):
        return student  # which has no part in it
    names = ", ".join(teachers) if isinstance(teachers, Mapping) else "one without a name"
    raise ValueError(
        f"feature {f'{name}.{feature}'.lstrip('.')!r} is of a teacher and there are: {names}; "
        "expected to know of which, as 'large.kl' is the kl of the one named large."
    )


def _is_known(feature: str, teachers: Sequence[str]) -> bool:
    if feature == "position" or feature.startswith(_GIVEN):
        return True
    name, _, feature = feature.rpartition(".")
    return feature in FEATURES and (not name or name in teachers)


class MetaWeightNet(nn.Module):
    """A small network that gives every sample its own weight for each term of the loss.

    Args:
        features: what it sees of a sample: names in :data:`kd_balance.weight_net.FEATURES`, or
            callables ``(student_logits [N, C], teacher_logits [N, C], targets) -> [N]`` such as
            :class:`LogFrequency`. Those that are modules become part of the net. The name of a
            term is its loss; with several teachers ``large.kl`` is the kl of the one named so;
            ``position`` and ``given.name`` are explained there.
        hidden: widths of the hidden layers, tanh between them.
        mean: the weights that all samples begin with, one for each term, or a number for
            all. The average over the samples and the terms stays what it is at the start:
            the net shares out weight between samples and losses, and has no say in the size of
            the loss as a whole, which a hypergradient through few steps would shrink. None leaves
            every weight free, as published; all of them can then fall to nothing.
        ratio: with `mean`, how many times the smallest weight of a loss the largest can be.
        terms: names of the loss's terms, as the criterion has them.

    Calling it maps features [N, F] to weights [N, K], (hard, soft) or those of `terms`, each in
    (0, 1) without `mean`. A second argument, bool [N] or [N, K], names what the average is taken
    over; by default everything.

    Raises:
        ValueError: an unknown feature name, no feature, a width below one, a mean that is negative
            or zero for all terms, or a ratio that is not above one.

    Example::

        weight_net = MetaWeightNet(features=("student_ce", "teacher_ce", "kl"), hidden=(64,))
        weights = weight_net(torch.rand(8, 3))  # [8, 2]

    Source: BiKD (arXiv 2605.17839); the architecture is that of the authors' program, which uses
    hidden layers (64, 64) for 100 classes and (64,) for 10. `mean` and `ratio` are not in the
    paper; see ``benchmarks/results`` for what they gain.
    """

    needs_kept = True

    def __init__(
        self,
        features: Sequence[str | Feature] = DEFAULT_FEATURES,
        hidden: Sequence[int] = (64, 64),
        *,
        mean: float | Sequence[float] | None = None,
        ratio: float = 4.0,
        terms: Sequence[str] = ("hard", "soft"),
    ) -> None:
        super().__init__()
        if isinstance(features, str) or not features:
            raise ValueError(
                f"features is {features!r}, expected a tuple of at least one feature: write "
                "features=('student_ce', 'teacher_ce') for example."
            )
        if isinstance(terms, str):
            raise ValueError(f"terms is {terms!r}, expected names such as ('hard', 'soft', 'map').")
        for feature in features:
            if not (callable(feature) or feature in terms or _is_known(feature, terms)):
                raise ValueError(
                    f"feature {feature!r} is unknown, expected one of {', '.join(FEATURES)}: "
                    "choose among these or give a callable."
                )
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden is {tuple(hidden)}, expected widths of at least 1.")
        count = len(terms)
        each = 1.0 if mean is None else mean
        split = tuple(each) if isinstance(each, Sequence) else (each,) * count
        if len(split) != count or not min(split) >= 0 or not max(split) > 0:
            raise ValueError(
                f"mean is {mean}, expected a positive number or a weight for each of "
                f"({', '.join(terms)}): that of alpha=0.5 is 0.5."
            )
        if not ratio > 1:
            raise ValueError(
                f"ratio is {ratio}, expected more than 1: for weights that are all the same leave "
                "the weight net out of WeightedKDLoss."
            )
        self.mean = mean
        self._split = split
        self.ratio = ratio
        self.features = tuple(features)
        self.terms = tuple(terms)
        self.feature_modules = nn.ModuleList(
            feature for feature in features if isinstance(feature, nn.Module)
        )
        widths = [len(self.features), *hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths, widths[1:]):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        last = nn.Linear(widths[-1], count)
        self.layers = nn.Sequential(*layers, last, nn.Sigmoid())
        if mean is not None:  # all samples alike
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, features: Tensor, kept: Tensor | None = None) -> Tensor:
        weights = self.layers(features)
        if self.mean is None:
            return weights
        weights = weights + 1 / (self.ratio - 1)  # their size is no matter, the ratio is
        split = self._split
        if min(split) != max(split):
            columns = zip(split, weights.unbind(1), strict=True)
            weights = torch.stack([mean * column for mean, column in columns], dim=1)
        if kept is None:
            return weights * (len(weights) * sum(split) / weights.sum())
        # picking by a mask would wait for the device
        if kept.dim() == 1:
            total, due = torch.where(kept, weights.sum(1), 0.0).sum(), kept.sum() * sum(split)
        else:
            total = torch.where(kept, weights, 0.0).sum()
            counts = zip(split, kept.sum(0).unbind(), strict=True)
            due = torch.stack([mean * number for mean, number in counts]).sum()
        return weights * (due / total.clamp(min=1e-30))
