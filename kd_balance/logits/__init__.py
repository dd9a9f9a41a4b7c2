"""What a loop makes of the student's outputs before it gives them to the criterion.

On the training batch it is known by its value and its derivatives (:class:`Recorded`). For a meta
batch it is read off the graph and repeated (:class:`Retraced`), and its labels are cut alike
(:class:`Alignment`).
"""

from kd_balance.logits.labels import Alignment, Unlike, places_behind
from kd_balance.logits.recorded import Recorded
from kd_balance.logits.retraced import Edge, Retraced, Untraceable

__all__ = ["Alignment", "Edge", "Recorded", "Retraced", "Unlike", "Untraceable", "places_behind"]
