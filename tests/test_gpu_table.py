"""The GPU's table, dry on a CPU: every row runs, and what fails leaves the rest alone."""

import json

import pytest

import gpu
from gpucost.students import STUDENTS
from stepcost.rows.lookahead import BareHigher
from stepcost.rows.ours import Default

DRY = ["--dry", "--device", "cpu", "--seconds", "0", "--rounds", "1"]


@pytest.mark.parametrize("name", STUDENTS)
def test_every_row_runs_dry(name, tmp_path, capsys):
    data = gpu.main([*DRY, "--students", name, "--out", str(tmp_path / "dry")])
    assert json.loads((tmp_path / "dry.json").read_text()) == data
    table = (tmp_path / "dry.md").read_text()
    assert STUDENTS[name].title in table
    rows = data["students"][name]["rows"]
    assert tuple(rows) == gpu.TABLE
    for row in rows.values():
        missing = row.get("failed", "").startswith("ModuleNotFoundError")
        assert missing or (row["ratio"]["median"] > 0 and row["kernels"]["launches"] > 0), row


def test_a_row_that_fails_says_so_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(BareHigher, "step", fails)
    arguments = ["--students", "resnet8x4", "--rows", "kd", "higher", "no_meta"]
    data = gpu.main([*DRY, *arguments, "--out", str(tmp_path / "dry")])
    rows = data["students"]["resnet8x4"]["rows"]
    assert rows["higher"]["failed"] == "RuntimeError: out of memory"
    assert "failed: RuntimeError: out of memory" in (tmp_path / "dry.md").read_text()
    assert "failed" not in rows["no_meta"]


def test_a_long_period_is_profiled_in_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Default, "_settings", lambda *_: {"every": 16, "unroll": 2})
    arguments = ["--students", "resnet8x4", "--rows", "kd", "default"]
    data = gpu.main([*DRY, *arguments, "--out", str(tmp_path / "dry")])
    row = data["students"]["resnet8x4"]["rows"]["default"]
    assert row["period"] == 16
    assert row["amortised"]["window"] > row["amortised"]["outside"]
    assert "over the period of 16 steps" in (tmp_path / "dry.md").read_text()
