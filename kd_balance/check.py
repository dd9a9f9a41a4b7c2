"""A gradcheck of a user's own loop: the hypergradient against the meta loss that it predicts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_balance.bilevel import modes_of_our_own, weight_net_of
from kd_balance.optimizer import BilevelOptimizer
from kd_balance.replay import RandomState, preserved_random_state
from kd_balance.replay.dropout import draw_as_usual, draw_plainly
from kd_balance.snapshot import Snapshot

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 3e-2}
_LESS = 0.1  # of formats below float32
# lengths that φ is moved by: the first, and what each of the others is to the one before
_MOVES = {torch.float64: (1e-5, 1 / 4), torch.float32: (0.4, 1 / 2)}
_LENGTHS = 8
_PARTED = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Report:
    """What :func:`check_hypergradient` found; as a string, one sentence."""

    error: float
    """Relative difference of slope and hypergradient, the largest; nan where it was refused."""
    tolerance: float
    sentence: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return self.sentence


def check_hypergradient(
    optimizer: BilevelOptimizer,
    step: Callable[[Any], Any],
    batches: Iterable[Any],
    *,
    directions: int = 2,
    tolerance: float | None = None,
    raise_exception: bool = True,
) -> Report:
    """Compares the hypergradient of your own loop with what moving φ does to the meta loss.

    Runs the coming window of ``optimizer.unroll`` steps: once as it is, for the hypergradient,
    then by the plain optimizer with φ moved to both sides along random directions, while weights
    keep the features that they were given. The slope of the meta loss, on one batch and to first
    order in what the window makes of the student, is extrapolated from several lengths of the
    move. φ takes no step of its own. A float32 loop is often too coarse for a verdict, and says so:
    a float64 copy of it, ``torch.set_default_dtype(torch.float64)``, knows eight digits.
    For method "lookahead" and "paper" the parameters are those of the virtual step, and the step
    that the student then takes under the new φ is not looked at.

    Everything is put back bit for bit: the student, both optimizers, random numbers, and what
    `step` reaches by its variables (schedulers, scalers, averages, counters). Files, prints and
    iterators are not: take `batches` from a loader of their own.

    Args:
        optimizer: of the loop, at any point between two of its steps.
        step: the body of the loop, called with a batch; it calls ``optimizer.step()`` itself, every
            time or after some micro-batches.
        batches: enough of them for ``optimizer.unroll`` steps.
        directions: random directions that φ is moved along.
        tolerance: relative; default 1e-5 in float64, 0.03 in float32, 0.1 below.
        raise_exception: False to be told by the report alone.

    Returns:
        A report with ``error``, ``passed``, and a sentence as its string.

    Raises:
        RuntimeError: the hypergradient does not predict the meta loss.
        ValueError: the loop was refused, as in training, `batches` are too few, or there are
            several processes.

    Example::

        def step(batch):
            inputs, targets = batch
            loss = criterion(student(inputs), teacher(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        print(check_hypergradient(optimizer, step, loader))

    Source: central differences, extrapolated as by Ridders, "Accurate computation of F'(x) and
    F'(x)F''(x)", Advances in Engineering Software 4(2), 1982.
    """
    if (size := optimizer._steps.ranks.size) > 1:
        raise ValueError(
            f"check_hypergradient was called in {size} processes, expected one: check the loop "
            "there, with the same arguments it is exact in several."
        )
    if optimizer._steps.structure.shards is not None:
        raise ValueError(
            "check_hypergradient was called with a student of shards, expected whole parameters: "
            "check the loop without fully_shard, with the same arguments it is exact with it."
        )
    snapshot = Snapshot(optimizer, step)
    try:
        window = _Window(optimizer, step, batches, snapshot)
        report = window.check(directions, tolerance)
    except ValueError as error:
        if raise_exception:
            raise
        return Report(math.nan, tolerance or 0.0, f"Refused: {error}")
    finally:
        snapshot.restore()
        recorder = optimizer._steps.recorder
        recorder.active = recorder.active  # and what it installs in torch
    if raise_exception and not report.passed:
        raise RuntimeError(str(report))
    return report


class _Window:
    """The coming window of a loop, to be run again and again from one state."""

    def __init__(
        self,
        optimizer: BilevelOptimizer,
        step: Callable[[Any], Any],
        batches: Iterable[Any],
        snapshot: Snapshot,
    ) -> None:
        self._optimizer = optimizer
        self._step = step
        self._snapshot = snapshot
        self._phi = optimizer.criterion.phi
        self._random_state = RandomState.current(next(optimizer.student.parameters()).device)
        self._meta_batch = _next_of(optimizer)
        snapshot.retake()
        self._batches = self._run_watched(batches)

    def check(self, directions: int, tolerance: float | None) -> Report:
        precision = self._precision
        if tolerance is None:
            tolerance = _TOLERANCE.get(precision, _LESS)
        with self._features_kept():
            parted = self._parted()
            if parted > max(_PARTED.get(precision, 1e-2), 0.1 * tolerance):
                return Report(parted, 0.0, (
                    f"The window, run again by the plain optimizer, left a student that differs by "
                    f"{parted:.1g} (relative to its way), expected the same: draw from torch's, "
                    "numpy's and Python's own random generators alone, and let step() reach all "
                    "that it changes by its own variables."
                ))
            errors = [self._along(d) for d in self._directions(directions)]
        error = max(e for e, _ in errors)
        blur = max(b for _, b in errors)
        steps = f"{self._optimizer.unroll} step" + "s" * (self._optimizer.unroll > 1)
        if blur > max(tolerance, error / 10):
            return Report(blur, tolerance, (
                f"The meta loss is too coarse for a check: its slope is known to {blur:.1g} "
                f"(relative) only, expected {tolerance:.1g}: check a float64 copy of the loop, "
                "without autocast, and where that bends too often still, one with unroll=1."
            ))
        if not any(h.any() for h in self._hypergradient) and error == 0:
            return Report(error, tolerance, (
                f"The hypergradient through {steps} is zero, and so is the meta loss's slope: the "
                "weights have no effect here, as with a learning rate of 0, so check another "
                "window."
            ))
        if error <= tolerance:
            return Report(error, tolerance, (
                f"The hypergradient through {steps} predicts the meta loss with a relative error "
                f"of {error:.1g} (tolerance {tolerance:.1g}) along {directions} directions."
            ))
        return Report(error, tolerance, (
            f"The hypergradient through {steps} predicts the meta loss with a relative error of "
            f"{error:.1g}, expected at most {tolerance:.1g}: look for functions of the "
            "criterion's result that are not linear, for factors that learn, for gradients changed "
            "by other things than clipping, and with unroll above 1 for other loss terms."
        ))

    def _run_watched(self, batches: Iterable[Any]) -> list[Any]:
        """Runs the loop as it is, for the hypergradient; returns the batches that it took."""
        optimizer, steps = self._optimizer, self._optimizer._steps
        taken: list[Any] = []
        steps.rehearsal.of_window = False  # so that every check is made
        steps.settings.accumulate = 1
        steps.weight_net_step.begin_anew()
        meta_optimizer = torch.optim.SGD(self._phi, lr=0.0)
        meta_optimizer.register_step_pre_hook(self._keep_hypergradient)
        optimizer.meta_optimizer = meta_optimizer
        skipped = optimizer.metrics["skipped_updates"]
        self._to_start()
        updates = steps.weight_net_step.count
        objective, on = steps.objective, steps.objective.on

        def watched(*args: Any) -> Any:
            self._meta_random = RandomState.current(self._random_state.device)  # dropout's masks
            self._meta_loss = on(*args)
            return self._meta_loss

        objective.on = watched  # type: ignore
        for batch in self._drawn_apart(batches):
            taken.append(copy.deepcopy(batch))
            self._step(batch)
            if steps.window.count >= optimizer.every:
                break
        else:
            raise ValueError(
                f"batches ended after {len(taken)}, expected enough for the {optimizer.unroll} "
                "steps of a window: give more."
            )
        if steps.weight_net_step.count == updates:
            raise ValueError(
                "the window ended without a meta update, expected one: call the criterion on the "
                "student's output, backward() and optimizer.step() within step()."
            )
        if optimizer.metrics["skipped_updates"] > skipped:
            raise ValueError(
                "the hypergradient is not finite or broke an invariant, expected one that holds: "
                "look at optimizer.metrics after some steps of the loop."
            )
        # φ is what moves: a float32 weight net of a float64 student has float32's slopes.
        formats = (steps.invariants.precision, *(p.dtype for p in self._phi))
        self._precision = max(formats, key=lambda dtype: torch.finfo(dtype).eps)
        self._left = self._student_parameters()
        self._snapshot.restore()
        start = self._student_parameters()
        self._way = _distance(self._left, start)
        return taken

    def _keep_hypergradient(self, *_: Any) -> None:
        self._hypergradient = [_grad(p) for p in self._phi]

    def _drawn_apart(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, whose random numbers are not the loop's: they are drawn once."""
        end = object()
        with preserved_random_state(self._random_state.device):
            iterator = iter(batches)
        while True:
            with preserved_random_state(self._random_state.device):
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch

    def _to_start(self) -> None:
        """Lets a window begin with the coming step."""
        steps = self._optimizer._steps
        steps.meta_set.draw = lambda: self._meta_batch  # type: ignore[method-assign]
        steps.give_up()
        steps.window.count = steps.settings.every - steps.settings.unroll
        steps.watch_if_due()
        self._random_state.set()

    def _run_plain(self) -> None:
        """Runs the loop by the plain optimizer, from the same state."""
        optimizer = self._optimizer
        optimizer._steps.closed = True
        draw_plainly(self)  # the masks of watched steps
        try:
            self._to_start()
            if optimizer.method == "paper":
                self._end_as_paper()
            for batch in self._batches:
                self._step(copy.deepcopy(batch))
        finally:
            draw_as_usual(self)
            optimizer._steps.closed = False

    def _end_as_paper(self) -> None:
        """Makes the window's last step the virtual one of method "paper"."""
        optimizer = self._optimizer
        steps = optimizer._steps
        usual = steps.student_step.take

        def student_step(closure: Any = None) -> None:
            if not steps.window.ends_next:
                usual(closure)
                return
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            p.sub_(group["lr"] * p.grad)

        steps.student_step.take = student_step  # type: ignore[method-assign]

    @contextmanager
    def _features_kept(self) -> Iterator[None]:
        """Gives the weight net the same features in all runs: they count as constants."""
        seen: list[tuple[Any, ...]] = []
        self._call = 0
        self._keeping = False

        def given(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if not self._keeping:
                seen.append(args)
            elif self._call < len(seen):
                args = seen[self._call]
            self._call += 1
            return args

        handle = weight_net_of(self._optimizer.criterion).register_forward_pre_hook(given)
        self._snapshot.retake()
        try:
            yield
        finally:
            handle.remove()

    def _parted(self) -> float:
        """How far the plain optimizer leaves the student from where the wrapped one did."""
        self._call = 0
        self._run_plain()
        if self._optimizer.method == "paper":
            parted = 0.0  # whose real step is another
        else:
            parted = _distance(self._student_parameters(), self._left) / max(self._way, 1e-30)
        self._end = self._student_parameters()
        self._derivative = self._meta_derivative()
        self._snapshot.restore()
        self._keeping = True
        return parted

    def _meta_derivative(self) -> list[Tensor]:
        """Of the meta loss by the student's parameters, as backward gives it."""
        names = self._optimizer._steps.structure.parameters
        leaves = {n: p.detach().clone().requires_grad_() for p, n in names.items()}
        self._meta_random.set()
        with modes_of_our_own(self._random_state.device):
            loss = self._meta_loss(leaves)
            found = torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        return [gradient.double() for gradient in found]

    def _gain(self, move: list[Tensor]) -> float:
        """How the meta loss rises, to first order in the student, where φ is moved all the time."""
        try:
            self._call = 0
            with torch.no_grad():
                for param, part in zip(self._phi, move, strict=True):
                    param.add_(part)
            self._run_plain()
            ways = zip(self._derivative, self._student_parameters(), self._end, strict=True)
            return sum((d * (new.double() - old.double())).sum().item() for d, new, old in ways)
        finally:
            self._snapshot.restore()

    def _directions(self, count: int) -> Iterator[list[Tensor]]:
        """Random, the same length in every tensor, and half along the hypergradient."""
        generator = torch.Generator().manual_seed(0)
        norm = _norm(self._hypergradient)
        for _ in range(count):
            parts = []
            for h in self._hypergradient:
                part = torch.randn(h.shape, generator=generator, dtype=torch.float64)
                part = part.to(h) / part.norm() / len(self._hypergradient) ** 0.5
                parts.append(part + h / norm if norm > 0 else part)
            length = _norm(parts)
            yield [part / length for part in parts]

    def _along(self, direction: list[Tensor]) -> tuple[float, float]:
        """The relative error along a direction, and the part of it that may be rounding."""
        expected = sum((h * d).sum().item() for h, d in zip(self._hypergradient, direction))

        def slope(length: float) -> float:
            up = self._gain([length * d for d in direction])
            down = self._gain([-length * d for d in direction])
            return (up - down) / (2 * length)

        first, ratio = _MOVES.get(self._precision, (1.0, 1 / 2))
        lengths = [first * ratio**i for i in range(_LENGTHS)]
        numbers = [d * end.double() for d, end in zip(self._derivative, self._end, strict=True)]
        rounding = 4 * torch.finfo(self._precision).eps * _norm(numbers)
        size = max(abs(expected), _norm(self._hypergradient))
        found, blur = _extrapolated(lengths, [slope(length) for length in lengths], rounding, size)
        size, rounding = max(abs(found), size), rounding / first
        if size <= rounding:  # nothing is predicted, and nothing is seen
            return 0.0, 0.0
        return abs(found - expected) / size, blur + rounding / size

    def _student_parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._optimizer._steps.structure.parameters]


def _extrapolated(
    lengths: list[float], slopes: list[float], rounding: float, size: float
) -> tuple[float, float]:
    """The slope at length 0 from those at ever shorter lengths, and how well it is known.

    Long moves cross the kinks of the student, short ones drown in rounding: the three neighbours
    that agree best are taken. What rounding explains is held against `size`; more than that, as
    behind a student of many kinks, against the slopes themselves.
    """
    ratio = (lengths[0] / lengths[1]) ** 2

    def blur(i: int) -> float:
        three = slopes[i : i + 3]
        spread, largest = max(three) - min(three), max(map(abs, three))
        explained = spread <= 4 * rounding / lengths[i + 2]
        return spread / max(largest, size if explained else 0.0, 1e-300)

    best = min(range(len(slopes) - 2), key=blur)
    longer, shorter = slopes[best + 1 : best + 3]
    return (ratio * shorter - longer) / (ratio - 1), blur(best)


def _next_of(optimizer: BilevelOptimizer) -> Any:
    """The coming meta batch, which will be drawn all the same."""
    meta_set = optimizer._steps.meta_set
    if meta_set._seen_ahead:
        return meta_set._seen_ahead[0]
    with meta_set.look_ahead() as batches:
        for batch in batches:
            return batch
    return meta_set.draw()  # raises, or begins a new pass


def _grad(param: Tensor) -> Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad.detach().clone()


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    return _norm([a.double() - b.double() for a, b in zip(one, other)])
