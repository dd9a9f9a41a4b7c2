"""The wrapper: a torch optimizer that also trains the criterion's weight net."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_balance.bilevel import (
    DERIVATIVES,
    EVERY,
    METHODS,
    UNROLL,
    BilevelSteps,
    Settings,
    check_modules,
    check_one_device,
    check_optimizer,
    check_parameters,
    check_steps_shards,
    refuse_outer,
    weight_net_of,
)
from kd_balance.checkpoint import (
    by_index,
    check_optimizer as check_state,
    load_meta_state,
    meta_state_of,
)
from kd_balance.distributed import Ranks, check_shards
from kd_balance.gradient_transform import GradientFunction, transformed
from kd_balance.joint import JointOptimizer
from kd_balance.loop_warnings import loop_level
from kd_balance.loss import WeightedKDLoss
from kd_balance.meta import MetaForward, MetaLoss, MetaObjective, MetaSet
from kd_balance.replay import Structure, replayable
from kd_balance.shards import Shards

__all__ = ["DERIVATIVES", "EVERY", "METHODS", "UNROLL", "BilevelOptimizer"]

_RATE = 1e-3  # of φ's Adam, for windows of up to UNROLL steps

_watching: WeakSet[BilevelOptimizer] = WeakSet()


class BilevelOptimizer(Optimizer):
    """Wraps the student's optimizer, and trains the weight net through the student's own steps.

    The training loop stays as it is. Every `every` steps the loss on a class-balanced meta batch
    is evaluated at the parameters that a step leads to, its derivative is taken through that step
    to the weight net's parameters φ (the hypergradient), and φ takes a step of its own.

    Args:
        optimizer: the student's optimizer. It stays the one that moves the student; parameter
            groups and state are read and written through to it. Several that share the student's
            parameters between them, such as Muon and AdamW, as a list.
        student: the module whose output the criterion is given. It may return its logits within
            tuples, dicts and model outputs.
        criterion: a WeightedKDLoss with a weight net; it is moved to the student's device. Frozen
            parameters of the weight net stay as they are.
        meta_loader: an iterable of class-balanced batches, begun anew when it ends. A batch is
            (inputs, labels) or a mapping with the key ``labels``; its inputs reach the student as
            the training inputs did: a tensor in the place of the call's only tensor, a mapping as
            keyword arguments.
        method: "online" differentiates the step that the student takes anyway; "lookahead" moves φ
            first, by a virtual step of `optimizer`, and then takes the real step with gradients
            recomputed under the new φ; "paper" does so with a virtual step of plain SGD at each
            group's learning rate, which is the BiKD authors' program and works with any optimizer.
        engine: "adjoint" (forward mode, cheap) or "unroll" (the whole inner run as one graph, the
            reference). They agree to rounding.
        unroll: the number of last student steps that the hypergradient passes through, at most
            `every`; default 4, or `every` if that is less. For more than one, loss terms beside
            the criterion count as constants in the student's curvature.
        every: student steps for each hypergradient; default 64, or `unroll` if that is more. The
            default of both is 1 for method "paper".
        accumulate: hypergradients averaged before φ moves. The average then stays in the ``.grad``
            of the weight net's parameters until the criterion is called again.
        step_derivative: how `optimizer`'s step is differentiated. "exact" knows SGD, Adam, AdamW,
            RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, ASGD, Rprop, Muon, both Adafactors
            (torch's, transformers') and what
            :func:`~kd_balance.inner_step.register_update_rule` was told. For any other, with
            method "online" and engine "adjoint": "finite_difference" nudges copies of the step, and
            is exact to some digits where every element moves by itself, but counts what the state
            carries from step to step as constant; "sgd" takes the step for −lr times the gradient.
        meta_loss: "hard" (cross entropy), "soft" (the criterion's soft loss), "mix" (their sum), or
            ``(student_logits, targets) -> scalar``.
        teacher: maps meta inputs to teacher logits; usually the module itself, which is in
            evaluation mode for it. A criterion made by :meth:`WeightedKDLoss.long_tailed` finds
            the teacher's bias towards frequent classes by it, before this returns; and "mix" and
            "soft" need it.
        meta_optimizer: of the weight net; default Adam with weight decay 1e-4 and a rate that
            makes up for rare steps: 1e-3, or 2.5e-4 · `every` if that is more.
        meta_forward: ``(student, batch) -> (student_logits, targets)`` for meta batches of any
            other shape.
        to_logits: from what the student returns to the logits that the criterion is given, such as
            ``lambda output: output[:, :-1]``. What the loop makes of them is followed without it,
            and repeated for meta batches where it means the same there: slices, other shapes,
            choices of classes, scalar factors, softmax, upsampling, sums.
        grad_scaler: the GradScaler of the loop, whose scale the hypergradient must not carry.

    Raises:
        ValueError, TypeError: an argument that cannot work, before anything is changed.

    Example::

        criterion = WeightedKDLoss(MetaWeightNet(mean=0.5))
        optimizer = BilevelOptimizer(optimizer, student, criterion, meta_loader)
        for inputs, targets in loader:
            loss = criterion(student(inputs), teacher_logits(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    Source: BiKD (arXiv 2605.17839) for the problem and method "paper".
    """

    def __init__(
        self,
        optimizer: Optimizer | list[Optimizer] | tuple[Optimizer, ...],
        student: nn.Module,
        criterion: WeightedKDLoss,
        meta_loader: Iterable[Any],
        *,
        method: str = "online",
        engine: str = "adjoint",
        unroll: int | None = None,
        every: int | None = None,
        accumulate: int = 1,
        step_derivative: str = "exact",
        meta_loss: str | MetaLoss = "hard",
        teacher: Callable[..., Tensor] | None = None,
        meta_optimizer: Optimizer | None = None,
        meta_forward: MetaForward | None = None,
        to_logits: Callable[[Any], Tensor] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._ranks = Ranks(student)  # before any refusal, which the others then learn of
        settings = Settings.of(method, engine, unroll, every, accumulate, step_derivative)
        weight_net = weight_net_of(criterion)
        if isinstance(optimizer, BilevelOptimizer):
            refuse_outer(optimizer)
        whole = JointOptimizer(optimizer) if isinstance(optimizer, (list, tuple)) else optimizer
        check_optimizer(whole, settings)
        check_shards(student)
        check_one_device(student)
        module = replayable(student)
        check_modules(module)
        shards = Shards.of(module, self._ranks)
        if shards is not None:
            check_steps_shards(whole, settings)
        structure = Structure(module, self._ranks if self._ranks.size > 1 else None, shards)
        check_parameters(whole, structure.parameters, weight_net)

        criterion.follow(next(module.parameters()).device)
        if meta_optimizer is None:
            rate = _RATE * max(1.0, settings.every / UNROLL)
            meta_optimizer = torch.optim.Adam(criterion.phi, lr=rate, weight_decay=1e-4)
        meta_set = MetaSet(meta_loader, self._ranks)
        objective = MetaObjective(module, criterion, meta_loss, teacher, meta_forward)
        bias_by_teacher = teacher is not None and criterion.teacher_bias is not None
        if bias_by_teacher:
            with self._ranks.together(), meta_set.look_ahead() as batches:
                criterion.find_teacher_bias(map(objective.by_teacher, batches))
        self._ranks.check_same(
            **vars(settings), optimizer=type(whole).__name__,
            weight_net=[(name, tuple(t.shape)) for name, t in weight_net.state_dict().items()],
        )
        self._ranks.give_out([*criterion.parameters(), *criterion.buffers()])

        self.optimizer = whole
        self.student = student
        self.criterion = criterion
        self._settings = settings
        self._structure = structure
        self._superseded = False
        self.__setstate__({})  # gives this optimizer its own step hooks
        _supersede_wrapper_of(module)
        self._steps = BilevelSteps(
            whole, student, structure, criterion, meta_set, objective, meta_optimizer, settings,
            self._ranks, to_logits=to_logits, grad_scaler=grad_scaler,
            bias_by_teacher=bias_by_teacher,
        )
        meta_set.share_position()
        _watching.add(self)
        self._steps.watch_if_due()

    # how it is set

    @property
    def method(self) -> str:
        return self._settings.method

    @property
    def unroll(self) -> int:
        return self._settings.unroll

    @property
    def every(self) -> int:
        return self._settings.every

    @property
    def accumulate(self) -> int:
        return self._settings.accumulate

    @property
    def step_derivative(self) -> str:
        return self._settings.step_derivative

    @property
    def meta_optimizer(self) -> Optimizer:
        return self._steps.weight_net_step.optimizer

    @meta_optimizer.setter
    def meta_optimizer(self, optimizer: Optimizer) -> None:
        self._steps.weight_net_step.optimizer = optimizer

    # what a torch optimizer is asked for, read and written through to the wrapped one

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __repr__(self) -> str:
        return f"BilevelOptimizer(method={self.method!r}, every={self.every}, {self.optimizer!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a BilevelOptimizer was to be copied or pickled, expected to stay with its student: "
            "save its state_dict(), and wrap the copied student's own optimizer anew."
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)
        self._structure.refresh()
        weight_net = weight_net_of(self.criterion)
        check_parameters(self.optimizer, self._structure.parameters, weight_net)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the wrapped optimizer's parameters."""
        self._steps.recover()
        self._steps.recorder.gradients_cleared()
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def transform_gradients(self, function: GradientFunction) -> None:
        """Changes the gradients by a function that hypergradients pass through.

        For what a loop does to gradients beside clipping, which is recognised by itself: to
        centralise, mask, project, normalise or perturb them. Call it after the last backward pass
        of a step and before clipping, in every step.

        Args:
            function: of the gradients of all parameters that the optimizer holds and that have
                one, in the order of ``param_groups``; returns as many. Torch operations alone, so
                that autograd can differentiate it; it may draw random numbers.

        Raises:
            ValueError: the function returned other shapes, gradients were changed before it, or
                the method is not "online".

        Example::

            loss.backward()
            optimizer.transform_gradients(
                lambda gradients: [g - g.mean(0) if g.dim() > 1 else g for g in gradients]
            )
            optimizer.step()
        """
        if self.method != "online":
            raise ValueError(
                f"transform_gradients was called and method is {self.method!r}, expected 'online': "
                "the gradients recomputed under the new weights would not be transformed."
            )
        if self._steps.recorder.active:
            self._steps.gradients.transform(function, self._structure.parameters)
            return
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            after = transformed(function, [p.grad.detach().clone() for p in params])
            for param, gradient in zip(params, after, strict=True):
                param.grad.copy_(gradient)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes the student's step and, when its turn has come, the weight net's.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError: no criterion result went through backward before the first meta update (a
                later step warns, and is the plain one), the loss is not finite, or the meta batch
                does not fit. The student is left as it was.
            RuntimeError: the student has been wrapped anew since.
        """
        if self._superseded:
            raise RuntimeError(
                "step() was called on a BilevelOptimizer whose student has been wrapped in another "
                "one since, expected the newest: use that, or close() this one before wrapping."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._steps.take(closure)
        return loss

    def close(self) -> None:
        """Stops watching student and criterion; the student's optimizer goes on by itself."""
        self._steps.close()
        _watching.discard(self)

    @property
    def metrics(self) -> dict[str, float]:
        """What the last meta update saw; reading it waits for the device.

        ``meta_loss``, ``meta_loss_start`` (mean of the first ten), ``hypergradient_norm``,
        ``hard_weight``, ``soft_weight`` and those of other terms by their names (means over the
        step's batch, in which a term that a sample lacks weighs 0; all nan before the first),
        ``meta_updates`` (steps that φ's optimizer took so far) and ``skipped_updates``
        (hypergradients that were not finite, or on an accelerator broke an invariant). The latter
        count as zero in an average with others, and without others φ stays where it is. They stand
        by their cause in ``skipped_by_…``, once there are some.

        Raises:
            ValueError: on an accelerator, an invariant broke since the last reading.
        """
        return self._steps.metrics.read()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and under ``kd_balance`` everything of the meta level.

        It holds tensors, numbers and words alone, so ``torch.load(weights_only=True)`` reads it.
        Between the steps of a window (``unroll`` above 1) it also holds what these are made of: for
        each their inputs, gradients and parameters. Where they hold what no tensor tells, and in
        several processes, it warns that they are not saved.
        """
        return {**self.optimizer.state_dict(), "kd_balance": meta_state_of(self._steps)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, or a checkpoint of the bare optimizer.

        Raises:
            ValueError: it is something else, a part of one, or of another student or weight net;
                nothing is changed.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(
                f"load_state_dict was given {type(state_dict).__name__}, expected a dict: load the "
                "file with torch.load first."
            )
        plain = dict(state_dict)
        meta_state = plain.pop("kd_balance", None)
        plain = by_index(plain)
        check_state(plain, self.optimizer)
        if meta_state is not None:
            load_meta_state(
                self._steps, meta_state, lambda: self.optimizer.load_state_dict(plain)
            )
            return
        self.optimizer.load_state_dict(plain)
        self._steps.give_up()
        warnings.warn(
            "The checkpoint was written by a plain optimizer: the weight net and its optimizer "
            "start fresh.",
            stacklevel=loop_level(),
        )


def _supersede_wrapper_of(student: nn.Module) -> None:
    """Closes an older wrapper of the same student, as a second run of a loop leaves behind."""
    for other in list(_watching):
        if replayable(other.student) is student:
            other.close()
            other._superseded = True
