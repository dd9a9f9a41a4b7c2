"""Random loops out of a grammar of what people do: right, refused in words, or told by a warning.

    KD_BALANCE_FUZZ=20000 python -m pytest tests/test_fuzz.py
"""

import os

import pytest

hypothesis = pytest.importorskip("hypothesis")

from tests.fuzz.grammar import program, programs  # noqa: E402
from tests.fuzz.verdict import verdict  # noqa: E402

EXAMPLES = int(os.environ.get("KD_BALANCE_FUZZ", 200))


@hypothesis.settings(
    max_examples=EXAMPLES, derandomize=EXAMPLES == 200, database=None, deadline=None
)
@hypothesis.given(programs())
def test_no_loop_gives_a_silently_wrong_number(program):
    assert not verdict(program).startswith("silent")


FOUND = [
    program(unroll=2, deeds=[("hooks", "activation"), ("loss", "cross entropy")]),
    program(unroll=2, engine="unroll", deeds=[("hooks", "no_grad within"), ("loss", "penalty")]),
    program(deeds=[("backward", "by autograd.grad"), ("loss", "log")]),
    program(unroll=2, idle=1, deeds=[("hooks", "no_grad within")]),
    program(student="norm", unroll=3, deeds=[("hooks", "module backward")]),
    program(student="norm", unroll=3, engine="unroll", deeds=[("hooks", "module backward")]),
    program(student="norm", unroll=3, deeds=[("hooks", "detached within")]),
    program(unroll=3, zero_grad="after step", deeds=[("time", "group added")]),
    program(engine="unroll", unroll=3, zero_grad="to zero", deeds=[("time", "frozen later")]),
    program(engine="unroll", unroll=3,
            deeds=[("backward", "in part"), ("time", "frozen later")]),
    program(unroll=3, deeds=[("hooks", "detached within"), ("time", "frozen later")]),
    program(windows=2, deeds=[("backward", "other loss alone"), ("backward", "probed before")]),
    program(engine="unroll", deeds=[("hooks", "activation clamped"), ("loss", "cross entropy")]),
    program(engine="unroll", unroll=2, deeds=[("hooks", "activation"), ("time", "frozen later")]),
    program(features=("student_ce", "teacher_ce"), labels="probabilities", optimizer="rmsprop",
            scheduler="onecycle", deeds=[("gradients", "clip norm")], seed=2),
    program(student="tied", logits="log probabilities", labels="probabilities", temperature=4.0,
            features=("teacher_ce",), deeds=[("gradients", "clip norm inf")], seed=0),
]


@pytest.mark.parametrize("loop", FOUND, ids=repr)
def test_what_was_silent_once_is_not(loop):
    assert not verdict(loop).startswith("silent")
