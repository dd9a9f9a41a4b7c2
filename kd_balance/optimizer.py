"""The wrapper: a torch optimizer that also trains the criterion's weight net."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_balance import checkpoint
from kd_balance.clipping import Clipping
from kd_balance.distributed import FailedElsewhere, Ranks, check_whole
from kd_balance.gradient_transform import GradientFunction, transformed
from kd_balance.gradients import Gradients, copies
from kd_balance.hypergradient import ENGINES
from kd_balance.inner_step import (
    DIFFERENTIABLE,
    InnerStep,
    Update,
    exact_dtype,
    full_name,
    is_differentiable,
    known_optimizers,
    predicted,
    runs_unhooked,
)
from kd_balance.invariants import GRADIENT, REPLAY, Broken, Invariants, distance
from kd_balance.joint import JointOptimizer, parts, shares_out
from kd_balance.loss import WeightedKDLoss
from kd_balance.meta import MetaForward, MetaLoss, MetaObjective, MetaSet
from kd_balance.record import CriterionCall, Recorder, Recording
from kd_balance.replay import LoopBackward, Structure, replayable, stops_gradients
from kd_balance.skipped import Skipped
from kd_balance.window_state import Around, NotPlain, packed, unpacked

METHODS = ("online", "lookahead", "paper")
DERIVATIVES = ("exact", "finite_difference", "sgd")
UNROLL, EVERY = 4, 64  # a window: fewer steps of it gain less, more windows gain nothing
_FIRST = 10  # windows that tell where the meta loss began
_ASYMMETRY = 0.01  # of a step's Jacobian, relative
_RATE = 1e-3  # of φ's Adam, for windows of up to UNROLL steps

_OF_PACKAGES = re.compile(r"(kd_balance|torch)(\.|$)")

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

        criterion = WeightedKDLoss(MetaWeightNet())
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
        _check_choice("method", method, METHODS)
        _check_choice("engine", engine, tuple(ENGINES))
        _check_choice("step_derivative", step_derivative, DERIVATIVES)
        if step_derivative != "exact" and (method, engine) != ("online", "adjoint"):
            raise ValueError(
                f"step_derivative is {step_derivative!r} with method={method!r} and "
                f"engine={engine!r}, expected 'exact' there: use method 'online' and engine "
                "'adjoint', or leave it out."
            )
        unroll, every = _window(method, unroll, every)
        for name, value in (("unroll", unroll), ("every", every), ("accumulate", accumulate)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1.")
        if unroll > every:
            raise ValueError(
                f"unroll is {unroll} and every is {every}, expected unroll ≤ every: φ must be the "
                f"same in all unrolled steps, so set every={unroll} or more."
            )
        weight_net = _weight_net_of(criterion)
        whole = JointOptimizer(optimizer) if isinstance(optimizer, (list, tuple)) else optimizer
        _check_optimizer(whole, method, step_derivative)
        if shares_out(whole) and engine == "unroll":
            raise ValueError(
                "optimizer is a ZeroRedundancyOptimizer and engine is 'unroll', expected engine "
                "'adjoint': the graph of the whole inner run needs the states of all processes."
            )
        check_whole(student)
        _check_one_device(student)
        module = replayable(student)
        _check_modules(module)
        self._structure = Structure(module, self._ranks if self._ranks.size > 1 else None)
        _check_parameters(whole, self._names, weight_net)

        self.optimizer = whole
        self.student = student
        self.criterion = criterion
        self.method = method
        self.unroll = unroll
        self.every = every
        self.accumulate = accumulate
        self.step_derivative = step_derivative
        criterion.follow(next(module.parameters()).device)
        self.meta_optimizer = meta_optimizer or torch.optim.Adam(
            criterion.phi, lr=_RATE * max(1.0, every / UNROLL), weight_decay=1e-4
        )
        self._meta_set = MetaSet(meta_loader)
        self._positions: list[Any] = []
        self._objective = MetaObjective(module, criterion, meta_loss, teacher, meta_forward)
        self._bias_by_teacher = teacher is not None and criterion.teacher_bias is not None
        if self._bias_by_teacher:
            with self._ranks.together(), self._meta_set.look_ahead() as batches:
                criterion.find_teacher_bias(map(self._objective.by_teacher, batches))
        self._ranks.check_same(
            method=method, engine=engine, unroll=unroll, every=every, accumulate=accumulate,
            step_derivative=step_derivative, optimizer=type(whole).__name__,
            weight_net=[(name, tuple(t.shape)) for name, t in weight_net.state_dict().items()],
        )
        self._ranks.give_out([*criterion.parameters(), *criterion.buffers()])
        self._engine_name = engine
        self._engine = ENGINES[engine](self._ranks)
        self._grad_scaler = grad_scaler
        self._weight_net = weight_net
        self._steps = 0
        self._partial_average: list[Tensor] = []
        self._holds_some = torch.tensor(False)  # whether one in the average is not skipped
        self._accumulated = 0
        self._window: list[InnerStep] = []
        self._looked = False  # at a step alone
        self._tried = False  # through a whole window
        self._superseded = False
        self._warned: dict[str, str] = {}  # texts by their kind
        self._meta_updates = 0
        self._meta_loss = torch.tensor(float("nan"))
        self._meta_loss_start = torch.tensor(float("nan"))
        self._hypergradient_norm = torch.tensor(float("nan"))
        self._mean_weights = torch.full((len(criterion.names),), float("nan"))
        self._skipped = Skipped()
        self.__setstate__({})  # gives this optimizer its own step hooks
        _supersede_wrapper_of(module)
        self._gradients = Gradients(self._structure, whole)
        self._recorder = Recorder(
            student, self._structure, criterion, self._gradients, to_logits, self._ranks
        )
        self._invariants = Invariants()
        self._ended: dict[str, Tensor] = {}  # the parameters that the window's last step left
        self._share_position()
        _watching.add(self)
        self._open_window()

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
        _check_parameters(self.optimizer, self._names, self._weight_net)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the wrapped optimizer's parameters."""
        self._recorder.gradients_cleared()
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
        if self._recorder.active:
            self._gradients.transform(function, self._names)
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
        watched = self._recorder.active
        if watched and not self._has_gradients() and not self._recorder.complains:
            self._student_step(closure)  # of a batch that the loop gave up: nothing moves
            return loss
        if not watched:
            self._student_step(closure)
        else:
            self._watched_step(closure)
        self._recorder.forget()
        self._steps += 1
        self._open_window()
        return loss

    def _watched_step(self, closure: Callable[[], Any] | None) -> None:
        """A step that a hypergradient will pass through."""
        self._moved = False
        try:
            with self._ranks.together():
                self._take_watched_step(closure)
        except BaseException as error:
            self._recorder.forget()
            self._invariants.forget()
            self._forget_window()
            if self._moved:
                self._steps += 1
                self._open_window()
            elif getattr(error, "cause", None) == REPLAY and self._recorder.try_uncompiled():
                self._warn_once(
                    "The compiled student could not be repeated, most likely for its dropout, "
                    "whose random numbers are the compiler's own: it runs uncompiled in the steps "
                    "that hypergradients pass through."
                )
                self._student_step(closure)
                return
            else:
                self._recorder.active = True
            raise

    def _take_watched_step(self, closure: Callable[[], Any] | None) -> None:
        recording = self._recorder.take()
        none, recording.alone = self._ranks.begin_step(not recording.calls, recording.alone)
        if none and self._looked:
            self._unrelated_step(closure)
            return
        self._recorder.active = False
        self._structure.refresh()  # layers may have been replaced
        with _modes_of_our_own(next(self._weight_net.parameters()).device):
            inner = self._inner_step(recording)
            if not self._in_window:
                self._look_at_first_step(inner)
                self._ranks.agree()
                self._student_step(closure)
            elif self._window_position == self.every - 1:
                self._bilevel_step(inner, closure)
            else:
                self._recorded_step(inner, closure)

    def _inner_step(self, recording: Recording) -> InnerStep:
        """What the coming step is made of."""
        self._check_calls(recording)
        scale = self._undo_loss_scale(recording)
        update = Update.of(
            self.optimizer,
            self._names,
            clipping=self._clipping(scale),
            transforms=self._gradients.transforms,
            plain_sgd=self.step_derivative == "sgd"
            or (self.method == "paper" and self._window_position == self.every - 1),
            finite_difference=self.step_derivative == "finite_difference",
            ranks=self._ranks,
        )
        accumulated = self._gradients.accumulated(self._names, scale)
        ids = {name: id(param) for param, name in self._names.items()}
        self._invariants.began(update.params, self._ended)
        # a net that keeps its mean has nothing to divide by
        if self._is_rare and getattr(self._weight_net, "mean", None) is None:
            for call in recording.calls:
                assert call.upstream is not None
                self._invariants.factor(call.upstream, call.weights)
        if recording.factor_learns:
            self._warn_once(
                "The criterion's result is multiplied by something made of the student's "
                "parameters: that factor counts as a constant, so hypergradients miss what the "
                "weights change through it."
            )
        if self._gradients.carried and self._window:
            self._warn_once(
                "Gradients of an earlier step were not cleared: they count as constants, so "
                "hypergradients through several steps miss what the weights change through them; "
                "call zero_grad() in every step, or set unroll=1."
            )
        hooked = [n for p, n in self._names.items() if _has_hooks(p)]
        if hooked and not recording.alone:
            self._warn_once(
                f"{hooked[0]} has a gradient hook and another loss reached the gradients too: the "
                "hook counts as one that changes nothing, so hypergradients are wrong if it does."
            )
        return InnerStep(recording.calls, update, accumulated or update.grads, recording.alone, ids)

    def close(self) -> None:
        """Stops watching student and criterion; the student's optimizer goes on by itself."""
        self._recorder.close()
        _watching.discard(self)
        self._open_window()

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
        self._invariants.check()
        self._tell_if_all_skipped()
        mean_weights = zip(self.criterion.names, self._mean_weights.tolist(), strict=True)
        return {
            "meta_loss": self._meta_loss.item(),
            "meta_loss_start": self._meta_loss_start.item(),
            "hypergradient_norm": self._hypergradient_norm.item(),
            **{f"{name}_weight": mean for name, mean in mean_weights},
            "meta_updates": float(self._meta_updates - self._skipped.steps.item()),
            "skipped_updates": float(self._skipped.updates.item()),
            **{f"skipped_by_{k}": n for k, n in self._skip_causes().items() if n},
        }

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and under ``kd_balance`` everything of the meta level.

        It holds tensors, numbers and words alone, so ``torch.load(weights_only=True)`` reads it.
        Between the steps of a window (``unroll`` above 1) it also holds what these are made of: for
        each their inputs, gradients and parameters. Where they hold what no tensor tells, and in
        several processes, it warns that they are not saved.
        """
        meta_state: dict[str, Any] = {
            "format": checkpoint.FORMAT,
            "weight_net": self._weight_net.state_dict(),
            "teacher_bias": self.criterion.teacher_bias,
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "meta_sets": self._positions or [self._meta_set.state_dict()],
            "steps": self._steps,
            "meta_updates": self._meta_updates,
            "meta_loss_start": self._meta_loss_start,
            "skipped": self._skipped.state_dict(),
            "accumulated": self._accumulated,
            "partial_average": self._partial_average,
            "holds_some": self._holds_some,
        }
        if self._window:
            meta_state["window_of"] = self._window_settings
            try:
                if self._ranks.size > 1:
                    raise NotPlain("each process has its own")
                meta_state["window"] = packed(self._window, self._ended, self._around)
            except NotPlain as reason:
                warnings.warn(
                    "state_dict() was called between steps that one hypergradient passes through: "
                    f"{len(self._window)} of {self.unroll} steps are not saved, for {reason}, and "
                    "where the state is loaded, in this run or another, that one passes through "
                    "the others only.",
                    stacklevel=2,
                )
        return {**self.optimizer.state_dict(), "kd_balance": meta_state}

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
        plain = _by_index(plain)
        checkpoint.check_optimizer(plain, self.optimizer)
        if meta_state is None:
            self.optimizer.load_state_dict(plain)
            self._forget_window()
            self._recorder.forget()
            warnings.warn(
                "The checkpoint was written by a plain optimizer: the weight net and its optimizer "
                "start fresh.",
                stacklevel=2,
            )
            return
        checkpoint.check_meta_state(meta_state, self._entries)
        window = self._window_in(meta_state)
        positions = meta_state.get("meta_sets", [self._meta_set.state_dict()])
        if len(positions) == self._ranks.size:  # first, for the loader's own code may fail
            self._meta_set.load_state_dict(positions[self._ranks.rank])
            self._positions = positions if self._ranks.size > 1 else []
        else:
            warnings.warn(
                f"The checkpoint was written by {len(positions)} processes and is loaded by "
                f"{self._ranks.size}: their meta batches begin anew.",
                stacklevel=2,
            )
        self.optimizer.load_state_dict(plain)
        self._forget_window()
        self._recorder.forget()
        if "weight_net" in meta_state:
            self._weight_net.load_state_dict(meta_state["weight_net"])
        teacher_bias = meta_state.get("teacher_bias")
        if self.criterion.teacher_bias is not None and teacher_bias is not None:
            self.criterion.teacher_bias = teacher_bias.to(self.criterion.teacher_bias)
        if "meta_optimizer" in meta_state:
            self.meta_optimizer.load_state_dict(_by_index(meta_state["meta_optimizer"]))
        self._steps = meta_state.get("steps", self._steps)
        self._meta_updates = meta_state.get("meta_updates", self._meta_updates)
        self._meta_loss_start = meta_state.get("meta_loss_start", self._meta_loss_start)
        if "skipped" in meta_state:
            self._skipped.load_state_dict(meta_state["skipped"])
        self._holds_some = meta_state.get("holds_some", self._holds_some)
        self._accumulated = meta_state.get("accumulated", 0)
        like = zip(meta_state.get("partial_average", []), self.criterion.phi)
        self._partial_average = [part.to(param) for part, param in like]
        if window is not None:
            self._window, self._ended, written = window
            self._structure.written |= written
        self._open_window()

    @property
    def _entries(self) -> dict[str, Callable[[Any], str | None]]:
        """What a checkpoint's entries of the meta level fail to be, or None."""

        def of_meta_optimizer(state: Any) -> None:
            by_index = _by_index(state) if isinstance(state, Mapping) else state
            checkpoint.check_optimizer(by_index, self.meta_optimizer, "meta_optimizer")

        def of_bias(bias: Any) -> str | None:
            own = self.criterion.teacher_bias
            if own is None or bias is None or getattr(bias, "shape", None) == own.shape:
                return None
            return f"one number for each of {len(own)} classes"

        def of_skipped(counts: Any) -> str | None:
            names = self._skipped.state_dict().keys()
            if isinstance(counts, Mapping) and names <= counts.keys():
                return None
            return f"counts of {', '.join(names)}"

        return {
            "weight_net": checkpoint.tensors_like(self._weight_net.state_dict()),
            "teacher_bias": of_bias,
            "meta_optimizer": of_meta_optimizer,
            "meta_sets": checkpoint.positions,
            "steps": checkpoint.count,
            "meta_updates": checkpoint.count,
            "meta_loss_start": checkpoint.number,
            "skipped": of_skipped,
            "holds_some": checkpoint.number,
            "accumulated": checkpoint.count,
            "partial_average": checkpoint.none_or_like(self.criterion.phi),
        }

    @property
    def _around(self) -> Around:
        """What the steps of a window refer to."""
        return Around(self._structure, self._recorder.objects, parts(self.optimizer))

    @property
    def _window_settings(self) -> dict[str, Any]:
        """What a run that goes on with a window has to share with the one that began it."""
        return {
            "method": self.method, "engine": self._engine_name, "unroll": self.unroll,
            "every": self.every, "step_derivative": self.step_derivative,
        }

    def _window_in(
        self, meta_state: Mapping[str, Any]
    ) -> tuple[list[InnerStep], dict[str, Tensor], set[str]] | None:
        """The open window of a checkpoint, if it has one that this run can go on with."""
        if "window_of" not in meta_state:
            return None
        if meta_state["window_of"] != self._window_settings:
            why = f"it is one of {meta_state['window_of']}, and this run's {self._window_settings}"
        elif "window" not in meta_state:
            why = "it is not saved"
        else:
            return unpacked(meta_state["window"], self._around)
        warnings.warn(
            "The checkpoint was written between steps that one hypergradient passes through, and "
            f"what they were is not loaded, for {why}: that one passes through the others only.",
            stacklevel=3,
        )
        return None

    # the steps

    @property
    def _names(self) -> dict[Tensor, str]:
        return self._structure.parameters

    @property
    def _window_position(self) -> int:
        return self._steps % self.every

    @property
    def _in_window(self) -> bool:
        """Whether the hypergradient will pass through the coming step."""
        return self._window_position >= self.every - self.unroll

    def _open_window(self) -> None:
        """Watches the coming step if a hypergradient will pass through it, and the first of all."""
        self._recorder.active = self in _watching and (self._in_window or not self._looked)

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for group in self.param_groups for p in group["params"])

    def _student_step(self, closure: Callable[[], Any] | None = None) -> None:
        self._moved = True
        if closure is not None and _needs_closure(self.optimizer):
            self.optimizer.step(closure)
        else:
            self.optimizer.step()

    def _checked_step(self, closure: Callable[[], Any] | None, *, ends: bool) -> None:
        """The student's step, held against its formula where anything but that may move it.

        Args:
            closure: of the step.
            ends: whether it is the last one of a window.
        """
        known = self.step_derivative == "finite_difference" or is_differentiable(self.optimizer)
        looks = known and (self._is_rare or not runs_unhooked(self.optimizer))
        moved = predicted(self.optimizer) if looks else {}
        length = distance(list(moved.values()), list(moved)) if moved else None
        self._student_step(closure)
        if length is not None:
            self._invariants.moved(list(moved.values()), list(moved), length)
        if not ends:
            held = {n: p.detach() for p, n in self._names.items() if p.grad is not None}
            self._ended = dict(zip(held, copies(list(held.values()))))

    @property
    def _is_rare(self) -> bool:
        """Whether costly checks are due, as at the first window and ever more rarely after it."""
        return self._windows & (self._windows + 1) == 0

    def _warn_once(self, text: str, kind: str = "") -> None:
        if (kind or text) not in self._warned:
            self._warned[kind or text] = text
            warnings.warn(text, stacklevel=_loop_level())

    def _unrelated_step(self, closure: Callable[[], Any] | None) -> None:
        """A step on gradients of other losses alone, in a run that knows the criterion."""
        self._warn_once(
            "A step followed no backward pass of the criterion: it is the plain optimizer's, and "
            "the weight net does not learn from it."
        )
        self._forget_window()
        self._student_step(closure)

    def _forget_window(self) -> None:
        self._window.clear()
        self._ended = {}

    def _look_at_first_step(self, inner: InnerStep) -> None:
        """Goes through a meta update of this step alone: what cannot work shows at once."""
        meta_loss = self._objective.on(self._meta_set.peek(), inner.calls[-1])
        self._share_position()
        self._try_out([inner], meta_loss)

    def _recorded_step(self, inner: InnerStep, closure: Callable[[], Any] | None) -> None:
        """A step in the middle of an unrolled window."""
        inner.update.freeze(grads=True, states=self._engine_name == "unroll")
        self._ranks.agree()
        self._checked_step(closure, ends=False)
        self._window.append(inner)

    def _bilevel_step(self, inner: InnerStep, closure: Callable[[], Any] | None) -> None:
        """The step at the end of a window: student and weight net both move."""
        batch = self._meta_set.draw()
        self._share_position()
        meta_loss = self._objective.on(batch, inner.calls[-1])
        steps = [*self._window, inner]
        for step in steps:
            step.is_rare = self._is_rare
            for call in step.calls:
                call.check_versions()
        if not self._tried:
            self._try_out(steps, meta_loss)
            self._tried = True
        if self.method == "online":
            inner.update.freeze(grads=False, states=self._engine_name == "unroll")
            self._ranks.agree()
            self._checked_step(closure, ends=True)
            self._meta_step(steps, meta_loss)
        else:
            if self._meta_step(steps, meta_loss):
                self._reweigh_gradients(inner)
            self._ranks.agree()
            if self.method == "lookahead":  # a hook of the step is no part of the virtual one
                self._checked_step(closure, ends=True)
                self._invariants.settle()
            else:
                self._student_step(closure)
        self._forget_window()

    def _share_position(self) -> None:
        """Tells all ranks where this one's meta loader is, so that any checkpoint will do."""
        if self._ranks.size > 1:
            self._positions = self._ranks.collect(self._meta_set.state_dict())

    def _try_out(
        self, steps: list[InnerStep], meta_loss: Callable[[Mapping[str, Tensor]], Tensor]
    ) -> None:
        """Goes through the first meta update once before the student moves, for what may fail."""
        _check_one_device(self.student)
        self._objective.try_out(meta_loss)
        last = steps[-1]
        call = last.calls[-1]
        self._invariants.precision = call.precision(last.update.params)
        try:
            self._rehearse(steps, meta_loss)
        except Broken as broken:
            if broken.cause != GRADIENT or self._engine_name == "unroll":
                raise
            if not self._engine.try_without_forward_mode():
                raise
            self._rehearse(steps, meta_loss)
            if self.unroll > 1:  # what backward alone sees has no curvature that either mode knows
                raise ValueError(
                    "forward mode and the backward pass disagree, as they do over torch.no_grad() "
                    f"or a hook within the student's forward, and unroll is {self.unroll}, "
                    "expected a hypergradient through one step: set unroll=1, or remove them."
                ) from broken
            self._warn_once(
                "Forward mode and the backward pass disagree, as they do over torch.no_grad() or "
                "a hook within the student's forward, so hypergradients go through double "
                "backward, which costs more time and memory."
            )
        if self.unroll > 1:
            trained = {n: p for step in steps for n, p in step.update.params.items()}
            self._warn_of_curvature(call, trained)  # some may rest by now
        for own_step in last.update.own_steps:
            if (asymmetry := own_step.asymmetry()) > _ASYMMETRY:
                self._warn_once(
                    "The Jacobian of the optimizer's step is not symmetric, as step_derivative="
                    "'finite_difference' takes it to be: products differ by "
                    f"{100 * asymmetry:.0f} %, so tell kd_balance.inner_step.register_update_rule "
                    "its formula, or set step_derivative='sgd'."
                )
        if self._bias_by_teacher and self._objective.shifts_labels:
            self._warn_once(
                "The loop shifts labels against logits, and the teacher's bias was found without "
                "it: pass a teacher whose logits at each position are those of that position's "
                "label, such as teacher=lambda inputs: teacher(inputs).roll(1, dims=1)."
            )
        self._looked = True

    def _warn_of_curvature(self, call: CriterionCall, params: Mapping[str, Tensor]) -> None:
        """Tells what hypergradients through several steps take for granted."""
        if stops_gradients(call.replay, params):
            self._warn_once(
                "The student detaches what depends on its parameters: that counts as constant in "
                "the curvature too, so hypergradients through several steps miss what the weights "
                "change through it; set unroll=1 to have them exact."
            )
        hooked = [name for name, m in self._structure.student.named_modules()
                  if m._backward_hooks or m._backward_pre_hooks]
        if hooked:
            self._warn_once(
                f"The module {hooked[0] or 'student'} has a backward hook: it counts as one that "
                "changes nothing, so hypergradients through several steps are wrong if it does; "
                "set unroll=1 to have them exact."
            )

    def _rehearse(
        self, steps: list[InnerStep], meta_loss: Callable[[Mapping[str, Tensor]], Tensor]
    ) -> None:
        before = self._live(steps)
        engines = [self._engine]
        if self._engine_name == "unroll" and not (len(steps) == 1 and steps[0].alone):
            engines.insert(0, ENGINES["adjoint"](self._ranks))
        try:
            with self._ranks.together():
                for engine in engines:
                    engine(self.criterion, steps, meta_loss, before, self._invariants)
                self._invariants.settle()
                self._invariants.check()
        except FailedElsewhere:
            raise
        except RuntimeError as error:
            raise ValueError(
                "the hypergradient could not be computed, expected a student whose operators have "
                "a forward-mode or a second derivative: replace the one named here "
                f"({str(error).splitlines()[0]})."
            ) from error

    def _live(self, steps: list[InnerStep]) -> dict[str, Tensor]:
        """The parameters that the steps moved, those that rest by now included, as they are."""
        live = {name: param for param, name in self._names.items()}
        return {name: live[name].detach() for step in steps for name in step.update.params}

    def _meta_step(
        self, steps: list[InnerStep], meta_loss: Callable[[Mapping[str, Tensor]], Tensor]
    ) -> bool:
        """Adds a hypergradient to the average; moves φ when enough are in, and says so."""
        after = self._live(steps)
        if self.method != "online":
            after.update(steps[-1].update.apply())
        loss, hypergradient = self._engine(
            self.criterion, steps, meta_loss, after, self._invariants
        )
        if self._ranks.size > 1:
            norms = torch._foreach_norm([p.detach() for p in self._names])
            told = torch.cat([t.detach().double().flatten() for t in (*norms, *self.criterion.phi)])
            self._invariants.shared(told, *self._ranks.mean([told]))
        holds = self._invariants.settle()
        flat = torch.cat([part.flatten() for part in hypergradient])
        flat = flat.to(exact_dtype(flat.device))  # whose squares fit
        finite = flat.isfinite().all() & loss.isfinite().to(flat.device)
        finite = finite if holds is None else finite & holds
        weights = torch.cat([call.weights for call in steps[-1].calls])
        broken, total, count = self._ranks.mean(
            [n.to(weights.dtype) for n in (~finite, weights.sum(0), weights.any(1).sum())]
        )
        finite = broken == 0
        self._mean_weights = total / count.clamp(min=1 / self._ranks.size)  # 0 where ignored
        if self._accumulated == 0:
            self.meta_optimizer.zero_grad()
        share = [torch.where(finite, gradient, 0) for gradient in hypergradient]
        if self.accumulate > 1:
            share = list(torch._foreach_div(share, self.accumulate))
        if self._partial_average:
            share = list(torch._foreach_add(self._partial_average, share))
        self._partial_average = share
        self._meta_loss, self._hypergradient_norm = loss, flat.norm()
        self._note_start(loss)
        self._skipped.note(finite, loss, flat)
        begun = self._accumulated > 0
        self._holds_some = self._holds_some.to(finite.device) | finite if begun else finite
        self._accumulated += 1
        if finite.device.type == "cpu":
            self._tell_if_all_skipped()
        if self._accumulated < self.accumulate:
            return False
        for param, gradient in zip(self.criterion.phi, self._partial_average, strict=True):
            param.grad = gradient
        self._step_weight_net(self._holds_some)
        self._partial_average = []
        self._accumulated = 0
        self._meta_updates += 1
        return True

    @property
    def _windows(self) -> int:
        """That are over."""
        return self._meta_updates * self.accumulate + self._accumulated

    def _note_start(self, loss: Tensor) -> None:
        if (windows := self._windows) < _FIRST:
            start = self._meta_loss_start.to(loss)
            start = torch.where(start.isfinite(), start, loss)
            mean = start + (loss - start) / (windows + 1)
            self._meta_loss_start = torch.where(loss.isfinite(), mean, start)

    def _step_weight_net(self, taken: Tensor) -> None:
        """Takes the step of φ, or none where nobody may wait to learn that it is not to be taken.

        Args:
            taken: a bool on φ's device.
        """
        self._skipped.note_step(taken)
        if taken.device.type == "cpu":
            if taken:
                self.meta_optimizer.step()
            return
        states = self.meta_optimizer.state.values()
        held = [p.detach() for p in self.criterion.phi]
        held += [x for state in states for x in state.values() if isinstance(x, Tensor)]
        held = [x for x in held if x.device == taken.device]
        before = copies(held)
        self.meta_optimizer.step()
        for now, old in zip(held, before, strict=True):
            now.copy_(torch.where(taken, now, old))

    def _skip_causes(self) -> dict[str, float]:
        return {**self._skipped.counts(), **self._invariants.counts()}

    def _tell_if_all_skipped(self) -> None:
        if (windows := self._windows) < _FIRST or self._skipped.updates < windows:
            return
        causes = ", ".join(f"{cause}: {n:.0f}" for cause, n in self._skip_causes().items() if n)
        self._warn_once(
            f"All {windows} meta updates so far were skipped ({causes}), so the weight net learns "
            "nothing: look for nan and inf in the meta batches and in what becomes of them.",
            "all skipped",
        )

    def _reweigh_gradients(self, inner: InnerStep) -> None:
        """Turns the student's gradients into those under the new φ, in place."""
        leaves = {name: p.detach().requires_grad_() for name, p in inner.update.params.items()}
        grads = inner.update.grads
        changes: dict[str, Tensor] = {}
        for call in inner.calls:
            with torch.no_grad():
                weights = self.criterion.weigh(call.features, call.weights, call.kept)
            with torch.enable_grad(), LoopBackward():
                losses = call.losses(self.criterion, call.replay(leaves))
                change = self.criterion.combine(
                    losses, weights - call.weights, call.kept, call.targets
                )
                gradients = torch.autograd.grad(
                    change, list(leaves.values()), call.upstream, allow_unused=True
                )
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    changes[name] = changes[name] + gradient if name in changes else gradient
        for name, change in self._ranks.mean_by_name(changes, grads).items():
            grads[name].add_(change)
        self.criterion.reweigh()

    def _check_calls(self, recording: Recording) -> None:
        calls = recording.calls
        if not calls:
            raise ValueError(
                "step() was called and no result of the criterion went through backward() since "
                "the last step, expected one: compute the loss with the criterion that this "
                "optimizer was given, on the output of the student that it was given, and step "
                "the wrapped optimizer itself in a warm-up without the criterion."
            )
        if self._grad_scaler is None:
            for call in calls:
                # on an accelerator the check would wait for the device: see metrics
                if call.result.device.type == "cpu":
                    _check_finite(call)

    def _undo_loss_scale(self, recording: Recording) -> float:
        """Takes the scaler's factor out of the recorded calls, and returns it."""
        if self._grad_scaler is None or not self._grad_scaler.is_enabled():
            return 1.0
        scale = self._grad_scaler.get_scale()
        for call in recording.calls:
            assert call.upstream is not None
            call.upstream = call.upstream / scale
        return scale

    def _clipping(self, loss_scale: float) -> Clipping | None:
        clipping = self._gradients.clipping(self._names, loss_scale)
        if clipping is not None and self.method != "online":
            if clipping.is_rescaling:
                raise ValueError(
                    f"the gradients were multiplied by {clipping.factor} between backward() and "
                    f"step() and method is {self.method!r}, expected to know of it: pass the "
                    "loop's GradScaler as grad_scaler=."
                )
            raise ValueError(
                f"the gradients were clipped and method is {self.method!r}, expected 'online': the "
                "gradients recomputed under the new weights could not be clipped the same way."
            )
        return clipping


def _loop_level() -> int:
    """How many calls above the caller's the loop is, which torch's and this package's stand in."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _OF_PACKAGES.match(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def _modes_of_our_own(device: torch.device) -> Iterator[None]:
    """Gradients on and autocast off, whatever the loop calls step() within."""
    with torch.inference_mode(False), torch.enable_grad():
        with torch.autocast(device.type, enabled=False):
            yield


def _check_finite(call: CriterionCall) -> None:
    assert call.upstream is not None
    if not call.result.isfinite().all():
        of_net = call.recorded_losses.isfinite().all() and not call.weights.isfinite().all()
        where = (
            "the weight net's parameters"
            if of_net
            else "the inputs, and in the student's or teacher's logits, such as a class that is "
            "−inf in the student's alone"
        )
        value = call.result[~call.result.isfinite()].flatten()[0].item()
        raise ValueError(
            f"the criterion returned {value}, expected a finite loss: look for nan or inf in "
            f"{where}."
        )
    if not call.upstream.isfinite().all():
        value = call.upstream[~call.upstream.isfinite()].flatten()[0].item()
        raise ValueError(
            f"the criterion's result was multiplied by {value} before the backward pass, expected "
            "a finite number: look at the factors of the loss."
        )


def _window(method: str, unroll: int | None, every: int | None) -> tuple[int, int]:
    """The sizes given; one left out fits the other, and method "paper" has the paper's."""
    most, length = (1, 1) if method == "paper" else (UNROLL, EVERY)
    if every is None:
        every = max(length, unroll) if isinstance(unroll, int) else length
    if unroll is None:
        unroll = min(most, every) if isinstance(every, int) else most
    return unroll, every


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}.")


def _weight_net_of(criterion: WeightedKDLoss) -> nn.Module:
    if not isinstance(criterion, WeightedKDLoss):
        raise TypeError(
            f"criterion is {type(criterion).__name__}, expected a WeightedKDLoss: put your own "
            "losses into its hard_loss and soft_loss."
        )
    if criterion.weight_net is None:
        raise ValueError(
            "criterion has no weight_net, expected one to train: write "
            "WeightedKDLoss(MetaWeightNet(), …)."
        )
    if not criterion.phi:
        raise ValueError(
            f"weight_net is a {type(criterion.weight_net).__name__} without a parameter that "
            "requires a gradient, expected one to train: leave some unfrozen, or keep the plain "
            "optimizer."
        )
    return criterion.weight_net


def _by_index(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state by numbers, which torch.distributed.checkpoint turns into strings."""
    found = dict(state_dict)
    if isinstance(found.get("state"), Mapping):
        found["state"] = {
            int(k) if isinstance(k, str) and k.isdigit() else k: v
            for k, v in found["state"].items()
        }
    if isinstance(found.get("optimizers"), list):
        found["optimizers"] = [
            _by_index(part) if isinstance(part, Mapping) else part for part in found["optimizers"]
        ]
    return found


def _supersede_wrapper_of(student: nn.Module) -> None:
    """Closes an older wrapper of the same student, as a second run of a loop leaves behind."""
    for other in list(_watching):
        if replayable(other.student) is student:
            other.close()
            other._superseded = True


def _check_optimizer(optimizer: Optimizer, method: str, step_derivative: str) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is {type(optimizer).__name__}, expected a torch.optim.Optimizer."
        )
    within = getattr(optimizer, "optimizer", None)
    needs_formula = method != "paper" and step_derivative == "exact"
    differentiable = not needs_formula or is_differentiable(optimizer)
    if isinstance(optimizer, BilevelOptimizer) or (
        isinstance(within, Optimizer) and not differentiable
    ):
        raise ValueError(
            f"optimizer is {type(optimizer).__name__} around {type(within).__name__}, expected the "
            "innermost optimizer: wrap that one, and prepare or wrap the BilevelOptimizer "
            "afterwards."
        )
    if any(isinstance(part, torch.optim.SparseAdam) for part in parts(optimizer)):
        raise ValueError(
            "optimizer is SparseAdam, which steps along sparse gradients alone, expected dense "
            "ones: make embeddings with sparse=False, and use Adam."
        )
    if method != "paper" and any(map(_needs_closure, parts(optimizer))):
        raise ValueError(
            f"optimizer is {type(optimizer).__name__}, whose step computes the loss several times, "
            "expected steps along one gradient: set method='paper', which works with any."
        )
    if not differentiable:
        known = {*map(full_name, DIFFERENTIABLE), *known_optimizers()}
        theirs = sorted(name.split(".")[-1] for name in known if name.startswith("torch.optim."))
        others = sorted(name for name in known if not name.startswith("torch.optim."))
        kinds = " and ".join(full_name(type(part)) for part in parts(optimizer))
        raise ValueError(
            f"optimizer is {kinds}, whose step's derivative is not known; "
            f"expected torch.optim's {', '.join(theirs)}, or {', '.join(others)}: set "
            "step_derivative='finite_difference' or 'sgd', tell "
            "kd_balance.inner_step.register_update_rule of it, or set method='paper', which works "
            "with any."
        )
    plain_sgd = method == "paper" or step_derivative == "sgd"
    if plain_sgd and any(group.get("lr", 0) is None for group in optimizer.param_groups):
        raise ValueError(
            f"lr is None in a group of {full_name(type(optimizer))}, whose step was to be taken "
            "for plain SGD's, expected a number: give it an lr and relative_step=False, or keep "
            "method='online' and step_derivative='exact'."
        )
    if needs_formula and any(type(part) is torch.optim.Rprop for part in parts(optimizer)):
        warnings.warn(
            "Rprop's step follows the signs of the gradients, whose derivative is zero, so the "
            "weight net learns nothing from it: set step_derivative='sgd'.",
            stacklevel=4,
        )


def _check_parameters(
    optimizer: Optimizer, names: Mapping[Tensor, str], weight_net: nn.Module
) -> None:
    params = {p for group in optimizer.param_groups for p in group["params"]}
    if any(p in params for p in weight_net.parameters()):
        raise ValueError(
            "optimizer holds parameters of the weight net, expected the student's alone: the "
            "weight net has a meta_optimizer of its own."
        )
    if not any(p in params for p in names):
        raise ValueError(
            "optimizer holds no parameter of the student, expected the optimizer that moves it: "
            "wrap that one, and give the same student."
        )


def _check_one_device(student: nn.Module) -> None:
    replicas = len(student.device_ids or ()) if isinstance(student, nn.DataParallel) else 1
    devices = max(replicas, len({p.device for p in student.parameters()}))
    if devices > 1:
        raise ValueError(
            f"student runs on {devices} devices at once, expected one: train it with one process "
            "for each, in DistributedDataParallel."
        )


def _check_modules(student: nn.Module) -> None:
    for name, module in student.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"student holds a ScriptModule ({name or 'itself'}), which cannot be repeated "
                "under other parameters, expected ordinary modules: use torch.compile in place of "
                "torch.jit.script."
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ValueError(
                f"student has sparse gradients ({name}), expected dense ones: make the embedding "
                "with sparse=False."
            )


def _has_hooks(param: Tensor) -> bool:
    return bool(param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None))


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
