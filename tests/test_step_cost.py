"""The step-cost benchmark: what its rows compute, and what it makes of the numbers."""

import json
from dataclasses import replace

import pytest
import torch

import step_cost
from stepcost.case import Case
from stepcost.exact import Snapshot, hypergradient, relative_error
from stepcost.measure import FEWEST, hypergradient_errors, in_turns, spread, times
from stepcost.memory import peak_memory
from stepcost.models import MODELS, Encoder, ViT
from stepcost.rows import ROWS, row
from tests.devices import CUDA

TINY = Case(model="mlp", batch=6, meta_batch=5, classes=4, parameters=20_000)
WITHOUT_DEFINITION = ("kd", "no_meta", "unroll_4_16", "default")
PEERS = {"betty": "betty", "torchopt": "torchopt"}


def skip_without_peer(name):
    if name in PEERS:
        pytest.importorskip(PEERS[name])


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains_student_and_weight_net(name):
    skip_without_peer(name)
    of = row(name)(TINY)
    before = [p.clone() for p in (*of.student.parameters(), *of.weight_net.parameters())]
    for i in range(of.period):
        of.step(TINY.draw(i), TINY.draw(i, meta=True))
    after = [*of.student.parameters(), *of.weight_net.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(after, before)]
    students = len(list(of.student.parameters()))
    assert all(moved[:students])
    assert all(m == (name not in ("kd", "no_meta")) for m in moved[students:])


@pytest.mark.parametrize("name", [name for name in ROWS if name not in WITHOUT_DEFINITION])
def test_hypergradients_agree_with_float64_unrolling(name):
    skip_without_peer(name)
    limits = {"float32": 1e-5, "float64": 1e-12}
    for dtype, limit in limits.items():
        errors = sorted(hypergradient_errors(replace(TINY, dtype=dtype), name))
        assert errors[len(errors) // 2] < (0.05 if name == "betty" else limit)


@pytest.mark.parametrize("model", ["resnet8", "wrn_16_2", "vit_tiny", "bert_mini"])
def test_every_model_has_the_hypergradient_of_float64_unrolling(model, monkeypatch):
    kinds = {"vit_tiny": ViT, "bert_mini": Encoder}
    if kind := kinds.get(model):
        small = MODELS[model]._replace(build=lambda classes, _: kind(classes, 8, 2, 2))
        monkeypatch.setitem(MODELS, model, small)
    case = Case(model, batch=3, meta_batch=3, classes=4)
    of = row("online")(case)
    batches = case.draw(0), case.draw(0, meta=True)
    of.step(*batches)
    before = Snapshot.of(of.student, of.optimizer, of.weight_net)
    of.step(*batches)
    exact = hypergradient("optimizer", before, *batches)
    assert relative_error(of.hypergradient(), exact) < 1e-3


def test_the_look_ahead_loops_agree_with_one_another():
    batches = TINY.draw(0), TINY.draw(0, meta=True)
    loops = [row(name)(TINY) for name in ("higher", "create_graph", "paper")]
    for _ in range(3):
        for loop in loops:
            loop.step(*batches)
    first = loops[0].hypergradient()
    assert all(relative_error(loop.hypergradient(), first) < 1e-4 for loop in loops)


def test_the_mlp_has_the_parameters_asked_for():
    for count in (10**5, 10**6, 10**7):
        student = MODELS["mlp"].build(100, count)
        assert sum(p.numel() for p in student.parameters()) == pytest.approx(count, rel=0.02)


def test_bfloat16_and_channels_last_reach_the_student():
    case = Case("resnet8", batch=2, meta_batch=2, dtype="bfloat16", channels_last=True)
    batch = case.draw(0)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    with case.autocast():
        assert case.student()(batch.inputs).dtype == torch.bfloat16


def test_times_are_ratios_of_whole_periods():
    for name in ("online", "online_5"):
        of = in_turns(TINY, name, rounds=FEWEST, warmup=1)
        samples = (of[key]["samples"] for key in ("seconds", "kd_seconds", "ratio"))
        for own, base, ratio in zip(*samples):
            assert ratio == pytest.approx(own / base, rel=1e-3)
        assert len(of["ratio"]["samples"]) == FEWEST


def test_times_are_taken_in_a_child_process():
    assert times(TINY, "no_meta", threads=1, rounds=1, warmup=0)["ratio"]["median"] > 0
    with pytest.raises(RuntimeError, match="KeyError: 'no such row'"):
        times(TINY, "no such row", threads=1, rounds=1, warmup=0)


def test_spread_of_known_numbers():
    assert spread([3.0, 1.0, 2.0]) == {
        "median": 2.0, "quartiles": [1.5, 2.5], "samples": [3.0, 1.0, 2.0]
    }
    assert spread([2.0])["quartiles"] == [2.0, 2.0]


def test_peak_memory_grows_with_the_batch():
    small, large = (
        peak_memory(replace(TINY, batch=batch), "kd", threads=1)["over_import"]
        for batch in (8, 10_000)
    )
    # the inputs are there before; 10,000 hidden activations are not
    assert large - small > 10_000 * 35 * 4


def test_memory_of_a_failing_row_says_why():
    with pytest.raises(RuntimeError, match="KeyError: 'no such row'"):
        peak_memory(TINY, "no such row", threads=1)


@pytest.fixture
def no_children(monkeypatch):
    """Times and memory without child processes, which import torch each."""
    found = {"over_import": 2**20, "parameters": 20_000}
    monkeypatch.setattr(step_cost, "peak_memory", lambda *_: found)
    monkeypatch.setattr(
        step_cost, "times", lambda case, name, threads, *rest: in_turns(case, name, *rest)
    )


def test_a_run_writes_resumes_and_never_mixes_settings(tmp_path, capsys, no_children):
    out = tmp_path / "cost.json"
    options = ["--model", "mlp", "--params", "20000", "--batch", "6", "--classes", "4"]
    options += ["--repeats", "2", "--warmup", "0", "--memory-repeats", "1", "--out", str(out)]
    step_cost.main([*options, "--rows", "online"])
    first = json.loads(out.read_text())
    table = capsys.readouterr().out
    assert "| plain KD | 1 |" in table and "| kd-balance online |" in table
    assert out.with_suffix(".png").exists() and out.with_suffix(".md").read_text() in table
    step_cost.main([*options, "--rows", "online", "paper"])
    second = json.loads(out.read_text())
    rows, more = first["cases"][0]["rows"], second["cases"][0]["rows"]
    assert {name: more[name] for name in rows} == rows and "paper" in more
    with pytest.raises(ValueError, match="another repeats"):
        step_cost.main([*options, "--repeats", "3"])


def test_a_row_that_cannot_run_says_why(tmp_path, monkeypatch, no_children):
    def refuse(case, name):
        raise ImportError("no betty here")

    monkeypatch.setattr(step_cost, "hypergradient_errors", refuse)
    out = tmp_path / "cost.json"
    step_cost.main(["--model", "mlp", "--rows", "betty", "--out", str(out)])
    title = ROWS["betty"].title
    assert f"| {title} | ImportError: no betty here |" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize("field", ["batch", "classes"])
def test_sweeps_make_a_case_of_every_value(tmp_path, field, no_children):
    options = ["--model", "mlp", "--params", "20000", "--batch", "6", "--repeats", "2"]
    options += ["--warmup", "0", "--memory-repeats", "1", "--rows", "kd"]
    out = tmp_path / "cost.json"
    step_cost.main([*options, "--sweep", field, "--values", "5", "7", "--out", str(out)])
    cases = json.loads(out.read_text())["cases"]
    assert [held["case"][field] for held in cases] == [5, 7]


@pytest.mark.parametrize("device", [CUDA])
def test_times_and_memory_on_a_gpu(device):
    case = replace(TINY, device=device)
    assert times(case, "online", threads=1, rounds=2, warmup=1)["ratio"]["median"] > 0
    assert peak_memory(case, "online", threads=1)["over_import"] > 0
