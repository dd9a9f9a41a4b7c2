"""docs/errors.md has every message of the package, each with an anchor of its own."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs/tools"))
import messages  # noqa: E402

PAGE = (ROOT / "docs/errors.md").read_text(encoding="utf-8")


def test_every_message_of_the_source_is_on_the_page_and_no_other():
    source = {message.text for message in messages.messages()}
    assert len(source) > 200
    assert source == messages.written(PAGE).keys(), "python docs/tools/messages.py --write"
    anchors = re.findall(r'<a id="([^"]+)"', PAGE)
    assert len(anchors) == len(set(anchors)) == len(source)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('raise ValueError(f"alpha is {a}, expected a number: give one.")', True),
        ('raise ours.UnlikeError("a reshape that " "merges classes")', True),
        ('self._warnings.once("Gradients were not cleared.")', True),
        ('text = "the gradients differ by {error:.1g}, expected the same."', True),
        ('"""Raises what was expected of it."""', False),
        ('name = "no message at all"', False),
    ],
)
def test_what_counts_as_a_message(code, found):
    assert bool(list(messages._texts(messages.ast.parse(code)))) is found


def test_errors_that_were_really_raised_are_found():
    from kd_balance import MetaWeightNet, WeightedKDLoss

    for make in (
        lambda: WeightedKDLoss(temperature=0),
        lambda: WeightedKDLoss(reduction="median"),
        lambda: MetaWeightNet(ratio=1),
    ):
        with pytest.raises(ValueError) as raised:
            make()
        pieces = [text.split("…") for text in messages.written(PAGE)]
        patterns = [".*?".join(map(re.escape, parts)) for parts in pieces]
        assert any(re.fullmatch(pattern, str(raised.value)) for pattern in patterns)
