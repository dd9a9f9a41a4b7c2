"""What the calls of the student and the criterion leave behind for a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kd_balance.backward import ignore, watch
from kd_balance.distributed import Ranks, called_module, through_sink
from kd_balance.gradients import Gradients
from kd_balance.hooks import WeakHook
from kd_balance.logits import Edge, Recorded, Retraced, Untraceable
from kd_balance.loss import WeightedKDLoss
from kd_balance.loss_graph import leaves, surroundings
from kd_balance.replay import Structure, StudentCall, leaves_of
from kd_balance.replay.dropout import draw_as_usual, draw_plainly
from kd_balance.replay.memory_format import ReplayFormat
from kd_balance.replay.precision import coarsest_format
from kd_balance.replay.uncompiled import is_compiled, run_compiled, run_uncompiled
from kd_balance.torch_private import (
    has_post_accumulate_hooks,
    is_replica,
    tree_leaves,
    tree_map,
    writes_to,
)


@dataclass
class Leaf:
    """The tensor at one place of what a call returned."""

    place: int

    def __call__(self, output: Any) -> Tensor:
        return leaves_of(output)[self.place]


@dataclass
class Cast:
    """A tensor in another number format, if need be."""

    dtype: torch.dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)


@dataclass
class Output:
    """One tensor that a call of the student returned."""

    call: StudentCall
    pick: Callable[[Any], Tensor]
    """Out of all that the call returned."""
    value: Tensor | None
    """What it held, as long as a replay is to be compared with it."""
    version: int
    shape: torch.Size
    device: torch.device

    @classmethod
    def leaf(cls, call: StudentCall, index: int, value: Tensor) -> Output:
        return cls.of(call, Leaf(index), value)

    @classmethod
    def of(cls, call: StudentCall, pick: Callable[[Any], Tensor], value: Tensor) -> Output:
        return cls(call, pick, value.detach(), writes_to(value), value.shape, value.device)

    @property
    def unwritten(self) -> Tensor | None:
        """What it held, where that is known and the loop has not written to it in place."""
        value = self.value
        return value if value is not None and writes_to(value) == self.version else None


@dataclass
class Made:
    """How a tensor that the criterion was given is made of the student's outputs."""

    places: list[int]
    """Of these outputs among those of the call."""
    function: Callable[..., Tensor]
    retraced: Retraced | Untraceable | None
    """The function for another batch, or why it is not known; None where it is the output."""

    def of(self, outputs: Sequence[Tensor]) -> Tensor:
        return self.function(*(outputs[i] for i in self.places))


@dataclass
class CriterionCall:
    """One call of the criterion on tensors made of what recorded student calls returned."""

    outputs: list[Output]
    logits: Made
    teacher_logits: Any  # a tensor, or as the criterion takes several teachers
    targets: Tensor
    terms: dict[str, Any]
    """What other terms were given by name; tensors of the student's are :class:`Made`."""
    kept: Tensor | None  # [N] or [N, K], what counts; None where all does
    features: Tensor  # [N, F]
    weights: Tensor  # [N, K]
    recorded_losses: Tensor  # [N, K], detached
    result: Tensor  # what the criterion returned, detached
    classes: int
    class_dim: int  # of the logits
    versions: list[tuple[str, Tensor, int]] = field(default_factory=list)
    """What a replay reads later, and the count of its in-place writes at the time of the call."""
    upstream: Tensor | None = None
    """d(what backward was called on) / d(the criterion's result); None before backward."""
    reached: frozenset[int] | None = None
    """The ids of the tensors that backward was called for by ``inputs=``; None for all."""

    @property
    def of_logits(self) -> list[Output]:
        """The outputs that the logits are made of."""
        return [self.outputs[i] for i in self.logits.places]

    @property
    def student_call(self) -> StudentCall:
        """The last one that the logits are made of."""
        return self.of_logits[-1].call

    def replay(self, params: Mapping[str, Tensor]) -> list[Tensor]:
        """What the student would have returned under other parameters."""
        calls = {id(output.call): output.call for output in self.outputs}
        returned = {key: call.replay(params) for key, call in calls.items()}
        return [output.pick(returned[id(output.call)]) for output in self.outputs]

    def precision(self, params: Mapping[str, Tensor]) -> torch.dtype:
        """The coarsest number format on the way to the outputs, autocast within forward seen."""
        leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
        with torch.enable_grad():
            outputs = self.replay(leaves)
        return coarsest_format(outputs, list(leaves.values()))

    def losses(self, criterion: WeightedKDLoss, outputs: Sequence[Tensor]) -> Tensor:
        """Per-sample losses [N, K] of this call, had the student returned these outputs."""
        terms = self.terms and tree_map(
            lambda given: given.of(outputs) if isinstance(given, Made) else given, self.terms
        )
        logits = self.logits.of(outputs)
        return criterion.losses(logits, self.teacher_logits, self.targets, **terms)

    def replayed(
        self, outputs: Sequence[Tensor], losses: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What a replay gave beside what was recorded."""
        if not self.is_recorded:
            return [losses], [self.recorded_losses]
        pairs = zip(outputs, (output.unwritten for output in self.outputs), strict=True)
        known = [(output, value) for output, value in pairs if value is not None]
        return (
            [losses, *(output for output, _ in known)],
            [self.recorded_losses, *(value for _, value in known)],
        )

    def note_versions(self) -> None:
        """Counts the in-place writes so far to what a replay reads."""
        given: list[Any] = [(output.call.args, output.call.kwargs) for output in self.outputs]
        kinds = {
            "an input": given,
            "teacher_logits": self.teacher_logits,
            "targets": self.targets,
            **self.terms,
        }
        named = [(n, x) for n, of in kinds.items() for x in leaves_of(of) if isinstance(x, Tensor)]
        self.versions = [(name, x, writes_to(x)) for name, x in named if not x.is_inference()]

    def check_versions(self) -> None:
        """Looks for writes; waits for nothing.

        Raises:
            ValueError: a tensor that the call was given holds other values now.
        """
        for name, tensor, version in self.versions:
            if writes_to(tensor) != version:
                raise ValueError(
                    f"{name} of shape {tuple(tensor.shape)} was written in place since the forward "
                    "pass, expected its values until the hypergradient is computed: give the "
                    "student and the criterion a copy, .clone(), of a buffer that is used again."
                )

    @property
    def is_recorded(self) -> bool:
        """Whether something is made of the outputs that replays would give whatever these are."""
        made = [self.logits, *(x for x in tree_leaves(self.terms) if isinstance(x, Made))]
        return any(isinstance(tensor.function, Recorded) for tensor in made)

    def part_of(
        self, by_name: Mapping[str, Tensor], ids: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """What belongs to the parameters that backward reached from this call."""
        if self.reached is None:
            return dict(by_name)
        return {n: x for n, x in by_name.items() if ids.get(n) in self.reached}

    def walked(self, upstream: Tensor, reached: frozenset[int] | None) -> None:
        """Notes a backward pass through the result.

        Raises:
            ValueError: it reached some other parameters than the one before it.
        """
        if self.upstream is None:
            self.upstream, self.reached = upstream, reached
        elif self.reached == reached:
            self.upstream = self.upstream + upstream
        elif (
            self.reached is not None
            and reached is not None
            and not self.reached & reached
            and torch.equal(self.upstream, upstream)
        ):
            self.reached |= reached
        else:
            raise ValueError(
                "backward passes through one result of the criterion reached different parameters "
                "(inputs=), expected the same ones, or each parameter once: call backward on it "
                "once."
            )


@dataclass(eq=False)
class _Kept:
    """What an autograd graph keeps of a call, until a step empties it."""

    call: Any


@dataclass
class Recording:
    """What is known of the gradients that a step is about to use."""

    calls: list[CriterionCall] = field(default_factory=list)
    alone: bool = True
    """Whether nothing but these calls reached the student's gradients."""
    factor_learns: bool = False
    """Whether a result was multiplied by something made of the student's parameters."""
    complaint: ValueError | None = None
    """Why it cannot be repeated."""


class Recorder:
    """Watches the calls of student and criterion and keeps what a replay needs.

    A student call is kept by the graph of its output, a criterion call by that of its result, so
    what the loop drops is gone. From its backward pass until it is taken, or its gradient is
    cleared, a criterion call is held here.
    """

    def __init__(
        self,
        student: nn.Module,
        structure: Structure,
        criterion: WeightedKDLoss,
        gradients: Gradients,
        to_logits: Callable[[Any], Tensor] | None,
        ranks: Ranks,
    ) -> None:
        self._to_logits = to_logits
        self._ranks = ranks
        self._mark = object()  # in graphs, which must not keep this object alive
        self._active = False
        self._uncompiled = False
        self._student = student
        self._gradients = gradients
        self._structure = structure
        self._criterion = criterion
        self._format = ReplayFormat(structure.student)
        self._entered: StudentCall | None = None
        self._versions: list[int] = []
        self._kept: WeakSet[_Kept] = WeakSet()
        self._walking: dict[int, tuple[CriterionCall, Tensor]] | None
        self._forget()
        called, first = called_module(student), structure.shards is not None  # before FSDP's
        self._handles = [
            called.register_forward_pre_hook(
                WeakHook(self._before_student), with_kwargs=True, prepend=first
            ),
            called.register_forward_hook(WeakHook(self._after_student), with_kwargs=True),
            criterion.register_forward_hook(WeakHook(self._after_criterion), with_kwargs=True),
        ]

    def _forget(self) -> None:
        self._walking = None
        self._recording = Recording()
        self._by_hand = Recording()  # of torch.autograd.grad, which leaves nothing in .grad
        self._walked_by_hand: dict[int, tuple[CriterionCall, Tensor]] = {}
        self._gradients.forget()

    @property
    def active(self) -> bool:
        """Whether the coming step is watched."""
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        self._active = active
        if active:
            draw_plainly(self)
            watch(self, "around_pass")
        else:
            draw_as_usual(self)
            ignore(self)
        if active and self._uncompiled:
            run_uncompiled(self)
        else:
            run_compiled(self)

    def try_uncompiled(self) -> bool:
        """Runs a compiled student uncompiled while active; False if it did so, or is none."""
        tries = not self._uncompiled and is_compiled(self._student)
        self._uncompiled |= tries
        return tries

    def take(self) -> Recording:
        """The calls whose results went through backward since the last time.

        Those that only :func:`torch.autograd.grad` went through count where nothing else did: the
        loop has put the gradients in place itself.

        Raises:
            ValueError: what the loop's backward passes did cannot be repeated.
        """
        recording = self._recording
        if not recording.calls and recording.complaint is None and self._walked_by_hand:
            recording = self._by_hand
            if not self._gradients.untouched:
                recording.complaint = ValueError(
                    "only torch.autograd.grad went through the criterion's result while another "
                    "loss went through backward(), expected one of the two for both: call "
                    "backward() on the criterion's result too, or probe it after step()."
                )
            for call, upstream in self._walked_by_hand.values():
                call.walked(upstream, None)
                recording.calls.append(call)
        if recording.complaint is not None:
            self.forget()
            raise recording.complaint
        self._let_go()
        return recording

    @property
    def complains(self) -> bool:
        """Whether the coming step cannot be repeated."""
        return self._recording.complaint is not None

    @property
    def objects(self) -> dict[str, Any]:
        """What its records refer to beside the student's structure, by name."""
        return {"to_logits": self._to_logits, "format": self._format}

    def forget(self) -> None:
        """Begins a new step."""
        self._let_go()
        self._forget()

    def _let_go(self) -> None:
        """Empties what the loop's graphs keep, which may outlive the step."""
        for kept in self._kept:
            kept.call = None

    def gradients_cleared(self) -> None:
        """Forgets the calls whose gradients are gone."""
        if self._recording.calls:
            self._ranks.give_up_step()
        for call in self._recording.calls:
            call.upstream, call.reached = None, None
        self._forget()

    def close(self) -> None:
        """Stops watching."""
        self.active = False
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def around_pass(
        self, roots: Sequence[Tensor], inputs: Sequence[Tensor] | None, accumulates: bool
    ) -> Iterator[None]:
        """What a pass through a graph runs within: it adds the calls that it went through."""
        if self._walking is not None:  # of a checkpoint, within another one
            yield
            return
        if accumulates:
            if self._gradients.cleared():  # unseen, of a step that was given up
                self.gradients_cleared()
            self._gradients.begin()
        if inputs is None and not all(p.requires_grad for p in self._structure.parameters):
            inputs = [p for p in self._structure.parameters if p.requires_grad]
        reached = None if inputs is None else frozenset(map(id, inputs))
        learns = reached is None or any(id(p) in reached for p in self._structure.parameters)
        self._walking = {}
        try:
            yield
        except BaseException:
            if accumulates:
                self._forget()
            raise
        finally:
            walked, self._walking = self._walking, None
        if not learns:
            return
        if not accumulates:
            self._walked_by_hand.update(walked)
            if walked:
                self._look_around(roots, walked, self._by_hand)
            return
        self._gradients.end()
        self._look_around(roots, walked, self._recording)
        try:
            if walked:
                _check_hooks(self._structure.parameters)
            for call, upstream in walked.values():
                if call.upstream is None:
                    self._recording.calls.append(call)
                call.walked(upstream, reached)
        except ValueError as complaint:
            self._recording.complaint = self._recording.complaint or complaint

    def _look_around(
        self, roots: Sequence[Tensor], walked: Mapping[int, Any], recording: Recording
    ) -> None:
        """Notes what else the gradients are made of, and whether it can be repeated."""
        nodes = [root.grad_fn for root in roots if root.grad_fn is not None]
        try:
            found = surroundings(nodes, self._is_result, self._is_student)
            if found.nonlinear is not None:
                raise ValueError(
                    f"the criterion's result went through {found.nonlinear.lower()} before the "
                    "backward pass, expected sums and factors that do not depend on it: the "
                    "weights would change the factor too, so put the function into hard_loss and "
                    "soft_loss, or leave it out."
                )
        except ValueError as complaint:
            recording.complaint = recording.complaint or complaint
            return
        recording.alone &= found.alone and bool(walked)
        recording.factor_learns |= found.factor_learns

    def _is_result(self, node: Any) -> bool:
        criterion = node.metadata.get(WeightedKDLoss)
        if criterion is None or criterion is self._criterion:
            return criterion is not None
        if criterion.weight_net is self._criterion.weight_net:
            raise ValueError(
                "a second criterion with the same weight_net reached the gradients, expected this "
                "optimizer's alone: give it a weight_net of its own, or none."
            )
        return False

    def _is_output(self, node: Any) -> bool:
        return self._mark in node.metadata

    def _is_student(self, node: Any) -> bool:
        variable = getattr(node, "variable", None)
        return self._is_output(node) or self._structure.is_parameter(variable)

    def _before_student(
        self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if is_replica(student):
            raise ValueError(
                "the student is a replica that nn.DataParallel made for one of several devices, "
                "expected the student itself: train on one device, with device_ids of length 1."
            )
        self._criterion.follow(next(self._structure.student.parameters()).device)
        self._entered = None
        if self.active and torch.is_grad_enabled():
            call = StudentCall.about_to_happen(self._structure, args, kwargs, self._format)
            self._ranks.check_call(self._student, self._structure.parameters)
            self._entered = call
            self._versions = self._structure.versions()

    def _after_student(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._entered is None:
            return
        call, self._entered = self._entered, None
        self._structure.note_written(self._versions)
        call.draws_random_numbers = not call.random_state.cpu.equal(torch.get_rng_state())
        for index, leaf in enumerate(leaves_of(output)):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                node: Any = leaf.grad_fn
                outputs = node.metadata.setdefault(self._mark, {})
                outputs[leaf.output_nr] = self._keep(Output.leaf(call, index, leaf))

    def _after_criterion(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor
    ) -> None:
        if not loss.requires_grad:
            return
        for param in self._criterion.phi:  # used by now, and no part of what a loop may clip
            param.grad = None
        if not self.active:
            return
        kept = self._keep(self._criterion_call(loss.detach(), *args, **kwargs))
        held = {p for group in self._gradients.groups for p in group["params"]}
        if any(leaf in held for leaf in leaves([loss.grad_fn], self._is_output)):
            raise ValueError(
                "hard_loss, soft_loss or a term holds a parameter that the optimizer moves, "
                "expected losses of the student's output alone: move it into the student, or give "
                "it to another optimizer."
            )

        def remember(gradient: Tensor) -> None:
            if (call := kept.call) is None:
                return  # a step has passed since the criterion was called
            walked = self._walking
            if walked is None:
                walked = self._walked_by_hand
                self._by_hand.complaint = ValueError(
                    "a pass through the criterion's result began unseen, expected one that can be "
                    "watched: call loss.backward(), or write torch.autograd.grad out instead of "
                    "importing grad by its name."
                )
            gradient = gradient.detach().clone()
            if self._walking is not None and id(call) in walked:
                gradient = walked[id(call)][1] + gradient
            walked[id(call)] = call, gradient

        loss.register_hook(remember)

    def _keep(self, call: Output | CriterionCall) -> _Kept:
        kept = _Kept(call)
        self._kept.add(kept)
        return kept

    def _criterion_call(
        self, result: Tensor, student_logits: Tensor, teacher_logits: Any, targets: Tensor,
        *, sequences: Any = None, given: Any = None, **terms: Any,
    ) -> CriterionCall:  # sequences and what is given are in the features
        features, losses = self._criterion.last_features, self._criterion.last_losses
        assert features is not None and losses is not None
        outputs: list[Output] = []
        class_dim = self._criterion.class_dim_of(student_logits, targets)
        logits = self._logits_made_of(student_logits, class_dim, outputs)
        for name, value in terms.items():
            terms[name] = tree_map(partial(self._given_to, name, outputs), value)
        for call in {id(output.call): output.call for output in outputs}.values():
            self._check_arguments(call)
        made = CriterionCall(
            outputs,
            logits,
            tree_map(_detached, teacher_logits),
            targets,
            terms,
            self._criterion.last_kept,
            features,
            self._criterion.weights,
            losses,
            result,
            student_logits.shape[class_dim],
            class_dim,
        )
        made.note_versions()
        if not made.is_recorded:  # the logits' memory is the loop's to free
            made.outputs = [replace(output, value=None) for output in outputs]
        return made

    def _check_arguments(self, call: StudentCall) -> None:
        """Refuses arguments that are themselves made of the student's parameters."""
        for argument in leaves_of((call.args, call.kwargs)):
            if not isinstance(argument, Tensor) or argument.grad_fn is None:
                continue
            ours = self._structure.is_parameter
            within: set[Any] = set()

            def met(node: Any, within: set[Any] = within) -> bool:
                within.add(self._mark in node.metadata)
                return self._mark in node.metadata

            if any(map(ours, leaves([argument.grad_fn], met))) or True in within:
                raise ValueError(
                    f"the student was given a tensor of shape {tuple(argument.shape)} that carries "
                    "a graph of the student's own parameters, expected plain inputs: compute it "
                    "within the student's forward, or .detach() it."
                )

    def _given_to(self, name: str, outputs: list[Output], given: Any) -> Any:
        """What replays give to a term in the place of what the loop gave it."""
        if isinstance(given, Tensor) and given.grad_fn is not None:
            if found := self._outputs_within(name, given):
                return self._made_of(name, given, found, outputs)
        return _detached(given)

    def _logits_made_of(self, logits: Tensor, class_dim: int, outputs: list[Output]) -> Made:
        """How the logits were made of outputs of the student, which are added to those known."""
        found = self._outputs_within("student_logits", logits)
        if not found:
            raise ValueError(_not_followed("student_logits", logits))
        if self._to_logits is not None:
            if len(calls := {id(output.call): output.call for output in found.values()}) > 1:
                raise ValueError(
                    f"student_logits are made of {len(calls)} calls of the student and to_logits "
                    "is given, expected one: leave to_logits out."
                )
            (call,) = calls.values()
            outputs.append(Output.of(call, self._to_logits, logits))
            return Made([len(outputs) - 1], Cast(logits.dtype), None)
        return self._made_of(
            "student_logits", logits, found, outputs, class_dim=class_dim
        )

    def _made_of(
        self, name: str, tensor: Tensor, found: Mapping[Edge, Output], outputs: list[Output],
        class_dim: int | None = None,
    ) -> Made:
        """How a tensor was made of outputs found in its graph; adds them to those known.

        Args:
            class_dim: of what has to be made of a meta batch too.
        """
        outputs += [out for out in found.values() if all(out is not known for known in outputs)]
        at = {id(output): i for i, output in enumerate(outputs)}
        places = [at[id(output)] for output in found.values()]
        root: Edge = through_sink(tensor.grad_fn, tensor.output_nr)
        node, number = root
        while (node, number) not in found and node.name() == "ToCopyBackward0":
            node, number = through_sink(*node.next_functions[0])
        if (node, number) in found and tensor.device == found[node, number].device:
            return Made(places, Cast(tensor.dtype), None)
        retraced: Retraced | Untraceable = Untraceable(name)
        if class_dim is not None:
            try:
                retraced = Retraced(root, list(found), class_dim)
            except Untraceable as reason:
                retraced = reason
            else:
                if _gives(retraced, list(found.values()), tensor):
                    return Made(places, retraced, retraced)
        try:
            recorded = Recorded(tensor, [GradientEdge(*edge) for edge in found])
        except RuntimeError as error:
            instead = (
                "expected logits that can: pass to_logits=, the function from the student's output "
                "to the logits, or move it into the student"
                if name == "student_logits"
                else "expected what can: move it into the term's function, or into the student"
            )
            raise ValueError(
                f"what the loop made of the student's output for {name} cannot be differentiated "
                f"twice, {instead}."
            ) from error
        return Made(places, recorded, retraced)

    def _outputs_within(self, name: str, tensor: Tensor) -> dict[Edge, Output]:
        """Where in the graph of a tensor outputs of the student stand."""
        found: dict[Edge, Output] = {}
        root: Edge = through_sink(tensor.grad_fn, tensor.output_nr)
        stack, seen = [root], set()
        others = set()
        while stack:
            node, number = edge = stack.pop()
            if node is None or edge in seen:
                continue
            seen.add(edge)
            kept = node.metadata.get(self._mark, {}).get(number)
            if kept is not None and kept.call is not None:
                found[edge] = kept.call
            elif hasattr(node, "variable"):
                others.add(node.variable)
            else:
                stack += reversed(node.next_functions)
        if any(map(self._structure.is_parameter, others)):
            raise ValueError(_not_followed(name, tensor))
        return found


def _gives(function: Retraced, outputs: Sequence[Output], tensor: Tensor) -> bool:
    """Whether a function read off the graph is known to give a tensor of these outputs."""
    values = [value for output in outputs if (value := output.unwritten) is not None]
    if len(values) < len(outputs):
        return False
    with torch.no_grad():
        actual = function(*values)
    if tensor.device.type == "cpu":
        return torch.equal(actual, tensor)
    # comparing would wait for the device: only what is the same memory
    same = actual.data_ptr() == tensor.data_ptr() and actual.shape == tensor.shape
    return same and actual.stride() == tensor.stride() and actual.dtype == tensor.dtype


def _not_followed(name: str, tensor: Tensor) -> str:
    return (
        f"{name} of shape {tuple(tensor.shape)} are made of the student's parameters and of no "
        "tensor that it returned since the last step, expected the student's own output and what "
        "the loop makes of it: give the criterion what the wrapped student returned, and call no "
        "part of it by itself."
    )


def _check_hooks(params: Iterable[Tensor]) -> None:
    """Refuses hooks that take gradients away as they come, as optimizers within backward do."""
    for param in params:
        if param.grad is None and has_post_accumulate_hooks(param):
            raise ValueError(
                f"a hook took away the gradient of a parameter of shape {tuple(param.shape)} "
                "within backward(), as one does that steps an optimizer there, expected gradients "
                "that step() uses: step after backward(), without register_post_accumulate_"
                "grad_hook."
            )


def _detached(given: Any) -> Any:
    return given.detach() if isinstance(given, Tensor) else given
