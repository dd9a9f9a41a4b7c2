"""The benchmark of the host's work: it runs, and what it counts."""

import json

import torch

import host_cost
from stepcost.operators import computing_operators


def test_writes_ratios_and_operators_of_every_row(tmp_path, capsys):
    out = tmp_path / "host.json"
    rows = ["online", "no_meta"]
    arguments = ["--students", "tiny_depthwise", "--rows", *rows, "--repeats", "5", "--warmup", "1"]
    host_cost.main([*arguments, "--out", str(out)])
    found = json.loads(out.read_text())["students"]["tiny_depthwise"]
    assert list(found) == ["kd", *rows]
    assert all(found[name]["ratio"]["median"] > 0 for name in rows)
    assert found["kd"]["operators"] < found["no_meta"]["operators"] < found["online"]["operators"]
    assert out.with_suffix(".md").read_text() == capsys.readouterr().out[:-1]


def test_operators_that_compute_are_counted_and_views_are_not():
    x = torch.ones(2, 3)
    assert computing_operators(lambda: x.t().reshape(6).detach() * 2 + 1) == 3  # with a copy
    assert computing_operators(lambda: x.view(6).add_(1)) == 1
    assert computing_operators(lambda: None) == 0
