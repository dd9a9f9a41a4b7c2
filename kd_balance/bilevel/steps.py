"""The student's steps and the weight net's, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kd_balance.bilevel.coming_step import ComingStep
from kd_balance.bilevel.meta_update import MetaUpdate
from kd_balance.bilevel.metrics import Metrics
from kd_balance.bilevel.rehearsal import Rehearsal
from kd_balance.bilevel.settings import Settings
from kd_balance.bilevel.skipped import Skipped
from kd_balance.bilevel.student_step import StudentStep
from kd_balance.bilevel.weight_net_step import WeightNetStep
from kd_balance.bilevel.window import Window
from kd_balance.distributed import Ranks
from kd_balance.gradients import Gradients
from kd_balance.inner_step import InnerStep
from kd_balance.invariants import REPLAY, Invariants
from kd_balance.loop_warnings import LoopWarnings
from kd_balance.loss import WeightedKDLoss
from kd_balance.meta import MetaObjective, MetaSet
from kd_balance.record import Recorder
from kd_balance.replay import RandomState, Structure


class BilevelSteps:
    """What a step of a BilevelOptimizer does, part by part.

    A step that a hypergradient will pass through goes from the recorder to a :class:`ComingStep`;
    the window keeps it until its last step, whose meta update moves the weight net.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        student: nn.Module,
        structure: Structure,
        criterion: WeightedKDLoss,
        meta_set: MetaSet,
        objective: MetaObjective,
        meta_optimizer: Optimizer,
        settings: Settings,
        ranks: Ranks,
        *,
        to_logits: Callable[[Any], torch.Tensor] | None,
        grad_scaler: torch.amp.GradScaler | None,
        bias_by_teacher: bool,
    ) -> None:
        self.optimizer = optimizer
        self.structure = structure
        self.criterion = criterion
        self.meta_set = meta_set
        self.objective = objective
        self.settings = settings
        self.ranks = ranks
        self.closed = False
        self._is_open = False  # a step that is being taken, or that an exception cut off
        self.warnings = LoopWarnings()
        self.invariants = Invariants()
        self.skipped = Skipped()
        self.window = Window(settings)
        self.gradients = Gradients(structure, optimizer)
        self.recorder = Recorder(student, structure, criterion, self.gradients, to_logits, ranks)
        self.coming_step = ComingStep(
            optimizer, structure, self.gradients, self.window, self.invariants, settings,
            grad_scaler, ranks, self.warnings,
        )
        self.student_step = StudentStep(optimizer, structure, self.invariants, settings)
        self.weight_net_step = WeightNetStep(meta_optimizer, criterion, settings, self.skipped)
        self.metrics = Metrics(
            criterion, self.weight_net_step, self.skipped, self.invariants, self.warnings
        )
        self.meta_update = MetaUpdate(
            criterion, structure, self.weight_net_step, self.metrics, self.invariants, settings,
            ranks,
        )
        self.rehearsal = Rehearsal(
            student, structure, self.meta_update, objective, bias_by_teacher, settings, ranks,
            self.warnings,
        )

    def watch_if_due(self) -> None:
        """Watches the coming step if a hypergradient will pass through it, and the first of all."""
        due = self.window.holds_next or not self.rehearsal.of_step
        self.recorder.active = not self.closed and due

    def close(self) -> None:
        """Stops watching."""
        self.recorder.close()
        self.closed = True
        self.watch_if_due()

    def give_up(self) -> None:
        """Forgets the window and what was recorded."""
        self.window.forget()
        self.recorder.forget()

    def take(self, closure: Callable[[], Any] | None) -> None:
        """Takes the student's step and, when its turn has come, the weight net's.

        Args:
            closure: of the loop, which has run unless the optimizer calls it by itself.
        """
        self.student_step.moved, self._is_open = False, True
        watched = self.recorder.active
        if watched and not self._has_gradients() and not self.recorder.complains:
            self.student_step.take(closure)  # of a batch that the loop gave up: nothing moves
            self.student_step.moved = self._is_open = False
            return
        if watched:
            self._take_watched(closure)
        else:
            self.student_step.take(closure)
        self._end()

    def recover(self) -> None:
        """Ends a step that an exception cut off, wherever that was; it may be cut off itself."""
        if self._is_open and not self.student_step.runs_closure:
            self.structure.recover()
            self.invariants.forget()
            self.window.forget()
            self._end()

    def _end(self) -> None:
        """Counts a step if the student has moved, and looks at what comes next."""
        self.recorder.forget()
        self.student_step.moved, self.window.count = (
            False, self.window.count + self.student_step.moved
        )
        self.watch_if_due()
        self._is_open = False

    def _has_gradients(self) -> bool:
        groups = self.optimizer.param_groups
        return any(p.grad is not None for group in groups for p in group["params"])

    def _take_watched(self, closure: Callable[[], Any] | None) -> None:
        """A step that a hypergradient will pass through."""
        before = RandomState.current(next(iter(self.structure.parameters)).device)
        try:
            with self.ranks.together():
                self._take_recorded(closure)
        except BaseException as error:
            before.set()
            moved = self.student_step.moved
            self.recover()
            is_replay = getattr(error, "cause", None) == REPLAY
            if is_replay and not moved and self.recorder.try_uncompiled():
                self.warnings.once(
                    "The compiled student could not be repeated, most likely for its dropout, "
                    "whose random numbers are the compiler's own: it runs uncompiled in the steps "
                    "that hypergradients pass through."
                )
                self.student_step.take(closure)
                return
            raise

    def _take_recorded(self, closure: Callable[[], Any] | None) -> None:
        recording = self.recorder.take()
        none, recording.alone = self.ranks.begin_step(not recording.calls, recording.alone)
        if none and self.rehearsal.of_step:
            self._take_unrelated(closure)
            return
        self.recorder.active = False
        self.structure.refresh()  # layers may have been replaced
        weight_net = self.criterion.weight_net
        assert weight_net is not None
        # a net that keeps its mean has nothing to divide by
        divides = self.weight_net_step.is_rare and getattr(weight_net, "mean", None) is None
        with modes_of_our_own(next(weight_net.parameters()).device):
            inner = self.coming_step.of(recording, divides)
            if self.window.holds_next and not self.window.ends_next:
                self._take_within_window(inner, closure)
                return
            moved = {n for step in (*self.window.steps, inner) for n in step.update.params}
            with self.structure.whole(moved):
                if self.window.ends_next:
                    self._take_last_of_window(inner, closure)
                else:
                    self._take_first(inner, closure)

    def _take_unrelated(self, closure: Callable[[], Any] | None) -> None:
        """On gradients of other losses alone, in a run that knows the criterion."""
        self.warnings.once(
            "A step followed no backward pass of the criterion: it is the plain optimizer's, and "
            "the weight net does not learn from it."
        )
        self.window.forget()
        self.student_step.take(closure)

    def _take_first(self, inner: InnerStep, closure: Callable[[], Any] | None) -> None:
        """The first of all, which no meta update passes through."""
        meta_loss = self.objective.on(self.meta_set.peek(), inner.calls[-1])
        self.meta_set.share_position()
        self.rehearsal.go_through([inner], meta_loss)
        self.ranks.agree()
        self.student_step.take(closure)

    def _take_within_window(self, inner: InnerStep, closure: Callable[[], Any] | None) -> None:
        inner.update.freeze(grads=True, states=self.settings.engine == "unroll")
        self.ranks.agree()
        self.student_step.take_checked(closure, self.weight_net_step.is_rare)
        self.window.ended = self.student_step.left()
        self.window.steps.append(inner)

    def _take_last_of_window(self, inner: InnerStep, closure: Callable[[], Any] | None) -> None:
        """Student and weight net both move."""
        batch = self.meta_set.draw()
        self.meta_set.share_position()
        meta_loss = self.objective.on(batch, inner.calls[-1])
        steps = [*self.window.steps, inner]
        is_rare = self.weight_net_step.is_rare
        for step in steps:
            step.is_rare = is_rare
            for call in step.calls:
                call.check_versions()
        if not self.rehearsal.of_window:
            self.rehearsal.go_through(steps, meta_loss)
            self.rehearsal.of_window = True
        if self.settings.method == "online":
            inner.update.freeze(grads=False, states=self.settings.engine == "unroll")
            self.ranks.agree()
            self.student_step.take_checked(closure, is_rare)
            self.meta_update.make(steps, meta_loss)
        else:
            if self.meta_update.make(steps, meta_loss):
                self.meta_update.reweigh_gradients(inner)
            self.ranks.agree()
            if self.settings.method == "lookahead":  # a step's hook is no part of the virtual one
                self.student_step.take_checked(closure, self.weight_net_step.is_rare)
                self.invariants.settle()
            else:
                self.student_step.take(closure)
        self.window.forget()


@contextmanager
def modes_of_our_own(device: torch.device) -> Iterator[None]:
    """Gradients on and autocast off, whatever the loop calls step() within."""
    with torch.inference_mode(False), torch.enable_grad():
        with torch.autocast(device.type, enabled=False):
            yield
