"""The loss: a hard and a soft term for every sample, and the weights that mix them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_balance.hard_losses import BalancedSoftmax, cross_entropy
from kd_balance.soft_losses import temperature_kl
from kd_balance.teacher_bias import prior_bias
from kd_balance.weight_net import DEFAULT_FEATURES, LogFrequency, MetaWeightNet, compute_features

HardLoss = Callable[[Tensor, Tensor], Tensor]
SoftLoss = Callable[..., Tensor]

RATIO = 10.0  # of long_tailed's weights: more moves them too far where labels are right
_ENOUGH = 512  # samples for the one number that a teacher's bias is made of


class _Flat(NamedTuple):
    """A batch whose every position is a sample, in float32 at least."""

    student: Tensor  # [N, C]
    teacher: Tensor  # [N, C], detached
    targets: Tensor  # [N] class indices, 0 where ignored, or [N, C] probabilities
    kept: Tensor | None  # [N], which positions count; None where all do


class WeightedKDLoss(nn.Module):
    """Knowledge distillation whose hard and soft losses are weighted sample by sample.

    Every sample i has a hard loss h_i (cross entropy with the label) and a soft loss s_i
    (T² · KL(teacher ‖ student) at temperature T). The result is the mean of
    w_i^hard · h_i + w_i^soft · s_i, the weights coming from `weight_net`. They are constants to
    the student's gradient; :class:`~kd_balance.BilevelOptimizer` is what trains them.

    Args:
        weight_net: maps features [N, F] to weights [N, 2]; usually a
            :class:`~kd_balance.MetaWeightNet`. Another module is given the features it names in a
            tuple attribute ``features``, or else ("student_ce", "teacher_ce"), and with a true
            attribute ``needs_kept`` which rows count, bool [N] or None for all. None is ordinary
            distillation with the fixed weights `alpha`.
        temperature: T of the soft loss, above 0.
        alpha: without a weight net, the mixture alpha · hard + (1 − alpha) · soft; or the pair
            (hard weight, soft weight).
        hard_loss: ``(student_logits [N, C], targets) -> [N]`` in place of cross entropy.
        soft_loss: ``(student_logits [N, C], teacher_logits [N, C]) -> [N]`` in place of the
            temperature KL. A loss with a true attribute ``needs_targets`` is given the targets as
            a third argument.
        reduction: "mean" over the samples that are not ignored, "sum", or "none" (one value for
            each position, 0 where ignored).
        class_dim: the dimension of the logits that holds the classes; −1 for the
            [N, length, C] of language models.
        ignore_index: the class index of positions that weigh nothing and are not counted.

    Raises:
        ValueError: an argument out of its range.

    Example::

        criterion = WeightedKDLoss(MetaWeightNet(), temperature=4.0)
        loss = criterion(student(inputs), teacher_logits, targets)
        loss.backward()
        criterion.weights  # [N, 2]

    Source: BiKD (arXiv 2605.17839), the training loss; Hinton et al. 2015 for the soft loss.
    """

    teacher_bias: Tensor | None

    def __init__(
        self,
        weight_net: nn.Module | None = None,
        *,
        temperature: float = 4.0,
        alpha: float | Sequence[float] = 0.5,
        hard_loss: HardLoss | None = None,
        soft_loss: SoftLoss | None = None,
        reduction: str = "mean",
        class_dim: int = 1,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if weight_net is not None and not isinstance(weight_net, nn.Module):
            raise ValueError(
                f"weight_net is {weight_net!r}, expected a module such as MetaWeightNet() or None: "
                "pass settings like temperature by keyword."
            )
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected a number above 0.")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'.")
        self.weight_net = weight_net
        self.temperature = temperature
        self.alpha = alpha
        self.hard_loss = hard_loss
        self.soft_loss = soft_loss
        self.reduction = reduction
        self.class_dim = class_dim
        self.ignore_index = ignore_index
        self.class_counts: Tensor | Sequence[int] | None = None
        self.register_buffer("teacher_bias", None)
        self._fixed_weights = _pair(alpha)
        self._kept: Tensor | None = None
        self._features: Tensor | None = None
        self._last_losses: Tensor | None = None
        self._weights: Tensor | None = None

    @classmethod
    def long_tailed(
        cls,
        class_counts: Tensor | Sequence[int],
        *,
        temperature: float = 4.0,
        alpha: float | Sequence[float] = 0.5,
        **settings: Any,
    ) -> WeightedKDLoss:
        """The loss for training sets whose classes differ in size.

        The hard loss is balanced softmax. A :class:`~kd_balance.MetaWeightNet` that sees the
        frequency of the label begins with the weights of ordinary distillation, and keeps their
        average. From the teacher's logits its own bias towards frequent classes is subtracted
        once it is known: :class:`~kd_balance.BilevelOptimizer` finds it when it is given the
        ``teacher``, and without it the rare classes lose most of what is to be gained.

        Args:
            class_counts: training samples of each class [C], as from
                :func:`kd_balance.data.class_counts`; 0 for classes without any.
            temperature: T of the soft loss, above 0.
            alpha: what the weights begin with, alpha · hard + (1 − alpha) · soft, or the pair
                (hard weight, soft weight). The size of the two together is the data's, as a
                learning rate is: give the one that you would train with.
            **settings: ``soft_loss``, ``reduction``, ``class_dim`` and ``ignore_index``, as for
                the class.

        Returns:
            The criterion, to be called with raw teacher logits.

        Raises:
            ValueError: an argument out of its range.

        Example::

            criterion = WeightedKDLoss.long_tailed(class_counts(train_set), temperature=4.0)
            optimizer = BilevelOptimizer(
                optimizer, student, criterion, meta_loader(train_set), teacher=teacher
            )

        Source: BiKD (arXiv 2605.17839) for learned weights; Ren et al. 2020 for balanced softmax;
        the rest is this package's, see ``docs/long_tail.md``.
        """
        features = (*DEFAULT_FEATURES, LogFrequency(class_counts))
        criterion = cls(
            MetaWeightNet(features, mean=_pair(alpha), ratio=RATIO),
            temperature=temperature,
            alpha=alpha,
            hard_loss=BalancedSoftmax(class_counts),
            **settings,
        )
        criterion.class_counts = class_counts
        criterion.teacher_bias = torch.zeros(len(class_counts))
        return criterion

    def find_teacher_bias(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Finds the teacher's bias towards frequent classes, which is subtracted from then on.

        :class:`~kd_balance.BilevelOptimizer` calls this when it is given the ``teacher``.

        Args:
            batches: (teacher_logits, targets) of class-balanced samples, as for the call; no more
                are taken than give 512 samples.

        Raises:
            ValueError: a criterion that was not made by :meth:`long_tailed`, or no sample.
        """
        if self.class_counts is None or self.teacher_bias is None:
            raise ValueError(
                "the criterion knows no class_counts, expected one made by "
                "WeightedKDLoss.long_tailed(class_counts)."
            )
        self.teacher_bias = torch.zeros_like(self.teacher_bias)
        logits, labels, found = [], [], 0
        for teacher_logits, targets in islice(batches, _ENOUGH):
            flat = self._flatten(teacher_logits, teacher_logits, targets)
            label = flat.targets if flat.kept is not None else flat.targets.argmax(1)
            logits.append(flat.teacher if flat.kept is None else flat.teacher[flat.kept])
            labels.append(label if flat.kept is None else label[flat.kept])
            found += len(labels[-1])
            if found >= _ENOUGH:
                break
        if not found:
            raise ValueError(
                "the meta batches hold no labelled sample to find the teacher's bias on, expected "
                "some: check what meta_loader yields."
            )
        bias = prior_bias(torch.cat(logits), torch.cat(labels), self.class_counts)
        self.teacher_bias = bias.to(self.teacher_bias)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """The weighted loss of a batch.

        Args:
            student_logits: [N, C] or [N, C, d1, …], as for torch.nn.functional.cross_entropy.
            teacher_logits: the same shape; no gradient flows into them.
            targets: class indices, the shape of the logits without the class dimension, or class
                probabilities, the shape of the logits.

        Returns:
            A scalar, or with reduction "none" a value for each position. float32, or float64 for
            float64 logits.

        Raises:
            ValueError: shapes that do not belong together.
        """
        with _without_autocast(student_logits.device):
            flat = self._flatten(student_logits, teacher_logits, targets)
            losses = self._losses(flat)
            self._last_losses = losses.detach()
            if self.weight_net is not None:
                self._features = compute_features(_feature_names(self.weight_net), *flat[:3])
            kept = self._kept = flat.kept
            with torch.no_grad():
                weights = self.weigh(self._features, losses, kept)
                # not a view of parameters
                weights = weights.clone() if kept is None else weights * kept.unsqueeze(1)
            self._weights = weights
            result = self.combine(losses, weights, kept, targets)
            node: Any = result.grad_fn
            if node is not None:
                node.metadata[WeightedKDLoss] = self  # a mark that the loss's graph shows
            return result

    def losses(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """The (hard, soft) losses of every sample before weighting.

        Args:
            student_logits, teacher_logits, targets: as for the call.

        Returns:
            [N, 2], one row for each position.

        Raises:
            ValueError: shapes that do not belong together.
        """
        with _without_autocast(student_logits.device):
            return self._losses(self._flatten(student_logits, teacher_logits, targets))

    @property
    def weights(self) -> Tensor:
        """[N, 2], the (hard, soft) weights of the last call, detached; 0 where ignored."""
        if self._weights is None:
            raise RuntimeError("There are no weights before the first call of the criterion.")
        return self._weights

    @property
    def last_features(self) -> Tensor | None:
        """[N, F], what the weight net saw in the last call; None without one."""
        return self._features

    @property
    def last_losses(self) -> Tensor | None:
        """[N, 2], the (hard, soft) losses of the last call before weighting, detached."""
        return self._last_losses

    @property
    def phi(self) -> list[nn.Parameter]:
        """The weight net's parameters that learn; none without one."""
        own = self.weight_net.parameters() if self.weight_net is not None else ()
        return [param for param in own if param.requires_grad]

    def follow(self, device: torch.device) -> None:
        """Moves to the device that the student turned out to be on, if it is not there."""
        own = next(self.parameters(), None)
        if own is not None and own.device != device:
            self.to(device)

    def reweigh(self) -> None:
        """Computes `weights` of the last call anew, after the weight net has moved."""
        with torch.no_grad():
            weights = self.weigh(self._features, self.weights, self._kept)
        self._weights = weights if self._kept is None else weights * self._kept.unsqueeze(1)

    def weigh(self, features: Tensor | None, like: Tensor, kept: Tensor | None) -> Tensor:
        """The weights [N, 2] for features [N, F], with the weight net's graph.

        Args:
            features: of every sample; None where there is no weight net.
            like: [N, 2], whose dtype and device the weights get.
            kept: [N], which samples count; None where all do.
        """
        if self.weight_net is None or features is None:
            return like.new_tensor(self._fixed_weights).expand_as(like)
        with _without_autocast(features.device):
            own = next(self.weight_net.parameters(), features)
            more = (kept,) if getattr(self.weight_net, "needs_kept", False) else ()
            weights = self.weight_net(features.to(own.dtype), *more)
        if weights.shape != like.shape:
            raise ValueError(
                f"weight_net returned shape {tuple(weights.shape)}, expected {tuple(like.shape)}: "
                "it must map features [N, F] to a hard and a soft weight [N, 2]."
            )
        return weights.to(like.dtype)

    def combine(
        self, losses: Tensor, weights: Tensor, kept: Tensor | None, targets: Tensor
    ) -> Tensor:
        """The reduced loss; bilinear in `losses` and `weights`, both [N, 2].

        Args:
            kept: [N], which samples count; None where all do.
            targets: of the call, for the shape of an unreduced loss.
        """
        total = (losses * weights).sum(1)
        if kept is not None:
            total = torch.where(kept, total, 0.0)
        if self.reduction == "none":
            return total.view(self._positions(targets))
        if self.reduction == "sum":
            return total.sum()
        return total.sum() / _count(total, kept)

    def shares(self, upstream: Tensor, losses: Tensor, kept: Tensor | None) -> Tensor:
        """[N, 1], what a sample's weighted loss contributes to `upstream` times the reduced loss.

        Times `weights` it is the derivative of :meth:`combine` by the losses, and times `losses`
        the one by the weights.

        Args:
            upstream: of the shape of the reduced loss.
            losses: [N, 2].
            kept: [N], which samples count; None where all do.
        """
        share = upstream / _count(losses, kept) if self.reduction == "mean" else upstream
        share = share.reshape(-1, 1).to(losses.dtype)
        if kept is not None:
            return torch.where(kept.unsqueeze(1), share, 0.0)
        return share.expand(len(losses), 1)

    def _flatten(self, student: Tensor, teacher: Tensor, targets: Tensor) -> _Flat:
        if student.dim() < 2:
            raise ValueError(
                f"student_logits have shape {tuple(student.shape)}, expected [N, C] or "
                "[N, C, d1, …]."
            )
        if teacher.shape != student.shape:
            raise ValueError(
                f"teacher_logits have shape {tuple(teacher.shape)}, expected that of "
                f"student_logits, {tuple(student.shape)}: teacher and student need the same "
                "classes and positions."
            )
        by_position = list(student.shape)
        classes = by_position.pop(self.class_dim)
        probabilities = targets.is_floating_point()
        expected = list(student.shape) if probabilities else by_position
        if list(targets.shape) != expected:
            kind = "probabilities" if probabilities else "indices"
            raise ValueError(
                f"targets (class {kind}) have shape {tuple(targets.shape)}, expected "
                f"{tuple(expected)} for logits {tuple(student.shape)} with class_dim="
                f"{self.class_dim}."
            )

        def rows(tensor: Tensor) -> Tensor:
            tensor = tensor.float() if tensor.dtype in (torch.half, torch.bfloat16) else tensor
            if tensor.dim() == 2 and self.class_dim in (1, -1):
                return tensor
            return tensor.movedim(self.class_dim, -1).reshape(-1, classes)

        student_rows = rows(student)
        teacher_rows = rows(teacher.detach()).to(student_rows.dtype)
        if self.teacher_bias is not None:
            if len(self.teacher_bias) != classes:
                raise ValueError(
                    f"class_counts has {len(self.teacher_bias)} numbers and the logits {classes} "
                    "classes, expected as many: give kd_balance.data.class_counts "
                    f"num_classes={classes}."
                )
            teacher_rows = teacher_rows - self.teacher_bias.to(teacher_rows)
        if probabilities:
            return _Flat(student_rows, teacher_rows, rows(targets).to(student_rows.dtype), None)
        labels = _row(targets)
        kept = labels != self.ignore_index
        return _Flat(student_rows, teacher_rows, labels * kept, kept)

    def _losses(self, flat: _Flat) -> Tensor:
        if self.hard_loss is None:
            hard = cross_entropy(flat.student, flat.targets)
        else:
            hard = self.hard_loss(flat.student, flat.targets)
        if self.soft_loss is None:
            soft = temperature_kl(flat.student, flat.teacher, self.temperature)
        else:
            labels = (flat.targets,) if getattr(self.soft_loss, "needs_targets", False) else ()
            soft = self.soft_loss(flat.student, flat.teacher, *labels)
        for name, loss in (("hard_loss", hard), ("soft_loss", soft)):
            if loss.shape != flat.student.shape[:1]:
                raise ValueError(
                    f"{name} returned shape {tuple(loss.shape)}, expected "
                    f"({len(flat.student)},): return one loss for each sample, without reduction."
                )
        return torch.stack((hard, soft), dim=1)

    def kept(self, targets: Tensor) -> Tensor | None:
        """[N], which positions count; None where all do."""
        if targets.is_floating_point():
            return None
        return _row(targets) != self.ignore_index

    def _positions(self, targets: Tensor) -> list[int]:
        shape = list(targets.shape)
        if targets.is_floating_point():
            shape.pop(self.class_dim)
        return shape


def _row(labels: Tensor) -> Tensor:
    labels = labels.long()
    return labels if labels.dim() == 1 else labels.reshape(-1)


def _count(samples: Tensor, kept: Tensor | None) -> Tensor | int:
    return len(samples) if kept is None else kept.sum().clamp(min=1)


def _pair(alpha: float | Sequence[float]) -> tuple[float, float]:
    pair = tuple(alpha) if isinstance(alpha, Sequence) else (alpha, 1 - alpha)
    if len(pair) != 2 or min(pair) < 0:
        raise ValueError(
            f"alpha is {alpha}, expected a number in [0, 1] or a pair (hard weight, soft "
            "weight) of numbers that are not negative."
        )
    return pair[0], pair[1]


def _feature_names(weight_net: nn.Module) -> Sequence:
    features = getattr(weight_net, "features", None)
    return features if isinstance(features, (tuple, list)) else DEFAULT_FEATURES


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
