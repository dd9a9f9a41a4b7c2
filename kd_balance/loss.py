"""The loss: a hard, a soft and other terms of every sample, and the weights that mix them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_balance.chunks import by_chunks, is_large
from kd_balance.hard_losses import BalancedSoftmax, cross_entropy
from kd_balance.sequences import Sequences
from kd_balance.soft_losses import temperature_kl
from kd_balance.teacher_bias import prior_bias
from kd_balance.terms import (
    Term,
    fixed_weights,
    mask,
    of_samples,
    of_terms,
    per_sample,
    term_names,
)
from kd_balance.top_k import TopK, dense
from kd_balance.torch_private import tree_map
from kd_balance.weight_net import (
    DEFAULT_FEATURES,
    LogFrequency,
    MetaWeightNet,
    compute_features,
    given_columns,
)

HardLoss = Callable[[Tensor, Tensor], Tensor]
SoftLoss = Callable[..., Tensor]
Logits = Tensor | TopK
Teacher = Logits | tuple[Logits, Tensor]
"""Logits, or logits and a mask of the samples that it knows."""

RATIO = 10.0  # of long_tailed's weights: more moves them too far where labels are right
_ENOUGH = 512  # samples for the one number that a teacher's bias is made of


class _Flat(NamedTuple):
    """A batch whose every position is a sample, in float32 at least."""

    student: Tensor  # [N, C]
    teachers: dict[str, Logits]  # [N, C] by the name of its term, detached
    targets: Tensor  # [N] class indices, 0 where ignored, or [N, C] probabilities
    kept: Tensor | None  # [N], which positions count; None where all do
    known: dict[str, Tensor]  # [N] by the name of a term, which samples its teacher knows
    positions: torch.Size  # their shape, of N elements


class WeightedKDLoss(nn.Module):
    """Knowledge distillation whose hard and soft losses are weighted sample by sample.

    Every sample i has a hard loss h_i (cross entropy with the label) and a soft loss s_i
    (T² · KL(teacher ‖ student) at temperature T). The result is the mean of
    w_i^hard · h_i + w_i^soft · s_i, the weights coming from `weight_net`. They are constants to
    the student's gradient; :class:`~kd_balance.BilevelOptimizer` is what trains them.

    More terms than these two get weights of their own by `terms`, more teachers by `teachers`.

    Args:
        weight_net: maps features [N, F] to weights [N, K], of (hard, soft) or of `names`; usually a
            :class:`~kd_balance.MetaWeightNet`. Another module is given the features it names in a
            tuple attribute ``features``, or else ("student_ce", "teacher_ce") of each teacher, and
            with a true attribute ``needs_kept`` which rows count, bool [N] or [N, K], or None for
            all. None is ordinary distillation with the fixed weights `alpha`.
        temperature: T of the soft loss, above 0.
        alpha: without a weight net, the mixture alpha · hard + (1 − alpha) · soft; or the pair
            (hard weight, soft weight); or for other terms their K weights, in order or by name.
        hard_loss: ``(student_logits [N, C], targets) -> [N]`` in place of cross entropy.
        soft_loss: ``(student_logits [N, C], teacher_logits [N, C]) -> [N]`` in place of the
            temperature KL. A loss with a true attribute ``needs_targets`` is given the targets as
            a third argument. With several teachers, one for all or a mapping by their names.
        teachers: names of several teachers, each with a soft loss and a weight of its own.
        terms: further terms by name. Each is called with what the criterion is given under its
            name, a tuple being several arguments, and returns one loss for each sample, [N]; or a
            pair, ([N], bool [N]), where only some samples have it; or a scalar, which all samples
            share, so that with "mean" it weighs the mean of their weights. None: the loop gives
            the losses themselves, as for terms that draw random numbers or change by being called.
        reduction: "mean" over the samples that are not ignored, "sum", or "none" (one value for
            each position, 0 where ignored).
        class_dim: the dimension of the logits that holds the classes, 1 for [N, C, d1, …] and −1
            for the [N, length, C] of language models. None finds it by the targets' shape, and
            refuses where that leaves two.
        ignore_index: the class index of positions that weigh nothing and are not counted.
        per: what has weights of its own: "position", a token for example, or "sequence". The
            weight net is then given each sequence's mean of a feature over what counts.

    Raises:
        ValueError: an argument out of its range.

    Example::

        criterion = WeightedKDLoss(MetaWeightNet(mean=0.5), temperature=4.0)
        loss = criterion(student(inputs), teacher_logits, targets)
        loss.backward()
        criterion.weights  # [N, 2]

        names = ("hard", "soft", "attention")
        criterion = WeightedKDLoss(MetaWeightNet(terms=names), terms={"attention": attention})
        loss = criterion(logits, teacher_logits, targets, attention=(maps, teacher_maps))

    Source: BiKD (arXiv 2605.17839), the training loss; Hinton et al. 2015 for the soft loss.
    """

    teacher_bias: Tensor | None

    def __init__(
        self,
        weight_net: nn.Module | None = None,
        *,
        temperature: float = 4.0,
        alpha: float | Sequence[float] | Mapping[str, float] = 0.5,
        hard_loss: HardLoss | None = None,
        soft_loss: SoftLoss | Mapping[str, SoftLoss] | None = None,
        teachers: Sequence[str] | None = None,
        terms: Mapping[str, Term | None] | None = None,
        reduction: str = "mean",
        class_dim: int | None = None,
        ignore_index: int = -100,
        per: str = "position",
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
        if per not in ("position", "sequence"):
            raise ValueError(f"per is {per!r}, expected 'position' or 'sequence'.")
        self.names = term_names(teachers, terms)
        """Of the terms, in the order of the weights."""
        own = getattr(weight_net, "terms", self.names)
        if own != self.names:
            raise ValueError(
                f"weight_net weighs {own} and the terms are {self.names}, expected the same: make "
                f"it MetaWeightNet(terms={self.names})."
            )
        self.weight_net = weight_net
        self.temperature = temperature
        self.alpha = alpha
        self.hard_loss = hard_loss
        self.soft_loss: Any = soft_loss
        self.teachers = self.names[1 : 1 + len(teachers)] if teachers else None
        self.terms = dict(terms or {})
        self._modules_of_terms = nn.ModuleList(
            function
            for function in (*self.terms.values(), *_values(soft_loss))
            if isinstance(function, nn.Module)
        )
        self.reduction = reduction
        self.class_dim = class_dim
        self.ignore_index = ignore_index
        self.per = per
        self.class_counts: Tensor | Sequence[int] | None = None
        self.register_buffer("teacher_bias", None)
        self._fixed_weights: tuple[float, ...] = ()
        if weight_net is None or len(self.names) == 2:
            self._fixed_weights = fixed_weights(alpha, self.names)
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
                (hard weight, soft weight), or one for each of more `terms`. The size of all of them
                together is the data's, as a learning rate is: give the one that you would train
                with.
            **settings: ``soft_loss``, ``terms``, ``reduction``, ``class_dim``, ``ignore_index`` and
                ``per``, as for the class.

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
        if settings.get("teachers"):
            raise ValueError(
                f"teachers is {settings['teachers']!r}, expected one teacher, whose bias "
                "long_tailed finds: give several to WeightedKDLoss(teachers=…) itself."
            )
        features = (*DEFAULT_FEATURES, LogFrequency(class_counts))
        names = term_names(None, settings.get("terms"))
        mean = fixed_weights(alpha, names)
        criterion = cls(
            MetaWeightNet(features, mean=mean, ratio=RATIO, terms=names),
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
            teacher = flat.teachers["soft"]
            assert isinstance(teacher, Tensor)
            logits.append(teacher if flat.kept is None else teacher[flat.kept])
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

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Teacher | Mapping[str, Teacher],
        targets: Tensor,
        *,
        sequences: Tensor | None = None,
        given: Mapping[str, Tensor] | None = None,
        **terms: Any,
    ) -> Tensor:
        """The weighted loss of a batch.

        Args:
            student_logits: [N, C] or [N, C, d1, …], as for torch.nn.functional.cross_entropy.
            teacher_logits: the same shape; no gradient flows into them. Of a teacher whose largest
                probabilities alone are known a :class:`~kd_balance.top_k.TopK`. A pair (logits,
                mask) where the teacher knows some samples only, the mask being bool, of the shape
                of class indices; there is no soft loss of the others, whose features see even
                logits. With several teachers a mapping of these by name.
            targets: class indices, the shape of the logits without the class dimension, or class
                probabilities, the shape of the logits.
            sequences: int64 of the shape of class indices, another number than before where a
                sequence begins: of packed ones, or of flattened logits. By default [N, length] are
                N sequences.
            given: the loop's own features by name, which the weight net sees as ``given.name``; of
                the shape of class indices, or one for each of the N, [N].
            **terms: for each of `terms` what it is called with.

        Returns:
            A scalar, or with reduction "none" a value for each position. float32, or float64 for
            float64 logits.

        Raises:
            ValueError: shapes that do not belong together.
        """
        with _without_autocast(student_logits.device):
            flat = self._flatten(student_logits, teacher_logits, targets)
            losses, kept = self._losses(flat, terms)
            self._last_losses = losses.detach()
            if self.weight_net is not None:
                self._features = self._look(flat, kept, sequences, given or {})
            self._kept = kept
            with torch.no_grad():
                weights = self.weigh(self._features, losses, kept)
                # not a view of parameters
                weights = weights.clone() if kept is None else weights * of_terms(kept)
            self._weights = weights
            result = self.combine(losses, weights, kept, targets)
            node: Any = result.grad_fn
            if node is not None:
                node.metadata[WeightedKDLoss] = self  # a mark that the loss's graph shows
            return result

    def losses(
        self,
        student_logits: Tensor,
        teacher_logits: Teacher | Mapping[str, Teacher],
        targets: Tensor,
        **terms: Any,
    ) -> Tensor:
        """The (hard, soft) losses of every sample before weighting, and those of other terms.

        Args:
            student_logits, teacher_logits, targets, **terms: as for the call.

        Returns:
            [N, K], one row for each position, 0 where a sample has no such term.

        Raises:
            ValueError: shapes that do not belong together.
        """
        with _without_autocast(student_logits.device):
            return self._losses(self._flatten(student_logits, teacher_logits, targets), terms)[0]

    def soft_losses(
        self, student_logits: Tensor, teacher_logits: Teacher, targets: Tensor
    ) -> Tensor:
        """[N], the soft losses alone, of the one teacher."""
        with _without_autocast(student_logits.device):
            return self._of_logits(self._flatten(student_logits, teacher_logits, targets))[:, 1]

    @property
    def weights(self) -> Tensor:
        """[N, K], the weights of the last call, by `names` (hard, soft), detached.

        0 where a position is ignored, or has no such term.
        """
        if self._weights is None:
            raise RuntimeError("There are no weights before the first call of the criterion.")
        return self._weights

    @property
    def last_features(self) -> Tensor | None:
        """[N, F], what the weight net saw in the last call; None without one."""
        return self._features

    @property
    def last_losses(self) -> Tensor | None:
        """[N, K], the losses of the last call before weighting, by `names`, detached."""
        return self._last_losses

    @property
    def last_kept(self) -> Tensor | None:
        """[N] or [N, K], what counted in the last call; None where all did."""
        return self._kept

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
        self._weights = weights if self._kept is None else weights * of_terms(self._kept)

    def weigh(self, features: Tensor | None, like: Tensor, kept: Tensor | None) -> Tensor:
        """The weights [N, K] for features [N, F], with the weight net's graph.

        Args:
            features: of every sample; None where there is no weight net.
            like: [N, K], whose dtype and device the weights get.
            kept: [N] or [N, K], what counts; None where all does.
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
                f"it must map features [N, F] to a weight for each of ({', '.join(self.names)})."
            )
        return weights.to(like.dtype)

    def combine(
        self, losses: Tensor, weights: Tensor, kept: Tensor | None, targets: Tensor
    ) -> Tensor:
        """The reduced loss; bilinear in `losses` and `weights`, both [N, K].

        Args:
            kept: [N] or [N, K], what counts; None where all does.
            targets: of the call, for the shape of an unreduced loss.
        """
        total = (losses * weights).sum(1)
        if kept is not None:
            total = torch.where(of_samples(kept), total, 0.0)
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
            losses: [N, K].
            kept: [N] or [N, K], what counts; None where all does.
        """
        share = upstream / _count(losses, kept) if self.reduction == "mean" else upstream
        share = share.reshape(-1, 1).to(losses.dtype)
        if kept is not None:
            return torch.where(of_samples(kept).unsqueeze(1), share, 0.0)
        return share.expand(len(losses), 1)

    def _flatten(
        self, student: Tensor, teacher: Teacher | Mapping[str, Teacher], targets: Tensor
    ) -> _Flat:
        if student.dim() < 2:
            raise ValueError(
                f"student_logits have shape {tuple(student.shape)}, expected [N, C] or "
                "[N, C, d1, …]."
            )
        class_dim = self.class_dim_of(student, targets)
        teachers, masks = self._by_name(teacher)
        for logits in teachers.values():
            if isinstance(logits, TopK):
                logits.check_shape(student.shape, class_dim)
            elif logits.shape != student.shape:
                raise ValueError(
                    f"teacher_logits have shape {tuple(logits.shape)}, expected that of "
                    f"student_logits, {tuple(student.shape)}: teacher and student need the same "
                    "classes and positions."
                )
        by_position = list(student.shape)
        classes = by_position.pop(class_dim)
        positions = torch.Size(by_position)
        probabilities = targets.is_floating_point()
        expected = student.shape if probabilities else positions
        if targets.shape != expected:
            kind = "probabilities" if probabilities else "indices"
            raise ValueError(
                f"targets (class {kind}) have shape {tuple(targets.shape)}, expected "
                f"{tuple(expected)} for logits {tuple(student.shape)} with class_dim={class_dim}."
            )
        check_labels("targets", targets, classes, self.ignore_index)

        student_rows = _rows(student, class_dim)
        dtype = student_rows.dtype
        teacher_rows = {n: _teacher_rows(t, class_dim, dtype) for n, t in teachers.items()}
        if self.teacher_bias is not None:
            if len(self.teacher_bias) != classes:
                raise ValueError(
                    f"class_counts has {len(self.teacher_bias)} numbers and the logits {classes} "
                    "classes, expected as many: give kd_balance.data.class_counts "
                    f"num_classes={classes}."
                )
            teacher_rows["soft"] = _unbiased(teacher_rows["soft"], self.teacher_bias)
        known = {name: mask(name, there, positions) for name, there in masks.items()}
        if probabilities:
            kept, labels = None, _rows(targets, class_dim).to(dtype)
        else:
            labels = _row(targets)
            kept = labels != self.ignore_index
            labels = labels * kept
        for name, rows in teacher_rows.items():
            teacher_rows[name] = _where_known(rows, known.get(name), kept, classes)
        return _Flat(student_rows, teacher_rows, labels, kept, known, positions)

    def class_dim_of(self, logits: Tensor, targets: Tensor) -> int:
        """The dimension that holds the classes: `class_dim`, or the one that targets lack.

        Args:
            logits: as for the call, the student's or a teacher's.
            targets: the labels that belong to them.

        Raises:
            ValueError: none or several may be it.
        """
        if self.class_dim is not None or logits.dim() < 3:
            return 1 if self.class_dim is None else self.class_dim
        shape = list(logits.shape)
        several = list(range(1, logits.dim()))
        if not targets.is_floating_point():
            several = [i for i in several if [*shape[:i], *shape[i + 1:]] == list(targets.shape)]
        if len(several) == 1:
            return several[0] if several[0] < logits.dim() - 1 else -1
        if not several:
            raise ValueError(
                f"targets (class indices) have shape {tuple(targets.shape)}, expected that of the "
                f"logits, {tuple(logits.shape)}, without the classes: cut both alike."
            )
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} may have their classes in dimension "
            f"{' or '.join(map(str, several))} by targets of shape {tuple(targets.shape)}, expected"
            " to know: give WeightedKDLoss class_dim=-1 for language models, 1 for [N, C, d1, …]."
        )

    def _by_name(
        self, teacher: Teacher | Mapping[str, Teacher]
    ) -> tuple[dict[str, Logits], dict[str, Tensor]]:
        """The teachers' logits and the masks of what they know, by the names of their terms."""
        given: Any = {"soft": teacher}
        if self.teachers is not None:
            if not isinstance(teacher, Mapping) or set(teacher) != set(self.teachers):
                mapped = isinstance(teacher, Mapping)
                got = f"the keys {list(teacher)}" if mapped else type(teacher).__name__
                raise ValueError(
                    f"teacher_logits are {got}, expected a mapping from each of {self.teachers} to "
                    "its logits."
                )
            given = {name: teacher[name] for name in self.teachers}
        masks = {}
        for name, logits in given.items():
            if isinstance(logits, tuple) and not isinstance(logits, TopK):
                given[name], masks[name] = logits
        return given, masks

    def _look(
        self,
        flat: _Flat,
        kept: Tensor | None,
        sequences: Tensor | None,
        given: Mapping[str, Tensor],
    ) -> Tensor:
        """[N, F], what the weight net is to see."""
        features, losses = self._feature_names(), self._last_losses
        assert losses is not None
        named = [i for i, name in enumerate(self.names) if name in features]
        seen = {self.names[i]: losses[:, i] for i in named}
        seen |= given_columns(features, given, flat.positions, losses)
        within = None
        if self.per == "sequence" or "position" in features:
            within = Sequences.of(flat.positions, sequences, losses.device)
            seen["position"] = within.place.to(losses.dtype).log1p()
        found = compute_features(
            features, flat.student, self._teacher_of(flat), flat.targets, seen
        )
        return within.mean(found, kept) if within and self.per == "sequence" else found

    def _feature_names(self) -> Sequence[Any]:
        features = getattr(self.weight_net, "features", None)
        if isinstance(features, (tuple, list)):
            return features
        if self.teachers is None:
            return DEFAULT_FEATURES
        return ("student_ce", *(f"{teacher}.teacher_ce" for teacher in self.teachers))

    def _teacher_of(self, flat: _Flat) -> Logits | dict[str, Logits]:
        """What features are given: the one teacher's logits, or several by name."""
        return flat.teachers["soft"] if self.teachers is None else flat.teachers

    def _losses(self, flat: _Flat, terms: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """[N, K], and what counts: [N] or, where some samples lack a term, [N, K]."""
        losses = self._of_logits(flat)
        there = flat.known
        if self.terms or terms:
            more, masks = self._more(flat, terms)
            losses = torch.cat((losses, *(column.unsqueeze(1) for column in more)), dim=1)
            there = {**there, **masks}
        if not there:
            return losses, flat.kept
        everywhere = torch.ones_like(losses[:, 0], dtype=torch.bool)
        kept = torch.stack([there.get(name, everywhere) for name in self.names], dim=1)
        losses = torch.where(kept, losses, 0.0)
        return losses, kept if flat.kept is None else kept & flat.kept.unsqueeze(1)

    def _of_logits(self, flat: _Flat) -> Tensor:
        """[N, 1 + T], the hard loss and the teachers' soft losses."""
        soft_losses = [self.soft_loss] * len(flat.teachers)
        if self.teachers is not None and isinstance(self.soft_loss, Mapping):
            soft_losses = [self.soft_loss.get(name) for name in self.teachers]
        losses = partial(_row_losses, self.hard_loss, soft_losses, self.temperature)
        given: tuple[Any, ...] = (flat.targets, *flat.teachers.values())
        if not is_large(flat.student):
            return losses(flat.student, *given)
        own = [loss for loss in (self.hard_loss, *soft_losses) if loss is not None]
        if not all(getattr(loss, "by_rows", False) for loss in own):
            return losses(flat.student, *given)
        return by_chunks(losses, flat.student, *given)

    def _more(
        self, flat: _Flat, given: Mapping[str, Any]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The losses of the other terms, and the masks of those that some samples lack."""
        if given.keys() != self.terms.keys():
            raise ValueError(
                f"the criterion was given {sorted(given) or 'no more terms'} by name, expected "
                f"what its terms are called with: {sorted(self.terms) or 'nothing'}."
            )
        columns, masks = [], {}
        for name, function in self.terms.items():
            arguments = tree_map(_wide, given[name])
            if function is not None:
                several = isinstance(arguments, tuple)
                arguments = function(*arguments) if several else function(arguments)
            column, there = per_sample(name, arguments, flat.positions, flat.student[:, 0])
            columns.append(column)
            if there is not None:
                masks[name] = there
        return columns, masks

    def kept(self, targets: Tensor) -> Tensor | None:
        """[N], which positions count; None where all do."""
        if targets.is_floating_point():
            return None
        return _row(targets) != self.ignore_index

    def _positions(self, targets: Tensor) -> list[int]:
        shape = list(targets.shape)
        if targets.is_floating_point():
            shape.pop(1 if self.class_dim is None else self.class_dim)
        return shape


def _row_losses(
    hard_loss: HardLoss | None,
    soft_losses: Sequence[SoftLoss | None],
    temperature: float,
    student: Tensor,
    targets: Tensor,
    *teachers: Logits,
) -> Tensor:
    """[n, 1 + T] of rows, by settings as they were when they were given."""
    if hard_loss is None:
        columns = [cross_entropy(student, targets)]
    else:
        columns = [_checked("hard_loss", hard_loss(student, targets), student)]
    for soft_loss, teacher in zip(soft_losses, teachers, strict=True):
        teacher = dense(teacher, student.shape[1])
        if soft_loss is None:
            columns.append(temperature_kl(student, teacher, temperature))
            continue
        labels = (targets,) if getattr(soft_loss, "needs_targets", False) else ()
        columns.append(_checked("soft_loss", soft_loss(student, teacher, *labels), student))
    return torch.stack(columns, dim=1)


def check_labels(name: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Looks for labels that are no class; on an accelerator torch's own kernels do.

    Raises:
        ValueError: there is one.
    """
    if labels.device.type != "cpu" or labels.is_floating_point() or not labels.numel():
        return
    if torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in labels.aminmax())
    if 0 <= low and high < classes:
        return
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ValueError(
            f"{name} hold the class {int(wrong[0])}, expected 0 to {classes - 1}, or the "
            f"ignore_index, {ignore_index}: relabel it, or give the logits that class."
        )


def _rows(tensor: Tensor, class_dim: int) -> Tensor:
    """[N, …] out of a tensor whose class dimension that is."""
    tensor = _wide(tensor)
    if tensor.dim() == 2 and class_dim in (1, -1):
        return tensor
    return tensor.movedim(class_dim, -1).reshape(-1, tensor.shape[class_dim])


def _teacher_rows(logits: Logits, class_dim: int, dtype: torch.dtype) -> Logits:
    if isinstance(logits, TopK):
        log_probs = _rows(logits.log_probs.detach(), class_dim).to(dtype)
        return TopK(log_probs, _rows(logits.indices, class_dim))
    return _rows(logits.detach(), class_dim).to(dtype)


def _row(labels: Tensor) -> Tensor:
    labels = labels.long()
    return labels if labels.dim() == 1 else labels.reshape(-1)


def _count(samples: Tensor, kept: Tensor | None) -> Tensor | int:
    return len(samples) if kept is None else of_samples(kept).sum().clamp(min=1)


def _wide(value: Any) -> Any:
    """A tensor in float32 at least; anything else as it is."""
    half = isinstance(value, Tensor) and value.dtype in (torch.half, torch.bfloat16)
    return value.float() if half else value


def _unbiased(logits: Logits, bias: Tensor) -> Tensor:
    if isinstance(logits, TopK):
        raise ValueError(
            "teacher_logits are a TopK, expected those of all classes for long_tailed, which "
            "subtracts the teacher's bias from them: use WeightedKDLoss itself."
        )
    return logits - bias.to(logits)


def _where_known(
    logits: Logits, known: Tensor | None, kept: Tensor | None, classes: int
) -> Logits:
    """Logits that are even where the teacher knows nothing, and may hold anything."""
    if isinstance(logits, TopK):
        for there in (known, kept):
            logits = logits if there is None else logits.where(there, classes)
        logits.check_values(classes)
        return logits
    return logits if known is None else torch.where(known.unsqueeze(1), logits, 0.0)


def _checked(name: str, loss: Tensor, student: Tensor) -> Tensor:
    if loss.shape != student.shape[:1]:
        raise ValueError(
            f"{name} returned shape {tuple(loss.shape)}, expected ({len(student)},): return one "
            "loss for each sample, without reduction."
        )
    return loss


def _values(functions: Any) -> Iterable[Any]:
    return functions.values() if isinstance(functions, Mapping) else ()


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
