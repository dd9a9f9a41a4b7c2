"""Replays: the student called again as it was called, leaving no trace in it."""

from kd_balance.replay.embedding import LoopBackward
from kd_balance.replay.random_state import RandomState, preserved_random_state
from kd_balance.replay.stop_gradient import stops_gradients
from kd_balance.replay.structure import Structure
from kd_balance.replay.student_call import StudentCall, leaves_of, replayable

__all__ = [
    "LoopBackward",
    "RandomState",
    "Structure",
    "StudentCall",
    "leaves_of",
    "preserved_random_state",
    "replayable",
    "stops_gradients",
]
