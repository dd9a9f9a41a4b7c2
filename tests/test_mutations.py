"""The deliberate faults of mutations.py still stand where they should."""

import pytest

from tests.mutations import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_replaces_one_line(fault):
    text = (ROOT / "kd_balance" / fault.path).read_text()
    assert text.count(fault.line) == 1 and fault.instead not in (fault.line,)
    assert all((ROOT / "tests" / name).exists() for name in fault.tests.split())
