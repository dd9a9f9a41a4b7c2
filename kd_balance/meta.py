"""The meta objective: the loss on the balanced set that the weight net is trained to lower."""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_balance.distributed import Ranks
from kd_balance.hard_losses import cross_entropy
from kd_balance.logits import Alignment, Unlike, Untraceable, places_behind
from kd_balance.loop_warnings import loop_level
from kd_balance.loss import WeightedKDLoss, check_labels
from kd_balance.record import CriterionCall
from kd_balance.replay import RandomState, StudentCall, leaves_of, preserved_random_state
from kd_balance.torch_private import tree_map

MetaForward = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
MetaLoss = Callable[[Tensor, Tensor], Tensor]
_END = object()


class MetaSet:
    """Endless meta batches out of any iterable, drawn from random numbers of their own.

    Args:
        loader: of this rank's batches.
        ranks: which tell each other where their loaders are.
    """

    def __init__(self, loader: Iterable[Any], ranks: Ranks) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(
                f"meta_loader is {loader!r}, expected an iterable of batches such as a DataLoader."
            )
        if isinstance(loader, Sized) and len(loader) == 0:
            raise ValueError(f"meta_loader {loader!r} is empty, expected at least one batch.")
        self._loader = loader
        self._iterator: Any = None
        self._ranks = ranks
        self._positions: list[Any] = []
        self._seen_ahead: deque[Any] = deque()
        self._random_state = RandomState.current(torch.device("cpu"))

    def draw(self) -> Any:
        """The next batch; the training loop's random numbers stay untouched."""
        if self._seen_ahead:
            return self._seen_ahead.popleft()
        for _ in range(2):
            batch = self._next()
            if batch is not _END:
                return batch
        raise ValueError("meta_loader yields no batch, expected at least one: give it samples.")

    def peek(self) -> Any:
        """The next batch, which will be drawn all the same."""
        if not self._seen_ahead:
            for _ in range(2):
                with self.look_ahead() as batches:
                    for batch in batches:
                        return batch
        return self._seen_ahead[0] if self._seen_ahead else self.draw()

    @contextmanager
    def look_ahead(self) -> Iterator[Iterator[Any]]:
        """The coming batches, to the end of the pass; they will be drawn all the same."""
        position = self.state_dict()
        if position["loader"] is not None and hasattr(self._loader, "load_state_dict"):
            try:
                yield iter(self._next, _END)
            finally:
                self.load_state_dict(position)
        else:  # keep what cannot be had again
            yield map(self._kept_for_later, iter(self._next, _END))

    def _kept_for_later(self, batch: Any) -> Any:
        self._seen_ahead.append(batch)
        return batch

    def _next(self) -> Any:
        """The next batch, or _END after the last of a pass."""
        with preserved_random_state(torch.device("cpu")):
            self._random_state.set()
            if self._iterator is None:
                self._iterator = iter(self._loader)
            batch = next(self._iterator, _END)
            if batch is _END:
                self._iterator = None
            self._random_state = RandomState.current(torch.device("cpu"))
        return batch

    def state_dict(self) -> dict[str, Any]:
        position = self._loader.state_dict() if hasattr(self._loader, "state_dict") else None
        return {"loader": position, "random_state": self._random_state.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen_ahead.clear()
        if state["loader"] is not None and hasattr(self._loader, "load_state_dict"):
            self._loader.load_state_dict(state["loader"])
        self._iterator = None
        self._random_state = RandomState.from_state_dict(state["random_state"])

    @property
    def positions(self) -> list[Any]:
        """Where the loaders of all ranks are, as :meth:`load_positions` takes them."""
        return self._positions or [self.state_dict()]

    def share_position(self) -> None:
        """Tells all ranks where this one's loader is, so that any checkpoint will do."""
        if self._ranks.size > 1:
            self._positions = self._ranks.collect(self.state_dict())

    def load_positions(self, positions: list[Any]) -> None:
        """Goes to where the loader of this rank was."""
        if len(positions) == self._ranks.size:
            self.load_state_dict(positions[self._ranks.rank])
            self._positions = positions if self._ranks.size > 1 else []
        else:
            warnings.warn(
                f"The checkpoint was written by {len(positions)} processes and is loaded by "
                f"{self._ranks.size}: their meta batches begin anew.",
                stacklevel=loop_level(),
            )


class MetaObjective:
    """The meta loss of a batch as a function of the student's parameters.

    Args:
        student: called as the recorded call was.
        criterion: its temperature, class dimension and soft loss are those of the meta loss.
        kind: "hard", "mix", "soft" or ``(student_logits, targets) -> scalar``.
        teacher: ``meta inputs -> teacher_logits``, for "mix" and "soft" and :meth:`by_teacher`.
        forward: ``(student, batch) -> (student_logits, targets)`` for batches of other shapes.
    """

    def __init__(
        self,
        student: nn.Module,
        criterion: WeightedKDLoss,
        kind: str | MetaLoss,
        teacher: Callable[..., Tensor] | None,
        forward: MetaForward | None,
    ) -> None:
        if not callable(kind) and kind not in ("hard", "mix", "soft"):
            raise ValueError(
                f"meta_loss is {kind!r}, expected 'hard', 'mix', 'soft' or a callable "
                "(student_logits, targets) -> scalar."
            )
        if kind in ("mix", "soft") and teacher is None:
            raise ValueError(
                f"meta_loss is {kind!r} and teacher is None, expected a callable from meta inputs "
                "to teacher logits: pass teacher=."
            )
        if kind in ("mix", "soft") and criterion.teachers is not None:
            raise ValueError(
                f"meta_loss is {kind!r} and the criterion has the teachers {criterion.teachers}, "
                "expected one teacher for it: use 'hard' or a callable."
            )
        self.kind = kind
        self._student = student
        self._criterion = criterion
        self._teacher = teacher
        self._forward = forward
        self._alignment = Alignment(criterion.ignore_index)
        self._compared = False

    def on(
        self, batch: Any, training: CriterionCall
    ) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """The meta loss on one batch, student and criterion being called as they were in training.

        Returns:
            A function of the student's parameters by name; those missing are the student's own.

        Raises:
            ValueError: the batch does not fit the recorded call.
        """
        call = training.student_call
        batch = tree_map(lambda x: _brought_to(call.device, x), batch)
        if self._forward is None:
            inputs, targets = _split(batch)
            args, kwargs = _in_place_of(call, inputs)
            ignore = self._criterion.ignore_index
            check_labels("labels of a meta batch", targets, training.classes, ignore)
            if not self._compared:  # once: it waits for the device
                self._compare_labels(training, targets, (args, kwargs))
            if "labels" in call.kwargs:
                kwargs["labels"] = targets
        else:
            inputs = batch
        teacher_logits = None
        if self.kind in ("mix", "soft"):
            with preserved_random_state(call.device):
                teacher_logits = self._teacher_logits(inputs)

        def meta_loss(params: Mapping[str, Tensor]) -> Tensor:
            with preserved_random_state(call.device):
                if self._forward is None:
                    output = call.call(params, args, kwargs)
                    return self._loss(*self._alike(training, output, teacher_logits, targets))
                output = call.through(self._forward, params, (self._student, batch), {})
                return self._loss(output[0], teacher_logits, output[1])

        return meta_loss

    @property
    def shifts_labels(self) -> bool:
        """Whether the loop's targets are those of other positions than its logits are."""
        return bool(self._alignment.shift)

    def _alike(
        self, training: CriterionCall, output: Any, teacher_logits: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits and labels of a meta batch, made as the loop makes those of its own batches."""
        function = training.logits.retraced
        picked = [out.pick(output) for out in training.of_logits]
        if function is None:
            return picked[0], teacher_logits, targets
        if isinstance(function, Untraceable):
            raise Unlike(
                f"the loop makes the logits of the student's output by {function}, whose like for "
                "a meta batch is not known: pass to_logits=, the function from the student's "
                "output to the logits, or meta_forward=."
            )
        if len({id(out.call) for out in training.of_logits}) > 1:
            raise Unlike(
                "the loop makes the logits of several calls of the student, which a meta batch "
                "has no inputs for: pass meta_forward=."
            )
        logits, shape = function(*picked), picked[0].shape
        if teacher_logits is not None and teacher_logits.shape != logits.shape:
            with suppress(RuntimeError, IndexError, ValueError):  # of sizes that do not fit
                made = function(teacher_logits)
                teacher_logits = made if made.shape == logits.shape else teacher_logits
        samples = logits.movedim(training.class_dim, -1).shape[:-1]
        if targets.is_floating_point() or targets.shape == samples:
            return logits, teacher_logits, targets
        given = leaves_of((training.student_call.args, training.student_call.kwargs))
        candidates = [x for x in given if isinstance(x, Tensor)]
        was = training.of_logits[0].shape
        self._alignment.look(function, was, training.targets, candidates)
        return logits, teacher_logits, self._alignment.of(targets, function, shape)

    def _compare_labels(self, training: CriterionCall, targets: Tensor, given: Any) -> None:
        """Refuses labels that are the inputs, where the loop's are the inputs that come next."""
        self._compared = True
        ignored = self._criterion.ignore_index
        call = training.student_call
        theirs = places_behind(training.targets, _inputs(call.args, call.kwargs), ignored)
        if theirs and places_behind(targets, _inputs(*given), ignored) == 0:
            raise Unlike(
                f"the loop's targets are its inputs moved by {theirs} place, and the labels of a "
                "meta batch are its inputs as they are, expected labels as the criterion is given "
                "them: move those of meta batches alike, or pass meta_forward=."
            )

    def try_out(
        self,
        meta_loss: Callable[[Mapping[str, Tensor]], Tensor],
        params: Mapping[str, Tensor],
    ) -> None:
        """Evaluates a meta loss once, so that a misfit shows before the student has moved.

        Raises:
            ValueError: the student cannot be run on the batch, or the loss is no finite scalar.
        """
        try:
            with torch.no_grad():
                loss = meta_loss(params)
        except Unlike:
            raise
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            raise ValueError(
                "the meta loss could not be computed, expected meta batches like the training "
                f"batches, labels included: check what meta_loader yields ({_first_line(error)})."
            ) from error
        if loss.dim() != 0 or not loss.isfinite():
            raise ValueError(
                f"the meta loss is {loss.tolist()}, expected one finite number: check meta_loss "
                "and what meta_loader yields."
            )

    def by_teacher(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The teacher's logits on a meta batch, in evaluation mode, and the labels.

        Raises:
            ValueError: the teacher cannot be run on the batch, or gave no logits.
        """
        device = next(self._student.parameters()).device
        own = self._teacher.parameters() if isinstance(self._teacher, nn.Module) else iter(())
        there = device if self._forward else next((p.device for p in own), device)
        batch = tree_map(lambda x: _brought_to(there, x), batch)
        with preserved_random_state(device), torch.no_grad():
            with _evaluated(self._student), _evaluated(self._teacher):
                if self._forward is None:
                    inputs, targets = _split(batch)
                else:
                    inputs, targets = batch, self._forward(self._student, batch)[1]
                logits = self._teacher_logits(inputs)
                _check_positions(logits, targets, self._criterion)
        return logits, targets.to(logits.device)

    def _teacher_logits(self, inputs: Any) -> Tensor:
        assert self._teacher is not None
        try:
            with torch.no_grad():
                if isinstance(inputs, Mapping) and self._forward is None:
                    logits = self._teacher(**inputs)
                else:
                    logits = self._teacher(inputs)
        except (RuntimeError, TypeError, AttributeError) as error:
            way = (
                "teacher(inputs), or teacher(**inputs) for a mapping: pass teacher=lambda inputs: …"
                if self._forward is None
                else "teacher(batch) beside meta_forward: pass teacher=lambda batch: …"
            )
            raise ValueError(
                "the teacher could not be run on a meta batch, expected to be called as "
                f"{way} ({_first_line(error)})."
            ) from error
        found = [logits] if isinstance(logits, Tensor) else self._like_logits(logits)
        if len(found) != 1:
            raise ValueError(
                f"teacher returned {type(logits).__name__}, expected the tensor of its logits: "
                "pass teacher=lambda inputs: … that picks them."
            )
        return found[0]

    def _like_logits(self, output: Any) -> list[Tensor]:
        """The tensors of a teacher's output that are as wide as the criterion has classes."""
        if hasattr(output, "logits"):
            return [output.logits]
        counts, dim = self._criterion.class_counts, self._criterion.class_dim
        leaves = [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor)]
        matrices = [x for x in leaves if x.dim() == 2 or (x.dim() == 3 and dim in (-1, 2, None))]
        return [x for x in matrices if counts is not None and x.shape[-1] == len(counts)]

    def _loss(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        criterion = self._criterion
        with torch.autocast(logits.device.type, enabled=False):
            if logits.dtype in (torch.half, torch.bfloat16):
                logits = logits.float()
            if callable(self.kind):
                return self.kind(logits, targets)
            loss = logits.new_zeros(())
            if self.kind in ("hard", "mix"):
                class_dim = criterion.class_dim_of(logits, targets)
                classes_second = logits.movedim(class_dim, 1)
                if targets.is_floating_point():
                    pair = (x.movedim(class_dim, -1) for x in (logits, targets))
                    loss = loss + cross_entropy(*(x.flatten(0, -2) for x in pair)).mean()
                else:
                    loss = loss + F.cross_entropy(
                        classes_second, targets, ignore_index=criterion.ignore_index
                    )
            if self.kind in ("soft", "mix"):
                assert teacher_logits is not None
                if isinstance(teacher_logits, Tensor) and teacher_logits.shape != logits.shape:
                    raise Unlike(
                        f"teacher gave logits of shape {tuple(teacher_logits.shape)} for a meta "
                        f"batch whose student logits have shape {tuple(logits.shape)}, {_AS_LOOP}"
                    )
                soft = criterion.soft_losses(logits, teacher_logits, targets)
                kept = criterion.kept(targets)
                if kept is None:
                    loss = loss + soft.mean()
                else:  # picking by a mask would wait for the device
                    loss = loss + torch.where(kept, soft, 0).sum() / kept.sum().clamp(min=1)
            return loss


_AS_LOOP = (
    "expected the same classes and positions: pass teacher=lambda inputs: … that makes of the "
    "teacher's logits what the loop does, such as F.interpolate(teacher(inputs), size=…)."
)


def _check_positions(teacher_logits: Tensor, targets: Tensor, criterion: WeightedKDLoss) -> None:
    shape = list(teacher_logits.shape)
    if len(shape) > 1 and not targets.is_floating_point():
        dim = criterion.class_dim
        if dim is None and len(shape) > 2:
            with suppress(ValueError):
                dim = criterion.class_dim_of(teacher_logits, targets)
        shape.pop(1 if dim is None else dim)
    if shape != list(targets.shape):
        raise ValueError(
            f"teacher gave logits of shape {tuple(teacher_logits.shape)} for meta labels of shape "
            f"{tuple(targets.shape)}, {_AS_LOOP}"
        )


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0].rstrip(".:")


@contextmanager
def _evaluated(function: Any) -> Iterator[None]:
    """A module in evaluation mode, for as long as the context lasts."""
    modules = list(function.modules()) if isinstance(function, nn.Module) else []
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def _brought_to(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=device.type == "cuda")
    return value.to(device) if hasattr(value, "to") else value


def _split(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and labels: the first two of a sequence, or a mapping and its key `labels`."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    held = f"keys {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(
        f"a meta batch is {held}, expected (inputs, labels) or a mapping with the key 'labels': "
        "pass meta_forward=."
    )


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a student is called with, beside labels."""
    return leaves_of((args, {key: value for key, value in kwargs.items() if key != "labels"}))


def _in_place_of(call: StudentCall, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The recorded call's arguments with the meta inputs in the place of the training inputs."""
    args, kwargs = list(call.args), dict(call.kwargs)
    if isinstance(inputs, Mapping) and not (len(args) == 1 and isinstance(args[0], Mapping)):
        params = inspect.signature(call.student.forward).parameters.values()
        names = [p.name for p in params if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if any(isinstance(arg, Tensor) for arg in args[len(names):]):
            raise ValueError(
                "the student was called with tensors by position and its forward has no names for "
                "them, expected names as a mapping has: call it by keywords, "
                f"{', '.join(f'{key}=…' for key in inputs)}, or pass meta_forward=."
            )
        kwargs = {**dict(zip(names, args)), **kwargs}
        left = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in inputs]
        left = [k for k in left if k != "labels"]
        if left:
            raise ValueError(
                f"a meta batch has the keys {list(inputs)}, expected also {left}, which the "
                "student was called with: add them to the meta batches, or pass meta_forward=."
            )
        return (), {**kwargs, **{k: _in_dtype_of(kwargs.get(k), v) for k, v in inputs.items()}}
    alike = Mapping if isinstance(inputs, Mapping) else Tensor
    places = [i for i, arg in enumerate(args) if isinstance(arg, alike)]
    named = [k for k, v in kwargs.items() if isinstance(v, alike) and k != "labels"]
    if not isinstance(inputs, (Tensor, Mapping)) or len(places) + len(named) != 1:
        raise ValueError(
            f"the meta inputs are {type(inputs).__name__} and the student was called with "
            f"{len(places) + len(named)} tensor arguments, expected a tensor for a single one: "
            "yield a mapping by argument name, or pass meta_forward=."
        )
    if places:
        args[places[0]] = _in_dtype_of(args[places[0]], inputs)
    else:
        kwargs[named[0]] = _in_dtype_of(kwargs[named[0]], inputs)
    return tuple(args), kwargs


def _in_dtype_of(replaced: Any, given: Any) -> Any:
    """Casts as the loop did to its own batch, for students in another precision than the data."""
    both = isinstance(replaced, Tensor) and isinstance(given, Tensor)
    if both and replaced.is_floating_point() and given.is_floating_point():
        return given.to(replaced.dtype)
    return given
