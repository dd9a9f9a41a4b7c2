"""The property: the right hypergradient and the plain loop's student, or words."""

import re
import warnings

import pytest
import torch

from tests.fuzz.run import Constants, Run, wrapped_and_told

_ABOUT_COST = ("costs more time and memory", "Seems like `optimizer.step()`", "lr_scheduler.step()")
TOLERANCE = 1e-5


def verdict(program):
    """"equal", "refused: …", "told: …", or what is "silent: …"."""
    try:
        run, told = wrapped_and_told(program)
    except ValueError as error:
        return f"refused: {error}"
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:60])):
            Run(program).go()
        return "refused: by torch, as in the plain loop"
    told = [text for text in told if not any(part in text for part in _ABOUT_COST)]
    if any(p.grad is None for p in run.phi):
        return f"told: {told[0]}" if told else "silent: no hypergradient"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        constants = Constants()
        plain = Run(program, constants=constants).go()
        if not all(map(torch.equal, run.parameters(), plain.parameters())):
            return "silent: another student than the plain loop's"
        error = _error(program, run, constants)
    if error <= TOLERANCE:
        return "equal"
    if told:
        return f"told: {told[0]}"
    return f"silent: hypergradient off by {error:.1e}"


def _error(program, run, constants):
    """The relative difference from central differences along one direction."""
    hypergradient = [p.grad.clone() for p in run.phi]
    size = _norm(hypergradient)
    generator = torch.Generator().manual_seed(program.seed)
    direction = [torch.randn(h.shape, generator=generator).to(h) for h in hypergradient]
    length = _norm(direction)
    direction = [d / length + (h / size if size > 0 else 0)
                 for d, h in zip(direction, hypergradient)]
    expected = sum((h * d).sum().item() for h, d in zip(hypergradient, direction))
    error = float("inf")
    for step in (1e-4, 1e-3, 1e-5, 1e-6, 1e-7):
        slope = _slope(program, run, constants, direction, step)
        noise = 1e-14 / step
        scale = max(abs(slope), abs(expected), size)
        error = min(error, max(0.0, abs(slope - expected) - noise) / max(scale, 1e-12))
        if error <= TOLERANCE:
            break
    return error


def _slope(program, run, constants, direction, step):
    """Of the meta loss, averaged over the windows that a step of φ averages."""
    total, last = 0.0, run.length // run.every
    for window in range(last - program.accumulate, last):
        end = (window + 1) * run.every

        def moved(k, end=end):
            return end - program.unroll <= k < end

        pair = []
        for sign in (1, -1):
            constants.rewind()
            move = [sign * step * d for d in direction]
            nudged = Run(program, constants=constants, move=move, moved=moved).go()
            pair.append(nudged.meta_losses[window])
        total += (pair[0] - pair[1]) / (2 * step)
    return total / program.accumulate


def _norm(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm().item()
