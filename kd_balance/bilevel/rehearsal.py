"""The first meta update, gone through before the student moves: what cannot work shows at once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kd_balance.bilevel.arguments import check_one_device
from kd_balance.bilevel.meta_update import MetaLossOfParams, MetaUpdate
from kd_balance.bilevel.settings import Settings
from kd_balance.distributed import FailedElsewhere, Ranks
from kd_balance.hypergradient import ENGINES
from kd_balance.inner_step import InnerStep
from kd_balance.invariants import GRADIENT, Broken
from kd_balance.loop_warnings import LoopWarnings
from kd_balance.meta import MetaObjective
from kd_balance.record import CriterionCall
from kd_balance.replay import Structure, stops_gradients
from kd_balance.torch_private import has_backward_hooks

_ASYMMETRY = 0.01  # of a step's Jacobian, relative


class Rehearsal:
    """Computes a hypergradient that is not used, and tells what it takes for granted.

    Args:
        student: as it was given.
        meta_update: that is rehearsed.
        objective: of the meta loss.
        bias_by_teacher: whether the criterion's teacher bias was found by a teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        structure: Structure,
        meta_update: MetaUpdate,
        objective: MetaObjective,
        bias_by_teacher: bool,
        settings: Settings,
        ranks: Ranks,
        warnings: LoopWarnings,
    ) -> None:
        self.of_step = False
        """Whether it went through a step alone."""
        self.of_window = False
        """Whether it went through a whole window."""
        self._student = student
        self._structure = structure
        self._meta_update = meta_update
        self._objective = objective
        self._bias_by_teacher = bias_by_teacher
        self._settings = settings
        self._ranks = ranks
        self._warnings = warnings

    def go_through(self, steps: list[InnerStep], meta_loss: MetaLossOfParams) -> None:
        """Goes through it once.

        Raises:
            ValueError: the hypergradient of these steps cannot be computed, or breaks an invariant.
        """
        check_one_device(self._student)
        live = self._meta_update.live(steps)
        self._objective.try_out(meta_loss, live)
        last = steps[-1]
        call = last.calls[-1]
        self._meta_update.invariants.precision = call.precision(live)
        try:
            self._compute(steps, meta_loss, live)
        except Broken as broken:
            if broken.cause != GRADIENT or self._settings.engine == "unroll":
                raise
            self._compute_without_forward_mode(steps, meta_loss, live, broken)
        if self._settings.unroll > 1:
            self._warn_of_curvature(call, live)
        self._warn_of_asymmetry(last)
        if self._bias_by_teacher and self._objective.shifts_labels:
            self._warnings.once(
                "The loop shifts labels against logits, and the teacher's bias was found without "
                "it: pass a teacher whose logits at each position are those of that position's "
                "label, such as teacher=lambda inputs: teacher(inputs).roll(1, dims=1)."
            )
        self.of_step = True

    def _compute(
        self, steps: list[InnerStep], meta_loss: MetaLossOfParams, before: Mapping[str, Tensor]
    ) -> None:
        update = self._meta_update
        engines = [update.engine]
        if self._settings.engine == "unroll" and not (len(steps) == 1 and steps[0].alone):
            engines.insert(0, ENGINES["adjoint"](self._ranks))
        try:
            with self._ranks.together():
                for engine in engines:
                    engine(update.criterion, steps, meta_loss, before, update.invariants)
                update.invariants.settle()
                update.invariants.check()
        except FailedElsewhere:
            raise
        except RuntimeError as error:
            raise ValueError(
                "the hypergradient could not be computed, expected a student whose operators have "
                "a forward-mode or a second derivative: replace the one named here "
                f"({str(error).splitlines()[0]})."
            ) from error

    def _compute_without_forward_mode(
        self,
        steps: list[InnerStep],
        meta_loss: MetaLossOfParams,
        live: Mapping[str, Tensor],
        broken: Broken,
    ) -> None:
        if not self._meta_update.engine.try_without_forward_mode():
            raise broken
        self._compute(steps, meta_loss, live)
        if self._settings.unroll > 1:  # what backward alone sees has no curvature either mode knows
            raise ValueError(
                "forward mode and the backward pass disagree, as they do over torch.no_grad() "
                f"or a hook within the student's forward, and unroll is {self._settings.unroll}, "
                "expected a hypergradient through one step: set unroll=1, or remove them."
            ) from broken
        self._warnings.once(
            "Forward mode and the backward pass disagree, as they do over torch.no_grad() or "
            "a hook within the student's forward, so hypergradients go through double "
            "backward, which costs more time and memory."
        )

    def _warn_of_curvature(self, call: CriterionCall, params: Mapping[str, Tensor]) -> None:
        """Tells what hypergradients through several steps take for granted."""
        if stops_gradients(call.replay, params):
            self._warnings.once(
                "The student detaches what depends on its parameters: that counts as constant in "
                "the curvature too, so hypergradients through several steps miss what the weights "
                "change through it; set unroll=1 to have them exact."
            )
        modules = self._structure.student.named_modules()
        hooked = [name for name, module in modules if has_backward_hooks(module)]
        if hooked:
            self._warnings.once(
                f"The module {hooked[0] or 'student'} has a backward hook: it counts as one that "
                "changes nothing, so hypergradients through several steps are wrong if it does; "
                "set unroll=1 to have them exact."
            )

    def _warn_of_asymmetry(self, step: InnerStep) -> None:
        for own_step in step.update.own_steps:
            if (asymmetry := own_step.asymmetry()) > _ASYMMETRY:
                self._warnings.once(
                    "The Jacobian of the optimizer's step is not symmetric, as step_derivative="
                    "'finite_difference' takes it to be: products differ by "
                    f"{100 * asymmetry:.0f} %, so tell kd_balance.inner_step.register_update_rule "
                    "its formula, or set step_derivative='sgd'."
                )
